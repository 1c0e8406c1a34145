"""Any average after the fact: coefficients, their honesty, streaming, and refused input."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onehot import unit
from safetensors.torch import load_file, save_file

from ddpm_ema.averaging import (
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    HardCopy,
    PowerFunction,
    Profile,
    Snapshot,
    StochasticWeightAverage,
    Uniform,
    find_snapshots,
    posthoc_coefficients,
    reconstruct,
    std_to_exponent,
    write_snapshot,
)
from ddpm_ema.averaging.power_function import power_function_inner_product

STDS = (0.05, 0.10)


def grid(step_out: int, every: int) -> tuple[list[int], list[float]]:
    """Two widths stored every so many steps."""
    steps = [step for step in range(every, step_out + 1, every) for _ in STDS]
    return steps, list(STDS) * (step_out // every)


def dense_solution(steps: list[int], stds: list[float], step_out: int, target: Profile) -> np.ndarray:
    """The same least squares by brute force: one column a snapshot, one row a step, the sum held by a heavy row."""
    columns = [
        np.pad(PowerFunction(std).weighting(step), (0, step_out - step)) for step, std in zip(steps, stds, strict=True)
    ]
    matrix = np.stack([*columns], axis=1)
    goal = target.weighting(step_out)
    heavy = 1e6 * np.linalg.norm(matrix)
    matrix = np.vstack([matrix, np.full(len(columns), heavy)])
    return np.linalg.lstsq(matrix, np.append(goal, heavy), rcond=None)[0]


@pytest.mark.parametrize(
    "target", [PowerFunction(0.075), ConstantDecay(0.99), BiasCorrected(0.999), Uniform(), PowerFunction(0.2)]
)
def test_coefficients_are_the_constrained_least_squares_solution(target: Profile) -> None:
    steps, stds = grid(2000, 400)
    ours = posthoc_coefficients(steps, stds, 2000, target)
    np.testing.assert_allclose(ours.weights, dense_solution(steps, stds, 2000, target), rtol=1e-4, atol=1e-5)
    assert ours.weights.dtype == np.float64
    assert ours.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert ours.amplification == pytest.approx(np.abs(ours.weights).sum())


def test_a_long_training_is_factored_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_ema.averaging import posthoc

    steps, stds = grid(3000, 500)
    whole = posthoc_coefficients(steps, stds, 3000, ConstantDecay(0.99))
    monkeypatch.setattr(posthoc, "_CHUNK_STEPS", 128)
    in_blocks = posthoc_coefficients(steps, stds, 3000, ConstantDecay(0.99))
    np.testing.assert_allclose(in_blocks.weights, whole.weights, rtol=1e-8, atol=1e-10)
    assert in_blocks.profile_error == pytest.approx(whole.profile_error, rel=1e-8)


# Least squares without the constraint, worked out independently; the constraint may only add a little.
@pytest.mark.parametrize(
    ("every", "target", "error", "amplification"),
    [
        (1000, ConstantDecay(0.99), 0.49, 18),
        (1000, ConstantDecay(0.999), 0.0035, 1.1),
        (1000, PowerFunction(0.03), 0.077, 5.6),
        (1000, PowerFunction(0.15), 0.022, 1.7),
        (500, ConstantDecay(0.999), 0.0010, 1.1),
        (500, PowerFunction(0.15), 0.0058, 1.7),
        (200, ConstantDecay(0.99), 0.095, 124),
        (200, PowerFunction(0.03), 0.0047, 12),
    ],
)
def test_the_figures_are_those_of_an_independent_calculation(every, target, error, amplification) -> None:
    ours = posthoc_coefficients(*grid(10_000, every), 10_000, target)
    assert ours.profile_error == pytest.approx(error, rel=0.06)
    assert ours.amplification == pytest.approx(amplification, rel=0.06)


@pytest.mark.parametrize(("every", "condition"), [(1000, 1.1e3), (500, 1.4e4), (200, 5.9e5), (100, 1.0e7)])
def test_the_condition_number_is_that_of_the_inner_products(every: int, condition: float) -> None:
    steps, stds = grid(10_000, every)
    pairs = [(step, std_to_exponent(std)) for step, std in zip(steps, stds, strict=True)]
    gram = np.array([[power_function_inner_product(*a, *b) for b in pairs] for a in pairs])
    ours = posthoc_coefficients(steps, stds, 10_000, 0.07).condition_number
    assert ours == pytest.approx(np.linalg.cond(gram), rel=0.02)
    assert ours == pytest.approx(condition, rel=0.05)


@given(target=st.sampled_from([0.07, 0.12, 0.2]), index=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_an_average_that_was_stored_is_given_back_by_itself(target: float, index: int) -> None:
    steps, stds = grid(1000, 200)
    steps[index] = 1000
    stds[index] = target
    ours = posthoc_coefficients(steps, stds, 1000, target)
    np.testing.assert_allclose(ours.weights, np.eye(10)[index], atol=1e-8)
    assert ours.profile_error < 1e-10


def test_one_average_can_only_be_itself() -> None:
    ours = posthoc_coefficients([100], [0.1], 100, 0.05)
    assert ours.weights.tolist() == [1.0]
    assert ours.condition_number == pytest.approx(1.0)
    assert ours.profile_error > 0.3


def test_any_mix_of_widths_and_rules_can_be_combined() -> None:
    mixed: list[float | Profile] = [0.05, Uniform(), 0.2, BiasCorrected(0.99), StochasticWeightAverage(500, 10)]
    ours = posthoc_coefficients([1000, 600, 1000, 1000, 900], mixed, 1000, BiasCorrected(0.99))
    np.testing.assert_allclose(ours.weights, [0, 0, 0, 1, 0], atol=1e-9)


def test_more_averages_than_steps_are_solved_but_said_to_be_dependent() -> None:
    ours = posthoc_coefficients(*grid(20, 1), 20, 0.08)
    assert ours.weights.sum() == pytest.approx(1.0)
    assert ours.profile_error < 1e-6
    assert any("nearly linearly dependent" in sentence for sentence in ours.warnings())


def test_a_target_that_cannot_be_had_says_so() -> None:
    steps, stds = grid(10_000, 1000)
    (narrow,) = posthoc_coefficients(steps, stds, 10_000, HardCopy(1)).warnings()
    assert "cannot give this profile: its weighting is off by 99.7%" in narrow
    assert posthoc_coefficients(steps, stds, 10_000, ConstantDecay(0.999)).warnings() == []


def test_initial_weights_that_power_functions_do_not_hold_are_said_to_be_missing() -> None:
    ours = posthoc_coefficients(*grid(3000, 100), 3000, ConstantDecay(0.999))
    assert ours.initial_weight_error == pytest.approx(0.999**3000)
    assert any("the initial parameters 5.0% more or less weight" in sentence for sentence in ours.warnings())
    assert posthoc_coefficients(*grid(3000, 100), 3000, BiasCorrected(0.999)).initial_weight_error == 0.0


def test_rounding_that_is_amplified_says_so() -> None:
    narrow = posthoc_coefficients(*grid(10_000, 100), 10_000, ConstantDecay(0.99))
    assert narrow.warnings(2.0**-24) == []
    (sentence,) = narrow.warnings(2.0**-8)
    assert "amplified 188 times" in sentence


def test_no_number_is_claimed_below_the_float64_floor() -> None:
    exact = posthoc_coefficients([1000, 1000], [0.05, 0.1], 1000, 0.05)
    assert 0.0 <= exact.profile_error < 1e-12


@pytest.mark.parametrize(
    ("steps", "stds", "step_out", "target", "message"),
    [
        ([], [], 100, 0.1, "expected equally many, at least one; got 0 and 0"),
        ([100], [0.05, 0.1], 100, 0.1, "got 1 and 2"),
        ([100, 200], [0.05, 0.1], 150, 0.1, "1 <= step <= step_out = 150, got 200"),
        ([0], [0.05], 150, 0.1, "got 0"),
        ([100, 100], [0.05, 0.05], 150, 0.1, r"PowerFunction\(std=0\.05\) at step 100 is given twice"),
        ([100], [0.5], 150, 0.1, r"std: expected a number with 0 < std < 0\.288675"),
        ([100], [0.05], 150, 0.29, r"std: .* got 0\.29"),
    ],
)
def test_bad_input_is_refused(steps, stds, step_out, target, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posthoc_coefficients(steps, stds, step_out, target)


def one_hot_run(folder: Path, steps: int, every: int, dtype: torch.dtype = torch.float32, extra=()) -> AverageBank:
    """Train one-hot parameters, store two averages every so often, and keep others directly."""
    parameter = unit(0, steps + 1)
    profiles = {"power_0_05": PowerFunction(0.05), "power_0_10": PowerFunction(0.10)} | dict(extra)
    bank = AverageBank([("weight", parameter)], profiles)
    for step in range(1, steps + 1):
        parameter.copy_(unit(step, steps + 1))
        bank.update(step)
        if step % every == 0:
            for name in ("power_0_05", "power_0_10"):
                path = folder / f"step-{step:08d}" / f"{name}.safetensors"
                write_snapshot(path, bank.weights(name), step, profiles[name], dtype)
    return bank


def test_a_reconstructed_average_is_the_one_kept_directly(tmp_path: Path) -> None:
    targets = {"wide": PowerFunction(0.15), "constant": BiasCorrected(0.98), "narrow": PowerFunction(0.03)}
    bank = one_hot_run(tmp_path, 600, 30, extra=targets)
    for name, target in targets.items():
        got = reconstruct(find_snapshots(tmp_path), 600, target)
        kept = bank.weights(name)["weight"]
        error = ((got.weights["weight"] - kept).norm() / kept.norm()).item()
        assert error == pytest.approx(got.coefficients.profile_error, rel=0.05, abs=1e-5)
        assert error < 0.03
        assert got.weights["weight"].dtype is torch.float32
        assert got.warnings == []


def test_an_earlier_step_is_reconstructed_from_what_was_stored_until_then(tmp_path: Path) -> None:
    one_hot_run(tmp_path, 600, 60)
    got = reconstruct(find_snapshots(tmp_path), 300, 0.07)
    assert {snapshot.step for snapshot in got.snapshots} == {60, 120, 180, 240, 300}
    assert torch.count_nonzero(got.weights["weight"][301:]) == 0


def test_a_step_that_was_not_stored_is_refused_with_the_nearest_ones(tmp_path: Path) -> None:
    one_hot_run(tmp_path, 100, 20)
    with pytest.raises(ValueError, match="step 55 was not stored; the nearest are 40, 60, 80"):
        reconstruct(find_snapshots(tmp_path), 55, 0.07)
    with pytest.raises(ValueError, match="step 50 was not stored; there are no snapshots at all"):
        reconstruct([], 50, 0.07)


def test_bf16_snapshots_cost_precision_and_say_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(4096)
    for dtype, folder in ((torch.float32, tmp_path / "fp32"), (torch.bfloat16, tmp_path / "bf16")):
        for step in range(100, 1001, 100):
            for std in STDS:
                path = folder / f"step-{step:08d}" / f"p{std}.safetensors"
                write_snapshot(path, {"w": values}, step, PowerFunction(std), dtype)
    full = reconstruct(find_snapshots(tmp_path / "fp32"), 1000, BiasCorrected(0.95))
    half = reconstruct(find_snapshots(tmp_path / "bf16"), 1000, BiasCorrected(0.95))
    # All snapshots are the same vector, so any average of them is: what differs is rounding alone.
    fp32_error = ((full.weights["w"] - values).norm() / values.norm()).item()
    bf16_error = ((half.weights["w"] - values).norm() / values.norm()).item()
    assert fp32_error < 1e-6
    assert 1e-3 < bf16_error <= half.coefficients.amplification * 2.0**-8
    assert not any("Rounding" in sentence for sentence in full.warnings)
    assert any("Rounding in the stored averages is amplified" in sentence for sentence in half.warnings)


def test_a_snapshot_says_what_it_is_and_is_contiguous(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "x.safetensors"
    written = write_snapshot(path, {"w": tensor}, 7, PowerFunction(0.1), torch.bfloat16)
    assert Snapshot.open(path) == written == Snapshot(7, PowerFunction(0.1), path)
    assert load_file(path)["w"].dtype is torch.bfloat16
    torch.testing.assert_close(load_file(path)["w"].float(), tensor, rtol=2.0**-8, atol=0)
    assert written.shapes() == {"w": (2, 3, 4, 4)}
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]  # no temporary is left behind


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_ema.averaging import snapshots

    path = tmp_path / "x.safetensors"
    write_snapshot(path, {"w": torch.ones(3)}, 7, PowerFunction(0.1))

    def half(target, tensors, metadata) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(snapshots, "save_tensors", half)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(path, {"w": torch.zeros(3)}, 8, PowerFunction(0.1))
    assert Snapshot.open(path).step == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(("step", "dtype", "message"), [(0, torch.float32, "step: "), (5, torch.float16, "dtype: ")])
def test_a_snapshot_of_no_step_or_another_dtype_is_refused(tmp_path: Path, step, dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_snapshot(tmp_path / "x.safetensors", {"w": torch.ones(1)}, step, Uniform(), dtype)


@pytest.mark.parametrize("pickle_as", ["zip", "legacy"])
def test_a_pickle_offered_as_snapshot_is_refused_unread(tmp_path: Path, pickle_as: str) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "x.safetensors"
    torch.save({"w": Bomb()}, path, _use_new_zipfile_serialization=pickle_as == "zip")
    with pytest.raises(ValueError, match="this is a pickle, which can run code when it is read: refused"):
        Snapshot.open(path)
    assert not (tmp_path / "ran").exists()


def test_a_broken_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_snapshot(path, {"w": torch.ones(1000)}, 7, PowerFunction(0.1))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x\.safetensors: not a whole safetensors file"):
        Snapshot.open(path)
    save_file({"w": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a snapshot: its metadata has no valid 'step' and 'profile'"):
        Snapshot.open(path)
    save_file({"w": torch.ones(1)}, path, metadata={"step": "7", "profile": '{"kind": "powerfunction", "std": 0.1}'})
    with pytest.raises(ValueError, match="did you mean 'power_function'"):
        Snapshot.open(path)


def test_snapshots_of_different_models_are_refused_tensor_by_tensor(tmp_path: Path) -> None:
    a = write_snapshot(tmp_path / "a.safetensors", {"w": torch.ones(3), "b": torch.ones(2)}, 5, PowerFunction(0.1))
    b = write_snapshot(tmp_path / "b.safetensors", {"w": torch.ones(4), "c": torch.ones(2)}, 6, PowerFunction(0.1))
    with pytest.raises(ValueError, match=r"a\.safetensors: not of the same model") as refused:
        reconstruct([a, b], 6, 0.05)
    assert "'c' is missing" in str(refused.value)
    assert "'w' has shape (3,), expected (4,)" in str(refused.value)


MEASURE = """
import sys, threading, time
from pathlib import Path
from ddpm_ema.averaging import find_snapshots, reconstruct

def anonymous_bytes():  # memory of this process that is not backed by a file
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

reconstruct(find_snapshots(sys.argv[1]), 100, 0.1)  # whatever is allocated once, is
before, peak, done = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
got = reconstruct(find_snapshots(sys.argv[2]), 900, 0.1)
done.set()
watcher.join()
assert abs(got.weights["w0"][0].item() - 900.0) < 1e-3
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reconstruction_never_holds_more_than_two_models(tmp_path: Path) -> None:
    num_tensors, mebibyte = 48, 1 << 20
    write_snapshot(tmp_path / "tiny/step-1/x.safetensors", {"w": torch.ones(8)}, 100, PowerFunction(0.1))
    for step in range(100, 901, 100):
        tensors = {f"w{i}": torch.full((mebibyte // 4,), float(step)) for i in range(num_tensors)}
        write_snapshot(tmp_path / f"model/step-{step}/x.safetensors", tensors, step, PowerFunction(0.1))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    held = int(done.stdout) / (num_tensors * mebibyte)
    assert 1.0 <= held <= 2.0  # in models: the result alone is one


def test_reconstruction_has_one_file_open_at_a_time(tmp_path: Path) -> None:
    snapshots = [
        write_snapshot(
            tmp_path / f"{step}.safetensors", {"w": torch.ones(8), "v": torch.ones(8)}, step, PowerFunction(0.1)
        )
        for step in range(1, 41)
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        reconstruct(snapshots, 40, 0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

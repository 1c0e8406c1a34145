"""Any average after the fact, from files: snapshots, streaming, the check of what was predicted, and refused input."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onehot import unit
from pickled import Bomb
from safetensors.torch import load_file, save_file

from ddpm_ema.averaging import (
    RAW,
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    PowerFunction,
    Profile,
    Snapshot,
    StochasticWeightAverage,
    Uniform,
    find_snapshots,
    posthoc_coefficients,
    reconstruct,
    write_snapshot,
)
from ddpm_ema.averaging.posthoc import estimate_white_noise, fit


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


def test_the_weights_are_those_that_the_coefficients_give(tmp_path: Path) -> None:
    """One-hot parameters are white noise, whose error is the distance of weightings that is reported beside the prediction."""
    targets = {"wide": PowerFunction(0.15), "constant": BiasCorrected(0.98), "narrow": PowerFunction(0.03)}
    bank = one_hot_run(tmp_path, 600, 30, extra=targets)
    for name, target in targets.items():
        got = reconstruct(find_snapshots(tmp_path), 600, target, check=False)
        kept = bank.weights(name)["weight"]
        error = ((got.weights["weight"] - kept).norm() / kept.norm()).item()
        assert error == pytest.approx(got.coefficients.profile_error, rel=0.05, abs=1e-5)
        assert got.weights["weight"].dtype is torch.float32
        assert got.warnings == []


def walking_run(
    folder: Path,
    every: int,
    stored: dict[str, Profile],
    kept: dict[str, Profile],
    rate: Callable[[int], float] = lambda step: 0.1,
    noise: float = 0.0,
    start: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A random walk of 400 steps, snapshots of `stored` now and then; gives `kept` and raw, as they stood at the end."""
    torch.manual_seed(0)
    walk, weight = start * torch.ones(5000), start * torch.ones(5000)
    bank = AverageBank([("weight", weight)], {**stored, **kept})
    for step in range(401):
        if step:
            walk += rate(step) * torch.randn(5000)
            weight.copy_(walk + noise * rate(step) * torch.randn(5000))
            bank.update(step)
        for name, profile in stored.items():
            if step and step % every == 0:
                path = folder / f"step-{step:08d}" / f"{name}.safetensors"
                write_snapshot(path, {"weight": weight} if profile == RAW else bank.weights(name), step, profile, dtype)
    write_snapshot(folder.parent / "raw.safetensors", {"weight": weight}, 400, RAW)
    return {name: bank.weights(name)["weight"].clone() for name in kept} | {"raw": weight}


@pytest.mark.parametrize(
    "stored", [{"p05": PowerFunction(0.05), "uniform": Uniform()}, {"raw": RAW, "uniform": Uniform()}], ids=str
)
def test_another_stored_average_is_rebuilt_and_its_error_stands_beside_the_prediction(tmp_path, stored) -> None:
    kept = walking_run(tmp_path / "run", 40, stored, {"target": BiasCorrected(0.98)})
    snapshots, raw = find_snapshots(tmp_path / "run"), Snapshot.open(tmp_path / "raw.safetensors")
    got = reconstruct(snapshots, 400, BiasCorrected(0.98), kept=[raw])
    actual = (got.weights["weight"] - kept["target"]).norm() / (kept["target"] - kept["raw"]).norm()
    assert actual.item() == pytest.approx(got.coefficients.predicted_relative_error, rel=0.15)
    assert got.check is not None
    assert got.check.name == ("p05" if "p05" in stored else "uniform")  # the nearest to the target
    assert got.check.actual == pytest.approx(got.check.predicted, rel=0.15)
    assert reconstruct(snapshots, 400, BiasCorrected(0.98), kept=[raw], check=False).check is None


def test_a_check_that_comes_out_far_worse_than_predicted_is_said(tmp_path) -> None:
    """The rate decays to zero and nobody told the fit."""
    stored = {"p05": PowerFunction(0.05), "uniform": Uniform()}
    walking_run(tmp_path / "run", 40, stored, {}, rate=lambda step: 0.1 * (1 - step / 401) ** 2)
    snapshots, raw = find_snapshots(tmp_path / "run"), Snapshot.open(tmp_path / "raw.safetensors")
    untold = reconstruct(snapshots, 400, 0.06, kept=[raw])
    assert any(text.startswith("Check: p05, rebuilt from the other snapshots, is off by") for text in untold.warnings)
    told = reconstruct(snapshots, 400, 0.06, kept=[raw], step_variance=lambda t: (1 - (t + 1) / 401) ** 4)
    assert told.check is not None
    assert told.check.actual == pytest.approx(told.check.predicted, rel=0.2)


def test_an_average_that_is_only_compared_with_may_lie_elsewhere(tmp_path) -> None:
    kept = walking_run(tmp_path / "run", 40, {"raw": RAW}, {"debiased": BiasCorrected(0.98)})
    found = fit(find_snapshots(tmp_path / "run"), 400, BiasCorrected(0.99))
    assert found.checked() is None
    elsewhere = write_snapshot(
        tmp_path / "debiased.safetensors", {"weight": kept["debiased"]}, 400, BiasCorrected(0.98)
    )
    check = found.checked([elsewhere])
    assert check is not None
    assert check.name == "debiased"
    assert check.actual == pytest.approx(check.predicted, rel=0.15)


@pytest.mark.parametrize("decay", [0.0, 0.9], ids=["constant rate", "rate decays to a tenth"])
def test_the_white_noise_of_raw_checkpoints_is_estimated_and_shrinks_with_the_rate(
    tmp_path, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the standard deviation of five steps: 25 times v(t). Every file is read once."""

    def rate(step: int) -> float:
        return 0.1 * (1 - decay * step / 400)

    kept = walking_run(tmp_path, 10, {"raw": RAW}, {"target": BiasCorrected(0.98)}, noise=5.0, rate=rate)
    raw, variance = find_snapshots(tmp_path), lambda t: rate(t + 1) ** 2
    read, tensors = [], Snapshot.tensors
    monkeypatch.setattr(Snapshot, "tensors", lambda self, names: read.append(self.step) or tensors(self, names))
    assert estimate_white_noise(raw, variance) == pytest.approx(25.0, rel=0.1)
    assert read == [snapshot.step for snapshot in raw]
    assert estimate_white_noise(raw[:2], variance) == 0.0
    got = reconstruct(raw, 400, BiasCorrected(0.98), step_variance=variance)
    actual = (got.weights["weight"] - kept["target"]).norm() / (kept["target"] - kept["raw"]).norm()
    assert actual.item() == pytest.approx(got.coefficients.predicted_relative_error, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_predicted_from_the_size_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights twenty times as large as the way they went; what was stored can give the target exactly, but for rounding."""
    stored: dict[str, Profile] = {"p05": PowerFunction(0.05), "uniform": Uniform()}
    kept = walking_run(tmp_path, 80, stored, {"last": StochasticWeightAverage(321)}, start=40.0, dtype=dtype)
    got = reconstruct(find_snapshots(tmp_path), 400, StochasticWeightAverage(321))
    actual = (got.weights["weight"] - kept["last"]).norm() / (kept["last"] - kept["raw"]).norm()
    assert got.fit.magnitude == pytest.approx(20.0, rel=0.1)
    assert actual.item() == pytest.approx(got.coefficients.predicted_relative_error, rel=0.35)


def test_averages_that_skip_steps_are_stored_and_read_as_such(tmp_path: Path) -> None:
    parameter, profiles = unit(0, 201), {"p05": PowerFunction(0.05), "uniform": Uniform(), "target": PowerFunction(0.1)}
    bank = AverageBank([("weight", parameter)], profiles)
    for step in range(10, 201, 10):
        parameter.copy_(unit(step, 201))
        bank.update(step, 10)
        for name in ("p05", "uniform"):
            if step % 50 == 0:
                path = tmp_path / f"step-{step:08d}" / f"{name}.safetensors"
                write_snapshot(path, bank.weights(name), step, profiles[name], every=10)
    snapshots = find_snapshots(tmp_path)
    assert {snapshot.every for snapshot in snapshots} == {10}
    got = reconstruct(snapshots, 200, PowerFunction(0.1), check=False)
    steps, stored = [s.step for s in snapshots], [s.profile for s in snapshots]
    told, untold = (posthoc_coefficients(steps, stored, 200, 0.1, every=n).predicted_relative_error for n in (10, 1))
    assert got.coefficients.predicted_relative_error == pytest.approx(told, rel=1e-3)
    assert told > 3 * untold
    assert set(got.weights["weight"].nonzero().flatten().tolist()) <= set(range(0, 201, 10))


def test_an_earlier_step_is_reconstructed_from_what_was_stored_until_then(tmp_path: Path) -> None:
    one_hot_run(tmp_path, 600, 60)
    got = reconstruct(find_snapshots(tmp_path), 300, 0.07)
    assert {snapshot.step for snapshot in got.fit.snapshots} == {60, 120, 180, 240, 300}
    assert torch.count_nonzero(got.weights["weight"][301:]) == 0


def test_a_step_that_was_not_stored_is_refused_with_the_nearest_ones(tmp_path: Path) -> None:
    one_hot_run(tmp_path, 100, 20)
    with pytest.raises(ValueError, match="step 55 was not stored; the nearest are 40, 60, 80"):
        reconstruct(find_snapshots(tmp_path), 55, 0.07)
    with pytest.raises(ValueError, match="step 50 was not stored; there are no snapshots at all"):
        reconstruct([], 50, 0.07)


def test_a_snapshot_says_what_it_is_and_is_contiguous(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "x.safetensors"
    written = write_snapshot(path, {"w": tensor}, 7, PowerFunction(0.1), torch.bfloat16)
    assert Snapshot.open(path) == written == Snapshot(7, PowerFunction(0.1), path)
    assert load_file(path)["w"].dtype is torch.bfloat16
    torch.testing.assert_close(load_file(path)["w"].float(), tensor, rtol=2.0**-8, atol=0)
    assert written.shapes() == {"w": (2, 3, 4, 4)}
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]  # no temporary is left behind


def test_equal_averages_make_equal_files(tmp_path: Path) -> None:
    written = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in written:
        tied = torch.ones(3)
        write_snapshot(path, {"b": tied, "a": torch.zeros(2), "tied": tied}, 7, PowerFunction(0.1), every=5)
    assert len({path.read_bytes() for path in written}) == 1
    assert torch.equal(load_file(written[0])["tied"], torch.ones(3))


def test_the_initial_weights_are_a_snapshot_of_step_0(tmp_path: Path) -> None:
    one_hot_run(tmp_path, 100, 20)
    constant = ConstantDecay(0.99)
    without = reconstruct(find_snapshots(tmp_path), 100, constant)
    write_snapshot(tmp_path / "step-00000000" / "raw.safetensors", {"weight": unit(0, 101)}, 0, RAW)
    got = reconstruct(find_snapshots(tmp_path), 100, constant)
    assert got.weights["weight"][0].item() == pytest.approx(0.99**100, abs=0.03)
    assert without.weights["weight"][0].item() == 0.0
    assert got.coefficients.predicted_relative_error < 0.2 * without.coefficients.predicted_relative_error


def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_snapshot(path, {"w": torch.ones(3)}, 7, PowerFunction(0.1))

    def half(tensors, target, metadata) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(path, {"w": torch.zeros(3)}, 8, PowerFunction(0.1))
    assert Snapshot.open(path).step == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("step", "dtype", "message"),
    [(-1, torch.float32, "step: expected a whole"), (1.5, torch.float32, "step: "), (5, torch.float16, "dtype: ")],
)
def test_a_snapshot_of_no_step_or_another_dtype_is_refused(tmp_path: Path, step, dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_snapshot(tmp_path / "x.safetensors", {"w": torch.ones(1)}, step, Uniform(), dtype)
    write_snapshot(tmp_path / "x.safetensors", {"w": torch.ones(1)}, np.int64(2**40), Uniform())
    assert Snapshot.open(tmp_path / "x.safetensors").step == 2**40


@pytest.mark.parametrize("pickle_as", ["zip", "legacy"])
def test_a_pickle_offered_as_snapshot_is_refused_unread(tmp_path: Path, pickle_as: str) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"w": Bomb(tmp_path / "ran")}, path, _use_new_zipfile_serialization=pickle_as == "zip")
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
    with pytest.raises(ValueError, match="not a snapshot: its metadata has no valid 'snapshot'"):
        Snapshot.open(path)
    for step, every in ((7, 0), (-7, 1), (float("inf"), 1)):
        described = {"step": step, "every": every, "profile": {}}
        save_file({"w": torch.ones(1)}, path, metadata={"snapshot": json.dumps(described)})
        with pytest.raises(ValueError, match="no valid 'snapshot'"):
            Snapshot.open(path)
    described = {"step": 7, "every": 1, "profile": {"kind": "powerfunction", "std": 0.1}}
    save_file({"w": torch.ones(1)}, path, metadata={"snapshot": json.dumps(described)})
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

"""scripts/reconstruct.py: snapshots of a run → files of averages that training did not store, and how far each can be trusted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_ema import config
from ddpm_ema.averaging import RAW, DiffusersDecay, Snapshot, write_snapshot
from ddpm_ema.averaging.files import open_safetensors
from ddpm_ema.averaging.posthoc import fit
from ddpm_ema.averaging.profiles import BiasCorrected, ConstantDecay, PowerFunction, Profile, Uniform, profile_to_dict
from ddpm_ema.errors import UserError
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.reconstruction import main, parse_target
from ddpm_ema.rundir import RunDir, read_tensors

STEPS = 200
KEPT = {"power_0_05": PowerFunction(std=0.05), "power_0_10": PowerFunction(std=0.10)}


def one_hot(profile: Profile, step: int) -> dict[str, torch.Tensor]:
    """The average of parameters that are the unit vector e_i after step i: the weighting profile itself, [STEPS]."""
    weights = np.zeros(STEPS)
    weights[:step] = profile.weighting(step)
    return {"w": torch.from_numpy(weights).float()}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for step in range(10, STEPS + 1, 10):
        for name, profile in KEPT.items():
            write_snapshot(run.snapshot_path(step, name), one_hot(profile, step), step, profile)
    return run


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ("power_function:std=0.075", PowerFunction(std=0.075)),
        ("power_0_075", PowerFunction(std=0.075)),
        ("bias_corrected_0_98", BiasCorrected(0.98)),
        ("constant:decay=0.97", ConstantDecay(0.97)),
        ("bias_corrected:decay=0.98", BiasCorrected(0.98)),
        ("diffusers_ema", DiffusersDecay()),
    ],
)
def test_the_file_written_is_the_average_that_was_asked_for(run: RunDir, text: str, profile: Profile) -> None:
    (path,) = main([str(run.path), "--target", text])
    expected = one_hot(profile, STEPS)["w"]
    error = torch.linalg.norm(read_tensors(path)["w"] - expected) / torch.linalg.norm(expected)
    assert error < 0.05
    with open_safetensors(path) as file:
        reported = json.loads(file.metadata()["snapshot"])["reconstruction"]["profile_error"]
    assert error == pytest.approx(reported, rel=0.05, abs=1e-5)


def test_the_file_says_what_it_is_and_can_be_read_as_a_snapshot(run: RunDir) -> None:
    from ddpm_ema.averaging import Snapshot

    (path,) = main([str(run.path), "--target", "power_function:std=0.075"])
    assert path == run.path / "reconstructed" / f"step-{STEPS:08d}" / "power_0_075.safetensors"
    snapshot = Snapshot.open(path)
    assert (snapshot.step, snapshot.profile) == (STEPS, PowerFunction(std=0.075))


def test_the_table_warns_of_a_target_that_the_snapshots_cannot_give(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run.path), "--target", "power_0_075", "--target", "constant:decay=0.5"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:6] == ["weights", "step", "snapshots", "predicted", "error", "amplification"]
    assert printed[1].split()[:4] == ["power_0_075", "200", "40", "0.02%"]
    assert any(line.startswith("warning: constant_0_50: Predicted error ") for line in printed)
    assert not any(line.startswith("warning: power_0_075") for line in printed)


def test_an_average_of_the_checkpoint_is_rebuilt_and_its_error_stands_beside_the_prediction(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, names = BiasCorrected(0.98), {"kept": "averages/kept.safetensors", "raw": "raw.safetensors"}
    for step in (100, STEPS):
        weights = {names["kept"]: one_hot(kept, step), names["raw"]: one_hot(RAW, step)}
        run.write_checkpoint(step, weights, {"profiles": {"kept": profile_to_dict(kept)}})
    main([str(run.path), "--target", "bias_corrected:decay=0.981", "--target", "power_0_10", "--step", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[5] for line in lines[1:3]] == ["kept", "power_0_10"]
    resolver = WeightResolver(run, None)
    made = [resolver.reconstructed(profile, 100) for profile in (BiasCorrected(0.981), PowerFunction(0.10))]
    found = [(one.reconstruction or {})["check"] for one in made]
    assert [line.split()[6:] for line in lines[1:3]] == [[f"{c['predicted']:.2%}", f"{c['actual']:.2%}"] for c in found]
    assert all(0.0 < check["actual"] < 0.1 for check in found)


def test_the_rates_that_the_run_was_trained_at_decide_the_fit(run: RunDir) -> None:
    before = WeightResolver(run, None).reconstructed(Uniform()).reconstruction or {}
    run.config_path.write_text(f"training: {{steps: {STEPS}, learning_rate_schedule: cosine}}")
    after = WeightResolver(run, None).reconstructed(Uniform()).reconstruction or {}
    given = config.load(run.config_path).training
    assert [given.step_variance(t) for t in (0, STEPS - 1)] == [1.0, 0.0]
    snapshots = [Snapshot.open(path) for paths in run.snapshots().values() for path in paths]
    told = fit(snapshots, STEPS, Uniform(), step_variance=given.step_variance).coefficients.predicted_relative_error
    assert after["predicted_relative_error"] == told > 2 * before["predicted_relative_error"]


def test_several_targets_go_to_the_folder_named(run: RunDir, tmp_path: Path) -> None:
    paths = main([str(run.path), "--target", "power_0_03", "--target", "uniform", "--out", str(tmp_path / "out")])
    assert [path.name for path in paths] == ["power_0_03.safetensors", "uniform.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(path.name for path in paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power_function:std=0.4", "std"),
        ("power_function:width=0.1", "width"),
        ("powerfunction:std=0.1", "power_function"),
        ("constant:decay=fast", "'fast' is not a number"),
        ("constant:0.999", "not FIELD=VALUE"),
        ("power_0_4", "std"),
    ],
)
def test_a_bad_target_is_refused_with_what_is_wrong_in_it(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_target(text)


def test_nothing_is_written_when_one_of_the_targets_is_bad(run: RunDir) -> None:
    with pytest.raises(UserError):
        main([str(run.path), "--target", "power_0_075", "--target", "nonsense:x=1"])
    with pytest.raises(UserError, match="one name"):  # the second would replace the first
        main([str(run.path), "--target", "diffusers_ema", "--target", "diffusers_ema:max_decay=0.9"])
    assert not (run.path / "reconstructed").exists()


def test_a_plan_needs_no_run_and_says_what_to_store_and_what_to_keep(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("1.2.3", "0", "0k", "."):
        with pytest.raises(SystemExit):
            main(["--plan", "--parameters", bad])
        assert f"{bad!r} is not a number such as 20GB" in capsys.readouterr().err
    sizes = ["--steps", "800k", "--budget", "20GB", "--parameters", "35.7M"]
    assert main(["--plan", *sizes, "--target", "bias_corrected:decay=0.999", "--target", "uniform"]) == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:3] == ["every", "160,000", "steps"]
    assert [line.split()[:2] for line in printed[3:5]] == [["bias_corrected_0_999", "467.14%"], ["uniform", "0.00%"]]
    assert printed[5].startswith("Store power_0_05 + uniform every 160,000 steps")
    assert printed[6].startswith("Keep bias_corrected_0_999 while training: their predicted error is 5% or more")


def test_a_plan_that_does_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(UserError, match="--plan: no plan fits: the smallest needs 6 files"):
        main(["--plan", "--steps", "1000", "--budget", "1MB"])
    with pytest.raises(SystemExit):
        main(["--target", "uniform"])

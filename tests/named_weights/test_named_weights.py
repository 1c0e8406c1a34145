"""A name → weights: what each means, what its key holds, and that every stage finds the same ones under it."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from scored import STEPS, make_run, weights

from ddpm_ema.averaging import RAW, BiasCorrected, ConstantDecay, PowerFunction, write_snapshot
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.export import export
from ddpm_ema.named_weights import WeightResolver, folder, name_of
from ddpm_ema.reconstruction import main as reconstruct_script
from ddpm_ema.rundir import RunDir, buffers_file, file_sha256, read_tensors
from ddpm_ema.score.sweep import candidates


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_run(tmp_path_factory.mktemp("named") / "run")


@pytest.fixture
def resolver(run: Config) -> WeightResolver:
    return resolver_of(run)


def resolver_of(run: Config, step: int | None = STEPS[-1], config: Config | None = None) -> WeightResolver:
    rundir = RunDir(run.output_dir)
    return WeightResolver(rundir, None if step is None else rundir.checkpoint(step), config or run)


def test_raw_and_averages_are_those_of_the_checkpoint(resolver: WeightResolver) -> None:
    found = resolver.named("ema_0_9")
    assert (found.profile, found.step) == ({"kind": "constant", "decay": 0.9}, 8)
    torch.testing.assert_close(found.members[0](), weights(0, 1.1))


def test_a_name_with_a_step_is_that_of_an_earlier_checkpoint(resolver: WeightResolver) -> None:
    found = resolver.named("raw@4")
    assert found.step == 4
    torch.testing.assert_close(found.members[0](), weights(0, 1.15))


@pytest.mark.parametrize("name", ["raw", "ema_0_9", "power_0_10"])
def test_a_snapshot_stands_for_the_checkpoint_of_its_step_that_training_has_deleted(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    rundir, profiles = (
        RunDir(run.output_dir),
        {"raw": RAW, "ema_0_9": ConstantDecay(0.9), "power_0_10": PowerFunction(0.10)},
    )
    before = resolver_of(run).named(f"{name}@4")
    tensors = before.members[0]()
    buffers = {"norm.running_mean": torch.ones(3)}
    write_snapshot(rundir.snapshot_path(4, name), tensors, 4, profiles[name])
    save_tensors(rundir.snapshot_path(4, name).parent / buffers_file(name), buffers)
    shutil.rmtree(rundir.checkpoint(4).path)
    after = resolver_of(run).named(f"{name}@4")
    assert (after.name, after.step, after.profile, after.key) == (before.name, 4, before.profile, before.key)
    assert after.reconstruction is None
    torch.testing.assert_close(after.members[0](), tensors | buffers, rtol=0, atol=0)


def test_a_snapshot_that_was_rounded_or_is_of_another_average_stands_for_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rundir = RunDir(run.output_dir)
    shutil.rmtree(rundir.checkpoint(4).path)
    write_snapshot(rundir.snapshot_path(4, "raw"), weights(0), 4, RAW, torch.bfloat16)
    write_snapshot(rundir.snapshot_path(4, "ema_0_9"), weights(0), 4, ConstantDecay(0.8))
    for name in ("raw", "ema_0_9"):
        with pytest.raises(UserError, match="no checkpoint of step 4; steps there: 8"):
            resolver_of(run).named(f"{name}@4")


def test_the_key_of_stored_weights_is_the_sha256_of_their_file(resolver: WeightResolver, run: Config) -> None:
    checkpoint = RunDir(run.output_dir).checkpoint(8)
    assert resolver.named("raw").key == file_sha256(checkpoint.path / "raw.safetensors")
    assert resolver.named("raw@8").key == resolver.named("raw").key != resolver.named("raw@4").key


def test_the_key_of_reconstructed_weights_changes_with_step_profile_and_any_snapshot(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    keys = [resolver_of(run).named(name).key for name in ("power_0_075", "power_0_076", "power_0_075@4")]
    keys.append(resolver_of(run).named("power_0_075+raw").key)
    path = RunDir(run.output_dir).snapshot_path(4, "power_0_05")
    write_snapshot(path, weights(3), 4, PowerFunction(std=0.05))
    keys.append(resolver_of(run).named("power_0_075").key)
    assert len(set(keys)) == 5
    assert all(len(bytes.fromhex(key)) == hashlib.sha256().digest_size for key in keys)


@pytest.mark.parametrize("name", ["bias_corrected_0_776393", "constant_0_97", "uniform", "power_0_15", "swa_2_2"])
def test_what_the_script_reconstructs_the_scorer_and_the_exporter_find_under_the_same_name(
    run: Config, resolver: WeightResolver, tmp_path: Path, name: str
) -> None:
    (file,) = reconstruct_script([str(run.output_dir), "--target", name, "--out", str(tmp_path)])
    assert file.stem == name
    found = resolver.named(name)
    pipeline = DDPMPipeline.from_pretrained(export(run.output_dir, name, tmp_path / "out"))
    for tensors in (found.members[0](), dict(pipeline.unet.state_dict())):
        torch.testing.assert_close(tensors, read_tensors(file), rtol=0, atol=0)


def test_the_winner_of_a_sweep_can_be_named(run: Config, resolver: WeightResolver) -> None:
    sweep = run.evaluation.sweep.model_copy(update={"stds": "0.02:0.2:7", "decays": "0.5:0.999:8"})
    for wanted in [candidate for found in candidates(sweep).values() for candidate in found]:
        swept, named = resolver.reconstructed(wanted.profile), resolver.named(wanted.name)
        assert (swept.name, swept.key) == (named.name, named.key) == (wanted.name, swept.key)


def test_an_average_s_name_is_never_replaced_by_a_reconstruction(tmp_path: Path) -> None:
    """Here power_0_07 is a constant decay, stored at step 8 alone; snapshots could give the power function."""
    run = make_run(tmp_path / "run")
    rundir, profile = RunDir(run.output_dir), {"kind": "constant", "decay": 0.5}
    settings = rundir.checkpoint(8).manifest["settings"]
    files = {"raw.safetensors": weights(0), "averages/power_0_07.safetensors": weights(0, 2.0)}
    rundir.write_checkpoint(8, files, {"settings": settings, "profiles": {"power_0_07": profile}})
    for resolver in (resolver_of(run), resolver_of(run, config=Config(averages={"power_0_07": ConstantDecay(0.5)}))):
        found = resolver.named("power_0_07")
        assert (found.profile, found.reconstruction) == (profile, None)
        torch.testing.assert_close(found.members[0](), weights(0, 2.0))
        with pytest.raises(UserError, match="no weights 'power_0_07' at step 4"):
            resolver.named("power_0_07@4")
        with pytest.raises(UserError, match=r"averages\.power_0_07 is another average"):
            resolver.reconstructed(PowerFunction(std=0.07))


def test_an_average_under_another_spelling_of_its_number_is_found_as_it_is_called(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rundir = RunDir(run.output_dir)
    files = {"raw.safetensors": weights(0), "averages/power_0_1.safetensors": weights(0, 2.0)}
    profiles = {"power_0_1": {"kind": "power_function", "std": 0.1}}
    rundir.write_checkpoint(8, files, {"settings": rundir.checkpoint(8).manifest["settings"], "profiles": profiles})
    bare = Config()
    assert resolver_of(run, config=bare).named("power_0_1").reconstruction is None
    assert resolver_of(run, config=bare).named("power_0_10").reconstruction is not None


def test_a_run_of_snapshots_alone_has_the_names_of_all_profiles(run: Config) -> None:
    found = resolver_of(run, step=None).named("power_0_10")
    assert (found.step, found.name) == (8, "power_0_10")
    assert name_of(BiasCorrected(0.9)) == resolver_of(run, step=None).named("bias_corrected_0_9").name


def test_an_ensemble_has_the_members_in_order_and_a_key_of_theirs(resolver: WeightResolver) -> None:
    found = resolver.named("raw+power_0_1@8")
    assert found.name == "raw+power_0_10@8"
    assert found.profile is not None
    assert [member["weights"] for member in found.profile["members"]] == ["raw", "power_0_10@8"]
    torch.testing.assert_close(found.members[0](), weights(0, 1.3))
    assert found.key not in (resolver.named("raw").key, resolver.named("power_0_1@8+raw").key)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raw@5", "no checkpoint of step 5; steps there: 4, 8"),
        ("ema_0_8", "no weights 'ema_0_8' at step 8; there are raw, ema_0_9, power_0_10, and from snapshots"),
        ("power_0_95", "std"),
        ("power_0_075@6", "step 6 was not stored; the nearest are 4, 8"),
        ("power_0_075@0", "step 0 was not stored; the nearest are 4, 8"),
        ("no/such/folder", "no diffusers folder"),
        ("raw@²", "after @ must be a step"),
        ("raw+", "empty name"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_there_is(
    resolver: WeightResolver, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolver.named(name)


def test_without_a_checkpoint_a_stored_name_says_what_to_do(run: Config) -> None:
    with pytest.raises(UserError, match="no checkpoint to take 'raw' from; train first"):
        resolver_of(run, step=None).named("raw")


def test_a_sweep_reads_each_of_many_snapshots_for_its_key_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(i) for i in range(4200)]
    for path in paths:
        path.touch()
    read: list[Path] = []
    monkeypatch.setattr(folder, "file_sha256", read.append)
    for _ in range(2):
        for path in paths:
            folder.sha256_of(path)
    assert read == paths

"""A network with buffers: every stage carries them, and averages get batch-norm statistics of their own."""

from pathlib import Path
from typing import Any

import batch_norm_unet
import pytest
import scored
import torch
from live_runs import assert_bit_equal, finish, kill_at, settings, start, state
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ema import config, data, diffusion, model, sampling_network, train
from ddpm_ema.export import export
from ddpm_ema.features import Trained, save_classifier
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import RunDir, read_tensors

LONG = {
    "training__steps": 60,
    "training__learning_rate": 1e-2,
    "averages": {"uniform": {"kind": "uniform"}, "power_0_10": {"kind": "power_function", "std": 0.10}},
    "checkpoints__every": 30,
    "checkpoints__snapshots_every": 30,
    "training__sample_every": 60,
}


@pytest.fixture
def batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "build", batch_norm_unet.build)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A run of a network with batch norm, with checkpoints, snapshots and a grid."""
    run = settings(tmp_path_factory.mktemp("norm") / "run", **LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "build", batch_norm_unet.build)
        train.run(run)
    return run


def loss(run: config.Config, weights: dict[str, Tensor], training_mode: bool = False) -> float:
    """Mean over 256 images that are noised as in training."""
    network, images, objective = model.build(run, 10), data.load(run.data), diffusion.Objective(run.diffusion)
    network.load_state_dict(weights)
    network.train(training_mode)
    positions = torch.arange(256)
    inputs = objective.inputs(1, 0, positions, images.batch(1000 + positions), None, False)
    with torch.no_grad():
        return float(objective.loss(lambda x, t, _: network(x, t, return_dict=False)[0], *inputs).mean())


def test_an_average_is_as_good_as_its_parameters_only_with_statistics_of_its_own(
    trained: config.Config, batch_norm: None
) -> None:
    """In training mode a network normalises by the batch, so its loss there shows what the parameters are worth."""
    stored = RunDir(trained.output_dir).checkpoint(60).weights("uniform")
    own = with_own_statistics(stored, trained)
    worth = loss(trained, stored, training_mode=True)
    assert loss(trained, own) == pytest.approx(worth, rel=0.02)
    assert loss(trained, stored) > 1.2 * worth, "with the statistics of the raw weights"
    changed = {name for name in stored if not torch.equal(stored[name], own[name])}
    assert changed == {name for name in stored if "running_" in name or "num_batches" in name}
    assert_bit_equal(with_own_statistics(stored, trained), own)


def sampled(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Name -> the weights that a network samples with, from here on."""
    seen: dict[str, dict[str, Tensor]] = {}
    load = sampling_network.SamplingNetwork.load

    def noted(self: Any, members: Any, name: str) -> None:
        load(self, members, name)
        seen[name] = {key: value.clone() for key, value in self.unet.state_dict().items()}

    monkeypatch.setattr(sampling_network.SamplingNetwork, "load", noted)
    return seen


def test_scoring_and_export_give_averages_their_own_statistics_and_raw_those_that_it_was_trained_with(
    trained: config.Config, batch_norm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint, seen = RunDir(trained.output_dir).checkpoint(60), sampled(monkeypatch)
    classifier = Trained(scored.classifier(), 0.1)
    save_classifier(trained.output_dir / "features.safetensors", classifier, fingerprint="none", seed=0)
    names = ["raw", "uniform", "power_0_10", "power_0_15"]
    scored.results(scored.again(trained, evaluation__weights=names, evaluation__num_images=8))
    resolver = WeightResolver(RunDir(trained.output_dir), checkpoint, trained)
    assert_bit_equal(seen["raw"], checkpoint.weights("raw"))
    for name in names[1:]:  # stored, and reconstructed from snapshots
        assert_bit_equal(seen[name], with_own_statistics(resolver.named(name).members[0](), trained))
    for name in ("raw", "uniform"):
        folder = export(trained.output_dir, name, tmp_path / name)
        assert_bit_equal(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), seen[name])


def test_previews_and_quick_scorings_take_them_too(trained: config.Config, batch_norm: None) -> None:
    run = trained.model_copy(update={"output_dir": trained.output_dir.with_name("again")})
    given: dict[str, dict[str, Tensor]] = {}
    evaluation = run.evaluation.model_copy(update={"every": 60})

    def evaluate(*_: Any) -> Any:
        return lambda step, weights: [given.update({n: weights(n) for n in ("raw", "uniform")})][:0]

    train.run(run.model_copy(update={"evaluation": evaluation}), evaluate)
    stored = RunDir(run.output_dir).checkpoint(60)
    assert_bit_equal(given["raw"], stored.weights("raw"))
    for name, tensor in with_own_statistics(stored.weights("uniform"), run).items():
        assert torch.allclose(given["uniform"][name], tensor, rtol=1e-3, atol=1e-5), "but for the memory order"


SWA = {"training__steps": 12, "averages__swa": {"kind": "swa", "start": 4, "every": 5}}


def test_a_run_that_goes_on_has_the_buffers_of_one_that_never_stopped(tmp_path: Path, batch_norm: None) -> None:
    whole, run = settings(tmp_path / "whole", **SWA), settings(tmp_path / "run", **SWA)
    train.run(whole)
    train.run(settings(tmp_path / "run", **{**SWA, "training__steps": 7}))  # swa moved at step 4
    train.run(run)
    found = state(run)
    assert_bit_equal(found, state(whole))
    assert any(key.startswith("buffers/swa.safetensors:") for key in found)


def test_snapshots_hold_parameters_and_beside_them_the_buffers(trained: config.Config) -> None:
    run = RunDir(trained.output_dir)
    for step in (30, 60):
        whole = run.checkpoint(step)
        path = run.snapshot_path(step, "uniform")
        assert_bit_equal(read_tensors(path), whole.tensors("averages/uniform.safetensors"))
        assert_bit_equal(
            read_tensors(path.parent / "buffers" / path.name), whole.tensors("buffers/uniform.safetensors")
        )


def test_a_network_without_buffers_has_the_files_it_always_had(
    uninterrupted: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built, read or written for the standard U-Net."""
    checkpoint = RunDir(uninterrupted.output_dir).checkpoints()[-1]
    assert not any("buffers" in file for file in checkpoint.manifest["files"])
    weights = checkpoint.weights("ema_0_9")
    monkeypatch.setattr(model, "build", None)
    monkeypatch.setattr(data, "load", None)
    assert_bit_equal(with_own_statistics(weights, uninterrupted), weights)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_with_the_buffers_of_rank_0(tmp_path: Path) -> None:
    whole, run = settings(tmp_path / "whole", **SWA), settings(tmp_path / "run", **SWA)
    finish(whole, 2, before=batch_norm_unet.use)
    kill_at(start(run, 2, before=batch_norm_unet.use), run, 6)
    finish(run, 2, before=batch_norm_unet.use)
    assert_bit_equal(state(run), state(whole))

"""Runs that other programs trained: imported as a run directory that reconstructs, sweeps, reports and exports."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from pickled import Bomb
from safetensors.torch import save_file
from scored import EVALUATION, classifier
from torch.optim.swa_utils import AveragedModel

from ddpm_ema import config, export, importing, reconstruction, report, score, train
from ddpm_ema.averaging import RAW, DiffusersDecay, Snapshot
from ddpm_ema.averaging.profiles import BiasCorrected, ConstantDecay, Profile
from ddpm_ema.errors import UserError
from ddpm_ema.features import Trained, save_classifier
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir, read_tensors

STEPS, EVERY = 20, 5
TARGET = BiasCorrected(0.9)


def example_recipe(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """diffusers' examples/unconditional_image_generation/train_unconditional.py, tiny; the true average of `TARGET`."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model: Any = UNet2DModel(**arguments | changes)
    scheduler: Any = DDPMScheduler(num_train_timesteps=100, beta_schedule="linear")
    ema: Any = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
        model_cls=UNet2DModel, model_config=model.config,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sums = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    for step in range(1, STEPS + 1):
        images = torch.rand(8, 1, 8, 8) * 2 - 1
        noise, timesteps = torch.randn_like(images), torch.randint(0, 100, (8,))
        predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        for name, tensor in model.named_parameters():
            sums[name].mul_(0.9).add_(tensor.detach(), alpha=0.1 / (1 - 0.9**STEPS))
        if step % EVERY == 0:
            model.save_pretrained(folder / f"checkpoint-{step}" / "unet")
            ema.save_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
    scheduler.save_pretrained(folder / "scheduler")
    return sums


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("example")
    return folder, example_recipe(folder)


@pytest.fixture(scope="module")
def imported(trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir(importing.main([str(trained[0]), "--output-dir", str(tmp_path_factory.mktemp("runs") / "imported")]))


def off_by(made: dict[str, torch.Tensor], true: dict[str, torch.Tensor], raw: dict[str, torch.Tensor]) -> float:
    """Error as a share of the true average's distance from raw."""
    error = sum(float((made[n] - true[n]).square().sum()) for n in true)
    return float((error / sum(float((raw[n] - true[n]).square().sum()) for n in true)) ** 0.5)


class TestDiffusersExample:
    def test_its_averages_have_the_profile_that_emamodel_really_follows(self, imported: RunDir) -> None:
        snapshots = {path.stem: Snapshot.open(path) for paths in imported.snapshots().values() for path in paths[-1:]}
        assert snapshots["unet_ema"].profile == DiffusersDecay(use_ema_warmup=True, power=0.75)
        assert [s.step for s in snapshots.values()] == [STEPS, STEPS]
        assert len(imported.snapshots()["raw"]) == STEPS // EVERY

    def test_an_average_that_no_one_kept_is_reconstructed_as_well_as_predicted(self, trained, imported) -> None:
        found = WeightResolver(imported, None).reconstructed(TARGET)
        raw = read_tensors(imported.snapshot_path(STEPS, "raw"))
        actual = off_by(found.members[0](), trained[1], raw)
        predicted = found.reconstruction["predicted_relative_error"]
        assert actual < 2 * predicted
        assert predicted < 0.5

    def test_how_far_the_weights_moved_is_measured_and_used(self, imported: RunDir) -> None:
        measured = json.loads(imported.imported_path.read_text())["step_variance"]
        raw = [read_tensors(imported.snapshot_path(step, "raw")) for step in (STEPS - EVERY, STEPS)]
        moved = sum(float((raw[1][n].double() - raw[0][n]).square().sum()) for n in raw[0])
        assert measured["ends"][-1] == STEPS
        assert measured["values"][-1] == pytest.approx(moved / EVERY)
        assert WeightResolver(imported, None)._step_variance == (measured["ends"], measured["values"])

    def test_its_newest_step_is_a_checkpoint_with_the_weights_of_the_folder(self, trained, imported) -> None:
        (checkpoint,) = imported.checkpoints()
        folder = trained[0] / f"checkpoint-{STEPS}"
        for name, theirs in (("raw", "unet"), ("unet_ema", "unet_ema")):
            stored = read_tensors(folder / theirs / "diffusion_pytorch_model.safetensors")
            ours = checkpoint.weights(name)
            assert all(torch.equal(ours[key], stored[key]) for key in stored)
        assert checkpoint.manifest["imported"]

    def test_it_is_scored_swept_reported_and_exported(self, trained, imported: RunDir) -> None:
        tree = config.to_dict(config.load(imported.config_path))
        tree["evaluation"] = {**EVALUATION, "sweep": {"decays": "0.8:0.9:2"}}
        tree.setdefault("machine", {})["device"] = "cpu"
        tree["data"]["cache_dir"] = str(imported.path.parent / "cache")
        save_classifier(imported.path / "features.safetensors", Trained(classifier(), 0.1), fingerprint="none", seed=0)
        (results,) = score.run(config.validate(tree))
        assert sorted(row["weights"] for row in results["rows"]) == ["raw", "unet_ema"]
        assert len(results["sweep"]) == 2
        report.main([str(imported.path)])
        assert "unet_ema" in (imported.path / "report.html").read_text()
        unet: Any = UNet2DModel.from_pretrained(export.main([str(imported.path), "unet_ema"]) / "unet")
        stored = read_tensors(trained[0] / f"checkpoint-{STEPS}" / "unet_ema" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, stored[name]) for name, tensor in unet.state_dict().items())

    def test_training_on_is_refused(self, imported: RunDir) -> None:
        with pytest.raises(UserError, match="was imported, without the optimizer's state"):
            train.run(config.load(imported.config_path, {"training.steps": ["60"]}))

    def test_a_network_that_settings_cannot_express_is_imported_for_averaging(self, trained, tmp_path, capsys) -> None:
        folder = tmp_path / "theirs"
        shutil.copytree(trained[0], folder)
        for file in folder.glob("checkpoint-*/unet/config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"act_fn": "gelu"}))
        run = importing.main([str(folder), "--output-dir", str(tmp_path / "run")])
        assert "act_fn is 'gelu', here 'silu'" in capsys.readouterr().out
        assert not RunDir(run).checkpoints()
        (path,) = reconstruction.main([str(run), "--target", "bias_corrected:decay=0.9"])
        assert path.is_file()

    def test_an_average_updated_at_other_steps_is_left_out_and_named(self, trained, tmp_path, capsys) -> None:
        folder = tmp_path / "theirs"
        shutil.copytree(trained[0], folder)
        (folder / f"checkpoint-{STEPS}").rename(folder / "checkpoint-1000")
        run = importing.main([str(folder), "--output-dir", str(tmp_path / "run")])
        assert f"unet_ema: left out: it was updated {STEPS} times in 1,000 steps" in capsys.readouterr().out
        assert RunDir(run).checkpoint(1000).names == ["raw"]


def walk(step: int, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Parameters that are the vector of the steps so far: an average is its cumulative weighting, [20]."""
    return {"w": (torch.arange(20) < step).float() + shift}


def average(profile: Profile, step: int) -> dict[str, torch.Tensor]:
    """The average of `walk` at `step`; walk(t) moves entry t at step t + 1."""
    t = np.arange(20)
    return {"w": torch.from_numpy(np.where(t < step, 1 - profile.cumulative(step, np.minimum(t, step)), 0.0)).float()}


class TestSeries:
    def test_safetensors_of_raw_weights_and_of_an_average_become_snapshots(self, tmp_path: Path) -> None:
        rule = ConstantDecay(0.8)
        for step in (4, 8, 12, 16, 20):
            save_file(walk(step), tmp_path / f"raw_{step}.safetensors")
            save_file(average(rule, step), tmp_path / f"ema_{step}.safetensors")
        patterns = ["--pattern", "raw_{step}.safetensors", "--pattern", "ema_{step}.safetensors"]
        profiles = ["--profile", "raw", "--profile", "constant:decay=0.8"]
        run = importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), *patterns, *profiles])
        stored = [Snapshot.open(path) for paths in RunDir(run).snapshots().values() for path in paths]
        assert {(s.step, s.profile) for s in stored} == {(s, p) for s in (4, 8, 12, 16, 20) for p in (RAW, rule)}
        target = ConstantDecay(0.85)
        (path,) = reconstruction.main([str(run), "--target", "constant:decay=0.85"])
        assert off_by(read_tensors(path), average(target, 20), walk(20)) < 0.05

    def test_raw_checkpoints_alone_say_where_they_end(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for step in range(0, 21, 4):
            save_file(walk(step), tmp_path / f"step_{step}.safetensors")
        run = importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), "--pattern", "step_*.safetensors"])
        reconstruction.main([str(run), "--target", "constant:decay=0.5", "--target", "uniform"])
        warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
        assert any(line.startswith("warning: constant_0_50: Predicted error") for line in warned)

    def test_a_torch_file_gives_its_step_and_the_tensors_with_the_prefix(self, tmp_path: Path) -> None:
        for step in (10, 20):
            averaged = {f"ema_model.{name}": tensor for name, tensor in average(ConstantDecay(0.9), step).items()}
            online = {f"net.{name}": tensor for name, tensor in walk(step).items()}
            content = {"state_dict": averaged | online, "global_step": step, "epoch": step // 10}
            torch.save(content, tmp_path / f"epoch={step // 10}-loss=0.1.ckpt")
        options = ["--pattern", "*.ckpt", "--pattern", "*.ckpt", "--prefix", "net.", "--prefix", "ema_model."]
        options += ["--profile", "raw", "--profile", "constant_0_90"]
        run = RunDir(importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), *options]))
        assert torch.equal(read_tensors(run.snapshot_path(20, "raw"))["w"], walk(20)["w"])
        averaged = read_tensors(run.snapshot_path(10, "constant_0_90"))
        assert torch.equal(averaged["w"], average(ConstantDecay(0.9), 10)["w"])

    def test_a_numbered_file_whose_content_says_its_step_is_of_that_step(self, tmp_path: Path) -> None:
        for milestone in (1, 2):  # denoising-diffusion-pytorch: step, model, opt, ema, scaler
            content = {"step": 1000 * milestone, "model": walk(milestone), "opt": {}, "scaler": None}
            torch.save(content, tmp_path / f"model-{milestone}.pt")
        options = ["--pattern", "model-*.pt", "--key", "model"]
        run = RunDir(importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), *options]))
        assert torch.equal(read_tensors(run.snapshot_path(2000, "raw"))["w"], walk(2)["w"])

    def test_one_of_a_list_of_averages_is_named_by_its_place(self, tmp_path: Path) -> None:
        content = {"net": walk(8), "ema": {"stds": [0.05, 0.1], "emas": [walk(6), walk(5)]}}  # EDM2's training state
        torch.save(content, tmp_path / "training-state-0000008.pt")
        options = ["--pattern", "training-state-{step}.pt", "--key", "ema.emas.1", "--profile", "power_0_10"]
        run = RunDir(importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), *options]))
        assert torch.equal(read_tensors(run.snapshot_path(8, "power_0_10"))["w"], walk(5)["w"])

    def test_the_state_of_an_averaged_model_is_read_without_its_counter(self, tmp_path: Path) -> None:
        averaged = AveragedModel(torch.nn.Linear(2, 2))
        averaged.update_parameters(torch.nn.Linear(2, 2))
        torch.save({"ema": averaged.state_dict()}, tmp_path / "swa_7.pt")
        options = ["--pattern", "swa_{step}.pt", "--profile", "uniform", "--key", "ema"]
        run = RunDir(importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), *options]))
        assert set(read_tensors(run.snapshot_path(7, "uniform"))) == {"weight", "bias"}

    def test_a_network_that_is_named_makes_checkpoints_of_the_newest_steps(self, trained, tmp_path: Path) -> None:
        pattern = "checkpoint-{step}/unet/diffusion_pytorch_model.safetensors"
        unet = str(trained[0] / f"checkpoint-{STEPS}" / "unet" / "config.json")
        options = ["--pattern", pattern, "--unet", unet, "--checkpoints", "2"]
        run = RunDir(importing.main([str(trained[0]), "--output-dir", str(tmp_path / "run"), *options]))
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [STEPS - EVERY, STEPS]
        assert config.load(run.config_path).model.layout == "diffusers"


@pytest.mark.parametrize("name", ["step_1.pt", "step_1.safetensors"])
def test_a_file_that_needs_code_is_refused_with_the_cure_and_not_run(tmp_path: Path, name: str) -> None:
    touched = tmp_path / "touched"
    torch.save({"w": torch.zeros(2), "extra": Bomb(touched)}, tmp_path / name)
    with pytest.raises(UserError, match=r"refused.*[Cc]onvert"):
        importing.main([str(tmp_path), "--output-dir", str(tmp_path / "run"), "--pattern", "step_{step}.*"])
    assert not touched.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds no checkpoint-N/unet"),
        (["--pattern", "iter_{step}.pt"], "iter_{step}.pt: fits no file in .*; there are a_1.pt, a_2.pt, b_1_2.pt"),
        (["--pattern", "b_*.pt"], "b_1_2.pt: its step is unknown; write {step}"),
        (["--pattern", "*_{step}.pt"], "a_2.pt and .*b_1_2.pt are both of step 2"),
        (["--pattern", "a_{step}.pt", "--prefix", "ema."], "--prefix ema.: no weights begin so; there are w"),
        (["--pattern", "a_{step}.pt", "--key", "ema"], "--key ema: nothing is called 'ema'; there are w"),
        (["--pattern", "a_{step}.pt", "--profile", "constant:decay=2"], "--profile constant:decay=2: decay"),
        (["--pattern", "a_{step}.pt", "--pattern", "a_{step}.pt"], "step 1 has weights 'raw' already"),
        (["--pattern", "?_{step}.pt"], "not of the same network"),
        (["--pattern", "d*.pt"], "d.pt: step: expected a whole number of steps of at least 0"),
        (["--pattern", "e_*.pt"], "e_4.pt: 'w' has values that are not finite; leave this file out"),
        (["--pattern", "a_*.pt", *["--profile", "raw"] * 2], "--profile: given 2 times; give it once"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(tmp_path: Path, options: list[str], message: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a_1", "a_2", "b_1_2", "c_3"):
        torch.save({"w": torch.zeros(3 if name == "c_3" else 2)}, source / f"{name}.pt")
    torch.save({"w": torch.zeros(2), "global_step": -5}, source / "d.pt")
    torch.save({"w": torch.tensor([0.0, torch.nan])}, source / "e_4.pt")
    with pytest.raises(UserError, match=message):
        importing.main([str(source), "--output-dir", str(tmp_path / "run"), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

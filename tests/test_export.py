"""A named copy becomes a diffusers pipeline folder: the same weights, loadable, described, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from ddpm_ema import config as settings
from ddpm_ema import export as exporting
from ddpm_ema import model
from ddpm_ema.averaging.posthoc import write_snapshot
from ddpm_ema.averaging.profiles import PowerFunction
from ddpm_ema.errors import UserError
from ddpm_ema.export import export
from ddpm_ema.rundir import RunDir

AVERAGES = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}


def tiny(**sections: Any) -> settings.Config:
    tree: dict[str, Any] = {
        "data": {"source": "digits"},
        "model": {
            "block_out_channels": [8, 8],
            "attention": [False, False],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
        },
        "averages": AVERAGES,
        "evaluation": {"sampler": "ddim", "num_inference_steps": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return settings.validate(tree)


def weights_like(config: settings.Config, seed: int, num_classes: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    network = model.build(config, num_classes)
    return {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}


def write_run(
    path: Path, config: settings.Config, steps: tuple[int, ...] = (50, 100), num_classes: int | None = None
) -> RunDir:
    """A run directory with whole checkpoints and snapshots of random weights."""
    run = RunDir(path)
    manifest = {
        "seed": 0,
        "settings": settings.to_dict(config),
        "dataset": {"name": "digits", "size": 1797, "fingerprint": "f00d"},
        "profiles": AVERAGES,
    }
    for step in steps:
        names = ["raw", *AVERAGES]
        copies = {name: weights_like(config, step + i, num_classes) for i, name in enumerate(names)}
        files = {f"averages/{name}.safetensors": copies[name] for name in AVERAGES}
        run.write_checkpoint(step, {"raw.safetensors": copies["raw"], **files}, manifest)
        for name, std in (("power_0_05", 0.05), ("power_0_10", 0.10)):
            write_snapshot(run.snapshot_path(step, name), copies[name], step, PowerFunction(std=std))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny())


def assert_same(loaded: Any, expected: dict[str, torch.Tensor]) -> None:
    state = loaded.unet.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["raw", "ema_0_999"])
def test_a_pipeline_loaded_from_the_folder_has_exactly_the_weights_of_that_name(
    run: RunDir, tmp_path: Path, name: str
) -> None:
    folder = export(run.path, name, tmp_path / "out")
    assert_same(DDPMPipeline.from_pretrained(folder), run.checkpoint(100).weights(name))


def test_diffusers_finds_the_pipeline_class_by_itself_and_samples_an_image(run: RunDir, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(export(run.path, "ema_0_999", tmp_path / "out"))
    assert isinstance(pipeline, DDPMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_the_scheduler_is_the_one_the_network_was_trained_with(tmp_path: Path) -> None:
    config = tiny(diffusion={"schedule": "cosine", "prediction": "v_prediction", "variance": "fixed_small"})
    folder = export(write_run(tmp_path / "run", config, steps=(10,)).path, "raw", tmp_path / "out")
    scheduler = DDPMPipeline.from_pretrained(folder).scheduler.config
    assert (scheduler.beta_schedule, scheduler.prediction_type, scheduler.variance_type) == (
        "squaredcos_cap_v2",
        "v_prediction",
        "fixed_small",
    )


def test_an_earlier_step_is_named_with_at_or_with_a_step(run: RunDir, tmp_path: Path) -> None:
    expected = run.checkpoint(50).weights("ema_0_999")
    assert_same(DDPMPipeline.from_pretrained(export(run.path, "ema_0_999@50", tmp_path / "a")), expected)
    assert_same(DDPMPipeline.from_pretrained(export(run.path, "ema_0_999", tmp_path / "b", step=50)), expected)


def test_a_width_that_was_never_kept_is_reconstructed_from_snapshots(run: RunDir, tmp_path: Path) -> None:
    """Four snapshots of random weights: the export must be their combination with the coefficients of the fit."""
    from ddpm_ema.averaging.posthoc import posthoc_coefficients

    loaded = DDPMPipeline.from_pretrained(export(run.path, "power_0_075", tmp_path / "out"))
    stored = [(step, name) for step in (50, 100) for name in ("power_0_05", "power_0_10")]
    stds = [0.05 if name == "power_0_05" else 0.10 for _, name in stored]
    weights = posthoc_coefficients([step for step, _ in stored], stds, 100, 0.075).weights
    tensors = [run.checkpoint(step).weights(name) for step, name in stored]
    for name, tensor in loaded.unet.state_dict().items():
        combined = sum(w * t[name].double() for w, t in zip(weights, tensors, strict=True))
        torch.testing.assert_close(tensor.double(), combined, rtol=1e-6, atol=1e-7)


def test_a_variant_carries_the_copys_name_and_loads_by_it(run: RunDir, tmp_path: Path) -> None:
    folder = export(run.path, "ema_0_999", tmp_path / "out", variant=True)
    assert (folder / "unet" / "diffusion_pytorch_model.ema_0_999.safetensors").is_file()
    assert_same(DDPMPipeline.from_pretrained(folder, variant="ema_0_999"), run.checkpoint(100).weights("ema_0_999"))


def test_the_card_says_what_the_weights_are_and_leaves_the_licence_to_its_author(run: RunDir, tmp_path: Path) -> None:
    card = (export(run.path, "power_0_10", tmp_path / "out") / "README.md").read_text()
    front = card.split("---")[1]
    assert "\nlicense:" not in front
    assert "choose one" in front
    assert "PowerFunction(std=0.1) after 100 steps: centred at" in card
    assert "digits, 1,797 images" in card
    assert "have not been scored" in card


def test_the_cards_sampling_code_runs_and_saves_an_image(run: RunDir, tmp_path: Path) -> None:
    run_card(export(run.path, "raw", tmp_path / "out"), tmp_path)


def test_a_class_conditional_network_is_exported_with_code_that_gives_labels(tmp_path: Path) -> None:
    config = tiny(model={"class_conditional": True})
    run = write_run(tmp_path / "run", config, steps=(10,), num_classes=10)
    folder = export(run.path, "raw", tmp_path / "out")
    assert "torch.arange(16) % 10" in (folder / "README.md").read_text()
    run_card(folder, tmp_path)


def test_guidance_and_the_noise_of_ddim_are_in_the_cards_code(tmp_path: Path) -> None:
    config = tiny(model={"class_conditional": True}, evaluation={"guidance_scale": 2.5, "eta": 0.5})
    run = write_run(tmp_path / "run", config, steps=(10,), num_classes=10)
    folder = export(run.path, "raw", tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "without.lerp(prediction, 2.5)" in card
    assert "scheduler.step(prediction, t, x_t, eta=0.5)" in card
    run_card(folder, tmp_path)


def test_learned_variance_exports_a_pipeline_that_samples(tmp_path: Path) -> None:
    config = tiny(diffusion={"variance": "learned"}, evaluation={"sampler": "ddpm", "num_inference_steps": 2})
    run_card(export(write_run(tmp_path / "run", config, steps=(10,)).path, "raw", tmp_path / "out"), tmp_path)


def test_dpm_solver_card_runs(tmp_path: Path) -> None:
    config = tiny(evaluation={"sampler": "dpm_solver++", "num_inference_steps": 3})
    run_card(export(write_run(tmp_path / "run", config, steps=(10,)).path, "raw", tmp_path / "out"), tmp_path)


def run_card(folder: Path, where: Path) -> None:
    """Runs the Python block of a model card as a reader would."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[0]
    here = os.getcwd()
    os.chdir(where)
    try:
        exec(code.replace("path/to/this/folder", str(folder)), {})
    finally:
        os.chdir(here)
    assert (where / "sample.png").is_file()


def test_the_card_lists_scores_of_these_weights_at_this_step_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny())
    write_scores(run, 100, 12.25)
    write_scores(run, 50, 77.5)
    card = (export(run.path, "ema_0_999", tmp_path / "out") / "README.md").read_text()
    assert "| FD (classifier) | 12.25 | 11.05 ± 0.90 | 6,000 | ddim, 3 evaluations | train | \u221224.7 ± 2.0 |" in card
    assert "77.5" not in card
    assert "FD is no FID" in card


def write_scores(run: RunDir, step: int, distance: float) -> None:
    row = {
        "weights": "ema_0_999",
        "frechet_distance": distance,
        "frechet_distance_unbiased": distance - 1.2,
        "stderr": 0.9,
    }
    row |= {"delta_vs_raw": -24.7, "delta_stderr": 2.0}
    results = {"schema": 1, "step": step, "metric": "fd", "extractor": "classifier", "reference": "train"}
    results |= {"num_images": 6000, "sampler": "ddim", "num_inference_steps": 3, "rows": [row]}
    folder = run.score_dir(step, "abc")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def test_a_folder_that_holds_something_is_refused_and_left_as_it_was(run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(UserError, match="already holds something"):
        export(run.path, "raw", folder)
    assert [path.name for path in folder.iterdir()] == ["precious"]
    with pytest.raises(UserError, match="already holds something"):  # before any file of the run is read
        export(tmp_path / "no run at all", "raw", folder)


def test_an_empty_folder_is_taken(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (export(run.path, "raw", tmp_path / "empty") / "model_index.json").is_file()


def test_an_export_that_fails_half_way_leaves_nothing_behind(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.card, "render", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export(run.path, "raw", tmp_path / "sub" / "out")
    assert list((tmp_path / "sub").iterdir()) == []


def test_an_unknown_name_is_refused_with_the_names_there_are(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights 'ema_9'.*raw, ema_0_999, power_0_05, power_0_10"):
        export(run.path, "ema_9", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_step_without_a_checkpoint_is_refused_with_the_steps_there_are(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint of step 70; steps there: 50, 100"):
        export(run.path, "raw@70", tmp_path / "out")


def test_a_width_at_a_step_without_snapshot_is_refused_with_the_nearest(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"70.*nearest are 50, 100"):
        export(run.path, "power_0_075@70", tmp_path / "out")


def test_an_ensemble_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ensemble"):
        export(run.path, "raw+ema_0_999", tmp_path / "out")


def test_a_flipped_bit_falls_back_to_the_whole_checkpoint_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny())
    flip_a_bit(run.checkpoint(100).path / "averages" / "ema_0_999.safetensors")
    folder = export(run.path, "ema_0_999", tmp_path / "out")
    assert_same(DDPMPipeline.from_pretrained(folder), run.checkpoint(50).weights("ema_0_999"))


def test_a_flipped_bit_in_the_step_asked_for_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny())
    flip_a_bit(run.checkpoint(100).path / "averages" / "ema_0_999.safetensors")
    with pytest.raises(UserError, match=r"ema_0_999\.safetensors: sha256 mismatch"):
        export(run.path, "ema_0_999@100", tmp_path / "out")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def test_the_script_answers_a_mistake_with_one_message_and_exit_code_2(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "scripts" / "export.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(run.path), "nonsense", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*no weights 'nonsense'.*\n", capsys.readouterr().err)


def test_the_script_writes_the_folder_and_says_how_to_load_it(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, folder = Path(__file__).parents[1] / "scripts" / "export.py", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(script), str(run.path), "ema_0_999@50", "--output", str(folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert f"DDPMPipeline.from_pretrained({str(folder)!r})" in capsys.readouterr().out
    assert_same(DDPMPipeline.from_pretrained(folder), run.checkpoint(50).weights("ema_0_999"))

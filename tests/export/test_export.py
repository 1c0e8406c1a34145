"""Named weights become a diffusers pipeline folder: the same weights, loadable, described, whole or not there at all."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from safetensors.torch import save_file

from ddpm_ema import config as settings
from ddpm_ema import diffusion, keyed_random, model, sampling, sampling_network
from ddpm_ema.averaging import write_snapshot
from ddpm_ema.averaging.profiles import PowerFunction
from ddpm_ema.errors import UserError
from ddpm_ema.export import card, export, main
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir

AVERAGES = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}


def tiny(**sections: Any) -> settings.Config:
    network = {"block_out_channels": [8, 8], "attention": [False, False], "layers_per_block": 1, "norm_num_groups": 4}
    tree: dict[str, Any] = {
        "data": {"source": "digits"},
        "model": network,
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
    path: Path, config: settings.Config, steps: tuple[int, ...] = (50, 100), num_classes: int | None = None, **data: Any
) -> RunDir:
    """A run directory with whole checkpoints and snapshots of random weights."""
    run = RunDir(path)
    manifest = {
        "seed": 0,
        "settings": settings.to_dict(config),
        "dataset": {"name": "digits", "size": 1797, "fingerprint": "f00d", **data},
        "profiles": AVERAGES,
    }
    for step in steps:
        names = ["raw", *AVERAGES]
        weights = {name: weights_like(config, step + i, num_classes) for i, name in enumerate(names)}
        files = {f"averages/{name}.safetensors": weights[name] for name in AVERAGES}
        run.write_checkpoint(step, {"raw.safetensors": weights["raw"], **files}, manifest)
        for name, std in (("power_0_05", 0.05), ("power_0_10", 0.10)):
            write_snapshot(run.snapshot_path(step, name), weights[name], step, PowerFunction(std=std))
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
    assert isinstance(pipeline, DDIMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


def test_the_scheduler_has_the_noise_levels_the_network_was_trained_with(tmp_path: Path) -> None:
    config = tiny(diffusion={"schedule": "cosine", "prediction": "v_prediction", "variance": "fixed_small"})
    folder = export(write_run(tmp_path / "run", config, steps=(10,)).path, "raw", tmp_path / "out")
    scheduler = DDPMPipeline.from_pretrained(folder).scheduler.config
    found = (scheduler.beta_schedule, scheduler.prediction_type, scheduler.variance_type)
    assert found == ("squaredcos_cap_v2", "v_prediction", "fixed_small")


def test_a_variant_carries_the_name_of_the_weights_and_loads_by_it(run: RunDir, tmp_path: Path) -> None:
    folder = export(run.path, "ema_0_999", tmp_path / "out", variant=True)
    assert (folder / "unet" / "diffusion_pytorch_model.ema_0_999.safetensors").is_file()
    assert_same(DDPMPipeline.from_pretrained(folder, variant="ema_0_999"), run.checkpoint(100).weights("ema_0_999"))


def test_the_card_says_what_the_weights_are_and_leaves_the_licence_to_its_author(run: RunDir, tmp_path: Path) -> None:
    card = (export(run.path, "power_0_10", tmp_path / "out") / "README.md").read_text()
    front = card.split("---")[1]
    assert "\nlicense:" not in front
    assert "choose one" in front
    assert "PowerFunction(std=0.1) after 100 steps: centred at" in card
    assert "`digits`, 1,797 images" in card
    assert "have not been scored" in card


# name: (diffusion settings, evaluation settings, class-conditional); the prediction is v unless said otherwise.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "ddpm": ({"num_train_timesteps": 20}, {"sampler": "ddpm", "num_inference_steps": 20}, False),
    "ddpm_respaced": ({"num_train_timesteps": 20}, {"sampler": "ddpm", "num_inference_steps": 9}, False),
    "ddim": ({}, {"sampler": "ddim", "num_inference_steps": 10}, False),
    "ddim_respaced": ({"schedule": "sigmoid"}, {"sampler": "ddim", "num_inference_steps": 7, "eta": 0.5}, False),
    "solver": ({}, {"sampler": "dpm_solver++", "num_inference_steps": 15}, False),
}
CASES |= {f"{name}_unclipped": (a, {**b, "clip_sample": False}, c) for name, (a, b, c) in CASES.items()}
SOLVER = {"sampler": "dpm_solver++", "num_inference_steps": 5}
CASES |= {
    "solver_cosine": ({"schedule": "cosine"}, {**SOLVER, "num_inference_steps": 6, "clip_sample": False}, False),
    "learned_ddpm": ({"variance": "learned"}, {"sampler": "ddpm", "num_inference_steps": 6}, False),
    "learned_ddim": ({"variance": "learned"}, {"sampler": "ddim", "num_inference_steps": 5}, False),
    "learned_solver": ({"variance": "learned", "prediction": "sample"}, SOLVER, False),
    "classes": ({}, {"sampler": "ddim", "num_inference_steps": 5, "guidance_scale": 2.5}, True),
}
READER = """
import pathlib, re, sys
sys.modules["ddpm_ema"] = None  # importing it is an error
import numpy, torch
from safetensors.torch import load_file
noise = load_file("noise.safetensors")["noise"]
for folder in map(pathlib.Path, sys.argv[1:]):
    drawn = iter(noise)
    torch.randn = lambda *shape, **options: next(drawn)
    code = re.findall(r"```python\\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[0]
    result = {}
    exec(code.replace("path/to/this/folder", str(folder)), result)
    numpy.save(folder / "images.npy", numpy.stack([numpy.asarray(image) for image in result["images"]]))
"""


def test_the_cards_code_makes_the_scored_images_in_a_process_without_this_package(tmp_path: Path) -> None:
    """From the scoring's noise every byte is the same, whatever the sampler, and the training's own settings differ."""
    made, shape, indices = {}, (1, 8, 8), torch.arange(16)
    for name, (trained, evaluation, classes) in CASES.items():
        config = tiny(diffusion={"prediction": "v_prediction", **trained}, model={"class_conditional": classes})
        run = write_run(tmp_path / name, config, steps=(10,), num_classes=10 if classes else None)
        write_scores(run, 10, weights="raw", evaluation=evaluation)
        export(run.path, "raw", tmp_path / "out" / name)
        made[name] = sampled_as_scored(run, config, settings.EvaluationSettings(**evaluation), indices)
    drawn = [keyed_random.normal(0, keyed_random.Purpose.SAMPLE, step, indices, shape) for step in range(21)]
    save_file({"noise": torch.stack(drawn)}, tmp_path / "noise.safetensors")
    folders = [str(tmp_path / "out" / name) for name in CASES]
    reader = subprocess.run([sys.executable, "-c", READER, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert reader.returncode == 0, reader.stderr
    assert (tmp_path / "sample.png").is_file()
    found = {name: np.load(tmp_path / "out" / name / "images.npy") for name in CASES}
    assert [name for name in CASES if not np.array_equal(found[name], made[name])] == []
    for name, images in made.items():  # neither black and white, nor the same with and without clipping
        assert np.isin(images, (0, 255)).mean() < 0.5, name
        assert not np.array_equal(images, made.get(f"{name}_unclipped")), name


def sampled_as_scored(run: RunDir, config: settings.Config, evaluation: Any, indices: torch.Tensor) -> np.ndarray:
    """uint8 [n, H, W]: what the scorer's own sampling makes of raw."""
    unet = model.build(config, 10 if config.model.class_conditional else None).eval()
    unet.load_state_dict(run.checkpoint(10).weights("raw"))
    no_label = model.no_label(unet)

    def predict(x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return unet(x_t, timesteps, class_labels=labels).sample

    images = sampling.sample(
        predict if no_label is None else sampling_network.guided(predict, evaluation.guidance_scale, no_label),
        sampling.Sampler(diffusion.noise_scheduler(config.diffusion).config, evaluation),
        seed=0,
        indices=indices,
        image_shape=(1, 8, 8),
        device="cpu",
        labels=None if no_label is None else indices % no_label,
    )
    return images[:, 0].numpy()


@pytest.mark.parametrize("clip", [True, False])
def test_the_folders_own_scheduler_clips_as_the_scoring_did(tmp_path: Path, clip: bool) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,))
    write_scores(run, 10, weights="raw", evaluation={"sampler": "dpm_solver++", "clip_sample": clip})
    scheduler = DDPMPipeline.from_pretrained(export(run.path, "raw", tmp_path / "out")).scheduler
    scheduler.set_timesteps(1)
    x_0 = scheduler.step(torch.zeros(1, 1, 8, 8), scheduler.timesteps[0], torch.full((1, 1, 8, 8), 3.0)).prev_sample
    assert (float(x_0.max()) == 1) is clip


def read_card(run: RunDir, name: str, folder: Path) -> str:
    return (export(run.path, name, folder) / "README.md").read_text()


def test_weights_that_were_not_scored_are_sampled_as_the_run_says_in_no_more_steps_than_there_are(tmp_path) -> None:
    unclipped = {"sampler": "dpm_solver++", "num_inference_steps": 1000, "clip_sample": False}
    config = tiny(diffusion={"schedule": "cosine"}, evaluation=unclipped)
    card = read_card(write_run(tmp_path / "run", config, steps=(10,)), "raw", tmp_path / "out")
    assert "(dpm_solver++ 996 steps, x_0 not clipped): not scored." in card


def test_the_card_lists_scores_of_these_weights_at_this_step_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny())
    write_scores(run, 100, distance=12.25)
    write_scores(run, 50, distance=77.5)
    card = read_card(run, "ema_0_999", tmp_path / "out")
    assert (
        "| FD (`classifier`) | 12.25 | 11.05 ± 0.90 | 6,000 | ddim 3 steps, x_0 clipped | `train of digits` "
        "| \u221224.7 ± 2.0 (\u221228.9 to \u221220.5), better |" in card
    )
    assert "77.5" not in card
    assert "FD is not FID: do not compare it with published FIDs." in card


def test_scores_of_other_weights_under_the_same_name_and_step_are_not_in_the_card(tmp_path: Path) -> None:
    """A step that was trained anew after a fallback keeps the old scores' folder."""
    run = write_run(tmp_path / "run", tiny(), steps=(100,))
    key = run.checkpoint(100).manifest["files"]["averages/ema_0_999.safetensors"]["sha256"]
    write_scores(run, 100, distance=77.5, weights_sha256="0" * 64)
    assert "not been scored" in read_card(run, "ema_0_999", tmp_path / "stale")
    write_scores(run, 100, distance=12.25, weights_sha256=key, weights="called otherwise")
    card = read_card(run, "ema_0_999", tmp_path / "out")
    assert "| 12.25 |" in card
    assert "77.5" not in card


def test_the_newest_scoring_decides_how_the_folder_samples_and_a_sweep_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny())
    solver = {"sampler": "dpm_solver++", "num_inference_steps": 15, "clip_sample": False}
    write_scores(run, 100, weights="power_0_075", finished="2026-01-01T00:00:00Z", evaluation={"sampler": "ddpm"})
    write_scores(run, 100, weights="power_0_075", finished="2026-01-02T00:00:00Z", evaluation=solver, rows="sweep")
    card = read_card(run, "power_0_075", tmp_path / "out")
    assert card.index("dpm_solver++ 15 steps, x_0 not clipped |") < card.index("ddpm 3 steps, x_0 clipped |")
    assert "as the newest scoring did, the first of the table (dpm_solver++ 15 steps, x_0 not clipped)" in card


@pytest.mark.parametrize(
    ("delta", "significant", "verdict"),
    [(-1.0, True, "better"), (1.0, True, "worse"), (-1.0, False, "not significant")],
)
def test_the_difference_from_raw_has_its_verdict(tmp_path: Path, delta, significant, verdict) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,))
    write_scores(run, 10, delta_vs_raw=delta, significant=significant)
    assert f", {verdict} |" in read_card(run, "ema_0_999", tmp_path / "out")


def key_of(run: RunDir, name: str, step: int) -> str:
    """What the row of these weights is known by; of weights that are gone, something else."""
    try:
        return WeightResolver(run, None).named(f"{name}@{step}").key
    except UserError:
        return "1" * 64


def write_scores(run: RunDir, step: int, **changes: Any) -> None:
    """A results.json with one row of ema_0_999, in a folder of its own; changes go to whatever has that key."""
    row = {"weights": "ema_0_999", "num_images": 6000, "frechet_distance": changes.pop("distance", 12.25)}
    row |= {"frechet_distance_unbiased": row["frechet_distance"] - 1.2, "stderr": 0.9, "significant": True}
    row |= {"delta_vs_raw": -24.7, "delta_stderr": 2.0, "interval": [-28.9, -20.5]}
    given = {"sampler": "ddim", "num_inference_steps": 3, **changes.pop("evaluation", {})}
    evaluation = settings.EvaluationSettings(**given)
    where = changes.pop("rows", "rows")
    more = {key: changes.pop(key) for key in ("extractor", "finished") if key in changes}
    results = fake_run.results(step, reference="train of digits", **more)
    results |= {"evaluation": evaluation.model_dump(mode="json"), "rows": []}
    row["weights_sha256"] = key_of(run, changes.get("weights", "ema_0_999"), step)
    results[where] = [{**row, **changes}]
    fake_run.write_results(run.path, results, f"abc{len(list(run.path.glob('scores/*')))}")


def test_a_data_sets_name_cannot_write_into_the_card(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,), name="cats\n# Heading\n<script>`x`\x1b[31m | y", size="<b>")
    card = read_card(run, "raw", tmp_path / "out")
    assert "- data: `cats # Heading <script>'x' [31m | y`; 8×8" in card


def test_an_extractors_name_cannot_write_into_the_card(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,))
    write_scores(run, 10, extractor="x`<script>|")
    assert "\n| FD (`x'<script>\\|`) | 12.25 |" in read_card(run, "ema_0_999", tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"num_images": "many"}, {"interval": 3}, {"stderr": "\x1b[31m"}, {"measures_vs_raw": {"\x1b[31m": 1}}]
)
def test_results_that_cannot_be_read_are_left_out_with_a_warning(tmp_path: Path, caplog: Any, changes: Any) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,))
    write_scores(run, 10, **changes)
    assert "have not been scored" in read_card(run, "ema_0_999", tmp_path / "out")
    (warning,) = caplog.messages
    assert "results.json was skipped: it is malformed: rows.0." in warning
    assert "\x1b" not in warning


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

    monkeypatch.setattr(card, "render", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export(run.path, "raw", tmp_path / "sub" / "out")
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("ema_9", None, r"no weights 'ema_9'.*raw, ema_0_999, power_0_05, power_0_10"),
        ("raw@70", None, "no checkpoint of step 70; steps there: 50, 100"),
        ("raw@50", 100, "raw@50: --step is 100; give one step"),
        ("power_0_075@70", None, r"70.*nearest are 50, 100"),
        ("raw+ema_0_999", None, "ensemble"),
    ],
)
def test_a_name_or_step_that_cannot_be_exported_is_refused_with_what_there_is(
    run: RunDir, tmp_path: Path, name: str, step: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(run.path, name, tmp_path / "out", step)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network_than_the_settings_are_refused_by_the_tensor(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny(), steps=(10,))
    weights = {**run.checkpoint(10).weights("raw"), "more.bias": torch.zeros(2)}
    manifest = {"settings": settings.to_dict(tiny()), "profiles": {}}
    run.write_checkpoint(20, {"raw.safetensors": weights}, manifest)
    with pytest.raises(UserError, match=r"settings describe.*step 20: 'more.bias' is not known here"):
        export(run.path, "raw", tmp_path / "out")


def test_a_flipped_bit_falls_back_to_the_whole_checkpoint_before_or_is_named_where_its_step_was_asked_for(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", tiny())
    path = run.checkpoint(100).path / "averages" / "ema_0_999.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    folder = export(run.path, "ema_0_999", tmp_path / "out")
    assert_same(DDPMPipeline.from_pretrained(folder), run.checkpoint(50).weights("ema_0_999"))
    with pytest.raises(UserError, match=r"ema_0_999\.safetensors: sha256 mismatch"):
        export(run.path, "ema_0_999@100", tmp_path / "other")


def test_the_command_writes_the_folder_and_says_how_to_load_it(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = main([str(run.path), "ema_0_999@50", "--output", str(tmp_path / "out")])
    assert f"DiffusionPipeline.from_pretrained({str(folder)!r})" in capsys.readouterr().out
    assert_same(DDPMPipeline.from_pretrained(folder), run.checkpoint(50).weights("ema_0_999"))

"""Grids say how their images were sampled; previews are sampled as the scoring samples, as far as that is affordable."""

from pathlib import Path

import pytest
import scored
import torch
from live_runs import finish, settings
from PIL import Image

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.image_grid import save_grid
from ddpm_ema.numbers import sampler_label
from ddpm_ema.rundir import RunDir
from ddpm_ema.train.preview import preview_settings, spread


def title(path: Path) -> str:
    return str(Image.open(path).text["Title"])


@pytest.mark.parametrize(
    ("evaluation", "preview"),
    [
        ({"sampler": "dpm_solver++", "num_inference_steps": 25}, "dpm_solver++ 25 steps"),
        ({"sampler": "dpm_solver++", "num_inference_steps": 80}, "dpm_solver++ 50 steps"),
        ({"sampler": "ddim", "num_inference_steps": 20, "eta": 0.5}, "ddim 20 steps, eta 0.5"),
        ({"sampler": "ddim", "num_inference_steps": 50, "clip_sample": False}, "ddim 50 steps, x_0 not clipped"),
        ({"sampler": "ddpm", "num_inference_steps": 40}, "ddpm 40 steps"),
        ({"sampler": "ddpm", "num_inference_steps": 100}, "ddim 50 steps"),
    ],
)
def test_a_preview_is_sampled_as_the_scoring_is_in_at_most_50_steps(tmp_path, evaluation, preview) -> None:
    """A long ancestral chain is replaced by DDIM, because a short one leaves noise in the images."""
    changes = {f"evaluation__{key}": value for key, value in evaluation.items()}
    assert sampler_label(preview_settings(settings(tmp_path, **changes)).model_dump()) == preview


def test_more_steps_than_noise_levels_end_no_training(tmp_path) -> None:
    run = settings(tmp_path, diffusion__num_train_timesteps=30, evaluation__num_inference_steps=1000)
    assert preview_settings(run).num_inference_steps == 30


def test_real_images_beside_a_preview_are_spread_over_the_data_set() -> None:
    assert spread(4, 12).tolist() == [0, 3, 6, 9]
    assert spread(4, 50_000).tolist() == [0, 12_500, 25_000, 37_500]
    assert spread(4, 3).tolist() == [0, 0, 1, 2]  # never beyond the end


@pytest.mark.slow
def test_a_preview_of_fewer_images_than_ranks_says_what_sampled_it_and_what_the_scoring_does(tmp_path) -> None:
    run = settings(
        tmp_path / "run",
        training__steps=2,
        training__sample_every=2,
        training__sample_images=1,
        evaluation__sampler="ddpm",
        evaluation__num_inference_steps=100,
    )
    finish(run, world_size=2)
    expected = "ddim 50 steps (scoring: ddpm 100 steps), the same noise in every row"
    assert title(RunDir(run.output_dir).sample_grid(2)) == f"step 2, {expected}"


def test_a_scored_grid_names_the_sampler_of_its_scoring(tmp_path) -> None:
    run = scored.make_run(tmp_path / "run", evaluation__weights=["raw"], evaluation__eta=0.5)
    scored.results(run)
    (grid,) = (run.output_dir / "scores").glob("*/grid.png")
    assert title(grid) == "step 8, ddim 4 steps, eta 0.5, the same noise in every row"


def test_a_title_is_never_cut_off_by_a_narrow_grid(tmp_path) -> None:
    def width(note: str) -> int:
        save_grid(
            tmp_path / "grid.png", {"raw": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, 5, EvaluationSettings(), note
        )
        return Image.open(tmp_path / "grid.png").width

    assert width(" (scoring: dpm_solver++ 100 steps)") > width("") > 200

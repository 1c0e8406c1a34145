"""`ddpm_ema.load` and `ddpm_ema.sample`: the network and the images that scoring has."""

from pathlib import Path

import pytest
import torch
from scored import make_run, weights

import ddpm_ema
from ddpm_ema import config
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.generate import IMAGES
from ddpm_ema.score.run import open_generator


def as_scored(run: config.Config, name: str, images: list[int]) -> torch.Tensor:
    """uint8 `[n, C, H, W]`: the images as the scoring of these weights makes them."""
    generator = open_generator(run, Processes.start("cpu"))
    rundir = RunDir(run.output_dir)
    resolver = WeightResolver(rundir, rundir.newest_usable(), run, generator.num_classes)
    named = resolver.named(name)
    generator.load(name, named.pipeline, [member() for member in named.members])
    return generator.generate(images, [])[IMAGES].images


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("raw", {}),
        ("ema_0_9@4", {"evaluation__sampler": "ddpm"}),
        ("power_0_075", {"evaluation__sampler": "dpm_solver++", "evaluation__seed": 3}),
        ("raw+ema_0_9", {}),
        ("power_0_10", {"labels": True, "evaluation__guidance_scale": 2.0}),
    ],
)
def test_the_images_are_those_that_scoring_samples(tmp_path: Path, name: str, changes: dict) -> None:
    run = make_run(tmp_path / "run", **changes)
    images = ddpm_ema.sample(ddpm_ema.load(run.output_dir, name), 10)
    assert (images.dtype, images.shape) == (torch.uint8, (10, 1, 8, 8))
    assert torch.equal(images, as_scored(run, name, list(range(10))))


def test_the_network_is_ready_and_says_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    loaded = ddpm_ema.load(run.output_dir, "ema_0_9", step=4)
    assert (loaded.weights.name, loaded.weights.step) == ("ema_0_9@4", 4)
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    expected = weights(0, 1 + 0.1 * 0.5)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.network.state_dict().items())
    assert len(loaded.scheduler.betas) == run.diffusion.num_train_timesteps


def test_settings_of_the_sampling_may_be_others_and_a_bad_one_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    loaded = ddpm_ema.load(run.output_dir, "raw")
    first, second = (ddpm_ema.sample(loaded, 4, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, ddpm_ema.sample(loaded, 4, batch_size=4))
    with pytest.raises(UserError, match=r"evaluation\.smapler: unknown setting; did you mean 'sampler'"):
        ddpm_ema.sample(loaded, 4, smapler="ddim")


def test_a_folder_without_a_run_and_a_name_that_is_not_there_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        ddpm_ema.load(tmp_path)
    with pytest.raises(UserError, match="no weights 'ema_0_99'"):
        ddpm_ema.load(make_run(tmp_path / "run").output_dir, "ema_0_99")

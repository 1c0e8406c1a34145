"""The nearest training image of each sample of a grid: found in closed form, and kept by a scoring whatever its reference is."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scored import again, make_run, results, start

from ddpm_ema import data
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor
from ddpm_ema.metrics import Reference, statistics_of
from ddpm_ema.metrics.nearest import nearest_of
from ddpm_ema.score.real_images import RealImages

SHOWN = 5  # images per row of the grid


def test_a_copy_has_distance_zero_and_its_own_place_in_whatever_batch_it_lies() -> None:
    training = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distances, places = nearest_of(training[[49, 0, 8, 7]].flatten(1), training.flatten(1).split(30))
    assert places.tolist() == [49, 0, 8, 7]
    assert distances.tolist() == [0.0] * 4


def test_a_copy_is_told_from_images_that_differ_in_one_pixel_by_one_level() -> None:
    """Forty such images: squared lengths of 2 * 10^8, whose difference float32 rounds to steps of 16."""
    training = torch.full((40, 3072), 250, dtype=torch.uint8)
    training[torch.arange(40), torch.arange(40)] += 1
    distances, places = nearest_of(training.flip(0), [training])
    assert places.tolist() == list(reversed(range(40)))
    assert distances.tolist() == [0.0] * 40


def test_distances_are_euclidean_and_places_count_through_all_batches() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 6.0], [30.0, 44.0]])
    batches = [torch.tensor([[3.0, 4.0], [10.0, 0.0]]), torch.tensor([[0.0, 1.5]])]
    distances, places = nearest_of(points, batches)
    assert distances.tolist() == pytest.approx([1.5, 2.0, (27**2 + 40**2) ** 0.5])
    assert places.tolist() == [2, 0, 0]


def test_copies_of_training_images_find_themselves_by_pixels_and_by_features() -> None:
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8)
    dataset = type("Images", (), {"batch": staticmethod(lambda rows: images[rows]), "__len__": lambda self: 40})()
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    extractor = SimpleNamespace(label="numbers", device=torch.device("cpu"))
    for known in (None, features):
        real = RealImages(Config(), extractor, Reference(statistics_of(features), {}, known), trained=dataset)
        found = real.nearest_trained(images[[39, 5]], features[[39, 5]])
        assert torch.equal(found, images[[39, 5]])


def row(path: Path) -> torch.Tensor:
    """The images of a picture's only row, uint8 `[n, 8, 8]`, by the places that it says."""
    image = Image.open(path).convert("L")
    at = json.loads(Image.open(path).text["Rows"])
    xs = [at["left"] + column * (at["width"] + at["gap"]) for column in range(at["columns"])]
    boxes = [(x, at["top"], x + at["width"], at["top"] + at["height"]) for x in xs]
    return torch.stack(
        [torch.from_numpy(np.array(image.resize((8, 8), Image.Resampling.NEAREST, box))) for box in boxes]
    )


def kept(run) -> dict[str, Path]:
    """First digits of the weights' sha256 -> the picture."""
    return {path.name[:16]: path for path in run.output_dir.glob(f"scores/00000008-*-*/nearest/*-{SHOWN}.png")}


@pytest.mark.parametrize("reference", ["train", "held_out", "npz"])
def test_a_scoring_keeps_for_each_row_of_its_grid_the_training_images_nearest_to_its_samples(
    tmp_path: Path, reference: str
) -> None:
    """By features where those of the training images are at hand, else by pixels; here, both by brute force."""
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    changes = {"evaluation__reference": str(tmp_path / "stats.npz") if reference == "npz" else reference}
    run = make_run(tmp_path / "run", labels=True, data__held_out=0.3, evaluation__weights=["raw", "ema_0_9"], **changes)
    found = results(run)
    training = data.load(run.data)
    real = training.batch(torch.arange(len(training)))
    extractor = open_extractor("classifier", run.output_dir)
    assert kept(run).keys() == {one["weights_sha256"][:16] for one in found["rows"]}
    for key, path in kept(run).items():
        (images,) = (
            load_file(file)["images"][:SHOWN] for file in run.output_dir.glob(f"scores/*/weights/{key}/images-0*0-*")
        )
        ours, theirs = (one.flatten(1).double() if reference == "npz" else extractor(one) for one in (images, real))
        nearest = (ours[:, None] - theirs).square().sum(dim=2).argmin(dim=1)
        assert torch.equal(row(path), real[nearest][:, 0])
        between = "pixels" if reference == "npz" else "features of classifier"
        title = f"Nearest training image of each sample, by Euclidean distance between {between}"
        assert Image.open(path).text["Title"] == title


def test_they_change_no_figure_and_are_made_once_also_for_a_scoring_that_has_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluation__weights=["raw"])
    rows = results(run)["rows"]
    (path,) = kept(run).values()
    before = path.read_bytes()
    path.write_bytes(b"kept")
    assert results(run)["rows"] == rows
    assert path.read_bytes() == b"kept"
    path.unlink()  # as a scoring of an earlier version left it
    assert results(run)["rows"] == rows
    assert path.read_bytes() == before


def test_where_the_training_images_are_not_at_hand_the_scoring_goes_without(tmp_path: Path, monkeypatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("no such folder")

    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    run = make_run(tmp_path / "run", evaluation__weights=["raw"], evaluation__reference=str(tmp_path / "stats.npz"))
    monkeypatch.setattr(sys.modules["ddpm_ema.score.run"], "load_split", missing)
    assert [one["weights"] for one in results(run)["rows"]] == ["raw"]
    assert kept(run) == {}


@pytest.mark.slow
def test_two_ranks_keep_the_same(tmp_path: Path) -> None:
    """By pixels, for which every rank opens the training images."""
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    run = make_run(tmp_path / "run", evaluation__reference=str(tmp_path / "stats.npz"))
    results(run)
    other = again(run, evaluation__output=str(tmp_path / "other"))
    launch = start(other, world_size=2)
    assert launch.wait() == [0, 0], launch.output(0)
    theirs = sorted((tmp_path / "other").glob("scores/*/nearest/*.png"))
    ours = sorted(kept(run).values())
    assert [path.name for path in theirs] == [path.name for path in ours]
    assert [path.read_bytes() for path in theirs] == [path.read_bytes() for path in ours]

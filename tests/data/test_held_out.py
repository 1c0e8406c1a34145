"""The held-out images: chosen by content alone, never trained on, copies on one side."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import STORAGES, everything, load, settings
from PIL import Image
from pydantic import ValidationError

from ddpm_ema import config, data
from ddpm_ema.data.dataset import is_held_out
from ddpm_ema.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixty images of noise in two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def content(dataset: data.ImageDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(dataset)}


@pytest.mark.parametrize("storage", STORAGES)
def test_both_sides_together_are_all_images_and_share_none(photos: Path, storage: str) -> None:
    whole, train = load(photos, storage), load(photos, storage, held_out=0.3)
    held_out = data.load(
        settings(source="folder", path=photos, storage=storage, image_size=4, channels=3, held_out=0.3),
        split="held_out",
    )
    assert content(train).isdisjoint(content(held_out))
    assert content(train) | content(held_out) == content(whole)
    assert len(train) + len(held_out) == 60
    for side in (train, held_out):
        for i in range(len(side)):
            path = Path(side.where(i))
            assert side.labels[i] == "ab".index(path.parent.name)
            assert torch.equal(side.batch(torch.tensor([i]))[0], whole.batch(torch.tensor([_place(whole, path)]))[0])
    assert len({whole.fingerprint, train.fingerprint, held_out.fingerprint}) == 3
    assert f"{len(held_out)} held out" in str(train)


def _place(dataset: data.ImageDataset, path: Path) -> int:
    return next(i for i in range(len(dataset)) if dataset.where(i) == str(path))


def test_another_image_moves_no_other_and_copies_and_mirror_images_lie_on_one_side(photos: Path) -> None:
    before = content(load(photos, held_out=0.5))
    some = sorted(photos.rglob("*.png"))
    for path in some[:10]:
        with Image.open(path) as image:
            image.save(photos / "a" / f"copy-{path.name}")
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "b" / f"mirror-{path.name}")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(photos / "a" / "00-first.png")
    after = load(photos, held_out=0.5)
    assert before <= content(after)
    names = [Path(after.where(i)).name for i in range(len(after))]
    for path in some[:10]:
        assert len({(f"{prefix}{path.name}" in names) for prefix in ("", "copy-", "mirror-")}) == 1


def test_the_share_is_kept_to_sampling_error() -> None:
    images = torch.randint(0, 256, (4000, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for share in (0.02, 0.1, 0.5):
        found = float(is_held_out(images, share).double().mean())
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_other_splits_lose_nothing(photos: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for split in ("train", "test"):
        (both / split).symlink_to(photos)
    assert len(load(both, held_out=0.5)) < 60
    wanted = settings(source="folder", path=both, image_size=4, channels=3, held_out=0.5)
    assert len(data.load(wanted, split="test")) == 60


def test_a_share_that_leaves_a_side_empty_is_an_error_and_so_is_a_reference_that_does_not_exist(photos: Path) -> None:
    few = settings(source="folder", path=photos, image_size=4, channels=3, held_out=1e-9)
    with pytest.raises(UserError, match="1e-09 leaves none of the 60 images of photos held out"):
        data.load(few, split="held_out")
    with pytest.raises(UserError, match="no image of this run is held out"):
        data.load(settings(source="digits"), split="held_out")
    with pytest.raises(UserError, match=r"evaluation\.reference: held_out needs data\.held_out"):
        config.validate({"evaluation": {"reference": "held_out"}})
    with pytest.raises(ValidationError):
        settings(held_out=1.0)

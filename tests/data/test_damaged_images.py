"""A damaged image is an error that names it, or is skipped and named, however the images are kept."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import STORAGES, everything, load
from PIL import Image, features

from ddpm_ema.errors import UserError


def damage(folder: Path) -> None:
    """A truncated JPEG, a truncated PNG, and a text with an image's name: indices 1, 6 and 11."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(content, "JPEG")
    (folder / "a" / "1.png").write_bytes(content.getvalue()[:1500])
    whole = (folder / "b" / "2.png").read_bytes()
    (folder / "b" / "2.png").write_bytes(whole[:-30])
    (folder / "c" / "3.png").write_text("no image")


@pytest.mark.parametrize("storage", ["memory", "mmap"])
def test_a_damaged_image_is_an_error_that_names_it(folder: Path, storage: str) -> None:
    damage(folder)
    with pytest.raises(UserError) as error:
        load(folder, storage)
    for part in ("a/1.png", "truncated", "data.max_bad_images"):
        assert part in str(error.value)
    if storage == "mmap":
        left = [path for path in (folder.parent / "cache" / "images").iterdir() if path.is_dir()]
        assert left == [], "nothing half made is left"


@pytest.mark.parametrize("storage", STORAGES)
def test_as_many_damaged_images_as_allowed_are_skipped_and_named(folder: Path, storage: str) -> None:
    clean = load(folder)
    damage(folder)
    dataset = load(folder, storage, max_bad_images=3)
    rest = torch.tensor([0, 2, 3, 4, 5, 7, 8, 9, 10])
    assert torch.equal(everything(dataset), clean.batch(rest))
    assert torch.equal(dataset.labels, clean.labels[rest])
    assert [dataset.where(i) for i in range(9)] == [clean.where(int(i)) for i in rest]
    assert [line.split(": ")[0][-7:] for line in dataset.skipped] == ["a/1.png", "b/2.png", "c/3.png"]
    with pytest.raises(UserError, match="2 are allowed"):
        load(folder, storage, max_bad_images=2)


def test_a_cache_made_with_leave_to_skip_is_refused_without_it(folder: Path) -> None:
    damage(folder)
    load(folder, "mmap", max_bad_images=3)
    with pytest.raises(UserError, match=r"c/3\.png: not an image"):
        load(folder, "mmap", max_bad_images=0)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named_like_any_other_damaged_image(folder: Path) -> None:
    path = folder / "a" / "damaged.avif"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[84] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RuntimeError):  # the trap is real
        Image.open(path).load()
    with pytest.raises(UserError, match=r"damaged\.avif"):
        load(folder)


def test_nothing_but_damaged_images_is_an_error(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_text("no image")
    for storage in STORAGES:
        with pytest.raises(UserError, match="none of the 12 images"):
            load(folder, storage, max_bad_images=12)

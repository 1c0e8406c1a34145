"""The same images, in the order asked for, under the same fingerprint, whichever way they are kept."""

import os
from pathlib import Path

import pytest
import torch
from image_sets import STORAGES, everything, load
from PIL import Image


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    first = load(folder)
    for path in sorted(folder.rglob("*.png"), reverse=True):  # another place, another order on disk, other times
        target = tmp_path / "elsewhere" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        os.utime(target, (1, 1))
    other = tmp_path / "elsewhere"
    assert load(other).fingerprint == first.fingerprint == load(other, "mmap").fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize("storage", ["memory", "mmap"])
def test_one_changed_pixel_label_or_image_changes_the_fingerprint(folder: Path, storage: str) -> None:
    seen = [load(folder, storage).fingerprint]
    image = Image.open(folder / "a" / "0.png")
    image.putpixel((3, 3), (11, 0, 100))
    image.save(folder / "a" / "0.png")
    seen.append(load(folder, storage).fingerprint)
    (folder / "b" / "0.png").rename(folder / "a" / "9.png")  # the same pixels in the same order, one other label
    seen.append(load(folder, storage).fingerprint)
    (folder / "c" / "3.png").unlink()
    seen.append(load(folder, storage).fingerprint)
    assert len(set(seen)) == 4


def test_the_conversion_is_part_of_the_fingerprint(folder: Path) -> None:
    for storage in STORAGES:
        seen = {
            load(folder, storage, **change).fingerprint
            for change in ({}, {"image_size": 8}, {"channels": 1}, {"background": 0})
        }
        assert len(seen) == 4


@pytest.mark.parametrize("storage", ["device", *STORAGES])
def test_every_storage_gives_the_same_images_in_the_order_asked_for(folder: Path, storage: str) -> None:
    reference, dataset = everything(load(folder, "memory")), load(folder, storage).to("cpu")
    for indices in (torch.tensor([11, 0, 5]), torch.tensor([5, 5]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(dataset.batch(indices), reference[indices])


def test_auto_keeps_what_fits_in_memory_and_maps_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(folder, "auto").storage == "memory"
    monkeypatch.setattr("ddpm_ema.data.dataset.MEMORY_BUDGET", 12 * 48 - 1)
    assert load(folder, "auto").storage == "mmap"


def test_only_what_may_go_to_the_device_goes_there(folder: Path) -> None:
    device = torch.device("meta")  # stands for an accelerator: only its being another device matters here
    for storage, moves in (("device", True), ("auto", True), ("memory", False), ("mmap", False)):
        batch = load(folder, storage).to(device).batch(torch.tensor([1], device="meta" if moves else "cpu"))
        assert (batch.device == device) == moves, storage

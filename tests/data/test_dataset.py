"""The same images, in the order asked for, under the same fingerprint, whichever way they are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
    assert load(other, "stream").fingerprint == load(folder, "stream").fingerprint
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


def test_a_streamed_fingerprint_sees_names_and_sizes(folder: Path) -> None:
    seen = [load(folder, "stream").fingerprint]
    (folder / "a" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes() + b"0")
    seen.append(load(folder, "stream").fingerprint)
    (folder / "c" / "3.png").rename(folder / "c" / "4.png")
    seen.append(load(folder, "stream").fingerprint)
    assert len(set(seen)) == 3


@pytest.mark.parametrize(("storage", "workers"), [*((storage, 2) for storage in ("device", *STORAGES)), ("stream", 0)])
def test_every_storage_gives_the_same_images_in_the_order_asked_for(folder: Path, storage: str, workers: int) -> None:
    reference = everything(load(folder, "memory"))
    dataset = load(folder, storage, num_workers=workers).to("cpu")
    order = [torch.tensor([11, 0, 5]), torch.tensor([5, 5]), torch.tensor([], dtype=torch.int64), torch.arange(12)]
    for indices, streamed in zip(order, dataset.stream(iter(order)), strict=True):
        assert streamed.dtype == torch.uint8
        assert torch.equal(streamed, reference[indices])
        assert torch.equal(dataset.batch(indices), reference[indices])


def test_a_stream_reads_its_indices_only_a_little_ahead(folder: Path) -> None:
    """Endless index streams must work."""
    asked = []

    def endless() -> Any:
        while True:
            asked.append(len(asked))
            yield torch.tensor([asked[-1] % 12])

    batches = load(folder, "stream").stream(endless())
    for _ in range(3):
        next(batches)
    del batches
    assert len(asked) < 20


def test_auto_keeps_what_fits_in_memory_and_maps_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(folder, "auto").storage == "memory"
    monkeypatch.setattr("ddpm_ema.data.dataset.MEMORY_BUDGET", 12 * 48 - 1)
    assert load(folder, "auto").storage == "mmap"


def test_only_what_may_go_to_the_device_goes_there(folder: Path) -> None:
    device = torch.device("meta")  # stands for an accelerator: only its being another device matters here
    for storage, moves in (("device", True), ("auto", True), ("memory", False), ("mmap", False), ("stream", False)):
        batch = load(folder, storage).to(device).batch(torch.tensor([1], device="meta" if moves else "cpu"))
        assert (batch.device == device) == moves, storage

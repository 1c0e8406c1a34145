"""Images in: every kind of file to the pixels it is documented to give, in an order that depends on names alone, and one
clear message for whatever is wrong with them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from sklearn.datasets import load_digits

from ddpm_ema import data
from ddpm_ema.config import DataSettings
from ddpm_ema.data import decode as decode_module
from ddpm_ema.data import vision
from ddpm_ema.data.convert import Conversion
from ddpm_ema.errors import UserError

STORAGES = ["memory", "mmap", "stream"]


def settings(**fields: Any) -> DataSettings:
    return DataSettings.model_validate(fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve 4×4 RGB images in three classes, each one flat colour that tells which it is."""
    root = tmp_path / "images"
    for label, name in enumerate(["b", "a", "c"]):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4), (10 * label, 20 * i, 100)).save(root / name / f"{i}.png")
    return root


def load(root: Path, storage: str = "memory", **fields: Any) -> data.ImageDataset:
    fields = {"image_size": 4, "channels": 3, "cache_dir": root.parent / "cache", "num_workers": 2, **fields}
    return data.load(settings(source="folder", path=root, storage=storage, **fields))


def everything(dataset: data.ImageDataset) -> torch.Tensor:
    return dataset.batch(torch.arange(len(dataset)))


# --- digits


def test_digits_span_the_whole_range_and_keep_their_labels() -> None:
    dataset = data.load(settings(source="digits", image_size=8, channels=1))
    bunch = load_digits()
    expected = torch.from_numpy(np.rint(bunch.images * 255 / 16)).to(torch.uint8)[:, None]
    assert torch.equal(everything(dataset), expected)
    assert int(expected.max()) == 255
    assert (len(dataset), dataset.image_shape, dataset.num_classes) == (1797, (1, 8, 8), 10)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == bunch.target.tolist()


def test_digits_in_three_channels_are_grey_and_in_another_size_are_resized() -> None:
    grey = everything(data.load(settings(source="digits", image_size=8, channels=1)))
    colour = everything(data.load(settings(source="digits", image_size=8, channels=3)))
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))
    large = data.load(settings(source="digits", image_size=16, channels=1))
    assert large.image_shape == (1, 16, 16)
    back = torch.nn.functional.avg_pool2d(everything(large).float(), 2)
    assert abs(float(back.mean() - grey.float().mean())) < 2
    assert float(torch.corrcoef(torch.stack([back.flatten(), grey.flatten().float()]))[0, 1]) > 0.98


def test_digits_have_one_split() -> None:
    with pytest.raises(UserError, match="no 'test'"):
        data.load(settings(source="digits"), split="test")


# --- what becomes of an image (fault 23): real files, read back


def through_a_file(image: Image.Image, tmp_path: Path, name: str, channels: int = 3, **save: Any) -> np.ndarray:
    """uint8 [C, H, W] of an image that was written to a file and loaded as a folder of one; small ones magnified."""
    root = tmp_path / "one"
    root.mkdir()
    if image.size == (2, 2):
        pixels = through_a_file(
            image.resize((4, 4), Image.Resampling.NEAREST), tmp_path / "one", name, channels, **save
        )
        return pixels[:, ::2, ::2]
    image.save(root / name, **save)
    dataset = load(root, image_size=image.size[0], channels=channels, background=200)
    return everything(dataset)[0].numpy()


def test_grey_is_repeated_over_three_channels(tmp_path: Path) -> None:
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    assert (through_a_file(Image.fromarray(levels), tmp_path, "x.png") == levels).all()


def test_colour_becomes_luma_in_one_channel(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    image.putpixel((1, 0), (0, 255, 0))
    image.putpixel((0, 1), (0, 0, 255))
    image.putpixel((1, 1), (9, 9, 9))
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
    assert through_a_file(image, tmp_path, "x.png", channels=1).tolist() == [[[76, 150], [29, 9]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_over_the_background(tmp_path: Path, mode: str) -> None:
    def pixel(grey: int, alpha: int) -> tuple[int, ...]:
        return (grey, alpha) if mode == "LA" else (grey, grey, grey, alpha)

    image = Image.new(mode, (2, 2), pixel(40, 0))
    image.putpixel((0, 0), pixel(40, 255))
    image.putpixel((1, 0), pixel(0, 128))
    pixels = through_a_file(image, tmp_path, "x.png")
    half = round(200 * (255 - 128) / 255)
    assert pixels.shape == (3, 2, 2)
    assert np.abs(pixels.astype(int) - np.array([[40, half], [200, 200]])).max() <= 1
    assert (pixels[:, 0, 0] == 40).all()
    assert (pixels[:, 1] == 200).all()


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    pixels = through_a_file(image, tmp_path, "x.png")
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == [200, 100, 50]


def test_a_transparent_palette_entry_is_laid_over_the_background(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    pixels = through_a_file(image, tmp_path, "x.gif", transparency=1)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == [200, 200, 200]


def test_a_transparent_colour_is_laid_over_the_background(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.putpixel((1, 1), (7, 8, 9))
    pixels = through_a_file(image, tmp_path, "x.png", transparency=(7, 8, 9))
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]
    assert pixels[:, 1, 1].tolist() == [200, 200, 200]


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    pixels = through_a_file(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path, "x.jpg", quality=100)
    assert np.abs(pixels.astype(int) - np.array([0, 255, 255])[:, None, None]).max() <= 3


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_grey_is_scaled_and_rounded_to_nearest(tmp_path: Path, name: str) -> None:
    rows = [[0, 128, 129, 257], [32767, 32896, 65406, 65407], [65535, 0, 1, 2], [0, 0, 0, 385]]
    levels = np.array(rows, dtype=np.uint16)
    pixels = through_a_file(Image.fromarray(levels), tmp_path, name)
    assert (pixels == np.rint(levels / 257)).all()
    assert pixels[0, :2].tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]


def test_bilevel_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 2))
    image.putpixel((1, 0), 1)
    assert through_a_file(image, tmp_path, "x.png", channels=1).tolist() == [[[0, 255], [0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """Row and column of the stored image that show at the upper left and the upper right, by the EXIF standard."""
    shown = {1: (0, 1), 2: (1, 0), 3: (3, 2), 4: (2, 3), 5: (0, 2), 6: (2, 0), 7: (3, 1), 8: (1, 3)}[orientation]
    stored = [10, 80, 150, 220]  # upper left, upper right, lower left, lower right
    image = Image.new("L", (16, 16))
    for corner, level in enumerate(stored):
        image.paste(level, (8 * (corner % 2), 8 * (corner // 2), 8 * (corner % 2) + 8, 8 * (corner // 2) + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = through_a_file(image, tmp_path, "x.jpg", channels=1, exif=exif, quality=100)[0].astype(int)
    assert abs(pixels[2, 2] - stored[shown[0]]) < 4
    assert abs(pixels[2, 13] - stored[shown[1]]) < 4


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pixels = through_a_file(frames[0], tmp_path, "x.gif", save_all=True, append_images=frames[1:])
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "floating-point pixels"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "not 16-bit grey"),
    ],
)
def test_pixels_of_no_defined_range_are_refused(tmp_path: Path, image: Image.Image, message: str) -> None:
    with pytest.raises(UserError, match=f"x.tif: .*{message}"):
        through_a_file(image, tmp_path, "x.tif")


def test_the_centre_square_is_taken() -> None:
    image = Image.new("L", (9, 4), 255)
    image.paste(7, (2, 0, 6, 4))
    assert (Conversion(4, 1)(image) == 7).all()
    assert (Conversion(4, 1)(image.transpose(Image.Transpose.TRANSPOSE)) == 7).all()


def test_shrinking_is_antialiased_and_keeps_the_mean() -> None:
    fine = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    small = Conversion(8, 1)(fine.astype(np.uint8))
    assert np.abs(small.astype(float) - 127.5).max() < 3  # without antialiasing: all black or all white


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    assert (Conversion(5, 3)(pixels) == pixels.transpose(2, 0, 1)).all()


# --- folders (fault 24)


def test_images_come_in_order_of_their_relative_paths_as_bytes(folder: Path) -> None:
    """Neither a locale's order, nor one that folds case, nor that of Python's strings, where \\xff comes before U+1F600."""
    names = [b"\xff.png", "\U0001f600.png".encode(), b"alpha.png", b"Zeta.png"]
    for name, origin in zip(names, ("0", "1", "2", "3"), strict=True):
        (folder / "a" / os.fsdecode(name)).write_bytes((folder / "c" / f"{origin}.png").read_bytes())
    dataset = load(folder)
    shown = [dataset.where(i).removeprefix(f"{folder}/a/") for i in range(8)]
    assert shown == ["0.png", "1.png", "2.png", "3.png", "Zeta.png", "alpha.png", "\U0001f600.png", "\\xff.png"]
    assert everything(dataset)[0, :, 0, 0].tolist() == [10, 0, 100]  # a/0.png
    assert everything(dataset)[4, :, 0, 0].tolist() == [20, 60, 100]


def test_the_first_level_of_folders_gives_the_labels(folder: Path) -> None:
    (folder / "a" / "deep" / "er").mkdir(parents=True)
    (folder / "b" / "0.png").rename(folder / "a" / "deep" / "er" / "x.png")
    dataset = load(folder)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert dataset.num_classes == 3


def test_an_image_outside_of_the_class_folders_leaves_all_without_labels(folder: Path) -> None:
    (folder / "a" / "0.png").rename(folder / "0.png")
    dataset = load(folder)
    assert (dataset.labels, dataset.num_classes, len(dataset)) == (None, None, 12)


def test_other_files_and_hidden_ones_are_counted_and_ignored(folder: Path) -> None:
    (folder / "a" / "notes.txt").write_text("hello")
    (folder / "a" / "._0.png").write_text("what macOS leaves behind")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_text("no image")
    dataset = load(folder)
    assert (len(dataset), dataset.num_ignored, dataset.skipped) == (12, 3, [])
    assert "3 other files ignored" in str(dataset)


def test_broken_links_and_loops_of_links_are_passed_over_and_named(folder: Path) -> None:
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "c" / "self.png").symlink_to(folder / "c" / "self.png")
    dataset = load(folder)
    assert len(dataset) == 12
    assert len(dataset.skipped) == 3
    text = "\n".join(dataset.skipped)
    for part in ("gone.png: a broken link", "loop: a link back to a folder above", "self.png: a broken link"):
        assert part in text


def test_a_named_pipe_is_passed_over_and_named(folder: Path) -> None:
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "evil\x1b]0;title\x07.png").symlink_to("nowhere")
    dataset = load(folder)
    evil, pipe = sorted(dataset.skipped)
    assert pipe.endswith("pipe.png: not a regular file")
    assert evil.endswith(r"evil\x1b]0;title\x07.png: a broken link")  # no escape sequence reaches a terminal


def test_linked_folders_and_images_are_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "first").symlink_to(folder / "a")
    (linked / "second").mkdir()
    (linked / "second" / "x.png").symlink_to(folder / "b" / "0.png")
    dataset = load(linked)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1]


def test_names_that_are_not_utf8_are_read_and_can_be_shown(folder: Path) -> None:
    (folder / "a" / "0.png").rename(os.fsdecode(os.fsencode(folder / "a") + b"/\xff.png"))
    (folder / "a" / "1.png").write_text("no image")
    for storage in STORAGES:
        dataset = load(folder, storage, max_bad_images=1)
        assert [dataset.where(i) for i in range(len(dataset))][2].endswith("\\xff.png")
        assert len(everything(dataset)) == 11
        str(dataset).encode()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), r"no images under .*\(no files\)"),
        (lambda root: (root.mkdir(), (root / "x.txt").write_text("")), r"no images under .*\(1 other files\)"),
        (lambda root: root.write_text(""), "is not a folder"),
    ],
)
def test_a_folder_without_images_says_so(tmp_path: Path, prepare: Callable[[Path], Any], message: str) -> None:
    prepare(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "images")


def test_a_folder_of_splits_gives_the_split_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    (both / "train").symlink_to(folder)
    (both / "test").symlink_to(folder / "a")
    assert len(load(both)) == 12
    assert len(load(both, split="test")) == 4
    with pytest.raises(UserError, match="no split 'val', only test, train"):
        load(both, split="val")
    with pytest.raises(UserError, match="not divided into splits"):
        load(folder, split="test")


def test_a_class_that_is_called_train_is_no_split(folder: Path) -> None:
    (folder / "a").rename(folder / "train")
    dataset = load(folder)
    assert (len(dataset), dataset.num_classes) == (12, 3)


# --- damaged images (fault 22)


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
    assert clean.labels is not None
    assert dataset.labels is not None
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


def test_a_damaged_image_met_by_a_worker_is_one_message_without_a_traceback(folder: Path) -> None:
    damage(folder)
    dataset = load(folder, "stream")
    batches = dataset.stream([torch.tensor([0, 2]), torch.tensor([3, 1])])
    assert next(batches).shape == (2, 3, 4, 4)
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value).startswith("unreadable image ")
    assert "a/1.png" in str(error.value)
    assert "Traceback" not in str(error.value)


# --- fingerprints (fault 19)


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


# --- where images are kept


@pytest.mark.parametrize("storage", ["device", *STORAGES])
def test_every_storage_gives_the_same_images_in_the_order_asked_for(folder: Path, storage: str) -> None:
    reference = everything(load(folder, "memory"))
    dataset = load(folder, storage).to("cpu")
    order = [torch.tensor([11, 0, 5]), torch.tensor([5, 5]), torch.tensor([], dtype=torch.int64), torch.arange(12)]
    for indices, streamed in zip(order, dataset.stream(iter(order)), strict=True):
        assert streamed.dtype == torch.uint8
        assert torch.equal(streamed, reference[indices])
        assert torch.equal(dataset.batch(indices), reference[indices])


def test_streaming_without_workers_gives_the_same(folder: Path) -> None:
    dataset = load(folder, "stream", num_workers=0)
    streamed = list(dataset.stream([torch.arange(5), torch.arange(5, 12)]))
    assert torch.equal(torch.cat(streamed), everything(load(folder)))


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


def test_a_mapped_file_is_made_once_and_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder, "mmap")
    content = everything(first)

    def fail(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decode_module.Decoding, "__iter__", fail)
    second = load(folder, "mmap")
    assert torch.equal(everything(second), content)
    assert second.fingerprint == first.fingerprint
    (folder / "a" / "0.png").write_bytes((folder / "a" / "1.png").read_bytes())
    with pytest.raises(AssertionError, match="decoded again"):
        load(folder, "mmap")


@pytest.mark.parametrize("harm", ["truncate", "garble", "remove", "change one pixel"])
def test_a_mapped_file_that_is_not_whole_is_made_again(folder: Path, harm: str) -> None:
    content = everything(load(folder, "mmap"))
    (cached,) = [path for path in (folder.parent / "cache" / "images").iterdir() if path.is_dir()]
    if harm == "truncate":
        os.truncate(cached / "images.u8", 100)
    elif harm == "garble":
        (cached / "meta.json").write_text("{")
    elif harm == "change one pixel":
        pixels = bytearray((cached / "images.u8").read_bytes())
        pixels[5] ^= 1
        (cached / "images.u8").write_bytes(pixels)
    else:
        (cached / "images.u8").unlink()
    assert torch.equal(everything(load(folder, "mmap")), content)


def test_changing_a_batch_changes_neither_the_cache_nor_its_file(folder: Path) -> None:
    for storage in ("memory", "mmap"):
        dataset = load(folder, storage)
        before = everything(dataset).clone()
        everything(dataset).zero_()
        assert torch.equal(everything(dataset), before)
        assert torch.equal(everything(load(folder, storage)), before)


def test_a_cache_folder_that_cannot_be_written_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep decoded images in .*data\.cache_dir"):
        load(folder, "mmap", cache_dir=tmp_path / "file" / "cache")


PREAMBLE = """
import os, sys, torch, signal, resource, time
from pathlib import Path
from ddpm_ema import data
from ddpm_ema.config import DataSettings
from ddpm_ema.errors import UserError
root = Path(sys.argv[1])
def load(storage, **fields):
    fields = {"image_size": 4, "channels": 3, "cache_dir": root.parent / "cache", **fields}
    return data.load(DataSettings(source="folder", path=root, storage=storage, **fields))
"""


def start(root: Path, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_disk_that_fills_up_while_caching_says_what_is_needed_and_leaves_nothing(folder: Path) -> None:
    process = start(
        folder,
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # the write fails as on a full disk, here with EFBIG
try:
    load("mmap")
except UserError as error:
    print(error)
""",
    )
    out, err = process.communicate(timeout=60)
    assert "cannot keep decoded images" in out, err
    assert "576 bytes needed" in out
    assert [p for p in (folder.parent / "cache" / "images").iterdir() if p.is_dir()] == []


def test_killed_while_caching_the_next_start_makes_it_whole(folder: Path) -> None:
    process = start(
        folder,
        """
from ddpm_ema.data import cache
def slow(*_):
    print("writing", flush=True)
    time.sleep(60)
cache._sync = slow
load("mmap")
""",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert torch.equal(everything(load(folder, "mmap")), everything(load(folder)))
    assert not list((folder.parent / "cache" / "images").glob("*.tmp-*"))


def test_the_lock_of_the_cache_does_not_follow_a_link(folder: Path, tmp_path: Path) -> None:
    load(folder, "mmap")
    (lock,) = (folder.parent / "cache" / "images").glob("*.lock")
    victim = tmp_path / "victim"
    victim.write_text("thesis")
    lock.unlink()
    lock.symlink_to(victim)
    shutil.rmtree(lock.with_suffix(""))
    with pytest.raises(UserError, match="cannot keep decoded images"):
        load(folder, "mmap")
    assert victim.read_text() == "thesis"


@pytest.mark.slow
def test_two_processes_that_start_at_once_decode_once(folder: Path) -> None:
    script = """
from ddpm_ema.data.decode import Decoding
inner = Decoding.__iter__
def counted(self):
    print("decoding", flush=True)
    time.sleep(0.5)
    return inner(self)
Decoding.__iter__ = counted
print(load("mmap").fingerprint)
"""
    outputs = [process.communicate(timeout=120) for process in [start(folder, script), start(folder, script)]]
    lines = [line for out, _ in outputs for line in out.split()]
    assert lines.count("decoding") == 1, outputs
    fingerprints = [line for line in lines if line != "decoding"]
    assert len(fingerprints) == 2
    assert len(set(fingerprints)) == 1


def test_workers_leave_signals_to_the_process_that_trains(folder: Path) -> None:
    """Fault 8: SIGTERM and SIGINT to the whole group, as Slurm and a terminal send them, with workers running."""
    process = start(
        folder,
        """
import multiprocessing
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
signal.signal(signal.SIGINT, lambda *_: seen.append("INT"))
dataset = load("stream", num_workers=2)
batches = dataset.stream(torch.tensor([i % 12]) for i in range(300))
total = [next(batches)]
workers = multiprocessing.active_children()
assert len(workers) == 2, workers
print("ready", flush=True)
while len(seen) < 2:
    time.sleep(0.01)
total += list(batches)
print(sorted(seen), len(total), torch.cat(total).sum().item(), flush=True)
del batches
for worker in workers:
    worker.join(20)
print([worker.exitcode for worker in workers])
os.kill(os.getpid(), signal.SIGTERM)
print(len(seen))
""",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    expected = int(everything(load(folder)).sum()) * 25
    assert out.splitlines() == [f"['INT', 'TERM'] 300 {expected}", "[0, 0]", "3"], err
    assert err == ""
    assert process.returncode == 0


def test_an_error_that_is_kept_does_not_keep_the_program_from_ending(folder: Path) -> None:
    """At exit multiprocessing sends its workers SIGTERM, which these ignore, and waits for them."""
    process = start(
        folder,
        """
dataset = load("stream", num_workers=2)
batches = dataset.stream(torch.tensor([i % 12]) for i in range(300))
next(batches)
def consume():
    batch = next(batches)
    raise UserError("something else went wrong")
try:
    consume()
except UserError as error:
    kept = error, batches
""",
    )
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_workers_end_when_the_process_that_trains_is_killed(folder: Path) -> None:
    process = start(
        folder,
        """
import multiprocessing, itertools
batches = load("stream", num_workers=2).stream(torch.tensor([0]) for _ in itertools.count())
next(batches)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
time.sleep(60)
""",
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)  # returns once the workers, too, have closed the pipe
    for pid in workers:
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- torchvision


def write_mnist(root: Path, train: bool, images: np.ndarray, labels: list[int]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    stem = "train" if train else "t10k"
    header = struct.pack(">IIII", 0x803, *images.shape)
    (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def test_a_torchvision_set_that_lies_there_is_read_with_its_splits(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    both = {train: generator.integers(0, 256, (n, 28, 28), dtype=np.uint8) for train, n in ((True, 5), (False, 3))}
    for train, images in both.items():
        write_mnist(tmp_path, train, images, [9 - i for i in range(len(images))])
    for split, train in (("train", True), ("test", False)):
        dataset = data.load(
            settings(source="torchvision", name="MNIST", path=tmp_path, split=split, image_size=28, channels=1)
        )
        assert torch.equal(everything(dataset)[:, 0], torch.from_numpy(both[train]))
        assert dataset.labels is not None
        assert dataset.labels.tolist() == [9 - i for i in range(len(dataset))]
        assert dataset.num_classes == 10
    with pytest.raises(UserError, match="splits train and test, and no 'val'"):
        data.load(settings(source="torchvision", name="MNIST", path=tmp_path, split="val"))


def test_a_torchvision_set_can_be_streamed_by_workers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, True, images, [0] * 6)
    write_mnist(tmp_path, False, images, [0] * 6)  # torchvision wants both
    dataset = data.load(
        settings(source="torchvision", name="MNIST", path=tmp_path, storage="stream", image_size=28, channels=1)
    )
    (streamed,) = dataset.stream([torch.tensor([4, 1])])
    assert torch.equal(streamed[:, 0], torch.from_numpy(images[[4, 1]]))


def test_a_download_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for name in ("CIFAR10", "MNIST", "SVHN"):
        with pytest.raises(UserError) as error:
            data.load(settings(source="torchvision", name=name, path=tmp_path / name))
        for part in (name, str(tmp_path), "downloading it failed", "copy the set"):
            assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", "did you mean CIFAR10"),
        ("cifar10", "did you mean CIFAR10"),
        ("EMNIST", r"also needs split: EMNIST\(split=\.\.\.\)"),
        ("CIFAR10(colour=3)", "takes no colour"),
        ("FakeData(size=0)", "holds no images"),
    ],
)
def test_a_wrong_torchvision_name_gives_the_right_one(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.load(settings(source="torchvision", name=name, path=tmp_path))


def test_arguments_of_a_torchvision_set_stand_in_brackets(tmp_path: Path) -> None:
    source = vision.open_torchvision("FakeData(size=7,num_classes=3)", "train", tmp_path)
    assert len(source) == 7
    assert source.num_classes == 3
    assert vision._parse("EMNIST(split=letters, download=False)")[1] == {"split": "letters", "download": False}


def test_labels_fall_back_to_the_targets_themselves(tmp_path: Path) -> None:
    """An attribute that is called targets but holds something else is not believed."""

    class Odd:
        targets = (0, 0, 0, 0)
        classes = ("a", "b", "c", "d", "e")

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[None, int]:
            return None, index

    labels, num_classes = vision._labels(Odd())
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3]
    assert num_classes == 5


# --- the Hub


def test_a_hub_set_saved_to_disk_is_read(tmp_path: Path, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(folder.rglob("*.png"))
    features = datasets.Features({"label": datasets.ClassLabel(names=["x", "y"]), "picture": datasets.Image()})
    rows = {"label": [i % 2 for i in range(12)], "picture": [str(path) for path in files]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "hub"))
    hub = settings(source="hub", name=str(tmp_path / "hub"), image_size=4, channels=3)
    dataset = data.load(hub)
    assert torch.equal(everything(dataset), everything(load(folder)))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1] * 6
    assert dataset.num_classes == 2
    with pytest.raises(UserError, match="no split 'test', only train"):
        data.load(hub, split="test")


def test_a_hub_set_without_images_names_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["hello"]}).save_to_disk(str(tmp_path / "hub"))
    with pytest.raises(UserError, match="no column of images; its columns are text"):
        data.load(settings(source="hub", name=str(tmp_path / "hub")))


def test_a_hub_set_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ddpm_ema\[hub\]'"):
        data.load(settings(source="hub", name="someone/something"))


def test_the_cache_says_what_it_holds(folder: Path) -> None:
    dataset = load(folder, "mmap")
    (meta,) = (folder.parent / "cache" / "images").glob("*/meta.json")
    stored = json.loads(meta.read_text())
    assert (stored["count"], stored["size"], stored["channels"]) == (12, 4, 3)
    assert stored["fingerprint"] == dataset.fingerprint

"""A folder of images: order and labels depend on names alone; whatever is no image is counted or named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_sets import STORAGES, everything, load

from ddpm_ema.data.folder_source import open_folder
from ddpm_ema.errors import UserError


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
    assert dataset.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert dataset.num_classes == 3


def test_an_image_outside_of_the_class_folders_leaves_all_without_labels(folder: Path) -> None:
    (folder / "a" / "0.png").rename(folder / "0.png")
    dataset = load(folder)
    assert (dataset.labels, dataset.num_classes, len(dataset)) == (None, None, 12)
    assert open_folder(folder, "train").classes == "no classes, because 0.png lies beside the folders a, b, c"
    assert open_folder(folder / "c", "train").classes == "no classes"


def test_the_classes_are_named_five_at_most(folder: Path) -> None:
    assert open_folder(folder, "train").classes == "3 classes (a, b, c)"
    for name in "def":
        (folder / name).symlink_to(folder / "c")
    assert open_folder(folder, "train").classes == "6 classes (a, b, c, d, e, …)"


def test_a_mistyped_folder_is_told_the_one_beside_it(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"does not exist.*; did you mean '{folder.name}'\?"):
        load(folder.with_name(folder.name + "s"))
    with pytest.raises(UserError, match=r"holds the images$"):
        load(folder.with_name("xyz"))


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
    for name in ("train", "test"):
        (both / name).rename(both / f"{name.title()}ing")  # as many sets are published; no classes
    with pytest.raises(UserError, match="no split 'train', only Testing, Training"):
        load(both)
    assert len(load(both, split="Training")) == 12
    with pytest.raises(UserError, match="not divided into splits"):
        load(folder, split="test")


def test_splits_beside_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    """As classes they would mix the test images into the training, and nobody would notice."""
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train", "test", "runs"):
        (both / name).symlink_to(folder)
    with pytest.raises(UserError, match=r"has the splits test, train beside other folders \(runs\).*both/train$"):
        load(both)


def test_a_class_that_is_called_train_is_no_split(folder: Path) -> None:
    (folder / "a").rename(folder / "train")
    dataset = load(folder)
    assert (len(dataset), dataset.num_classes) == (12, 3)

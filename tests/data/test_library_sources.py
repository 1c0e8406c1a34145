"""Images of libraries: scikit-learn's digits, torchvision's sets, and the Hub's."""

import struct
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import everything, load, settings
from sklearn.datasets import load_digits

from ddpm_ema import data
from ddpm_ema.data import torchvision_source
from ddpm_ema.errors import UserError


def test_digits_span_the_whole_range_and_keep_their_labels() -> None:
    dataset = data.load(settings(source="digits", image_size=8, channels=1))
    bunch = load_digits()
    expected = torch.from_numpy(np.rint(bunch.images * 255 / 16)).to(torch.uint8)[:, None]
    assert torch.equal(everything(dataset), expected)
    assert int(expected.max()) == 255
    assert (len(dataset), dataset.image_shape, dataset.num_classes) == (1797, (1, 8, 8), 10)
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
        assert dataset.labels.tolist() == [9 - i for i in range(len(dataset))]
        assert dataset.num_classes == 10
    with pytest.raises(UserError, match="splits train and test, and no 'val'"):
        data.load(settings(source="torchvision", name="MNIST", path=tmp_path, split="val"))


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
        ("CIFAR11", "did you mean 'CIFAR10'"),
        ("cifar10", "did you mean 'CIFAR10'"),
        ("EMNIST", r"also needs split: EMNIST\(split=\.\.\.\)"),
        ("CIFAR10(colour=3)", "takes no colour"),
        ("FakeData(size=0)", "holds no images"),
        ("FakeData(size=x)", "FakeData: 'str' object"),
    ],
)
def test_a_wrong_torchvision_name_gives_the_right_one(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.load(settings(source="torchvision", name=name, path=tmp_path))


def test_arguments_of_a_torchvision_set_stand_in_brackets(tmp_path: Path) -> None:
    source = torchvision_source.open_torchvision("FakeData(size=7,num_classes=3)", "train", tmp_path)
    assert len(source) == 7
    assert source.num_classes == 3
    assert torchvision_source._parse("EMNIST(split=letters, download=False)")[1] == {
        "split": "letters",
        "download": False,
    }


def test_labels_fall_back_to_the_targets_themselves(tmp_path: Path) -> None:
    """An attribute that is called targets but holds something else is not believed."""

    class Odd:
        targets = (0, 0, 0, 0)
        classes = ("a", "b", "c", "d", "e")

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[None, int]:
            return None, index

    labels, num_classes = torchvision_source._labels(Odd())
    assert labels.tolist() == [0, 1, 2, 3]
    assert num_classes == 5
    pairs = [(None, None, 1)] * 4  # as of LFWPairs: two images, and whether they match
    assert torchvision_source._labels(pairs) == (None, None)


@pytest.mark.parametrize("names", [["a/0"], ["c/3"], ["a/0", "b/0", "b/2", "c/3"]])
def test_a_damaged_image_of_a_torchvision_set_is_skipped_and_named(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / f"{name}.png").write_text("no image")
    allowed = settings(source="torchvision", name="ImageFolder", path=folder, channels=3, max_bad_images=len(names))
    dataset = data.load(allowed)
    assert (len(dataset.skipped), dataset.num_classes) == (len(names), 3)
    assert dataset.labels.tolist() == load(folder, max_bad_images=len(names)).labels.tolist()
    with pytest.raises(UserError, match=r"unreadable images in ImageFolder(.|\n)*raise data\.max_bad_images"):
        data.load(allowed.model_copy(update={"max_bad_images": 0}))


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

"""Backbones of timm: features equal to timm's own, from a file that holds every weight, and one message for what is wrong."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor

timm = pytest.importorskip("timm")
SMALL = ["test_vit.r160_in1k", "test_resnet.r160_in1k"]


@pytest.fixture(params=SMALL)
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A small model of timm's, and a file of weights, which are random: they test the adapter, and nothing else."""
    return request.param, save(request.param, tmp_path / "model.safetensors")


def save(name: str, path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)  # biases and statistics are no longer 0 and 1
    save_file(model.state_dict(), path)
    return path


def images(channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (5, channels, 32, 32), generator=generator, dtype=torch.uint8)


def test_features_are_those_of_timm_called_by_hand(saved: tuple[str, Path]) -> None:
    name, path = saved
    extractor = open_extractor(f"timm:{name}={path}", path.parent)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    model.load_state_dict(load_file(path), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model(torch.stack([transform(to_pil_image(image)) for image in images()]))
    found = extractor(images())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert (extractor.dim, extractor.is_published_inception) == (model.num_features, False)
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (extractor.name, extractor.label) == (f"timm:{name}", f"timm:{name} model")
    assert "state_dict" not in extractor.network.model.pretrained_cfg
    grey = images(1)
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_another_image_size_is_given_behind_an_at_sign(tmp_path: Path) -> None:
    path = save("test_vit.r160_in1k", tmp_path / "model.safetensors")
    extractor = open_extractor(f"timm:test_vit.r160_in1k@96={path}", tmp_path)
    assert extractor.network.prepare(to_pil_image(images()[0])).shape == (3, 96, 96)
    assert extractor(images()).shape == (5, 64)
    with pytest.raises(UserError, match="@big: the size behind @ is a number of pixels"):
        open_extractor(f"timm:test_vit.r160_in1k@big={path}", tmp_path)


def test_a_file_that_lacks_a_weight_or_has_another_shape_is_refused(saved: tuple[str, Path]) -> None:
    name, path = saved
    whole = load_file(path)
    victim = max(whole, key=lambda key: whole[key].numel())
    for tensors in ({key: whole[key] for key in whole if key != victim}, {**whole, victim: whole[victim][:1]}):
        save_file(tensors, path)
        with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded: .*" + victim.replace(".", r"\.")):
            open_extractor(f"timm:{name}={path}", path.parent)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("timm:test_vit.nope", "nope"),
        ("timm:vit_small_patch14_dinov3000", "did you mean .*vit_small_patch14_dinov2"),
        ("timm:test_vit.r160_in1k=none.safetensors", r"none\.safetensors: No such file"),
        ("timm:test_vit.r160_in1k={path}", "is no whole safetensors file"),
    ],
)
def test_a_wrong_name_or_file_is_one_message(tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match=message):
        open_extractor(entry.format(path=tmp_path / "text.safetensors"), tmp_path)


def test_without_timm_the_message_has_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_ema.features.timm_backbone.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'ddpm_ema\[timm\]'"):
        open_extractor("timm:test_vit.r160_in1k", tmp_path)


class TestHub:
    """A download that is answered from a local file, laid out as the Hub's cache lays files out."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        content = save("test_vit.r160_in1k", tmp_path / "here.safetensors").read_bytes()
        blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
        link = tmp_path / "snapshots" / "abc" / "model.safetensors"
        for path in (blob, link):
            path.parent.mkdir(parents=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
        asked: list[Any] = []

        def download(*arguments: Any, **options: Any) -> str:
            asked.append((*arguments, *options.values()))
            return str(link)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    def test_weights_come_from_timms_repository_and_their_sha256_is_recorded(
        self, asked: list[Any], tmp_path: Path
    ) -> None:
        extractor = open_extractor("timm:test_vit.r160_in1k", tmp_path)
        assert asked == [("timm/test_vit.r160_in1k", "model.safetensors", None)]
        assert [path.name for path in (tmp_path / "blobs").iterdir()] == [extractor.sha256]
        assert extractor.label == "timm:test_vit.r160_in1k"

    def test_a_file_whose_bytes_are_not_those_that_its_name_promises_is_refused(
        self, asked: list[Any], tmp_path: Path
    ) -> None:
        (blob,) = (tmp_path / "blobs").iterdir()
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        with pytest.raises(UserError, match=f"{blob.name} is damaged: its sha256 is"):
            open_extractor("timm:test_vit.r160_in1k", tmp_path)

    def test_no_network_says_what_to_fetch_and_how_to_name_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*arguments: Any, **options: Any) -> str:
            raise OSError("name resolution failed")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
        with pytest.raises(UserError) as caught:
            open_extractor("timm:vit_large_patch14_dinov2.lvd142m", tmp_path)
        for part in (
            "name resolution failed",
            "model.safetensors of huggingface.co/timm/vit_large_patch14_dinov2.lvd142m",
        ):
            assert part in str(caught.value)
        assert "timm:vit_large_patch14_dinov2.lvd142m=FILE" in str(caught.value)

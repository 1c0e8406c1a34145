"""A pickle is told by its first bytes, and no safetensors file is taken for one."""

import pickle
from pathlib import Path

import pytest
import torch

from ddpm_ema.averaging.files import HEAD_BYTES, is_pickle, save_tensors
from ddpm_ema.rundir import read_tensors

TENSORS = {"w": torch.arange(3.0)}


@pytest.mark.parametrize("size", [0x80, 0x280, 0x480, 0x4B50])
def test_a_safetensors_file_whose_header_length_begins_as_a_pickle_does_is_read(tmp_path: Path, size: int) -> None:
    """The first eight bytes are the header's length: one architecture in 32 begins with 0x80, as pickles do."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, {"pad": ""})
    padding = size - int.from_bytes(path.read_bytes()[:8], "little")
    save_tensors(path, TENSORS, {"pad": "x" * max(0, padding)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == size
    assert torch.equal(read_tensors(path)["w"], TENSORS["w"])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_told(tmp_path: Path, protocol: int) -> None:
    torch.save(TENSORS, tmp_path / "zip.pt")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    heads = [path.read_bytes()[:HEAD_BYTES] for path in tmp_path.iterdir()]
    assert all(map(is_pickle, [*heads, pickle.dumps(TENSORS, protocol), pickle.dumps({}, protocol)]))

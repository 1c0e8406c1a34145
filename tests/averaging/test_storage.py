"""Copies in one block of memory are still tensors of their own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_ema.averaging import storage


def sources() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd": torch.randn(7),
        "large": torch.randn(1000, 1001),
        "channels_last": torch.randn(3, 5, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 5).t(),
        "expanded": torch.randn(4, 1).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(9, dtype=torch.bfloat16),
    }


def test_copies_are_fp32_with_their_sources_values_and_layout() -> None:
    for name, copy in storage.fp32_copies(sources()).items():
        source = sources()[name]
        assert copy.dtype is torch.float32
        assert torch.equal(copy, source.float())
        if name != "expanded":  # which has no memory of its own to lay out
            assert copy.stride() == source.stride()


@pytest.mark.parametrize("name", list(sources()))
def test_writing_to_one_copy_changes_no_other(name: str) -> None:
    copies = storage.fp32_copies(sources())
    copies[name].fill_(99.0)
    for other, copy in copies.items():
        if other != name:
            assert torch.equal(copy, sources()[other].float())


def test_copies_are_aligned_to_cache_lines() -> None:
    starts = [copy.data_ptr() % 64 for copy in storage.fp32_copies(sources()).values() if copy.numel()]
    assert set(starts) == {starts[0]}


def test_copies_in_one_block_can_be_stored(tmp_path: Path) -> None:
    copies = storage.fp32_copies(sources())
    save_file({name: copy.contiguous() for name, copy in copies.items()}, tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("refusal", ["no such advice", "refused"])
def test_without_huge_pages_ordinary_ones_serve(monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    if refusal == "no such advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # the kernel says EINVAL
    copies = storage.fp32_copies(sources())
    assert torch.equal(copies["large"], sources()["large"])

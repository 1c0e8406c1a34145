"""Pickles are recognised, safetensors files are written: with the umask's permissions, on disk when the call returns."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

HEAD_BYTES = 9
"""Number of first bytes that `is_pickle` needs."""


def is_pickle(head: bytes) -> bool:
    """Whether a file with this beginning is a pickle, or the zip archive of one that `torch.save` writes.

    safetensors begins with its header's length in eight bytes, which may look like a pickle, and then an opening brace.
    """
    return head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write and sync one safetensors file in place (to make it appear whole, write a temporary file and rename it).

    Args:
        path: the file; its folder must exist.
        tensors: name -> tensor of any layout and device; channels-last ones, which safetensors refuses, are made contiguous.
        metadata: text stored in the header.

    Raises:
        OSError: it cannot be opened.
        safetensors.SafetensorError: it cannot be written, such as on a full disk.
    """
    # safetensors writes through a private file of mode 0600 and renames it. An ordinary new file says which mode umask and
    # the folder's default ACL give; asking for the umask itself would change it for every thread.
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    os.chmod(path, mode)
    with open(path, "rb+") as file:  # against a power cut, which no test can make
        os.fsync(file.fileno())

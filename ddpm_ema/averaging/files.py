"""One way to write a safetensors file: whole or not at all, contiguous, readable as the umask says, on disk when it returns."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

HEAD_BYTES = 9
"""How many first bytes `is_pickle` asks for."""


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle, or the zip archive of one that `torch.save` writes.

    safetensors begins with its header's length in eight bytes, which may be those of a pickle, and then an opening brace.
    """
    return head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file beside its target, sync it, and rename it: `path` is the old file or the new one.

    Args:
        path: the file; its folder is made if need be.
        tensors: name -> tensor of any layout and device; channels-last ones, which safetensors refuses, are made contiguous.
        metadata: text stored in the header.

    Raises:
        OSError: it cannot be created.
        safetensors.SafetensorError: it cannot be written, such as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        # safetensors writes through a private file of mode 0600 and renames it. An ordinary new file says which mode umask
        # and the folder's default ACL give; asking for the umask itself would change it for every thread.
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(contiguous, temporary, dict(metadata or {}))
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on disk, against a power cut, which no test can make."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that appear whole or not at all, and the one way to write and to open safetensors ones. Loads torch only to write."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

HEAD_BYTES = 9
"""Number of first bytes that `is_pickle` needs."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Where diffusers saves a network; that of a large one lies in several files, beside an index."""


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Gives an empty temporary, a file or a folder, beside `path`; what is written to it becomes `path`, whole or not at all.

    An error inside leaves `path` as it was. What a kill leaves behind is named `.<name>.<process>.partial`. The folder around `path`
    is made if need be; a folder at `path` must be empty or gone by the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        clear_rests(path)
        if folder:
            temporary.mkdir()
        else:
            open(temporary, "xb").close()  # "x": a link that a stranger left there is not followed
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only folder refuses this, too
            remove(temporary)
    sync(path.parent)


def clear_rests(target: Path) -> None:
    """Delete temporaries of `target`, files or folders, that no process of this host is writing any more; raises OSError."""
    for path in target.absolute().parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = path.name.split(".")[-2]
        if process == str(os.getpid()) or not os.path.exists(f"/proc/{process}"):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def no_follow(path: str, flags: int) -> int:
    """An opener that refuses a link: in a folder of others it could name any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """Put a file's content, or the names in a folder, on disk, against a power cut, which no test can make."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all, readable as the umask says, on disk when the call returns.

    Tensors may have any device and layout; safetensors refuses channels-last ones as they are. Raises OSError.
    """
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        # safetensors writes through a private file of mode 0600 and renames it. An ordinary new file says which mode umask
        # and the folder's default ACL give; asking for the umask itself would change it for every thread.
        mode = stat.S_IMODE(temporary.stat().st_mode)
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        places = {tensor.data_ptr(): name for name, tensor in whole.items()}
        try:  # safetensors refuses two names of one memory, those of a tied parameter
            untied = {name: t if places[t.data_ptr()] == name else t.clone() for name, t in whole.items()}
            save_file(untied, temporary, dict(metadata or {}))
        except SafetensorError as error:  # of a full disk, too: "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
        os.chmod(temporary, mode)


def open_safetensors(path: Path) -> safe_open:
    """`safe_open` on the CPU. Raises ValueError for a pickle (refused unread), a truncated or any other file, and OSError."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if is_pickle(head):
        raise ValueError(
            f"{path}: this is a pickle, which can run code when it is read: refused. Convert it to safetensors"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def is_pickle(head: bytes) -> bool:
    """Whether a file with this beginning is a pickle, or the zip archive of one that `torch.save` writes.

    safetensors begins with its header's length in eight bytes, which may look like a pickle, and then an opening brace.
    """
    return head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else, and OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that diffusers loads from a network's folder, there or not; they lie in it. Raises as `read_json`."""
    index, names = folder / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) and shards else [""]
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError(f"{index}: its weight_map must name .safetensors files beside it")
    return [folder / name for name in names]

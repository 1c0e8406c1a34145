"""Decoded images in a mapped file: made once, whole or not at all, made again when they are not what was decoded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import everything, load, start

from ddpm_ema.data.decode import Decoding
from ddpm_ema.errors import UserError


def test_a_mapped_file_is_made_once_and_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder, "mmap")
    content = everything(first)

    def fail(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(Decoding, "__iter__", fail)
    second = load(folder, "mmap")
    assert torch.equal(everything(second), content)
    assert second.fingerprint == first.fingerprint
    (meta,) = (folder.parent / "cache" / "images").glob("*/meta.json")
    expected = {"count": 12, "size": 4, "channels": 3, "fingerprint": first.fingerprint}
    assert json.loads(meta.read_text()).items() >= expected.items()
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells how files are mapped: Linux")
def test_a_mapped_file_may_be_larger_than_memory(folder: Path) -> None:
    dataset = load(folder, "mmap")
    ways = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.parent) in line]
    assert dataset.storage == "mmap"
    assert ways
    assert not any(
        "w" in way for way in ways
    )  # the kernel refuses a private, writable mapping for which it lacks memory


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
cache.sync = slow
load("mmap")
""",
    )
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

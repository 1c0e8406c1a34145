"""Ranks find each other, wait for each other, and end together, each time with one message."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import free_port, settings, start
from PIL import Image

from ddpm_ema import distributed, lost_ranks
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import LostRankError, PeerFailedError
from ddpm_ema.lost_ranks import is_communication

ALONE = """
import sys
from ddpm_ema import cli
from ddpm_ema.distributed import Processes
sys.exit(cli.guard(lambda: Processes.start("cpu", timeout=3)))
"""


def start_rank(rank: int, port: int, script: str) -> subprocess.Popen[str]:
    """One of two ranks, as a launcher would start it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | place | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, **streams)


@pytest.mark.parametrize("rank", [0, 1], ids=["which keeps the rendezvous", "which asks for it"])
def test_a_rank_whose_peer_never_comes_says_who_where_and_what_to_do(rank: int) -> None:
    port = free_port()
    process = start_rank(rank, port, ALONE)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert f"error: rank {rank} of 2" in output
    assert f"did not all meet at 127.0.0.1:{port} within 3 s (machine.timeout)" in output
    assert "start all of them again" in output


def test_ranks_wait_for_longer_than_the_timeout_where_one_works_and_say_for_whom_and_what() -> None:
    script = """
import sys, time
from ddpm_ema import cli
from ddpm_ema.distributed import Processes
processes = Processes.start("cpu", timeout=3)
def work():
    time.sleep(7 if processes.is_main else 0)
    return processes.rank
sys.exit(cli.guard(lambda: print("got", processes.main_first(work, "decoding images"))))
"""
    port = free_port()
    ranks = [start_rank(rank, port, script) for rank in (0, 1)]
    first, other = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first + other
    assert "got 0" in first
    assert "got 1" in other
    assert first.count("waiting for rank 0: decoding images") == 1
    assert other.strip() == "got 1", "a rank but the first says nothing that the first says"


def test_a_wait_for_the_device_ends_after_the_timeout_or_with_the_error_of_a_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a step whose gradients never come, before NCCL's watchdog ends the process without a message."""
    processes: Any = object.__new__(Processes)
    vars(processes).update(control="a group", rank=0, world_size=2, timeout=0.05)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lost_ranks, "roll_call", lambda *_: "rank 1 no longer answers")
    monkeypatch.setattr(lost_ranks, "failed_peer", lambda: None)
    with pytest.raises(LostRankError, match=r"rank 1 no longer answers while waiting for step 7.*for the device"):
        processes.wait_for_device(lambda: False, "waiting for step 7")
    processes.timeout = 600
    error = {"rank": 1, "host": "b", "error": "x.png: truncated", "exit_code": 2}
    monkeypatch.setattr(lost_ranks, "failed_peer", lambda: error)
    with pytest.raises(PeerFailedError, match=r"rank 1 on b ended while waiting for step 7: x\.png: truncated"):
        processes.wait_for_device(lambda: False, "waiting for step 7")
    answers = iter([False, True])
    processes.wait_for_device(lambda: next(answers), "waiting for step 8")


def break_rank_1() -> None:
    from ddpm_ema.train import loop

    step = loop.train_step

    def breaks(trainer, micro_batches):
        if trainer.processes.rank == 1 and trainer.step == 2:
            raise torch.OutOfMemoryError("no memory left")
        return step(trainer, micro_batches)

    loop.train_step = breaks


def test_an_error_of_one_rank_ends_the_others_with_its_code_and_its_message(tmp_path: Path) -> None:
    launch = start(settings(tmp_path / "run"), 2, before=break_rank_1)
    assert launch.wait() == [2, 2]  # and not 75, at which a scheduler would start the same error again
    assert "out of memory at step 3 on cpu" in launch.output(1)
    assert "ends, because rank 1 on" in launch.output(0)
    assert "lower training.micro_batch_size" in launch.output(0)


def go_where_images_differ(place: Path) -> None:
    folder = place / os.environ["RANK"]
    for number in range(20 + int(os.environ["RANK"])):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(folder / "images" / f"{number:02}.png")
    os.chdir(folder)


def test_ranks_that_read_different_images_are_refused_with_sizes_and_hosts(tmp_path: Path) -> None:
    data = {"source": "folder", "path": "images", "image_size": 8, "channels": 1}
    launch = start(settings(tmp_path / "run", data=data), 2, before=partial(go_where_images_differ, tmp_path))
    assert launch.wait() == [2, 2]
    assert "the ranks do not read the same images" in launch.output(0)
    assert "rank 0 on" in launch.output(0)
    assert "20 images" in launch.output(0)
    assert "21 images" in launch.output(0)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("at 12:\n    tl.store(out_ptr0 + x0, tmp1)\n    ^ invalid peer timeout", False),
        ("Error(s) in loading state_dict: cannot restore", False),
        ("CUDA error: the launch timed out and was terminated", False),
    ],
)
def test_only_what_networks_say_counts_as_a_lost_rank(text: str, lost: bool) -> None:
    assert is_communication(RuntimeError(text)) is lost

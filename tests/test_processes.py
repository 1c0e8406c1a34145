"""Processes that do not find each other end with one message, not with a traceback of torch's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from live_runs import free_port

ALONE = """
import sys
from ddpm_ema import cli
from ddpm_ema.processes import Processes
sys.exit(cli.guard(lambda: Processes.start("cpu", timeout=3)))
"""


@pytest.mark.parametrize("rank", [0, 1], ids=["which keeps the rendezvous", "which asks for it"])
def test_a_rank_whose_peer_never_comes_says_who_where_and_what_to_do(rank: int) -> None:
    port = str(free_port())
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = os.environ | place | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert f"rank {rank} of 2" in done.stderr
    assert f"did not all meet at 127.0.0.1:{port} within 3 s (training.timeout)" in done.stderr
    assert "start all of them again" in done.stderr

"""Processes of one torch.distributed group, each running a script of this folder: `python SCRIPT RANK PORT FOLDER …`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(script: str, world_size: int, folder: Path, *arguments: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    commands = [[sys.executable, str(HERE / script), str(rank), str(port), str(folder)] for rank in range(world_size)]
    running = [subprocess.Popen([*command, *arguments], env=environment) for command in commands]
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * world_size
    finally:
        for process in running:
            process.kill()

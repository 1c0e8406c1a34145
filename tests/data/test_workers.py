"""Data workers leave signals to the process that trains, and never outlive it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from image_sets import everything, load, start


def test_workers_leave_signals_to_the_process_that_trains(folder: Path) -> None:
    """SIGTERM and SIGINT to the whole group, as Slurm and a terminal send them, with workers running."""
    process = start(
        folder,
        """
import multiprocessing
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
signal.signal(signal.SIGINT, lambda *_: seen.append("INT"))
dataset = load("stream", num_workers=2)
batches = dataset.stream(torch.tensor([i % 12]) for i in range(300))
total = [next(batches)]
workers = multiprocessing.active_children()
assert len(workers) == 2, workers
print("ready", flush=True)
while len(seen) < 2:
    time.sleep(0.01)
total += list(batches)
print(sorted(seen), len(total), torch.cat(total).sum().item(), flush=True)
del batches
for worker in workers:
    worker.join(20)
print([worker.exitcode for worker in workers])
os.kill(os.getpid(), signal.SIGTERM)
print(len(seen))
""",
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    expected = int(everything(load(folder)).sum()) * 25
    assert out.splitlines() == [f"['INT', 'TERM'] 300 {expected}", "[0, 0]", "3"], err
    assert err == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_an_error_that_is_kept_does_not_keep_the_program_from_ending(folder: Path) -> None:
    """At exit multiprocessing sends its workers SIGTERM, which these ignore, and waits for them."""
    process = start(
        folder,
        """
dataset = load("stream", num_workers=2)
batches = dataset.stream(torch.tensor([i % 12]) for i in range(300))
next(batches)
def consume():
    batch = next(batches)
    raise UserError("something else went wrong")
try:
    consume()
except UserError as error:
    kept = error, batches
""",
    )
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_workers_end_when_the_process_that_trains_is_killed(folder: Path) -> None:
    process = start(
        folder,
        """
import multiprocessing, itertools
batches = load("stream", num_workers=2).stream(torch.tensor([0]) for _ in itertools.count())
next(batches)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
time.sleep(60)
""",
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)  # returns once the workers, too, have closed the pipe
    for pid in workers:
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False

"""Work that one process does while the others wait for it, however long it takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError

T = TypeVar("T")
HEARTBEAT_SECONDS = 15.0


def on_main(processes: Processes, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; its (small, picklable) result on every rank. A collective.

    The others hear every few seconds that it is still going on: metrics of 50,000 images may take longer than the timeout
    that says a process is gone. A UserError is raised on every rank.
    """
    if processes.world_size == 1:
        return work()
    if not processes.is_main:
        return _settle(_wait(processes))
    with ThreadPoolExecutor(1, thread_name_prefix="metrics") as thread:
        future = thread.submit(work)
        while not _finished(future):
            processes.broadcast(None)
    outcome: tuple[T | None, UserError | None] = _outcome(future)
    return _settle(processes.broadcast(outcome))


def only_on_main(processes: Processes, work: Callable[[], T]) -> T | None:
    """As `on_main`, but the result stays on rank 0: it is large, or a thing that does not travel. None elsewhere."""
    results: list[T] = []
    on_main(processes, lambda: results.append(work()))
    return results[0] if results else None


def _finished(future: Future[T]) -> bool:
    try:
        future.exception(timeout=HEARTBEAT_SECONDS)
    except NotYet:
        return False
    return True


def _outcome(future: Future[Any]) -> tuple[Any, UserError | None]:
    error = future.exception()
    if error is None:
        return future.result(), None
    if isinstance(error, UserError):
        return None, error
    raise error


def _wait(processes: Processes) -> tuple[T | None, UserError | None]:
    while (outcome := processes.broadcast(None)) is None:
        pass
    return outcome


def _settle(outcome: tuple[T | None, UserError | None]) -> T:
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[return-value]

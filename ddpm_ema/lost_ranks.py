"""Which rank of a launch is gone, and why, as one message. Ranks ask each other through the rendezvous store."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
ANSWER_SECONDS = 5.0
FAILED, PRESENT = "ddpm_ema/failed", "ddpm_ema/present"  # keys in the store
_COMMUNICATION = re.compile(r"\b(gloo|nccl)\b|connection (closed|reset|refused)|socket timeout|timed out waiting", re.I)


def is_communication(error: Exception) -> bool:
    """Whether ranks lost each other. An error that quotes source code, as compilers' do, may hold any word."""
    if isinstance(error, dist.DistError):
        return True
    compiling = any(base.__name__ == "TorchDynamoException" for base in type(error).__mro__)  # its import takes seconds
    return not compiling and _COMMUNICATION.search(first_line(error)) is not None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def leave_word(rank: int, error: str, exit_code: int) -> None:
    """Stores the error that ends this rank, for `failed_peer` on the others."""
    word = {"rank": rank, "host": socket.gethostname(), "exit_code": exit_code, "error": error}
    with contextlib.suppress(Exception):
        dist.distributed_c10d._get_default_store().set(FAILED, json.dumps(word))


def failed_peer() -> dict[str, Any] | None:
    """What a rank left with `leave_word`; None if there is nothing, or no answer."""
    return _ask(lambda store: json.loads(store.get(FAILED)) if store.check([FAILED]) else None, ANSWER_SECONDS)


def roll_call(rank: int, world_size: int) -> str:
    """Says which ranks no longer answer."""

    def missing(store: Any) -> list[int]:
        store.set(f"{PRESENT}/{rank}", "1")
        deadline = time.monotonic() + ANSWER_SECONDS
        while gone := [r for r in range(world_size) if not store.check([f"{PRESENT}/{r}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return gone

    gone = _ask(missing, 2 * ANSWER_SECONDS)
    if gone is None:
        return "rank 0, which keeps the rendezvous, does not answer"
    if not gone:
        return "the connection between ranks broke, though all still answer"
    ranks, answer = ("ranks", "answer") if len(gone) > 1 else ("rank", "answers")
    return f"{ranks} {', '.join(map(str, gone))} no longer {answer}"


def never_met(launched: int, timeout: float, error: Exception) -> str:
    """Says which rendezvous of how many processes failed."""
    rank, address, port = (os.environ.get(name, "?") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return (
        f"rank {rank} of {launched} on {socket.gethostname()}: the processes did not all meet at {address}:{port} within "
        f"{timeout:.0f} s (machine.timeout), or one ended meanwhile: look at the output of the other ranks, check that every one of "
        f"them was started and can reach that address, and start all of them again ({first_line(error)})"
    )


def _ask(question: Callable[[Any], T], seconds: float) -> T | None:
    """The store's answer; None if its host is gone. A dead link answers nothing, not even an error, hence the thread."""
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(question(dist.distributed_c10d._get_default_store()))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None

"""torchrun as a scheduler needs it: `python -m ddpm_ema.launch [torchrun's options] scripts/train.py --config ...`.

torchrun itself answers SIGTERM by killing its ranks 30 seconds later, which may be in the middle of a save, and ends with
exit code 1 whatever theirs were, so that a scheduler cannot tell "start me again" from "the settings are wrong". Here a stop
is passed to the ranks and waited for, as long as the scheduler lets it, and the exit code is theirs: 0 done, 2 bad input, 3
diverged, 75 saved and to be started again, 128 + n killed by signal n, anything else a crash. Options, rendezvous and
environment are torchrun's own. Restarts are the scheduler's: leave --max-restarts at 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED

LINGER_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRelay:
    """Passes a stop on to the ranks, whatever the main thread is doing, and remembers that there was one.

    A signal wakes a thread through a pipe (signal.set_wakeup_fd), because the main thread may sit in a rendezvous for
    minutes without running a line of Python. Before there are ranks, a stop ends the launcher at once.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while caught := os.read(self._read, 1):
            if caught[0] in STOP_SIGNALS:
                self.stopped = True
                ranks = children(os.getpid())
                for pid in ranks:
                    _ask_to_stop(pid)
                if not ranks:
                    os._exit(EXIT_STOPPED)


def _ask_to_stop(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, signal.SIGTERM)


def children(parent: int) -> list[int]:
    """Ids of the processes that `parent` started and that run, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone since the listing
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def exit_code(codes: Iterable[int], stopped: bool) -> int:
    """One exit code for the scheduler out of those of the ranks that failed here (negative: the signal that killed it).

    What will not go away by starting again comes first, then a crash, which is the cause where its peers only report a lost
    rank, then 75. A rank that was killed by the stop itself, before it could catch signals, lost nothing: 75 as well.
    """
    codes = list(codes)
    own = [code for code in codes if code > 0]
    for final in (EXIT_BAD_INPUT, EXIT_DIVERGED):
        if final in own:
            return final
    crashes = [code for code in own if code != EXIT_STOPPED]
    killed = [128 - code for code in codes if code < 0]
    if crashes:
        return crashes[0]
    if own or stopped:
        return EXIT_STOPPED
    return killed[0] if killed else EXIT_DONE


def _stay_on_this_host(options: argparse.Namespace) -> None:
    """One node: no name of its own is needed (a container's may not resolve), and never torchrun's c10d store.

    torchrun takes that store for `--standalone`, and where no master port is named. It listens on every interface, and the
    launcher unpickles what it finds there, so that whoever reaches the port would run code as the user who trains. The
    static rendezvous on a free port reads no pickle.
    """
    if options.local_addr is None:
        options.local_addr = "127.0.0.1"
    if options.standalone or (options.rdzv_backend == "static" and not options.rdzv_endpoint):
        options.standalone = False
        options.master_addr = "127.0.0.1"
        options.master_port = options.master_port or _free_port()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun's launcher in this process and returns the exit code of its ranks."""
    relay = StopRelay()  # before torch, whose import takes long enough for a stop to fall into it
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    # torchrun insists on handling some signal; the ones that mean "stop" are the relay's.
    options.signals_to_handle = "SIGUSR2"
    if options.nnodes in ("1", "1:1"):
        _stay_on_this_host(options)
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
            print(f"launch: rank {rank} ended with {how}", file=sys.stderr)
        code = exit_code((failure.exitcode for failure in error.failures.values()), relay.stopped)
        if code not in (EXIT_DONE, EXIT_STOPPED):
            # `error` keeps the rendezvous store of node 0 alive: ranks on other nodes read there why this one ended.
            time.sleep(LINGER_SECONDS if options.nnodes not in ("1", "1:1") else 0)
        return code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

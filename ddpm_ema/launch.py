"""torchrun for schedulers: `python -m ddpm_ema.launch [torchrun's options] scripts/train.py --config ...`.

torchrun kills its ranks 30 seconds after SIGTERM, perhaps in the middle of a save, and always ends with exit code 1, so that a
scheduler cannot distinguish "start again" from "bad settings". This launcher passes a stop to the ranks, waits for them, and ends
with their exit code: 0 done, 2 bad input, 3 diverged, 75 saved and to be started again, 128 + n killed by signal n, anything else a
crash. Options, rendezvous and environment are torchrun's. The scheduler restarts: leave --max-restarts at 0.
"""

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
from ddpm_ema.messages import write_line

LINGER_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRelay:
    """Passes a stop on to the ranks and remembers it. Before there are ranks, a stop ends the launcher.

    A signal wakes a thread through a pipe (signal.set_wakeup_fd), because the main thread may wait in a rendezvous for minutes
    without running Python code.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while caught := os.read(self._read, 1):
            if caught[0] in STOP_SIGNALS:
                self.stopped = True
                ranks = children(os.getpid())
                for pid in ranks:
                    with contextlib.suppress(ProcessLookupError):  # it ended by itself
                        os.kill(pid, signal.SIGTERM)
                if not ranks:
                    os._exit(EXIT_STOPPED)


def children(parent: int) -> list[int]:
    """Ids of the running processes that `parent` started, from /proc."""
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
    """One exit code for the scheduler, of the ranks that failed here; a negative code is the signal that killed a rank.

    2 or 3 if a rank has it, because starting again does not help; else the code of a crash, which is the cause when peers report a
    lost rank; else 75, also for a rank that the stop killed before it could catch signals.
    """
    codes = list(codes)
    own = [code for code in codes if code > 0]
    causes = [code for code in (EXIT_BAD_INPUT, EXIT_DIVERGED) if code in own]
    causes += [code for code in own if code != EXIT_STOPPED]
    causes += [EXIT_STOPPED] if own or stopped else []
    causes += [128 - code for code in codes if code < 0]
    return causes[0] if causes else EXIT_DONE


def _stay_on_this_host(options: argparse.Namespace) -> None:
    """One node: needs no host name (a container's may not resolve), and must not use torchrun's c10d store.

    torchrun uses that store for `--standalone` and without a master port. It listens on every interface, and the launcher unpickles
    what it holds, so that anyone who reaches the port runs code as this user. The static rendezvous on a free port reads no pickle.
    """
    if options.local_addr is None:
        options.local_addr = "127.0.0.1"
    if options.standalone or (options.rdzv_backend == "static" and not options.rdzv_endpoint):
        options.standalone = False
        options.master_addr = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options.master_port = options.master_port or probe.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun's launcher in this process and returns the exit code of its ranks."""
    relay = StopRelay()  # before torch is imported, which takes seconds
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from ddpm_ema.lost_ranks import first_line

    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    # torchrun must handle some signal; those that mean "stop" are the relay's.
    options.signals_to_handle = "SIGUSR2"
    if options.nnodes in ("1", "1:1"):
        _stay_on_this_host(options)
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
            write_line(f"launch: rank {rank} ended with {how}")
        code = exit_code((failure.exitcode for failure in error.failures.values()), relay.stopped)
        if code not in (EXIT_DONE, EXIT_STOPPED):
            # `error` keeps the rendezvous store of node 0 alive, in which ranks on other nodes read why this one ended.
            time.sleep(LINGER_SECONDS if options.nnodes not in ("1", "1:1") else 0)
        return code
    except (DistError, RendezvousError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        write_line(f"launch: the launchers of the nodes did not meet ({why}); start all of them again")
        return EXIT_STOPPED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

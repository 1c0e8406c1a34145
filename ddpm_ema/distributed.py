"""The processes of one run: ranks and device through accelerate, a control plane between ranks, and when to stop.

Gradients travel over DDP's own group (NCCL on CUDA). Everything else, agreement to stop, small objects, tensors to save or load,
travels between CPUs over a gloo group of its own, so that it neither waits for a device nor dies with NCCL's watchdog.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_ema import lost_ranks
from ddpm_ema.errors import EXIT_STOPPED, LostRankError, PeerFailedError, StoppedError, UserError
from ddpm_ema.messages import logger

T = TypeVar("T")
HEARTBEAT_SECONDS = 15.0
SLICE_SECONDS = 0.001


class Processes:
    """This process among its peers. Works alone, without torch.distributed, when there is one.

    Attributes: `rank`, `world_size`, `device`, `is_main`, and accelerate's `accelerator` (DDP and trackers).
    """

    def __init__(self, accelerator: Any, timeout: float) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.is_main = self.rank == 0
        self.timeout = timeout
        self.control: dist.ProcessGroup | None = None
        if self.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)  # every rank is a member
            self.control = group

    @classmethod
    def start(
        cls,
        device: str = "auto",
        *,
        timeout: float = 600.0,
        expected: int | None = None,
        trackers: Sequence[str] = (),
        project_dir: Path | None = None,
    ) -> Processes:
        """Joins the launch that this process is part of; accelerate's `trackers` write into `project_dir`.

        Raises:
            UserError: there is no such device, or another number of processes than `expected`.
            LostRankError: the processes do not find each other within `timeout` seconds.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("machine.device: cuda was asked for, and there is no CUDA device here; use auto or cpu")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if expected is not None and launched != expected:
            raise UserError(
                f"machine.world_size: {expected} processes were asked for, the launch gives {launched}. Two CPU processes "
                "are `python -m ddpm_ema.launch --nproc-per-node 2 scripts/train.py ...`; "
                "`accelerate launch --cpu --num_processes 2` gives one"
            )
        try:
            processes = cls(_accelerator(device, timeout, trackers, project_dir), timeout)
            if processes.world_size > 1 and processes.device.type == "cpu":
                atexit.register(_leave_group)
            return processes
        except (RuntimeError, dist.DistError) as error:
            if launched == 1 or not lost_ranks.is_communication(error):
                raise
            raise LostRankError(lost_ranks.never_met(launched, timeout, error)) from None

    def gather(self, value: T) -> list[T]:
        """A small picklable value from every rank, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.naming_lost_ranks("gathering"):
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's small picklable value on every rank."""
        if self.control is None:
            return value
        box = [value]
        with self.naming_lost_ranks("broadcasting"):
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's CPU tensors by name on every rank, one at a time: only rank 0 needs to see the files they came from."""
        if self.control is None:
            return tensors or {}
        own, received = tensors or {}, {}
        for name, (shape, dtype) in self.broadcast({name: (t.shape, t.dtype) for name, t in own.items()}).items():
            tensor = own[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            with self.naming_lost_ranks(f"broadcasting {name}"):
                dist.broadcast(_as_bytes(tensor), src=0, group=self.control)
            received[name] = tensor
        return received

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds a CPU tensor up over ranks, in place; the same bits on every rank."""
        if self.control is not None:
            with self.naming_lost_ranks("summing"):
                dist.all_reduce(tensor, group=self.control)
        return tensor

    def main_first(self, work: Callable[[], T], what: str) -> T:
        """Runs `work` on rank 0, then on the others, so that they find what it left (a cache). A collective.

        It may take hours: ranks that work keep answering; those that wait log which rank they wait for, and `what` it does. A
        UserError on any rank is raised on all of them.
        """
        if self.control is None:
            return work()
        futures = [self._answering(work if self.is_main == turn else None, what) for turn in (True, False)]
        [result] = [future.result() for future in futures if future is not None]
        return result

    def on_main(self, work: Callable[[], T], what: str = "computing scores") -> T:
        """Runs `work` on rank 0; its small picklable result on every rank. A collective.

        It may take longer than the timeout, as in `main_first`. A UserError is raised on every rank.
        """
        if self.control is None:
            return work()
        future = self._answering(work if self.is_main else None, what)
        return self.broadcast(future.result() if future is not None else None)  # type: ignore[return-value]

    def _answering(self, work: Callable[[], T] | None, what: str) -> Future[T] | None:
        """Runs `work` in a thread, on the ranks that have some, until it is done on all. A collective."""
        with ThreadPoolExecutor(1, thread_name_prefix=what) as thread:
            future = thread.submit(work) if work is not None else None
            told = False
            while busy := [rank for rank, done in enumerate(self.gather(self._is_done(future))) if not done]:
                if not told and self.is_main:
                    logger.info(f"waiting for rank {', '.join(map(str, busy))}: {what}")
                    told = True
        with self.sharing_errors():
            if future is not None:
                future.result()
        return future

    def _is_done(self, future: Future[Any] | None) -> bool:
        return future is None or bool(wait([future], timeout=min(HEARTBEAT_SECONDS, self.timeout / 3)).done)

    @contextlib.contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Raises on every rank the first UserError that any rank raises inside; a collective at its end."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        if errors := [e for e in self.gather(error) if e is not None]:
            errors[0].everywhere = error is None or len(errors) > 1  # else it is this rank's own to tell
            raise errors[0]

    @contextlib.contextmanager
    def naming_lost_ranks(self, what: str) -> Iterator[None]:
        """Turns a failed collective into one message that names the rank that is gone."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.control is None or not lost_ranks.is_communication(error):
                raise
            if (failed := lost_ranks.failed_peer()) is not None:
                raise PeerFailedError(
                    f"rank {self.rank} on {socket.gethostname()} ends, because rank {failed['rank']} on {failed['host']} ended "
                    f"while {what}: {failed['error']}",
                    failed["exit_code"],
                ) from None
            lost = lost_ranks.roll_call(self.rank, self.world_size)
            raise LostRankError(
                f"rank {self.rank} on {socket.gethostname()}: {lost} while {what}. This process ends; start all of them again "
                f"and the run goes on from its last checkpoint ({lost_ranks.first_line(error)})"
            ) from None

    def wait_for_device(self, is_done: Callable[[], bool], what: str) -> None:
        """Waits in slices for what the device was given, so that signals are heard and an error of a peer is raised here, too.

        Raises LostRankError after `timeout` seconds, before NCCL's watchdog ends this process without a message.
        """
        start = asked = time.monotonic()
        with self.naming_lost_ranks(what):
            while not is_done():
                time.sleep(SLICE_SECONDS)
                if self.control is not None and (now := time.monotonic()) > asked + HEARTBEAT_SECONDS:
                    asked = now
                    if now > start + self.timeout or lost_ranks.failed_peer() is not None:
                        raise dist.DistError(f"waited {now - start:.0f} s for the device")

    @contextlib.contextmanager
    def telling_peers(self) -> Iterator[None]:
        """Stores an error that ends this rank, so that its peers end with its exit code, not as if it was lost."""
        try:
            yield
        except Exception as error:
            if self.control is not None and not isinstance(error, StoppedError | PeerFailedError):
                code, text = 1, f"{type(error).__name__}: {lost_ranks.first_line(error)}"
                if isinstance(error, UserError):
                    code, text = error.exit_code, str(error)
                lost_ranks.leave_word(self.rank, text, code)
            raise

    def close(self) -> None:
        """The group ends with the interpreter, so that another stage may follow. Call it on every rank."""
        atexit.register(_leave_group)


def _leave_group() -> None:
    """Gloo's threads must have ended when the interpreter goes: else it may abort, in place of the exit code of an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


class StopFlag:
    """Whether this run should save and end: on SIGTERM, SIGINT, SIGHUP, or when its launcher is gone. A context manager.

    A signal only sets a flag, so it cannot interrupt a save, and a second one changes nothing. While there is `nothing_to_save`
    it ends the process at once, because images may be read for hours.
    """

    def __init__(self, nothing_to_save: bool = False) -> None:
        self.nothing_to_save = nothing_to_save
        self.reason: str | None = None
        # A run ends with the launcher that started it. It does not end with a shell.
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self._parent = os.getppid() if launched else None
        self._pending: tuple[Any, Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            now = "nothing to save: ending" if self.nothing_to_save else "saving, then ending; it is enough to ask once"
            try:
                os.write(2, f"\n{self.reason}: {now}\n".encode())
            except OSError:  # the terminal, or the reader of a pipe, is gone: no later line may fail, either
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if self.nothing_to_save:
            os._exit(EXIT_STOPPED)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if self.reason is None and self._parent is not None and os.getppid() != self._parent:
            self.reason = "the launcher is gone"
        return self.reason is not None

    def agreed(self, processes: Processes) -> bool:
        """Whether any rank was asked to stop, the same answer on every rank. A collective, called once per step.

        The answer is that of the call before: it travels while the step computes, and no step waits for it.
        """
        if processes.control is None:
            return self.requested
        answer = self.drain(processes)
        flag = torch.tensor([int(self.requested)])
        with processes.naming_lost_ranks("agreeing to go on"):
            self._pending = (dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=processes.control, async_op=True), flag)
        return answer

    def drain(self, processes: Processes) -> bool:
        """Waits for the answer that is on its way, if there is one."""
        if self._pending is None:
            return False
        work, flag = self._pending
        self._pending = None
        with processes.naming_lost_ranks("agreeing to go on"):
            work.wait()
        if flag.item() and self.reason is None:
            self.reason = "another rank was asked to stop"
        return bool(flag.item())


# Two remarks of DistributedDataParallel: accelerate knows only the older name of an option, and a 1x1 kernel has two layouts.
REMARKS = (r"`broadcast_buffers` is deprecated", r"Grad strides do not match bucket view strides")


def _accelerator(device: str, timeout: float, trackers: Sequence[str], project_dir: Path | None) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    cpu = device == "cpu" or not torch.cuda.is_available()
    for quiet in REMARKS:
        warnings.filterwarnings("ignore", message=quiet)
    handlers = [
        # NCCL's watchdog kills the process without a message, so there the control plane gets to speak first.
        InitProcessGroupKwargs(timeout=timedelta(seconds=timeout if cpu else timeout + 60)),
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",  # the trainer casts by itself: averages must know which fp16 steps were skipped
        log_with=list(trackers) or None,
        project_dir=str(project_dir) if project_dir else None,
        kwargs_handlers=handlers,
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    """A view as uint8: gloo knows few dtypes, and a broadcast moves bytes."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)

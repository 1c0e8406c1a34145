"""The metrics of a run: means over the steps since the last row, rows of metrics.jsonl, trackers, and progress for a person."""

import contextlib
import resource
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.distributed import Processes
from ddpm_ema.messages import bar, clock, logger, on_terminal
from ddpm_ema.rundir import RunDir

QUARTERS = 4
# One float64 vector: loss summed by timestep quarter, images by quarter, gradient norm, steps.
_LOSS, _COUNT, _NORM, _STEPS = slice(0, QUARTERS), slice(QUARTERS, 2 * QUARTERS), 2 * QUARTERS, 2 * QUARTERS + 1


class RunningMeans:
    """Sums since the last logged row, on the device, so that no step waits for them.

    Checkpoints carry them (one vector per rank), so that the first row after a resume is that of an undisturbed run.
    """

    def __init__(self, device: torch.device, num_train_timesteps: int) -> None:
        self.sums = torch.zeros(2 * QUARTERS + 2, dtype=torch.float64, device=device)
        self.num_train_timesteps = num_train_timesteps

    def add_losses(self, losses: Tensor, timesteps: Tensor) -> None:
        """losses: fp32 [n], one per image; timesteps: int64 [n]."""
        quarter = timesteps * QUARTERS // self.num_train_timesteps
        self.sums[_LOSS].index_add_(0, quarter, losses.detach().double())
        self.sums[_COUNT].index_add_(0, quarter, torch.ones_like(losses, dtype=torch.float64))

    def add_step(self, grad_norm: Tensor) -> None:
        self.sums[_NORM] += grad_norm.detach().double()
        self.sums[_STEPS] += 1

    def means(self, processes: Processes) -> dict[str, float | None]:
        """Means over the steps since the last row and over all processes. A collective."""
        sums = processes.sum_(self.sums.to("cpu", copy=True))
        row: dict[str, float | None] = {"loss": (sums[_LOSS].sum() / sums[_COUNT].sum()).item()}
        for quarter in range(QUARTERS):
            count = sums[_COUNT][quarter].item()
            row[f"loss_q{quarter}"] = sums[_LOSS][quarter].item() / count if count else None
        row["grad_norm"] = (sums[_NORM] / sums[_STEPS]).item()
        return row

    def load(self, state: list[list[float]], processes: Processes) -> None:
        """Takes back this rank's vector; on another number of processes rank 0 takes the sum."""
        rows = torch.tensor(state, dtype=torch.float64)
        if len(rows) == processes.world_size:
            self.sums.copy_(rows[processes.rank])
        elif processes.is_main:
            self.sums.copy_(rows.sum(0))
            # Every rank counts each step and its norm, so together they must count it `world_size` times.
            self.sums[_NORM:] *= processes.world_size / len(rows)


class MetricsLog:
    """Rows for metrics.jsonl, for trackers while they work, and for a person: a bar, or a line per row. Only rank 0 writes."""

    def __init__(self, rundir: RunDir, processes: Processes, total: int, batch_size: int) -> None:
        self.rundir, self.processes, self.total, self.batch_size = rundir, processes, total, batch_size
        self.seconds: dict[str, float] = {"data_wait": 0.0, "save_seconds": 0.0}
        self.bar: Any = None
        self._tracking = True
        self._since, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time spent inside to one entry of the next row."""
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Sampling and scoring inside do not count against images/s."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def start_trackers(self, names: tuple[str, ...], settings: Mapping[str, Any]) -> None:
        if names:
            flat = {f"{s}/{k}": str(v) for s, e in settings.items() if isinstance(e, dict) for k, v in e.items()}
            self._track(lambda: self.processes.accelerator.init_trackers("ddpm_ema", config=flat))

    def start(self, step: int) -> None:
        """Starts the clock when the first step begins, so that set-up does not count."""
        hidden = not self.processes.is_main or not on_terminal()
        self.bar = bar("training", self.total, "steps", hidden, initial=step)
        self._since, self._steps = time.perf_counter(), 0
        self._began, self._first = self._since, step

    def tick(self) -> None:
        self._steps += 1
        self.bar.update(1)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one row, with speed, seconds and memory added."""
        elapsed = time.perf_counter() - self._since
        whole = {
            "step": step,
            **row,
            "images_per_second": self._steps * self.batch_size / elapsed if elapsed > 0 else None,
            "seconds": elapsed,
            **self.seconds,
            "peak_memory": peak_memory(self.processes.device),
        }
        self._since, self._steps = time.perf_counter(), 0
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        if self.processes.is_main:
            self.rundir.append_metrics(whole)
            numbers = {k: v for k, v in whole.items() if type(v) in (int, float)}
            self._track(lambda: self.processes.accelerator.log(numbers, step=step))
            self._show(step, row["loss"], whole["images_per_second"] or 0.0)

    def _show(self, step: int, loss: float, speed: float) -> None:
        figures = f"loss {loss:.4f}, {speed:.1f} images/s"
        if on_terminal():
            self.bar.set_postfix_str(figures, refresh=False)
            return
        left = (time.perf_counter() - self._began) / max(1, step - self._first) * (self.total - step)
        logger.info(f"step {step:,} of {self.total:,}: {figures}, {clock(left)} left")

    def write_scores(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes a row of quick scores."""
        if self.processes.is_main:
            self.rundir.append_metrics({"step": step, "scores": rows})
            numbers = {f"{row['metric']}/{row['weights']}": row["frechet_distance"] for row in rows}
            self._track(lambda: self.processes.accelerator.log(numbers, step=step))

    def close(self) -> None:
        self.bar.close()
        for tracker in self.processes.accelerator.trackers:
            self._track(tracker.finish)

    def _track(self, call: Any) -> None:
        """Calls a tracker; one that fails, for a disk or server that is gone, is switched off and training goes on."""
        if not self._tracking:
            return
        try:
            call()
        except Exception as error:
            self._tracking = False
            logger.warning(
                f"a tracker failed and is off from here on ({type(error).__name__}: {error}); metrics.jsonl goes on"
            )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on CUDA, the largest resident size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Run something once after every real optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class UpdateHandle:
    """A running count of an optimizer's real steps, and the way to stop counting.

    Attributes:
        step: optimizer steps completed so far, skipped ones not counted.
    """

    def __init__(self, update: Callable[[int, int], None], start_step: int, every: int) -> None:
        self.step = start_step
        self._update, self._every = update, every
        self._hook: Any = None

    def remove(self) -> None:
        """Stop updating."""
        self._hook.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        # A fused optimizer under a GradScaler is *called* on an overflowing step and skips it on the device. The scaler
        # leaves `found_inf` on it for the length of the call; reading it waits for the device, in that setting alone.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.step += 1
        if self.step % self._every == 0:
            self._update(self.step, self._every)


def update_after_steps(
    optimizer: torch.optim.Optimizer, update: Callable[[int, int], None], *, start_step: int = 0, every: int = 1
) -> UpdateHandle:
    """Call `update(step, every)` after every `every`-th real step of the optimizer.

    Args:
        optimizer: any torch optimizer, or a wrapper that keeps the real one as `.optimizer`.
        update: takes the steps completed so far and the number of steps since the last call.
        start_step: steps completed before now (when a run goes on); a multiple of `every`.
        every: steps between updates.

    Raises:
        ValueError: `every` or `start_step` is out of range.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1 step, got {every!r}")
    if start_step < 0 or start_step % every:
        raise ValueError(f"start_step: expected a multiple of every={every} of at least 0, got {start_step!r}")
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer  # the wrapper is called on micro-batches and skipped steps too, the real one is not
    handle = UpdateHandle(update, start_step, every)
    handle._hook = inner.register_step_post_hook(handle._after_step)
    return handle

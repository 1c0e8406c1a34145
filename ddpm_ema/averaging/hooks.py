"""Call a function after every optimizer step that was not skipped."""

from collections.abc import Callable
from typing import Any

import torch


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in wrappers that hold it as `.optimizer`: they are called on micro-batches and skipped steps, too."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


class UpdateHandle:
    """Calls `update(step, every)` after every `every`-th step of an optimizer; steps that were skipped do not count.

    Attributes:
        step: optimizer steps completed so far.
        active: whether it is still called.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, update: Callable[[int, int], None], start_step: int, every: int
    ) -> None:
        self.step, self.active = start_step, True
        self._update, self._every = update, every
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Stop updating."""
        self._hook.remove()
        self.active = False

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        # A fused optimizer under a GradScaler is *called* on an overflowing step and skips it on the device. The scaler
        # leaves `found_inf` on it for the length of the call; reading it waits for the device, in that setting alone.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.step += 1
        if self.step % self._every == 0:
            self._update(self.step, self._every)

"""Averages in host memory of a model on an accelerator; the transfer overlaps the next step."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class HostMirror:
    """Values of tensors in (pinned) host memory, and one background thread that works on them.

    `submit` clones the sources on their device in stream order (the optimizer may change them right afterwards), copies the
    clones to pinned memory on another stream, and leaves the rest to the thread. The caller waits only for an earlier submission
    that still runs, so a slow host slows training down instead of falling behind.

    Memory: one clone of the sources on their device and one in pinned memory, for any number of averages.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._shadow = [torch.empty_like(source, requires_grad=False) for source in sources]
        self.values: list[Tensor] = [
            torch.empty_like(source, device="cpu", pin_memory=source.is_cuda, requires_grad=False) for source in sources
        ]
        devices = {source.device for source in sources if source.is_cuda}
        self._streams: dict[torch.device, Any] = {device: torch.cuda.Stream(device) for device in devices}  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="averages")
        self._pending: Future[None] | None = None
        self.submit(sources, lambda: None)
        self.wait()

    def submit(self, sources: Sequence[Tensor], work: Callable[[], None]) -> None:
        """Update `values` from `sources` and then run `work`, both in the background. Raises what an earlier `work` raised."""
        self.wait()
        with torch.no_grad():
            if sources:
                torch._foreach_copy_(self._shadow, list(sources))
            events = []
            for device, stream in self._streams.items():
                # The copy must not overtake the clone. Only a race on a CUDA device shows it: no test on a CPU can.
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    for value, shadow in zip(self.values, self._shadow, strict=True):
                        if shadow.device == device:
                            value.copy_(shadow, non_blocking=True)
                    events.append(stream.record_event())
        self._pending = self._thread.submit(self._finish, events, work)

    def _finish(self, events: Sequence[Any], work: Callable[[], None]) -> None:
        for event in events:
            event.synchronize()
        for value, shadow in zip(self.values, self._shadow, strict=True):
            if not shadow.is_cuda:
                value.copy_(shadow)
        work()

    def wait(self) -> None:
        """Wait for the last submission. Raises what its `work` raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

"""A thread that writes while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ddpm_ema.messages import logger


class BackgroundWriter:
    """Runs writes one after another in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[Future[None]] = []

    def submit(self, write: Callable[..., None], *arguments: object) -> None:
        """Queues one write; call `wait` first, so that at most one host copy of the state is held."""
        self._pending.append(self._thread.submit(write, *arguments))

    @property
    def failed(self) -> bool:
        """Whether a write has failed; `wait` raises its error."""
        return any(f.done() and f.exception() is not None for f in self._pending)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises the first error of a write."""
        pending, self._pending = self._pending, []
        errors = [error for future in pending if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Waits until everything is on disk, and says which writes failed where the run ends for another reason."""
        self._thread.shutdown(wait=True)
        for error in filter(None, (future.exception() for future in self._pending)):
            logger.warning(f"a write failed meanwhile: {error}")
        self._pending = []

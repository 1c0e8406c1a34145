"""One run per folder, on one host or several."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_ema.averaging.files import no_follow
from ddpm_ema.errors import UserError

HEARTBEAT_SECONDS = 5.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A POSIX record lock, which the kernel releases when the process dies, and a heartbeat for other hosts. A context manager.

    `fcntl.lockf` and not `flock`: a child that a library forked would inherit a `flock` and hold it.
    Where hosts do not share locks, or the file system has none (Lustre without flock, NFS without lockd), a modification time
    that changes shows that the owner is alive; no clocks are compared.
    """

    def __init__(self, path: Path, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.path, self.heartbeat = path, heartbeat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock heartbeat")

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open(self.path, "a+", encoding="utf-8", opener=no_follow))
            known = self._lock_by_kernel()
            owner, mine = self._owner(), {"host": socket.gethostname(), "pid": os.getpid()}
            if owner and not (known and owner.get("host") == mine["host"]):
                self._refuse_if_alive(owner)
            self._file.truncate(0)
            json.dump(mine, self._file)
            self._file.flush()
            self._thread.start()
            stack.callback(self._stop.set)
            if not known:  # of two that start at once, the one that wrote last has it
                time.sleep(self.heartbeat)
                if (owner := self._owner()) != mine:
                    raise self._refusal(owner)
            stack.pop_all()

    def _lock_by_kernel(self) -> bool:
        """False where the file system has no record locks. On one host they are exact: whoever wrote the file is gone."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(self._owner()) from None
            if error.errno not in NO_LOCKS:
                raise
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._file.truncate(0)  # released: the next one need not wait for a heartbeat
        self._file.close()

    def _owner(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            return json.loads(self._file.read())
        except ValueError:
            return {}

    def _refuse_if_alive(self, owner: Mapping[str, Any]) -> None:
        before = os.stat(self.path).st_mtime_ns
        deadline = time.monotonic() + 3 * self.heartbeat
        while time.monotonic() < deadline:
            time.sleep(self.heartbeat / 5)
            if os.stat(self.path).st_mtime_ns != before:
                raise self._refusal(owner)

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        who = f"process {owner.get('pid', '?')} on host {owner.get('host', '?')}"
        return UserError(
            f"{self.path.parent}: another run is working in this folder ({who}); stop it or choose another output_dir"
        )

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.path)

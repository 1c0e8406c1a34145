"""One run per folder, on one host or several."""

from __future__ import annotations

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

from ddpm_ema.errors import UserError

HEARTBEAT_SECONDS = 5.0


class Lock:
    """A POSIX record lock, which the kernel releases when the process dies, and a heartbeat for other hosts. A context manager.

    `fcntl.lockf` and not `flock`: a child that a library forked would inherit a `flock` and hold it.
    On file systems that do not share locks between hosts, a modification time that changes shows that the owner is alive; no
    clocks are compared.
    """

    def __init__(self, path: Path, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.path, self.heartbeat = path, heartbeat
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = self._owner()
            self._file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(owner) from None
            raise
        self._wait_for_other_host()
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self._file)
        self._file.flush()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock heartbeat")
        self._thread.start()

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

    def _wait_for_other_host(self) -> None:
        owner = self._owner()
        if not owner or owner.get("host") == socket.gethostname():
            return  # on one host the lock itself is exact: whoever wrote this is gone
        before = os.stat(self.path).st_mtime_ns
        deadline = time.monotonic() + 3 * self.heartbeat
        while time.monotonic() < deadline:
            time.sleep(self.heartbeat / 5)
            if os.stat(self.path).st_mtime_ns != before:
                self._file.close()
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

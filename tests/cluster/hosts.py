"""Two hosts on one machine: network namespaces joined by a veth pair, each with a host name and mounts of its own.

What a process on one host sees of the other is what the cable between them carries; `cut` takes the cable away as a failing
switch would: without a word to either side. Needs root. Everything is taken down again, also after a failure.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def why_not() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "mount", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux, hostname)"
    probe = f"ddpm-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"ip netns add: {made.stderr.strip()}" if made.returncode else None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Host:
    """One host: `run` starts a launcher on it, `log` is where that writes."""

    name: str
    namespace: str
    interface: str
    address: str
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def python(self, *arguments: str, mounts: Sequence[str] = (), label: str = "log") -> subprocess.Popen[bytes]:
        """Starts `python ARGUMENTS` from the repository's root, after the shell commands in `mounts`."""
        return self.run([sys.executable, *arguments], mounts=mounts, label=label)

    def run(
        self, command: Sequence[str], *, mounts: Sequence[str] = (), label: str = "log", **variables: str
    ) -> subprocess.Popen[bytes]:
        """Starts a command here, with a host name and mounts of its own; its pid is the command's own."""
        names = [
            f"hostname {self.name}",
            f"mount --bind {self.folder / 'hosts'} /etc/hosts",
            "mount --bind /dev/null /etc/resolv.conf",  # no name server: an unknown name fails at once
        ]
        script = "; ".join(["set -e", *names, *mounts, f"exec {shlex.join(command)}"])
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.interface,
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.folder / "home"),
            **variables,
        }
        with self.log(label).open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", script],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.started.append(process)
        return process

    def log(self, label: str = "log") -> Path:
        return self.folder / f"{self.name}-{label}.txt"

    def pids(self) -> list[int]:
        """Every process on this host, whatever session or parent it has by now."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill_all(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def remove(self) -> None:
        deadline = time.monotonic() + 10
        while self.pids() and time.monotonic() < deadline:
            self.kill_all(signal.SIGKILL)
            time.sleep(0.1)
        for process in self.started:
            process.wait()
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False)


def cut(host: Host) -> None:
    """Pulls the cable: packets vanish, connections stay open."""
    ip("-n", host.namespace, "link", "set", host.interface, "down")


def mend(host: Host) -> None:
    ip("-n", host.namespace, "link", "set", host.interface, "up")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, joined by a cable. `folder` takes their logs and home folders."""
    tag = f"dd{os.getpid() % 100000}"
    names = ["a", "b"]
    hosts = [Host(f"host-{n}", f"{tag}-{n}", "eth0", f"10.77.0.{i}", folder) for i, n in enumerate(names, start=1)]
    (folder / "home").mkdir(exist_ok=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in hosts))
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        a, b = hosts
        ip(
            "link",
            "add",
            a.interface,
            "netns",
            a.namespace,
            "type",
            "veth",
            "peer",
            "name",
            b.interface,
            "netns",
            b.namespace,
        )
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            mend(host)
        yield a, b
    finally:
        for host in hosts:
            host.remove()

"""The launcher ends with the exit code of its ranks, and lets them save before it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_runs import free_port

from ddpm_ema import launch

RANK = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
(folder / f"up-{rank}").write_text(str(os.getpid()))
if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2 + int(rank)]))
while not stops:
    time.sleep(0.02)
time.sleep(1)  # a save
(folder / f"saved-{rank}").write_text("")
while not all((folder / f"saved-{r}").exists() for r in (0, 1)):  # ranks leave together
    time.sleep(0.02)
sys.exit(75)
"""


def start(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "ddpm_ema.launch", "--nproc-per-node", "2", *options, str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command + list(arguments), env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{[p for p in paths if not p.exists()]} did not come"
        time.sleep(0.05)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, from /proc."""
    [mask] = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([75, 75], True, 75),
        ([75, -signal.SIGTERM], True, 75),
        ([75, -signal.SIGTERM], False, 75),  # torchrun terminates the peers of the first that ends
        ([2, 75], False, 2),
        ([75, 3], False, 3),
        ([1, 75], False, 1),  # the crash is the cause; 75 is its peer's lost connection
        ([1, 2], False, 2),
        ([-signal.SIGKILL], False, 137),
        ([-signal.SIGTERM], True, 75),  # stopped while it still imported
        ([-signal.SIGTERM], False, 143),
    ],
)
def test_one_exit_code_stands_for_those_of_all_ranks(codes: list[int], stopped: bool, expected: int):
    assert launch.exit_code(codes, stopped) == expected


def test_a_stop_reaches_every_rank_is_waited_for_and_ends_in_75(tmp_path: Path):
    launcher = start(tmp_path)
    wait_for(tmp_path / "up-0", tmp_path / "up-1")
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, errors
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert "Traceback" not in errors
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"up-{rank}").read_text()), 0)


def test_a_stop_while_waiting_for_other_nodes_ends_the_launcher_at_once(tmp_path: Path):
    nobodys_port = "0"  # nobody listens there: the rendezvous would be tried for minutes
    options = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", nobodys_port)
    launcher = start(tmp_path, options=options)
    while not catches(launcher.pid, signal.SIGTERM):
        time.sleep(0.05)
    time.sleep(3)  # it imports torch, and then waits in the rendezvous: a stop must end either
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert not (tmp_path / "up-0").exists()


def test_launchers_that_do_not_meet_end_in_75_without_a_traceback(tmp_path: Path):
    place = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--rdzv-conf", "timeout=1")
    launcher = start(tmp_path, options=("--nnodes", "2", "--node-rank", "1", *place))
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert "did not meet" in errors
    assert "Traceback" not in errors


def test_a_hangup_that_nohup_ignores_stays_ignored_and_what_a_shell_ignores_for_itself_is_heard():
    code = "import signal as s; from ddpm_ema.launch import StopRelay; s.signal(s.SIGHUP, s.SIG_IGN); "
    code += "s.signal(s.SIGTERM, s.SIG_IGN); StopRelay(); "
    code += "assert s.getsignal(s.SIGHUP) is s.SIG_IGN and callable(s.getsignal(s.SIGTERM))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_settings_on_a_rank_are_the_launchers_exit_code_without_a_traceback(tmp_path: Path):
    launcher = start(tmp_path, "2", "2")
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert "Traceback" not in errors


NODE = """
import os, sys
from ddpm_ema import cli
from ddpm_ema.errors import UserError
from ddpm_ema.distributed import Processes
def work():
    processes = Processes.start("cpu", timeout=20)
    with processes.telling_peers():
        if processes.rank == int(sys.argv[1]):
            raise UserError("img/0001.png: truncated")
        processes.gather(None)
sys.exit(cli.guard(work))
"""


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_on_one_node_is_the_exit_code_of_every_nodes_launcher(tmp_path: Path, failing: int):
    script = tmp_path / "node.py"
    script.write_text(NODE)
    port = str(free_port())
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1", "--master-port", port]
    launchers = [
        subprocess.Popen(
            [*(sys.executable, "-m", "ddpm_ema.launch", *place, "--node-rank", node, str(script), str(failing))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in "01"
    ]
    outputs = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2], "\n".join(outputs)
    assert f"because rank {failing} on" in outputs[1 - failing]
    assert "img/0001.png: truncated" in outputs[1 - failing]


RENDEZVOUS = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another host name and other mounts need root")
@pytest.mark.slow
def test_one_node_needs_no_host_name_that_resolves(tmp_path: Path):
    script = tmp_path / "rank.py"
    script.write_text(RENDEZVOUS)
    names = tmp_path / "nsswitch.conf"
    names.write_text("hosts: files\n")
    unresolved = f'hostname nameless && mount --bind {names} /etc/nsswitch.conf && exec "$@"'
    nameless = ["unshare", "--uts", "--mount", "sh", "-c", unresolved, "sh"]
    command = [*nameless, sys.executable, "-m", "ddpm_ema.launch", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60, check=False)
    assert done.returncode == 0


ATTACK = """
import base64, os, pickle, sys
from datetime import timedelta
from torch.distributed import TCPStore
class Payload:
    def __reduce__(self):
        return os.system, ("id -u > " + sys.argv[1],)
os.setgid(12345), os.setuid(12345)
for port in sys.argv[2:]:
    store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=5))
    for key in {key.rpartition("/")[2] for key in store.list_keys()} | {"torch.rendezvous.none"}:
        if key.startswith("torch.rendezvous"):
            store.set(key, base64.b64encode(pickle.dumps(Payload())))
print("written")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
def test_another_user_of_the_node_who_writes_to_the_rendezvous_runs_no_code(tmp_path: Path):
    launcher = start(tmp_path, options=("--standalone",))
    wait_for(tmp_path / "up-0", tmp_path / "up-1")
    listening = [c.laddr.port for c in psutil.Process(launcher.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert listening
    (tmp_path / "stolen").mkdir(mode=0o777)
    (tmp_path / "stolen").chmod(0o777)
    attack = [sys.executable, "-c", ATTACK, str(tmp_path / "stolen" / "uid"), *map(str, listening)]
    done = subprocess.run(attack, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "written\n", done.stderr
    time.sleep(7)  # torchrun's heartbeat, at which it would read the state, comes every five seconds
    assert not (tmp_path / "stolen" / "uid").exists()
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, errors

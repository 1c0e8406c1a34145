"""Several nodes for real: two hosts joined by a cable, one launcher on each, and what a cluster does to them.

Runs are of configs/digits.yaml as it stands but for its length. Weights of a run that was interrupted on the same number
of processes must be equal to the last bit; on another number, to 1e-5 (sums come in another order).
"""

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import torch
from hosts import Host, two_hosts
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_ema.rundir import RunDir

pytestmark = pytest.mark.cluster

STEPS = 60
TIMEOUT = 10
# What a launcher and a rank need besides the timeout: the roll call of the ranks, and leaving Python.
GRACE = 30
START = 600  # with other work on the same cores


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(autouse=True)
def _quiet_hosts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves the hosts without processes and with the cable in."""
    yield
    if "pair" in request.fixturenames:
        for host in request.getfixturevalue("pair"):
            host.kill_all(signal.SIGKILL)
            hosts.mend(host)


def settings(output: Path, steps: int = STEPS, **more: object) -> list[str]:
    chosen = {
        "output_dir": output,
        "training.steps": steps,
        "machine.timeout": TIMEOUT,
        "machine.device": "cpu",
        "training.log_every": 1,
        "training.sample_every": 0,
        "checkpoints.every": 20,
        "checkpoints.keep": 50,
        "checkpoints.snapshots_every": 0,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    flags = [text for key, value in chosen.items() for text in (f"--{key}", str(value))]
    return ["scripts/train.py", "--config", "configs/digits.yaml", *flags]


class Run:
    """One launch over one or two hosts, each with a number of processes."""

    ports = iter(range(29500, 30500))

    def __init__(
        self,
        on: tuple[Host, ...],
        arguments: list[str],
        *,
        processes: int = 1,
        rendezvous: str = "static",
        mounts: dict[str, list[str]] | None = None,
    ) -> None:
        self.on, port = on, next(self.ports)
        self.label = f"run{port}"
        main = on[0].address
        self.launchers = []
        for rank, host in enumerate(on):
            if rendezvous == "static":
                join = ["--node-rank", str(rank), "--master-addr", main, "--master-port", str(port)]
            else:
                # c10d looks the endpoint up among its own addresses by name, which a namespace does not have.
                join = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{main}:{port}", "--rdzv-id", self.label]
                join += ["--local-addr", host.address, *(["--rdzv-conf", "is_host=1"] if rank == 0 else [])]
            nodes = ["--nnodes", str(len(on)), "--nproc-per-node", str(processes)]
            command = ["-m", "ddpm_ema.launch", *nodes, *join, *arguments]
            self.launchers.append(host.python(*command, mounts=(mounts or {}).get(host.name, []), label=self.label))

    def log(self, host: Host) -> str:
        return host.log(self.label).read_text(errors="replace")

    def wait(self, seconds: float = START) -> list[int]:
        """Exit codes, in the order of the hosts."""
        deadline = time.monotonic() + seconds
        codes = []
        for launcher, host in zip(self.launchers, self.on, strict=True):
            try:
                codes.append(launcher.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{host.name} still runs after {seconds} s:\n{self.log(host)}") from None
        return codes

    def succeed(self, seconds: float = START) -> None:
        codes = self.wait(seconds)
        assert codes == [0] * len(self.on), "\n".join(self.log(host) for host in self.on)

    def reach(self, output: Path, step: int) -> None:
        """Waits until this run has logged a step."""
        deadline = time.monotonic() + START
        while (last_row(output) or {"step": 0})["step"] < step:
            ended = [
                host.name for host, launcher in zip(self.on, self.launchers, strict=True) if launcher.poll() is not None
            ]
            assert not ended, f"{ended} ended early:\n" + "\n".join(self.log(host) for host in self.on)
            assert time.monotonic() < deadline, "\n".join(self.log(host) for host in self.on)
            time.sleep(0.05)


def rows(output: Path) -> list[dict[str, float]]:
    path = RunDir(output).metrics_path
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_row(output: Path) -> dict[str, float] | None:
    return (rows(output) or [None])[-1]


def newest(output: Path) -> int:
    return RunDir(output).checkpoints()[-1].step


def weights(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Raw and every average, by copy and parameter."""
    checkpoint = RunDir(output).checkpoint(step)
    return {f"{copy}:{name}": t for copy in checkpoint.names for name, t in checkpoint.weights(copy).items()}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert len({name.partition(":")[0] for name in left}) > 1, "raw and averages are compared"
    worst = max(float((left[name] - right[name]).abs().max()) for name in left)
    print(f"largest difference of any weight: {worst:.1e}")
    assert worst <= 1e-5


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def alone(pair: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    Run((pair[0],), settings(output)).succeed()
    return output


@pytest.fixture(scope="module")
def together(pair: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two hosts, one process each, never interrupted, output on a shared file system."""
    output = tmp_path_factory.mktemp("together") / "run"
    Run(pair, settings(output)).succeed()
    return output


def test_two_hosts_give_the_weights_of_one_process(alone: Path, together: Path):
    assert RunDir(together).checkpoint(STEPS).manifest["world_size"] == 2
    assert_close(weights(alone), weights(together))
    for a, b in zip(rows(alone), rows(together), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_output_local_to_the_main_node_and_the_c10d_rendezvous_give_the_same_bits(
    pair: tuple[Host, Host], together: Path, tmp_path: Path
):
    """host-b has an empty, read-only file system where host-a has the run directory: it neither reads nor writes it."""
    output = tmp_path / "runs" / "run"
    output.parent.mkdir()
    nothing_there = [f"mount -t tmpfs -o ro,size=1m tmpfs {output.parent}", f"! touch {output.parent}/x 2>/dev/null"]
    first = Run(pair, settings(output, steps=40), rendezvous="c10d", mounts={"host-b": nothing_there})
    first.succeed()
    second = Run(pair, settings(output, training__allow_new_averages="false"), mounts={"host-b": nothing_there})
    second.succeed()
    assert "going on from" in second.log(pair[0])
    assert_bit_equal(weights(output), weights(together))


def test_an_output_folder_that_the_main_node_cannot_write_is_said_before_the_first_step_and_ends_every_node(
    pair: tuple[Host, Host], tmp_path: Path
):
    output = tmp_path / "runs" / "run"
    output.parent.mkdir()
    run = Run(pair, settings(output), mounts={"host-a": [f"mount -t tmpfs -o ro,size=1m tmpfs {output.parent}"]})
    assert run.wait() == [2, 2]
    for host in pair:
        assert f"error: {output}" in run.log(host) or str(output) in run.log(host)
        assert "ead-only" in run.log(host)
        assert "Traceback" not in run.log(host)


def test_data_is_read_from_a_folder_mounted_read_only(pair: tuple[Host, Host], tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(load_digits().images[:200]):
        Image.fromarray((image * 15).astype("uint8")).save(images / f"{number:04d}.png")
    read_only = [
        f"mount --bind {shlex.quote(str(images))} {shlex.quote(str(images))}",
        f"mount -o remount,ro,bind {shlex.quote(str(images))}",
        f"! touch {shlex.quote(str(images))}/x 2>/dev/null",
    ]
    arguments = settings(tmp_path / "run", steps=5, data__source="folder", data__path=images)
    run = Run(pair, arguments, mounts={host.name: read_only for host in pair})
    run.succeed()
    assert len(list(images.iterdir())) == 200
    assert newest(tmp_path / "run") == 5


def test_a_host_that_is_cut_off_is_named_within_the_timeout_and_both_go_on_from_the_last_checkpoint_to_the_same_bits(
    pair: tuple[Host, Host], together: Path, tmp_path: Path
):
    output = tmp_path / "run"
    run = Run(pair, settings(output))
    run.reach(output, 25)
    hosts.cut(pair[1])
    start = time.monotonic()
    codes = run.wait(TIMEOUT + GRACE)
    print(f"both ended {time.monotonic() - start:.1f} s after the cut, timeout {TIMEOUT} s, exit codes {codes}")
    assert codes == [75, 75], "\n".join(run.log(host) for host in pair)
    assert re.search(r"error: rank 0 on host-a: rank 1 no longer answers", run.log(pair[0])), run.log(pair[0])
    assert re.search(r"error: rank 1 on host-b: rank 0", run.log(pair[1])), run.log(pair[1])
    assert "last checkpoint" in run.log(pair[0])
    assert newest(output) == 20
    hosts.mend(pair[1])
    again = Run(pair, settings(output))
    again.succeed()
    assert "step-00000020" in again.log(pair[0])
    assert_bit_equal(weights(output), weights(together))
    assert [row["step"] for row in rows(output)] == list(range(1, STEPS + 1))


def test_a_host_that_dies_is_named_and_both_started_again_come_to_the_same_bits(
    pair: tuple[Host, Host], together: Path, tmp_path: Path
):
    output = tmp_path / "run"
    run = Run(pair, settings(output))
    run.reach(output, 25)
    pair[1].kill_all(signal.SIGKILL)
    codes = run.wait(TIMEOUT + GRACE)
    assert codes[0] == 75, run.log(pair[0])
    assert "rank 1 no longer answers" in run.log(pair[0])
    Run(pair, settings(output)).succeed()
    assert_bit_equal(weights(output), weights(together))


def test_a_preempted_host_has_both_save_the_same_step_and_end_with_75(
    pair: tuple[Host, Host], together: Path, tmp_path: Path
):
    output = tmp_path / "run"
    run = Run(pair, settings(output))
    run.reach(output, 25)
    pair[1].kill_all(signal.SIGTERM)
    assert run.wait() == [75, 75], "\n".join(run.log(host) for host in pair)
    stopped = newest(output)
    assert stopped not in (20, 40, STEPS), "a checkpoint out of turn"
    for host in pair:
        assert f"at step {stopped}; saved, start again" in run.log(host)
    Run(pair, settings(output)).succeed()
    assert_bit_equal(weights(output), weights(together))


def test_a_run_goes_on_with_one_process_and_then_three_over_the_same_sample_stream(
    pair: tuple[Host, Host], alone: Path, tmp_path: Path
):
    output = tmp_path / "run"
    launches: list[tuple[tuple[Host, ...], int]] = [(pair, 1), (pair[:1], 1), (pair[:1], 3)]
    logs = []
    for number, (on, processes) in enumerate(launches):
        run = Run(on, settings(output), processes=processes)
        if number < 2:
            run.reach(output, (newest(output) if number else 0) + 15)
            on[-1].kill_all(signal.SIGTERM)
            assert set(run.wait()) == {75}, "\n".join(run.log(host) for host in on)
        else:
            run.succeed()
        logs.append(run.log(on[0]))
    assert "global batch 64 images (32, 32 per process)" in logs[0]
    assert "global batch 64 images (64 per process)" in logs[1]
    assert "global batch 64 images (21, 21, 22 per process)" in logs[2]
    assert "going on with 1 process(es) instead of 2: the same sample stream" in logs[1]
    assert "going on with 3 process(es) instead of 1: the same sample stream" in logs[2]
    assert_close(weights(output), weights(alone))
    for a, b in zip(rows(output), rows(alone), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)

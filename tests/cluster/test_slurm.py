"""The Slurm files under a real Slurm: a controller and two nodes, each on a host of its own, as small as Slurm can be."""

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from hosts import Host, two_hosts
from test_nodes import last_row, newest, settings

pytestmark = pytest.mark.cluster

# Nodes claim the eight GPUs and 32 cores that the files ask for: Slurm then takes the files as they stand.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=host-a
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SchedulerParameters=sched_interval=1
NodeName=host-a,host-b CPUs=32 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    def __init__(self, controller: Host, folder: Path) -> None:
        self.controller, self.folder = controller, folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "NPROC_PER_NODE": "1"}

    def command(self, *words: str) -> str:
        """Runs one of Slurm's commands to its end and returns what it printed."""
        process = self.controller.run(words, label="command", **self.variables)
        code = process.wait(60)
        text = self.controller.log("command").read_text()
        assert code == 0, f"{' '.join(words)}: {text}"
        return text

    def submit(self, file: str, *arguments: str, options: tuple[str, ...] = ()) -> tuple[str, Path]:
        """(job id, its log)."""
        output = ("--output", f"{self.folder}/%x-%j.log")
        text = self.command("sbatch", "--parsable", *output, *options, file, *arguments)
        job = text.strip().split(";")[0]
        name = re.search(r"--job-name=(\S+)", Path(hosts.ROOT, file).read_text())
        assert name
        return job, self.folder / f"{name[1]}-{job}.log"

    def state(self, job: str) -> dict[str, str]:
        return dict(
            word.split("=", 1) for word in self.command("scontrol", "-o", "show", "job", job).split() if "=" in word
        )

    def wait_for(self, job: str, log: Path, *states: str, restarts: int = 0, seconds: float = 180) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (found := self.state(job))["JobState"] not in states or int(found["Restarts"]) < restarts:
            said = log.read_text(errors="replace")[-4000:] if log.exists() else "nothing"
            assert time.monotonic() < deadline, (
                f"{found['JobState']}, {found['Restarts']} restarts; the job said {said}"
            )
            time.sleep(1)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("controller", "host-a", "host-b"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=host-a,host-b Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    with two_hosts(folder) as pair:
        made = Cluster(pair[0], folder)
        pair[0].run(["slurmctld", "-D"], label="slurmctld", **made.variables)
        for host in pair:
            # Slurm 22 refuses a machine with both kinds of cgroup, and needs neither here.
            hidden = ["mount -t tmpfs tmpfs /sys/fs/cgroup"]
            host.run(["slurmd", "-D"], label="slurmd", mounts=hidden, **made.variables)
        deadline = time.monotonic() + 60
        while made.command("sinfo", "-h", "-o", "%t %D").strip() != "idle 2":
            assert time.monotonic() < deadline, "\n".join(p.read_text()[-2000:] for p in folder.glob("*-slurm*.txt"))
            time.sleep(1)
        yield made


def test_slurm_takes_both_files_as_they_stand(cluster: Cluster):
    for file in ("configs/slurm/train.sbatch", "configs/slurm/score.sbatch"):
        cluster.command("sbatch", "--test-only", file, "--config", "configs/digits.yaml")


def test_bad_settings_end_a_job_with_exit_code_2_and_are_not_tried_again(cluster: Cluster, tmp_path: Path):
    job, log = cluster.submit("configs/slurm/train.sbatch", *settings(tmp_path / "run", training__stepz=1)[1:])
    state = cluster.wait_for(job, log, "FAILED", "COMPLETED")
    assert state["ExitCode"] == "2:0", log.read_text()
    assert state["Restarts"] == "0"
    assert "did you mean 'steps'" in log.read_text()


def test_a_preempted_job_saves_goes_back_into_the_queue_and_finishes_under_its_own_id(cluster: Cluster, tmp_path: Path):
    output = tmp_path / "run"
    job, log = cluster.submit("configs/slurm/train.sbatch", *settings(output)[1:])
    deadline = time.monotonic() + 120
    while (last_row(output) or {"step": 0})["step"] < 15:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else cluster.state(job)
        time.sleep(0.1)
    cluster.command("scancel", "--signal=TERM", job)
    state = cluster.wait_for(job, log, "COMPLETED", restarts=1)
    text = log.read_text()
    stopped = re.search(r"at step (\d+); saved, start again", text)
    assert stopped, text
    assert f"job {job} stopped; back into the queue" in text
    assert f"step-{int(stopped[1]):08d}" in text.partition("back into the queue")[2], "it went on elsewhere"
    assert state["NumNodes"] == "2"
    assert newest(output) == 60


def test_a_job_near_its_time_limit_is_told_to_save_and_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path):
    output = tmp_path / "run"
    near = (
        "--time=3",
        "--signal=TERM@60",
    )  # Slurm counts in minutes, looks every half minute, and a rank may take one to start
    arguments = settings(output, steps=100_000, checkpoints__every=50_000)[1:]
    job, log = cluster.submit("configs/slurm/train.sbatch", *arguments, options=near)
    cluster.wait_for(job, log, "PENDING", "RUNNING", restarts=1, seconds=400)
    cluster.command("scancel", job)
    assert "back into the queue" in log.read_text()
    assert 0 < newest(output) < 50_000, "saved out of turn, because it was told to"

"""The files for containers and clusters: valid by strict schema, and saying the same thing as the code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "configs/kubernetes"
SLURM = ROOT / "configs/slurm"
ACCELERATE = ROOT / "configs/accelerate"
KILLED_BY_TERM = 128 + signal.SIGTERM  # stopped before Python could catch a signal
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def tool(name: str) -> str:
    """A program of the virtual environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def job_of(path: Path) -> dict[str, Any]:
    """The Job of a file; a JobSet's is taken out of its template."""
    [found] = [d for d in documents(path) if d["kind"] in ("Job", "JobSet")]
    if found["kind"] == "JobSet":
        [replicated] = found["spec"]["replicatedJobs"]
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": found["metadata"], **replicated["template"]}
    return found


JOBS = [KUBERNETES / "train-job.yaml", KUBERNETES / "train-jobset.yaml"]
every_job = pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)


# Containers


def test_hadolint_finds_nothing_in_the_dockerfile():
    result = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def test_the_base_is_pinned_through_an_argument_and_dependencies_come_before_code():
    steps = instructions()
    assert steps[0][0] == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=\S+:\S*\d\S*", steps[0][1]), "the base needs a version"
    assert steps[1] == ("FROM", "${BASE_IMAGE}")
    copies = [text for name, text in steps if name == "COPY"]
    assert copies == ["pyproject.toml constraints.txt ./", ". ."]
    install = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and ".[${EXTRAS}]" in text)
    assert install < steps.index(("COPY", ". .")), "a change of code would install all dependencies again"
    assert "--constraint constraints.txt" in steps[install][1]


def test_the_image_runs_as_a_fixed_user_under_tini_and_checks_itself_as_that_user():
    steps = instructions()
    [user] = [text for name, text in steps if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number"
    [entrypoint] = [json.loads(text) for name, text in steps if name == "ENTRYPOINT"]
    assert entrypoint == ["/usr/bin/tini", "-s", "--"]
    doctor = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and "ddpm_ema.doctor" in text)
    assert doctor > steps.index(("USER", user))
    for path in JOBS:
        assert job_of(path)["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user.split(":")[0])


def test_the_image_gets_what_runs_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "ddpm_ema", "scripts", "configs"}


# Kubernetes


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_every_kubernetes_object_passes_the_strict_schema():
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in documents(path):
            if document["kind"] != "JobSet":
                validate(document)
    validate(job_of(KUBERNETES / "train-jobset.yaml"))


def test_the_strict_schema_refuses_a_field_it_does_not_know():
    job = job_of(JOBS[0])
    job["spec"]["template"]["spec"]["terminationGraceSeconds"] = 5
    with pytest.raises(Exception, match="terminationGraceSeconds"):
        validate(job)


def test_the_jobset_passes_through_jobsets_own_types_without_losing_a_field():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api has JobSet's types")
    [jobset] = [d for d in documents(KUBERNETES / "train-jobset.yaml") if d["kind"] == "JobSet"]
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset


@every_job
def test_a_pod_has_shared_memory_a_grace_period_and_exit_codes_that_are_the_codes_of_the_program(path: Path):
    spec = job_of(path)["spec"]
    rules = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rules == [[EXIT_BAD_INPUT, EXIT_DIVERGED], [EXIT_STOPPED, KILLED_BY_TERM]]
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert mounts["/data"]["readOnly"] is True
    assert set(mounts) >= {"/runs", "/cache", "/tmp"}, "with a read-only root, these must be mounted"


def test_stops_after_a_save_are_not_counted_and_bad_settings_are_not_tried_again():
    rules = job_of(JOBS[0])["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    [jobset] = [d for d in documents(JOBS[1]) if d["kind"] == "JobSet"]
    # What the Job controller writes when a rule of podFailurePolicy matches.
    message = "Container train for pod default/ddpm-ema-nodes-0-1-x2b4c failed with exit code {} matching FailJob rule at index 0"
    actions = {}
    for code in (EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED, KILLED_BY_TERM):
        for rule in jobset["spec"]["failurePolicy"]["rules"]:
            if any(re.search(p, message.format(code)) for p in rule["onJobFailureMessagePatterns"]):
                actions[code] = rule["action"]
                break
    restart = "RestartJobSetAndIgnoreMaxRestarts"
    assert actions == {
        EXIT_BAD_INPUT: "FailJobSet",
        EXIT_DIVERGED: "FailJobSet",
        EXIT_STOPPED: restart,
        KILLED_BY_TERM: restart,
    }


@every_job
def test_only_the_pods_of_the_same_job_may_reach_a_pod(path: Path):
    [policy] = [d for d in documents(path) if d["kind"] == "NetworkPolicy"]
    label = {
        "Job": "batch.kubernetes.io/job-name",
        "JobSet": "jobset.sigs.k8s.io/jobset-name",
    }  # set by the controllers
    [job] = [d for d in documents(path) if d["kind"] in label]
    own = {"matchLabels": {label[job["kind"]]: job["metadata"]["name"]}}
    assert policy["spec"]["podSelector"] == own
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": own}]}]


@every_job
def test_the_nodes_of_a_job_agree_on_their_number_and_on_an_address_that_exists(path: Path):
    document = next(d for d in documents(path) if d["kind"] in ("Job", "JobSet"))
    spec = job_of(path)["spec"]
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    assert f"--nnodes={spec['completions']}" in arguments
    assert spec["completions"] == spec["parallelism"]
    [address] = [a.partition("=")[2] for a in arguments if a.startswith("--master-addr=")]
    name = document["metadata"]["name"]
    if document["kind"] == "Job":
        service = next(d for d in documents(path) if d["kind"] == "Service")
        assert address == f"{name}-0.{service['metadata']['name']}"
        assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
        assert service["spec"]["publishNotReadyAddresses"] is True
    else:
        [nodes] = document["spec"]["replicatedJobs"]
        assert address == f"{name}-{nodes['name']}-0-0.{document['spec']['network']['subdomain']}"


@every_job
def test_a_pods_command_line_is_one_that_the_launcher_and_the_program_take(path: Path):
    from torch.distributed.run import parse_args

    from ddpm_ema import config

    arguments = job_of(path)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:3] == ["python", "-m", "ddpm_ema.launch"]
    options = parse_args([a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in arguments[3:]])
    assert (ROOT / options.training_script).exists()
    rest = options.training_script_args
    assert rest[0] == "--config"
    flags = {flag.removeprefix("--"): [value] for flag, value in zip(rest[2::2], rest[3::2], strict=True)}
    settings = config.load(ROOT / rest[1], {name.replace("-", "_"): value for name, value in flags.items()})
    assert str(settings.output_dir).startswith("/runs/")
    assert str(settings.data.path).startswith("/data/")


# accelerate


def test_accelerate_takes_every_launch_file_and_refuses_an_unknown_key(tmp_path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in sorted(ACCELERATE.glob("*.yaml"))}
    assert {name: (c.num_machines, c.num_processes) for name, c in found.items()} == {
        "one_gpu": (1, 1),
        "several_gpus": (1, 8),
        "several_nodes": (2, 16),
        "two_cpu": (1, 2),
    }
    assert found["two_cpu"].use_cpu is True
    bad = tmp_path / "bad.yaml"
    bad.write_text((ACCELERATE / "two_cpu.yaml").read_text() + "num_procceses: 3\n")
    with pytest.raises(ValueError, match="num_procceses"):
        load_config_from_file(str(bad))


@pytest.mark.slow
def test_the_two_cpu_file_really_starts_two_processes(tmp_path: Path):
    script = tmp_path / "who.py"
    script.write_text(
        "from ddpm_ema.distributed import Processes\np = Processes.start('cpu')\n"
        "open(f'{__file__}.{p.rank}', 'w').write(f'{p.world_size} {p.device.type}')\np.close()\n"
    )
    command = [tool("accelerate"), "launch", "--config_file", str(ACCELERATE / "two_cpu.yaml"), str(script)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [Path(f"{script}.{rank}").read_text() for rank in (0, 1)] == ["2 cpu"] * 2


# Slurm


def test_shellcheck_finds_nothing_in_any_shell_file():
    files = [p for p in ROOT.rglob("*.s*") if p.suffix in (".sh", ".sbatch") and ".venv" not in p.parts]
    assert len(files) >= 4
    command = [tool("shellcheck"), "--external-sources", *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["train.sbatch", "score.sbatch"])
def test_a_slurm_job_starts_one_launcher_a_node_is_told_to_save_before_the_limit_and_may_be_requeued(name: str):
    text = (SLURM / name).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert len(options) == text.count("#SBATCH"), "a directive is malformed"
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append"
    assert "requeue" in options
    seconds = re.fullmatch(r"TERM@(\d+)", options["signal"])
    assert seconds
    assert int(seconds[1]) >= 60
    program = re.search(r"^exec (\S+) (\S+) \"\$@\"$", text, flags=re.MULTILINE)
    assert program
    assert (ROOT / program[1]).exists()
    assert (ROOT / program[2]).exists()


class FakeSlurm:
    """srun, scontrol and scancel on a PATH of their own: srun runs the task once a node, the others note that they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        programs = {
            "scontrol": 'if [[ $1 == show ]]; then echo node-a; echo node-b; else echo "scontrol $*" >>"$CALLS"; fi',
            "scancel": 'echo "scancel $*" >>"$CALLS"; kill -TERM "$(cat "$CALLS.task")"',
            "srun": 'shift 2; worst=0; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || { code=$?; '
            "(( code > worst )) && worst=$code; }; done; exit $worst",
            # Stands for `python -m ddpm_ema.launch ...` on a node.
            "python": 'echo "$SLURM_NODEID: $*" >>"$CALLS"; for a in "$@"; do case $a in exit=*) exit "${a#exit=}";; '
            'wait) echo $$ >"$CALLS.task"; trap "sleep 0.5; exit 75" TERM; for _ in {1..400}; do sleep 0.05; done;; esac; done',
        }
        for name, body in programs.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / name).chmod(0o755)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "PYTHON": str(self.folder / "python"),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_NNODES": "2",
            "SLURM_SUBMIT_DIR": str(self.folder),
            **variables,
        }
        command = [str(SLURM / "run.sh"), "scripts/train.py", *arguments]
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, env=environment, cwd=self.folder, stdout=pipe, stderr=out, text=True)

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_every_node_gets_the_same_rendezvous_its_own_rank_and_the_arguments_as_they_were(slurm: FakeSlurm):
    job = slurm.start("--config", "a b.yaml", "exit=0")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0, output
    rendezvous = "--nproc-per-node gpu --master-addr node-a --master-port 19242"
    program = "scripts/train.py --config a b.yaml exit=0"
    assert slurm.lines() == [
        f"{rank}: -m ddpm_ema.launch --nnodes 2 --node-rank {rank} {rendezvous} {program}" for rank in (0, 1)
    ]


@pytest.mark.parametrize(
    ("code", "requeued"), [(75, True), (143, True), (2, False), (3, False), (1, False), (0, False)]
)
def test_only_a_stop_after_a_save_puts_the_job_back_into_the_queue(slurm: FakeSlurm, code: int, requeued: bool):
    job = slurm.start(f"exit={code}")
    job.communicate(timeout=30)
    assert job.returncode == code
    assert ("scontrol requeue 4242" in slurm.lines()) == requeued


def test_a_job_that_was_requeued_often_enough_is_not_again(slurm: FakeSlurm):
    slurm.start("exit=75", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3").communicate(timeout=30)
    assert "scontrol requeue 4242" not in slurm.lines()


@pytest.mark.parametrize("named", ["output_dir", "run", "config", "quoted", "plain", "output", "images"])
def test_a_job_that_stops_four_times_with_nothing_new_saved_stays_out_of_the_queue(slurm: FakeSlurm, named: str):
    run = slurm.folder / ("runs/images" if named == "images" else "a run #1" if named == "quoted" else "a run")
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (slurm.folder / "a.yaml").write_text(f"seed: 1\noutput_dir: {run}\n")
    (slurm.folder / "b.yaml").write_text(f'output_dir: "{run}"  # "mine"\n')
    (slurm.folder / "c.yaml").write_text(f"output_dir : {run}\t# mine\r\n", newline="")
    arguments = {
        "output_dir": ["--output-dir", str(run)],
        "run": [str(run)],
        "config": ["--config", str(slurm.folder / "a.yaml")],
        "quoted": ["--config", str(slurm.folder / "b.yaml")],
        "plain": ["--config", str(slurm.folder / "c.yaml")],
        "output": ["elsewhere", f"--evaluation.output={run}"],
        "images": ["--data.path", f"{slurm.folder}/images/"],
    }

    def requeued() -> bool:
        before = slurm.lines().count("scontrol requeue 4242")
        output, _ = slurm.start(*arguments[named], "exit=75").communicate(timeout=30)
        again = slurm.lines().count("scontrol requeue 4242") > before
        assert again or f"with nothing new in '{'runs/images' if named == 'images' else run}'" in output
        return again

    assert [requeued() for _ in range(3)] == [True] * 3
    (run / "checkpoints" / "step-00000001" / "raw.safetensors").touch()  # a step was saved: the count begins anew
    assert [requeued() for _ in range(4)] == [True, True, True, False]


def test_a_stop_of_the_batch_script_alone_reaches_the_tasks_and_is_waited_for(slurm: FakeSlurm):
    job = slurm.start("wait")
    task = Path(f"{slurm.calls}.task")
    deadline = time.monotonic() + 20
    while not task.exists() or not task.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    # The fake srun starts the second node after the first has ended: it is stopped likewise.
    first = task.read_text()
    while job.poll() is None and time.monotonic() < deadline:
        if task.read_text() != first and task.read_text().strip():
            os.kill(int(task.read_text()), signal.SIGTERM)
            break
        time.sleep(0.05)
    job.communicate(timeout=30)
    assert "scancel --signal=TERM 4242" in slurm.lines()
    assert "scontrol requeue 4242" in slurm.lines()
    assert job.returncode == 75

"""The image for real: built from the Dockerfile, then used as its own user to train and score."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
IMAGE = "localhost/ddpm_ema:test"

pytestmark = pytest.mark.cluster


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "buildah with chroot isolation needs root"
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    state = Path(os.environ.get("IMAGE_STATE", "/var/tmp/ddpm_ema-image"))
    free = shutil.disk_usage(state if state.exists() else state.parent).free
    return f"{free / 2**30:.0f} GiB free for layers, of 30" if free < 30 * 2**30 and not state.exists() else None


def buildah(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`bah` of buildah.sh, as the build script calls it."""
    script = 'set -euo pipefail; source tests/cluster/buildah.sh; require_buildah; bah "$@"'
    command = ["bash", "-c", script, "buildah", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, f"buildah {' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def image() -> str:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    environment = os.environ | {"IMAGE": IMAGE, "USE_BUILDAH": "1"}
    command = ["tests/cluster/build_image.sh"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert result.stdout.splitlines()[-1] == IMAGE
    return IMAGE


class Container:
    """A container of the image, with a folder of this machine as /runs. `run` is `docker run`: entrypoint, user, environment."""

    def __init__(self, name: str, runs: Path) -> None:
        self.name, self.runs = name, runs
        settings = json.loads(buildah("inspect", "--type", "image", IMAGE).stdout)["OCIv1"]["config"]
        self.entrypoint, self.command, self.user = settings["Entrypoint"], settings["Cmd"], settings["User"]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        given = ["--volume", f"{self.runs}:/runs", "--env", "OMP_NUM_THREADS=1"]
        # With chroot isolation buildah runs a command as it stands; the entrypoint is the engine's to add.
        return buildah("run", "--isolation", "chroot", *given, self.name, "--", *self.entrypoint, *command, check=False)


@pytest.fixture(scope="module")
def container(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    runs = tmp_path_factory.mktemp("runs")
    os.chown(runs, 10001, 10001)
    name = buildah("from", image).stdout.strip()
    try:
        yield Container(name, runs)
    finally:
        buildah("rm", name, check=False)


def test_the_image_runs_as_its_own_user_who_can_write_caches_and_runs_but_not_the_code(container: Container):
    assert container.user == "10001:10001"
    probe = 'id -u; id -g; touch /cache/x /runs/x && rm /cache/x /runs/x; touch /app/x || echo "no"; echo "$HOME"; pwd'
    result = container.run("sh", "-c", probe)
    assert result.stdout.split() == ["10001", "10001", "no", "/cache", "/app"], result.stderr


def test_the_image_without_a_command_checks_itself(container: Container):
    result = container.run(*container.command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fit to train" in result.stdout
    for subject in ("versions", "device", "gloo", "nccl", "shared memory", "output folder"):
        assert f"{subject}: " in result.stdout
    assert "failure" not in result.stdout


def test_an_exit_code_comes_out_of_the_container(container: Container):
    result = container.run("python", "scripts/train.py", "--config", "configs/digits.yaml", "--training.stepz", "3")
    assert result.returncode == 2
    assert "did you mean 'steps'" in result.stderr


def test_in_the_image_a_run_of_twenty_steps_is_trained_on_two_processes_and_scored(container: Container):
    settings = ["--config", "configs/digits.yaml", "--output-dir", "/runs/digits", "--training.steps", "20"]
    settings += ["--machine.device", "cpu", "--training.sample_every", "0", "--evaluation.num_images", "200"]
    settings += ["--evaluation.num_inference_steps", "5"]
    steps = [
        ("python", "scripts/train_features.py", *settings),
        ("python", "-m", "ddpm_ema.launch", "--nproc-per-node", "2", "scripts/train.py", *settings),
        ("python", "scripts/sample_and_score.py", *settings),
        ("python", "scripts/report.py", "/runs/digits"),
    ]
    for command in steps:
        result = container.run(*command)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    run = container.runs / "digits"
    [results] = run.glob("scores/*/results.json")
    rows = json.loads(results.read_text())["rows"]
    assert {"raw", "ema_0_999", "power_0_10"} <= {row["weights"] for row in rows}
    assert all(row["frechet_distance"] > 0 for row in rows)
    manifest = json.loads((run / "checkpoints/step-00000020/manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert (run / "report.html").stat().st_uid == 10001

"""A run directory that cannot be written, such as a colleague's or a read-only mount, is scored all the same."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from scored import again, classifier, make_run, results, settings

from ddpm_ema import config
from ddpm_ema.errors import UserError
from ddpm_ema.features import Trained, save_classifier


@pytest.fixture
def run(tmp_path: Path) -> Iterator[config.Config]:
    made = make_run(tmp_path / "run", evaluation__weights=["raw", "ema_0_9"])
    mount = f"mount --bind {made.output_dir} {made.output_dir} && mount -o remount,ro,bind {made.output_dir}"
    if os.geteuid() or subprocess.run(mount, shell=True).returncode:
        pytest.skip("mounting a folder read-only needs root")
    yield made
    subprocess.run(["umount", "-l", made.output_dir], check=True)


def test_its_scores_go_where_evaluation_output_says(run: config.Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Read-only file system.*evaluation\.output"):
        results(run)
    found = results(again(run, evaluation__output=str(tmp_path / "mine")))
    assert {row["weights"] for row in found["rows"]} == {"raw", "ema_0_9"}
    assert len(list((tmp_path / "mine").glob("scores/00000008-*/results.json"))) == 1


# Everything is done as root first, because an interpreter below /root cannot import anything once it is another user's.
ANOTHER_USER = """
import os, sys
import ddpm_ema
from ddpm_ema import cli
settings, run, folder = sys.argv[1:]

def everything(name):
    out = f"{folder}/{name}"
    os.mkdir(out)
    os.environ.update(HOME=out, XDG_CACHE_HOME=f"{out}/cache")
    score = ["score", run, "--evaluation.output", f"{out}/scores"]
    for command in (score, ["report", run, "--output", f"{out}/report.html"], ["export", run, "raw", "--output", f"{out}/pipeline"]):
        assert cli.main(command) == 0, command
    for weights in ("raw", "ema_0_9@4", "power_0_12"):
        ddpm_ema.load(run, weights)

for command in ("train", "score"):
    assert cli.main([command, "--config", settings]) == 0, command
everything("root")
os.setgroups([]), os.setgid(65534), os.setuid(65534)
everything("another")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
@pytest.mark.slow
def test_another_user_scores_reports_exports_and_loads_what_root_wrote_under_umask_022() -> None:
    with tempfile.TemporaryDirectory() as base:  # pytest's own folders are closed to others
        os.chmod(base, 0o777)
        snapshots = {"checkpoints__snapshots_every": 2, "checkpoints__snapshots": ["raw", "ema_0_9", "power_0_10"]}
        made = settings(Path(base) / "run", training__steps=8, evaluation__num_images=20, **snapshots)
        text = Path(base) / "settings.yaml"
        program = [sys.executable, "-c", ANOTHER_USER, str(text), str(made.output_dir), base]
        before = os.umask(0o022)
        try:
            text.write_text(json.dumps(config.to_dict(made)))
            trained = Trained(classifier(), 0.1)
            save_classifier(made.output_dir / "features.safetensors", trained, fingerprint="none", seed=0)
            done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
        finally:
            os.umask(before)
        assert done.returncode == 0, done.stderr
        found, of_root = (sorted((Path(base) / who / "scores").rglob("results.json")) for who in ("another", "root"))
        assert {path.stat().st_uid for path in found} == {65534}
        distances = [
            [row["frechet_distance"] for row in json.loads(path.read_text())["rows"]] for path in (*found, *of_root)
        ]
        assert distances[0] == distances[1]

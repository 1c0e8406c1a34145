"""A run directory that cannot be written, such as a colleague's or a read-only mount, is scored all the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scored import again, make_run, results

from ddpm_ema import config
from ddpm_ema.errors import UserError


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

"""A stop or a kill while torch.compile works leaves a run that can be started again, and one message."""

import functools
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest
import torch

from ddpm_ema import compiling
from ddpm_ema.errors import StoppedError, UserError


class TorchDynamoException(RuntimeError):
    """Stands for torch's, which is known by its name."""


def test_libraries_that_a_kill_cut_off_are_deleted_and_whole_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = next(Path(numpy.__file__).parent.rglob("_multiarray_umath*.so")).read_bytes()
    contents = {
        "whole": library,
        "none": b"",
        "zeros": bytes(4096),
        "begun": library[:4000],
        "half": library[: len(library) // 2],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.so").write_bytes(content)
        os.utime(tmp_path / f"{name}.so", (1, 1))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiling.prepare("training.compile")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.so"]
    said = capsys.readouterr().err
    assert said.count("deleted, to be compiled again") == 4
    assert "compiling the network (training.compile)" in said


def test_a_library_whose_linker_may_be_at_work_gets_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = next(Path(numpy.__file__).parent.rglob("_multiarray_umath*.so")).read_bytes()
    path = tmp_path / "new.so"
    path.write_bytes(library[:4000])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: path.write_bytes(library) if seconds > 5 else None)
    compiling.prepare("training.compile")
    assert path.read_bytes() == library


def test_two_remarks_of_torch_are_not_shown_and_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(cpp_extension.logger, "handlers", [handler])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        compiling.prepare("training.compile")
        half = functools.lru_cache(lambda: 0.5)
        torch.compile(lambda x: x * half(), backend="eager")(torch.ones(2))
        cpp_extension._find_cuda_home()
        warnings.warn("Dynamo detected something else", stacklevel=1)
        cpp_extension.logger.warning("the compiler is %s", "old")
    assert [str(warning.message) for warning in shown] == ["Dynamo detected something else"]
    assert [record.getMessage() for record in records] == ["the compiler is old"]


def test_a_compiler_killed_by_a_stop_is_a_stop() -> None:
    stop: Any = SimpleNamespace(requested=True, reason="SIGTERM")
    with (
        pytest.raises(StoppedError, match=r"stopped by SIGTERM while torch\.compile worked"),
        compiling.explained("training.compile", stop),
    ):
        raise TorchDynamoException("C++ compile error")


def test_compiling_that_fails_for_good_names_the_setting_and_other_errors_pass() -> None:
    with (
        pytest.raises(UserError, match=r"training\.compile: .* fails here \(CppCompileError.*\); set it to false"),
        compiling.explained("training.compile"),
    ):
        raise TorchDynamoException("backend='inductor' raised:\nCppCompileError: C++ compile error\nCommand: g++ ...")
    with pytest.raises(ZeroDivisionError), compiling.explained("training.compile"):
        raise ZeroDivisionError


PROGRAM = """
import sys, torch
from ddpm_ema import cli, compiling
from ddpm_ema.distributed import StopFlag
network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
network.compile()
def run():
    compiling.prepare("training.compile")
    with StopFlag() as stop, compiling.explained("training.compile", stop):
        network(torch.ones(3, 4)).sum().backward()
    print("stepped")
sys.exit(cli.guard(run))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_stop_of_the_whole_group_while_it_compiles_is_75_and_the_start_after_a_kill_compiles_again(tmp_path: Path):
    program = start(tmp_path)
    while program.poll() is None and not list(tmp_path.rglob("*.main.cpp")):
        time.sleep(0.05)
    while program.poll() is None:
        compilers = [p for p in psutil.Process(program.pid).children(recursive=True) if "cc1plus" in p.name()]
        if compilers:  # Slurm and timeout signal the compiler, too
            os.killpg(program.pid, signal.SIGTERM)
            psutil.wait_procs(compilers)
        time.sleep(0.05)
    output, _ = program.communicate(timeout=120)
    assert (program.returncode, "Traceback" in output) == (75, False), output

    assert "stepped" in start(tmp_path).communicate(timeout=300)[0]
    for library in tmp_path.rglob("*.so"):
        library.write_bytes(library.read_bytes()[:4000])
        os.utime(library, (1, 1))
    again = start(tmp_path)
    output, _ = again.communicate(timeout=300)
    assert (again.returncode, "Traceback" in output) == (0, False), output
    assert "was cut off by a kill" in output

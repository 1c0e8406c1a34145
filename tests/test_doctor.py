"""The doctor finds what would stop a run, says what to do, and leaves nothing behind."""

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ddpm_ema import doctor
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DONE


def levels(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


def test_a_fit_machine_gets_exit_code_0_and_a_clean_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--output-dir", str(tmp_path / "runs"), "--json"]) == EXIT_DONE
    report = json.loads(capsys.readouterr().out)
    assert report["fit"] is True
    subjects = {finding["subject"] for finding in report["findings"]}
    assert {"versions", "gloo", "nccl", "shared memory", "caches", "output folder"} <= subjects
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("package", "level"), [("pyyaml", "failure"), ("torch", "failure"), ("scipy", "warning")])
def test_a_package_that_is_missing_is_a_failure_where_nothing_could_train_without_it(
    package: str, level: str, monkeypatch: pytest.MonkeyPatch
):
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = {finding.subject: finding for finding in doctor.check_packages()}
    assert found["packages"].level == level
    extra = "train" if level == "failure" else "score"
    assert f"{package}; pip install 'ddpm_ema[{extra}]'" in found["packages"].text


def test_an_output_folder_that_cannot_be_made_is_a_failure_that_names_it(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    [finding] = doctor.check_output(file / "runs")
    assert finding.level == "failure"
    assert str(file / "runs") in finding.text
    assert "--output-dir" in finding.text


def test_a_failure_ends_in_exit_code_2(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    assert doctor.main(["--output-dir", str(file), "--device", "cpu"]) == EXIT_BAD_INPUT


def test_a_slow_output_folder_is_a_warning_that_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SLOW_MIB_PER_SECOND", float("inf"))
    [finding] = doctor.check_output(tmp_path, megabytes=1)
    assert finding.level == "warning"
    assert "checkpoints.every" in finding.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_asked_for_and_absent_is_a_failure_and_cpu_is_not():
    assert levels(list(doctor.check_device("cuda"))) == {"device": "failure"}
    assert levels(list(doctor.check_device("cpu"))) == {"device": "ok"}


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_does_not_exist_is_a_failure_that_lists_those_that_do(
    variable: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, "nosuch0")
    findings = {finding.subject: finding for finding in doctor._check_interfaces()}
    assert findings[variable].level == "failure"
    assert "nosuch0" in findings[variable].text
    assert "lo" in findings[variable].text


def test_nccl_takes_prefixes_and_exclusions_of_interfaces_and_gloo_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")
    assert "NCCL_SOCKET_IFNAME" not in levels(list(doctor._check_interfaces()))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert "NCCL_SOCKET_IFNAME" not in levels(list(doctor._check_interfaces()))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth")
    assert levels(list(doctor._check_interfaces()))["NCCL_SOCKET_IFNAME"] == "failure"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")
    assert levels(list(doctor._check_interfaces()))["GLOO_SOCKET_IFNAME"] == "failure"


def test_a_cache_folder_that_cannot_be_written_is_a_failure_that_names_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", "/proc/self/nowhere")
    finding = next(iter(doctor.check_caches()))
    assert finding.level == "failure"
    assert "HF_HOME=/proc/self/nowhere" in finding.text


def test_the_compiler_is_the_one_that_torch_compile_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # torch then takes no other
    [finding] = doctor.check_compiler()
    assert finding.level == "warning"
    monkeypatch.setenv("CXX", "sh")
    [finding] = doctor.check_compiler()
    assert "C++" not in finding.text


def test_a_missing_compiler_is_a_warning_and_fails_only_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    [finding] = doctor.check_compiler()
    assert finding.level == "warning"
    assert "training.compile" in finding.text
    for name in ("check_device", "check_communication", "check_shared_memory"):
        monkeypatch.setattr(doctor, name, lambda *_: iter(()))
    assert doctor.main(["--output-dir", str(tmp_path)]) == EXIT_DONE
    assert doctor.main(["--output-dir", str(tmp_path), "--strict"]) == EXIT_BAD_INPUT


def test_shared_memory_that_is_missing_is_a_failure(tmp_path: Path):
    assert levels(list(doctor.check_shared_memory(tmp_path / "nowhere"))) == {"shared memory": "failure"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_the_64_mib_that_containers_get_are_a_warning(tmp_path: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        [finding] = doctor.check_shared_memory(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert finding.level == "warning"
    assert "--shm-size" in finding.text


def test_a_check_that_breaks_is_a_failure_and_the_others_still_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise OSError("libcuda says no")

    monkeypatch.setattr(doctor, "check_communication", broken)
    found = levels(list(doctor.examine(tmp_path, "cpu")))
    assert found["communication"] == "failure"
    assert found["output folder"] == "ok"

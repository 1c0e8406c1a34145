"""`ddpm-ema`: one command for every stage, quick to answer, with one message and one exit code for a mistake."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_ema import cli, config
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [*cli.STAGES, *cli.TOOLS]


def python(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **more)  # type: ignore[call-overload,no-any-return]


def test_help_lists_every_command() -> None:
    done = python("-m", "ddpm_ema", "--help")
    assert done.returncode == EXIT_DONE
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == COMMANDS


def test_a_stage_without_its_extra_names_it() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('pydantic', 'tqdm')); from ddpm_ema import cli; "
    done = python("-c", code + "sys.exit(cli.main(['train']))")
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_BAD_INPUT, 1), done.stderr
    assert "pip install 'ddpm_ema[train]'" in done.stderr


def test_help_waits_for_no_heavy_library() -> None:
    code = f"""
import sys
from ddpm_ema.cli import main
for command in {[[], *([name] for name in COMMANDS)]}:
    try:
        code = main([*command, "--help"])
    except SystemExit as end:
        code = end.code
    heavy = [name for name in ("torch", "diffusers", "matplotlib", "accelerate") if name in sys.modules]
    print("answered", *command, code, heavy)
"""
    done = python("-c", code)
    assert "usage: ddpm-ema COMMAND" in done.stdout, done.stderr
    for command in COMMANDS:
        assert f"usage: ddpm-ema {command} [" in done.stdout
        assert f"answered {command} 0 []\n" in done.stdout


@pytest.mark.parametrize(
    ("stage", "first"),
    [("features", "data"), ("train", "training"), ("score", "evaluation"), ("sweep", "evaluation.sweep")],
)
def test_help_of_a_stage_lists_every_setting_with_its_meaning_its_own_first(
    stage: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([stage, "--config", str(ROOT / "configs" / "digits.yaml"), "--help", "--seed", "3"]) == EXIT_DONE
    text = capsys.readouterr().out
    headings = [line.partition(":")[0] for line in text.splitlines() if line[:1].islower() and ": " in line]
    assert headings[:2] == ["usage", first]
    for key, _ in config.effects():
        assert f"  --{key} " in text
    words = " ".join(text.split())
    assert "--training.steps INT > 0 Optimizer steps of the whole run. (default: 3000; here: 1500)" in words
    assert "--evaluation.sampler ddpm | ddim | dpm_solver++" in words
    assert "--evaluation.steps INT > 0 ... | last | all" in words
    assert "(default: 0; here: 3)" in words
    assert '"power_0_05": {"kind": "power_function", "std": 0.05}' in words


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name a command"),
        (["scor"], "'scor' is not a command; did you mean 'score'?"),
        (["train"], "digits.yaml"),
        (["train", "--training.steps", "5"], "--data.path FOLDER"),
        (["features"], "--data.path FOLDER"),
        (["train", "--data.path"], "--data.path: takes one folder"),
        (["train", "--data.path", "my", "cats"], "takes one folder; quote a name with spaces: 'my cats'"),
        (["train", "--data.path", "nowhere"], "nowhere does not exist"),
        (["score", "runs/none", "--dry-run"], "no such run directory"),
        (["sweep", "--config", "configs/digits.yaml"], "--evaluation.sweep.stds 0.02:0.25:12"),
        (["score", "--evaluation.stepz", "3"], "evaluation.stepz: unknown setting; did you mean 'steps'?"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert captured.out == ""


def test_a_stage_gets_the_settings_of_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    seen: list[config.Config] = []
    monkeypatch.setattr(cli, "STAGES", {"score": cli.Stage("", seen.append, ())})
    assert cli.main(["score", str(tmp_path), "--evaluation.num_images", "10"]) == EXIT_DONE
    assert (seen[0].output_dir, seen[0].seed, seen[0].evaluation.num_images) == (tmp_path, 7, 10)


def test_a_script_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for script in (ROOT / "scripts").glob("*.py"):
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == EXIT_DONE
        assert capsys.readouterr().out.startswith("usage: ddpm-ema ")


@pytest.mark.parametrize("command", [["score", "--help"], ["export", "--help"]])
def test_a_reader_who_is_gone_is_no_error(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_ema", *command], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_an_error_of_its_own() -> None:
    code = "from ddpm_ema import cli\ndef fail(): raise BrokenPipeError('a worker is gone')\ncli.guard(fail)"
    assert "a worker is gone" in python("-c", code).stderr


def test_guard_prints_one_message_and_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("what, where, what to do")

    assert cli.guard(fail) == 2
    assert cli.guard(signal.raise_signal, signal.SIGINT) == 130
    assert cli.guard(lambda: 75) == 75
    assert cli.guard(lambda: [1, 2]) == 0
    captured = capsys.readouterr()
    assert captured.err == "error: what, where, what to do\nstopped by SIGINT\n"
    assert captured.out == ""

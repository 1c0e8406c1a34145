"""Every command and code block of the documentation runs as printed, or says why it does not."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
RUN = {"bash", "python"}
SHOWN = {"text", "json", "yaml"}
# The commands run as printed; the settings files that they name are shortened.
SHORT: dict[str, dict[str, Any]] = {
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "attention": [False, True], "norm_num_groups": 4},
    "training": {
        "steps": 12,
        "batch_size": 8,
        "warmup_steps": 2,
        "sample_every": 6,
        "sample_images": 2,
        "log_every": 4,
    },
    "checkpoints": {"every": 6, "keep_every": 6, "snapshots_every": 3},
    "evaluation": {"num_images": 40, "num_inference_steps": 3, "groups": 10},
}


A_RUN = "ddpm-ema features --config configs/digits.yaml && ddpm-ema train --config configs/digits.yaml"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("text")].count("\n") + 1, found["language"], found["text"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


def run_python(code: str, block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + code, str(block.page), "exec"), names)


def run_bash(block: Block, folder: Path) -> None:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a clone holds, with short settings, and a folder of small photographs of two classes."""
    for name in ("scripts", "benchmarks", "examples", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("digits", "image_folder"):
        path = tmp_path / "configs" / f"{name}.yaml"
        settings = yaml.safe_load(path.read_text())
        for section, values in SHORT.items():
            settings.setdefault(section, {}).update(values)
        path.write_text(yaml.safe_dump(settings))
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(40):
            pixels = random.integers(0, 256, (4, 4, 3)).repeat(9, 0).repeat(9, 1).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{index}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_as_printed_one_after_another(page: Path, checkout: Path, monkeypatch) -> None:
    monkeypatch.chdir(checkout)
    if page.stem != "README" and any("runs/digits" in block.text for block in blocks(page) if block.reason is None):
        run_bash(Block(page, 0, "bash", A_RUN, None), checkout)  # a page goes on where README ends
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        if block.reason is None and block.language == "bash":
            run_bash(block, checkout)
        elif block.reason is None and block.language == "python":
            run_python(block.text, block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_is_of_a_language_that_is_run_or_only_shown(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page)), "a fence without a language, or one that is not closed"
    assert {block.language for block in blocks(page)} <= RUN | SHOWN
    outside = BLOCK.sub("", text)
    commands = re.findall(r"^ {4,}(?:make|python|accelerate|ddpm-ema|pip|torchrun|--\w).*$", outside, re.M)
    assert not commands, "a command outside of a fence is not run"


def test_the_blocks_that_are_not_run_say_why() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.reason and block.language in RUN]
    for block in skipped:
        print(f"not run: {block}: {block.reason}")
    assert all(len(block.reason or "") > 10 for block in skipped)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # as where it is run: they share `environment.py`
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(module)
    return module


def test_the_tables_of_results_and_benchmarks_are_what_the_recorded_files_say() -> None:
    page = [line for name in ("results", "scoring") for line in (ROOT / "docs" / f"{name}.md").read_text().splitlines()]
    own = ("study", "photographs", "photographs_seeds", "error_rates_seeds")
    for script, name in (*zip(own, own, strict=True), ("photographs", "photographs_32")):
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert all(line in page for line in benchmark(script).markdown(results).splitlines()), name
    made = benchmark("page")
    assert "\n".join(made.parts()) == made.PAGE.read_text()


def test_the_page_of_settings_is_the_one_that_the_code_makes() -> None:
    made = benchmark("settings_page").page()
    assert (ROOT / "docs" / "settings.md").read_text() == made, "python benchmarks/settings_page.py > docs/settings.md"

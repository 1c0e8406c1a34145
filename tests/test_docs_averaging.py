"""The code blocks of docs/averaging.md run, in order, in one namespace; its table of rules and its pictures are true."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from ddpm_ema.averaging import PROFILES
from ddpm_ema.averaging.plan import plans
from ddpm_ema.reconstruction import WANTED, name_of

PAGE = Path(__file__).parents[1] / "docs" / "averaging.md"


def code_blocks() -> list[tuple[int, str]]:
    """(line it starts at, code) of every Python block that is not marked as not run."""
    text = PAGE.read_text(encoding="utf-8")
    matches = re.finditer(r"^(?<! -->\n)```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match.group(1)) for match in matches]


@pytest.fixture(scope="module")
def printed() -> str:
    """What the blocks print, run as they stand."""
    namespace: dict[str, object] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for line, code in code_blocks():
            # Blank lines in front keep the page's own line numbers in a traceback.
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
    return output.getvalue()


def test_the_docs_code_runs_as_it_stands(printed: str) -> None:
    assert len(code_blocks()) >= 8
    assert printed


@pytest.mark.parametrize(
    "promised",
    [
        "PowerFunction(std=0.1) after 10000 steps: centred at 88.8% of training, sigma_rel 0.1000, averaging 2361 steps",
        "74.1% still the initial weights",
        "ema_0_9999                 10,000           1,497        7.1%            86.1%",
        "warning: ema_0_9999 will still hold 86% of the initial weights after 1,500 steps: use bias_corrected or power_function",
        "update(step=200, num_steps=1) does not follow the update at step 100: expected num_steps=100",
        "0.9991",
    ],
)
def test_the_docs_code_prints_what_the_page_says(printed: str, promised: str) -> None:
    assert promised in printed
    assert f"# {promised}" in PAGE.read_text(encoding="utf-8")


def test_the_docs_name_every_kind_of_profile() -> None:
    named = set(re.findall(r"`([a-z_]+)`", PAGE.read_text(encoding="utf-8")))
    assert set(PROFILES) <= named


def test_the_plans_that_the_page_shows_are_those_that_are_made() -> None:
    table = re.search(r"\| wanted at the end .*?\n\n", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert table is not None
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table[0].strip().splitlines()]
    for column, (steps, files) in enumerate([(1500, 357), (100_000, 140), (800_000, 140)], start=1):
        best = plans(steps, WANTED, files)[0]
        errors = dict(zip(map(name_of, WANTED), best.errors, strict=True))
        assert [rows[3][column], rows[4][column]] == [f"{best.every:,}", str(best.num_files)]
        for row in rows[5:]:
            for name in re.findall(r"`(\w+)`", row[0]):
                error = errors[name]
                assert row[column] == ("keep it" if error >= 0.05 else f"{error:.2%}"), name


def test_the_docs_pictures_exist() -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / picture).stat().st_size > 1000, picture

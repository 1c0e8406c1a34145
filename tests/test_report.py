"""report.html: the right answer from a run directory, whatever is missing from it, in one file that needs no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_run
import pytest

from ddpm_ema import report
from ddpm_ema.errors import UserError
from ddpm_ema.numbers import figure, with_error
from ddpm_ema.report.drawing import looks
from ddpm_ema.report.page import duration
from ddpm_ema.report.record import Scoring, read
from ddpm_ema.report.verdict import judge

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text; notes every tag that does not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.wrong: list[str] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(report.write(run).read_text(encoding="utf-8"))


def scored(tmp_path: Path, **changes: Any) -> Scoring:
    """One scoring as read back from disk."""
    fake_run.write_results(tmp_path / "run", fake_run.results(**changes))
    found = read(tmp_path / "run").main
    assert found is not None
    return found


def test_the_answer_comes_first_and_names_the_copy_its_gain_and_whether_the_next_is_told_apart(page: Page) -> None:
    answer = (
        "Ship power_0_10 : its distance is 24.7 ± 2.0 below raw \u2019s; "
        "the difference from ema_0_999_debiased (0.40 ± 0.60) is not significant."
    )
    assert answer in page.text
    assert page.text.index("Ship") < page.text.index("The copies, best first")


def test_rows_stand_from_the_lowest_corrected_distance_to_the_highest(page: Page) -> None:
    table = page.text[page.text.index("best first") : page.text.index("The run")]
    expected = ["power_0_10", "ema_0_999_debiased", "power_0_05", "ema_0_999 ", "ema_0_9999_debiased", "raw "]
    places = [table.rindex(name) for name in expected]
    assert places == sorted(places)
    assert "2.70 ± 0.80 3.90 \u221224.7 ± 2.0 \u221228.9 to \u221220.5 better 0.0039 0.889 0.741" in table


def test_the_page_needs_no_other_file_and_runs_no_script(run: Path, page: Page) -> None:
    source = (run / "report.html").read_text()
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", source)
    assert set(re.findall(r"https?://[^\s\"'<]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_the_markup_nests_and_no_id_stands_twice(page: Page) -> None:
    assert page.wrong == []
    assert page.stack == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")}
    assert references <= set(ids)


def test_every_picture_says_what_it_shows(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) >= 10
    assert all(attributes["aria-label"] for attributes in drawings)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_grids_are_inside_the_page(page: Page) -> None:
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4  # the scoring's, and the first, middle and last of training
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)


def test_what_was_trained_on_what_and_how_long_is_said(page: Page) -> None:
    for fact in (
        "digits, 1,797 of them, 8×8 grey",
        "701 thousand parameters",
        "3,000, 64 images each",
        "2 min 36 s",
        "on 2 processes",
    ):
        assert fact in page.text


def test_an_average_that_still_holds_initial_weights_says_how_much(page: Page) -> None:
    """e^-3 of a plain 0.999 average after 3000 steps; the debiased ones hold none."""
    assert re.findall(r"\d+% still the initial weights", page.text) == ["5% still the initial weights"]


def test_how_the_numbers_were_made_is_said(page: Page) -> None:
    for fact in (
        "dpm_solver++, 25 network evaluations an image",
        "ab" * 32,
        "train: digits, 1797 images",
        "torch 2.15.0",
    ):
        assert fact in page.text


def test_the_command_that_exports_the_best_copy_names_its_step_and_is_left_out_for_an_ensemble(
    page: Page, tmp_path: Path
) -> None:
    assert re.search(r"python scripts/export.py \S+ power_0_10@3000 --output FOLDER", page.text)
    rows = two_rows(5.0, 10.0, 0.6)
    rows[1]["weights"] = "raw+ema"
    fake_run.write_results(tmp_path, fake_run.results(rows=rows, pairs=[]))
    text = Page(report.write(tmp_path).read_text()).text
    assert "Ship raw+ema" in text
    assert "scripts/export.py" not in text


def test_a_copy_has_one_colour_in_the_table_and_in_every_legend(run: Path) -> None:
    source = (run / "report.html").read_text()
    variable = looks(read(run).copies)["power_0_10"].variable
    assert f'background:var({variable})"></span>power_0_10' in source
    legends = re.findall(r"stroke:var\((--c\d)\)[^<]*/></svg>power_0_10<", source)
    assert len(legends) >= 3
    assert set(legends) == {variable}


def test_no_drawing_colour_escapes_the_style_sheet(run: Path) -> None:
    """What stayed a literal colour would not follow light and dark."""
    source = (run / "report.html").read_text()
    style, body = source.split("</style>", 1)
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'base64,[^"]+', "", body))
    for variable in set(re.findall(r"var\((--[\w]+)\)", body)):
        assert f"{variable}:" in style


def test_more_copies_than_colours_are_still_told_apart() -> None:
    found = looks(["raw", *(f"ema_{i}" for i in range(20))])
    assert len(set(found.values())) == 21


def test_only_a_scoring_that_says_fid_is_called_fid(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path / "fd", fake_run.results())
    assert "FID" not in Page(report.write(tmp_path / "fd").read_text()).text.replace(
        "no FID, not comparable with published FIDs", ""
    )
    fake_run.write_results(tmp_path / "fid", fake_run.results(metric="fid", extractor="inception-v3-compat"))
    text = Page(report.write(tmp_path / "fid").read_text()).text
    assert "FID, bias removed" in text
    assert "FD (" not in text


HOSTILE = '<script>alert("x")</script>&amp;\u2028'


def test_names_warnings_and_settings_are_shown_and_never_run(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path / "a<b>")
    content = fake_run.results(warnings=[HOSTILE], reference=HOSTILE, extractor=HOSTILE, sampler=HOSTILE)
    content["rows"][0]["weights"] = HOSTILE
    content["num_images"] = 10**6
    fake_run.write_results(run, content, digest="ffff")
    (run / "config.yaml").write_text(f"data: {{source: '{HOSTILE}'}}\n")
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert page.wrong == []
    assert page.text.count("alert(") >= 5


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("scores", "scripts/sample_and_score.py --config"),
        ("metrics.jsonl", "metrics.jsonl holds no curve yet."),
        ("checkpoints", "Ship power_0_10"),
        ("samples", "Ship power_0_10"),
        ("config.yaml", "701 thousand parameters"),
    ],
)
def test_whatever_is_missing_the_rest_is_shown(tmp_path: Path, gone: str, says: str) -> None:
    import shutil

    run = fake_run.make_run(tmp_path / "run")
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(report.write(run).read_text())
    assert says in page.text
    assert page.wrong == []


def test_a_run_that_has_only_settings_is_told_to_train(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {steps: 10}\n")
    text = Page(report.write(tmp_path).read_text()).text
    assert "Nothing has been trained yet." in text
    assert f"accelerate launch scripts/train.py --config {tmp_path}/config.yaml" in text


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        report.write(tmp_path / "absent")


def test_damaged_files_are_named_and_passed_over(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path / "run")
    (run / "scores" / "00003000-0123456789ab" / "results.json").write_text('{"schema": 1, "rows": [')
    other = fake_run.write_results(run, fake_run.results(schema=7), digest="beef")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3050, "loss": 0.0')
    text = Page(report.write(run).read_text()).text
    assert "scores/00003000-0123456789ab/results.json could not be read" in text
    assert f"scores/{other.name}/results.json was passed over: schema 7" in text
    assert "At step 2,000" in text
    assert "Training has gone on to step 3,000 since step 2,000 was scored" in text


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    content = fake_run.results()
    content["rows"][1] |= {"frechet_distance": float("nan")}
    content["rows"][2] |= {"kid": float("nan"), "stderr": None, "recall": None}
    scoring = scored(tmp_path, rows=content["rows"])
    assert content["rows"][1]["weights"] not in [row.weights for row in scoring.rows]
    assert "nan" not in Page(report.write(tmp_path / "run").read_text()).text.lower()


def test_a_step_logged_twice_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [
        {"step": 50, "loss": 9.0, "seconds": 100.0},
        {"step": 50, "loss": 1.0, "seconds": 2.0},
        {"step": 100, "seconds": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = read(tmp_path)
    assert [(row["step"], row["seconds"]) for row in record.training] == [(50, 2.0), (100, 3.0)]


def test_the_scoring_of_the_last_step_with_most_images_answers(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path, fake_run.results(1000, 50_000), digest="a")
    fake_run.write_results(tmp_path, fake_run.results(3000, 500), digest="b")
    fake_run.write_results(tmp_path, fake_run.results(3000, 6000), digest="c")
    main = read(tmp_path).main
    assert main is not None
    assert (main.step, main.source["num_images"]) == (3000, 6000)


def test_scorings_made_otherwise_never_stand_on_one_curve(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path, fake_run.results(3000))
    fake_run.write_results(tmp_path, fake_run.results(2000, extractor="inception-v3-compat"))
    assert "One step has been scored." in Page(report.write(tmp_path).read_text()).text
    fake_run.write_results(tmp_path, fake_run.results(1000))
    assert "One step has been scored." not in Page(report.write(tmp_path).read_text()).text


def test_earlier_steps_named_with_at_stand_on_their_copys_curve(tmp_path: Path) -> None:
    content = fake_run.results()
    content["rows"].append(
        {"weights": "ema_0_999@1500", "frechet_distance": 20.0, "frechet_distance_unbiased": 19.0, "stderr": 1.0}
    )
    fake_run.write_results(tmp_path, content)
    source = report.write(tmp_path).read_text()
    assert re.search(r'aria-label="FD \(classifier\) over training step of ema_0_999"', source)


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        report.write(run, target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "old"


def test_the_report_loads_no_torch(run: Path, tmp_path: Path) -> None:
    """The package's own __init__ offers the averaging library, which is torch; the report adds nothing to that."""
    program = f"""
import sys, types
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "diffusers", "accelerate"):
            raise AssertionError("the report imports " + name)
sys.meta_path.insert(0, Refuse())
package = sys.modules["ddpm_ema"] = types.ModuleType("ddpm_ema")
package.__path__ = [{str(Path(report.__file__).parents[1])!r}]
from ddpm_ema import report
report.write({str(run)!r}, {str(tmp_path / "page.html")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_the_command_prints_the_answer_and_where_the_page_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([str(run), "--output", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert printed.startswith("Ship power_0_10: its distance is 24.7 ± 2.0 below raw")
    assert printed.rstrip().endswith(f"wrote {tmp_path / 'page.html'}")


def interval(delta: float, stderr: float) -> dict[str, Any]:
    return {"delta_vs_raw": delta, "delta_stderr": stderr, "interval": [delta - 2 * stderr, delta + 2 * stderr]}


def two_rows(average: float, raw: float, stderr: float) -> list[dict[str, Any]]:
    rows = [{"weights": "raw", "frechet_distance": raw, "frechet_distance_unbiased": raw, "stderr": 1.0}]
    row = {"weights": "ema", "frechet_distance": average, "frechet_distance_unbiased": average, "stderr": 1.0}
    return [*rows, row | interval(average - raw, stderr)]


def test_an_average_whose_gain_is_not_real_is_not_recommended(tmp_path: Path) -> None:
    sentence = judge(scored(tmp_path, rows=two_rows(9.6, 10.0, 0.6), pairs=[])).sentence
    assert sentence.startswith(
        "No average is shown to be better than raw: the best, ema, is 0.40 ± 0.60 below it, which is not significant."
    )


def test_raw_is_recommended_where_averages_are_really_worse(tmp_path: Path) -> None:
    verdict = judge(scored(tmp_path, rows=two_rows(14.0, 10.0, 0.6), pairs=[]))
    assert verdict.best == "raw"
    assert verdict.sentence.startswith("Ship raw: no average is better: the nearest, ema, is 4.00 ± 0.60 above it.")


def test_raw_and_an_average_that_cannot_be_told_apart_are_both_named(tmp_path: Path) -> None:
    verdict = judge(scored(tmp_path, rows=two_rows(10.4, 10.0, 0.6), pairs=[]))
    assert verdict.sentence.startswith("Ship raw or ema: the difference between them (0.40 ± 0.60) is not significant")


def test_a_single_copy_is_compared_with_nothing(tmp_path: Path) -> None:
    assert judge(scored(tmp_path, names=("raw",))).sentence.startswith("Only raw was scored")


def test_without_raw_the_lowest_is_named_with_its_distance(tmp_path: Path) -> None:
    sentence = judge(scored(tmp_path, names=("power_0_05", "power_0_10"))).sentence
    assert sentence == (
        "Ship power_0_10: its FD (classifier) is 2.70 ± 0.80, the lowest of those scored; "
        "the difference from power_0_05 (2.20 ± 0.60) is significant."
    )


def test_an_unpaired_runner_up_is_not_called_real_or_unreal(tmp_path: Path) -> None:
    sentence = judge(scored(tmp_path, pairs=[])).sentence
    assert "ema_0_999_debiased comes 0.40 behind, no paired error of that was computed" in sentence


def test_every_copy_that_ties_with_the_best_is_named(tmp_path: Path) -> None:
    content = fake_run.results()
    for pair in content["pairs"]:
        if {pair["a"], pair["b"]} == {"power_0_05", "power_0_10"}:
            pair["interval"] = [-0.5, 3.0]
    notes = judge(scored(tmp_path, pairs=content["pairs"])).notes
    assert notes == ("Within what these images can tell, ema_0_999_debiased and power_0_05 are as good as power_0_10.",)


def test_a_width_of_the_sweep_that_beats_every_copy_is_mentioned_with_its_caveat(tmp_path: Path) -> None:
    notes = judge(scored(tmp_path, sweep=fake_run.sweep_rows())).notes
    assert notes[-1].startswith("The sweep found power_0_140 lower still, at 2.55 ± 0.78; the lowest of many")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.23, 0.94, "12.23 ± 0.94"),
        (24.7, 2.04, "24.7 ± 2.0"),
        (0.412, 0.056, "0.412 ± 0.056"),
        (-3.2, 0.5, "\u22123.20 ± 0.50"),
        (123.4, 45.6, "123 ± 46"),
        (1.5, None, "1.50"),
        (None, 0.5, "\u2013"),
    ],
)
def test_figures_have_as_many_digits_as_their_error_supports(
    value: float | None, error: float | None, text: str
) -> None:
    assert with_error(value, error) == text


def test_a_rounded_zero_has_no_sign() -> None:
    assert figure(-0.001, 1) == "0.0"
    assert figure(0.001, 1, signed=True) == "0.0"


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (155, "2 min 35 s"), (12_000, "3 h 20 min")])
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text

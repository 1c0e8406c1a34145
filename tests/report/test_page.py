"""report.html: the right answer from a run directory, whatever is missing from it, in one file that needs no other."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fake_run
import pytest
from PIL import Image, PngImagePlugin

from ddpm_ema import report
from ddpm_ema.errors import UserError
from ddpm_ema.report.answer import newest
from ddpm_ema.report.gallery import galleries
from ddpm_ema.report.plot import looks
from ddpm_ema.report.reading import read

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
        if not {"style", "script"} & set(self.stack):
            self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return written(run)


def written(run: Path, scoring: str | None = None) -> Page:
    return Page(report.write(run, scoring=scoring)[0].read_text(encoding="utf-8"))


def test_the_answer_comes_first_with_what_it_holds_for_its_gain_and_what_may_be_as_good(page: Page) -> None:
    answer = (
        "With dpm_solver++ in 25 steps and 6,000 images per average: ship power_0_10 . Its FD (classifier) is 24.7 ± 2.0 "
        "below that of raw , a significant difference. The best of this table may also be ema_0_999_debiased . "
        "This holds for step 3,000 of this training run"
    )
    assert answer in page.text
    assert page.text.index(answer) < page.text.index("The weights, lowest distance first: dpm_solver++ 25 steps")


def test_rows_stand_from_the_lowest_corrected_distance_to_the_highest(page: Page) -> None:
    table = page.text[page.text.index("lowest distance first") : page.text.index("Scorings of this run")]
    order = ["power_0_10", "ema_0_999_debiased", "power_0_05", "ema_0_999", "ema_0_9999_debiased"]
    places = [table.index(text) for text in (*(f"{name} better" for name in order), "raw –")]
    assert places == sorted(places)
    assert (
        "power_0_10 better \u221224.7 ± 2.0 \u221228.9 to \u221220.5 2.70 ± 0.80 3.90 0.0039 ± 0.0010 0.8890 ± 0.0050 0.7410 ± 0.0060"
        in table
    )


def test_an_interval_has_the_digits_of_its_error(tmp_path: Path) -> None:
    """At a fixed number of digits, 0.00040 ± 0.00002 stood as `0.000 to 0.000` beside "better"."""
    rows = [fake_run.row("raw", 0.01, 0.001), fake_run.row("a", 0.0096, 0.00002, delta=(-0.0004, 0.00002))]
    fake_run.write_results(tmp_path, fake_run.results(rows=rows))
    assert "better \u22120.000400 ± 0.000020 \u22120.000442 to \u22120.000358 0.009600" in written(tmp_path).text


def test_the_page_needs_no_other_file_and_a_policy_lets_its_own_script_and_style_alone_run(
    run: Path, page: Page
) -> None:
    source = (run / "report.html").read_text()
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\((?!#)|@import|https?://", source)
    (policy,) = (
        attributes["content"] for _, attributes in page.tags if "Content-Security-Policy" in attributes.values()
    )
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; ")


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


def test_each_grid_is_a_switch_between_the_pictures_of_its_weights_which_begins_with_the_recommended_ones(
    page: Page,
) -> None:
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    # Of the scoring, with what lies nearest, and the first, middle and last of training.
    assert len(sources) == 4 * (1 + len(fake_run.FIGURES)) + len(fake_run.FIGURES)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    inputs = [attributes for tag, attributes in page.tags if tag == "input"]
    names = list(fake_run.FIGURES)
    assert [place % len(names) for place, one in enumerate(inputs) if "checked" in one] == [
        names.index("power_0_10")
    ] * 4


def test_what_lies_nearest_to_samples_stands_below_them_and_belongs_to_their_weights_and_number(tmp_path: Path) -> None:
    folder = fake_run.write_results(tmp_path, fake_run.results())
    fake_run.grid(folder / "grid.png")
    for name, columns in (("raw", 16), ("ema_0_999", 5)):
        fake_run.nearest(folder, name, columns)
    (shown,) = galleries(read(tmp_path), read(tmp_path).scorings)
    found = {one.name: one.near for one in shown.pictures if one.near is not None}
    assert [(name, near.name) for name, near in found.items()] == [("raw", fake_run.NEAREST)]
    source = report.write(tmp_path)[0].read_text()
    after = source[source.index('alt="Samples of raw">') :].partition("</div>")[0]
    assert f'<p class="small">{fake_run.NEAREST}</p><img src="{found["raw"].uri}"' in after
    assert source.count(fake_run.NEAREST) == 1


def test_where_they_would_make_the_page_too_large_the_samples_stay(tmp_path: Path, monkeypatch: Any) -> None:
    folder = fake_run.write_results(tmp_path, fake_run.results())
    fake_run.grid(folder / "grid.png")
    (alone,) = galleries(read(tmp_path), read(tmp_path).scorings)
    fake_run.nearest(folder, "raw")
    for room, left in ((alone.size, "what lies nearest to the samples of "), (alone.size - 1, "")):
        monkeypatch.setattr("ddpm_ema.report.gallery.MAX_BYTES", room)
        record = read(tmp_path)
        assert galleries(record, record.scorings) == ([alone] if left else [])
        place = f"scores/{folder.name}/grid.png"
        assert record.problems == [f"{left}{place} was left out: the page would be too large"]


def test_a_row_of_a_grid_is_cut_out_at_the_size_of_its_images(tmp_path: Path) -> None:
    fake_run.grid(tmp_path / "samples" / "step-00000005.png", columns=10)
    (tmp_path / "config.yaml").write_text("seed: 0")
    (shown,) = galleries(read(tmp_path), [])
    original = Image.open(tmp_path / "samples" / "step-00000005.png").convert("RGB")
    for row, picture in enumerate(shown.pictures):
        pixels = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))
        assert pixels.size == (8 * 9 - 1, 2 * 9 - 1)  # lines of eight images of 8 pixels, one pixel between them
        assert pixels.getpixel((9 + 3, 9 + 5))[:3] == original.getpixel(
            (150 + 9 * 34 + 4 * 3 + 2, row * 34 + 4 * 5 + 2)
        )
        assert pixels.getpixel((8, 0))[3] == 0


@pytest.mark.parametrize(
    "places", ['{"names": ["a"]}', "[" * 9999, None, {"top": 9}, {"columns": 999, "width": 9999}, {"scale": 0}]
)
def test_a_grid_that_does_not_say_where_its_rows_lie_is_shown_as_it_is(tmp_path: Path, places: Any) -> None:
    path = tmp_path / "samples" / "step-00000005.png"
    fake_run.grid(path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    given = json.loads(Image.open(path).info["Rows"])
    entries = PngImagePlugin.PngInfo()
    if places is not None:
        entries.add_text("Rows", places if isinstance(places, str) else json.dumps({**given, **places}))
    Image.open(path).save(path, pnginfo=entries)
    (shown,) = galleries(read(tmp_path), [])
    assert shown.whole
    assert written(tmp_path).wrong == []


def test_a_difference_that_is_not_significant_has_a_hollow_mark(tmp_path: Path) -> None:
    for delta, hollow in ((-0.1, 1), (-3.0, 0)):
        rows = [fake_run.row("raw", 5.0), fake_run.row("a", 5.0 + delta, delta=(delta, 0.2))]
        fake_run.write_results(tmp_path, fake_run.results(rows=rows), str(hollow))
        report.write(tmp_path, scoring=str(hollow))
        assert (tmp_path / "report.html").read_text().count('class="mark hollow"') == hollow


@pytest.mark.parametrize(
    ("fact", "count"),
    [
        ("digits, 1,797 images, 8×8 grey", 1),
        ("701,000 parameters", 1),
        ("3,000, 64 images per step", 1),
        ("Time 2:36, 1,214 images/s", 1),
        ("1,214 images/s, 2 processes", 1),
        ("A step of the sampler is one network evaluation per image; image i has the same noise for all weights.", 1),
        ("ab" * 32, 1),
        ("train of digits, 1797 images", 3),
        ("Trained with python 3.11.7, torch 2.15.0", 1),
        ("Scored at step 3,000: dpm_solver++ 25 steps", 1),
        ("While training: step 1500, ddim 50 steps, the same noise in every row", 1),
        ("At step 3,000, dpm_solver++ 25 steps. Averages reconstructed", 1),
        ("With dpm_solver++ in 25 steps and 6,000 images per average.", 1),  # over training
        ("Scored while training (config.yaml: ddim in 50 steps).", 1),
    ],
)
def test_the_page_says_what_was_trained_and_how_everything_on_it_was_sampled_and_scored(
    page: Page, fact: str, count: int
) -> None:
    assert page.text.count(fact) == count


def test_weights_have_one_colour_in_the_table_and_in_every_legend(run: Path) -> None:
    source = (run / "report.html").read_text()
    keys = re.findall(r'<svg class="key (\w+)" (?:(?!</svg>).)*</svg>power_0_10<', source)
    assert len(keys) >= 4
    assert set(keys) == {looks(read(run).names)["power_0_10"].colour}


def test_no_colour_stands_outside_the_style_sheet_which_names_every_one(run: Path) -> None:
    """What stayed a literal colour would not follow light and dark."""
    style, body = (run / "report.html").read_text().split("</style>", 1)
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'base64,[^"]+', "", body))
    for colour in {look.colour for look in looks([str(i) for i in range(7)]).values()} | {"ink", "q0", "q3"}:
        assert f".{colour} {{ color: var(--{colour}); }}" in style
        assert style.count(f" --{colour}:") == 2  # light, dark


def test_more_weights_than_colours_are_still_told_apart_and_twenty_without_colour() -> None:
    found = looks(["raw", *(f"ema_{i}" for i in range(100))])
    assert len(set(found.values())) == 101
    assert len({(look.marker, look.dash) for look in list(found.values())[:20]}) == 20


def test_only_a_scoring_that_says_fid_is_called_fid(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path / "fd", fake_run.results())
    assert "FID" not in written(tmp_path / "fd").text.replace("not an FID, not comparable with published FIDs", "")
    fake_run.write_results(tmp_path / "fid", fake_run.results(metric="fid", extractor="inception-v3-compat"))
    text = written(tmp_path / "fid").text
    assert "FID, bias removed" in text
    assert "FD (" not in text


HOSTILE = '<script>alert("x")</script>&amp;\u2028'


def test_names_warnings_and_settings_are_shown_and_never_run(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path / "a<b>")
    content = fake_run.results(warnings=[HOSTILE], reference=HOSTILE, extractor=HOSTILE, sampler=HOSTILE)
    content["rows"][0]["weights"] = HOSTILE
    content["finished"] = "2026-01-01T00:00:00Z"
    fake_run.write_results(run, content, digest="ffff")
    (run / "config.yaml").write_text(f"data: {{source: '{HOSTILE}'}}\n")
    page = written(run)
    assert [tag for tag, _ in page.tags if tag in ("script", "b")] == ["script"]  # the page's own
    assert page.wrong == []
    assert page.text.count("alert(") >= 5


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("scores", "ddpm-ema score "),
        ("metrics.jsonl", "metrics.jsonl has no curve yet."),
        ("checkpoints", "ship power_0_10"),
        ("samples", "ship power_0_10"),
        ("config.yaml", "701,000 parameters"),
    ],
)
def test_whatever_is_missing_the_rest_is_shown(tmp_path: Path, gone: str, says: str) -> None:
    run = fake_run.make_run(tmp_path / "run")
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = written(run)
    assert says in page.text
    assert page.wrong == []


def test_a_run_that_has_only_settings_is_told_to_train(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {steps: 10}\n")
    text = written(tmp_path).text
    assert "Nothing has been trained yet." in text
    assert f"ddpm-ema train {tmp_path}" in text


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        report.write(tmp_path / "absent")


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    content = fake_run.results()
    content["rows"][1] |= {"frechet_distance": float("nan")}
    content["rows"][2] |= {"kid": float("nan"), "stderr": None, "recall": None}
    fake_run.write_results(tmp_path, content)
    assert len(read(tmp_path).scorings[0].rows) == len(content["rows"]) - 1
    assert "nan" not in written(tmp_path).text.lower()


def test_a_step_logged_twice_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [
        {"step": 50, "loss": 9.0, "seconds": 100.0},
        {"step": 50, "loss": 1.0, "seconds": 2.0},
        {"step": 100, "seconds": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = read(tmp_path)
    assert [(row.step, row.get("seconds")) for row in record.training] == [(50, 2.0), (100, 3.0)]


def test_within_a_step_the_scoring_answers_that_finished_last_in_whatever_time_zone(tmp_path: Path) -> None:
    for digest, finished in (("a", "2025-06-02T00:00:00Z"), ("b", "2025-06-01T23:00:00-08:00")):
        fake_run.write_results(tmp_path, fake_run.results(finished=finished), digest)
    found = newest(read(tmp_path).scorings)
    assert found is not None
    assert found.folder == "00003000-b"


def test_two_scorings_that_contradict_each_other_both_stand_on_the_page_and_nothing_is_recommended(
    tmp_path: Path,
) -> None:
    """What DPM-Solver++ and DDIM did to a folder of photographs."""
    fake_run.write_results(tmp_path, fake_run.results(finished="2026-01-01T00:00:00Z"))
    rows = [
        fake_run.row("power_0_10", 9.0),
        fake_run.row("raw", 5.0),
        fake_run.row("ema_0_999", 1.0, delta=(-4.0, 0.5)),
    ]
    other = fake_run.results(rows=rows, may_be_best=["ema_0_999"], sampler="ddim")
    fake_run.grid(fake_run.write_results(tmp_path, other) / "grid.png", "a title that results.json knows better")
    earlier = fake_run.write_results(tmp_path, fake_run.results(2000, seed=5))
    text = written(tmp_path).text
    assert text.count("No weights are recommended, because scorings of step 3,000 contradict each other.") == 1
    assert "The weights, lowest distance first: dpm_solver++ 25 steps" in text
    assert (
        "The same step, scored with other settings: ddim 25 steps Settings that differ: sampler (dpm_solver++, ddim)."
        in text
    )
    assert "Scored at step 3,000: ddim 25 steps" in text
    assert "ddpm-ema export" not in text
    assert "step 2,000 dpm_solver++ 5 power_0_10 (or ema_0_999_debiased )" in text
    assert f"ddpm-ema report {tmp_path} --scoring {earlier.name}" in text
    assert "At step" not in text
    assert f"Written by ddpm-ema report {tmp_path} ." in text
    chosen = written(tmp_path, earlier.name).text
    assert f"Written by ddpm-ema report {tmp_path} --scoring {earlier.name} ." in chosen
    assert "ship power_0_10 . Its FD" in chosen
    assert "Step 2,000, 6,000 images per average" in chosen


def test_precision_that_noise_reaches_too_is_left_out_and_the_page_says_why(tmp_path: Path, page: Page) -> None:
    assert "Precision is left out" not in page.text
    assert "Precision and recall over the width of the average" in page.text
    assert {"KID", "Precision", "Recall"} <= set(page.texts)
    says = "Precision is left out: images of uniform noise reach 0.98 of it with this extractor and reference."
    found = fake_run.results(precision_of_noise=0.983, **fake_run.swept())
    fake_run.write_results(tmp_path, found | {"warnings": [says]})  # as a scoring warns
    without = written(tmp_path)
    assert without.text.count(says) == 2  # the table, and the sweep's figure
    assert {"KID", "Precision", "Recall"} & set(without.texts) == {"KID", "Recall"}
    assert "Recall over the width of the average" in without.text
    assert "Precision and recall" not in without.text


def test_the_csv_of_the_table_has_every_figure_of_it(page: Page) -> None:
    uri = next(a["href"] or "" for tag, a in page.tags if a.get("download") == "scores.csv")
    head, first, *_ = csv.reader(unquote(uri.partition(",")[2]).splitlines())
    assert (found := dict(zip(head, first, strict=True)))["weights"] == "power_0_10"
    shown = ("kid", "kid_stderr", "precision_stderr", "recall_stderr", "low", "high", "against_raw")
    assert [found[key][:6] for key in shown] == ["0.0039", "0.001", "0.005", "0.006", "-28.9", "-20.5", "better"]


def test_a_sweep_of_emulated_decays_is_drawn_over_their_steps(tmp_path: Path) -> None:
    swept = fake_run.swept()
    for place, row in enumerate(swept["sweep"], start=1):
        length = 250 * place
        del row["std"]
        row |= {"sweep": "cooldown", "cooldown": length, "weights": f"window_{length}_3000"}
    fake_run.write_results(tmp_path, fake_run.results(**swept | {"may_be_best": ["window_1500_3000"]}))
    page = written(tmp_path)
    assert "over the length of the emulated decay" in page.text
    assert "steps of the emulated linear decay of the learning rate" in page.text
    assert "the ring is the lowest over 6,000 images, window_1750_3000." in page.text


def test_a_candidate_of_a_sweep_that_the_answer_names_has_a_row_and_its_warnings_are_the_page_s(tmp_path: Path) -> None:
    swept = fake_run.swept()["sweep"]
    swept[5] |= {"num_images": 2000, "warnings": ["reconstructed poorly"]}
    best = [swept[5]["weights"], "power_0_10"]
    fake_run.write_results(tmp_path, fake_run.results(sweep=swept, may_be_best=best))
    page = written(tmp_path)
    assert f"ship {best[0]} . Its FD" in page.text
    assert f"{best[0]} of a sweep, 2,000 images better" in page.text
    assert f"{best[0]} was scored over 2,000 images." in page.text
    assert page.text.count("of a sweep, ") == 1  # of the twelve
    assert f"{best[0]} : reconstructed poorly" in page.text or f"{best[0]}: reconstructed poorly" in page.text
    assert best[0] in unquote(next(a["href"] for tag, a in page.tags if a.get("download") == "scores.csv"))


def test_better_means_closer_to_these_training_images_where_the_distance_is_from_them(tmp_path: Path) -> None:
    for reading, says in (
        ("training images", "is better, which here means closer to these training images."),
        ("population", "is better. "),
    ):
        fake_run.write_results(tmp_path, fake_run.results(reading=reading), reading[0])
        assert f"A lower FD (classifier) {says}" in written(tmp_path, f"00003000-{reading[0]}").text


def test_saturation_is_warned_of_once_under_the_answer(tmp_path: Path) -> None:
    rows = [fake_run.row("raw", 5.0, saturated=0.9), fake_run.row("a", 4.0, delta=(-1.0, 0.1))]
    fake_run.write_results(tmp_path, fake_run.results(rows=rows))
    text = written(tmp_path).text
    assert text.count("Channel values at 0 or 255: 90% of raw , but 50% of the reference.") == 1
    fake_run.write_results(tmp_path, fake_run.results(4000, rows=rows, reference_saturated=None))
    assert "Channel values" not in written(tmp_path).text


def test_real_images_stand_above_every_grid_of_a_run_that_has_them(tmp_path: Path, page: Page) -> None:
    assert [a["alt"] for tag, a in page.tags if tag == "img"].count("Images of the data set") == 4
    fake_run.grid(fake_run.write_results(tmp_path, fake_run.results()) / "grid.png")
    assert "Real images" not in written(tmp_path).text


def test_the_distance_of_real_images_is_a_line_in_every_plot_of_distances(tmp_path: Path, page: Page) -> None:
    assert "real images (" not in page.text
    floor = {"distance": 1.9, "stderr": 0.2, "interval95": [1.5, 2.3], "num_images": 500, "split": "test"}
    fake_run.write_results(tmp_path, fake_run.results(2000))
    fake_run.write_results(tmp_path, fake_run.results(floor=floor, **fake_run.swept()))
    assert written(tmp_path).text.count("real images (test): 1.90 ± 0.20") == 2  # over the width, over training


def test_scorings_made_otherwise_never_stand_on_one_curve(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path, fake_run.results(3000))
    fake_run.write_results(tmp_path, fake_run.results(2000, extractor="inception-v3-compat"))
    assert "Only one step has been scored with these settings." in written(tmp_path).text
    fake_run.write_results(tmp_path, fake_run.results(1000, versions={"torch": "2.14.0"}))  # of other versions, it may
    assert "Only one step has been scored with these settings." not in written(tmp_path).text


def test_earlier_steps_named_with_at_but_no_ensembles_are_points_of_that_averages_curve(tmp_path: Path) -> None:
    content = fake_run.results()
    content["rows"] += [fake_run.row("ema_0_999@1500", 19.0), fake_run.row("raw@1500+ema_0_999@1500", 30.0)]
    fake_run.write_results(tmp_path, content)
    assert read(tmp_path).names[-1] == "raw@1500+ema_0_999@1500"
    assert 'aria-label="FD (classifier) over training: ema_0_999 19 to 9.1"' in report.write(tmp_path)[0].read_text()


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
    report.main([str(run), "--output", str(tmp_path / "page.html"), "--scoring", read(run).scorings[0].folder])
    printed = capsys.readouterr().out
    assert printed.startswith("With dpm_solver++ in 25 steps and 6,000 images per average: ship power_0_10.")
    assert printed.rstrip().endswith(f"wrote {tmp_path / 'page.html'}")
    assert "At step 1,000" not in printed

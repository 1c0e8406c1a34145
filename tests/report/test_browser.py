"""The page in a real browser, Debian's Chromium: whole at every width, silent, and usable by mouse, by keys and without script."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_run
import pytest

from ddpm_ema import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")
OUTSIDE = """() => [...document.querySelectorAll("body *:not(svg *), svg text")].filter(element => {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const bounded = style.overflowX !== "visible" || element.matches("td");
    const cut = bounded && element.scrollWidth > element.clientWidth + 1;
    const around = (element.closest(".card") ?? document.body).getBoundingClientRect();
    return box.width && (cut || box.left < around.left - 1 || box.right > around.right + 1);
}).map(element => element.outerHTML.slice(0, 80))"""

BESIDE = """() => [...document.querySelectorAll(".switch :is(img, p) + :is(img, p)")].filter(element =>
    element.getBoundingClientRect().top < element.previousElementSibling.getBoundingClientRect().bottom - 3
).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with a sweep, a floor and two scorings of its last step; two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [fake_run.make_run(folder / name) for name in ("a_run_with_a_long_name", "b")]
    name = "a_folder/of_weights_with_a_name_that_is_long_and_has_no_space"
    rows = [fake_run.row(name, 12345.678, 0.01234, delta=(12340.0, 0.5)), *fake_run.results()["rows"]]
    rows.append(fake_run.row("close_to_raw", 27.4, delta=(-6.7e-5, 5.1e-5)))
    floor = {"distance": 1.9, "stderr": 0.2, "interval95": [1.5, 2.3], "num_images": 500, "split": "test"}
    fake_run.write_results(runs[0], fake_run.results(rows=rows, sampler="ddim", floor=floor, **fake_run.swept()), "odd")
    return {"one": report.write(runs[0])[0], "two": report.write(runs)[0]}


def opened(browser: Any, path: Path, **context: Any) -> Any:
    """The page; whatever the browser complains of, a breach of the page's policy too, is an error."""
    page = browser.new_context(**context).new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or page.complaints.append(request.url)
    )
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_is_cut_or_overflows_at_any_width_light_or_dark_and_the_console_is_silent(browser, pages, name) -> None:
    page = opened(browser, pages[name])
    for scheme, width in itertools.product(("light", "dark"), (390, 768, 1440)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OUTSIDE) == [], (scheme, width)
        assert page.evaluate(BESIDE) == [], "samples, label and nearest images stand below each other"
    assert page.complaints == []
    page.context.close()


@pytest.mark.parametrize("script", [True, False])
def test_a_switch_shows_one_average_at_a_time_at_the_same_place_by_mouse_and_by_key(browser, pages, script) -> None:
    page = opened(browser, pages["one"], java_script_enabled=script)
    switch = page.locator(".switch").first

    def shown() -> tuple[str, list[Any]]:
        """Whose samples, and where they and the nearest training images lie."""
        images = [image for image in switch.locator("img").all() if image.is_visible()]
        first, second = (image.get_attribute("alt") for image in images)
        assert second == "The training image nearest to each of these samples"
        boxes, around = [image.bounding_box() for image in images], switch.bounding_box()
        return first, [{**box, "y": box["y"] - around["y"]} for box in boxes]

    first, places = shown()
    assert first == "Samples of power_0_10"
    assert places[1]["y"] > places[0]["y"] + places[0]["height"]
    switch.get_by_text("ema_0_999", exact=True).click()
    assert shown() == ("Samples of ema_0_999", places)
    page.keyboard.press("ArrowRight")
    assert shown() == ("Samples of ema_0_999_debiased", places)
    page.emulate_media(media="print")
    assert all(image.is_visible() for image in switch.locator("img").all())
    page.context.close()


def test_values_of_a_plot_are_read_by_mouse_and_by_key_and_downloaded_and_commands_are_copied(browser, pages) -> None:
    page = opened(browser, pages["one"], permissions=["clipboard-read", "clipboard-write"])
    plot = page.locator("figure.plot", has_text="over the width of the average").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".hit").nth(0).bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    assert plot.locator("output").inner_text() == "power_0_02, σ_rel 0.02: 22.1 ± 1.6"
    plot.locator("svg").first.focus()
    page.keyboard.press("ArrowRight")
    assert plot.locator("output").inner_text().startswith("power_0_04, σ_rel 0.04: ")
    with page.expect_download() as download:
        plot.locator("a.csv").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "series,σ_rel,FD (classifier),standard error"
    assert len(lines) == 13
    page.get_by_role("button", name="Copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("code.command").first.text_content()
    assert page.complaints == []
    page.context.close()

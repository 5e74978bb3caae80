"""Reports in a real browser: headless Chromium opens them from disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import toolkit
from playwright.sync_api import Browser, Page, sync_playwright
from report_runs import HOSTILE, small_study, write_run

from toolkit.report import run_report
from toolkit.runs import Run

pytestmark = pytest.mark.long

DESKTOP, PHONE = (1280, 900), (360, 740)
PAGES = ("hostile", "caltech-like", "unfinished", "study")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for all tests of this file. Without a browser they are skipped, or fail on CI."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = "no Chromium (Debian and Ubuntu: apt-get install --no-install-recommends chromium)"
        if os.environ.get("CI"):
            pytest.fail(f"CI is set, and there is {missing}")
        pytest.skip(missing)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the reports; return their files by name."""
    runs = {
        "hostile": write_run(tmp_path_factory.mktemp("hostile")),
        "caltech-like": _many_classes(tmp_path_factory.mktemp("many")),
        "unfinished": write_run(tmp_path_factory.mktemp("unfinished"), images=False),
    }
    (runs["unfinished"].path / "summary.json").unlink()
    (runs["unfinished"].path / "predictions.csv").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "save", lambda figure, folder, name, kinds: [folder / f"{name}.{k}" for k in kinds])
        for run in runs.values():
            assert toolkit("report", str(run.path)).status == 0
    study = small_study(tmp_path_factory.mktemp("study"))
    assert toolkit("report", str(study.path)).status == 0
    return {**{name: run.report_file for name, run in runs.items()}, "study": study.path / "report.html"}


def _many_classes(folder: Path) -> Run:
    """Write a run with 101 classes of two test images each, every tenth misclassified as the next class."""
    classes = [f"{'a rather long name of ' if number % 9 == 0 else ''}class {number:03d}" for number in range(101)]
    test = [(i // 2, (i // 2 + 1) % 101 if i % 10 == 0 else i // 2, 0.5 + 0.49 * (i % 7) / 7) for i in range(202)]
    return write_run(folder, classes, test=test)


@pytest.fixture
def opened(browser: Browser, files: dict[str, Path]) -> Iterator[Open]:
    """Return a function that opens a report; on teardown, assert that there was no error and no request."""
    errors: list[str] = []
    with ExitStack() as stack:

        def open_(name: str = "hostile", size: tuple[int, int] = DESKTOP, theme: Any = "light") -> Page:
            viewport: Any = {"width": size[0], "height": size[1]}
            context = browser.new_context(viewport=viewport, color_scheme=theme, offline=True)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.on("console", lambda message: errors.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda r: r.url.startswith("data:") or requested.append(r.url))
            page.goto(files[name].as_uri())
            page.wait_for_selector("html[data-ready]")
            return page

        requested: list[str] = []
        yield open_
    assert not errors
    assert all(url.startswith("file:") and Path(url).name == "report.html" for url in requested), requested


# Whole pages


@pytest.mark.parametrize("name", PAGES)
def test_a_page_renders_without_errors_and_fits_desktop_and_phone(opened: Open, name: str) -> None:
    for size in (DESKTOP, PHONE):
        page = opened(name, size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "no horizontal scrolling"
        wide = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((e) => {
              const box = e.getBoundingClientRect();
              return box.width > 0 && box.right > innerWidth + 1 && !e.closest(".scroll");
            }).map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert wide == [], "only elements in a scrolling box are wider than the screen"
        for image in page.query_selector_all("img"):
            image.scroll_into_view_if_needed()
            assert image.evaluate("(e) => e.decode().then(() => e.naturalWidth)") > 0


def test_names_are_escaped_as_text(opened: Open) -> None:
    page = opened()
    assert page.locator("#by-class tbody td:first-child").all_inner_texts() == [HOSTILE[2], HOSTILE[0], HOSTILE[1]]
    assert page.locator("img[src=x]").count() == 0


CONTRAST = """() => {
  const parse = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return [c[0], c[1], c[2], c[3] ?? 1]; };
  const light = (c) => [0, 1, 2].map((i) => c[i] / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const poor = [];
  let seen = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("script, style, .cells svg") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (contrast < 4.5) poor.push(`${contrast.toFixed(2)} ${e.textContent.slice(0, 40)}`);
  }
  return [seen, [...new Set(poor)]];
}"""
"""Number of texts, and those whose contrast is less than WCAG 2.2 (1.4.3) requires."""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["hostile", "study"])
def test_text_has_enough_contrast_in_both_themes(opened: Open, name: str, theme: str) -> None:
    page = opened(name, DESKTOP, theme)
    seen, poor = page.evaluate(CONTRAST)
    assert seen > 300
    assert poor == []


def test_the_theme_follows_the_system_until_the_button_is_pressed(opened: Open) -> None:
    grounds = {}
    for theme in ("light", "dark"):
        page = opened("hostile", DESKTOP, theme)
        grounds[theme] = _background(page)
    page.get_by_role("button", name="Switch to the light theme").click()
    assert _background(page) == grounds["light"] != grounds["dark"]
    page.reload()
    assert _background(page) == grounds["light"], "the choice is stored"


def _background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_text_is_large_enough_to_read_on_a_phone(opened: Open) -> None:
    for name in ("hostile", "caltech-like", "study"):
        page = opened(name, PHONE)
        sizes = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((e) =>
              [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length
              && !e.closest("script, style")).map((e) => {
                const svg = e.closest("svg");
                const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
                return [parseFloat(getComputedStyle(e).fontSize) * scale, e.textContent.slice(0, 40)];
              })"""
        )
        assert len(sizes) > 300
        assert [found for found in sizes if found[0] < 8.5] == [], "CSS pixels"


@pytest.mark.parametrize("name", ["hostile", "study"])
def test_everything_can_be_reached_by_keyboard(opened: Open, name: str) -> None:
    page = opened(name)
    wanted = page.evaluate(
        """() => {
          const found = [...document.querySelectorAll("a[href], button, input, [tabindex='0']")];
          found.forEach((e, i) => { e.dataset.stop = i; });
          return found.filter((e) => e.getClientRects().length).length;
        }"""
    )
    stops = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        stop, outline = page.evaluate(
            "() => [document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline == "solid", "the focus is visible"
        stops.append(int(stop))
    assert stops == list(range(wanted)), "once each, in the order of the page"
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


# Tables


def test_tables_sort_by_a_clicked_column(opened: Open) -> None:
    page = opened("caltech-like")
    for column, title in enumerate(page.locator("#by-class th").all_inner_texts()):
        header = page.locator("#by-class th").nth(column)
        is_number = "number" in (header.get_attribute("class") or "")
        for press, order in enumerate(("descending", "ascending") if is_number else ("ascending", "descending")):
            if press:
                header.locator("button").focus()
                page.keyboard.press("Enter")
            else:
                header.locator("button").click()
            assert header.get_attribute("aria-sort") == order
            cells = page.locator(f"#by-class tbody td:nth-child({column + 1})").all_inner_texts()
            values: list[Any] = [float(re.sub("[ %,]", "", cell)) for cell in cells] if is_number else cells
            assert values == sorted(values, reverse=order == "descending"), title
    assert page.locator("#by-class th[aria-sort=none]").count() == page.locator("#by-class th").count() - 1
    assert page.locator("#by-class tbody tr").count() == 101


def test_tables_and_galleries_filter_by_text(opened: Open) -> None:
    page = opened("caltech-like")
    box = page.locator("[data-filter=by-class]")
    box.fill("LONG name 027")
    shown = page.locator("#by-class tbody tr:visible")
    assert [row.split("\t")[0] for row in shown.all_inner_texts()] == ["a rather long name of class 027"]
    assert page.locator("[data-count=by-class]").inner_text() == "1 of 101 shown"
    box.fill("")
    assert shown.count() == 101
    before = page.locator("#mistake-list li:visible").count()
    page.locator("[data-filter=mistake-list]").fill("class 010")
    after = page.locator("#mistake-list li:visible").all_inner_texts()
    assert 0 < len(after) < before
    assert all("class 010" in text for text in after)


def test_the_recipe_table_highlights_values_that_differ_from_defaults(opened: Open) -> None:
    page = opened()
    rows = page.locator("#recipe-table tbody tr:visible")
    all_ = rows.count()
    page.get_by_role("button", name="differs from default").click()
    assert 5 < rows.count() < all_
    assert page.locator("#recipe-table tr.default:visible").count() == 0
    page.locator("[data-filter=recipe-table]").fill("train.epochs")
    assert rows.count() == 1
    page.get_by_role("button", name="all", exact=True).click()
    page.locator("[data-filter=recipe-table]").fill("")
    assert rows.count() == all_
    tones = {page.locator(f"#recipe-table tr.{kind} td").first.evaluate("(e) => getComputedStyle(e).backgroundColor")
             for kind in ("changed", "default")}  # fmt: skip
    assert len(tones) == 2, "highlighted"


# Curves


def test_lines_of_a_chart_can_be_hidden_and_shown(opened: Open) -> None:
    page = opened()
    chart = page.locator("[data-chart=accuracy]")
    lines = chart.locator("path.line")
    assert lines.count() == 2
    button = chart.get_by_role("button", name="validation, balanced")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert (lines.count(), button.get_attribute("aria-pressed")) == (3, "true")
    for name in ("train", "validation", "validation, balanced"):
        chart.get_by_role("button", name=name, exact=True).click()
    assert lines.count() == 0


def test_a_chart_shows_the_values_under_the_pointer(opened: Open) -> None:
    page = opened()
    chart = page.locator("[data-chart=accuracy]")
    svg, readout = chart.locator("svg[tabindex]"), chart.locator(".readout")
    box = svg.bounding_box()
    assert box is not None
    svg.hover(position={"x": 62 + (box["width"] - 72) / 2, "y": 100})
    assert readout.inner_text() == "epoch 3: train 100, validation 90"
    page.mouse.move(0, 0)
    assert readout.inner_text() == ""
    svg.focus()
    shown = []
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"):
        page.keyboard.press(key)
        shown.append(readout.inner_text().split(":")[0])
    assert shown == ["epoch 1", "epoch 2", "epoch 5", "epoch 4", "epoch 1"]


def test_loss_can_be_shown_on_a_logarithmic_scale(opened: Open) -> None:
    page = opened()
    chart = page.locator("[data-chart=loss]")
    before = chart.locator("path.line").first.get_attribute("d")
    chart.get_by_role("button", name="logarithmic").click()
    heights = _heights(chart.locator("path.line").first.get_attribute("d"))
    assert before != chart.locator("path.line").first.get_attribute("d")
    logs = np.log(1.5 / np.arange(1, 6))
    slope = (heights[-1] - heights[0]) / (logs[-1] - logs[0])
    assert heights == pytest.approx(list(heights[0] + slope * (logs - logs[0])), abs=0.11), "pixels, to one decimal"


def _heights(path: str | None) -> list[float]:
    return [float(point.split(" ")[1]) for point in re.split("[ML]", path or "")[1:]]


def test_the_best_and_the_stopping_epoch_are_marked(opened: Open) -> None:
    page = opened()
    for chart in ("loss", "accuracy"):
        texts = page.locator(f"[data-chart={chart}] svg[tabindex] text").all_text_contents()
        assert {"best: 3", "stopped early: 5"} <= set(texts)


# Confusion matrix


def test_the_confusion_matrix_describes_the_selected_cell(opened: Open) -> None:
    page = opened()
    svg, readout = page.locator("[data-cells] svg"), page.locator("[data-cells] .readout")
    svg.focus()
    assert readout.inner_text() == f"true {HOSTILE[0]}, predicted {HOSTILE[0]}: 2 of 3 images (66.67 %)"
    page.keyboard.press("ArrowRight")
    assert readout.inner_text() == f"true {HOSTILE[0]}, predicted {HOSTILE[1]}: 1 of 3 images (33.33 %)"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert readout.inner_text().startswith(f"true {HOSTILE[0]}, predicted {HOSTILE[0]}"), (
        "the selection stops at the edges"
    )
    page.locator("[data-cells] rect.cell").last.hover(force=True)
    assert readout.inner_text() == f"true {HOSTILE[2]}, predicted {HOSTILE[2]}: 2 of 2 images (100 %)"


# Studies


def test_curves_of_many_runs_can_be_distinguished(opened: Open) -> None:
    page = opened("study")
    chart = page.locator("[data-chart=val-accuracy]")
    svg, readout, lines = chart.locator("svg[tabindex]"), chart.locator(".readout"), chart.locator("path.line")
    assert lines.count() == 4
    box = svg.bounding_box()
    assert box is not None
    middle = 62 + (box["width"] - 72) / 2
    svg.hover(position={"x": middle, "y": 40})
    assert readout.inner_text() == "lr 0.1, seed 0, epoch 2: 60", "the nearest line"
    svg.hover(position={"x": middle, "y": box["height"] - 40})
    assert readout.inner_text() == "lr 0.01, seed 0, epoch 2: 30"
    page.mouse.move(0, 0)
    svg.focus()
    shown = []
    for key in ("End", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft", "Home"):
        page.keyboard.press(key)
        shown.append(readout.inner_text())
    assert shown == [
        "lr 0.1, seed 0, epoch 3: 80", "lr 0.1, seed 1, epoch 3: 70", "lr 0.01, seed 0, epoch 3: 40",
        "lr 0.01, seed 0, epoch 3: 40", "lr 0.1, seed 1, epoch 3: 70", "lr 0.1, seed 1, epoch 2: 50",
        "lr 0.1, seed 1, epoch 1: 30",
    ]  # fmt: skip
    chart.get_by_role("button", name="lr 0.1", exact=True).click()
    assert lines.count() == 2, "a row's runs go together"


def test_runs_of_a_study_are_selected_by_their_state(opened: Open) -> None:
    page = opened("study")
    rows = page.locator("#run-table tbody tr:visible")
    assert rows.count() == 4
    page.locator("#runs").get_by_role("button", name="failed").click()
    assert [row.split("\t")[:3] for row in rows.all_inner_texts()] == [["lr 0.01", "1", "failed"]]
    page.locator("#study-table th", has_text="test acc.").locator("button").click()
    order = page.locator("#study-table tbody td:first-child").all_inner_texts()
    assert order == ["lr 0.1", "lr 0.01"]
    assert page.locator("#study-table tbody tr.best td").first.inner_text() == "lr 0.1"


# Layout


def test_curves_side_by_side_have_the_same_top(opened: Open) -> None:
    """This holds even if their legends take different numbers of rows."""
    for size in (DESKTOP, (1000, 900)):
        page = opened("hostile", size)
        tops = page.evaluate("""() => [...document.querySelectorAll("#curves .chart > svg")].map((svg) => {
            const box = svg.getBoundingClientRect(); return [Math.round(box.top), Math.round(box.height)]; })""")
        by_top = {top for top, _ in tops}
        rows = -(-len(tops) // max(1, min(3, (size[0] - 32) // 368)))
        assert len(by_top) == rows, tops
        assert len({height for _, height in tops}) == 1


@pytest.mark.parametrize("values", [[5e-4, 4e-4, 4.5e-4], [1e-7, 3e-7], [1234567.0, 7654321.0]])
def test_tick_labels_do_not_overlap_the_axis_title(opened: Open, values: list[float]) -> None:
    page = opened("hostile")
    page.evaluate(
        """(values) => {
          const figure = document.querySelector('[data-chart="loss"]').cloneNode(true);
          figure.querySelector(".legend").replaceChildren();
          figure.id = "probe";
          document.querySelector("#curves").append(figure);
          const series = { name: "s", x: values.map((_, i) => i), y: values, color: "black" };
          new Chart(figure, { xLabel: "x", yLabel: "a title", series: [series] });
        }""",
        values,
    )
    page.wait_for_selector("#probe > svg > text")
    boxes = page.evaluate("""() => [...document.querySelectorAll("#probe > svg > text")].map((text) => {
        const box = text.getBoundingClientRect();
        return [text.textContent, box.left, box.right, text.hasAttribute("transform")]; })""")
    (title,) = [box for box in boxes if box[3]]
    ticks = [box for box in boxes if not box[3] and box[0] != "x"]
    assert len(ticks) >= 4
    assert all(left >= title[2] for _, left, _, _ in ticks if left < title[2] + 200), boxes


def test_a_small_confusion_matrix_fills_its_card_and_fits_a_phone(opened: Open, files: dict[str, Path]) -> None:
    page = opened("hostile", PHONE)
    svg = "document.querySelector('[data-cells] svg').getBoundingClientRect()"
    assert page.evaluate(f"{svg}.right") <= PHONE[0], "no column is cut off"
    wide = opened("hostile")
    side = wide.evaluate("Number(document.querySelector('[data-cells] rect.cell').getAttribute('width'))")
    assert side == 44
    left = wide.evaluate("document.getElementById('confusions').getBoundingClientRect().left")
    assert left > wide.evaluate(f"{svg}.right"), "the list of mistakes is to its right"


def test_a_phone_shows_a_hint_that_tables_scroll_sideways(opened: Open) -> None:
    page = opened("caltech-like", PHONE)
    assert page.is_visible("#confusion .hint")
    shadow = page.evaluate("getComputedStyle(document.querySelector('#confusion .scroll')).backgroundImage")
    assert shadow.count("linear-gradient") == 4
    assert not opened("caltech-like").is_visible("#confusion .hint")

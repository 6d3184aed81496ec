"""The report in a real browser: it opens from disk, asks for nothing, and can be searched.

``make demo-report`` also lets these tests take the picture for the documentation.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from spin_ray.report.page import write_report
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support.chromium import headless, needs_chromium
from tests.support.made_up_run import made_up_run
from tests.support.paths import DOCS

DEMO = DOCS / "demo-report.html"

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def browser():
    with headless() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report([made_up_run(folder / "one"), made_up_run(folder / "two", iterations=3)], folder / "page.html")


@contextmanager
def opened(browser, file):
    """The open page; afterwards: no error, no warning, no request but the file itself."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    page.close()


@pytest.fixture
def page(browser, page_file):
    with opened(browser, page_file) as page:
        yield page


def test_every_chart_is_drawn_and_named(page):
    assert_drawn(page, at_least=8)
    assert page.locator("svg.gantt rect.bar").count() >= 10
    assert "against iter_001 of one" in page.inner_text("#comparison-1")


def assert_drawn(page, at_least):
    figures = page.locator("figure svg.chart")
    assert figures.count() >= at_least
    for index in range(figures.count()):
        figure = figures.nth(index)
        assert figure.locator("path.line, circle.dot").count() > 0
        assert figure.get_attribute("aria-label")
        drawn = figure.bounding_box()
        assert drawn["width"] > 200 and drawn["height"] > 100


def test_search_finds_examples_by_their_words(page):
    visible = page.locator(".example:visible")
    assert visible.count() == 3
    page.fill("#search", "coffee LIKE")
    assert visible.count() == 1
    assert "Do you like coffee?" in visible.inner_text()
    assert page.inner_text("#shown") == "1 of 3 examples"
    page.fill("#search", "cocoa")
    assert visible.count() == 0


def test_examples_are_sorted_by_margin(page):
    """tea 2.0, the script 0.5, coffee −1.5."""
    prompts = page.locator(".example .prompt")
    assert "tea" in prompts.first.inner_text()
    page.select_option("#order", "low")
    assert "coffee" in prompts.first.inner_text()


def test_nothing_is_wider_than_a_phone(browser, page_file):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.close()


def test_on_a_phone_the_newest_column_stands_beside_the_names(browser, tmp_path):
    file = write_report([made_up_run(tmp_path / "run", iterations=5, done=5)], tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelector('.newest').scrollLeft > 0")
    name, newest = (page.locator(f".measures tbody tr:first-child > :{place}-child") for place in ("first", "last"))
    left, right = name.bounding_box(), newest.bounding_box()
    assert 0 <= left["x"] < left["x"] + left["width"] <= right["x"] + 1
    assert right["x"] + right["width"] <= 400
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.close()


def test_text_can_be_read_in_dark_and_in_light(browser, page_file):
    """Contrast of text, soft text and links against page and card: at least 4.5 : 1 (WCAG AA)."""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        colours = page.evaluate(
            """() => { const probe = document.body.appendChild(document.createElement("i"));
            return Object.fromEntries(["page", "card", "ink", "soft", "accent", "warn", "bad", "good", "warn-card"]
            .map(name => {
              probe.style.color = `var(--${name})`;
              return [name, getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3).map(Number)]; })) }"""
        )
        for text in ("ink", "soft", "accent", "warn", "bad", "good"):
            for ground in ("page", "card", "warn-card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (scheme, text, ground)
        page.close()


def luminance(rgb: list[int]) -> float:
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[int], second: list[int]) -> float:
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.skipif(not DEMO.exists(), reason="docs/demo-report.html is not there; make demo demo-report writes it")
def test_the_page_of_the_demonstration_in_the_documentation_is_whole(browser):
    """Two iterations after a warm-up: drawn, searchable, and nothing of the machine that made it."""
    with opened(browser, DEMO) as page:
        assert_drawn(page, at_least=10)
        examples = page.locator(".example")
        everything = examples.count()
        assert everything > 10
        page.fill("#search", examples.first.locator(".human p").inner_text().split()[0])
        assert 0 < page.locator(".example:visible").count() < everything
        assert all(name in page.inner_text("#iterates") for name in ("sft", "iter_000", "iter_001", "KL to the base"))
    text = DEMO.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/work/", "/Users/") if place in text]


@pytest.mark.skipif("REPORT_SCREENSHOT" not in os.environ, reason="writes a picture only when asked")
def test_a_picture_for_the_documentation(browser, tmp_path):
    run = RunDir(Storage(os.environ["REPORT_OF"]))
    page = browser.new_page(viewport={"width": 1200, "height": 1500})
    page.goto(write_report([run], tmp_path / "report.html").as_uri())
    target = Path(os.environ["REPORT_SCREENSHOT"])
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target)
    assert target.stat().st_size > 10_000

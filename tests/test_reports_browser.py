"""A report in a real browser without network: it asks for nothing, complains of nothing, and can be read by anybody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from laboratory import CHROMIUM, browser
from made_reports import HOSTILE, hostile_store

from sdxl_sae_kit.reports import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

GIF = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
RAW = HOSTILE.replace("<img src=x", f"<img alt=x src={GIF}").replace("http://example.invalid/x.png", GIF)
"""As markup: pictures that lie elsewhere are refused, so this one does not."""
CELLS = (
    'MODEL = "none"\nSCALE = "none"',
    f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom synthetic import synthetic_stats\n"
    "from made_reports import HOSTILE\nfrom IPython.display import HTML, display\nimport plotly.graph_objects as go\n"
    "from sdxl_sae_kit import show_table\nfrom sdxl_sae_kit.galleries import gallery\n"
    "from sdxl_sae_kit.labels import LabelStore\n"
    "stats = synthetic_stats('store')\n"
    "LabelStore.of(stats).set(4, HOSTILE[:480])",
    "figure = go.Figure([go.Bar(x=['a', HOSTILE], y=[1, 2], name=HOSTILE)])\n"
    "figure.update_layout(meta={'alt': 'Bars: ' + HOSTILE}, title=HOSTILE)",
    "gallery(stats, page_size=4, static=12)",
    "show_table([{f'column {i} {HOSTILE[:40]}': HOSTILE for i in range(6)}], HOSTILE)",
    f"HTML({RAW + '<script>alert(1)</script><b onclick=alert(1)>bold</b>'!r})",
    "print('x' * 300)",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    title = nbformat.v4.new_markdown_cell(
        f"# Title {RAW}\n## Heading\nText with [a link](#Heading) in it.\n\n| a | b |\n|---|---|\n| {'x ' * 200} | y |"
    )
    book = nbformat.v4.new_notebook(cells=[title, *map(nbformat.v4.new_code_cell, CELLS)])
    book.cells[1].metadata["tags"] = ["parameters"]
    path = folder / "'\"><img src=x onerror=alert(1)>.ipynb"
    nbformat.write(book, path)
    cache, sae = hostile_store(folder / "store")
    return report([path, sae, cache], scale="smoke", pdf=True, store=folder / "store", out=folder / "report.html")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def visit(chromium: Any, written: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The report in a tab of its own, what it asked for and what went wrong."""
    page = chromium.new_context(offline=True, **options).new_page()
    page.set_default_timeout(120_000)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(written.as_uri())
    return page, [url for url in asked if not url.startswith(("data:", "blob:"))], faults


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_is_drawn_asks_for_nothing_and_does_what_no_text_wants(chromium, written, width, scheme):
    page, asked, faults = visit(chromium, written, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.wait_for_function("document.querySelectorAll('.plotly-graph-div .bars path').length === 2")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate("document.querySelectorAll('b, summary').forEach(each => each.click())")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert asked == [written.as_uri()] and faults == [] and page.url == written.as_uri()
    assert page.locator(".modebar-btn").count() > 0 and page.locator("[data-title^=Share]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(page.evaluate("[...document.images].map(image => image.naturalWidth)"))
    page.screenshot(path=written.with_name(f"{scheme}.png"), full_page=True)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_axe_finds_nothing(chromium, written, width, scheme):
    page, *_ = visit(
        chromium, written, viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )  # axe is no script of the page's
    page.wait_for_function("document.querySelectorAll('.plotly-graph-div .bars path').length === 2")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []


def test_a_gallery_is_filtered_with_the_keyboard_alone(chromium, written):
    page, *_ = visit(chromium, written)
    page.locator(".sae-twin").first.locator("input[type=search]").evaluate("each => each.focus()")
    page.keyboard.type("red left")
    told = page.locator(".sae-twin").first.get_by_role("status").inner_text()
    assert re.fullmatch(r"\d+ of 12", told) and not told.startswith("12")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("ArrowDown")
    numbers = page.locator(".sae-twin").first.locator(".sae-card:visible b").all_inner_texts()
    assert numbers == sorted(numbers, key=int)


def test_without_scripts_every_number_and_picture_is_there(chromium, written):
    page, asked, _ = visit(chromium, written, java_script_enabled=False)
    assert page.locator("figure.figure noscript p").first.is_visible()
    assert not page.locator(".drawn").first.is_visible()
    page.locator("figure.figure summary").first.click()
    assert page.locator("figure.figure td").first.is_visible()
    assert page.locator(".sae-card").count() == 12 and asked == [written.as_uri()]


def test_the_pdf_is_tagged_and_has_an_outline(written):
    content = written.with_suffix(".pdf").read_bytes()
    assert content.startswith(b"%PDF") and b"/StructTreeRoot" in content and b"/Outlines" in content
    assert b"/DCTDecode" in content, "pictures are kept as small as they came"


def test_on_paper_nothing_is_cut_off(chromium, written):
    page, *_ = visit(chromium, written, viewport={"width": 744, "height": 1000})
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins
    cut = page.evaluate(
        "[...document.querySelectorAll('table, figure, pre, img, p')]"
        ".filter(each => each.getBoundingClientRect().right > 703 + 1).map(each => each.outerHTML.slice(0, 120))"
    )
    assert cut == []

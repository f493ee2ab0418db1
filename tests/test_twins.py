"""What a report has in place of widgets: everything without scripts, and with them a filter that asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from laboratory import CHROMIUM, browser
from synthetic import synthetic_stats

from sdxl_sae_kit.reports import report
from sdxl_sae_kit.sheets import draw_sheet

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

CELLS = (
    'MODEL = "none"\nSCALE = "none"',
    f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom synthetic import synthetic_stats\n"
    "from sdxl_sae_kit.comparisons import compare\nfrom sdxl_sae_kit.galleries import gallery\n"
    "stats = synthetic_stats('store')",
    "gallery(stats, page_size=4, static=30)",
    "gallery(stats, 4)",
    "compare((stats, 4), (stats, 9))",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins")
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Galleries"), *map(nbformat.v4.new_code_cell, CELLS)]
    )
    book.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / "galleries.ipynb")
    return report([folder / "galleries.ipynb"], scale="smoke", store=folder / "store", out=folder / "report.html")


@contextmanager
def opened(written: Path, **options: Any) -> Iterator[Any]:
    with browser() as chromium:
        page = chromium.new_context(offline=True, **options).new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(written.as_uri())
        yield page
        assert faults == []


def test_with_scripts_a_twin_can_be_filtered_and_sorted(written: Path) -> None:
    stats = synthetic_stats()
    with opened(written, color_scheme="dark", viewport={"width": 400, "height": 800}) as page:
        assert page.locator(".sae-twin").count() == page.locator(".sae-bar").count() == 3
        twin = page.locator(".sae-twin").first
        cards, numbers = twin.locator(".sae-card:visible"), twin.locator(".sae-card:visible b")
        assert cards.count() == 30
        as_it_was = numbers.all_inner_texts()

        page.keyboard.press("Tab")  # into the page
        twin.get_by_label("Filter").focus()
        page.keyboard.type("RED left")
        expected = {
            str(latent)
            for latent in map(int, as_it_was)
            if all(word in "; ".join(e.prompt for e in stats.examples(latent)[:4]) for word in ("red", "left"))
        }
        assert set(numbers.all_inner_texts()) == expected and 0 < len(expected) < 30
        assert twin.get_by_role("status").inner_text() == f"{len(expected)} of 30"
        twin.get_by_label("Filter").fill("")
        twin.get_by_label("Sort by").select_option("latent number")
        assert [int(text) for text in numbers.all_inner_texts()] == sorted(map(int, as_it_was))
        twin.get_by_label("Sort by").select_option("maximum")
        assert int(numbers.first.inner_text()) == max(map(int, as_it_was), key=lambda latent: stats.max[latent])
        twin.get_by_label("Sort by").select_option("as it was")
        assert numbers.all_inner_texts() == as_it_was
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_filter_opens_what_holds_something_and_closes_what_does_not(written: Path) -> None:
    prompt = synthetic_stats().sample(4)[0].prompt  # among the weakest, so hardly among the strongest
    with opened(written) as page:
        twin = page.locator(".sae-twin").nth(1)
        twin.get_by_label("Filter").fill(f"weakest {prompt}")
        assert twin.locator("figure:visible", has_text=prompt).count() >= 1
        assert twin.locator("details[open] > summary").all_inner_texts() == ["Quantiles"]


def test_without_scripts_everything_is_there_and_no_control_is_dead(written: Path) -> None:
    with opened(written, java_script_enabled=False) as page:
        twins = page.locator(".sae-twin")
        assert twins.nth(0).locator(".sae-card:visible").count() == 30
        assert "Latent 4" in twins.nth(1).inner_text()
        assert twins.locator("input, select, button, [role=button], [role=status]").count() == 0
        assert twins.nth(2).locator(".sae-examples figure:visible").count() == 24
        folded = twins.nth(1).locator("details", has_text="Random")
        folded.locator("summary").click()
        assert folded.locator("img:visible").count() == 12


def test_a_sheet_asks_nobody_and_can_be_filtered_and_sorted(tmp_path: Path) -> None:
    stats = synthetic_stats()
    first = draw_sheet(stats, features=range(40), out=tmp_path / "sheet.html")
    with opened(first, viewport={"width": 400, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        numbers = page.locator(".sae-card:visible b")
        assert numbers.count() == 40
        page.get_by_label("Sort by").select_option("Moran's I")
        ranked = [int(text) for text in numbers.all_inner_texts()]
        assert ranked[:35] == sorted(range(35), key=lambda latent: -stats.moran[latent])
        assert set(ranked[35:]) == set(range(35, 40))  # dead, so without Moran's I
        page.get_by_label("Filter").fill("red left")
        assert 0 < numbers.count() < 35


def test_a_sheet_without_scripts_shows_every_card_and_no_dead_control(tmp_path: Path) -> None:
    with opened(draw_sheet(synthetic_stats(), out=tmp_path / "sheet.html"), java_script_enabled=False) as page:
        assert page.locator(".sae-card:visible").count() == 35
        assert page.locator("input, select, button").count() == 0
        page.get_by_text("Find a feature by its number").click()
        page.get_by_role("link", name="17", exact=True).click()
        assert page.locator(".sae-card:has(:target) b").inner_text() == "17"

"""A gallery in a real JupyterLab in a real browser: sort, open a feature, label it, run the notebook again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from laboratory import CHROMIUM, GO_DARK, RAN, READY, REPOSITORY, RUN_ALL, browser, jupyterlab, leaves, notebook
from synthetic import synthetic_stats

from sdxl_sae_kit.artifacts import Store

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

NOTEBOOK = """
from synthetic import synthetic_stats
from sdxl_sae_kit.galleries import gallery
stats = synthetic_stats("store")
gallery(stats, page_size=16, sort="latent")
"""
NASTY = "<img src=x onerror=\"document.title='hacked'\"> left"


@contextmanager
def tab_of_browser(folder: Path) -> Iterator[Any]:
    """A tab that has noted what it asked for outside this machine, and what went wrong in it."""
    with browser() as opened:
        tab = opened.new_page(viewport={"width": 1400, "height": 1000})
        # anywidget gives up on a widget that takes two seconds to load: how long it takes is not what is tested here
        tab.add_init_script("AbortSignal.timeout = () => new AbortController().signal;")
        tab.outside, tab.faults = [], []
        tab.on("request", lambda request: tab.outside.append(request.url) if leaves(request.url) else None)
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.set_default_timeout(60_000)
        sync_api.expect.set_options(timeout=30_000)
        yield tab
        tab.screenshot(path=folder / "last.png")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A tab of its own."""
    with tab_of_browser(tmp_path) as tab:
        yield tab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tab with the notebook in JupyterLab, shared: to run it is to begin anew."""
    folder = tmp_path_factory.mktemp("lab")
    with tab_of_browser(folder) as tab, jupyterlab(folder, notebook(NOTEBOOK)) as address:
        tab.goto(address)
        tab.wait_for_function(READY)
        yield tab


def test_a_label_given_in_jupyterlab_is_there_when_the_notebook_runs_again(lab: Any, tmp_path: Path) -> None:
    lab.evaluate(RUN_ALL)
    first = lab.locator(".sae-page .sae-card header b").first
    sync_api.expect(first).to_have_text("0", timeout=60_000)
    assert lab.locator(".sae-page .sae-card").count() == 16

    lab.locator(".sae-sort select").select_option(label="maximum")
    sync_api.expect(first).to_have_text(str(int(np.argmax(synthetic_stats().max))))
    _assert_pictures_show(lab, 16)
    lab.screenshot(path=tmp_path / "overview.png")

    _open(lab, 7)
    lab.locator(".sae-label input").fill(NASTY)
    lab.keyboard.press("Tab")
    lab.locator("button.sae-save").click()
    sync_api.expect(lab.locator(".sae-notice")).to_contain_text(f"Saved {NASTY}")
    _assert_pictures_show(lab, 12)
    lab.screenshot(path=tmp_path / "feature.png")

    lab.evaluate(RUN_ALL)
    card = lab.locator(".sae-page .sae-card", has_text=NASTY)
    sync_api.expect(card.locator("header b")).to_have_text("7")
    lab.evaluate(GO_DARK)
    lab.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    sync_api.expect(lab.locator("#jupyterlab-splash")).to_have_count(0)
    lab.screenshot(path=tmp_path / "dark.png")
    card.locator("img").click()
    sync_api.expect(lab.locator(".sae-title h3")).to_have_text("Latent 7")
    assert lab.locator(".sae-label input").input_value() == NASTY
    lab.screenshot(path=tmp_path / "dark-feature.png")
    _assert_all_well(lab)


@pytest.mark.slow
def test_the_notebook_on_annotating_runs_and_can_be_clicked_through(page: Any, tmp_path: Path) -> None:
    """With what the usual store holds: after `make report SCALE=smoke` seconds, from nothing minutes."""
    content = nbformat.read(REPOSITORY / "notebooks" / "03_annotate_features.ipynb", as_version=4)
    parameters = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = parameters.source.replace('SCALE = "demo"', 'SCALE = "smoke"')
    content.metadata = notebook().metadata
    for made in Store.at().artifacts():
        if made.finished and made.kind != "reports":
            (tmp_path / "store" / made.kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "store" / made.kind / made.name).symlink_to(made.folder)
    page.set_default_timeout(60_000)
    with jupyterlab(tmp_path, content) as address:
        page.goto(address)
        page.wait_for_function(READY)
        page.evaluate(RUN_ALL)
        page.wait_for_function(RAN, timeout=400_000)
        _assert_all_well(page)
        _assert_pictures_show(page, 100)
        _label_the_strongest(page)
        page.screenshot(path=tmp_path / "labelled.png")

        told = page.locator(".sae-told")
        page.locator(".sae-prompt input").fill("a small blue star")
        page.keyboard.press("Enter")
        sync_api.expect(told).to_contain_text("a small blue star")
        _assert_pictures_show(page, 100)
        _assert_all_well(page)


def _label_the_strongest(page: Any) -> None:
    """In the first gallery: sort, open the first card, label it, go back and open it again."""
    gallery = page.locator(".jp-OutputArea-child", has=page.locator(".sae-overview")).first
    numbers = gallery.locator(".sae-page .sae-card header b")
    densest = numbers.first.inner_text()
    gallery.locator(".sae-sort select").select_option(label="maximum")
    sync_api.expect(numbers.first).not_to_have_text(densest)
    strongest = numbers.first.inner_text()
    gallery.locator(".sae-page .sae-card").first.click()
    sync_api.expect(page.locator(".sae-title h3").first).to_have_text(f"Latent {strongest}")
    page.locator(".sae-label input").first.fill("something bright")
    page.keyboard.press("Tab")
    page.locator("button.sae-save").first.click()
    sync_api.expect(page.locator(".sae-notice").first).to_contain_text("Saved something bright")
    page.locator("button.sae-back").first.click()
    card = gallery.locator(".sae-page .sae-card", has_text="something bright")
    sync_api.expect(card.locator("header b")).to_have_text(strongest)
    card.click()
    sync_api.expect(page.locator(".sae-label input").first).to_have_value("something bright")


def test_a_gallery_can_be_used_without_a_mouse(lab: Any) -> None:
    lab.evaluate(RUN_ALL)
    title, numbers = lab.locator(".sae-title h3"), lab.locator(".sae-page .sae-card header b")
    sync_api.expect(numbers.first).to_have_text("0", timeout=60_000)
    assert numbers.first.get_attribute("aria-label") == "Open latent 0"

    numbers.first.focus()
    lab.keyboard.press("PageDown")
    sync_api.expect(numbers.first).to_have_text("16")
    for key in ("ArrowRight", "Tab", "ArrowLeft"):
        lab.keyboard.press(key)
    lab.keyboard.press("Enter")
    sync_api.expect(title).to_have_text("Latent 17")
    sync_api.expect(title).to_be_focused()
    neighbour = lab.locator(".sae-facts .sae-near [role=button]").first
    other = neighbour.get_attribute("data-latent")
    neighbour.focus()
    lab.keyboard.press("Space")
    sync_api.expect(title).to_have_text(f"Latent {other}")
    lab.locator("button.sae-back").focus()
    lab.keyboard.press("Enter")
    sync_api.expect(numbers).to_have_count(16)
    assert lab.evaluate("document.querySelectorAll('.jp-Notebook.jp-mod-editMode').length") == 0
    _assert_all_well(lab)


def _open(page: Any, latent: int) -> None:
    page.locator(".sae-latent input").fill(str(latent))
    page.keyboard.press("Tab")
    page.locator("button.sae-open").click()
    sync_api.expect(page.locator(".sae-title h3")).to_have_text(f"Latent {latent}")


def _assert_all_well(page: Any) -> None:
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert "hacked" not in page.title()
    assert (page.outside, page.faults) == ([], [])


def _assert_pictures_show(page: Any, at_least: int) -> None:
    """Also those that are still being decoded; a broken one never has a width. Plotly's empty place is none."""
    decode = """images => Promise.all(images.map(async image => {
        await image.decode().catch(() => {});
        return [image.naturalWidth, `${image.alt || image.outerHTML.slice(0, 200)}`];
    }))"""
    pictures = page.locator(".jp-Notebook img:not(.plot-img)").evaluate_all(decode)
    assert len(pictures) >= at_least
    assert [told for width, told in pictures if not width] == []

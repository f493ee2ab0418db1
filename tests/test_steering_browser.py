"""The steering panel in a real JupyterLab in a real browser: slide, draw a rectangle, a stroke and an outline, save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from laboratory import CHROMIUM, GO_DARK, READY, jupyterlab, notebook
from test_browser import page  # noqa: F401  # a fixture
from test_explorer_browser import drag

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

NOTEBOOK = """
from dataclasses import replace
from made_saes import CONFIG, random_sae
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.steering_panels import steering_panel
sae = random_sae(d_in=96, config=replace(CONFIG, expansion=0.5))
pipe = load_pipeline("tiny-turbo", device="cpu")
panel = steering_panel(pipe, sae, "a large red circle")
"""
RUN_NEXT = "() => { window.jupyterapp.commands.execute('notebook:run-cell-and-select-next'); }"
NASTY = "<img src=x onerror=\"document.title='hacked'\"> a small blue star"


def test_what_is_slid_and_drawn_is_what_is_steered(page: Any, tmp_path: Path) -> None:  # noqa: F811
    page.set_viewport_size({"width": 1400, "height": 1500})
    other = 'steering_panel(pipe, sae, "a small green star")'
    with jupyterlab(tmp_path, notebook(NOTEBOOK, "panel", other)) as address:
        page.goto(address)
        page.wait_for_function(READY)
        for number in (1, 2, 3):
            page.evaluate(RUN_NEXT)
            prompt = page.locator(".jp-InputPrompt").nth(number - 1)
            sync_api.expect(prompt).to_have_text(f"[{number}]:", timeout=240_000)
            sync_api.expect(page.locator(".js-plotly-plot .nsewdrag")).to_have_count(number - 1, timeout=60_000)
        shown, beside = (page.locator(".jp-OutputArea-output:has(> .widget-vbox)").nth(at) for at in (0, 1))
        result, code = shown.locator(".sae-result"), shown.locator(".sae-code textarea")
        sync_api.expect(beside.locator(".sae-result img")).to_have_count(2)
        untouched = beside.locator(".sae-result").inner_html()

        slider = shown.locator(".sae-row-strength [role=slider]").first
        before = result.locator("img").first.get_attribute("alt")
        slider.focus()
        page.keyboard.press("ArrowRight")
        sync_api.expect(result.locator("img").first).not_to_have_attribute("alt", before)
        shown.locator("button.sae-show-code").click()
        sync_api.expect(code).to_have_value(re.compile(re.escape(": 0.1}")))

        drag(page, [(0.02, 0.02), (0.48, 0.98)])
        sync_api.expect(result).to_contain_text("share of the picture inside the mask")
        half = _share(result)
        assert 40 < half < 52
        shown.locator("[data-title='Draw open freeform']").click()
        drag(page, [(0.6, 0.2), (0.7, 0.4), (0.9, 0.5)])
        more = _share_after(result, half)
        assert half + 3 < more < half + 16
        shown.locator("[data-title='Draw closed freeform']").click()
        drag(page, [(0.6, 0.7), (0.95, 0.7), (0.95, 0.95), (0.6, 0.95), (0.6, 0.71)])
        assert more + 4 < _share_after(result, more) < more + 14
        shown.locator("button.sae-random").click()
        sync_api.expect(result.locator("img")).to_have_count(4)
        page.screenshot(path=tmp_path / "drawn.png")

        all_three = _share(result)
        shown.locator("button.sae-remove-shape").click()
        assert _share_after(result, all_three) == pytest.approx(more)
        shown.locator("button.sae-whole").click()
        sync_api.expect(result).not_to_contain_text("inside the mask")
        sync_api.expect(shown.locator(".shapelayer path")).to_have_count(0)

        shown.locator("button.sae-save").click()
        sync_api.expect(shown.locator(".sae-notice")).to_contain_text("Saved.")
        assert (tmp_path / "root" / "edit.json").exists()
        shown.locator(".sae-prompt input").fill(NASTY)
        page.keyboard.press("Enter")
        sync_api.expect(shown.locator(".sae-told")).to_contain_text(NASTY)
        page.evaluate(GO_DARK)
        page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
        sync_api.expect(page.locator("#jupyterlab-splash")).to_have_count(0)
        page.screenshot(path=tmp_path / "dark.png")
        page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }")
        page.set_viewport_size({"width": 520, "height": 2400})  # the panel has about 400 of them
        page.wait_for_timeout(1000)
        page.screenshot(path=tmp_path / "narrow.png")
        assert shown.evaluate("(output) => output.scrollWidth <= output.clientWidth")

        assert beside.locator(".sae-result").inner_html() == untouched
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        assert "hacked" not in page.title()
        assert (page.outside, page.faults) == ([], [])


def _share_after(result: Any, before: float) -> float:
    """The share once it is no longer what it was."""
    cell = result.locator("tr", has_text="share of the picture inside the mask").locator("td").nth(1)
    sync_api.expect(cell).not_to_have_text(f"{before:g} %")
    return _share(result)


def _share(result: Any) -> float:
    """The share of the picture inside the mask, in percent."""
    cell = result.locator("tr", has_text="share of the picture inside the mask").locator("td").nth(1)
    return float(cell.inner_text().removesuffix("%"))

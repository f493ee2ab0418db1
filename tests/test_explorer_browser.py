"""The explorer in a real JupyterLab in a real browser: type, drag a rectangle and a lasso, open a feature."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from laboratory import CHROMIUM, GO_DARK, READY, RUN_ALL, jupyterlab, notebook
from test_browser import page  # noqa: F401  # a fixture

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

NOTEBOOK = """
from dataclasses import replace
from made_saes import CONFIG, random_sae
from synthetic import synthetic_stats
from sdxl_sae_kit.explorer import explore
from sdxl_sae_kit.pipelines import load_pipeline
sae = random_sae(d_in=96, config=replace(CONFIG, expansion=0.5))
stats = synthetic_stats("store", sae=sae.name, d_sae=sae.d_sae)
explore(load_pipeline("tiny-turbo", device="cpu"), sae, "a large red circle", stats=stats)
"""
NASTY = "<img src=x onerror=\"document.title='hacked'\"> a small blue star"


def test_what_is_dragged_over_the_picture_is_what_is_listed(page: Any, tmp_path: Path) -> None:  # noqa: F811
    page.set_viewport_size({"width": 1400, "height": 1500})
    with jupyterlab(tmp_path, notebook(NOTEBOOK)) as address:
        page.goto(address)
        page.wait_for_function(READY)
        page.evaluate(RUN_ALL)
        told, cards = page.locator(".sae-caption"), page.locator(".sae-found .sae-card")
        sync_api.expect(told).to_contain_text("Strongest latents of each block", timeout=120_000)
        page.locator(".js-plotly-plot .nsewdrag").first.wait_for()
        sync_api.expect(cards).to_have_count(6)
        page.screenshot(path=tmp_path / "explorer.png")

        drag(page, [(0.02, 0.02), (0.52, 0.27)])
        sync_api.expect(told).to_contain_text("active on 8 of 64 tokens, within rows 1–2 and columns 1–4")
        drag(page, [(0.25, 0.15), (0.52, 0.65)])  # begins in the first outline
        sync_api.expect(told).to_contain_text("active on 8 of 64 tokens, within rows 2–5 and columns 3–4")
        page.locator("[data-title='Lasso Select']").click()
        drag(page, [(0.02, 0.02), (0.98, 0.02), (0.02, 0.98), (0.02, 0.02)])
        sync_api.expect(told).to_contain_text(re.compile("active on (2[89]|3[0-6]) of 64 tokens"))  # about half
        page.screenshot(path=tmp_path / "lasso.png")

        page.locator(".sae-token-columns [role=slider]").last.focus()
        page.keyboard.press("ArrowLeft")
        sync_api.expect(told).to_contain_text(re.compile(r"active on \d+ of 64 tokens, within rows 1–[78]"))
        page.locator("button.sae-whole").click()
        sync_api.expect(told).to_contain_text("Strongest latents of each block")
        sync_api.expect(page.locator(".selectionlayer path")).to_have_count(0)
        drag(page, [(0.52, 0.52), (0.98, 0.98)])
        sync_api.expect(told).to_contain_text("Latents active on")

        page.locator(".sae-prompt input").fill(NASTY)
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".sae-told")).to_contain_text(NASTY)
        page.evaluate(GO_DARK)
        page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
        sync_api.expect(page.locator("#jupyterlab-splash")).to_have_count(0)
        page.screenshot(path=tmp_path / "dark.png")

        number = cards.first.locator("[data-latent]")
        number.focus()
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".sae-title h3")).to_have_text(f"Latent {number.inner_text()}")
        sync_api.expect(page.locator(".sae-title h3")).to_be_in_viewport()
        page.screenshot(path=tmp_path / "opened.png")
        number = cards.last.locator("[data-latent]")
        cards.last.locator("img").click()
        sync_api.expect(page.locator(".sae-title h3")).to_have_text(f"Latent {number.inner_text()}")

        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        assert "hacked" not in page.title()
        assert (page.outside, page.faults) == ([], [])


def drag(page: Any, corners: Sequence[tuple[float, float]]) -> None:  # noqa: F811
    """Drag over the picture along these corners, in shares of its width and height."""
    picture = page.locator(".js-plotly-plot .nsewdrag").first
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    first, *others = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*first)
    page.mouse.down()
    for corner in others:
        page.mouse.move(*corner, steps=8)
    page.mouse.up()

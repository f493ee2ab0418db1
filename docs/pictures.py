"""Make the pictures of the README anew: `.venv/bin/python docs/pictures.py`, with the extra `browser` and Chromium.

Everything is taken from the store, or made and kept there: about a quarter of an hour on two cores if it is empty.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

import sdxl_sae_kit as kit
from sdxl_sae_kit import html
from sdxl_sae_kit.tiny.judge import load_judge

MODEL, NAME, HOOKPOINT, LATENT = "tiny-turbo", "k5", "up.0.1", 178
FOLDER = Path(__file__).parent / "pictures"
SCALE = kit.load_scale(MODEL)


def main() -> None:
    """Draw the three pictures."""
    pipe = kit.load_pipeline(MODEL)
    cache = kit.collect(pipe, SCALE.prompts())
    trained = kit.train(cache, SCALE.configs, batch_size=SCALE.batch_size, epochs=SCALE.epochs)
    saes = {hookpoint: trained[hookpoint, NAME] for hookpoint in cache.hookpoints}
    stats = kit.FeatureStats.measure(saes[HOOKPOINT], cache)
    shoot("gallery", show_gallery(stats), width=1000)
    shoot("steering", show_steering(pipe, saes[HOOKPOINT], cache), width=740)
    shoot("specialisation", show_specialisation(pipe, saes, cache), width=900)


def show_gallery(stats: kit.FeatureStats) -> str:
    """The features whose strongest images are most alike, as an exported notebook shows them."""
    shown = kit.gallery(stats, similarity=kit.specificity(stats), sort="specificity", static=9)
    return html.page("gallery", shown.static_html())


def show_steering(pipe: Any, sae: kit.SAE, cache: kit.ActivationCache) -> str:
    """Held-out pictures as they are, with the feature off, and with as much taken along a random direction."""
    held_out = [i for i in cache.images("held_out").tolist() if "white grid" in cache.prompts.texts[i]]
    prompts = cache.prompts.take(held_out)
    direction = np.random.default_rng(0).standard_normal(sae.d_in)
    direction *= np.linalg.norm(sae.directions[LATENT].numpy(force=True)) / np.linalg.norm(direction)
    edits: Mapping[str, Mapping[str, Any]] = {
        "as drawn": {},
        f"feature {LATENT} off": {"scale": {LATENT: 0.0}},
        "random direction instead": {"scale": {LATENT: 0.0}, "along": {LATENT: direction.tolist()}},
    }
    cells = []
    for how, edit in edits.items():
        with kit.steer(pipe, sae, **edit):
            drawn = kit.generate(pipe, prompts.texts, prompts.seeds)
        grids = sum(value == "grid" for value in load_judge().read(drawn).values["pattern"])
        tiles = [html.picture(html.to_webp(image.resize((112, 112))), how) for image in drawn[:5]]
        cells.append("".join([f"<div>{html.escape(how)}, {grids} of {len(drawn)} have a grid</div>", *tiles]))
    grid = "display: grid; grid-template-columns: 140px repeat(5, 112px); gap: 6px; align-items: center"
    return html.page("steering", f'<div style="{grid}">{"".join(cells)}</div>')


def show_specialisation(pipe: Any, saes: Mapping[str, kit.SAE], cache: kit.ActivationCache) -> str:
    """What features of each block respond to, beside an untrained SAE's latents and raw channels."""
    several = kit.collect(pipe, SCALE.prompts()[: SCALE.n_elsewhere], num_inference_steps=4)
    study = kit.specialize(pipe, saes, cache, timing=several, features_per_block=10 * SCALE.n_features)
    figure: str = study.plot().to_html(include_plotlyjs=True, include_mathjax=False)
    return figure


def shoot(name: str, page: str, *, width: int) -> None:
    """Write a page as Chromium shows it to pictures/<name>.webp."""
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 300}, color_scheme="light")
        tab.set_content(page)
        tab.wait_for_function("() => [...document.images].every(image => image.complete)")
        taken = tab.screenshot(full_page=True)
        browser.close()
    Image.open(io.BytesIO(taken)).convert("RGB").save(FOLDER / f"{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()

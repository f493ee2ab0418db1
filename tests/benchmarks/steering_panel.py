"""How quickly the steering panel redraws in a real JupyterLab in a real browser.

python tests/benchmarks/steering_panel.py        # needs Chromium and playwright; about two minutes

On the tiny model and random SAEs at four blocks: time from a key press that moves a slider until the picture after it
is decoded, median and longest of 10 without and with a random direction beside it (whose picture comes second), each
after a second of rest; and how often the pictures are drawn anew for 20 key presses in haste, with both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from laboratory import READY, RUN_ALL, browser, jupyterlab, notebook  # noqa: E402

MOVES = 10
CELL = """
from dataclasses import replace
from made_saes import CONFIG, SITE, random_sae
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS
from sdxl_sae_kit.pipelines import describe, load_pipeline
from sdxl_sae_kit.steering_panels import steering_panel
pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
saes = [random_sae(d_in=96, config=replace(CONFIG, expansion=4)) for hookpoint in DEFAULT_HOOKPOINTS]
for sae, hookpoint in zip(saes, DEFAULT_HOOKPOINTS):
    sae.site = replace(SITE, revision=describe(pipe).revision, hookpoint=hookpoint)
steering_panel(pipe, saes, "a large red circle")
"""
# Resolves with the milliseconds from the key press until `pictures` new pictures are decoded.
TIMED = """async (pictures) => {
    const shown = () => [...document.querySelectorAll('.sae-result img')];
    const before = shown()[0].alt;
    const started = performance.now();
    const key = new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true});
    document.querySelector('.sae-row-strength .noUi-handle').dispatchEvent(key);
    while (shown().length !== pictures || shown()[0].alt === before)
        await new Promise((resolve) => setTimeout(resolve, 5));
    await Promise.all(shown().map((picture) => picture.decode()));
    return performance.now() - started;
}"""
HASTE = """async () => {
    let drawn = 0;
    const result = document.querySelector('.sae-result');
    new MutationObserver(() => drawn++).observe(result, {childList: true, subtree: true});
    for (let press = 0; press < 20; press++) {
        const key = new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true});
        document.querySelector('.sae-row-strength .noUi-handle').dispatchEvent(key);
        await new Promise((resolve) => setTimeout(resolve, 30));
    }
    await new Promise((resolve) => setTimeout(resolve, 4000));
    return drawn;
}"""


def main() -> None:
    """Run the notebook in a browser and print what was seen."""
    with (
        tempfile.TemporaryDirectory() as folder,
        jupyterlab(Path(folder), notebook(CELL)) as address,
        browser() as opened,
    ):
        page = opened.new_page(viewport={"width": 1400, "height": 1400})
        page.goto(address)
        page.wait_for_function(READY)
        page.evaluate(RUN_ALL)
        page.locator(".sae-result img").first.wait_for(timeout=300_000)
        page.wait_for_function(READY)
        print_moves(page, "the features alone", 2)
        page.locator("button.sae-random").click()
        page.wait_for_function("() => document.querySelectorAll('.sae-result img').length === 4")
        print_moves(page, "with a random direction, until both are shown", 4)
        print(f"20 key presses in 0.6 s: {page.evaluate(HASTE)} redraws of the result", flush=True)


def print_moves(page: Any, name: str, pictures: int) -> None:
    """Median and longest of MOVES moves."""
    taken = []
    for _ in range(MOVES):
        time.sleep(1)
        taken.append(page.evaluate(TIMED, pictures) / 1000)
    told = f"median of {MOVES} moves {statistics.median(taken):.2f} s, at most {max(taken):.2f} s"
    print(f"from slider to picture, {name}: {told}", flush=True)


if __name__ == "__main__":
    main()

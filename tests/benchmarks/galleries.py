"""How quickly a gallery shows in a real JupyterLab in a real browser, and that it does not grow with the SAE.

python tests/benchmarks/galleries.py             # needs Chromium and playwright; about three minutes

On statistics of SAEs with 640 and 5,120 latents over 512 made-up images of 160 × 160 pixels, a page of 48 cards:

* time from running the cell until all 48 pictures are decoded, the first time in the page and once more (the first time
  JupyterLab also loads its widgets);
* time of turning a page, from the click until all pictures of the next are decoded: median and longest of 10, each
  after a page was looked at for a second, and of 10 in haste;
* websocket messages, both ways, of the first page and of a turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))

from caches import made_up_recipe, made_up_updates, write_cache  # noqa: E402
from laboratory import READY, browser, jupyterlab, notebook  # noqa: E402
from made_saes import random_sae  # noqa: E402

from sdxl_sae_kit.cache import ActivationCache  # noqa: E402
from sdxl_sae_kit.configs import SAEConfig  # noqa: E402
from sdxl_sae_kit.features import FeatureStats  # noqa: E402

N_IMAGES, D_IN, CARDS, TURNS = 512, 64, 48, 10
CELLS = (
    """
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.galleries import gallery
stats = FeatureStats.open({folder!r})
""",
    "gallery(stats, page_size=48)",
)
# Resolves with the milliseconds from `act` until another page shows all its pictures.
TIMED = """async ([act, cards]) => {
    const pictures = () => [...document.querySelectorAll('.sae-page .sae-card img')];
    const before = pictures()[0];
    const started = performance.now();
    eval(act);
    while (pictures().length !== cards || pictures()[0] === before)
        await new Promise((resolve) => setTimeout(resolve, 5));
    await Promise.all(pictures().map((picture) => picture.decode()));
    return performance.now() - started;
}"""
RUN_CELL = "void window.jupyterapp.commands.execute('notebook:run-cell')"
RUN_NEXT = "() => { window.jupyterapp.commands.execute('notebook:run-cell-and-select-next'); }"
TURN = "document.querySelector('button.sae-next').click()"


def main() -> None:
    """Measure with both sizes."""
    for expansion in (10, 80):
        with tempfile.TemporaryDirectory() as folder:
            stats = made_up_statistics(Path(folder), expansion)
            print(f"{stats.d_sae:,} latents, {len(stats.alive):,} of them alive", flush=True)
            measure(Path(folder), stats)


def made_up_statistics(folder: Path, expansion: int) -> FeatureStats:
    """Real statistics of a random SAE on random updates, with pictures as detailed as photographs."""
    recipe = made_up_recipe(
        N_IMAGES, hookpoints={"mid.0": [16, 16, D_IN]}, images="thumbnails", images_per_shard=64, batch_size=64,
        model="tiny-turbo", revision="abc",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    noise = (Image.fromarray(rng.integers(0, 256, (160, 160, 3), np.uint8)) for _ in range(N_IMAGES))
    pictures = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in noise]
    cache = ActivationCache(write_cache(folder, recipe, made_up_updates(recipe), pictures))
    return FeatureStats.measure(random_sae(0, D_IN, SAEConfig(k=10, expansion=expansion)), cache, store=folder)


def measure(folder: Path, stats: FeatureStats) -> None:
    """Run the notebook in a browser and print what was seen."""
    cells = [cell.format(folder=str(stats.artifact.folder)) for cell in CELLS]
    with jupyterlab(folder, notebook(*cells)) as address, browser() as opened:
        page = opened.new_page(viewport={"width": 1400, "height": 1000})
        frames: list[Any] = []
        page.on("websocket", lambda socket: socket.on("framesent", lambda frame: frames.append(frame)))
        page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))
        page.goto(address)
        page.wait_for_function(READY)
        page.evaluate(RUN_NEXT)
        page.wait_for_function("() => document.querySelectorAll('.jp-InputPrompt')[0].innerText === '[1]:'")
        page.wait_for_function(READY)
        for name, turning, looked_at in (("the first time", "after a second", 1.0), ("once more", "in haste", 0.0)):
            print_one(page, frames, f"first page, {name}", RUN_CELL)
            print_turns(page, frames, turning, looked_at)


def print_one(page: Any, frames: list[Any], name: str, act: str) -> None:
    seconds, messages = counted(page, frames, act)
    print(f"  {name}: {seconds:.2f} s, {messages} messages", flush=True)


def print_turns(page: Any, frames: list[Any], name: str, looked_at: float) -> None:
    taken = []
    for _ in range(TURNS):
        time.sleep(looked_at)
        taken.append(counted(page, frames, TURN))
    seconds, messages = zip(*taken, strict=True)
    told = f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s, at most {max(messages)} messages"
    print(f"  turning a page {name}: median of {TURNS}: {told}", flush=True)


def counted(page: Any, frames: list[Any], act: str) -> tuple[float, int]:
    """Seconds until the pictures show, and messages until the kernel rests."""
    frames.clear()
    milliseconds = page.evaluate(TIMED, [act, CARDS])
    page.wait_for_function(READY)
    return milliseconds / 1000, len(frames)


if __name__ == "__main__":
    main()

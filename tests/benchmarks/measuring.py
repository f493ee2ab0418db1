"""What feature statistics take at real size: `python tests/benchmarks/measuring.py [--images 256] [--k 10]`.

A made-up cache of SDXL Turbo's shape (16 × 16 tokens of 1,280 numbers) and an SAE of 5,120 latents with random weights.
Prints time and peak memory, split into the pass and what comes after it, beside encoding alone, and what it comes to
for four blocks and 100,000 images.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from caches import made_up_recipe, write_cache

from sdxl_sae_kit import measurement
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.measurement import plan_measurement
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.summary import summarise

GRID, D_IN, BLOCKS, IMAGES = (16, 16), 1280, 4, 100_000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--k", type=int, default=10)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache = made_up_cache(Path(folder), chosen.images)
        sae = SAE(SAEConfig(k=chosen.k), D_IN, cache.site("mid.0"), "made_up-00000000").requires_grad_(False)
        alone = timed(lambda: [sae.encode_sparse(cache.read("mid.0", [i])[:, 0].float()) for i in range(chosen.images)])
        before, summing = peak(), []
        measurement.summarise = lambda *given: summing.append(timed(lambda: summarise(*given)))
        whole = timed(lambda: FeatureStats.measure(sae, cache, store=folder))
        of_pass = whole - summing[0]
        hours = BLOCKS * IMAGES * of_pass / chosen.images / 3600
        print(
            f"encoding alone {alone:.1f} s; the pass {of_pass:.1f} s, {of_pass / alone:.2f} ×; then {summing[0]:.1f} s"
        )
        print(f"peak memory {before / 1e9:.2f} GB before, {peak() / 1e9:.2f} GB after")
        print(f"{BLOCKS} blocks of {IMAGES:,} images on one thread: {hours:.1f} hours in the pass")
        print(plan_measurement(sae.d_sae, chosen.k, IMAGES, GRID))


def made_up_cache(folder: Path, n: int) -> ActivationCache:
    recipe = made_up_recipe(n, hookpoints={"mid.0": [*GRID, D_IN]}, images_per_shard=32, batch_size=32)
    rng = np.random.default_rng(0)
    updates = rng.standard_normal((n, 1, GRID[0] * GRID[1], D_IN), dtype=np.float32).astype(np.float16)
    return ActivationCache(write_cache(folder, recipe, {"mid.0": updates}))


def timed(work) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

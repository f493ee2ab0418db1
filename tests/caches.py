"""Small made-up activation caches, for tests of how they are written, read, damaged and mended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.files import canonical_json, sha256
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.shards import ShardWriter

SHAPES = {"down.2.1": [2, 3, 4], "mid.0": [1, 2, 5]}


def made_up_prompts(n: int) -> Prompts:
    return load_prompts([f"prompt {i}" for i in range(n)])


def made_up_recipe(n: int, **settings: Any) -> dict[str, Any]:
    """The recipe of n images in shards of four."""
    return {
        "model": "m", "revision": "r", "scheduler": "s", "compute_dtype": "float32", "n_images": n,
        "prompts": made_up_prompts(n).digest, "num_inference_steps": 1, "steps": [0], "guidance_scale": 0.0,
        "height": 16, "width": 24, "halves": ["cond"], "hookpoints": SHAPES, "tokens_per_image": None,
        "batch_size": 4, "dtype": "float16", "images": None, "images_per_shard": 4, **settings,
    }  # fmt: skip


def made_up_updates(recipe: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Updates of all images, (image, row, token, d_in), as `observe` gives them."""
    rng = np.random.default_rng(seed)
    rows = len(recipe["steps"]) * len(recipe["halves"])
    updates = {}
    for name, (height, width, d_in) in recipe["hookpoints"].items():
        made = rng.normal(size=(recipe["n_images"], rows, height * width, d_in)).astype(np.float32)
        updates[name] = as_stored(made, recipe["dtype"])
    return updates


def as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    return array.astype(dtype)


def a_batch(
    recipe: dict[str, Any], updates: dict[str, np.ndarray], images: range, pictures: Sequence[Image.Image] = ()
) -> tuple[dict[str, np.ndarray], Sequence[Image.Image]]:
    """What is kept of some of the images."""
    layout = Layout.of(recipe)
    kept = {h: layout.keep(h, images, array[images.start : images.stop]) for h, array in updates.items()}
    return kept, pictures[images.start : images.stop]


def write_cache(
    folder: Path | str,
    recipe: dict[str, Any],
    updates: dict[str, np.ndarray],
    pictures: Sequence[Image.Image] = (),
    *,
    stop_after: int | None = None,
) -> Artifact:
    """Write a cache, or only its first few missing shards."""
    artifact = Store.at(folder).artifact("activations", "test", recipe)
    writer = ShardWriter(artifact, made_up_prompts(recipe["n_images"]))
    with artifact.lock():
        writer.prepare()
        for shard in writer.missing()[:stop_after]:
            writer.write(shard, [a_batch(recipe, updates, range(shard.first_image, shard.stop), pictures)])
        return artifact if stop_after is not None else writer.finish({})


def rewrite_stamp(folder: Path, change: Callable[[dict[str, Any]], None], *, digest: bool = True) -> None:
    """What a stranger can do: another stamp that checks out."""
    stamp = json.loads((folder / "stamp.json").read_text())
    change(stamp)
    if digest:
        told = {"recipe": stamp["recipe"], "files": stamp["files"]}
        stamp["digest"] = sha256(canonical_json(told).encode())
    stamp["check"] = sha256(canonical_json({k: v for k, v in stamp.items() if k != "check"}).encode())
    (folder / "stamp.json").write_text(json.dumps(stamp))


def a_cache(folder: Path | str, n: int = 12, **settings: Any) -> tuple[ActivationCache, dict[str, np.ndarray]]:
    """A finished cache and what it should hold."""
    recipe = made_up_recipe(n, **settings)
    updates = made_up_updates(recipe)
    return ActivationCache(write_cache(folder, recipe, updates)), updates

"""Collect updates: run a pipeline over prompts and keep what chosen hookpoints add, resumably."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from sdxl_sae_kit.artifacts import Artifact, Store, human_bytes, whole_number
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, resolve
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.pipelines import SIZE_STEP, chosen, chosen_guidance, describe, dtype_name, generate, scheduler
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.shards import ShardWriter

_SHARD_IMAGES, _SHARD_BYTES = 256, 256 * 2**20


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection will write, known before it starts."""

    n_images: int
    n_tokens: int
    """Tokens of all hookpoints together."""
    nbytes: int
    """Bytes of updates; thumbnails add a few kB an image."""

    def __str__(self) -> str:
        return f"{self.n_images:,} images, {self.n_tokens:,} tokens, {human_bytes(self.nbytes)} of updates"


def plan_collection(recipe: dict[str, Any], n_images: int) -> CollectionPlan:
    """Forecast a collection from its recipe.

    It has images × steps × guidance halves × Σ over hookpoints of height·width·d_in numbers.
    """
    rows = n_images * recipe["num_inference_steps"] * len(recipe["halves"])
    shapes = recipe["hookpoints"].values()
    numbers = rows * sum(height * width * d_in for height, width, d_in in shapes)
    return CollectionPlan(
        n_images, rows * sum(h * w for h, w, _ in shapes), numbers * (4 if recipe["dtype"] == "float32" else 2)
    )


def collect(
    pipe: Any,
    prompts: Prompts | Iterable[str],
    hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 32,
    thumbnails: bool = True,
    dtype: torch.dtype | str = "float16",
    store: Store | Path | str | None = None,
) -> ActivationCache:
    """Make an image of every prompt and cache the updates of `hookpoints`; returns at once what was collected before.

    Killed at any moment, it goes on where it was when called again, and ends bit-identical. Without `thumbnails` the
    U-Net stops after the last hookpoint and no image is decoded, which is faster.

    Args:
        pipe: from `load_pipeline`, or any SDXL pipeline of diffusers.
        prompts: from `load_prompts`, or texts (the i-th gets seed i).
        hookpoints: short names or module paths, or one of them.
        num_inference_steps, guidance_scale, height, width: by default the model's preset.
        batch_size: images at once.
        thumbnails: keep a small picture of every image, for galleries.
        dtype: how numbers are stored: float16, bfloat16 or float32.
        store: folder of artifacts.

    Raises:
        HookpointError: unknown hookpoint.
        ArtifactError: another process is collecting the same.
        KitError: an impossible setting, or an update that does not fit into float16.
    """
    hookpoints = [hookpoints] if isinstance(hookpoints, str) else hookpoints
    if not hookpoints:
        raise KitError(f"collect needs at least one hookpoint, such as {DEFAULT_HOOKPOINTS[0]!r}.")
    prompts = prompts if isinstance(prompts, Prompts) else load_prompts(prompts)
    model = describe(pipe)
    steps = chosen("num_inference_steps", num_inference_steps, model.num_inference_steps)
    guidance = chosen_guidance(guidance_scale, model.guidance_scale)
    height = chosen("height", height, model.height, SIZE_STEP)
    width = chosen("width", width, model.width, SIZE_STEP)
    recipe = {
        "model": model.name,
        "revision": model.revision,
        "scheduler": scheduler(pipe),
        "prompts": prompts.digest,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "halves": ["uncond", "cond"] if guidance > 1 else ["cond"],
        "height": height,
        "width": width,
        "hookpoints": _shapes(pipe, hookpoints, height, width),
        "batch_size": whole_number("batch_size", batch_size),
        "thumbnails": thumbnails,
        "dtype": dtype_name(dtype),
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    readable = f"{Path(model.name).name}_{steps}step_{len(prompts)}images"
    artifact = Store.at(store).artifact("activations", readable, recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:  # by another process, while this one waited
                _collect(pipe, prompts, artifact)
    return ActivationCache(artifact)


def _shapes(pipe: Any, hookpoints: Sequence[str], height: int, width: int) -> dict[str, list[int]]:
    found = [resolve(pipe.unet, name) for name in hookpoints]
    latent = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    return {hookpoint.name: [*hookpoint.grid(*latent), hookpoint.d_in] for hookpoint in found}


def _collect(pipe: Any, prompts: Prompts, artifact: Artifact) -> None:
    recipe, batch_size = dict(artifact.recipe), artifact.recipe["batch_size"]
    plan = plan_collection(recipe, len(prompts))
    per_image = max(1, plan.nbytes // len(prompts))
    batches_per_shard = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // per_image) // batch_size)
    writer = ShardWriter(artifact, prompts, batches_per_shard * batch_size)
    there = f" {writer.next_image:,} of the images are there already." if writer.next_image else ""
    tqdm.write(f"Collecting {plan}, as {artifact.name}.{there}")
    with tqdm(total=len(prompts), initial=writer.next_image, desc="collect", unit="image") as bar:
        for start in range(writer.next_image, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            writer.append(*_run(pipe, batch, recipe))
            bar.update(len(batch))
    writer.finish()


def _run(pipe: Any, batch: Prompts, recipe: dict[str, Any]) -> tuple[dict[str, NDArray[Any]], list[Image.Image]]:
    """Make one batch of images; per hookpoint their updates as (image, row, token, d_in)."""
    settings = {key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    images: list[Image.Image] = []
    dtype = getattr(torch, recipe["dtype"])
    with record(pipe, recipe["hookpoints"], dtype=dtype, stop_early=not recipe["thumbnails"]) as recording:
        images = generate(pipe, batch.texts, batch.seeds, **settings)
    updates = {}
    for hookpoint in recipe["hookpoints"]:
        rows = [recording.update(hookpoint, step, half) for step in recording.steps for half in recording.halves]
        stacked = torch.stack(rows, dim=1).flatten(2, 3).cpu()
        if not stacked.isfinite().all():
            raise KitError(
                f"An update of {hookpoint} is not finite in {recipe['dtype']}. "
                "Collect with dtype='bfloat16', or load the pipeline in float32."
            )
        updates[hookpoint] = (stacked.view(torch.uint16) if dtype == torch.bfloat16 else stacked).numpy()
    return updates, images

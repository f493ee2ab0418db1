"""What is read while images are made: the recipe of an observation, and one batch of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.devices import dtype_name
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, Hookpoint, resolve
from sdxl_sae_kit.hooks import Recording, watch
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.pictures import IMAGES
from sdxl_sae_kit.pipelines import (
    SIZE_STEP,
    Model,
    chosen,
    chosen_guidance,
    describe,
    draw,
    scheduler,
)
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.tiny.quiet import hushed

HALVES = ("uncond", "cond")
_NO_WEIGHTS = {"prompts": "", "scheduler": "", "compute_dtype": ""}  # what an outline leaves open
_LARGEST = 8
_SHARD_IMAGES, _SHARD_BYTES = 128, 128 * 2**20  # what an interruption may cost


def as_prompts(prompts: Prompts | Iterable[str]) -> Prompts:
    """Prompts as they are, or texts of which the i-th gets seed i."""
    return prompts if isinstance(prompts, Prompts) else load_prompts(prompts)


def make_recipe(
    pipe: Any, prompts: Prompts, hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS, **settings: Any
) -> dict[str, Any]:
    """Everything that decides what is read, as JSON values; `settings` are those of `collect`.

    Raises:
        HookpointError: unknown hookpoint.
        KitError: an impossible setting.
    """
    model = describe(pipe)
    found = [resolve(pipe.unet, name) for name in ([hookpoints] if isinstance(hookpoints, str) else hookpoints)]
    check_settings(settings)
    told = {
        "scheduler": scheduler(pipe),
        "prompts": prompts.digest,
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    return told | outline(model, found, pipe.vae_scale_factor, len(prompts), **settings)


def check_settings(settings: Mapping[str, Any], *, but: Sequence[str] = ()) -> None:
    """Refuse settings that `collect` does not have, or those that do not apply.

    Raises:
        KitError: naming the first of them.
    """
    known = [name for name, p in inspect.signature(outline).parameters.items() if p.kind == p.KEYWORD_ONLY]
    known = [name for name in known if name not in but]
    for name in settings:
        if name not in known:
            raise KitError(
                f"There is no setting {name!r} here; there are {', '.join(known)}.{did_you_mean(name, known)}"
            )


def outline(
    model: Model,
    hookpoints: Sequence[Hookpoint],
    vae_scale_factor: int,
    n_images: int,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: Sequence[int] | int | None = None,
    half: str | None = None,
    tokens_per_image: int | None = None,
    batch_size: int = 32,
    images: str | None = "thumbnails",
    dtype: torch.dtype | str = "float16",
) -> dict[str, Any]:
    """The part of a recipe that is known without weights: what has which shape."""
    if not hookpoints:
        raise KitError(f"At least one hookpoint is needed, such as {DEFAULT_HOOKPOINTS[0]!r}.")
    if images not in (None, *IMAGES):
        hint = did_you_mean(str(images), IMAGES)
        raise KitError(f"images is None, {', '.join(map(repr, IMAGES))}, not {images!r}.{hint}")
    n_steps = chosen("num_inference_steps", num_inference_steps, model.num_inference_steps)
    guidance = chosen_guidance(guidance_scale, model.guidance_scale)
    height = chosen("height", height, model.height, SIZE_STEP)
    width = chosen("width", width, model.width, SIZE_STEP)
    if height > _LARGEST * model.height or width > _LARGEST * model.width:
        raise KitError(
            f"height {height} and width {width} are more than {_LARGEST} times what {model.name} draws "
            f"({model.height}×{model.width}). Choose smaller ones."
        )
    latent = height // vae_scale_factor, width // vae_scale_factor
    grids = {hookpoint.name: [*hookpoint.grid(*latent), hookpoint.d_in] for hookpoint in hookpoints}
    if tokens_per_image is not None:
        whole_number("tokens_per_image", tokens_per_image)
        if tokens_per_image >= max(h * w for h, w, _ in grids.values()):
            tokens_per_image = None  # that is all of them
    recipe = {
        "model": model.name,
        "revision": model.revision,
        "n_images": n_images,
        "num_inference_steps": n_steps,
        "steps": _steps(steps, n_steps),
        "guidance_scale": guidance,
        "halves": _halves(half, guidance),
        "height": height,
        "width": width,
        "hookpoints": grids,
        "tokens_per_image": tokens_per_image,
        "batch_size": whole_number("batch_size", batch_size),
        "images": images,
        "dtype": dtype_name(dtype),
    }
    return recipe | {"images_per_shard": _images_per_shard(recipe)}


def _images_per_shard(recipe: Mapping[str, Any]) -> int:
    """At most 128 images and about 128 MB, but whole batches, so that a batch is always made of the same images."""
    per_image = Layout.of({**_NO_WEIGHTS, **recipe, "images_per_shard": 1}).nbytes(1)
    batch_size: int = recipe["batch_size"]
    return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // per_image) // batch_size) * batch_size


def _steps(steps: Sequence[int] | int | None, n_steps: int) -> list[int]:
    if steps is None:
        return list(range(n_steps))
    steps = [steps] if isinstance(steps, int) else steps
    chosen_steps = sorted({whole_number("steps", step, least=0) for step in steps})
    if not chosen_steps or chosen_steps[-1] >= n_steps:
        raise KitError(f"steps must be denoising steps from 0 to {n_steps - 1}, not {list(steps)}.")
    return chosen_steps


def _halves(half: str | None, guidance: float) -> list[str]:
    there = list(HALVES) if guidance > 1 else ["cond"]
    if half is None:
        return there
    if half not in there:
        raise KitError(
            f"half is {' or '.join(map(repr, there))} at guidance_scale {guidance:g}, not {half!r}. "
            "Leave it out to keep all there is."
        )
    return [half]


@contextmanager
def observing(
    pipe: Any, prompts: Prompts, recipe: Mapping[str, Any]
) -> Iterator[Callable[[Sequence[int]], tuple[dict[str, NDArray[Any]], list[Image.Image]]]]:
    """Yield what makes the images with these indices, as one batch, and returns what is kept of them.

    That is, updates per hookpoint as (image, row, token, d_in), bfloat16 as its bits, and the pictures, or none. It
    raises KitError where an update does not fit into the recipe's dtype.
    """
    settings = {key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    dtype, early, layout = getattr(torch, recipe["dtype"]), recipe["images"] is None, Layout.of(recipe)
    with (
        hushed(),  # long prompts are counted beforehand, not told of at every batch
        watch(pipe, recipe["hookpoints"], dtype=dtype, steps=recipe["steps"], stop_early=early) as watched,
    ):

        def observe(images: Sequence[int]) -> tuple[dict[str, NDArray[Any]], list[Image.Image]]:
            batch = prompts.take(images)
            recording, pictures = watched(lambda: draw(pipe, batch.texts, batch.seeds, **settings))
            kept = {name: layout.keep(name, images, _rows(recording, name, recipe)) for name in layout.hookpoints}
            return kept, pictures or []

        yield observe


def _rows(recording: Recording, hookpoint: str, recipe: Mapping[str, Any]) -> NDArray[Any]:
    """Updates as (image, row, token, d_in), step by step and half by half."""
    rows = [recording.update(hookpoint, step, half) for step in recipe["steps"] for half in recipe["halves"]]
    stacked = (rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)).flatten(2, 3)
    if not torch.stack(torch.aminmax(stacked)).isfinite().all():  # nine times faster than asking every number
        raise KitError(
            f"An update of {hookpoint} is not finite in {recipe['dtype']}. "
            "Collect with dtype='bfloat16', or load the pipeline in float32."
        )
    bits: NDArray[Any] = (stacked.view(torch.uint16) if stacked.dtype == torch.bfloat16 else stacked).numpy()
    return bits

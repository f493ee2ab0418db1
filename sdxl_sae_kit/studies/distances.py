"""Pictures in pairs, clean and changed, of the same prompt and seed: how they are drawn, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.judges import PictureJudge
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.pipelines import chosen, chosen_guidance, describe, generate, scheduler
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.questions import expected
from sdxl_sae_kit.tiny.world import FACTORS

MEASURES = ("pixel", "perceptual", "semantic")
"""Distances of two pictures: mean |difference| over pixels and channels, colours being 0 to 1; and the judge's two."""

_TILE, _GAP = 96, 4

Pictures = Float[np.ndarray, "image y x 3"]


def made_by(pipe: Any) -> dict[str, str]:
    """What of a pipeline decides its pictures, for recipes."""
    model = describe(pipe)
    return {
        "model": model.name,
        "revision": model.revision,
        "scheduler": scheduler(pipe),
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }


def drawing(pipe: Any, num_inference_steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Settings of `generate` for recipes; what is None is as the model is meant to be used.

    Raises:
        KitError: impossible steps or guidance.
    """
    model = describe(pipe)
    return {
        "num_inference_steps": chosen("num_inference_steps", num_inference_steps, model.num_inference_steps),
        "guidance_scale": chosen_guidance(guidance_scale, model.guidance_scale),
        "height": model.height,
        "width": model.width,
    }


def draw(pipe: Any, prompts: Prompts, settings: Mapping[str, Any]) -> Pictures:
    """The pictures of these prompts and seeds, colours 0 to 1."""
    drawn = generate(pipe, list(prompts.texts), list(prompts.seeds), **settings, output_type="np")
    return np.asarray(drawn, dtype=np.float32)


def batches(prompts: Prompts, size: int) -> dict[str, Prompts]:
    """The prompts in batches, by the name that a batch's results are kept under."""
    starts = range(0, len(prompts), size)
    return {
        f"images {start} to {min(start + size, len(prompts)) - 1}": prompts[start : start + size] for start in starts
    }


def distances(judge: PictureJudge | None, clean: Pictures, changed: Pictures) -> dict[str, list[float]]:
    """Every one of `MEASURES` that can be told, image by image."""
    told = {"pixel": np.abs(changed - clean).mean(axis=(1, 2, 3), dtype=np.float64)}
    if judge is not None:
        maps, semantic = judge.perceptual(clean, changed), judge.semantic(clean, changed)
        told |= {} if maps is None else {"perceptual": maps.mean(axis=(1, 2), dtype=np.float64)}
        told |= {} if semantic is None else {"semantic": semantic}
    return {measure: np.asarray(values, dtype=np.float64).tolist() for measure, values in told.items()}


def answers(judge: PictureJudge | None, pictures: Pictures) -> dict[str, Int[np.ndarray, " image"]]:
    """The judge's likeliest answer to every factor, as its place; empty where it knows no factors."""
    told = judge.factors(pictures) if judge is not None else None
    return {factor: each.argmax(axis=1) for factor, each in (told or {}).items()}


def adherence(given: Mapping[str, Int[np.ndarray, " image"]], prompts: Prompts) -> list[float | None]:
    """Share of each prompt's visible factors that the judge's answers name; None where nothing is known to compare."""
    told = [
        [
            given[f][i] == FACTORS[f].index(v)
            for f, v in expected(factors).items()
            if v in FACTORS.get(f, ()) and f in given
        ]
        for i, factors in enumerate(prompts.factors)
    ]
    return [float(np.mean(each)) if each else None for each in told]


def by_prompt(values: Any, texts: Sequence[str]) -> NDArray[np.float64]:
    """Means over the images of each prompt, whose rows are the independent clusters of a bootstrap."""
    array, of = np.asarray(values, dtype=np.float64), np.unique(np.asarray(texts), return_inverse=True)[1]
    return np.stack([array[of == prompt].mean(axis=0) for prompt in range(of.max() + 1)])


def estimate(
    name: str,
    rows: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> dict[str, Any]:
    """A mean over prompts, or a function of the columns' means, with its 95 % bootstrap interval over prompts."""
    means = rows.mean(axis=0)
    return {
        name: float(statistic(means) if statistic else means),
        f"{name} interval": bootstrap_interval(rows, statistic),
    }


def written(row: Mapping[str, Any], name: str, share: bool = False) -> str:
    """A value with its interval, as `estimate` gave them; a dash for what could not be estimated."""
    numbers = (row[name], *row[f"{name} interval"])
    value, low, high = ("–" if np.isnan(x) else f"{x:.1%}" if share else html.short(x) for x in numbers)
    return value if value == "–" else f"{value} [{low}, {high}]"


def sheet(rows: Sequence[Sequence[Float[np.ndarray, "y x 3"]]]) -> bytes:
    """One WebP picture of tiles in rows."""
    return joined([[tile(picture) for picture in row] for row in rows])


def tile(picture: Float[np.ndarray, "y x 3"]) -> Image.Image:
    """A picture, colours 0 to 1, as small as a sheet shows it."""
    made = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return made.resize((_TILE, _TILE), Image.Resampling.BICUBIC)


def joined(rows: Sequence[Sequence[Image.Image]]) -> bytes:
    """One WebP picture of the tiles that `tile` made."""
    step = _TILE + _GAP
    made = Image.new("RGB", (max(map(len, rows)) * step - _GAP, len(rows) * step - _GAP), "white")
    for down, row in enumerate(rows):
        for across, each in enumerate(row):
            made.paste(each, (across * step, down * step))
    return html.to_webp(made)

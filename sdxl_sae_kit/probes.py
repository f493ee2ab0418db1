"""Probes: how well a linear reading of a whole block's update tells what images show; features play no part in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.metrics import areas_under_curve, resampled_areas
from sdxl_sae_kit.questions import Question, ask_of

Row = dict[str, Any]

MAX_IMAGES = 2048
"""At most so many images of a split are read, spread over all of it."""

_RESAMPLES = 1000


@checked
@torch.no_grad()
def probe(cache: Activations, hookpoints: Iterable[str] | None = None, *, step: int = 0) -> list[Row]:
    """How well logistic regression on each block's update tells each factor of the prompts.

    The update is averaged over each of its four quadrants, these numbers standardised; for every value of a factor (see
    `questions.ask_of`) a logistic regression (L2, C = 0.1) is fitted on training images. `AUC` is that of its decision
    on held-out images, averaged over the factor's values, with its 95 % bootstrap interval over those images; chance
    is 0.5. One row per hookpoint and factor.

    Args:
        cache: updates of prompts that tell their factors, whole grids.
        hookpoints: those of the cache unless given.
        step: which denoising step; with guidance the cond half is read.

    Raises:
        ArtifactError: the cache keeps only some tokens of each image.
        HookpointError: the cache does not have one of these hookpoints.
        KitError: hookpoints are one name; the prompts tell no factors, or none often enough; or the cache does not have
            this step.

    >>> show_table(probe(cache), "What each block's update tells")                                 # doctest: +SKIP
    """
    chosen, row = _chosen(cache, hookpoints), cache.row(step)
    train, held_out = (_spread(cache.images(split)) for split in ("train", "held_out"))
    images, training = np.concatenate([train, held_out]), np.arange(len(train) + len(held_out)) < len(train)
    questions = ask_of(cache, images, training)
    n = len(held_out)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    tqdm.write(
        f"Probing {len(chosen)} hookpoints for {sum(len(question.values) for question in questions)} values of "
        f"{len(questions)} factors on {len(train):,} images, and testing on {n:,}."
    )
    rows = list[Row]()
    for hookpoint in tqdm(chosen, desc="probe", unit="hookpoint"):
        means = _quadrants(cache, hookpoint, images, row)
        with threadpool_limits(1):  # the products are so small that more threads wait for each other
            rows += _probe(hookpoint, means, questions, training, draws)
    return rows


def _chosen(cache: Activations, hookpoints: Iterable[str] | None) -> list[str]:
    """The hookpoints to be probed, refused where their quadrants cannot be told."""
    if isinstance(hookpoints, str):
        raise KitError(f"probe: hookpoints are several names, not {hookpoints!r}. Pass [{hookpoints!r}].")
    if cache.layout.tokens_per_image is not None:
        raise ArtifactError(
            f"probe: {cache.name} keeps {cache.layout.tokens_per_image} tokens of each image; quadrants need whole "
            "grids. Collect some images again without tokens_per_image."
        )
    chosen = list(cache.hookpoints if hookpoints is None else hookpoints)
    for hookpoint in chosen:
        cache.grid(hookpoint)  # refuses a hookpoint that the cache does not have
    return chosen


def _spread(images: Int[np.ndarray, " image"]) -> NDArray[np.integer]:
    return np.asarray(images[np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).astype(int)])


def _quadrants(
    cache: Activations, hookpoint: str, images: Int[np.ndarray, " image"], row: int
) -> Float[np.ndarray, "image mean"]:
    """Means of the update over the four quadrants of each image."""
    height, width = cache.grid(hookpoint)
    parts = [
        cache.read(hookpoint, part)[:, row].float().unflatten(1, (height, width)).permute(0, 3, 1, 2)
        for part in cache.parts(hookpoint, images)
    ]
    means = torch.cat([torch.nn.functional.adaptive_avg_pool2d(part, 2).flatten(1) for part in parts])
    return np.asarray(means.numpy(), dtype=np.float32)


def _probe(
    hookpoint: str,
    means: Float[np.ndarray, "image mean"],
    questions: Sequence[Question],
    training: Bool[np.ndarray, " image"],
    draws: Int[np.ndarray, "sample held_out"],
) -> Iterator[Row]:
    """A row per factor."""
    x = StandardScaler().fit(means[training]).transform(means)
    for question in questions:
        seen, tested = question.asked & training, question.asked & ~training
        drawn, areas, samples = draws[:, question.asked[~training]], list[float](), list[NDArray[np.float64]]()
        for shows in question.shows.T:
            fitted = LogisticRegression(C=0.1, max_iter=200).fit(x[seen], shows[seen])
            told = fitted.decision_function(x[tested])
            areas.append(float(areas_under_curve(told[:, None], shows[tested])[0]))
            samples.append(resampled_areas(told, shows[tested], drawn))
        low, high = np.nanquantile(_mean(np.stack(samples)), [0.025, 0.975])
        yield {
            "hookpoint": hookpoint, "factor": question.factor, "AUC": float(np.mean(areas)),
            "AUC interval": (float(low), float(high)), "values": len(areas), "images": int(tested.sum()),
        }  # fmt: skip


def _mean(samples: Float[np.ndarray, "value sample"]) -> Float[np.ndarray, " sample"]:
    """The mean over values; a sample that lacks some tells the mean of the others."""
    told = np.isfinite(samples).sum(axis=0)
    return np.asarray(np.nansum(samples, axis=0) / np.where(told > 0, told, np.nan))

"""Find features: the ones with the most energy, and the ones that tell best whether an image shows something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from sdxl_sae_kit.artifacts import whole_number
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.metrics import areas_under_curve
from sdxl_sae_kit.sae import FIRES

MIN_IMAGES = 4
"""What can be said of a feature or a value that at least so many images of a split show (and as many do not)."""


def held_out_firing(stats: FeatureStats) -> Bool[np.ndarray, "image latent"]:
    """Which latents fire on which images; False for images that are not held out."""
    return np.asarray((stats.image_activations("max") > FIRES) & stats.prompts.held_out[:, None])


def most_energetic(stats: FeatureStats, n: int = 12) -> list[int]:
    """Latents with the most energy, density · (mean² + std²), among the local ones of which something can be measured.

    They fire on at least 4 held-out images and on at most half of the tokens.

    Raises:
        KitError: there is none.
    """
    n = whole_number("most_energetic: n", n)
    local = (held_out_firing(stats).sum(axis=0) >= MIN_IMAGES) & (stats.density <= 0.5)
    if not local.any():
        raise KitError(f"No latent of {stats.sae} fires on {MIN_IMAGES} held-out images. Measure more prompts.")
    energy = np.where(local, stats.density * (stats.mean**2 + stats.std**2), -1)
    chosen: list[int] = np.argsort(-energy, kind="stable")[: min(n, int(local.sum()))].tolist()
    return chosen


def best_latents(stats: Mapping[str, FeatureStats]) -> list[dict[str, Any]]:
    """For every value of every known factor, the latent whose maximum over the image tells it best, at any hookpoint.

    The latent is chosen by AUC on every second image and measured on the others, so that choosing among many flatters
    nobody. AUC is the probability that an image with the value has the higher activation than one without
    (Mann–Whitney U), 0.5 is chance; `interval` is DeLong's 95 % interval (1988) over the images measured.

    Args:
        stats: by hookpoint, all measured on the same images.

    Raises:
        KitError: nothing given, different images, or prompts without known factors.
    """
    if not stats or len({s.prompts.digest for s in stats.values()}) > 1:
        raise KitError("best_latents needs statistics of one or more hookpoints, all measured on the same images.")
    strengths = np.concatenate([s.image_activations("max") for s in stats.values()], axis=1)
    owners = [(hookpoint, latent) for hookpoint, s in stats.items() for latent in range(s.d_sae)]
    prompts = next(iter(stats.values())).prompts
    choosing = np.arange(len(prompts)) % 2 == 0
    rows = []
    for factor, value, known, shows in _values(prompts.factors):
        halves = [known & half for half in (choosing, ~choosing)]
        if min(_rarer(shows[half]) for half in halves) < MIN_IMAGES:
            continue
        best = int(areas_under_curve(strengths[halves[0]], shows[halves[0]]).argmax())
        rows.append(
            {"factor": factor, "value": value, **_measured(strengths[halves[1], best], shows[halves[1]], *owners[best])}
        )
    if not rows:
        raise KitError(
            "No factor of these prompts is known often enough. Use prompts of 'world' or 'scenes', or more of them."
        )
    return rows


def _measured(
    strength: NDArray[np.floating], shows: Bool[np.ndarray, " image"], hookpoint: str, latent: int
) -> dict[str, Any]:
    auc = float(areas_under_curve(strength[:, None], shows)[0])
    wins = (strength[shows][:, None] > strength[~shows]) + (strength[shows][:, None] == strength[~shows]) / 2
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in (wins.mean(axis=1), wins.mean(axis=0))))
    low, high = np.clip([auc - 1.96 * error, auc + 1.96 * error], 0, 1).tolist()
    return {"hookpoint": hookpoint, "latent": latent, "AUC": auc, "interval": (low, high), "images": len(strength)}


def _values(factors: tuple[dict[str, str], ...]) -> Iterator[tuple[str, str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Factor, value, the images of which the factor is known, and those that show the value."""
    for factor in sorted({name for known in factors for name in known}):
        values = np.array([known.get(factor, "") for known in factors])
        for value in sorted(set(values) - {""}):
            yield factor, value, values != "", values == value


def _rarer(shows: NDArray[np.bool_]) -> int:
    return int(min(shows.sum(), (~shows).sum()))

"""How well two orders agree: Spearman's ρ with its interval, and its range by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata

from sdxl_sae_kit.metrics import bootstrap_interval

_SHUFFLES = 2000


def spearman(one: Float[np.ndarray, "*draw n"], other: Float[np.ndarray, "*draw n"]) -> Float[np.ndarray, "*draw"]:
    """Spearman's ρ along the last axis: Pearson's correlation of the ranks, ties sharing theirs; NaN where all tie."""
    a, b = (rankdata(values, axis=-1) for values in (one, other))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    spread = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.asarray(np.divide((a * b).sum(axis=-1), spread, out=np.full(spread.shape, np.nan), where=spread > 0))


def rank_correlation(
    one: Float[np.ndarray, "prompt latent"], other: Float[np.ndarray, "prompt latent"], *, sizes: bool = False
) -> dict[str, Any]:
    """ρ of the latents' means over prompts, or of their sizes, with its 95 % bootstrap interval over prompts."""

    def of(means: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = np.split(np.abs(means) if sizes else means, 2, axis=-1)
        return spearman(a, b)

    rows = np.concatenate([one, other], axis=1)
    return {"ρ": float(of(rows.mean(axis=0))), "ρ interval": bootstrap_interval(rows, of)}


def shuffled_range(true: Float[np.ndarray, "prompt latent"]) -> dict[str, Any]:
    """Mean and 95 % range of ρ for orders of the latents that are drawn at random."""
    means = true.mean(axis=0)
    dealt = np.random.default_rng(0).permuted(np.tile(np.arange(len(means)), (_SHUFFLES, 1)), axis=1)
    found = spearman(dealt.astype(float), np.broadcast_to(means, dealt.shape))
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return {"ρ": float(np.mean(found)), "ρ interval": (float(low), float(high))}

"""Latents that fire in one place but hardly in another: densities on the same prompts, compared by bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from sdxl_sae_kit.metrics import bootstrap_intervals

MIN_PROMPTS = 5
"""A latent is live where it fires on at least so many prompts at the row where it is densest."""
HARDLY, SURELY = 0.1, 0.5
"""It hardly fires elsewhere: its density is below this share, and the interval's upper end below that one."""

Counts = Int[np.ndarray, "prompt row latent"]


def live(fired: Counts) -> Int[np.ndarray, " found"]:
    """The latents that fire on at least 5 prompts at the row where they are densest."""
    densest = fired.sum(axis=0).argmax(axis=0)
    found: NDArray[np.intp] = np.flatnonzero(
        (np.take_along_axis(fired, densest[None, None], axis=1)[:, 0] > 0).sum(axis=0) >= MIN_PROMPTS
    )
    return found


def lost(
    here: Counts, there: Int[np.ndarray, "prompt row2 latent"], n_tokens: Int[np.ndarray, " prompt"]
) -> list[dict[str, Any]]:
    """The live latents of one place that hardly fire at the other, on the same prompts.

    A latent's density at a place is the share of tokens on which it fires at the row where that is greatest, so that
    one which fires at a single denoising step is not lost. Hardly: the ratio of the densities is below 0.1, and the
    upper end of its 95 % bootstrap interval over prompts below ½. `n_tokens` counts each prompt's tokens at one row.
    """
    latents, rows = live(here), []
    densities = np.stack([each.sum(axis=0).max(axis=0) for each in (here, there)])[:, latents]
    for latent in latents[densities[1] < HARDLY * densities[0]].tolist():
        counts = np.concatenate([n_tokens[:, None], here[..., latent], there[..., latent]], axis=1).astype(np.float64)
        values = _densities(counts.mean(axis=0), here.shape[1])
        ends = bootstrap_intervals(counts, lambda means: _densities(means, here.shape[1])).T
        if ends[2, 1] < SURELY:
            row: dict[str, Any] = {"latent": latent}
            for name, value, end in zip(("density here", "density there", "ratio"), values, ends, strict=True):
                row |= {name: float(value), f"{name} interval": tuple(end.tolist())}
            rows.append(row | {"prompts": len(n_tokens)})
    return rows


def _densities(means: Float[np.ndarray, "*sample number"], rows: int) -> Float[np.ndarray, "*sample 3"]:
    """Of mean tokens, then mean counts at the rows here and there: the greatest densities, and their ratio."""
    one, other = means[..., 1 : 1 + rows].max(axis=-1), means[..., 1 + rows :].max(axis=-1)
    ratio = np.divide(other, one, out=np.full_like(one, np.inf), where=one > 0)  # a sample may not see it fire here
    return np.stack([one / means[..., 0], other / means[..., 0], ratio], axis=-1)

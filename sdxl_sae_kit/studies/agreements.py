"""Do several measures agree on which block matters for which factor: Spearman's ρ over the cells of two tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sdxl_sae_kit.studies.rank_agreement import spearman

_SHUFFLES, _SAMPLES = 2000, 1000

Cells = Mapping[tuple[str, str], float]
"""A number for each block and factor."""


def agreement(one: Cells, other: Cells, seed: int = 0) -> dict[str, Any]:
    """Spearman's ρ of two tables over block × factor, each factor's mean over blocks taken off.

    What is left is which blocks a factor belongs to more than to others, not which factors are easy. `p`: one-sided,
    the share of 2,000 shuffles of the block labels within each factor with as large a ρ, the tables' own counted. The
    95 % interval is a bootstrap over factors. NaN for fewer than two blocks or factors that both have.
    """
    blocks, factors = (list(dict.fromkeys(key[at] for key in one if key in other)) for at in (0, 1))
    factors = [factor for factor in factors if all((b, factor) in one and (b, factor) in other for b in blocks)]
    if min(len(blocks), len(factors)) < 2:
        return {
            "ρ": np.nan,
            "ρ interval": (np.nan, np.nan),
            "p": np.nan,
            "blocks": len(blocks),
            "factors": len(factors),
        }
    a, b = (_centred(table, blocks, factors) for table in (one, other))
    rng = np.random.default_rng(seed)
    rho = float(spearman(a.ravel(), b.ravel()))
    shuffled = np.stack([rng.permuted(b, axis=0).ravel() for _ in range(_SHUFFLES)])
    chance = spearman(np.broadcast_to(a.ravel(), shuffled.shape), shuffled)
    drawn = rng.integers(len(factors), size=(_SAMPLES, len(factors)))
    samples = spearman(*(np.moveaxis(table[:, drawn], 1, 0).reshape(_SAMPLES, -1) for table in (a, b)))
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return {
        "ρ": rho, "ρ interval": (float(low), float(high)),
        "p": (1 + int((chance >= rho - 1e-12).sum())) / (1 + _SHUFFLES), "blocks": len(blocks), "factors": len(factors),
    }  # fmt: skip


def _centred(table: Cells, blocks: Sequence[str], factors: Sequence[str]) -> Float[np.ndarray, "block factor"]:
    values = np.array([[table[block, factor] for factor in factors] for block in blocks], dtype=np.float64)
    return np.asarray(values - values.mean(axis=0))

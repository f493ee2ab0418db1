"""Edits that the effect of a feature is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.sae import SAE

CONTROLS = ("random direction", "other feature", "untrained SAE", "mixed features")
CONDITIONS = ("ablated", *CONTROLS)


def edits(sae: SAE, stats: FeatureStats, feature: int, seed: int) -> tuple[dict[str, dict[str, Any]], int]:
    """What `steer` is told in each condition, and which other feature is turned off in one of them."""
    others = stats.alive[stats.alive != feature]
    if not len(others):
        raise KitError(f"{sae.name} has no alive feature but {feature}, so nothing to compare it with.")
    other = int(others[np.abs(stats.density[others] - stats.density[feature]).argmin()])
    rng, decoder = np.random.default_rng([seed, feature]), sae.directions.cpu().numpy()
    off: dict[str, Any] = {"scale": {feature: 0.0}}

    def along(vector: Float[np.ndarray, " d_in"]) -> dict[str, Any]:
        return off | {"along": {feature: vector * (np.linalg.norm(decoder[feature]) / np.linalg.norm(vector))}}

    random, untrained = rng.standard_normal(sae.d_in), sae.untrained().directions[feature].cpu().numpy()
    mixed = (rng.standard_normal(stats.d_sae) * _spread(stats)) @ decoder
    chosen = (off, along(random), {"scale": {other: 0.0}}, along(untrained), along(mixed))
    return dict(zip(CONDITIONS, chosen, strict=True)), other


def _spread(stats: FeatureStats) -> Float[np.ndarray, " latent"]:
    """Standard deviation of every latent's activation over all tokens, those on which it does not fire included."""
    squares = stats.density * (stats.mean**2 + stats.std**2)
    return np.asarray(np.sqrt(np.maximum(squares - (stats.density * stats.mean) ** 2, 0)))

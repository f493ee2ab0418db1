"""Made-up descriptors of features of several blocks, with differences of known size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdxl_sae_kit.questions import ROLES
from sdxl_sae_kit.studies.descriptors import Descriptors, Kind

FACTORS = [factor for factors in ROLES.values() for factor in factors]
NAMED: dict[str, Kind] = {
    **dict.fromkeys([f"responds to {factor}" for factor in FACTORS], "response"),
    **dict.fromkeys(["active area", "same place"], "space"),
    **dict.fromkeys([f"changes {factor}" for factor in FACTORS], "cause"),
    **dict.fromkeys(["change inside", "spread", "coarse share", "colour share"], "cause"),
}  # type: ignore[dict-item]


def plant(
    hookpoint: str, more: Mapping[str, float] | None = None, *, n: int = 40, seed: int = 0, kinds: tuple[Kind, ...] = ()
) -> Descriptors:
    """Features whose descriptors are 1 ± 0.1 each, but for those that are so many deviations more or less."""
    rng = np.random.default_rng([seed, sum(map(ord, hookpoint))])
    names = [name for name, kind in NAMED.items() if not kinds or kind in kinds]
    shift = np.array([(more or {}).get(name, 0.0) for name in names])
    values = 1 + 0.1 * (rng.normal(size=(n, len(names))) + shift)
    return Descriptors(hookpoint, np.arange(n) * 2, tuple(names), tuple(NAMED[name] for name in names), values)

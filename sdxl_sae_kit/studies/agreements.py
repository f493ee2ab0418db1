"""Do several measures agree on which block matters for which factor: Spearman's ρ over the cells of two tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from math import factorial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sdxl_sae_kit.studies.rank_agreement import spearman

_ORDERS, _SAMPLES = 2000, 1000

Cells = Mapping[tuple[str, str], float]
"""A number for each block and factor."""


def agreement(one: Cells, other: Cells, seed: int = 0) -> dict[str, Any]:
    """Spearman's ρ of two tables over block × factor, the means of each factor and of each block taken off.

    What is left is which block a factor belongs to more than to others, not which factors are easy, nor which blocks
    matter for everything. `p`: one-sided, the share of orders of the blocks, each with all its factors, in which ρ is
    as large; of all orders where there are at most 2,000, else of that many drawn ones and the blocks' own. So with
    four blocks p is at least 1/24. The 95 % interval is a bootstrap over factors. NaN for fewer than two blocks or
    factors that both have. `verdict` says in words what that comes to.
    """
    blocks, factors = (list(dict.fromkeys(key[at] for key in one if key in other)) for at in (0, 1))
    factors = [factor for factor in factors if all((b, factor) in one and (b, factor) in other for b in blocks)]
    n = {"blocks": len(blocks), "factors": len(factors)}
    if min(n.values()) < 2:
        return {"ρ": np.nan, "ρ interval": (np.nan, np.nan), "p": np.nan, **n, "verdict": "cannot be told"}
    a, b = (np.array([[table[block, f] for f in factors] for block in blocks], dtype=float) for table in (one, other))
    rng = np.random.default_rng(seed)
    orders = _orders(len(blocks), rng)
    by_chance = _rho(np.broadcast_to(a, (len(orders), *a.shape)), b[orders])
    p = float((by_chance >= by_chance[0] - 1e-12).mean())
    drawn = rng.integers(len(factors), size=(_SAMPLES, len(factors)))
    low, high = np.nanquantile(_rho(*(np.moveaxis(table[:, drawn], 1, 0) for table in (a, b))), [0.025, 0.975])
    verdict = _verdict(p, 1 / len(orders))
    return {"ρ": float(by_chance[0]), "ρ interval": (float(low), float(high)), "p": p, **n, "verdict": verdict}


def _orders(n: int, rng: np.random.Generator) -> Int[np.ndarray, "order block"]:
    """Orders of n blocks, their own first."""
    if factorial(n) <= _ORDERS:
        return np.array(list(permutations(range(n))))
    return np.stack([np.arange(n), *(rng.permutation(n) for _ in range(_ORDERS))])


def _rho(
    one: Float[np.ndarray, "draw block factor"], other: Float[np.ndarray, "draw block factor"]
) -> Float[np.ndarray, "draw"]:
    left = (table - table.mean(axis=-1, keepdims=True) for table in (one, other))
    left = (table - table.mean(axis=-2, keepdims=True) for table in left)
    return spearman(*(table.reshape(len(table), -1).round(12) for table in left))


def _verdict(p: float, least: float) -> str:
    if least > 0.05:
        return "too few blocks to tell"
    return "they agree" if p <= 0.05 else "no evidence that they agree"

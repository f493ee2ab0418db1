"""Robustness: the same question with another number of clusters, method, seed, half of the features or descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from jaxtyping import Int
from sklearn.metrics import adjusted_rand_score

from sdxl_sae_kit.studies.clustering import Method, cluster
from sdxl_sae_kit.studies.contrasts import Pool, association

_Variation = tuple[str, Pool, int, Method, int]
"""Name, features, number of clusters, method, seed."""


def vary(
    pool: Pool, clusters: Int[np.ndarray, "feature"], number: int, method: Method, seed: int, permutations: int
) -> list[dict[str, Any]]:
    """A row per variation: what clusters tell of blocks (see `association`), and their agreement with the main ones.

    `adjusted Rand index` is with the clusters given, over the features that both have. What is not possible, such as
    more clusters than features, is left out, and so are seeds of a method that draws nothing.
    """
    main: dict[str, Any] = {"variation": f"as it is: {number} clusters, {method}"}
    rows = [main | association(pool.block, clusters, permutations, seed) | {"adjusted Rand index": 1.0}]
    for name, varied, k, how, start in _variations(pool, number, method, seed):
        if not 2 <= k < len(varied) or not varied.bounded.size:
            continue
        found = cluster(varied.bounded, k, how, start)
        same = np.isin(_keys(pool), _keys(varied))
        row = {"variation": name} | association(varied.block, found, permutations, seed)
        rows.append(row | {"adjusted Rand index": float(adjusted_rand_score(clusters[same], found))})
    return rows


def _keys(pool: Pool) -> Int[np.ndarray, "feature"]:
    return np.asarray(pool.block * (1 << 32) + pool.latents)


def _variations(pool: Pool, number: int, method: Method, seed: int) -> Iterator[_Variation]:
    for k in (number - 2, number - 1, number + 1, number + 2):
        yield f"{k} clusters", pool, k, method, seed
    for other in get_args(Method):
        if other != method:
            yield f"method {other}", pool, number, other, seed
    for step in (1, 2) if method != "ward" else ():
        yield f"seed {seed + step}", pool, number, method, seed + step
    half = np.random.default_rng(seed).permutation(len(pool)) < len(pool) // 2
    for name, chosen in (("first", half), ("second", ~half)):
        yield f"{name} half of the features", pool.where(chosen), number, method, seed
    kinds = list(dict.fromkeys(pool.kinds))
    for kind in kinds if len(kinds) > 1 else []:
        yield f"without {kind}", pool.only(*(k for k in kinds if k != kind)), number, method, seed

"""Statistics of paired pictures: pure functions of numbers, one formula each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

_EXACT, _FLIPS, _ROWS = 13, 10_000, 2_000


def by_cluster(values: Float[np.ndarray, "image *more"], clusters: Sequence[str]) -> Float[np.ndarray, "cluster *more"]:
    """The mean over the images of each cluster, in order of first appearance; NaN counts as not there.

    Images of one prompt, which differ in their seeds, are alike: a cluster is what is independent.
    """
    names = np.array(list(clusters), dtype=object)
    groups = [values[names == name] for name in dict.fromkeys(clusters)]
    there = [np.isfinite(group).sum(axis=0) for group in groups]
    sums = [np.nansum(group, axis=0) for group in groups]
    means = [s / np.where(n > 0, n, np.nan) for s, n in zip(sums, there, strict=True)]
    return np.stack(means) if means else np.zeros((0, *values.shape[1:]))


def sign_flip_p(differences: Float[np.ndarray, " pair"], seed: int = 0) -> float:
    """One-sided p-value of a paired permutation test: the share of flips of the pairs' signs with as large a mean.

    Exact, over all 2ⁿ flips, for up to 13 pairs; for more (1 + hits) / (1 + 10,000) of random flips.
    """
    n = len(differences)
    exact = n <= _EXACT
    rng, total = np.random.default_rng(seed), 2**n if exact else _FLIPS
    least = differences.sum() - 1e-9 * np.abs(differences).sum()  # equal sums count, however they are rounded
    hits = 0
    for start in range(0, total, _ROWS):
        rows = np.arange(start, min(start + _ROWS, total))
        kept = (rows[:, None] >> np.arange(n)) & 1 if exact else rng.integers(2, size=(len(rows), n))
        hits += int(((2 * kept - 1) @ differences >= least).sum())
    return hits / total if exact else (1 + hits) / (1 + total)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q-values: the false discovery rate at which each of these would just be called a discovery.

    q of the i-th smallest is the least of m · p / rank over it and all larger ones (Benjamini and Hochberg, 1995).
    """
    order = np.argsort(p)[::-1]
    ranks = np.arange(len(p), 0, -1)
    q = np.empty(len(p))
    q[order] = np.minimum(1, np.minimum.accumulate(np.asarray(p, dtype=np.float64)[order] * len(p) / ranks))
    return [float(each) for each in q]


def wilson(hits: int, n: int) -> tuple[float, tuple[float, float]]:
    """A share with Wilson's 95 % interval, which is not of width 0 where all are or none is."""
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, (float(low), float(high))


def read_doses(doses: Sequence[float], changes: Float[np.ndarray, "dose number"]) -> Float[np.ndarray, "dose"]:
    """The dose that each picture shows, by a line through the pictures of the *other* doses.

    With x the changes from the picture at dose 1 (so 0 there), u = Σ w x over the other doses, w = d − their mean (so
    u / Σ w² is the slope of the pictures on the dose): reading = 1 + x · u Σ w² / ‖u‖². It is the dose itself where
    pictures change in proportion to it, and 1 where the others do not change at all. Its own picture has no say in the
    direction on which it is read, so for changes that have nothing to do with their doses Spearman's ρ of reading and
    dose is 0 on average; that they happen to be in order is not rare, and has to be compared with a control.
    """
    d, x = np.asarray(doses, dtype=np.float64), changes.astype(np.float64)
    readings = np.ones(len(d))
    for at in range(len(d)):
        others = np.arange(len(d)) != at
        weights = d[others] - d[others].mean()
        slope = weights @ x[others]
        if norm := float(slope @ slope):
            readings[at] += x[at] @ slope * (weights @ weights) / norm
    return readings


def bhattacharyya(
    p: Float[np.ndarray, "*#row value"], q: Float[np.ndarray, "*#row value"]
) -> Float[np.ndarray, "*row"]:
    """1 − Σ √(p q) over the values of two distributions: 0 where they are the same, 1 where no value is in both.

    Computed as ½ Σ (√p − √q)², which is the same and keeps its precision where they differ little.
    """
    return np.asarray(np.square(np.sqrt(p.astype(np.float64)) - np.sqrt(q)).sum(axis=-1) / 2)


def coarse_share(change: Float[np.ndarray, "y x 3"], cell: int) -> float:
    """Share of a change's energy that is left when each square cell of the picture is averaged, cell² Σ D̄² / Σ D².

    D is the change of every pixel and colour, D̄ its mean over the `cell` × `cell` pixels of a cell: 1 for what is the
    same all over each cell, 1 / cell² for white noise. NaN where nothing changes.
    """
    height, width = (side // cell for side in change.shape[:2])
    means = change.astype(np.float64).reshape(height, cell, width, cell, 3).mean(axis=(1, 3))
    return _share(cell**2 * np.square(means).sum(), change)


def colour_share(change: Float[np.ndarray, "y x 3"]) -> float:
    """Share of a change's energy that is in chroma, 1 − 3 Σ D̄² / Σ D², where D̄ is the mean over the three colours.

    0 for what gets lighter or darker only, 1 for what changes colour only; 2 / 3 for three colours that change
    independently by as much. NaN where nothing changes.
    """
    grey = change.astype(np.float64).mean(axis=2)
    return 1 - _share(3 * np.square(grey).sum(), change)


def _share(energy: float, of: Float[np.ndarray, "y x 3"]) -> float:
    total = np.square(of.astype(np.float64)).sum()
    return float(energy / total) if total else float("nan")


def rank_correlation(one: Sequence[float], other: Float[np.ndarray, "n"]) -> float:
    """Spearman's ρ; 0 where either is the same everywhere, which tells nothing of the other."""
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (np.asarray(one), other))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def share(hits: Sequence[bool] | NDArray[np.bool_]) -> dict[str, Any]:
    """The share that are true, with Wilson's 95 % interval, as a row of a table has it."""
    value, interval = wilson(int(np.sum(hits)), len(hits))
    return {"share": value, "share interval": interval}

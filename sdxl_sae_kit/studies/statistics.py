"""Statistics of paired pictures: pure functions of numbers, one formula each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

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


def rank_correlation(one: Sequence[float], other: Float[np.ndarray, "n"]) -> float:
    """Spearman's ρ; 0 where either is the same everywhere, which tells nothing of the other."""
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (np.asarray(one), other))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0

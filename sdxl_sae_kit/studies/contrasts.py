"""How blocks differ: their features pooled, what a cluster tells of the block, and contrasts of single descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import ttest_ind_from_stats

from sdxl_sae_kit.studies.clustering import standardise
from sdxl_sae_kit.studies.descriptors import Descriptors, Kind
from sdxl_sae_kit.studies.statistics import benjamini_hochberg

SAMPLES = 1000
"""Bootstrap samples of the features."""
_FAR = 3.0

Labels = Int[np.ndarray, "feature"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """The features of several blocks, described by the same numbers."""

    blocks: tuple[str, ...]
    block: Labels
    """Place of each feature's block among them."""
    latents: Labels
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    values: Float[np.ndarray, "feature descriptor"]
    """NaN where one is not told."""

    @classmethod
    def of(cls, described: Sequence[Descriptors]) -> Pool:
        """The features of several SAEs together."""
        first = described[0]
        block = np.repeat(np.arange(len(described)), [len(each.latents) for each in described])
        latents = np.concatenate([each.latents for each in described]).astype(np.int64)
        values = np.concatenate([each.values for each in described]).astype(np.float64)
        return cls(tuple(each.hookpoint for each in described), block, latents, first.names, first.kinds, values)

    @cached_property
    def points(self) -> Float[np.ndarray, "feature descriptor"]:
        """The descriptors, standardised over all these features; NaN stays."""
        return standardise(self.values)

    @cached_property
    def bounded(self) -> Float[np.ndarray, "feature varying"]:
        """For clustering: those that vary, the median of all blocks where one is not told, within ±3.

        A few features far off would otherwise each be a cluster of their own.
        """
        x = self.points[:, np.nansum(np.square(self.points), axis=0) > 0]
        return np.asarray(np.clip(np.where(np.isnan(x), np.nanmedian(x, axis=0), x), -_FAR, _FAR))

    @property
    def untold(self) -> float:
        """The share of values that are not told."""
        return float(np.isnan(self.values).mean())

    def __len__(self) -> int:
        return len(self.latents)

    def only(self, *kinds: Kind) -> Pool:
        """With the descriptors of these kinds."""
        return self._with([at for at, kind in enumerate(self.kinds) if kind in kinds])

    def named(self, names: Sequence[str]) -> Pool:
        """With these descriptors, as far as there are such."""
        return self._with([self.names.index(name) for name in names if name in self.names])

    @property
    def told(self) -> Pool:
        """The features of which anything is told."""
        return self.where(np.isfinite(self.values).any(axis=1))

    def where(self, chosen: Bool[np.ndarray, "feature"]) -> Pool:
        """Some of the features."""
        return replace(self, block=self.block[chosen], latents=self.latents[chosen], values=self.values[chosen])

    def _with(self, at: list[int]) -> Pool:
        names, kinds = tuple(self.names[i] for i in at), tuple(self.kinds[i] for i in at)
        return replace(self, names=names, kinds=kinds, values=self.values[:, at])


def information(block: Labels, cluster: Labels) -> float:
    """Mutual information of two labellings, Σ p(b, c) log₂ p(b, c) / (p(b) p(c)), in bits."""
    return float(_information(_counts(block, cluster)))


def _counts(block: Labels, cluster: Labels) -> NDArray[np.int64]:
    shape = (int(block.max()) + 1, int(cluster.max()) + 1)
    counts = np.bincount(block * shape[1] + cluster, minlength=shape[0] * shape[1])
    return np.asarray(counts.reshape(shape))


def _information(counts: NDArray[Any]) -> NDArray[np.float64]:
    """That of tables of counts (..., block, cluster)."""
    p = counts / counts.sum(axis=(-2, -1), keepdims=True)
    apart = p.sum(axis=-1, keepdims=True) * p.sum(axis=-2, keepdims=True)
    told = np.log2(np.divide(p, apart, out=np.ones_like(p), where=p > 0))
    return np.asarray((p * told).sum(axis=(-2, -1)))


def entropy(block: Labels) -> float:
    """Entropy of the labels, −Σ p log₂ p, in bits: the most that a cluster can tell of them."""
    p = np.bincount(block)[np.bincount(block) > 0] / len(block)
    return float(-(p * np.log2(p)).sum())


def association(block: Labels, cluster: Labels, permutations: int, seed: int) -> Row:
    """What a feature's cluster tells of its block, and what it tells of shuffled block labels.

    `bits`: mutual information; `share`: of the entropy of the block; `chance`: mean over shuffles, in bits; `above`:
    (bits − chance) / entropy, which compares features whose blocks are of other sizes; `p` = (1 + shuffles with as
    much) / (1 + shuffles), so never 0. Features count as independent.
    """
    rng, bits = np.random.default_rng(seed), information(block, cluster)
    shuffled = np.array([information(rng.permutation(block), cluster) for _ in range(permutations)])
    p = (1 + int((shuffled >= bits - 1e-12).sum())) / (1 + permutations)
    chance, most = float(shuffled.mean()), max(entropy(block), 1e-12)
    return {
        "bits": bits, "share": bits / most, "chance": chance, "above": (bits - chance) / most, "p": p,
        "features": len(block),
    }  # fmt: skip


def resampled_information(block: Labels, cluster: Labels, seed: int) -> Float[np.ndarray, "sample"]:
    """By how much the mutual information of bootstrap samples is off their mean, as a share of the block's entropy.

    Features are drawn anew within their block, and keep their cluster. That mean is higher than the estimate, as small
    samples look more associated; taking it off leaves how far the estimate may be off by chance.
    """
    rng, counts = np.random.default_rng(seed), _counts(block, cluster)
    drawn = np.stack([rng.multinomial(row.sum(), row / row.sum(), size=SAMPLES) for row in counts], axis=1)
    found = _information(drawn)
    return np.asarray((found - found.mean()) / max(entropy(block), 1e-12))


def resample(pool: Pool, seed: int) -> Float[np.ndarray, "sample feature"]:
    """How often each bootstrap sample holds each feature: as many of every block as there are."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((SAMPLES, len(pool)))
    for at in range(len(pool.blocks)):
        mine = pool.block == at
        if n := int(mine.sum()):
            weights[:, mine] = rng.multinomial(n, np.full(n, 1 / n), size=SAMPLES)
    return weights


def lead(
    values: Float[np.ndarray, "feature *more"],
    mine: Bool[np.ndarray, "feature"],
    weights: Float[np.ndarray, "sample feature"],
) -> Float[np.ndarray, "sample *more"]:
    """Mean over these features minus mean over the others, in every sample, of those that are told (not NaN)."""
    return _mean(values[mine], weights[:, mine]) - _mean(values[~mine], weights[:, ~mine])


def _mean(
    values: Float[np.ndarray, "feature *more"], weights: Float[np.ndarray, "sample feature"]
) -> NDArray[np.float64]:
    sums, n = weights @ np.nan_to_num(values), weights @ np.isfinite(values)
    return np.asarray(np.divide(sums, n, out=np.full(n.shape, np.nan), where=n > 0))


def contrasts(pool: Pool, seed: int = 0) -> Iterator[Row]:
    """A row per descriptor and block: how its features differ from those of all other blocks.

    `mean` is in the descriptor's own unit; `effect` the standardised mean difference (Cohen's d: difference of means
    over the pooled standard deviation), with its 95 % bootstrap interval over features, drawn within blocks; `q` that
    of Welch's t-test among all of these by Benjamini and Hochberg; `features` how many of the block's are told. Where
    that is fewer than two, or of the others', there is no row.
    """
    told, weights, rows, p = np.isfinite(pool.values), resample(pool, seed), list[Row](), list[float]()
    for at, block in enumerate(pool.blocks):
        mine = pool.block == at
        n = np.stack([told[side].sum(axis=0) for side in (mine, ~mine)])
        columns = np.flatnonzero((n >= 2).all(axis=0)).tolist()
        if not columns:
            continue
        x = pool.points[:, columns]
        effects, samples = (_d(x, mine, w) for w in (np.ones((1, len(x))), weights))
        low, high = np.nanquantile(samples, [0.025, 0.975], axis=0)
        means = np.nanmean(pool.values[np.ix_(mine, columns)], axis=0)
        p += _welch(x, mine).tolist()
        rows += [
            {
                "descriptor": pool.names[column], "kind": pool.kinds[column], "block": block,
                "features": int(n[0, column]), "mean": float(means[i]), "effect": float(effects[0, i]),
                "effect interval": (float(low[i]), float(high[i])),
            }
            for i, column in enumerate(columns)
        ]  # fmt: skip
    found = [row | {"q": float(q)} for row, q in zip(rows, benjamini_hochberg(p), strict=True)]
    yield from sorted(found, key=lambda row: pool.names.index(row["descriptor"]))


def _d(
    x: Float[np.ndarray, "feature descriptor"],
    mine: Bool[np.ndarray, "feature"],
    weights: Float[np.ndarray, "sample feature"],
) -> NDArray[np.float64]:
    """Cohen's d of every descriptor in every sample."""
    squares, n = np.zeros((len(weights), x.shape[1])), weights @ np.isfinite(x)
    for side in (mine, ~mine):
        w, told = weights[:, side], np.isfinite(x[side])
        squares += w @ np.square(np.nan_to_num(x[side])) - (w @ told) * np.square(_mean(x[side], w))
    deviation = np.sqrt(np.maximum(squares, 0) / np.maximum(n - 2, 1))
    difference = lead(x, mine, weights)
    return np.asarray(np.divide(difference, deviation, out=np.zeros_like(difference), where=deviation > 1e-9))


def _welch(x: Float[np.ndarray, "feature descriptor"], mine: Bool[np.ndarray, "feature"]) -> NDArray[np.float64]:
    """p of each descriptor, 1 where nothing varies."""
    varies = np.max([np.nanstd(x[side], axis=0, ddof=1) for side in (mine, ~mine)], axis=0) > 1e-9
    p = np.ones(x.shape[1])
    if varies.any():
        stats = (
            (np.nanmean(side, axis=0), np.nanstd(side, axis=0, ddof=1), np.isfinite(side).sum(axis=0))
            for side in (x[mine][:, varies], x[~mine][:, varies])
        )
        p[varies] = ttest_ind_from_stats(*chain(*stats), equal_var=False).pvalue
    return p

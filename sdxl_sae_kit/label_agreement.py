"""Agreement: how far people who labelled the same features said the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sdxl_sae_kit import html


@dataclass(frozen=True)
class PairAgreement:
    """How far two people agree on the features that both labelled."""

    one: str
    other: str
    kappa: float
    """Cohen's kappa, −1 to 1; 0 is what two people reach who use their words as often, but at random. NaN where it is
    undefined: no feature in common, or one word for everything."""
    low: float
    """Lower end of its 95 % percentile bootstrap interval over features (NaN for fewer than two), which is too narrow
    where n is small."""
    high: float
    """Upper end."""
    n: int
    """Features that both labelled."""


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of every pair of authors, and their mean (Light's kappa)."""

    pairs: tuple[PairAgreement, ...]
    by: str
    """What was compared: text or tags."""

    @property
    def mean(self) -> float:
        """Mean over the pairs whose kappa is defined; NaN if none is."""
        defined = [pair.kappa for pair in self.pairs if not math.isnan(pair.kappa)]
        return float(np.mean(defined)) if defined else math.nan

    def _repr_html_(self) -> str:
        rows = [
            {
                "author": pair.one,
                "and": pair.other,
                "Cohen's kappa": f"{pair.kappa:.2f} [{pair.low:.2f}, {pair.high:.2f}]",
                "features": pair.n,
            }
            for pair in self.pairs
        ]
        caption = (
            f"Cohen's kappa by {self.by}, 95 % bootstrap over features; 0 is chance. "
            f"Mean of the pairs (Light's kappa): {self.mean:.2f}"
        )
        return html.fragment(html.table(rows, caption if rows else "Fewer than two authors: nothing to compare."))


def agreement(said: Mapping[str, Mapping[int, str]], by: str) -> Agreement:
    """The agreement of every two authors, from what each said of each feature."""
    return Agreement(tuple(_pair(one, other, said) for one, other in combinations(sorted(said), 2)), by)


def _pair(one: str, other: str, said: Mapping[str, Mapping[int, str]]) -> PairAgreement:
    shared = sorted(said[one].keys() & said[other].keys())
    mine, theirs = ([said[author][feature] for feature in shared] for author in (one, other))
    return PairAgreement(one, other, cohens_kappa(mine, theirs), *_interval(mine, theirs), len(shared))


def cohens_kappa(one: Sequence[str], other: Sequence[str]) -> float:
    """Cohen's kappa of two lists of words; NaN where it is undefined."""
    if len({*one, *other}) < 2:  # nothing was told apart
        return math.nan
    from sklearn.metrics import cohen_kappa_score  # slow to import

    return float(cohen_kappa_score(one, other))


def _interval(one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    words = sorted({*one, *other})
    if len(words) < 2:
        return math.nan, math.nan
    from sdxl_sae_kit.metrics import bootstrap_interval  # slow to import: it brings torch

    said = [(np.array(words) == np.array(each)[:, None]).astype(np.float64) for each in (one, other)]
    same = (said[0] * said[1]).sum(axis=1, keepdims=True)

    def kappa(means: NDArray[np.float64]) -> NDArray[np.float64]:
        observed = means[:, 0]
        expected = (means[:, 1 : len(words) + 1] * means[:, len(words) + 1 :]).sum(axis=1)
        # a sample in which both say one word throughout agrees in everything
        kappas: NDArray[np.float64] = np.divide(
            observed - expected, 1 - expected, out=np.ones(len(means)), where=expected < 1 - 1e-12
        )
        return kappas

    return bootstrap_interval(np.hstack([same, *said]), kappa)

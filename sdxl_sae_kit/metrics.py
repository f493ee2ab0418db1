"""Measures of how well an SAE explains updates: pure functions, one formula each, summed in float64.

`ReconstructionMetrics` streams the same formulas over batches; the functions here are its oracle and its building
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

_DRAWN = 2**17
"""Rows that a bootstrap holds at once, where one sample is not more."""


def explained_variance(x: Float[Tensor, "token d_in"], x_hat: Float[Tensor, "token d_in"]) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖², over all tokens and channels: 1 is perfect, 0 is no better than the mean.

    The only number that carries this name in the kit (it is 1 − FVU). Below 0 where the mean is better. NaN when x does
    not vary.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    >>> explained_variance(x, x), explained_variance(x, x.mean(0).expand(2, 2))
    (1.0, 0.0)
    """
    return ReconstructionMetrics().update(x, x_hat).explained_variance


def explained_variance_per_channel(x: Float[Tensor, "token d_in"], x_hat: Float[Tensor, "token d_in"]) -> float:
    """Mean over channels that vary of 1 − Var(x_c − x̂_c) / Var(x_c).

    The number the paper's released code prints (arXiv 2410.22366), for comparison only. At most 1; NaN where no channel
    varies.
    """
    return ReconstructionMetrics().update(x, x_hat).explained_variance_per_channel


def geometric_median(
    x: Float[Tensor, "token d_in"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "d_in"]:
    """The point with the least summed distance to all tokens (Weiszfeld, from the mean): where b_dec starts.

    It is found when a step moves it by at most `tolerance` times its norm, or after so many `iterations`.
    """
    median = x.mean(dim=0)
    for _ in range(iterations):
        weights: Tensor = 1 / (x - median).norm(dim=1).clamp_min(tolerance)
        moved = (weights[:, None] * x).sum(dim=0) / weights.sum()
        if (moved - median).norm() <= tolerance * moved.norm().clamp_min(tolerance):
            return moved
        median = moved
    return median


def participation_ratio(x: Float[Tensor, "token d_in"]) -> float:
    """(Σλ)² / Σλ² of the eigenvalues λ of the tokens' covariance: how many directions carry the variance, 1 to d_in.

    NaN when x does not vary.
    """
    centred = x.detach().double() - x.detach().double().mean(0)
    covariance = centred.T @ centred
    return _ratio(covariance.trace().square(), covariance.square().sum())  # Σλ² is the squared Frobenius norm


def variance_spectrum(x: Float[Tensor, "token d_in"]) -> Float[np.ndarray, "d_in"]:
    """λ / Σλ of the eigenvalues λ of the tokens' covariance, largest first: the share of variance in each direction.

    They add up to 1; NaN when x does not vary.
    """
    centred = x.detach().double() - x.detach().double().mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0)
    shares: NDArray[np.float64] = (eigenvalues / eigenvalues.sum()).cpu().numpy()
    return shares


def neighbour_correlation(x: Float[Tensor, "token d_in"]) -> float:
    """Σ (x_i − mean)·(x_{i+1} − mean) / Σ ‖x_i − mean‖²: how alike neighbours are, 0 if they are independent.

    −1 to 1, of tokens in the order in which they come; NaN when x does not vary.
    """
    centred = x.detach().double() - x.detach().double().mean(0)
    return _ratio((centred[1:] * centred[:-1]).sum(), centred.square().sum())


def constant_share(x: Float[Tensor, "image token d_in"]) -> float:
    """Share of the tokens' variance that lies between images' means: what is the same at every token of an image.

    0 to 1; NaN when x does not vary.
    """
    x = x.detach().double()
    means = x.mean(dim=1, keepdim=True)
    return _ratio((means - means.mean(0)).square().sum() * x.shape[1], (x - means.mean(0)).square().sum())


def cosines(one: Float[Tensor, "row d_in"], other: Float[Tensor, "row2 d_in"]) -> Float[np.ndarray, "row row2"]:
    """Cosine of every row of `one` with every row of `other`, −1 to 1; 0 with a row of zeros."""
    a, b = (torch.nn.functional.normalize(rows.detach().cpu().double(), dim=1) for rows in (one, other))
    return np.asarray(a @ b.T)


def partners(similarity: Float[np.ndarray, "row row2"]) -> Int[np.ndarray, " row"]:
    """The column that each row is matched with, no column twice, so that the sum of similarities is the greatest.

    The assignment problem (Hungarian method), solved by SciPy's variant of Jonker–Volgenant: about 4 seconds on one
    core for 5,120 × 5,120. −1 for the rows left over where there are fewer columns; where there are fewer rows, the
    best subset of columns is matched.
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    matched: NDArray[np.int64] = np.full(len(similarity), -1)
    matched[rows] = columns
    return matched


def with_partners(
    similarity: Float[np.ndarray, "row row2"], matched: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """The similarity of each row with its partner, as `partners` gave it; NaN where it has none."""
    there = matched >= 0
    values: NDArray[np.float64] = np.full(len(matched), np.nan)
    values[there] = similarity[there, matched[there]]
    return values


def matched_cosine(one: Float[Tensor, "row d_in"], other: Float[Tensor, "row2 d_in"]) -> Float[np.ndarray, " row"]:
    """Cosine of every row of `one` with its partner in `other`, each row taken at most once (see `partners`).

    Signs count: a row and its opposite are no match. NaN for the rows left over where `other` has fewer.
    """
    similarity = cosines(one, other)
    return with_partners(similarity, partners(similarity))


def shuffled_rows(rows: Float[Tensor, "row d_in"], seed: int = 0) -> Float[Tensor, "row d_in"]:
    """The rows with their entries along each of their principal axes dealt out anew among them.

    Keeps their mean, covariance and distribution along every axis, and destroys each row's combination of entries. For
    rows on the CPU.
    """
    centred = rows - rows.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred)[1]
    dealt = np.random.default_rng(seed).permuted((rows @ axes).numpy(), axis=0)  # every column by itself
    shuffled: Tensor = torch.from_numpy(dealt) @ axes.T
    return shuffled


def shares_above(similarities: Float[np.ndarray, " match"]) -> dict[str, Any]:
    """Of matches, the shares with a similarity above 0.7 and above 0.9, each with its 95 % bootstrap interval."""
    row: dict[str, Any] = {}
    for least in (0.7, 0.9):
        above = (similarities > least).astype(np.float64)
        row |= {f"above {least}": float(above.mean()), f"above {least} interval": bootstrap_interval(above)}
    return row


def areas_under_curve(
    strengths: Float[np.ndarray, "image latent"], shows: Bool[np.ndarray, "image *value"]
) -> Float[np.ndarray, "*value latent"]:
    """AUC of every latent for telling the images that show something from those that do not; ties count half.

    The probability that an image that shows it has the higher strength than one that does not, 0 to 1, by chance 0.5:
    with the ranks r of the strengths and the n₊ images that show it and n₋ that do not,
    (Σ₊ r / n₊ − (n₊ + 1) / 2) / n₋ (Mann–Whitney U). NaN where all images show it or none does. Of several values at
    once, `shows` has a column for each and the result a row.
    """
    positives = shows.sum(axis=0)[..., None]
    ranks = rankdata(strengths, axis=0)
    return np.asarray((shows.T.astype(np.float64) @ ranks / positives - (positives + 1) / 2) / (len(shows) - positives))


def resampled_areas(
    strength: Float[np.ndarray, " image"], shows: Bool[np.ndarray, " image"], draws: Int[np.ndarray, "sample image"]
) -> Float[np.ndarray, " sample"]:
    """AUC of one latent in bootstrap samples of the images; `draws` says how often each sample holds each image.

    The same formula as `areas_under_curve` on an image repeated so often; NaN where a sample lacks either kind. Every
    pair of an image of one kind and one of the other takes 8 bytes for a moment: for a few thousand images.
    """
    lead = np.sign(np.subtract.outer(strength[shows], strength[~shows]))
    positive, negative = draws[:, shows].astype(np.float32), draws[:, ~shows].astype(np.float32)  # counts, so exact
    wins = (positive @ (lead.astype(np.float32) + 1) * negative).sum(axis=1, dtype=np.float64) / 2
    pairs = positive.sum(axis=1, dtype=np.float64) * negative.sum(axis=1, dtype=np.float64)
    areas: NDArray[np.float64] = np.divide(wins, pairs, out=np.full(len(draws), np.nan), where=pairs > 0)
    return areas


def bootstrap_interval(
    values: NDArray[np.floating],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high), resampling the rows of `values`; NaN for fewer than two rows.

    A row must be one independent cluster (a prompt, an image): average or sum within it first. The estimate is the mean
    of the rows, or a function of the column means when `statistic` is given, such as
    `lambda m: 1 - m[..., 0] / m[..., 1]` for a ratio. `level`, 0 to 1, is the share of the `samples` that lie within.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    rng, rows = np.random.default_rng(seed), len(values)
    batch = max(1, _DRAWN // rows)
    sizes = [min(batch, samples - start) for start in range(0, samples, batch)]
    means = np.concatenate([values[rng.integers(rows, size=(size, rows))].mean(axis=1) for size in sizes])
    low, high = np.quantile(statistic(means) if statistic else means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_intervals(
    values: Float[np.ndarray, "row *number"],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "2 *more"]:
    """`bootstrap_interval` of many numbers at once: lower ends, then upper ends; NaN for fewer than two rows.

    All of them are resampled together, so that samples are one product of matrices. `statistic` is given the column
    means (sample, *number) and may combine them, such as `lambda m: m[..., 0] / m[..., 1]`; samples in which a number
    is NaN, as none of its rows was drawn, are left out of its interval.
    """
    values = np.asarray(values, dtype=np.float64)
    rows = len(values)
    drawn = np.random.default_rng(seed).integers(rows, size=(samples, rows)) + rows * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * rows).reshape(samples, rows) / rows
    means = (counts @ values.reshape(rows, -1)).reshape(samples, *values.shape[1:])
    found, levels = statistic(means) if statistic else means, [(1 - level) / 2, (1 + level) / 2]
    ends, unknown = np.quantile(found, levels, axis=0), np.isnan(found)
    partly = unknown.any(axis=0) & ~unknown.all(axis=0)
    ends[:, partly] = np.nanquantile(found[:, partly], levels, axis=0)
    return np.asarray(ends if rows > 1 else np.full_like(ends, np.nan))


@dataclass
class ReconstructionMetrics:
    """Streamed sums of x, x̂ and their codes from which every reconstruction metric is read.

    Feed it batches with `update`; sums are float64 and shifted by the first token seen, so that a large common offset
    costs no precision.
    """

    n_tokens: int = 0
    """Tokens added so far."""
    _shift: Tensor = field(default_factory=lambda: torch.zeros(0))
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _norm_ratio: float = 0.0
    _active: float = 0.0

    def update(
        self,
        x: Float[Tensor, "token d_in"],
        x_hat: Float[Tensor, "token d_in"],
        active: Tensor | None = None,
    ) -> ReconstructionMetrics:
        """Add a batch and return itself; `active` (token,) has each token's number of active latents, for L0."""
        x, x_hat = x.detach().double(), x_hat.detach().double()
        if not self.n_tokens:
            self._shift = x[0].clone()
        error, centred = x - x_hat, x - self._shift
        batch = {"x": centred.sum(0), "x²": centred.square().sum(0), "e": error.sum(0), "e²": error.square().sum(0)}
        for name, value in batch.items():
            self._sums[name] = self._sums[name] + value if self.n_tokens else value
        self._norm_ratio += float((x_hat.norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)).sum())
        self._active += float(active.double().sum()) if active is not None else float("nan")
        self.n_tokens += len(x)
        return self

    @property
    def explained_variance(self) -> float:
        """See `metrics.explained_variance`."""
        total = self._sums["x²"] - self._sums["x"].square() / self.n_tokens
        return 1 - _ratio(self._sums["e²"].sum(), total.sum())

    @property
    def explained_variance_per_channel(self) -> float:
        """See `metrics.explained_variance_per_channel`."""
        error = self._sums["e²"] - self._sums["e"].square() / self.n_tokens
        total = self._sums["x²"] - self._sums["x"].square() / self.n_tokens
        varies = total > 0
        return float((1 - error[varies] / total[varies]).mean())

    @property
    def l0(self) -> float:
        """Mean number of active latents per token; NaN when they were not given for every batch."""
        return self._active / self.n_tokens

    @property
    def relative_norm(self) -> float:
        """Mean over tokens of ‖x̂‖ / ‖x‖, from 0; 1 where reconstructions are as long as the tokens."""
        return self._norm_ratio / self.n_tokens

    @property
    def gamma(self) -> float:
        """‖mean(x)‖ / ‖std(x)‖, from 0: how much of the data is one constant vector."""
        mean = self._shift + self._sums["x"] / self.n_tokens
        variance = self._sums["x²"] / self.n_tokens - (self._sums["x"] / self.n_tokens).square()
        return _ratio(mean.norm(), variance.clamp_min(0).sum().sqrt())


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return cast(float, (numerator / denominator).item()) if denominator else math.nan

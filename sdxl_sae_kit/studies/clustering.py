"""Clusters of standardised descriptors, how many of them are stable, and a plane to see them in: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.metrics import bootstrap_interval

Method = Literal["kmeans", "ward", "mixture"]
Embedding = Literal["tsne", "pca", "umap"]

MOST = 10
"""The largest number of clusters that is tried."""
PAIRS = 8
"""Pairs of subsamples, and as many of one cloud, for each number."""

_SHARE, _LEAST, _CLEAR = 0.8, 0.25, 3.0
_FLAT = 1e-6
_STARTS, _ITERATIONS = 3, 50

Points = Float[np.ndarray, "feature descriptor"]
Labels = Int[np.ndarray, "feature"]


def moments(values: Float[np.ndarray, "feature *more"]) -> tuple[Any, Any]:
    """Mean and standard deviation over the features of which a descriptor is told (NaN: not told).

    The deviation is infinite where it is below 1e-6, as rounding makes it: such a descriptor is the same for all.
    """
    told = np.isfinite(values)
    n = np.maximum(told.sum(axis=0), 1)
    mean = np.where(told, values, 0).sum(axis=0) / n
    spread = np.sqrt(np.where(told, np.square(values - mean), 0).sum(axis=0) / n)
    return mean, np.where(spread > _FLAT, spread, np.inf)


def standardise(values: Points) -> Points:
    """Every descriptor with mean 0 and standard deviation 1; 0 where it is the same for all features; NaN stays."""
    mean, spread = moments(values)
    return np.asarray((values - mean) / spread, dtype=np.float64)


def cluster(points: Points, number: int, method: Method = "kmeans", seed: int = 0) -> Labels:
    """The cluster of every feature: k-means, Ward's linkage, or a mixture of Gaussians with diagonal covariances.

    Clusters are numbered from the largest to the smallest.

    Raises:
        KitError: no such method, or fewer features than clusters.
    """
    check_choice("method", method, Method)
    if len(points) <= number:
        raise KitError(f"{len(points)} features are too few for {number} clusters. Measure more, or ask for fewer.")
    return _by_size(_fit(points, number, method, np.random.RandomState(seed), starts=10))


def _fit(points: Points, number: int, method: Method, random: np.random.RandomState, starts: int = _STARTS) -> Labels:
    if method == "ward":
        found = AgglomerativeClustering(number).fit_predict(points)
    elif method == "mixture":
        found = GaussianMixture(
            number, covariance_type="diag", reg_covar=1e-3, max_iter=_ITERATIONS, random_state=random
        ).fit_predict(points)
    else:
        found = KMeans(number, n_init=starts, max_iter=_ITERATIONS, random_state=random).fit_predict(points)
    return np.asarray(found, dtype=np.int64)


def _by_size(labels: Labels) -> Labels:
    found, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.empty(len(found), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(found))
    return ranks[label]


def measure_stability(points: Points, method: Method = "kmeans", seed: int = 0) -> list[dict[str, Any]]:
    """How well two clusterings of subsamples agree, for every number of clusters, beyond what those of one cloud do.

    Of eight pairs of subsamples, of 80 % of the features each, every one is clustered by itself and extended to all
    features by the nearest centroid; `agreement` is the mean of the pairs' adjusted Rand index (Hubert and Arabie,
    1985). `one cloud` is the same for features drawn from a Gaussian of the same covariance, anew for each pair: it
    keeps how descriptors go together and has no groups (the null of SigClust, Liu et al., 2008), so that few clusters
    do not win because few are easily stable. Long tails that go together may count as groups. `gain` = (agreement − one
    cloud) / (1 − one cloud): 1 for full agreement, 0 for no more than one cloud. `deviations`: by how many standard
    deviations of the one cloud's pairs the share of the variance that is within clusters is below theirs. Intervals are
    95 % bootstrap intervals over pairs.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(2, min(MOST, len(points) // 10) + 1):
        own = np.array([_subsampled(points, number, method, rng) for _ in range(PAIRS)])
        null = np.array([_subsampled(_one_cloud(points, rng), number, method, rng) for _ in range(PAIRS)])
        pairs = np.stack([own[:, 0], null[:, 0]], axis=1)
        row: dict[str, Any] = {"clusters": number}
        for at, name in enumerate(("agreement", "one cloud")):
            row |= {name: pairs[:, at].mean(), f"{name} interval": bootstrap_interval(pairs[:, at])}
        row |= {"gain": _gain(pairs.mean(axis=0)), "gain interval": bootstrap_interval(pairs, _gain)}
        row["standard error"] = own[:, 0].std(ddof=1) / np.sqrt(PAIRS) / (1 - null[:, 0].mean() + _FLAT)
        row["deviations"] = (null[:, 1].mean() - own[:, 1].mean()) / null[:, 1].std(ddof=1)
        rows.append({k: v if isinstance(v, tuple | int) else float(v) for k, v in row.items()} | {"pairs": PAIRS})
    return rows


def _gain(means: Float[np.ndarray, "*sample 2"]) -> Any:
    """(agreement − one cloud) / (1 − one cloud)."""
    return (means[..., 0] - means[..., 1]) / (1 - means[..., 1] + _FLAT)


def _one_cloud(points: Points, rng: np.random.Generator) -> Points:
    """As many draws of a Gaussian with the covariance of these points."""
    covariance = np.atleast_2d(np.cov(points, rowvar=False))
    return rng.multivariate_normal(np.zeros(len(covariance)), covariance, size=len(points), method="eigh")


def _subsampled(points: Points, number: int, method: Method, rng: np.random.Generator) -> tuple[float, float]:
    """Agreement of the clusterings of two subsamples, and the share of all variance that is within clusters of one."""
    random = np.random.RandomState(int(rng.integers(2**31)))
    halves = (rng.permutation(len(points))[: int(_SHARE * len(points))] for _ in range(2))
    one, other = (extend(points, chosen, _fit(points[chosen], number, method, random)) for chosen in halves)
    within = sum(len(own) * own.var(axis=0).sum() for own in (points[one == at] for at in np.unique(one)))
    return float(adjusted_rand_score(one, other)), float(within / (len(points) * points.var(axis=0).sum()))


def extend(points: Points, chosen: Int[np.ndarray, "chosen"], labels: Int[np.ndarray, "chosen"]) -> Labels:
    """The cluster, of those that some features were put in, whose centroid is nearest to each of all features."""
    centroids = np.stack([points[chosen[labels == at]].mean(axis=0) for at in np.unique(labels)])
    distances = np.square(centroids).sum(axis=1) - 2 * points @ centroids.T  # but for what is the same for all clusters
    return np.asarray(distances.argmin(axis=1))


def choose_number(rows: Sequence[dict[str, Any]]) -> int:
    """The largest number of clusters that is as stable as the most stable beyond one cloud, or 1 where none is.

    A number is considered where it gains at least a quarter and clusters are clearly tighter than those of one cloud:
    three `deviations` or more. Of these the largest whose gain is within one standard error of the
    greatest: finer groups are taken where they are as stable.
    """
    clear = [row for row in rows if row["gain"] >= _LEAST and row["deviations"] >= _CLEAR]
    if not clear:
        return 1
    best = max(clear, key=lambda row: float(row["gain"]))
    return max(int(row["clusters"]) for row in clear if row["gain"] >= best["gain"] - best["standard error"])


def place(points: Points, embedding: Embedding = "tsne", seed: int = 0) -> Float[np.ndarray, "feature 2"]:
    """Every feature's place in a plane; distances far apart mean little in all but "pca".

    Raises:
        KitError: no such embedding, or UMAP is not installed.
    """
    check_choice("embedding", embedding, Embedding)
    if embedding == "umap":
        return np.asarray(load_umap()(n_components=2, random_state=seed).fit_transform(points), dtype=np.float64)
    if embedding == "pca":
        return np.asarray(PCA(2, random_state=seed).fit_transform(points), dtype=np.float64)
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return np.asarray(tsne.fit_transform(points), dtype=np.float64)


def load_umap() -> Any:
    """UMAP's class; KitError where it is not installed."""
    try:
        from umap import UMAP
    except ImportError:
        raise KitError(
            "embedding='umap' needs umap-learn. Install it with pip install 'sdxl-sae-kit[umap]', or use 'tsne'."
        ) from None
    return UMAP


def check_choice(name: str, given: object, kind: Any) -> None:
    """Refuse a word that is none of a Literal's."""
    if given not in (known := get_args(kind)):
        options = ", ".join(map(repr, known))
        raise KitError(f"specialize: {name} is {options}, not {given!r}.{did_you_mean(str(given), known)}")

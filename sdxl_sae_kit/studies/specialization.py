"""Block specialisation: what each hookpoint's features respond to, and whether hookpoints differ beyond chance."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import Example, FeatureStats
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.maps import cluster_map, cluster_shares, response_map
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.studies.lines import open_study

MIN_IMAGES = 5
"""A feature is described when it fires on at least so many images, and its looks on the strongest so many."""

SPATIAL = ("active area", "Moran's I", "centre-ness")
COLOUR = ("brightness", "red − green", "yellow − blue")

_TABLES, _ARRAYS = "specialization.json", "specialization.h5"

Integers = Int[np.ndarray, "feature"]


@dataclass(frozen=True)
class Specialization:
    """What the described features of some hookpoints respond to, their clusters, and what those tell of hookpoints."""

    artifact: Artifact = field(repr=False)
    hookpoints: Sequence[str]
    clusters: Sequence[str]
    """Names, after the two descriptors in which each cluster's centre stands out most."""
    information: float
    """Mutual information of hookpoint and cluster, bits."""
    shuffled: float
    """Its mean over shuffled hookpoint labels, bits."""
    p_value: float
    permutations: int
    control_information: float | None
    """The same mutual information for the controls' features, clustered among themselves; None for fewer than two."""
    control_shuffled: float | None
    table: Sequence[Mapping[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Specialization:
        """Read what `specialize` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "specialization", "specialize")
        facts: dict[str, Any] = json.loads(artifact.file(_TABLES).read_text(encoding="utf-8"))
        return cls(artifact, **facts)

    def rows(self) -> list[dict[str, Any]]:
        """A row per descriptor: mean per block and, as `untrained <block>`, per control, with 95 % intervals.

        Factors are in explained variance (`omega_squared`), the others in their own units.
        """
        return [dict(row) for row in self.table]

    @cached_property
    def features(self) -> dict[str, Any]:
        """Arrays over features: `hookpoint` and `cluster` (indices), `feature`, `position` (PCA), `descriptors`."""
        with h5py.File(self.artifact.file(_ARRAYS), "r") as file:
            return {name: file[name][()] for name in file}

    def shares(self) -> Float[np.ndarray, "hookpoint cluster"]:
        """Share of each hookpoint's features in each cluster; rows sum to 1."""
        counts = np.zeros((len(self.hookpoints), len(self.clusters)))
        np.add.at(counts, (self.features["hookpoint"], self.features["cluster"]), 1)
        return np.asarray(counts / counts.sum(axis=1, keepdims=True))

    def sentence(self) -> str:
        """What the numbers say."""
        n, blocks = len(self.features["feature"]), len(self.hookpoints)
        differ = "so the hookpoints' features differ" if self.p_value < 0.05 else "which is no evidence of a difference"
        return (
            f"The cluster of a feature tells {self.information:.3f} bits about its hookpoint, of at most "
            f"{np.log2(blocks):.2f} ({n:,} features, {blocks} hookpoints); with shuffled hookpoint labels it is "
            f"{self.shuffled:.3f} bits on average (p = {self.p_value:.3g}, {self.permutations} shuffles), {differ}. "
            f"{self._against_control()} {self._best_explained()}"
        )

    def _against_control(self) -> str:
        if self.control_information is None or self.control_shuffled is None:
            return "Without untrained SAEs at two hookpoints it stays open whether that is the SAEs' doing."
        own, control = self.information - self.shuffled, self.control_information - self.control_shuffled
        verdict = "less" if control < own else "no less, so the difference is in the updates and need not be learnt"
        return f"Above chance that is {own:.3f} bits; for untrained SAEs' features it is {control:.3f}: {verdict}."

    def _best_explained(self) -> str:
        rows = [row for row in self.table if row["kind"] == "factor"]
        if not rows:
            return "No factors of the prompts are known, so only looks describe the features."
        best = {h: max(rows, key=lambda row, h=h: float(row[h])) for h in self.hookpoints}  # type: ignore[misc]
        parts = (f"{h} {row['descriptor']} ({_with_interval(row, h)})" for h, row in best.items())
        return f"The factor that explains most of the features' variance: {', '.join(parts)}."

    def plot(self) -> Any:
        """Heat map of what explains the features of each block, beside the controls (plotly)."""
        rows = [row for row in self.table if row["kind"] == "factor"] or self.table
        means = np.array([[row[column] for column in _columns(row)] for row in rows])
        return response_map([row["descriptor"] for row in rows], _columns(rows[0]), means)

    def plot_clusters(self) -> Any:
        """The features in the plane of their first two principal components (plotly)."""
        f = self.features
        return cluster_map(f["position"], f["feature"], f["hookpoint"], self.hookpoints, f["cluster"], self.clusters)

    def plot_shares(self) -> Any:
        """Share of each cluster in each hookpoint (plotly)."""
        return cluster_shares(self.hookpoints, self.clusters, self.shares())

    def _repr_html_(self) -> str:
        rows = [{"descriptor": r["descriptor"]} | {c: _with_interval(r, c) for c in _columns(r)} for r in self.table]
        shares = [
            {"hookpoint": hookpoint} | dict(zip(self.clusters, share.tolist(), strict=True))
            for hookpoint, share in zip(self.hookpoints, self.shares(), strict=True)
        ]
        return html.fragment(
            f"<h3>Block specialisation</h3><p>{html.escape(self.sentence())}</p>",
            html.table(rows, "Mean over features with its 95 % bootstrap interval; factors as explained variance"),
            html.table(shares, "Share of each hookpoint's features in each cluster"),
        )


def specialize(
    stats: Sequence[FeatureStats],
    *,
    controls: Sequence[FeatureStats] = (),
    clusters: int = 8,
    seed: int = 0,
    permutations: int = 500,
    store: Store | Path | str | None = None,
) -> Specialization:
    """Describe the features of several hookpoints by what they respond to, cluster them, and test for differences.

    A feature that fires on at least 5 images is described by how much of the variance of its maximum over each
    image every factor of the prompts explains (`omega_squared`), and by its looks: `active area` (share of tokens
    on which it fires, in images where it does), its mean `Moran's I`, and the `centre-ness` of its five strongest
    heat maps. Where no factors are known, the colours under those heat maps are added. K-means clusters the
    standardised descriptors. The mutual information of hookpoint and cluster is compared with that of shuffled
    hookpoint labels, which takes features as independent; those of one SAE are only roughly so.

    Args:
        stats: one per hookpoint, measured on the same images.
        controls: statistics of untrained SAEs at some or all of these hookpoints on the same images, shown beside.
        clusters: how many.
        seed: of clustering and shuffles.
        permutations: shuffles.
        store: folder of artifacts.

    Raises:
        KitError: fewer than two hookpoints, a hookpoint twice, statistics of different images, or too few features.

    Example:
        >>> untrained = FeatureStats.measure(SAE(config, d_in, site, "untrained"), cache)      # doctest: +SKIP
        >>> specialize(stats, controls=[untrained]).plot()                                     # doctest: +SKIP
    """
    _check(stats, controls)
    recipe = {
        "study": "specialization",
        "stats": [s.artifact.digest for s in stats],
        "controls": [s.artifact.digest for s in controls],
        "clusters": clusters,
        "seed": seed,
        "permutations": permutations,
    }
    artifact = Store.at(store).artifact("studies", f"specialization_{len(stats)}hookpoints", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(stats, controls, artifact)
    return Specialization.open(artifact.folder)


def omega_squared(responses: Float[np.ndarray, "image feature"], values: Sequence[str]) -> Float[np.ndarray, "feature"]:
    """Share of each feature's variance over images that a factor explains, corrected for its number of values.

    ω² = (SS_between − (g − 1)·MS_within) / (SS_total + MS_within) for g values, where MS_within = SS_within / (n − g);
    0 where that is negative or nothing varies. Uncorrected (η² = SS_between / SS_total), a factor with many values
    would explain more of pure noise than one with few.
    """
    groups, group = np.unique(np.asarray(values), return_inverse=True)
    n, g = len(group), len(groups)
    y = responses.astype(np.float64) - responses.mean(axis=0, dtype=np.float64)
    counts = np.bincount(group, minlength=g)
    sums = np.stack([np.bincount(group, weights=column, minlength=g) for column in y.T], axis=1)  # (group, feature)
    total, between = np.square(y).sum(axis=0), (np.square(sums) / counts[:, None]).sum(axis=0)
    within = np.maximum(total - between, 0) / (n - g)
    varies = total > 0
    explained = (between - (g - 1) * within) / np.where(varies, total + within, 1)
    return np.where(varies, np.maximum(explained, 0), 0)


def association(hookpoint: Integers, cluster: Integers, permutations: int, seed: int) -> tuple[float, float, float]:
    """Mutual information of two labellings in bits, its mean over shuffles of the first, and the permutation p-value.

    p = (1 + shuffles with as much information) / (1 + shuffles), so it is never 0.
    """
    rng = np.random.default_rng(seed)
    bits = mutual_info_score(hookpoint, cluster) / np.log(2)
    shuffled = np.array([mutual_info_score(rng.permutation(hookpoint), cluster) for _ in range(permutations)]) / np.log(
        2
    )
    as_large = int((shuffled >= bits - 1e-12).sum())
    return float(bits), float(shuffled.mean()), (1 + as_large) / (1 + permutations)


def _check(stats: Sequence[FeatureStats], controls: Sequence[FeatureStats]) -> None:
    names = [s.hookpoint for s in stats]
    if len(stats) < 2 or len(set(names)) < len(names):
        raise KitError(f"specialize: hookpoints are {', '.join(names) or 'none'}; give two or more, each once.")
    beside = [s.hookpoint for s in controls]
    if not set(beside) <= set(names) or len(set(beside)) < len(beside):
        raise KitError(
            f"specialize: controls are of {', '.join(beside)}; give at most one for each of {', '.join(names)}."
        )
    if len({(s.prompts.digest, s.step) for s in [*stats, *controls]}) > 1:
        raise KitError("specialize: statistics of different images or denoising steps. Measure all on the same cache.")


@dataclass(frozen=True)
class _Described:
    """Features of one SAE with their descriptors."""

    feature: Integers
    descriptors: dict[str, Float[np.ndarray, "feature"]]


def _run(stats: Sequence[FeatureStats], controls: Sequence[FeatureStats], artifact: Artifact) -> None:
    recipe = artifact.recipe
    n = sum(len(_describable(s)) for s in [*stats, *controls])
    tqdm.write(f"Describing {n:,} features of {len(stats)} hookpoints and {len(controls)} controls.")
    with tqdm(total=n, desc="specialize", unit="feature") as bar:
        described = [_describe(s, bar) for s in stats]
        control = [_describe(s, bar) for s in controls]
    names = list(described[0].descriptors)
    hookpoint, cluster, position, clusters, x = _cluster(described, names, recipe["clusters"], recipe["seed"])
    information, shuffled, p_value = association(hookpoint, cluster, recipe["permutations"], recipe["seed"])
    columns = dict(zip([s.hookpoint for s in stats], described, strict=True))
    columns |= dict(zip([f"untrained {s.hookpoint}" for s in controls], control, strict=True))
    tables = {
        "hookpoints": [s.hookpoint for s in stats],
        "clusters": clusters,
        "information": information,
        "shuffled": shuffled,
        "p_value": p_value,
        "permutations": recipe["permutations"],
        **_control_information(control, names, recipe),
        "table": [_row(name, columns) for name in names],
    }
    arrays = {"hookpoint": hookpoint, "cluster": cluster, "position": position, "descriptors": x}
    _save_arrays(artifact, {**arrays, "feature": np.concatenate([d.feature for d in described])})
    write_atomically(artifact.file(_TABLES), json.dumps(tables, indent=1).encode())
    artifact.seal(facts={"features": len(hookpoint), "information": information, "p_value": p_value})


def _describable(stats: FeatureStats) -> Integers:
    return np.flatnonzero(stats.image_density * stats.n_images >= MIN_IMAGES - 0.5)


def _describe(stats: FeatureStats, bar: Any) -> _Described:
    features = _describable(stats)
    responses = stats.image_activations("max")[:, features]
    by_factor = {name: omega_squared(responses[at], values) for name, at, values in _factors(stats)}
    area = (stats.density[features] / stats.image_density[features]).astype(np.float64)
    looks = []
    for feature in features:
        looks.append(_look(stats.examples(int(feature), n=MIN_IMAGES), colours=not by_factor))
        bar.update()
    names = (SPATIAL[2], *(() if by_factor else COLOUR))
    looked = np.array(looks, dtype=np.float64).reshape(len(features), len(names))
    smooth = np.nan_to_num(stats.moran[features].astype(np.float64))
    spatial = {SPATIAL[0]: area, SPATIAL[1]: smooth}
    return _Described(features, {**by_factor, **spatial, **dict(zip(names, looked.T, strict=True))})


def _factors(stats: FeatureStats) -> Iterator[tuple[str, Int[np.ndarray, "image"], list[str]]]:
    """Each factor that varies, with the images that have it and its values there."""
    known = stats.prompts.factors
    for name in dict.fromkeys(name for factors in known for name in factors):
        images = np.array([i for i, factors in enumerate(known) if name in factors])
        values = [known[i][name] for i in images]
        if 2 <= len(set(values)) < len(values):
            yield name, images, values


def _look(examples: Sequence[Example], colours: bool) -> list[float]:
    """How a feature's strongest examples look: centre-ness and, where wanted, colour under the heat map."""
    maps = np.stack([example.heat_map for example in examples]).astype(np.float64)
    weights = maps / maps.sum(axis=(1, 2), keepdims=True)
    centred = float((weights * _centrality(*maps.shape[1:])).sum(axis=(1, 2)).mean())
    return [centred, *_colour(examples, weights)] if colours else [centred]


def _centrality(height: int, width: int) -> Float[np.ndarray, "height width"]:
    """1 in the middle of the grid, 0 in its corners, falling with distance."""
    y, x = (np.abs(np.arange(n) - (n - 1) / 2) / max((n - 1) / 2, 1) for n in (height, width))
    return np.asarray(1 - np.hypot(y[:, None], x[None, :]) / np.sqrt(2))


def _colour(examples: Sequence[Example], weights: Float[np.ndarray, "example height width"]) -> list[float]:
    """Mean brightness, red − green and yellow − blue of the examples, weighted by activation; channels 0 to 1."""
    size = (weights.shape[2], weights.shape[1])
    small = [Image.open(io.BytesIO(e.thumbnail), formats=("WEBP",)).convert("RGB").resize(size) for e in examples]
    pixels = np.stack([np.asarray(image, dtype=np.float64) / 255 for image in small])
    red, green, blue = (weights[..., None] * pixels).sum(axis=(1, 2)).mean(axis=0)
    return [float(value) for value in ((red + green + blue) / 3, red - green, (red + green) / 2 - blue)]


def _cluster(
    described: Sequence[_Described], names: Sequence[str], clusters: int, seed: int
) -> tuple[Integers, Integers, Float[np.ndarray, "feature 2"], list[str], Float[np.ndarray, "feature descriptor"]]:
    """Hookpoint and cluster of each feature, its place in the plane, the clusters' names, and the descriptors."""
    x = np.concatenate([np.stack([d.descriptors[name] for name in names], axis=1) for d in described])
    counts = [len(d.feature) for d in described]
    if sum(counts) < clusters or min(counts) < 2:
        raise KitError(
            f"specialize: {counts} features fire on {MIN_IMAGES} images or more, too few for {clusters} clusters. "
            f"Measure on more prompts, or ask for fewer clusters."
        )
    hookpoint = np.repeat(np.arange(len(described)), counts)
    standard = StandardScaler().fit_transform(x)
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(standard)
    position = PCA(2, random_state=seed).fit_transform(standard)
    named = [f"{i + 1}: {_name(centre, names)}" for i, centre in enumerate(fitted.cluster_centers_)]
    return hookpoint, fitted.labels_.astype(np.int64), position, named, x


def _name(centre: Float[np.ndarray, "descriptor"], names: Sequence[str]) -> str:
    strongest = np.argsort(-np.abs(centre), kind="stable")[:2]
    return ", ".join(f"{'high' if centre[i] > 0 else 'low'} {names[i]}" for i in strongest)


def _control_information(
    control: Sequence[_Described], names: Sequence[str], recipe: Mapping[str, Any]
) -> dict[str, float | None]:
    if len(control) < 2:
        return {"control_information": None, "control_shuffled": None}
    hookpoint, cluster, *_ = _cluster(control, names, recipe["clusters"], recipe["seed"])
    information, shuffled, _p = association(hookpoint, cluster, recipe["permutations"], recipe["seed"])
    return {"control_information": information, "control_shuffled": shuffled}


def _row(name: str, columns: Mapping[str, _Described]) -> dict[str, Any]:
    row: dict[str, Any] = {"descriptor": name, "kind": "look" if name in (*SPATIAL, *COLOUR) else "factor"}
    for column, described in columns.items():
        values = described.descriptors[name]
        row |= {column: float(values.mean()), f"{column} interval": bootstrap_interval(values)}
    return row


def _with_interval(row: Mapping[str, Any], column: str) -> str:
    low, high = row[f"{column} interval"]
    return f"{row[column]:.3f} [{low:.3f}, {high:.3f}]"


def _columns(row: Mapping[str, Any]) -> list[str]:
    """The groups of features that a row has a mean of."""
    return [key for key in row if f"{key} interval" in row]


def _save_arrays(artifact: Artifact, arrays: Mapping[str, NDArray[Any]]) -> None:
    with h5py.File(artifact.file(_ARRAYS), "w", libver=("v108", "v110")) as file:
        for name, array in arrays.items():
            file[name] = array

"""Clustering: the planted number of clusters is found, none is found where there is none, and extension is as said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestCentroid

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.studies.clustering import choose_number, cluster, extend, measure_stability, place, standardise

Planted = tuple[np.ndarray, np.ndarray]


def blobs(number: int, n: int = 120, columns: int = 6, apart: float = 6.0, seed: int = 0) -> Planted:
    """Round clusters around random centres, and whose each point is."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % number
    return standardise(rng.normal(size=(number, columns))[label] * apart + rng.normal(size=(n, columns))), label


@pytest.mark.parametrize("method", ["kmeans", "ward", "mixture"])
def test_every_method_finds_planted_clusters(method: str) -> None:
    points, planted = blobs(3)
    found = cluster(points, 3, method)  # type: ignore[arg-type]
    assert adjusted_rand_score(planted, found) == 1
    assert (np.diff(np.bincount(found)) <= 0).all()


@pytest.mark.parametrize("number", [2, 5])
def test_the_planted_number_is_the_most_stable(number: int) -> None:
    rows = measure_stability(blobs(number, n=70, seed=number)[0])
    assert choose_number(rows) == number
    best = next(row for row in rows if row["clusters"] == number)
    assert best["agreement"] == pytest.approx(1, abs=0.02)
    assert best["gain"] > 0.5
    assert best["gain"] == pytest.approx(1 - (1 - best["agreement"]) / (1 - best["one cloud"]), abs=1e-4)


def test_where_nothing_goes_together_there_are_no_clusters() -> None:
    rng = np.random.default_rng(0)
    skewed = np.concatenate([rng.normal(size=(50, 3)), rng.exponential(size=(50, 3))], axis=1)
    assert choose_number(measure_stability(standardise(skewed))) == 1


def test_one_cloud_whose_descriptors_go_together_has_no_clusters() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(60, 3)) * [3, 1, 0.3] @ rng.normal(size=(3, 12))
    assert choose_number(measure_stability(standardise(cloud))) == 1


def test_of_numbers_equally_stable_the_largest_is_taken() -> None:
    told = [(2, 0.70, 9.0), (3, 0.80, 9.0), (4, 0.76, 9.0), (5, 0.74, 9.0), (6, 0.79, 1.0), (7, 0.2, 9.0)]
    rows = [{"clusters": k, "gain": gain, "standard error": 0.05, "deviations": z} for k, gain, z in told]
    assert choose_number(rows) == 4  # 5 is more than one standard error below 3, and 6 and 7 are not clear of chance
    assert choose_number([]) == 1


def test_all_features_go_to_the_nearest_centroid() -> None:
    points, _ = blobs(4, apart=1.0)
    chosen = np.random.default_rng(1).permutation(len(points))[:90]
    labels = cluster(points[chosen], 4)
    oracle = NearestCentroid().fit(points[chosen], labels).predict(points)
    np.testing.assert_array_equal(extend(points, chosen, labels), oracle)


def test_what_does_not_vary_is_nothing() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0]])
    np.testing.assert_allclose(standardise(values), [[-1, 0], [1, 0]])
    noisy = values * [1, 1e-12]
    np.testing.assert_allclose(standardise(np.concatenate([noisy, noisy * [1, 3]]))[:, 1], 0)


def test_what_is_not_told_stays_so_and_moves_nothing() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(standardise(values), [[-1, np.nan], [1, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize("embedding", ["tsne", "pca"])
def test_a_plane_keeps_clusters_together_and_is_the_same_each_time(embedding: str) -> None:
    points, planted = blobs(2, n=40)
    found = place(points, embedding)  # type: ignore[arg-type]
    assert adjusted_rand_score(planted, cluster(standardise(found), 2)) == 1
    np.testing.assert_array_equal(found, place(points, embedding))  # type: ignore[arg-type]


def test_umap_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(KitError, match=r"pip install 'sdxl-sae-kit\[umap\]'"):
        place(blobs(2)[0], "umap")


def test_impossible_settings_are_refused(unchecked_types: None) -> None:
    with pytest.raises(KitError, match=r"method is 'kmeans', 'ward', 'mixture', not 'kmean'. Did you mean 'kmeans'"):
        cluster(blobs(2)[0], 2, "kmean")  # type: ignore[arg-type]
    with pytest.raises(KitError, match="embedding is 'tsne'"):
        place(blobs(2)[0], "mds")  # type: ignore[arg-type]
    with pytest.raises(KitError, match="6 features are too few for 7 clusters"):
        cluster(blobs(2, n=6)[0], 7)

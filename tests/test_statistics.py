"""Statistics of paired pictures, against definitions written out and against chance."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, spearmanr

from sdxl_sae_kit.studies.statistics import benjamini_hochberg, by_cluster, rank_correlation, read_doses, sign_flip_p

DOSES = (-1.0, 0.0, 1.0, 2.0, 4.0)


def test_a_cluster_is_the_mean_of_its_images_and_what_is_not_there_does_not_count() -> None:
    values = np.array([[1.0, np.nan], [3.0, 5.0], [7.0, np.nan]])
    found = by_cluster(values, ["a", "a", "b"])
    assert found[:, 0].tolist() == [2, 7]
    assert found[0, 1] == 5 and np.isnan(found[1, 1])


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_exact_p_value_is_the_share_of_all_flips(values) -> None:
    differences = np.array(values, dtype=np.float64) / 3
    flips = itertools.product((-1, 1), repeat=len(values))
    share = np.mean([np.dot(flip, values) >= sum(values) for flip in flips])
    assert sign_flip_p(differences) == pytest.approx(share)


def test_p_values_of_many_pairs_are_drawn_and_uniform_by_chance() -> None:
    rng = np.random.default_rng(1)
    found = np.array([sign_flip_p(rng.standard_normal(20)) for _ in range(150)])
    assert abs(found.mean() - 0.5) < 0.08 and 0.02 < (found < 0.1).mean() < 0.2
    assert sign_flip_p(np.ones(40)) == pytest.approx(1 / 10_001)


@given(st.lists(st.floats(1e-6, 1), max_size=30))
def test_q_values_are_those_of_scipy(p) -> None:
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p).tolist() if p else [])


@given(seed=st.integers(0, 1000))
def test_the_dose_is_read_exactly_where_pictures_are_in_proportion_to_it(seed) -> None:
    rng = np.random.default_rng(seed)
    changes = np.multiply.outer(np.subtract(DOSES, 1), rng.standard_normal(50))
    assert read_doses(DOSES, changes) == pytest.approx(DOSES)


@pytest.mark.parametrize("doses", [DOSES, (0.0, 1.0, 2.0, 4.0, 8.0), (-4.0, -2.0, 0.0, 1.0)], ids=str)
def test_changes_that_have_nothing_to_do_with_their_doses_are_read_in_no_order(doses) -> None:
    rng, unchanged = np.random.default_rng(0), doses.index(1)
    rhos = []
    for _ in range(1000):
        changes = rng.standard_normal((len(doses), 300))
        changes[unchanged] = 0  # the picture from which all are measured
        readings = read_doses(doses, changes)
        assert readings[unchanged] == 1
        rhos.append(rank_correlation(doses, readings))
    assert abs(np.mean(rhos)) < 0.07  # standard error 0.02


def test_pictures_that_do_not_change_are_all_read_as_dose_1() -> None:
    assert read_doses(DOSES, np.zeros((5, 4))).tolist() == [1] * 5


@given(st.lists(st.integers(0, 5), min_size=3, max_size=8))
def test_rank_correlation_is_spearmans_and_0_without_order(values) -> None:
    expected = spearmanr(range(len(values)), values).statistic if len(set(values)) > 1 else 0
    assert rank_correlation(range(len(values)), np.array(values, dtype=np.float64)) == pytest.approx(expected)

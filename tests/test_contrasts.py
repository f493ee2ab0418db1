"""Contrasts and agreement: what is not told is left out, and what is independent is not called related."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_descriptors import plant
from scipy.stats import spearmanr, ttest_ind

from sdxl_sae_kit.studies.agreements import agreement
from sdxl_sae_kit.studies.claims import TRAINED, weigh_claims
from sdxl_sae_kit.studies.contrasts import Pool, association, contrasts
from sdxl_sae_kit.studies.robustness import vary

COLOUR = "responds to colour"


def partly_told() -> Pool:
    """Of block a, every other feature does not tell its colour; nobody tells the shape."""
    pool = Pool.of([plant("a", {COLOUR: 2.0}, n=30), plant("b", n=30)])
    values = pool.values.copy()
    values[:30:2, pool.names.index(COLOUR)] = np.nan
    values[:, pool.names.index("responds to shape")] = np.nan
    return replace(pool, values=values)


def test_what_is_not_told_is_left_out_of_contrasts() -> None:
    pool = partly_told()
    rows = {(row["descriptor"], row["block"]): row for row in contrasts(pool)}
    told = Pool.of([plant("a", {COLOUR: 2.0}, n=30), plant("b", n=30)])
    column = told.values[:, told.names.index(COLOUR)]
    own, others = column[1:30:2], column[30:]
    deviation = np.sqrt((14 * own.var(ddof=1) + 29 * others.var(ddof=1)) / 43)
    row = rows[COLOUR, "a"]
    assert (row["features"], rows[COLOUR, "b"]["features"]) == (15, 30)
    assert row["mean"] == pytest.approx(own.mean())
    assert row["effect"] == pytest.approx((own.mean() - others.mean()) / deviation)
    assert row["effect interval"][0] < row["effect"] < row["effect interval"][1]
    assert ("responds to shape", "a") not in rows
    assert row["q"] >= ttest_ind(own, others, equal_var=False).pvalue


def test_clusters_take_the_median_of_all_blocks_and_drop_what_does_not_vary() -> None:
    pool = partly_told()
    assert pool.bounded.shape == (60, len(pool.names) - 1)
    at = pool.names.index(COLOUR) - 1  # the shape, which nobody tells, comes before it
    untold = pool.bounded[:30:2, at]
    assert np.isfinite(pool.bounded).all()
    np.testing.assert_allclose(untold, np.median(np.delete(pool.bounded[:, at], np.arange(0, 30, 2))))
    assert pool.untold == pytest.approx((15 + 60) / pool.values.size)


def test_rounding_noise_is_no_descriptor() -> None:
    described = [plant("a", n=20), plant("b", n=20)]
    for each, tiny in zip(described, (1e-10, 1e-20), strict=True):
        each.values[:, 0] = tiny
    pool = Pool.of(described)
    assert pool.bounded.shape[1] == len(pool.names) - 1
    assert next(row for row in contrasts(pool) if row["descriptor"] == pool.names[0])["effect"] == 0


def test_claims_say_how_many_features_tell_and_what_they_tell() -> None:
    pool = Pool.of([plant("up.0.1", n=30), plant("up.0.0", n=30)])
    values = pool.values.copy()
    values[:10, pool.names.index("changes colour")] = np.nan
    claim = next(c for c in weigh_claims({TRAINED: replace(pool, values=values)}) if c["block"] == "up.0.1")
    responds, changes = claim["parts"]
    assert (responds["features"], changes["features"], changes["others"]) == (30, 20, 30)
    assert np.isfinite(changes["lead"])
    assert changes["means"]["changes colour"][0] == pytest.approx(
        np.nanmean(values[:30], axis=0)[pool.names.index("changes colour")]
    )


def test_above_compares_blocks_of_other_sizes() -> None:
    even, uneven = np.repeat([0, 1], [50, 50]), np.repeat([0, 1], [90, 10])
    shares = [association(block, block, permutations=50, seed=0)["above"] for block in (even, uneven)]
    assert shares == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("method", ["ward", "kmeans"])
def test_variations_that_are_none_or_cannot_be_are_left_out(method: str) -> None:
    pool = Pool.of([plant("a", n=6), plant("b", n=6)])
    rows = vary(pool, np.arange(12) % 6, 6, method, 0, permutations=9)  # type: ignore[arg-type]
    names = [row["variation"] for row in rows]
    assert ("seed 1" in names) == (method == "kmeans")
    assert {"4 clusters", "8 clusters"} <= set(names)
    assert not any("half" in name for name in names)  # six features cannot be put in six clusters


# Agreement -----------------------------------------------------------------------------------------------------------


def table(seed: int, matters: float = 0.0) -> dict[tuple[str, str], float]:
    """Noise; some blocks matter more for every factor, in the same order in every table."""
    rng = np.random.default_rng(seed)
    return {(b, f): float(rng.normal() + matters * at) for at, b in enumerate("abcd") for f in "123456"}


def test_agreement_is_spearmans_of_what_is_left_without_means() -> None:
    one, other = table(0), table(1)
    a, b = (np.array([[t[b, f] for f in "123456"] for b in "abcd"]) for t in (one, other))
    a, b = (t - t.mean(axis=0) - t.mean(axis=1, keepdims=True) + t.mean() for t in (a, b))
    found = agreement(one, other)
    assert found["ρ"] == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)
    assert found["ρ interval"][0] < found["ρ"] < found["ρ interval"][1]
    assert (found["blocks"], found["factors"]) == (4, 6)
    assert found["p"] * 24 == pytest.approx(round(found["p"] * 24))


def test_of_the_same_it_is_full_and_p_the_least_there_is() -> None:
    one = table(0)
    easy = {(b, f): 10 * value + 100 * float(f) + 50 * ord(b) for (b, f), value in one.items()}
    same = agreement(one, easy | {("e", "1"): 0.0})
    assert same["ρ"] == pytest.approx(1) and same["p"] == 1 / 24
    assert same["verdict"] == "they agree"
    assert agreement({("a", "1"): 1.0}, {("a", "1"): 1.0})["verdict"] == "cannot be told"
    three = {key: value for key, value in one.items() if key[0] != "d"}
    assert agreement(three, three)["verdict"] == "too few blocks to tell"
    many = {(f"{b}{i}", f): float(np.sin(7 * ord(b) + i * int(f))) for b in "abcd" for i in (1, 2) for f in "1234"}
    assert agreement(many, many)["p"] == 1 / 2001


def test_blocks_that_matter_for_everything_are_no_agreement() -> None:
    found = [agreement(table(2 * seed, 3.0), table(2 * seed + 1, 3.0)) for seed in range(60)]
    p = np.array([row["p"] for row in found])
    assert (p <= 0.05).mean() < 0.15
    assert 0.42 < p.mean() < 0.62  # uniform over 1/24 to 1: 0.52
    assert abs(np.mean([row["ρ"] for row in found])) < 0.1


def test_factors_that_go_together_count_once() -> None:
    def together(seed: int) -> dict[tuple[str, str], float]:
        rng = np.random.default_rng(seed)
        shared, own = rng.normal(size=(4, 2)), rng.normal(size=(4, 6)) / 10
        return {(b, f): shared[at, int(f) % 2] + own[at, int(f) - 1] for at, b in enumerate("abcd") for f in "123456"}

    p = np.array([agreement(together(2 * seed), together(2 * seed + 1))["p"] for seed in range(60)])
    assert (p <= 0.05).mean() < 0.15

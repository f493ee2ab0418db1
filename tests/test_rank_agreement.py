"""Agreement of orders, against scipy's own Spearman."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from sdxl_sae_kit.studies.rank_agreement import rank_correlation, shuffled_range, spearman


def test_it_is_scipys_spearman_row_by_row_ties_included() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (6, 20)).astype(float), rng.integers(0, 5, (6, 20)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected)
    assert np.isnan(spearman(np.zeros(4), np.arange(4.0)))


def test_intervals_resample_prompts_and_sizes_forget_the_sign() -> None:
    rng = np.random.default_rng(1)
    effect = np.linspace(-1, 1, 30)
    one, other = (effect + rng.normal(size=(12, 30)) for _ in range(2))
    found = rank_correlation(one, other)
    assert found["ρ"] == pytest.approx(spearmanr(one.mean(0), other.mean(0)).statistic)
    assert found["ρ interval"][0] < found["ρ"] <= found["ρ interval"][1] < 1
    sizes = rank_correlation(one, -other, sizes=True)
    assert sizes["ρ"] == pytest.approx(spearmanr(np.abs(one.mean(0)), np.abs(other.mean(0))).statistic)
    assert np.isnan(rank_correlation(one[:1], other[:1])["ρ interval"]).all()


def test_chance_is_around_0_and_narrows_with_the_number_of_latents() -> None:
    few, many = (shuffled_range(np.random.default_rng(2).normal(size=(3, n))) for n in (10, 60))
    for found, n in ((few, 10), (many, 60)):
        low, high = found["ρ interval"]
        assert abs(found["ρ"]) < 0.05 and -low == pytest.approx(high, abs=0.05)
        assert high == pytest.approx(1.96 / np.sqrt(n - 1), rel=0.12)  # the usual approximation

"""Metrics against independent formulas and the invariants their names promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from sdxl_sae_kit.metrics import (
    ReconstructionMetrics,
    bootstrap_interval,
    constant_share,
    explained_variance,
    explained_variance_per_channel,
    neighbour_correlation,
    participation_ratio,
    variance_spectrum,
)

seeds = st.integers(0, 2**32 - 1)


def data(seed, tokens=40, channels=5):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(rng.normal(size=channels) * 3, rng.uniform(0.1, 5, channels), (tokens, channels)))
    return x.float(), (x + torch.from_numpy(rng.normal(size=x.shape))).float()


@given(seeds)
def test_explained_variance_is_1_for_a_perfect_and_0_for_a_constant_reconstruction(seed):
    x, _ = data(seed)
    assert explained_variance(x, x) == 1
    mean = x.double().mean(0).expand_as(x)
    assert explained_variance(x.double(), mean) == pytest.approx(0, abs=1e-9)


@given(seeds, st.floats(1e-3, 1e3))
def test_explained_variance_ignores_scale_and_token_order(seed, scale):
    x, x_hat = data(seed)
    reference = explained_variance(x, x_hat)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed % 2**31))
    assert explained_variance(x[order], x_hat[order]) == pytest.approx(reference, rel=1e-9)
    assert explained_variance(x.double() * scale, x_hat.double() * scale) == pytest.approx(reference, rel=1e-6)


@given(seeds)
def test_both_formulas_agree_with_scikit_learn(seed):
    x, x_hat = (t.double().numpy() for t in data(seed))
    # r2 of channels weighted by their variance is 1 − FVU
    fvu = 1 - r2_score(x, x_hat, multioutput="variance_weighted")
    assert explained_variance(*map(torch.from_numpy, (x, x_hat))) == pytest.approx(1 - fvu, abs=1e-9)
    by_channel = np.mean([1 - np.var(x[:, c] - x_hat[:, c]) / np.var(x[:, c]) for c in range(5)])
    assert explained_variance_per_channel(*map(torch.from_numpy, (x, x_hat))) == pytest.approx(by_channel, abs=1e-9)


@given(seeds, st.lists(st.integers(1, 39), max_size=4))
def test_streaming_in_any_pieces_gives_the_whole(seed, cuts):
    x, x_hat = data(seed)
    whole, streamed = ReconstructionMetrics().update(x, x_hat, torch.ones(40)), ReconstructionMetrics()
    for part in np.split(np.arange(40), sorted(set(cuts))):
        streamed.update(x[part], x_hat[part], torch.ones(len(part)))
    for name in ("explained_variance", "explained_variance_per_channel", "relative_norm", "gamma", "l0"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_a_huge_common_offset_costs_no_precision():
    x, x_hat = data(0, tokens=2000)
    offset = torch.full((5,), 1e6, dtype=torch.float64)
    assert explained_variance(x.double() + offset, x_hat.double() + offset) == pytest.approx(
        explained_variance(x, x_hat), rel=1e-6
    )


def test_the_two_formulas_can_differ_widely():
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1.0])
    x_hat = x * torch.tensor([1.0, 0.0])  # the large channel kept, the small one lost
    assert explained_variance(x, x_hat) > 0.999
    assert explained_variance_per_channel(x, x_hat) == pytest.approx(0.5, abs=1e-3)


@given(seeds, st.integers(1, 6))
def test_participation_ratio_counts_equal_directions(seed, directions):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0][:directions]
    coordinates = torch.cat([torch.eye(directions), -torch.eye(directions)]).double()  # equal variance along each axis
    assert participation_ratio(coordinates @ axes * 7 + 3) == pytest.approx(directions)


@given(seeds)
def test_constant_share_is_the_between_group_share_of_variance(seed):
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert constant_share(x.mean(1, keepdim=True).expand_as(x)) == pytest.approx(1)
    assert constant_share(x - x.mean(1, keepdim=True)) == pytest.approx(0, abs=1e-12)
    within = ((x - x.mean(1, keepdim=True)) ** 2).sum()
    total = ((x - x.mean((0, 1))) ** 2).sum()
    assert constant_share(x) == pytest.approx((1 - within / total).item())


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, 60), samples=300, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


@settings(deadline=None)
@given(seeds)
def test_bootstrap_interval_contains_its_estimate_and_takes_ratios(seed):
    rng = np.random.default_rng(seed)
    pairs = rng.uniform(1, 2, (50, 2))
    low, high = bootstrap_interval(pairs, lambda m: m[..., 0] / m[..., 1], samples=200)
    assert low <= pairs[:, 0].sum() / pairs[:, 1].sum() <= high


def test_one_cluster_has_no_interval():
    assert all(np.isnan(bound) for bound in bootstrap_interval(np.array([1.0])))


@given(seeds)
def test_the_spectrum_is_that_of_principal_components(seed):
    x, _ = data(seed)
    assert np.allclose(variance_spectrum(x), PCA().fit(x.double().numpy()).explained_variance_ratio_, atol=1e-9)
    assert participation_ratio(x) == pytest.approx(1 / np.square(variance_spectrum(x)).sum())


def test_neighbours_of_one_walk_are_alike_and_shuffled_ones_are_not():
    steps = np.random.default_rng(0).normal(size=(20_000, 3))
    walk = np.zeros_like(steps)
    for i in range(1, len(steps)):
        walk[i] = 0.8 * walk[i - 1] + steps[i]  # an autoregression: neighbours correlate by 0.8
    walk = torch.from_numpy(walk)
    assert neighbour_correlation(walk) == pytest.approx(0.8, abs=0.02)
    assert neighbour_correlation(walk[torch.randperm(len(walk))]) == pytest.approx(0, abs=0.02)

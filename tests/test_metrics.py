"""Metrics against independent formulas and the invariants their names promise."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score

from sdxl_sae_kit.metrics import (
    ReconstructionMetrics,
    areas_under_curve,
    bootstrap_interval,
    bootstrap_intervals,
    constant_share,
    explained_variance,
    explained_variance_per_channel,
    geometric_median,
    matched_cosine,
    neighbour_correlation,
    participation_ratio,
    resampled_areas,
    shares_above,
    shuffled_rows,
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


def test_of_what_does_not_vary_no_share_is_explained():
    still = torch.full((5, 3), 2.0)
    assert np.isnan(explained_variance(still, still)) and np.isnan(explained_variance(still, still + 1))


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


@pytest.mark.parametrize(("shape", "samples"), [((7,), 333), ((60_000, 2), 5), ((200_000,), 3)])
def test_bootstrap_interval_draws_sample_by_sample(shape, samples):
    """However many it holds at once."""
    values, rng = np.random.default_rng(1).normal(size=shape), np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean(axis=0) for _ in range(samples)]
    assert bootstrap_interval(values, samples=samples) == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)


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


def turned(rows, cosine, seed):
    """Rows of unit length, each at this cosine from its own and in another order; and which came from where."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    across = noise - (noise * rows).sum(1, keepdim=True) * rows
    across = across / across.norm(dim=1, keepdim=True)
    order = torch.randperm(len(rows), generator=generator)
    return (cosine * rows + (1 - cosine**2) ** 0.5 * across)[order], order


@given(seeds, st.floats(0.85, 1))
def test_a_reordered_noisy_copy_matches_with_the_cosine_of_its_noise(seed, cosine):
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    copy, _ = turned(rows, cosine, seed + 1)
    assert matched_cosine(rows * 3, copy) == pytest.approx(np.full(20, cosine), abs=1e-6)  # lengths do not count


@given(seeds)
def test_the_matching_is_the_best_of_all_assignments(seed):
    one, other = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cosines = np.array([[float(a @ b / a.norm() / b.norm()) for b in other] for a in one])
    best = max(sum(cosines[row, at] for row, at in enumerate(order)) for order in itertools.permutations(range(5)))
    assert matched_cosine(one, other).sum() == pytest.approx(best)


def test_an_opposite_is_no_match_and_rows_left_over_have_none():
    axes = torch.eye(4)
    assert matched_cosine(axes, -axes).tolist() == [0, 0, 0, 0]
    assert np.array_equal(matched_cosine(axes, axes[1:3]), [np.nan, 1, 1, np.nan], equal_nan=True)
    assert matched_cosine(axes[1:3], axes).tolist() == [1, 1]


@given(seeds)
def test_areas_are_shares_of_pairs_won(seed):
    rng = np.random.default_rng(seed)
    strengths, shows = rng.integers(0, 4, (30, 3)).astype(np.float32), rng.random((30, 2)) < 0.5
    shows[:2] = [[True, True], [False, False]]
    areas = areas_under_curve(strengths, shows)
    for value, latent in itertools.product(range(2), range(3)):
        with_it, without = (strengths[shows[:, value] == kind, latent] for kind in (True, False))
        won = [(a > b) + (a == b) / 2 for a, b in itertools.product(with_it, without)]
        assert areas[value, latent] == pytest.approx(np.mean(won))
    assert np.array_equal(areas_under_curve(strengths, shows[:, 1]), areas[1])


@given(seeds)
def test_a_resampled_area_is_that_of_repeated_images(seed):
    rng = np.random.default_rng(seed)
    strength, shows = rng.integers(0, 5, 25).astype(np.float32), rng.random(25) < 0.4
    draws = rng.multinomial(25, np.full(25, 1 / 25), size=4)
    for area, times in zip(resampled_areas(strength, shows, draws), draws, strict=True):
        repeated, shown = np.repeat(strength, times), np.repeat(shows, times)
        if 0 < shown.sum() < len(shown):
            assert area == pytest.approx(areas_under_curve(repeated[:, None], shown)[0])
        else:
            assert np.isnan(area)


def test_the_geometric_median_has_the_least_summed_distance():
    x = torch.cat([torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.full((5, 3), 40.0)])
    found = geometric_median(x)

    def summed(point):
        return (x - point).norm(dim=1).sum()

    nudges = 0.01 * torch.cat([torch.eye(3), -torch.eye(3)])
    assert all(summed(found) < summed(found + nudge) for nudge in nudges)
    assert summed(found) < summed(x.mean(dim=0)) - 1  # which the five far tokens drag along


def test_shuffled_rows_keep_mean_and_covariance_and_no_row():
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.tensor([3.0, 1, 1, 0.5]))
    rows[:, 1] += rows[:, 0]
    shuffled = shuffled_rows(rows + 7)
    axes = torch.linalg.eigh(torch.cov(rows.T))[1]
    assert torch.allclose(shuffled.mean(dim=0), (rows + 7).mean(dim=0), atol=1e-4)
    assert torch.allclose((shuffled @ axes).sort(dim=0)[0], ((rows + 7) @ axes).sort(dim=0)[0], atol=1e-3)
    assert torch.cdist(shuffled, rows + 7).min(dim=1)[0].median() > 0.1
    assert torch.equal(shuffled, shuffled_rows(rows + 7, seed=0))
    assert not torch.equal(shuffled, shuffled_rows(rows + 7, seed=1))


def test_shares_above_count_what_is_strictly_more():
    similarities = np.array([0.7, 0.71, 0.9, 0.91, 0.1, 1.0, 0.5, 0.95])
    found = shares_above(similarities)
    assert (found["above 0.7"], found["above 0.9"]) == (5 / 8, 3 / 8)
    for least in (0.7, 0.9):
        assert found[f"above {least} interval"] == bootstrap_interval((similarities > least).astype(float))


def test_intervals_of_many_numbers_are_those_of_each():
    values = np.random.default_rng(3).normal(size=(40, 2, 3)) + 5
    low, high = bootstrap_intervals(values, samples=4000)
    for place in np.ndindex(2, 3):
        one = bootstrap_interval(values[(slice(None), *place)], samples=4000)
        assert np.allclose((low[place], high[place]), one, atol=0.05)
    ratio = bootstrap_intervals(values, lambda m: m[..., 0] / m[..., 1], samples=4000, level=0.5)
    one = bootstrap_interval(values[:, 0], lambda m: m[..., 0] / m[..., 1], samples=4000, level=0.5)
    assert ratio.shape == (2, 2) and np.allclose(ratio[:, 0], one, atol=0.02)
    assert np.isnan(bootstrap_intervals(values[:1])).all()


def test_samples_in_which_a_number_is_unknown_are_left_out_of_its_interval_only():
    values = np.stack([np.arange(6.0), np.eye(6)[0]], axis=1)
    low, high = bootstrap_intervals(values, lambda m: np.where(m[..., 1:] > 0, m, np.nan))
    assert np.isfinite([low, high]).all()  # of the samples that drew the first row
    assert np.isnan(bootstrap_intervals(values, lambda m: m * np.nan)).all()
    assert np.array_equal(low[1:], [1 / 6])


def test_a_seed_repeats_an_interval_and_another_does_not():
    values = np.random.default_rng(0).normal(size=(30, 2))
    drawn = [bootstrap_intervals(values, seed=seed) for seed in (3, 3, 4)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])

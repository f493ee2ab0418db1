"""Sums over sparse codes against loops over dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from sdxl_sae_kit.firing import EDGES, Firing, Moments, group_ranks
from sdxl_sae_kit.sae import FIRES


def firing(z: np.ndarray, grid: tuple[int, int]) -> Firing:
    """From dense codes (image, token, latent), each token's latents in a random order, with padding."""
    order = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(z.shape[2]), z.shape), axis=2)
    values = np.take_along_axis(z, order, axis=2)
    padding = np.zeros((*z.shape[:2], 2))
    return Firing.of(
        np.concatenate([order, padding.astype(int)], 2), np.concatenate([values, padding], 2), grid, z.shape[2]
    )


def brute_force_moran(x: np.ndarray) -> float:
    height, width = x.shape
    d, total, weights = x - x.mean(), 0.0, 0
    for y1, x1, y2, x2 in np.ndindex(height, width, height, width):
        if abs(y1 - y2) + abs(x1 - x2) == 1:
            total += d[y1, x1] * d[y2, x2]
            weights += 1
    return x.size / weights * total / (d**2).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 5), st.floats(0.02, 1))
def test_tallies_are_those_of_dense_heat_maps(seed: int, height: int, width: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    z = rng.gamma(1.0, 3.0, (3, height * width, 4)) * (rng.random((3, height * width, 4)) < density)
    z[z <= FIRES] = 0
    tally = firing(z, (height, width)).by_image()
    seen = set()
    for at, (image, latent) in enumerate(zip(tally.image, tally.latent, strict=True)):
        heat_map = z[image, :, latent].reshape(height, width)
        seen.add((image, latent))
        assert tally.max[at] == heat_map.max() and tally.area[at] == (heat_map > 0).sum()
        assert tally.mean[at] == pytest.approx(heat_map.mean())
        assert tally.moran[at] == pytest.approx(brute_force_moran(heat_map), abs=1e-9)
    assert seen == set(zip(*np.nonzero((z > 0).any(axis=1)), strict=True))


def test_morans_i_of_known_patterns() -> None:
    checkerboard = 1.0 + np.indices((8, 8)).sum(axis=0) % 2
    halves = np.repeat([[1.0] * 4 + [2.0] * 4], 8, axis=0)
    spot = np.zeros((8, 8))
    spot[3, 3] = 5
    z = np.stack([checkerboard, halves, np.full((8, 8), 3.0), spot]).reshape(4, 64, 1)
    found = firing(z, (8, 8)).by_image().moran
    assert found[0] == pytest.approx(-1)
    assert found[1] == pytest.approx(1 - 2 * 8 / 112)  # 8 of 112 neighbouring pairs differ
    assert np.isnan(found[2])  # it does not vary
    assert found[3] == pytest.approx(brute_force_moran(spot))


def test_without_spatial_order_morans_i_is_minus_one_over_n_minus_one_on_average() -> None:
    z = np.random.default_rng(0).exponential(size=(4000, 36, 1)) + 0.01
    assert firing(z, (6, 6)).by_image().moran.mean() == pytest.approx(-1 / 35, abs=0.006)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1e6), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_moments_merge_without_loss_however_large_the_offset(seed: int, offset: float, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    batches = [(rng.integers(3, size=n), offset + rng.random(n)) for n in sizes]
    merged = Moments.of(np.zeros(0, np.int64), np.zeros(0), 3)
    for latent, value in batches:
        merged = merged.merged(Moments.of(latent, value, 3))
    latent, value = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    for at in range(3):
        mine = value[latent == at]
        assert merged.n[at] == len(mine)
        if len(mine):
            assert merged.mean[at] == pytest.approx(mine.mean(), rel=1e-12)
            assert merged.std[at] == pytest.approx(mine.std(), abs=1e-9 * max(1, offset))


def test_an_interval_is_scipys() -> None:
    value = np.random.default_rng(1).normal(2, 3, 20)
    low, high = Moments.of(np.zeros(20, np.int64), value, 2).interval()
    expected = scipy_stats.t.interval(0.95, 19, loc=value.mean(), scale=scipy_stats.sem(value))
    assert (low[0], high[0]) == pytest.approx(expected)
    assert np.isnan([low[1], high[1]]).all()


def test_a_histogram_counts_every_firing_entry_once() -> None:
    z = np.array([FIRES, np.nextafter(FIRES, 1), 0.5, 0.5, 1e6, 0.0]).reshape(1, 6, 1)
    counts = firing(z, (2, 3)).histogram()[0]
    assert counts.sum() == 4 and counts[0] == 1 and counts[-1] == 1  # the last bin takes what is larger too
    at = int(counts.argmax())
    assert EDGES[at] <= 0.5 < EDGES[at + 1] and counts[at] == 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=40))
def test_ranks_count_from_the_smallest_within_each_group(pairs: list[tuple[int, int]]) -> None:
    keys, values = (np.array(column, dtype=np.int64) for column in (zip(*pairs, strict=True) if pairs else ([], [])))
    order, rank = group_ranks(keys, values)
    ordered = [(int(keys[i]), int(values[i])) for i in order]
    assert ordered == sorted(pairs)
    assert rank.tolist() == [sum(key == other for other, _ in ordered[:at]) for at, (key, _) in enumerate(ordered)]

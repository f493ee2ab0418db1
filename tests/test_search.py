"""Search: AUC against scikit-learn, choice and measurement on different images."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sdxl_sae_kit import search
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.search import areas_under_curve, best_latents, most_energetic


def stats_of(strengths, factors):
    """Just what `best_latents` reads of FeatureStats."""
    n = len(strengths)
    prompts = Prompts(tuple(f"p{i}" for i in range(n)), tuple(range(n)), tuple(factors))
    return SimpleNamespace(prompts=prompts, d_sae=strengths.shape[1], image_activations=lambda by: strengths)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 40))
def test_auc_is_scikit_learns_for_every_latent_with_ties(seed, n):
    rng = np.random.default_rng(seed)
    strengths = rng.integers(0, 4, (n, 5)).astype(np.float32)
    shows = rng.permutation(np.arange(n) < rng.integers(1, n))
    expected = [roc_auc_score(shows, column) for column in strengths.T]
    assert areas_under_curve(strengths, shows) == pytest.approx(expected)


def test_the_planted_latent_is_found_and_noise_is_measured_near_chance(unchecked_types):
    rng = np.random.default_rng(0)
    colours = rng.choice(["red", "blue"], 400)
    strengths = rng.random((400, 50)).astype(np.float32)
    strengths[:, 17] += colours == "red"
    planted, noise = strengths, strengths[:, :17]
    factors = [{"colour": c} for c in colours]
    (red,) = (r for r in best_latents({"mid.0": stats_of(planted, factors)}) if r["value"] == "red")
    assert (red["hookpoint"], red["latent"], red["AUC"]) == ("mid.0", 17, 1.0)
    for row in best_latents({"mid.0": stats_of(noise, factors)}):
        assert abs(row["AUC"] - 0.5) < 0.1  # chosen as the best of 17, measured on other images
        assert row["interval"][0] <= row["AUC"] <= row["interval"][1]


def test_the_interval_covers_the_true_auc_about_as_often_as_it_says(unchecked_types):
    rng, hits, truth = np.random.default_rng(1), 0, 0.7602499389  # Φ(1/√2): normal(1, 1) against normal(0, 1)
    for _ in range(300):
        shows = np.arange(240) < 40
        row = search._measured(rng.normal(shows.astype(float)), shows, "mid.0", 0)
        hits += row["interval"][0] <= truth <= row["interval"][1]
    assert 0.90 <= hits / 300 <= 0.99


def test_images_of_which_a_factor_is_unknown_do_not_count(unchecked_types):
    factors = [{"size": "small" if i % 3 else "large"} if i < 60 else {} for i in range(100)]
    strengths = np.array([[factors[i].get("size") == "large" or i >= 60] for i in range(100)], np.float32)
    for row in best_latents({"a": stats_of(strengths, factors)}):
        assert row["images"] == 30
        assert row["AUC"] == (1.0 if row["value"] == "large" else 0.0)


def test_what_cannot_be_answered_is_refused(small_stats, unchecked_types):
    with pytest.raises(KitError, match="needs statistics of one or more hookpoints"):
        best_latents({})
    with pytest.raises(KitError, match="No factor of these prompts is known often enough"):
        best_latents({"a": stats_of(np.ones((20, 2), np.float32), [{}] * 20)})


def test_energetic_latents_are_local_and_sorted(small_stats):
    chosen = most_energetic(small_stats, 5)
    energy = small_stats.density * (small_stats.mean**2 + small_stats.std**2)
    assert (small_stats.density[chosen] <= 0.5).all()
    assert energy[chosen].tolist() == sorted(energy[chosen], reverse=True)

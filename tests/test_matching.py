"""Matching: planted partners are found in both bases, independent latents are not above the controls."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import made_up_recipe, made_up_updates, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_html import read_safely
from scipy.sparse import csr_array

from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import HookpointError, KitError
from sdxl_sae_kit.matched import Compared, Matches, Matching
from sdxl_sae_kit.matching import _dealt_anew, correlations, match
from sdxl_sae_kit.sae import SAE


def reordered(sae, noise, seed=0):
    """A copy with its latents in another order, and a little noise on all weights; and the order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.d_sae, generator=generator)
    copy = SAE(replace(sae.config, seed=sae.config.seed + 9), sae.d_in, sae.site, "copy")
    state = sae.state_dict()
    for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0), ("threshold", 0), ("mean_activation", 0)):
        state[name] = state[name].index_select(axis, order)
    for name in ("W_enc", "W_dec"):
        size = noise * state[name].std()
        state[name] = state[name] + size * torch.randn(state[name].shape, generator=generator)
    copy.load_state_dict(state)
    return copy.eval().requires_grad_(False), order.numpy()


SHAPES = {"mid.0": [4, 4, 24], "up.0.1": [4, 4, 24], "down.2.1": [2, 2, 12]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """100 images of made-up updates."""
    recipe = made_up_recipe(100, hookpoints=SHAPES)
    return ActivationCache(write_cache(tmp_path_factory.mktemp("cache"), recipe, made_up_updates(recipe)))


def an_sae(hookpoint="mid.0", seed=0, alive=True):
    """Of random directions, some of its latents dead."""
    sae = SAE(
        SAEConfig(k=6, expansion=3, seed=seed), SHAPES[hookpoint][2], Site("m", "r", hookpoint, 1, 0.0), hookpoint
    )
    sae.mean_activation[5:] = float(alive)
    return sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return an_sae()


@pytest.fixture(scope="module")
def copied(sae, cache):
    copy, order = reordered(sae, 0.01)
    return match(sae, copy, cache), order


def test_a_reordered_noisy_copy_is_matched_exactly_in_both_bases(sae, copied) -> None:
    found, order = copied
    assert list(found.bases) == ["decoder", "codes"] and found.n_images > 10
    for compared in found.bases.values():
        assert len(compared.partners) > sae.d_sae / 2
        assert all(order[partner] == latent for latent, (partner, _) in compared.partners.items())
    agreement = found.agreement()
    assert agreement["share"] == 1 and agreement["chance"] == pytest.approx(1 / agreement["latents"])
    assert not len(found.unmatched("one")) and not len(found.unmatched("other"))


def test_rows_stand_beside_controls_that_find_little(copied) -> None:
    rows = {(row["basis"], row["condition"]): row for row in copied[0].rows()}
    assert [condition for _, condition in rows] == ["trained", "shuffled", "untrained"] * 2
    for basis in ("decoder", "codes"):
        trained = rows[basis, "trained"]
        assert trained["mean"] > 0.9 and trained["above 0.7"] > 0.95
        for control in ("shuffled", "untrained"):
            assert rows[basis, control]["mean interval"][1] < trained["mean interval"][0] - 0.1
            assert rows[basis, control]["latents"] == trained["latents"]
    for row in rows.values():
        assert row["mean interval"][0] <= row["mean"] <= row["mean interval"][1]


def test_swapped_the_partners_are_the_same(sae, cache, copied) -> None:
    swapped = match(reordered(sae, 0.01)[0], sae, cache)
    for basis, compared in copied[0].bases.items():
        back = {partner: latent for latent, (partner, _) in swapped.bases[basis].partners.items()}
        assert back == {latent: partner for latent, (partner, _) in compared.partners.items()}


def test_pairs_say_who_is_whose_partner(sae, copied) -> None:
    found, order = copied
    pairs = found.pairs()
    assert [row["latent"] for row in pairs] == np.flatnonzero(sae.mean_activation.numpy() > 0).tolist()
    silent = [row for row in pairs if row["partner by codes"] == "–"]
    assert {row["agree"] for row in silent} <= {"–"} and all(row["correlation"] == "–" for row in silent)
    loud = [row for row in pairs if row not in silent]
    assert all(row["agree"] == "yes" and order[row["partner by codes"]] == row["latent"] for row in loud)


def test_independent_latents_are_not_above_the_controls(sae, cache) -> None:
    found = match(sae, an_sae(seed=31), cache)
    rows = {(row["basis"], row["condition"]): row["mean"] for row in found.rows()}
    for control in ("shuffled", "untrained"):
        assert rows["decoder", "trained"] == pytest.approx(rows["decoder", control], abs=0.05)
    assert rows["codes", "trained"] == pytest.approx(rows["codes", "untrained"], abs=0.05)
    assert found.agreement()["share"] < 0.5 and len(found.bases["decoder"].unmatched("one")) > 55


def test_the_untrained_pair_is_independent_where_the_seeds_are_equal(sae) -> None:
    rows = {row["condition"]: row["mean"] for row in match(sae, sae).rows()}
    assert rows["trained"] == pytest.approx(1) and rows["untrained"] < 0.6


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_the_matching_is_the_best_of_all_assignments(seed, n, m) -> None:
    similarity = np.random.default_rng(seed).normal(size=(n, m))
    made = Matches.of(similarity)
    wide = similarity if n <= m else similarity.T
    sums = (sum(wide[i, j] for i, j in enumerate(to)) for to in itertools.permutations(range(max(n, m)), min(n, m)))
    assert made.found.sum() == pytest.approx(max(sums))
    matched = made.partners[made.partners >= 0]
    assert len(set(matched.tolist())) == len(matched) == min(n, m)
    assert np.isnan(made.similarities).sum() == max(0, n - m)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_correlations_are_those_of_the_dense_codes(seed) -> None:
    rng = np.random.default_rng(seed)
    one, other = (rng.gamma(2, size=(60, n)) * (rng.random((60, n)) < 0.4) for n in (4, 3))
    one[:, 0] = 2.5  # constant
    found = correlations(csr_array(one), csr_array(other))
    assert not found[0].any()
    np.testing.assert_allclose(found[1:], np.corrcoef(one[:, 1:].T, other.T)[:3, 3:], atol=1e-9)


@pytest.mark.parametrize("n_images", [2, 3, 7])
def test_dealt_anew_every_image_has_anothers_codes_at_their_places(n_images) -> None:
    codes = np.arange(n_images * 4 * 2).reshape(n_images * 4, 2) + 1.0
    dealt = _dealt_anew(csr_array(codes), n_images).toarray().reshape(n_images, 4, 2)
    images = codes.reshape(n_images, 4, 2)
    source = [int(np.flatnonzero((images == image).all((1, 2)))[0]) for image in dealt]
    assert sorted(source) == list(range(n_images)) and all(i != at for at, i in enumerate(source))


def test_blocks_are_matched_by_codes_of_the_same_images(sae, cache) -> None:
    saes = [sae, an_sae("up.0.1")]
    found = match(*saes, cache, n_images=8)
    held_out = cache.images("held_out")
    images = held_out[np.linspace(0, len(held_out) - 1, 8).astype(int)]
    codes = [s.encode(cache.read(s.hookpoint, images)[:, 0].float()).flatten(0, 1).numpy() for s in saes]
    assert found.n_images == 8
    for latent, (partner, correlation) in found.bases["codes"].partners.items():
        expected = np.corrcoef(codes[0][:, latent], codes[1][:, partner])[0, 1]
        assert correlation == pytest.approx(expected, abs=1e-6)


def compared(similarity, control=None):
    control = np.full_like(similarity, 0.3) if control is None else control
    conditions = {"trained": similarity, "shuffled": control, "untrained": control}
    latents = {"one": np.arange(len(similarity)) + 10, "other": np.arange(similarity.shape[1]) + 20}
    return Compared(latents, {name: Matches.of(each) for name, each in conditions.items()})


def test_what_vanished_and_appeared_is_below_the_control_in_every_basis() -> None:
    decoder = np.array([[0.9, 0.1, 0.1], [0.1, 0.2, 0.1], [0.1, 0.1, 0.2]])
    codes = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.1]])
    found = Matching("a", "b", {"decoder": compared(decoder), "codes": compared(codes)}, 5)
    assert found.unmatched("one").tolist() == [12] and found.unmatched("other").tolist() == [22]
    assert "1 latent of a and 1 latent of b" in found.sentence()
    assert found.agreement() | {"share interval": ()} == {
        "share": 1.0, "share interval": (), "chance": pytest.approx(1 / 3), "latents": 3
    }  # fmt: skip


def test_it_says_so_when_trained_latents_do_not_stand_apart() -> None:
    similarity = np.random.default_rng(0).uniform(0.2, 0.4, size=(30, 30))
    alike = Matching("a", "b", {"decoder": compared(similarity, similarity.T)}, 0)
    assert "does not stand apart" in alike.sentence()


def test_it_shows_itself_safely_with_a_described_figure(copied) -> None:
    found = replace(copied[0], one="<script>alert(1)</script>")
    page = read_safely(found._repr_html_())
    assert "alert(1)" in page.text
    figure = copied[0].plot()
    assert len(figure.data) == 6 and "correlation, shuffled median" in figure.layout.meta["alt"]
    assert all(sum(line.y) == pytest.approx(1) for line in figure.data)


# Two caches, and what cannot be matched -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The first 60 of the prompts, of two denoising steps."""
    recipe = made_up_recipe(60, hookpoints=SHAPES, num_inference_steps=2, steps=[0, 1])
    return ActivationCache(write_cache(tmp_path_factory.mktemp("cache"), recipe, made_up_updates(recipe, seed=2)))


def test_images_of_two_caches_are_paired_by_prompt_and_seed(cache, two_steps, sae) -> None:
    found, images = match(sae, sae, cache, two_steps), two_steps.images("held_out")
    assert found.n_images == len(images) < len(cache.images("held_out"))
    codes = [sae.encode(c.read("mid.0", images)[:, 0].float()).flatten(0, 1).numpy() for c in (cache, two_steps)]
    for latent, (partner, correlation) in found.bases["codes"].partners.items():
        assert correlation == pytest.approx(np.corrcoef(codes[0][:, latent], codes[1][:, partner])[0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (lambda c: (an_sae(), "mid.0"), KitError, "one SAE, .* not 'mid.0'"),
        (lambda c: (an_sae(), an_sae(), "cache"), KitError, "a cache, .* not 'cache'"),
        (lambda c: (an_sae(), an_sae(), None, c), KitError, "without cache="),
        (lambda c: (an_sae(), an_sae("down.2.1")), KitError, "24 numbers and down.2.1 of 12"),
        (lambda c: (an_sae(), an_sae(alive=False)), KitError, "no alive latent"),
        (lambda c: (an_sae(), an_sae("down.2.1"), c), KitError, r"4×4, 16 kept.*2×2, 4 kept"),
    ],
)
def test_what_cannot_be_matched_is_refused(cache, unchecked_types, given, error, told) -> None:
    with pytest.raises(error, match=told):
        match(*given(cache))


def test_other_settings_are_refused(cache, sae, tmp_path, unchecked_types) -> None:
    with pytest.raises(KitError, match="n_images"):
        match(sae, sae, cache, n_images=1)
    with pytest.raises(KitError, match="step"):
        match(sae, sae, cache, step=1)
    with pytest.raises(KitError, match="'both' is no side"):
        match(sae, sae).unmatched("both")
    with pytest.raises(KitError, match="decoder only"):
        match(sae, sae).agreement()
    recipe = made_up_recipe(4, hookpoints={"mid.0": SHAPES["mid.0"]})
    few = ActivationCache(write_cache(tmp_path, recipe, made_up_updates(recipe)))
    with pytest.raises(HookpointError, match=r"up\.0\.1"):
        match(sae, an_sae("up.0.1"), few)
    with pytest.raises(KitError, match="of the same prompt and seed in common"):
        match(sae, sae, few)

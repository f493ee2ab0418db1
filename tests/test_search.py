"""Search: each score against its formula, chance against what chance does, planted features found."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from synthetic import synthetic_stats

from sdxl_sae_kit import search
from sdxl_sae_kit.errors import ArtifactError, KitError, PromptError
from sdxl_sae_kit.findings import Found, Results
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.search import (
    by_contrast,
    by_image,
    by_label,
    by_region,
    by_similarity,
    by_text,
    most_energetic,
)

RED, BLUE = ("a large red circle on a black background", "a large blue circle on a black background")


# By contrast ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrast(pipe, small_saes):
    return by_contrast(pipe, small_saes, RED, BLUE, n=6, seed=40)


def test_a_contrast_is_the_mean_difference_of_paired_images(pipe, small_saes, contrast):
    assert {f.hookpoint for f in contrast} == {"down.2.1", "up.0.1"} and {f.n for f in contrast} == {6}
    for (hookpoint, _), sae in small_saes.items():
        means = {}
        for prompt, seed in itertools.product((RED, BLUE), range(40, 46)):
            with record(pipe, [hookpoint]) as recording:
                generate(pipe, [prompt], [seed])
            means[prompt, seed] = sae.encode(recording.update(hookpoint)[0].flatten(0, 1)).mean(dim=0).numpy()
        expected = np.mean([means[RED, s] - means[BLUE, s] for s in range(40, 46)], axis=0)
        found = {f.latent: f.score for f in contrast if f.hookpoint == hookpoint}
        assert len(found) > 20 and set(np.flatnonzero(expected)) == set(found)
        assert [found[latent] for latent in found] == pytest.approx([expected[latent] for latent in found], abs=2e-3)


def test_a_contrast_is_ranked_by_score_over_chance(contrast):
    ratios = [f.score / f.chance for f in contrast]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > 0 > ratios[-1]
    assert len({(f.hookpoint, f.chance) for f in contrast}) == 2  # one for each hookpoint
    assert all(f.low <= f.score <= f.high for f in contrast)
    assert contrast[0].beyond_chance and contrast[-1].beyond_chance  # red and blue do differ


def test_prompts_swapped_the_scores_change_their_sign(pipe, small_saes, contrast):
    sae = small_saes["up.0.1", "k8"]
    forth = {f.latent: f.score for f in contrast if f.hookpoint == "up.0.1"}
    back = {f.latent: f.score for f in by_contrast(pipe, sae, BLUE, RED, n=6, seed=40)}
    assert forth.keys() == back.keys()
    assert [back[latent] for latent in forth] == pytest.approx([-score for score in forth.values()], abs=1e-6)


def test_lists_are_paired_one_by_one_each_pair_with_seeds_of_its_own(pipe, small_saes, monkeypatch):
    drawn = []

    def watched(pipe, texts, seeds, **settings):
        drawn.extend(zip(texts, seeds, strict=True))
        return generate(pipe, texts, seeds, **settings)

    monkeypatch.setattr(search, "generate", watched)
    coloured = [f"a {colour} star" for colour in ("red", "green", "blue", "white", "black", "yellow")]
    found = by_contrast(pipe, small_saes["up.0.1", "k8"], coloured, "a star", n=2, seed=7)
    assert drawn[:12] == [(text, 7 + 2 * at + i) for at, text in enumerate(coloured) for i in (0, 1)]
    assert drawn[12:] == [("a star", seed) for seed in range(7, 19)]
    assert found[0].n == 6 and found.unit == "prompt pairs"


def test_what_prompts_have_of_their_own_is_no_difference_of_their_lists(pipe, small_saes, monkeypatch):
    """Null: each prompt differs from the others, neither list from the other; images of one prompt are alike."""
    rng, alarms = np.random.default_rng(0), 0

    def made_up(pipe, saes, texts, seeds, bar):
        own = {text: rng.normal(size=30) for text in dict.fromkeys(texts)}
        return {"up.0.1": np.stack([own[t] + 0.3 * rng.normal(size=30) for t in texts]).astype(np.float32)}

    monkeypatch.setattr(search, "_mean_codes", made_up)
    lists = ([f"{side} {i}" for i in range(10)] for side in ("more", "less"))
    more, less = lists
    for _ in range(100):
        found = by_contrast(pipe, small_saes["up.0.1", "k8"], more, less, n=4)
        assert {f.n for f in found} == {10}
        alarms += any(f.beyond_chance for f in found)
    assert alarms / 100 <= 0.12  # 0.05 is promised; 0.12 is 3.2 standard errors above


def test_few_prompt_pairs_are_refused_however_many_images(pipe, small_saes):
    with pytest.raises(KitError, match="5 prompt pairs cannot differ from chance at 95 %; 6 can. Give more"):
        by_contrast(pipe, small_saes["up.0.1", "k8"], [f"a star {i}" for i in range(5)], "a star", n=50)
    with pytest.raises(PromptError, match="a pair of prompts comes twice"):
        by_contrast(pipe, small_saes["up.0.1", "k8"], [RED] * 6, BLUE)


def test_one_pair_of_prompts_speaks_for_itself_only(contrast):
    assert contrast.unit == "image pairs" and "for these two prompts only" in contrast._repr_html_()


def test_equal_prompts_find_nothing(pipe, small_saes):
    assert len(by_contrast(pipe, small_saes, RED, RED, n=6)) == 0


def test_chance_is_the_quantile_over_all_flips_of_signs(unchecked_types):
    differences = np.random.default_rng(0).normal(0.3, 1, (8, 30)).astype(np.float32)
    flips = np.array(list(itertools.product([-1, 1], repeat=8)))
    largest = np.abs(flips @ differences / 8).max(axis=1)
    (chance,) = {f.chance for f in search._contrasted("mid.0", differences)}
    assert np.quantile(largest, 0.93) <= chance <= np.quantile(largest, 0.97)


def test_of_noise_alone_hardly_ever_anything_exceeds_chance(unchecked_types):
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(150):
        noise = rng.normal(size=(12, 40)).astype(np.float32) * rng.gamma(2, size=40).astype(np.float32)
        alarms += any(f.beyond_chance for f in search._contrasted("mid.0", noise))
    assert alarms / 150 <= 0.11  # 0.05 is promised; 0.11 is 3.4 standard errors above


def test_a_planted_difference_exceeds_chance_and_its_interval_covers_it(unchecked_types):
    rng, covered = np.random.default_rng(2), 0
    for _ in range(100):
        differences = rng.normal(size=(16, 40)).astype(np.float32)
        differences[:, 17] += 3
        planted = next(f for f in search._contrasted("mid.0", differences) if f.latent == 17)
        assert planted.beyond_chance
        covered += planted.low <= 3 <= planted.high
    assert 0.82 <= covered / 100 <= 1


def test_latents_that_differ_nowhere_are_left_out(unchecked_types):
    differences = np.zeros((6, 4), np.float32)
    differences[2, 1] = 1
    assert [f.latent for f in search._contrasted("mid.0", differences)] == [1]


def test_contrasts_that_make_no_sense_are_refused(pipe, small_saes, unchecked_types):
    sae = small_saes["up.0.1", "k8"]
    with pytest.raises(PromptError, match="it got 2 and 3"):
        by_contrast(pipe, sae, ["a", "b"], ["a", "b", "c"])
    with pytest.raises(PromptError, match="it got 0 and 1"):
        by_contrast(pipe, sae, [], "a")
    with pytest.raises(KitError, match="5 image pairs cannot differ from chance"):
        by_contrast(pipe, sae, RED, BLUE, n=5)
    with pytest.raises(KitError, match="2 of these 2 saes are of up.0.1"):
        by_contrast(pipe, [sae, sae], RED, BLUE)
    with pytest.raises(KitError, match="there are no saes"):
        by_contrast(pipe, {}, RED, BLUE)
    site, sae.site = sae.site, replace(sae.site, model="stabilityai/sdxl-turbo")
    try:
        with pytest.raises(ArtifactError, match="was trained on stabilityai/sdxl-turbo"):
            by_contrast(pipe, sae, RED, BLUE)
        sae.site = replace(site, num_inference_steps=4)
        with pytest.raises(KitError, match="different steps or guidance"):
            by_contrast(pipe, small_saes, RED, BLUE)
    finally:
        sae.site = site


def test_with_guidance_and_steps_the_cond_half_of_all_steps_counts(pipe, small_saes):
    sae = small_saes["up.0.1", "k8"]
    site, sae.site = sae.site, replace(sae.site, num_inference_steps=2, guidance_scale=3.0)
    try:
        found = {f.latent: f.score for f in by_contrast(pipe, sae, RED, BLUE, n=6)}
        means = []
        for prompt in (RED, BLUE):
            with record(pipe, ["up.0.1"]) as recording:
                generate(pipe, [prompt] * 6, range(6), num_inference_steps=2, guidance_scale=3.0)
            z = [sae.encode(recording.update("up.0.1", step, "cond").flatten(1, 2)) for step in (0, 1)]
            means.append(torch.stack(z).mean(dim=(0, 1, 2)).numpy())
    finally:
        sae.site = site
    expected = means[0] - means[1]
    assert list(found.values()) == pytest.approx([expected[latent] for latent in found], abs=2e-3)


# By region and image --------------------------------------------------------------------------------------------------


def test_a_region_is_measured_token_by_token(small_stats):
    height, width = small_stats.grid
    mask = np.zeros((height, width), dtype=bool)
    mask[1:4, 2:3] = True
    maps, found = small_stats.heat_maps(7), by_region(small_stats, 7, mask)
    firing = {int(latent) for latent in np.flatnonzero((maps[:, mask] > 0).any(axis=1))}
    assert {f.latent for f in found} == firing and len(firing) > 3
    for f in found:
        inside, outside = maps[f.latent][mask].mean(), maps[f.latent][~mask].mean()
        assert (f.score, f.n) == (pytest.approx(inside), 3)
        assert f.beside == {
            "mean outside": pytest.approx(outside),
            "contrast": pytest.approx(inside - outside, abs=1e-5),
        }
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)


def test_a_mask_of_the_pictures_size_or_in_part_counts_by_share(small_stats):
    height, width = small_stats.grid
    coarse = np.zeros((height, width))
    coarse[2:4, 1:3] = 1
    fine = coarse.repeat(8, axis=0).repeat(8, axis=1) * 255
    assert by_region(small_stats, 3, fine) == by_region(small_stats, 3, coarse)
    half = np.zeros((2 * height, 2 * width))
    half[0, 0:4] = 1  # the upper halves of the first two tokens
    half[1, 0] = 1  # and the lower left quarter of the first
    first = by_region(small_stats, 3, half)[0]
    row = small_stats.heat_maps(3)[first.latent][0]
    assert first.score == pytest.approx((0.75 * row[0] + 0.5 * row[1]) / 1.25, rel=1e-5) and first.n == 2


def test_a_mask_over_everything_has_no_outside(small_stats):
    found = by_region(small_stats, 0, np.ones(small_stats.grid))
    assert np.isnan(found[0].beside["contrast"]) and "–" in found._repr_html_()


@pytest.mark.parametrize("mask", [np.zeros((4, 4)), np.ones(4), np.full((4, 4), np.nan), [["a"]], -np.eye(4)])
def test_a_mask_that_marks_nothing_is_refused(small_stats, mask):
    with pytest.raises(KitError, match="mask must be a map of finite numbers"):
        by_region(small_stats, 0, mask)


@pytest.mark.parametrize("by", ["max", "mean", "area"])
def test_an_image_has_the_features_that_its_activations_say(small_stats, by):
    found = by_image(small_stats, 11, by)
    activations = small_stats.image_activations(by)[11]
    assert [f.score for f in found] == pytest.approx(np.sort(activations[activations > 0])[::-1], rel=2e-3)
    assert len(found) > 5 and set(found[0].beside) == {"max", "mean", "area"} - {by}
    assert small_stats.prompts.texts[11] in found.formula


def test_an_unknown_ranking_or_image_is_refused(small_stats, unchecked_types):
    with pytest.raises(KitError, match="by is one of 'max', 'mean', 'area'"):
        by_image(small_stats, 0, "median")
    with pytest.raises(KitError, match="there is no 9999"):
        by_image(small_stats, 9999)


# By label, likeness and text ------------------------------------------------------------------------------------------


def labelled(**labels):
    """Just what by_label asks of a LabelStore."""
    said = {int(f.removeprefix("f")): told if isinstance(told, tuple) else (told, ()) for f, told in labels.items()}
    return Mock(
        spec=LabelStore,
        all=lambda: {f: text for f, (text, _) in said.items()},
        latest=lambda f: SimpleNamespace(text=said[f][0], tags=said[f][1]),
    )


def test_labels_are_found_by_all_words_in_any_order_and_case(unchecked_types):
    labels = labelled(f1="Red circle", f2="red", f3="a circle that is not blue", f4=("round", ("Red", "circles")))
    assert [f.latent for f in by_label(labels, "circle RED")] == [1, 4]
    assert [f.latent for f in by_label(labels, "red")] == [2, 1, 4]  # by how much of the label it is
    assert [f.score for f in by_label(labels, "red")] == [1, 1 / 2, 1 / 3]
    assert [f.latent for f in by_label(labels, "circ")] == [1, 4, 3]  # a word may be begun
    assert [f.latent for f in by_label(labels, "ircle")] == []
    assert by_label(labels, "round")[0].beside == {"label": "round", "tags": "Red, circles"}
    with pytest.raises(KitError, match="looks for words"):
        by_label(labels, "  ")


def test_labels_are_found_as_they_stand_in_their_store(tmp_path):
    labels = LabelStore.of(synthetic_stats(tmp_path))
    labels.set(3, "blue circle")
    labels.set(3, "red circle", tags=["Warm"])
    labels.set(5, "red")
    labels.withdraw(5)
    assert [f.latent for f in by_label(labels, "red")] == [3] == [f.latent for f in by_label(labels, "warm")]
    assert not by_label(labels, "blue")


def test_neighbours_are_the_statistics_in_one_table():
    stats = synthetic_stats()
    found = by_similarity(stats, 7)
    cosines = {each.latent: each.value for each in stats.similar(7)}
    together = {each.latent: each.value for each in stats.coactive(7)}
    assert {f.latent for f in found} == cosines.keys() | together.keys()
    on = stats.codes.swapaxes(0, 1).reshape(stats.d_sae, -1) > 1e-3
    for f in found:
        assert np.array_equal(f.score, cosines.get(f.latent, np.nan), equal_nan=True)
        if f.latent in together:
            assert f.beside["co-activation"] == pytest.approx(
                (on[7] & on[f.latent]).sum() / (on[7] | on[f.latent]).sum()
            )
        p, q = on[7].mean(), on[f.latent].mean()
        assert f.beside["if independent"] == pytest.approx(p * q / (1 - (1 - p) * (1 - q)), rel=1e-4)
        assert (f.n is not None) == (f.latent in together)  # a cosine is not taken over tokens
    assert [f.score for f in found[: len(cosines)]] == sorted(cosines.values(), reverse=True)
    only = next(f for f in found if f.latent not in together)
    assert found.rows()[list(found).index(only)]["tokens of co-activation"] == "–"


def test_text_is_compared_with_each_top_image(tmp_path, monkeypatch, unchecked_types):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    top = {feature: rng.choice(40, size=17 - feature, replace=False) for feature in range(11)}  # the last has too few
    monkeypatch.setattr(search, "embed_pictures", lambda *_: rows)
    monkeypatch.setattr(search, "top_pictures", lambda *_: top)
    text = rows[top[4]].mean(axis=0)
    judge = SimpleNamespace(name="a judge", texts=lambda texts: text[None] if texts == ["round things"] else None)
    found = by_text(synthetic_stats(), "round things", judge)
    scores = np.array([np.mean(rows[images] @ text) for feature, images in top.items() if feature < 10])
    assert [f.latent for f in found] == np.argsort(-scores).tolist()
    for f in found:
        assert f.score == pytest.approx(scores[f.latent], abs=1e-6) and f.n == 17 - f.latent
        assert f.low < f.score < f.high
        assert f.beside["z"] == pytest.approx((scores[f.latent] - scores.mean()) / scores.std(), abs=1e-4)
    assert "a judge" in found.formula and "round things" in found._repr_html_()


def test_a_judge_without_texts_is_refused(unchecked_types):
    with pytest.raises(KitError, match="a judge that knows texts"):
        by_text(synthetic_stats(), "round", lambda images: images)


# Results --------------------------------------------------------------------------------------------------------------


def test_results_show_both_ends_escaped_with_formula_and_chance():
    found = [Found("mid.0", i, 20.0 - i, 9, 19.0 - i, 21.0 - i, 5.0) for i in range(61)]
    page = Results(tuple(found), "difference", "pairs", "a − b & c")._repr_html_()
    assert "32 of 61 features found, ranked by difference: a − b &amp; c" in page
    for latent, there in ((0, True), (15, True), (16, False), (44, False), (45, True), (60, True)):
        assert (f"><bdi>{latent}</bdi><" in page) == there, latent
    assert page.count("<bdi>yes</bdi>") == 15 + 16 and "[19.0, 21.0]" in page.replace("<br>", " ")
    label = Results((Found("", 3, 1.0, 1, beside={"label": "<b>"}),), "share", "words", "f")
    assert "<b>" not in label._repr_html_() and "&lt;b&gt;" in label._repr_html_()
    assert "hookpoint" not in label.rows()[0]


def test_results_are_a_sequence():
    found = tuple(Found("mid.0", i, 3.0 - i, 1) for i in range(3))
    results = Results(found, "score", "images", "formula")
    assert list(results) == list(found) and results[0] is found[0] and len(results[1:]) == 2
    assert repr(results) == "Results: 3 features by score; 0 (3.00), 1 (2.00), 2 (1.00)"
    assert "0 of 0 features" in Results((), "score", "images", "formula")._repr_html_()


# By energy ------------------------------------------------------------------------------------------------------------


def test_energetic_latents_are_local_and_sorted(small_stats):
    chosen = most_energetic(small_stats, 5)
    energy = small_stats.density * (small_stats.mean**2 + small_stats.std**2)
    assert (small_stats.density[chosen] <= 0.5).all()
    assert energy[chosen].tolist() == sorted(energy[chosen], reverse=True)


@pytest.mark.parametrize("ask", [by_region, by_image, by_similarity, by_text, most_energetic])
def test_what_are_no_statistics_is_refused(ask, small_stats, unchecked_types):
    given = {by_region: (0, [[1]]), by_image: (0,), by_similarity: (0,), by_text: ("red", None), most_energetic: ()}
    with pytest.raises(KitError, match=rf"{ask.__name__} takes FeatureStats, .* not a dict"):
        ask({"up.0.1": small_stats}, *given[ask])

"""ablation: it measures what turning a feature off does, its controls are of the same size, a kill loses nothing."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reading_html import read_safely

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hooks import rewrite
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import describe, load_pipeline
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.search import most_energetic
from sdxl_sae_kit.studies import ablation
from sdxl_sae_kit.studies.ablation import Ablation, FeatureEffects, ablate
from sdxl_sae_kit.studies.controls import CONDITIONS, CONTROLS, edits
from sdxl_sae_kit.training import train

HOOKPOINT = "up.0.0"


@pytest.fixture(scope="module")
def micro(store):
    """The tiny model, and an SAE trained for a few steps on 48 images, with its statistics."""
    pipe = load_pipeline("tiny-turbo", device="cpu")
    cache = collect(pipe, load_prompts("world", 48), [HOOKPOINT], store=store)
    config = SAEConfig(k=4, expansion=1, lr=1e-3)
    sae = train(cache, config, batch_size=256, device="cpu", store=store)[HOOKPOINT, "k4"]
    return SimpleNamespace(pipe=pipe, cache=cache, sae=sae, stats=FeatureStats.measure(sae, cache, store=store))


@pytest.fixture(scope="module")
def chosen(micro) -> list[int]:
    """Two features that fire on enough held-out images and yet not on all."""
    firing = (micro.stats.image_activations("max") > FIRES) & micro.stats.prompts.held_out[:, None]
    counts = firing.sum(axis=0)
    return np.flatnonzero((counts >= 4) & (counts < micro.stats.prompts.held_out.sum()))[:2].tolist()


@pytest.fixture(scope="module")
def result(micro, chosen, store) -> Ablation:
    return ablate(micro.pipe, micro.sae, micro.stats, chosen, prompts_per_feature=4, store=store)


def drawn(micro, feature: int, images: list[int]) -> dict[str, np.ndarray]:
    conditions, _ = edits(micro.sae, micro.stats, feature, 0)
    return ablation.draw_conditions(micro.pipe, micro.sae, micro.stats, images, conditions)


def test_the_clean_condition_is_the_image_that_was_collected(micro, chosen) -> None:
    images = [3, 17, 40]
    clean = drawn(micro, chosen[0], images)["clean"]
    collected = [Image.open(io.BytesIO(micro.cache.thumbnail(i))).convert("RGB") for i in range(48)]
    pixels = np.stack([np.asarray(image) for image in collected]) / 255
    for image, picture in zip(images, clean, strict=True):
        distances = np.abs(pixels - picture).mean(axis=(1, 2, 3))
        assert distances.argmin() == image
        assert distances[image] < 0.02  # what WebP loses


def test_two_controls_change_the_same_tokens_by_the_same_amount_and_the_third_is_another_feature(micro, chosen) -> None:
    feature = chosen[0]
    conditions, other = edits(micro.sae, micro.stats, feature, 0)
    changes = {}
    for condition, edit in conditions.items():
        seen = []
        spy = {HOOKPOINT: lambda update, call, seen=seen: seen.append(update.clone())}
        generator = [torch.Generator().manual_seed(s) for s in micro.stats.prompts.seeds[:6]]
        settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", "generator": generator}
        with rewrite(micro.pipe, spy), steer(micro.pipe, micro.sae, **edit), rewrite(micro.pipe, spy):
            micro.pipe(list(micro.stats.prompts.texts[:6]), height=64, width=64, **settings)
        before, after = seen
        changes[condition] = after - before
        codes = micro.sae.encode(before)[..., other if condition == "other feature" else feature]
        torch.testing.assert_close(changes[condition].norm(dim=-1), codes, rtol=1e-3, atol=1e-4)
    assert changes["ablated"].norm(dim=-1).max() > 0.01
    for one, another in itertools.combinations(changes.values(), 2):
        assert not torch.allclose(one, another, atol=1e-3)
    gaps = np.abs(micro.stats.density[micro.stats.alive] - micro.stats.density[feature])
    assert other != feature
    assert abs(micro.stats.density[other] - micro.stats.density[feature]) <= np.sort(gaps)[1]


def test_an_image_on_which_the_feature_does_not_fire_stays_bit_identical(micro, chosen) -> None:
    feature = chosen[0]
    peaks = micro.stats.image_activations("max")[:, feature]
    silent, firing = int(peaks.argmin()), int(peaks.argmax())
    assert peaks[silent] == 0
    pictures = drawn(micro, feature, [silent, firing])
    for condition in set(CONDITIONS) - {"other feature"}:
        np.testing.assert_array_equal(pictures[condition][0], pictures["clean"][0])
        assert (pictures[condition][1] != pictures["clean"][1]).any()


def test_effects_are_means_over_the_pixels_of_firing_and_other_tokens(micro, result) -> None:
    for effects in result.measured:
        pictures = drawn(micro, effects.feature, list(effects.images))
        for condition in CONDITIONS:
            changes = np.abs(pictures[condition] - pictures["clean"]).mean(axis=3)
            for i, (image, change) in enumerate(zip(effects.images, changes, strict=True)):
                fires = np.kron(micro.stats.heat_map(effects.feature, image), np.ones((8, 8))) > FIRES
                assert effects.inside[condition][i] == pytest.approx(change[fires].mean(), rel=1e-4)
                outside = effects.outside[condition][i]
                assert outside is None if fires.all() else outside == pytest.approx(change[~fires].mean(), rel=1e-4)


def test_images_are_held_out_firing_and_strongest_first(micro, result) -> None:
    for effects in result.measured:
        images = list(effects.images)
        means = np.array([micro.stats.heat_map(effects.feature, i).mean() for i in range(48)])
        held_out = np.flatnonzero(micro.stats.prompts.held_out)
        assert images == sorted(held_out, key=lambda i: -means[i])[: len(images)]
        regions = [(micro.stats.heat_map(effects.feature, i) > FIRES).mean() for i in images]
        np.testing.assert_allclose(effects.area, regions)
        assert min(effects.area) > 0


def test_it_goes_on_after_a_stop_and_ends_the_same(micro, chosen, result, tmp_path, monkeypatch) -> None:
    draw, calls = ablation.draw_conditions, []

    def stop_at_the_second(*args):
        calls.append(next(iter(args[4]["ablated"]["scale"])))
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return draw(*args)

    monkeypatch.setattr(ablation, "draw_conditions", stop_at_the_second)
    arguments = (micro.pipe, micro.sae, micro.stats, chosen)
    with pytest.raises(RuntimeError, match="power cut"):
        ablate(*arguments, prompts_per_feature=4, store=tmp_path)
    again = ablate(*arguments, prompts_per_feature=4, store=tmp_path)
    assert calls == [chosen[0], chosen[1], chosen[1]]
    assert again.artifact.digest == result.artifact.digest  # covers every byte of every file
    again.artifact.verify()
    ablate(*arguments, prompts_per_feature=4, store=tmp_path)
    assert len(calls) == 3


def test_default_features_are_the_local_ones_with_the_most_energy(micro) -> None:
    features = most_energetic(micro.stats)
    held_out = micro.stats.prompts.held_out
    counts = (micro.stats.image_activations("max")[held_out] > FIRES).sum(axis=0)
    codes = np.stack([[micro.stats.heat_map(f, i) for i in range(48)] for f in range(micro.stats.d_sae)])
    energy = np.square(codes, dtype=np.float64).sum(axis=(1, 2, 3))
    eligible = [f for f in range(micro.stats.d_sae) if counts[f] >= 4 and (codes[f] > FIRES).mean() <= 0.5]
    assert set(features) == set(sorted(eligible, key=lambda f: -energy[f])[:12])
    assert energy[features].tolist() == pytest.approx(sorted(energy[features], reverse=True), rel=1e-3)


def test_a_feature_on_too_few_held_out_images_is_skipped_and_said_so(micro, chosen, store) -> None:
    held_out = micro.stats.prompts.held_out
    counts = (micro.stats.image_activations("max")[held_out] > FIRES).sum(axis=0)
    rare = int(next(f for f in micro.stats.alive if counts[f] < 4))
    skipped = ablate(micro.pipe, micro.sae, micro.stats, [rare], store=store)
    assert skipped.rows() == [] and not skipped.measured
    assert f"fires on {counts[rare]} held-out images" in skipped._repr_html_()
    assert skipped.plot().layout.meta["alt"]


@pytest.mark.parametrize("features, words", [([9999], "there is no 9999"), ([], "one latent or more"), ([-1], "no -1")])
def test_features_that_are_not_there_are_refused(micro, store, features, words) -> None:
    with pytest.raises(KitError, match=words):
        ablate(micro.pipe, micro.sae, micro.stats, features, store=store)


def test_a_dead_latent_is_refused(micro, store) -> None:
    dead = replace(micro.stats, density=np.zeros_like(micro.stats.density))
    with pytest.raises(KitError, match="latent 5 of .* is dead"):
        ablate(micro.pipe, micro.sae, dead, [5], store=store)


def test_statistics_of_another_sae_are_refused(micro, store) -> None:
    with pytest.raises(ArtifactError, match="the statistics are of another at mid.0"):
        ablate(micro.pipe, micro.sae, replace(micro.stats, sae="another", hookpoint="mid.0"), store=store)


def test_another_model_is_refused_by_both_names(micro, chosen, store) -> None:
    other = SimpleNamespace(
        unet=None, sdxl_sae_kit_model=replace(describe(micro.pipe), name="someone/else", revision="abc")
    )
    with pytest.raises(ArtifactError, match=r"tiny-turbo \(revision .*someone/else \(revision abc"):
        ablate(other, micro.sae, micro.stats, chosen, store=store)


def made_up(feature: int, ablated: list[float], control: list[float]) -> FeatureEffects:
    inside = {"ablated": ablated, **dict.fromkeys(CONTROLS, control)}
    outside = {c: [value / 4 if i else None for i, value in enumerate(values)] for c, values in inside.items()}
    texts = [f"prompt {i}" for i in range(len(ablated))]
    n = len(ablated)
    return FeatureEffects(feature, "", 0, 0.25, range(n), texts, range(n), [0.5] * n, 1.0, inside, outside)


def test_rows_and_overall_are_the_means_of_what_was_measured(result) -> None:
    one, other = made_up(1, [4, 4, 4, 4, 8], [1, 1, 1, 2, 2]), made_up(2, [2, 2, 2, 2], [1, 1, 1, 1])
    made = replace(result, features=(one, other))
    first, second = made.rows()
    assert (first["feature"], first["images"], first["ablated"], first["other feature"]) == (1, 5, 4.8, 1.4)
    assert first["ablated − untrained SAE"] == pytest.approx(3.4)
    # The first image has no outside, so what concerns the outside is over the others: 4 of one feature, 3 of the other.
    assert (first["with outside"], second["with outside"]) == (4, 0)
    assert first["ablated outside"] == pytest.approx((4 + 4 + 4 + 8) / 4 / 4)
    assert first["ablated locality"] == pytest.approx(4) and np.isnan(second["ablated locality"])
    assert second["ablated interval"] == (2, 2)
    whole = made.overall()
    assert (whole["features"], whole["images"], whole["clear"], whole["with outside"]) == (2, 9, 2, 1)
    assert whole["ablated"] == pytest.approx(3.4)  # each feature counts once
    assert whole["ablated locality"] == pytest.approx(first["ablated locality"])
    assert whole["ablated − random direction"] == pytest.approx(2.2)
    assert whole["ablated − random direction interval"] == pytest.approx((1, 3.4))


def test_the_sentence_follows_the_numbers(result) -> None:
    def sentence(ablated: float, control: float) -> str:
        return replace(result, features=tuple(made_up(f, [ablated] * 4, [control] * 4) for f in (1, 2))).sentence()

    assert "larger than every control" in sentence(2, 1)
    assert f"not clearly larger than {' or '.join(CONTROLS)}" in sentence(1, 1)
    assert "not clearly larger" in sentence(1, 2)
    assert "2 features (8 held-out images). The other feature fires on 25% of the region" in sentence(1, 2)


def test_without_any_change_outside_there_is_no_locality_to_speak_of(result) -> None:
    still = replace(made_up(1, [1] * 4, [1] * 4), outside={c: [0.0] * 4 for c in CONDITIONS})
    nowhere = replace(made_up(1, [1] * 4, [1] * 4), outside={c: [None] * 4 for c in CONDITIONS})
    for effects in (still, nowhere):
        made = replace(result, features=(effects, replace(effects, feature=2)))
        assert np.isnan(made.overall()["ablated locality"])
        assert "no outside to compare with" in made.sentence()
        assert "nan" not in made.sentence()


def test_prompts_are_shown_and_never_run(result) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    features = [replace(e, prompts=[nasty, *list(e.prompts)[1:]]) for e in result.features]
    page = read_safely(replace(result, features=tuple(features))._repr_html_())
    assert nasty in page.text
    assert any(nasty in alt for alt in page.values("alt"))
    assert page.tags.count("img") == len(features)


def test_the_figure_says_in_words_what_it_shows(result) -> None:
    figure = result.plot()
    overall = result.overall()
    assert [trace.name for trace in figure.data] == list(CONDITIONS)
    assert figure.data[0].y[-1] == overall["ablated"]
    assert f"ablated {overall['ablated']:.3g}" in figure.layout.meta["alt"]

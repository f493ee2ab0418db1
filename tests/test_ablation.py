"""ablation: it measures what turning a feature off does, its controls are of the same size, a kill loses nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reading_html import read_safely

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hooks import rewrite
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import FIRES, SAEConfig
from sdxl_sae_kit.studies import ablation
from sdxl_sae_kit.studies.ablation import CONDITIONS, CONTROLS, Ablation, FeatureEffects, ablate
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
    along, _ = ablation.directions(micro.sae, micro.stats, feature, 0)
    prompts = micro.stats.prompts
    texts, seeds = [prompts.texts[i] for i in images], [prompts.seeds[i] for i in images]
    return ablation.draw_conditions(micro.pipe, micro.sae, micro.stats.grid, texts, seeds, feature, along)


def test_the_clean_condition_is_the_image_that_was_collected(micro, chosen) -> None:
    images = [3, 17, 40]
    clean = drawn(micro, chosen[0], images)["clean"]
    collected = [Image.open(io.BytesIO(micro.cache.thumbnail(i))).convert("RGB") for i in range(48)]
    pixels = np.stack([np.asarray(image) for image in collected]) / 255
    for image, picture in zip(images, clean, strict=True):
        distances = np.abs(pixels - picture).mean(axis=(1, 2, 3))
        assert distances.argmin() == image
        assert distances[image] < 0.02  # what WebP loses


def test_every_condition_changes_the_same_tokens_by_the_same_amount(micro, chosen) -> None:
    feature = chosen[0]
    along, _ = ablation.directions(micro.sae, micro.stats, feature, 0)
    changed = {}
    for condition, direction in along.items():
        seen = []
        spy = {HOOKPOINT: lambda update, call, seen=seen: seen.append(update.clone())}
        generator = [torch.Generator().manual_seed(s) for s in micro.stats.prompts.seeds[:6]]
        settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", "generator": generator}
        edit = steer(micro.pipe, micro.sae, scale={feature: 0.0}, along={feature: direction})
        with rewrite(micro.pipe, spy), edit, rewrite(micro.pipe, spy):
            micro.pipe(list(micro.stats.prompts.texts[:6]), height=64, width=64, **settings)
        before, after = seen
        changed[condition] = (after - before).norm(dim=-1)
        codes = micro.sae.encode(before)[..., feature]
        torch.testing.assert_close(changed[condition], codes, rtol=1e-3, atol=1e-4)
    assert changed["ablated"].max() > 0.01
    assert len({tuple(direction) for direction in along.values()}) == len(CONDITIONS)


def test_an_image_on_which_the_feature_does_not_fire_stays_bit_identical(micro, chosen) -> None:
    feature = chosen[0]
    peaks = micro.stats.image_activations("max")[:, feature]
    silent, firing = int(peaks.argmin()), int(peaks.argmax())
    assert peaks[silent] == 0
    pictures = drawn(micro, feature, [silent, firing])
    for condition in CONDITIONS:
        np.testing.assert_array_equal(pictures[condition][0], pictures["clean"][0])
        assert (pictures[condition][1] != pictures["clean"][1]).any()


def test_inside_and_outside_add_up_to_the_change_of_the_whole_image(micro, result) -> None:
    for effects in result.measured:
        pictures = drawn(micro, effects.feature, list(effects.images))
        for condition in CONDITIONS:
            whole = np.abs(pictures[condition] - pictures["clean"]).mean(axis=(1, 2, 3))
            area, inside = np.array(effects.area), np.array(effects.inside[condition])
            outside = np.array([value or 0.0 for value in effects.outside[condition]])
            np.testing.assert_allclose(area * inside + (1 - area) * outside, whole, rtol=1e-4, atol=1e-9)


def test_images_are_held_out_firing_and_strongest_first(micro, result) -> None:
    for effects in result.measured:
        images = list(effects.images)
        means = np.array([micro.stats.heat_map(effects.feature, i).mean() for i in range(48)])
        held_out = np.flatnonzero(micro.stats.prompts.held_out)
        assert images == sorted(held_out, key=lambda i: -means[i])[: len(images)]
        regions = [(micro.stats.heat_map(effects.feature, i) > FIRES).mean() for i in images]
        np.testing.assert_allclose(effects.area, regions)
        assert min(effects.area) > 0


def test_upsampling_repeats_each_token() -> None:
    mask = np.random.default_rng(0).random((3, 5)) > 0.5
    np.testing.assert_array_equal(ablation.upsample(mask, (12, 40)), np.kron(mask, np.ones((4, 8))) > 0)


def test_it_goes_on_after_a_stop_and_ends_the_same(micro, chosen, result, tmp_path, monkeypatch) -> None:
    draw, calls = ablation.draw_conditions, []

    def stop_at_the_second(*args):
        calls.append(args[5])
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


def test_default_features_are_spread_over_how_often_they_fire(micro) -> None:
    features = ablation._spread_over_density(micro.stats)
    held_out = micro.stats.prompts.held_out
    counts = (micro.stats.image_activations("max")[held_out] > FIRES).sum(axis=0)
    densities = micro.stats.image_density[features]
    assert len(set(features)) == len(features) <= 12
    assert counts[features].min() >= 4
    assert (np.diff(densities) >= 0).all()
    eligible = micro.stats.image_density[counts >= 4]
    assert (densities[0], densities[-1]) == (eligible.min(), eligible.max())


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
    other = SimpleNamespace(sdxl_sae_kit_model=SimpleNamespace(name="someone/else", revision="abc"))
    with pytest.raises(ArtifactError, match=r"tiny-turbo \(revision .*someone/else \(revision abc"):
        ablate(other, micro.sae, micro.stats, chosen, store=store)


def made_up(feature: int, ablated: list[float], control: list[float]) -> FeatureEffects:
    inside = {"ablated": ablated, **dict.fromkeys(CONTROLS, control)}
    outside = {c: [value / 4 if i else None for i, value in enumerate(values)] for c, values in inside.items()}
    texts = [f"prompt {i}" for i in range(len(ablated))]
    return FeatureEffects(
        feature, "", 0, range(len(ablated)), texts, range(len(ablated)), [0.5] * 4, 1.0, inside, outside
    )


def test_rows_and_overall_are_the_means_of_what_was_measured(result) -> None:
    made = replace(result, features=(made_up(1, [4, 4, 4, 8], [1, 1, 2, 2]), made_up(2, [2, 2, 2, 2], [1, 1, 1, 1])))
    first, second = made.rows()
    assert (first["feature"], first["images"], first["ablated"], first["other feature"]) == (1, 4, 5.0, 1.5)
    assert first["ablated − untrained SAE"] == 3.5
    assert first["ablated outside"] == pytest.approx((4 + 4 + 8) / 4 / 3)
    assert first["ablated locality"] == pytest.approx(4)
    assert second["ablated interval"] == (2, 2)
    whole = made.overall()
    assert (whole["features"], whole["images"], whole["clear"]) == (2, 8, 2)
    assert whole["ablated"] == 3.5  # each feature counts once
    assert whole["ablated − random direction"] == pytest.approx(2.25)
    assert whole["ablated − random direction interval"] == pytest.approx((1, 3.5))


def test_the_sentence_follows_the_numbers(result) -> None:
    def sentence(ablated: float, control: float) -> str:
        return replace(result, features=tuple(made_up(f, [ablated] * 4, [control] * 4) for f in (1, 2))).sentence()

    assert "larger than every control" in sentence(2, 1)
    assert f"not clearly larger than: {', '.join(CONTROLS)}" in sentence(1, 1)
    assert "not clearly larger" in sentence(1, 2)
    assert "2 features (8 held-out images)" in sentence(1, 2)


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

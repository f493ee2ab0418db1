"""Splicing: pictures with x̂, 0 or the mean for the update are those that `rewrite` makes, and numbers are theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reading_html import read_safely

from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.hooks import Call, record, rewrite
from sdxl_sae_kit.judges import WorldJudge
from sdxl_sae_kit.metrics import explained_variance
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.studies import splicing
from sdxl_sae_kit.studies.splicing import ALL, REPLACEMENTS, Splicing, splice
from sdxl_sae_kit.tiny.judge import load_judge
from sdxl_sae_kit.tiny.world import FACTORS

PLACES = ("down.2.1", "up.0.1", ALL)
OPPOSITE, PARTS = {"right of": "left of", "below": "above"}, ("shape", "colour")


@pytest.fixture(scope="module")
def prompts(small_cache):
    return small_cache.prompts.take(small_cache.images("held_out")[:6].tolist())


@pytest.fixture(scope="module")
def chosen(small_saes):
    return [small_saes["up.0.1", "k8"], small_saes["down.2.1", "k8"]]


@pytest.fixture(scope="module")
def result(pipe, chosen, small_cache, store) -> Splicing:
    return splice(pipe, chosen, small_cache, n=6, batch_size=4, store=store)


def pictures(pipe, prompts, edits):
    with rewrite(pipe, edits):
        return np.concatenate(
            [
                np.asarray(generate(pipe, prompts.texts[part], prompts.seeds[part], output_type="np"))
                for part in (slice(0, 4), slice(4, 6))
            ]
        )


@pytest.fixture(scope="module")
def expected(pipe, chosen, small_cache, prompts):
    """Every condition's pictures, made without the study's code."""
    saes = {sae.hookpoint: sae for sae in chosen}
    means = {h: small_cache.read(h, small_cache.images("train")).double().mean((0, 1, 2)).float() for h in saes}
    makers = {
        "zero": lambda h: lambda x, call: x * 0,
        "mean": lambda h: lambda x, call: torch.zeros_like(x) + means[h],
        "untrained x̂": lambda h: lambda x, call: saes[h].untrained()(x),
        "x̂": lambda h: lambda x, call: saes[h](x),
    }
    clean = pictures(pipe, prompts, {})
    drawn = {
        (place, name): pictures(pipe, prompts, {h: make(h) for h in (saes if place == ALL else [place])})
        for place in PLACES
        for name, make in makers.items()
    }
    return clean, drawn


def test_every_distance_is_that_of_the_pictures_rewrite_makes(result, expected) -> None:
    clean, drawn = expected
    judge = WorldJudge()
    for row in result.rows():
        changed = drawn[row["hookpoint"], row["update becomes"]]
        assert row["pixel"] == pytest.approx(np.abs(changed - clean).mean(), rel=1e-3, abs=1e-6)
        assert row["semantic"] == pytest.approx(judge.semantic(clean, changed).mean(), rel=1e-2, abs=1e-5)
        assert row["perceptual"] == pytest.approx(judge.perceptual(clean, changed).mean(), rel=1e-2, abs=1e-5)
    assert [(row["hookpoint"], row["update becomes"]) for row in result.rows()] == list(drawn)


def test_explained_variance_is_that_of_the_updates_of_these_images(pipe, result, chosen, prompts) -> None:
    with record(pipe, ["down.2.1", "up.0.1"]) as recording:
        generate(pipe, prompts.texts, prompts.seeds)
    for row, sae in zip(result.variances(), chosen[::-1], strict=True):
        x = recording.update(sae.hookpoint).flatten(0, 2)
        assert row["hookpoint"] == sae.hookpoint
        assert row["alone"] == pytest.approx(explained_variance(x, sae(x)), abs=1e-4)
        assert row["untrained, alone"] == pytest.approx(explained_variance(x, sae.untrained()(x)), abs=1e-4)
        assert row["alone interval"][0] < row["alone"] < row["alone interval"][1]
    first, last = result.variances()
    assert first[ALL] == pytest.approx(first["alone"], abs=1e-6)  # nothing before it is spliced
    assert last[ALL] != last["alone"]


def test_adherence_is_the_share_of_visible_factors_that_the_judge_names(result, expected, prompts) -> None:
    clean, drawn = expected
    for pixels, found in ((clean, result.clean_adherence()), (drawn[ALL, "zero"], result.rows()[-4])):
        seen = load_judge().probabilities((pixels * 255).round().astype(np.uint8))
        shares = []
        for i, factors in enumerate(prompts.factors):
            # two objects are as small as a small one
            hidden = {"material"} if factors["style"] == "sketch" and factors.get("size", "small") == "small" else set()
            hidden |= {"pose"} if factors["shape"] == "circle" and factors["material"] == "plain" else set()
            told = {f: v for f, v in factors.items() if f not in hidden}
            if factors.get("relation") in OPPOSITE:  # the judge names the other object first
                told |= {"relation": OPPOSITE[factors["relation"]]}
                for part in PARTS:
                    told |= {part: factors[f"{part}2"], f"{part}2": factors[part]}
            shares.append(np.mean([seen[f][i].argmax() == FACTORS[f].index(v) for f, v in told.items()]))
        assert found["adherence"] == pytest.approx(np.mean(shares), abs=1e-6)
        assert 0 <= found["adherence interval"][0] <= found["adherence"] <= found["adherence interval"][1] <= 1


def test_the_share_repaired_is_1_minus_the_distance_over_that_of_zero(result) -> None:
    for place in PLACES:
        rows = {row["update becomes"]: row for row in result.rows() if row["hookpoint"] == place}
        for name in REPLACEMENTS:
            assert rows[name]["repaired"] == pytest.approx(1 - rows[name]["perceptual"] / rows["zero"]["perceptual"])
        assert rows["zero"]["repaired interval"] == (0, 0)
        assert rows["x̂"]["x̂ − mean"] == pytest.approx(rows["x̂"]["perceptual"] - rows["mean"]["perceptual"])


def test_sums_of_both_guidance_halves_go_to_their_image(small_saes) -> None:
    sae, x = small_saes["up.0.1", "k8"], torch.randn(6, 2, 2, 96)  # uncond and cond of three images
    edit = splicing._Reconstructing(sae, torch.ones(96), 3)
    with torch.no_grad():
        edit(x, Call("up.0.1", 0, 2, True))
        x_hat = edit(x, Call("up.0.1", 1, 2, True))
    sums = edit.sums()
    assert sums["tokens"] == 2 * 6 * 4
    error = [2 * (x - x_hat)[[i, i + 3]].square().sum().item() for i in range(3)]
    square = [2 * (x - 1)[[i, i + 3]].square().sum().item() for i in range(3)]
    assert sums["error"] == pytest.approx(error, rel=1e-5) and sums["square"] == pytest.approx(square, rel=1e-5)


def test_stopped_it_goes_on_at_the_batch_in_hand_and_ends_the_same(
    pipe, chosen, small_cache, result, tmp_path, monkeypatch
) -> None:
    measure, calls = splicing._measure, []

    def stop_at_the_second(*arguments):
        calls.append(len(arguments[4]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(splicing, "_measure", stop_at_the_second)
    arguments = {"n": 6, "batch_size": 4, "store": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        splice(pipe, chosen, small_cache, **arguments)
    again = splice(pipe, chosen, small_cache, **arguments)
    splice(pipe, chosen, small_cache, **arguments)
    assert calls == [4, 2, 2]
    assert again.artifact.digest == result.artifact.digest  # covers every byte of every file


def test_without_a_judge_distances_are_in_pixels_and_one_sae_needs_no_all(pipe, chosen, small_cache, tmp_path) -> None:
    two = load_prompts(["a red circle", "a blue star"])
    made = splice(pipe, chosen[0], small_cache, two, judge=None, store=tmp_path)
    assert made.measures == ("pixel",) and made.places == ("up.0.1",) and made.clean_adherence() == {}
    assert not {"adherence", "perceptual"} & set(made.rows()[0])
    assert "pixel distance" in made.sentence() and "judge" not in made.sentence()
    assert ALL not in made.variances()[0]
    assert made._repr_html_() and made.plot().layout.meta["alt"]


def test_the_sentence_follows_the_numbers(result) -> None:
    def told(x_hat: float, mean: float) -> str:
        values = {"zero": 1.0, "mean": mean, "untrained x̂": 0.9, "x̂": x_hat}
        changed = {
            place: {name: {"perceptual": [v] * 4, "adherence": [None] * 4, "updates": {}} for name, v in values.items()}
            for place in PLACES
        }
        texts = ["a", "b", "c", "c"]
        results = {"one": {"texts": texts, "clean": {"adherence": [None] * 4}, "changed": changed}}
        return replace(result, measures=("perceptual",), n_images=4, _results=results).sentence()

    assert "x̂ repairs 75.0% [75.0%, 75.0%] of the zero-ablation damage" in told(0.25, 0.5)
    assert "closer than the mean update's everywhere" in told(0.25, 0.5)
    assert f"not clearly closer than the mean update's at {', '.join(PLACES)}" in told(0.5, 0.5)
    assert "over 3 prompts (4 images)" in told(0.5, 0.5)


def test_that_one_mean_stands_for_all_steps_and_halves_is_said_where_there_are_several(result, monkeypatch) -> None:
    def told(steps: int, guidance: float) -> str:
        settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        monkeypatch.setattr(result.artifact, "_recipe", result.artifact.recipe | settings)
        return result.sentence()

    assert "The mean update is one vector for all 4 steps and both guidance halves, not one for each." in told(4, 5.0)
    assert "one vector for all 2 steps, not" in told(2, 0.0)
    assert "one vector for both guidance halves, not" in told(1, 5.0)
    assert "one vector" not in told(1, 0.0)


def test_prompts_are_shown_and_never_run(result) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    results = {name: r | {"texts": [nasty, *r["texts"][1:]]} for name, r in result._results.items()}
    page = read_safely(replace(result, _results=results)._repr_html_())
    assert nasty in page.text and any(nasty in alt for alt in page.values("alt"))


def test_the_figure_says_in_words_what_it_shows(result) -> None:
    figure = result.plot()
    assert [trace.name for trace in figure.data] == list(REPLACEMENTS)
    assert f"x̂ {result.rows()[-1]['perceptual']:.3g}" in figure.layout.meta["alt"]


def test_what_does_not_fit_is_refused(pipe, chosen, small_cache, result, store, unchecked_types, monkeypatch) -> None:
    with pytest.raises(KitError, match="splice: n must be an integer of at least 1, not 0"):
        splice(pipe, chosen, small_cache, n=0, store=store)
    with pytest.raises(KitError, match="splice: there are no SAEs"):
        splice(pipe, [], small_cache, store=store)
    sae, site = chosen[0], chosen[0].site
    monkeypatch.setattr(sae, "site", replace(site, model="stabilityai/sdxl-turbo"))
    with pytest.raises(ArtifactError, match="splice: .* was trained on stabilityai/sdxl-turbo"):
        splice(pipe, chosen, small_cache, store=store)
    monkeypatch.setattr(sae, "site", replace(site, hookpoint="mid.0"))
    with pytest.raises(HookpointError, match="has no updates of 'mid.0'"):
        splice(pipe, sae, small_cache, store=store)
    monkeypatch.setattr(sae, "site", site)
    with pytest.raises(ArtifactError, match="another model"), monkeypatch.context() as other:
        other.setitem(small_cache.recipe, "revision", "another model")
        splice(pipe, chosen, small_cache, store=store)
    with pytest.raises(ArtifactError, match="not of splicing"):
        Splicing.open(_other_study(store))


def _other_study(store):
    artifact = store.artifact("studies", "other", {"study": "other"})
    if not artifact.finished:
        with artifact.lock():
            artifact.seal()
    return artifact.folder

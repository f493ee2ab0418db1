"""Attribution: gradient × activation per token, against finite differences and against true ablation by `steer`."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from launching import Forked
from reading_html import read_safely

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.studies import attribution
from sdxl_sae_kit.studies.attribution import Attribution, attribute
from sdxl_sae_kit.targets import FactorScore, RegionColour

TARGET = RegionColour((1, -0.5, -0.5))
CHECKED = {"checked": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def chosen(small_saes):
    return [small_saes["down.2.1", "k8"], small_saes["up.0.1", "k8"]]


@pytest.fixture(scope="module")
def prompts(small_cache):
    return small_cache.prompts.take(small_cache.images("held_out")[:3].tolist())


@pytest.fixture(scope="module")
def result(pipe, chosen, prompts, store) -> Attribution:
    return attribute(pipe, chosen, prompts, TARGET, **CHECKED, store=store)


def values(pipe, prompts, target=TARGET, **settings):
    drawn = [
        generate(pipe, prompts.texts[part], prompts.seeds[part], output_type="pt", **settings)
        for part in (slice(0, 2), slice(2, 3))
    ]
    return np.concatenate([target(each).numpy() for each in drawn])


@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": 2, "guidance_scale": 2.0}], ids=["plain", "guided"])
def test_it_is_the_slope_of_the_value_as_a_latent_is_scaled(pipe, chosen, prompts, result, tmp_path, settings) -> None:
    """∂value/∂s at s = 1, where the activation is s · z at every token, step and half: by finite differences."""
    made = attribute(pipe, chosen, prompts, TARGET, **CHECKED, store=tmp_path, **settings) if settings else result
    sae = chosen[1]
    totals = made.totals(sae.hookpoint)
    for latent in np.argsort(-np.abs(totals).sum(axis=0))[:2].tolist():
        ends = []
        for scale in (0.95, 1.05):
            with steer(pipe, sae, scale={latent: scale}):
                ends.append(values(pipe, prompts, **settings))
        if not settings:  # an edit also moves later codes
            np.testing.assert_allclose((ends[1] - ends[0]) / 0.1, totals[:, latent], rtol=0.05, atol=5e-5)
        else:
            assert np.corrcoef((ends[1] - ends[0]) / 0.1, totals[:, latent])[0, 1] > 0.8
        assert np.abs(totals[:, latent]).max() > 1e-4


def test_heat_maps_add_up_to_the_totals_and_lie_where_the_latent_fires(pipe, chosen, prompts, result) -> None:
    with record(pipe, ["up.0.1"]) as recording:
        generate(pipe, prompts.texts, prompts.seeds)
    codes = chosen[1].encode(recording.update("up.0.1")).numpy()
    totals = result.totals("up.0.1")
    assert totals.shape == (3, chosen[1].d_sae)
    for latent in np.argsort(-np.abs(totals).sum(axis=0))[:3].tolist():
        for image in range(3):
            heat = result.heat_map("up.0.1", latent, image)
            assert heat.shape == (8, 8) and heat.sum() == pytest.approx(totals[image, latent], abs=1e-5)
            assert not heat[codes[image, ..., latent] == 0].any()


def test_checked_changes_are_those_of_turning_the_latent_off(pipe, chosen, prompts, result) -> None:
    clean, saes = values(pipe, prompts), {sae.hookpoint: sae for sae in chosen}
    np.testing.assert_allclose(result.values, clean, atol=1e-6)
    assert len(result._checks) == 2 * 3 * 2
    for check in list(result._checks.values())[::3]:
        sae = saes[check["hookpoint"]]
        with steer(pipe, sae if check["kind"] == "trained" else sae.untrained(), scale={check["latent"]: 0.0}):
            np.testing.assert_allclose(check["changes"], values(pipe, prompts) - clean, atol=1e-5)


def test_checked_are_the_highest_the_lowest_and_others_of_all_hookpoints(result) -> None:
    means = {(h, f): v for h in result.hookpoints for f, v in enumerate(result.totals(h).mean(axis=0))}
    active = {(h, f) for h in result.hookpoints for f in np.flatnonzero(result._found["trained"].activations(h).any(0))}
    order = sorted(active, key=lambda each: -means[each])
    groups = {g: [] for g in ("top", "bottom", "random")}
    for check in result._checks.values():
        if check["kind"] == "trained":
            groups[check["group"]].append((check["hookpoint"], check["latent"]))
    assert groups["top"] == order[:2] and sorted(groups["bottom"]) == sorted(order[-2:])
    assert len(groups["random"]) == 2 and set(groups["random"]) <= set(order[2:-2])
    rows = result.rows(3)
    assert [(row["hookpoint"], row["latent"]) for row in rows] == [*order[:3], *order[-3:]]
    assert "true change" in rows[0] and "true change" in rows[-1]


def test_attribution_predicts_what_ablation_does(pipe, chosen, prompts, tmp_path) -> None:
    made = attribute(pipe, chosen, prompts, TARGET, checked=6, batch_size=3, store=tmp_path)
    rows = {row["order"]: row for row in made.agreement()}
    assert rows["attribution"]["ρ"] > 0.8 and rows["attribution"]["latents"] == 18
    assert rows["attribution"]["ρ"] > rows["random order"]["ρ interval"][1]
    assert rows["attribution, random latents only"]["latents"] == 6
    predicted, true, *_ = made._checked("trained")
    large = np.abs(true.mean(0)) > np.median(np.abs(true.mean(0)))
    assert (np.sign(predicted.mean(0)) == np.sign(true.mean(0)))[large].mean() > 0.85


def test_a_prompt_a_pair_of_words_and_a_function_will_do(pipe, chosen, tmp_path, result) -> None:
    judged = attribute(pipe, chosen[1], "a large red circle", ("colour", "red"), **CHECKED, store=tmp_path)
    assert judged.target == FactorScore("colour", "red").name
    assert "–" in judged.agreement()[0]["order"] or np.isnan(judged.agreement()[0]["ρ interval"]).all()
    assert "nan" not in judged.sentence() and judged._repr_html_() and judged.plot()
    bright = attribute(
        pipe, chosen[1], "a large red circle", lambda p: p.mean((1, 2, 3)), name="brightness", **CHECKED, store=tmp_path
    )
    whole = attribute(pipe, chosen[1], "a large red circle", RegionColour((1, 1, 1)), **CHECKED, store=tmp_path)
    np.testing.assert_allclose(bright.totals("up.0.1") * 3**0.5, whole.totals("up.0.1"), rtol=1e-3, atol=1e-7)


def test_killed_it_goes_on_at_the_latent_in_hand_and_ends_the_same(
    pipe, chosen, prompts, result, tmp_path, monkeypatch
) -> None:
    turned_off, left = attribution._turned_off, []

    def dying(*arguments):
        if len(left) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        left.append(arguments)
        return turned_off(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(attribution, "_turned_off", dying)
        killed = Forked(lambda: attribute(pipe, chosen, prompts, TARGET, **CHECKED, store=tmp_path / "store"))
    assert killed.wait() == -signal.SIGKILL
    monkeypatch.setattr(attribution, "_turned_off", lambda *a: left.append(a[2]) or turned_off(*a))
    monkeypatch.setattr(attribution, "_differentiate", lambda *a: pytest.fail("gradients were there already"))
    again = attribute(pipe, chosen, prompts, TARGET, **CHECKED, store=tmp_path / "store")
    assert len(left) == 12 - 5
    assert again.artifact.digest == result.artifact.digest  # covers every byte of every file
    again.artifact.verify()


def test_the_sentence_follows_the_numbers(result) -> None:
    checks = {unit: dict(check) for unit, check in result._checks.items()}
    told = replace(result, _checks=checks)
    n = 0
    for hookpoint, latent in told._chosen("trained"):
        predicted = -told.totals(hookpoint)[:, latent]
        checks[f"trained {hookpoint} {latent}"]["changes"] = (2 * predicted).tolist()
        n += 1
    assert f"Spearman's ρ is 1.00 [1.00, 1.00] over {n} checked latents" in told.sentence()
    assert "Attribution predicts what turning a latent off does" in told.sentence()
    for hookpoint, latent in told._chosen("trained"):
        checks[f"trained {hookpoint} {latent}"]["changes"] = told.totals(hookpoint)[:, latent].tolist()
    contrary = replace(told, _checks=dict(checks))
    assert "does not clearly predict" in contrary.sentence() and "ρ is -1.00" in contrary.sentence()


def test_prompts_are_shown_and_never_run(result) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    page = read_safely(replace(result, prompts=(nasty, "b", "c"), target=nasty)._repr_html_())
    assert nasty in page.text and any(nasty in alt for alt in page.values("alt"))
    assert page.tags.count("img") == 8


def test_the_figure_says_in_words_what_it_shows(result) -> None:
    figure = result.plot()
    assert [trace.name for trace in figure.data] == ["equal", "top", "bottom", "random", "untrained SAE"]
    assert "2 of top, 2 of bottom, 2 of random, 6 of untrained SAE" in figure.layout.meta["alt"]
    top = [check for check in result._checks.values() if (check["kind"], check["group"]) == ("trained", "top")]
    assert list(figure.data[1].y) == pytest.approx([np.mean(check["changes"]) for check in top])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": lambda pictures: pictures.mean((1, 2, 3))}, "this target has no name"),
        ({"target": "red"}, "a target is .* not 'red'"),
        ({"target": ("colour", "rad")}, "no value of colour 'rad'"),
        ({"checked": 1}, "checked must be an integer of at least 2"),
        ({"checked": 500}, "latents fire on these images, fewer than the 1500"),
        ({"saes": []}, "there are no SAEs"),
    ],
    ids=["no name", "no target", "no value", "too few", "too many", "no SAE"],
)
def test_what_cannot_be_attributed_is_refused(pipe, chosen, prompts, tmp_path, settings, said, unchecked_types) -> None:
    given = {"saes": chosen, "prompts": prompts[:1], "target": TARGET} | settings
    with pytest.raises(KitError, match=said):
        attribute(pipe, **given, store=tmp_path)


def test_another_model_another_study_and_what_is_not_there_are_refused(
    pipe, chosen, result, prompts, small_stats, store, monkeypatch
) -> None:
    with pytest.raises(KitError, match=r"No attributions at 'up.0.2'; .*Did you mean 'up.0.1'\?"):
        result.totals("up.0.2")
    with pytest.raises(KitError, match="no image 3 here; there are 0 to 2"):
        result.heat_map("up.0.1", 0, 3)
    with pytest.raises(ArtifactError):
        Attribution.open(small_stats.artifact.folder)
    monkeypatch.setattr(chosen[0], "site", replace(chosen[0].site, model="stabilityai/sdxl-turbo"))
    with pytest.raises(ArtifactError, match="attribute: .* was trained on stabilityai/sdxl-turbo"):
        attribute(pipe, chosen, load_prompts(["a"]), TARGET, store=store)

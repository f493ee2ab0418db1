"""Screening: what an edit did is counted as defined, a break loses nothing, and what cannot be screened is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from breaking import Breaking

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.judges import EmbeddingJudge
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies import labelled, selectivity
from sdxl_sae_kit.studies.labelled import Labelled, log_odds
from sdxl_sae_kit.studies.selected import CONDITIONS, Outcome, Selectivity
from sdxl_sae_kit.studies.selectivity import compare, screen
from sdxl_sae_kit.tiny.world import FACTORS

RED = Labelled(0, 7, "colour", "red", 0.9)
FEW = {"n": 2, "per_value": 1, "trials": 4, "prompts": 4}


@pytest.fixture
def strict(monkeypatch):
    """Only what tells a value almost perfectly is tried, so that tests are quick."""
    monkeypatch.setattr(labelled, "LEAST_AREA", 0.95)
    monkeypatch.setattr(selectivity, "_POOL", 60)
    monkeypatch.setattr(selectivity, "_FEWEST", 3)


def told(colours, shapes):
    """Answers of a judge that knows two factors."""
    return {"colour": np.array(colours, np.float32), "shape": np.array(shapes, np.float32)}


def test_outcomes_are_counted_as_defined() -> None:
    red, rest = FACTORS["colour"].index("red"), len(FACTORS["colour"])
    before = np.full((2, rest + 1), 0.4 / rest, np.float32)
    before[:, red] = 0.6
    after = before.copy()
    after[0] = 0.9 / rest
    after[0, red] = 0.1
    shapes = np.eye(7, dtype=np.float32)[[1, 2]]
    outcome = compare(RED, told(before, shapes), told(after, shapes[::-1]), up=False)
    assert outcome.moved == pytest.approx([np.log(0.6 / 0.4) - np.log(0.1 / 0.9), 0.0], abs=1e-5)
    assert list(outcome.flipped) == [True, False]
    assert outcome.changed == {"shape": [True, True]}
    assert (outcome.share_moved, outcome.kept, outcome.passes) == (0.5, {"shape": 0.0}, False)
    assert compare(RED, told(before, shapes), told(after, shapes), up=True).moved[0] == -outcome.moved[0]


def test_log_odds_do_not_saturate_where_a_probability_rounds_to_1() -> None:
    logits = np.array([[30.0, 0.0, -1.0], [-40.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    exact = logits[:, 0] - np.log(np.exp(logits[:, 1:]).sum(axis=1))
    assert np.allclose(log_odds(p, 0), exact, rtol=1e-4)
    assert p[0, 0] == 1


def test_a_feature_passes_when_it_moves_its_own_factor_and_keeps_every_other() -> None:
    moved, still = [1.0] * 7 + [-1.0] * 3, [True] + [False] * 9
    assert Outcome(moved, [True] * 10, {"shape": still, "size": still}).passes
    assert not Outcome([1.0] * 6 + [0.0] * 4, [True] * 10, {"shape": still}).passes
    assert not Outcome(moved, [True] * 10, {"shape": still, "size": [True, *still[:-1]]}).passes


@pytest.mark.slow
def test_what_a_break_leaves_is_gone_on_with_and_gives_the_same(
    pipe, small_cache, small_saes, strict, tmp_path
) -> None:
    counted, counting = Breaking(10_000), Breaking(10_000)
    whole = screen(pipe, small_saes, small_cache, **FEW, judge=counted, store=tmp_path / "whole")
    assert whole.features and whole.rows()
    with pytest.raises(KitError, match="condition is feature, .*, not 'others'"):
        whole.passing("others")
    with pytest.raises(KeyboardInterrupt):
        screen(pipe, small_saes, small_cache, **FEW, judge=Breaking(14), store=tmp_path / "broken")
    again = screen(pipe, small_saes, small_cache, **FEW, judge=counting, store=tmp_path / "broken")
    assert counting.left > counted.left
    for one, other in zip(whole.features, again.features, strict=True):
        assert (one.labelled, one.verb, one.dose) == (other.labelled, other.verb, other.dose)
        for condition in CONDITIONS:
            assert np.allclose(one.outcomes[condition].moved, other.outcomes[condition].moved, atol=1e-3)
    assert Selectivity.open(again.artifact.folder).rows() == again.rows()
    for text in (whole.sentence(), whole._repr_html_(), whole.plot().layout.meta["alt"]):
        assert "random direction" in text


def test_held_out_prompts_confirm_and_training_prompts_do_not(
    pipe, small_cache, small_saes, strict, store, monkeypatch
):
    seen, take = [], type(small_cache.prompts).take

    def noted(prompts, images):
        seen.append(images)
        return take(prompts, images)

    monkeypatch.setattr(type(small_cache.prompts), "take", noted)
    screen(pipe, small_saes, small_cache, **FEW, seed=5, store=store)
    held_out = set(small_cache.images("held_out").tolist())
    confirming = seen[-2 * len(CONDITIONS) :]
    assert all(set(images) <= held_out for images in confirming)
    assert all(not set(images) & held_out for images in seen[2 : -2 * len(CONDITIONS)] if set(images) - held_out)


def test_what_cannot_be_screened_is_refused(pipe, small_cache, small_saes, store, unchecked_types, monkeypatch):
    sae = small_saes["up.0.1", "k8"]
    with pytest.raises(KitError, match="saes are one or more SAEs"):
        screen(pipe, [], small_cache, store=store)
    with pytest.raises(KitError, match="an SAE is there twice"):
        screen(pipe, [sae, sae], small_cache, store=store)
    with pytest.raises(KitError, match="names no factors. Pass a judge that does"):
        screen(pipe, sae, small_cache, judge=EmbeddingJudge(WorldEmbed()), store=store)
    with pytest.raises(KitError, match="trials must be an integer of at least"):
        screen(pipe, sae, small_cache, trials=1, store=store)
    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="holds updates of m .* Pass a cache of"):
        patch.setitem(small_cache.recipe, "model", "m")
        screen(pipe, sae, small_cache, store=store)
    other, sae.site = sae.site, replace(sae.site, model="stabilityai/sdxl-turbo")
    try:
        with pytest.raises(ArtifactError, match="was trained on stabilityai/sdxl-turbo"):
            screen(pipe, sae, small_cache, store=store)
    finally:
        sae.site = other

"""The judge is right about renders, also damaged ones, knows when it does not know, and is not led by word order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.tiny import WEIGHTS
from sdxl_sae_kit.tiny.judge import expected_answers, load_judge
from sdxl_sae_kit.tiny.judge_training import NOT_ASKED, ask, ask_many
from sdxl_sae_kit.tiny.world import FACTORS, factors, object_mask, render, sample_scene

SCENES = [sample_scene(rng) for rng in [np.random.RandomState(4321)] for _ in range(300)]
PICTURES = np.stack([render(scene) for scene in SCENES])
EXPECTED = [expected_answers(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def verdicts(judge):
    return judge.read(PICTURES)


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))


def noisy(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + np.random.default_rng(1).normal(0, 12, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("change", "least"), [(None, 0.96), (blurred, 0.93), (noisy, 0.93)])
def test_it_names_every_factor_of_a_render(judge, verdicts, change, least):
    n = len(PICTURES) if change is None else 120
    seen = verdicts if change is None else judge.read(np.stack([change(picture) for picture in PICTURES[:n]]))
    for factor in FACTORS:
        for absent in (False, True):
            asked = [i for i, known in enumerate(EXPECTED[:n]) if factor in known and (known[factor] is None) == absent]
            right = [seen.values[factor][i] == EXPECTED[i][factor] for i in asked]
            assert not asked or np.mean(right) >= least, (factor, absent)


def test_its_masks_are_the_objects(verdicts):
    true = np.stack([object_mask(scene) for scene in SCENES])
    overlap = (verdicts.mask & true).sum((1, 2)) / (verdicts.mask | true).sum((1, 2))
    assert overlap.mean() >= 0.9


@pytest.mark.parametrize(
    ("kind", "factor", "least"),
    [("blob", "shape", 0.95), ("mixture", "shape", 0.5), ("empty", "count", 0.95), ("noise", "count", 0.95)],
)
def test_it_abstains_where_there_is_nothing_to_know(judge, kind, factor, least):
    rng = np.random.RandomState(99)
    questions = [
        question for question in (ask(rng, kind) for _ in range(200)) if question.answers.get("shape2") is None
    ]
    named = judge.read(np.stack([question.picture for question in questions])).values[factor]
    assert np.mean([value is None for value in named]) >= least


def test_its_confidence_is_a_probability(verdicts):
    for factor, confidence in verdicts.confidence.items():
        assert confidence.shape == (len(SCENES),) and confidence.min() > 1 / 8 and confidence.max() <= 1
        asked = [i for i, known in enumerate(EXPECTED) if factor in known]
        right = np.mean([verdicts.likeliest[factor][i] == EXPECTED[i][factor] for i in asked])
        assert abs(confidence[asked].mean() - right) < 0.05, factor


def test_it_abstains_where_it_is_less_than_half_sure(verdicts):
    unsure = dataclasses.replace(verdicts, confidence={f: np.full(len(SCENES), 0.49) for f in FACTORS})
    assert all(value is None for named in unsure.values.values() for value in named)
    assert unsure.told()[0] == dict.fromkeys(FACTORS)


def test_what_it_says_of_a_picture_does_not_depend_on_the_others(judge, verdicts):
    for i in (0, 150, 299):
        alone = judge.read([Image.fromarray(PICTURES[i])])
        assert {factor: told[0] for factor, told in alone.values.items()} == {
            f: v[i] for f, v in verdicts.values.items()
        }
        assert np.mean(alone.mask[0] == verdicts.mask[i]) > 0.999


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(KitError, match="which have 64×64 pixels; it got 32×64, 64×64"):
        judge.read([Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64))])
    with pytest.raises(KitError, match="it got none at all"):
        judge.read([])


def test_a_folder_without_a_judge_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no finished judge in .*, with stage='judge'"):
        load_judge(tmp_path)


def test_its_weights_are_small():
    assert (WEIGHTS / "judge" / "judge.safetensors").stat().st_size < 3e6


@given(st.integers(0, 2**31 - 1))
def test_two_captions_of_one_picture_have_the_same_answers(seed):
    """A pair of plain, upright objects is told as well from the one as from the other."""
    rng = np.random.RandomState(seed)
    scene = next(scene for scene in iter(lambda: sample_scene(rng), None) if scene.relation)
    scene = dataclasses.replace(scene, material="plain", pose="upright")
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    swapped = {"shape": scene.shape2, "colour": scene.colour2, "shape2": scene.shape, "colour2": scene.colour}
    other = dataclasses.replace(scene, relation=opposite[scene.relation], **swapped)
    answers, others = expected_answers(scene), expected_answers(other)
    both = answers.keys() & others.keys()  # but for the pose, where one of them is a circle
    assert {f: answers[f] for f in both} == {f: others[f] for f in both} and {*FACTORS} - both <= {"pose", "material"}


def test_answers_leave_out_only_what_cannot_be_seen():
    for scene, answers in zip(SCENES, EXPECTED, strict=True):
        hidden = {"pose"} if (scene.shape, scene.material) == ("circle", "plain") else set()
        hidden |= {"material"} if (scene.style, scene.size) == ("sketch", "small") else set()
        assert set(FACTORS) - set(answers) == hidden
        assert {factor for factor, value in answers.items() if value is not None} == set(factors(scene)) - hidden


@given(st.integers(0, 2**31 - 1), st.sampled_from(["scene", "blob", "mixture", "empty", "noise"]))
def test_the_answers_to_a_question_are_values_of_the_world_and_pairs_are_told_from_one_side(seed, kind):
    question = ask(np.random.RandomState(seed), kind)
    assert question.picture.shape == (64, 64, 3) and question.picture.dtype == np.uint8
    assert set(question.answers) <= set(FACTORS)
    assert all(value is None or value in FACTORS[factor] for factor, value in question.answers.items())
    assert question.answers.get("relation") in (None, "left of", "above")
    assert question.mask.any() == (kind in ("scene", "blob", "mixture"))
    if kind != "scene":
        assert None in (question.answers["shape"], question.answers["shape2"])


def test_questions_become_targets_within_each_factors_answers():
    _pictures, targets, _masks = ask_many(np.random.RandomState(0), 64)
    most = torch.tensor([len(values) for values in FACTORS.values()])
    assert (((targets >= 0) & (targets <= most)) | (targets == NOT_ASKED)).all()
    assert (targets == most).any(0).all()  # every factor is sometimes absent

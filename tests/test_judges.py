"""Judges: the same picture is at no distance, distances are symmetric, and the world's judge sees what changed."""

from dataclasses import replace

import numpy as np
import pytest

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.judges import EmbeddingJudge, PictureJudge, TextJudge, WorldJudge, chosen_judge, judge_of
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.tiny.world import Scene, object_mask, render

SCENES = [
    Scene("circle", "red", "plain", "black", "plain", "flat", "upright", position="on the left"),
    Scene("star", "blue", "plain", "white", "grid", "neon", "upright", position="at the top"),
    Scene("heart", "green", "striped", "teal", "plain", "flat", "tilted", size="large"),
]
BEFORE = np.stack([render(scene) for scene in SCENES]).astype(np.float32) / 255
AFTER = np.roll(BEFORE, 1, axis=0)


@pytest.fixture(scope="module")
def judge() -> WorldJudge:
    return WorldJudge()


def test_the_same_pictures_are_at_no_distance_and_distances_are_symmetric(judge) -> None:
    for distance in (judge.perceptual, judge.semantic):
        assert np.abs(distance(BEFORE, BEFORE)).max() < 1e-5
        assert np.allclose(distance(BEFORE, AFTER), distance(AFTER, BEFORE), atol=1e-6)
        assert distance(BEFORE, AFTER).mean() > 0.1


def test_what_looks_different_is_where_it_changed(judge) -> None:
    scene = SCENES[0]
    recoloured = BEFORE[:1].copy()
    where = object_mask(scene)
    recoloured[0][where] = [0.17, 0.37, 0.92]
    seen = judge.perceptual(BEFORE[:1], recoloured)[0]
    assert seen[where].mean() > 3 * seen[~where].mean()


def test_the_semantic_distance_is_one_minus_the_similarity_of_what_is_shown(judge) -> None:
    embedding = EmbeddingJudge(WorldEmbed())
    assert np.allclose(judge.semantic(BEFORE, AFTER), embedding.semantic(BEFORE, AFTER), atol=1e-5)
    assert embedding.perceptual(BEFORE, AFTER) is None
    assert embedding.factors(BEFORE) is None


def test_factors_are_those_of_the_world(judge) -> None:
    told = judge.factors(BEFORE)
    assert np.allclose(told["colour"].sum(axis=1), 1, atol=1e-5)
    assert (told["colour"].argmax(axis=1) == [0, 2, 1]).all()


class Reading:
    """An embedding whose picture and text rows are known."""

    name = "reading"

    def __call__(self, images):
        return np.eye(4, dtype=np.float32)[: len(images)]

    def texts(self, texts):
        return np.array([[0.6, 0.8, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]], dtype=np.float32)[: len(texts)]


def test_only_a_judge_that_reads_texts_says_so(judge) -> None:
    reading = EmbeddingJudge(Reading())
    assert isinstance(reading, TextJudge) and isinstance(reading, PictureJudge)
    assert reading.textual(BEFORE, ["a", "b", "c"]) == pytest.approx([0.6, 0, -1])
    for deaf in (EmbeddingJudge(WorldEmbed()), judge):
        assert isinstance(deaf, PictureJudge) and not isinstance(deaf, TextJudge)


def test_only_the_embedded_model_brings_a_judge(pipe, monkeypatch) -> None:
    assert isinstance(judge_of(pipe), WorldJudge)
    assert isinstance(judge_of(pipe), PictureJudge)
    monkeypatch.setattr(pipe, "sdxl_sae_kit_model", replace(describe(pipe), name="stabilityai/sdxl-turbo"))
    assert judge_of(pipe) is None


def test_what_is_no_judge_is_refused(pipe, unchecked_types) -> None:
    assert chosen_judge("ablate", pipe, None) is None
    assert isinstance(chosen_judge("ablate", pipe, ...), WorldJudge)
    for wrong in ("clip", WorldJudge, 3):
        with pytest.raises(KitError, match="ablate: judge is one such as WorldJudge"):
            chosen_judge("ablate", pipe, wrong)

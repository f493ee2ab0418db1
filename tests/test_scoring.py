"""Scores of edits: each is what a plain loop over its definition gives, and what cannot be told is None."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_sae_kit.items import Item
from sdxl_sae_kit.judges import EmbeddingJudge, WorldJudge
from sdxl_sae_kit.masks import covered
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies.scoring import MEASURES, Scoring, outside
from sdxl_sae_kit.tiny.edits import edit
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import FACTORS, Scene, caption, render

BEFORE = Scene("star", "red", "plain", "navy", "plain", "flat", "upright")


def item(name: str, factor: str, value: str) -> Item:
    after = edit(BEFORE, factor, value)
    return Item(
        name, f"change {factor}", caption(BEFORE), caption(after), "object", "object", before=BEFORE, after=after
    )


ITEMS = [item("a", "colour", "blue"), item("b", "material", "striped"), item("c", "colour", "green")]


class Told:
    """A judge that says of a picture what was drawn at random for the number in its first pixel."""

    name = "told"

    def __init__(self, places: int = 8) -> None:
        rng = np.random.default_rng(0)
        self.said = {f: rng.dirichlet(np.ones(len(values) + 1), size=12) for f, values in FACTORS.items()}
        self.maps, self.apart = rng.random((12, 12, places, places)), rng.random((12, 12))

    def known(self, pictures):
        return (pictures[:, 0, 0, 0] * 11).round().astype(int)

    def factors(self, pictures):
        return {factor: each[self.known(pictures)] for factor, each in self.said.items()}

    def perceptual(self, before, after):
        return self.maps[self.known(before), self.known(after)]

    def semantic(self, before, after):
        return self.apart[self.known(before), self.known(after)]


def pictures(*numbers: int) -> np.ndarray:
    made = np.random.default_rng(sum(numbers)).random((len(numbers), 8, 8, 3)).astype(np.float32)
    made[:, 0, 0, 0] = np.array(numbers) / 11
    return made


def boxes(*corners: tuple[int, int]) -> list:
    """For each item two masks: the first so many rows, and the first so many columns."""
    rows, columns = np.indices((8, 8))
    return [(rows < height, columns < width) for height, width in corners]


@pytest.fixture
def scoring() -> Scoring:
    return Scoring(Told(), ITEMS, boxes((3, 2), (0, 8), (1, 0)), pictures(0, 1, 2), pictures(3, 4, 5))


def test_each_measure_is_what_a_loop_over_its_definition_gives(scoring) -> None:
    after, judge = pictures(6, 7, 8), scoring.judge
    for i, (given, score) in enumerate(zip(ITEMS, scoring(after), strict=True)):
        told = {factor: each[6 + i] for factor, each in judge.said.items()}
        was = {factor: each[i] for factor, each in judge.said.items()}
        factor, value = given.target
        place = FACTORS[factor].index(value)
        assert tuple(score) == MEASURES
        assert score["target"] == pytest.approx(told[factor][place])
        assert score["reached"] == (max(told[factor]) == told[factor][place])
        same = [list(told[f]).index(max(told[f])) == list(was[f]).index(max(was[f])) for f in given.others]
        assert len(same) >= 5 and score["kept"] == pytest.approx(sum(same) / len(same))
        far, near = judge.maps[i, 6 + i], judge.maps[3 + i, 6 + i]
        mask_o, mask_e = scoring.masks[i]
        free = [far[y, x] for y in range(8) for x in range(8) if not mask_o[y, x] and not mask_e[y, x]]
        assert score["outside"] == (pytest.approx(sum(free) / len(free)) if free else None)
        assert (i == 1) == (not free), "the second item's masks cover everything"
        assert score["to original"] == pytest.approx(far.sum() / 64)
        assert score["to edited"] == pytest.approx(near.sum() / 64)
        change = [abs(float(a) - float(b)) for a, b in zip(after[i].flat, scoring.original[i].flat, strict=True)]
        assert score["pixel"] == pytest.approx(sum(change) / 192)
        assert score["image similarity"] == pytest.approx(1 - judge.apart[3 + i, 6 + i])
        answers = expected_answers(given.after)
        said = [told[f][FACTORS[f].index(v) if v is not None else len(FACTORS[f])] for f, v in answers.items()]
        assert score["text similarity"] == pytest.approx(sum(said) / len(said))


def test_the_target_is_reached_where_it_is_drawn_and_only_there() -> None:
    before, after = (np.stack([render(BEFORE), render(each.after)]) / np.float32(255) for each in ITEMS[:2])
    items, wide = [ITEMS[0], ITEMS[0]], [(np.ones((4, 4), bool),) * 2] * 2
    drawn = Scoring(WorldJudge(), items, wide, before[[0, 0]], before[[1, 1]])
    floor, ceiling = drawn(before)
    assert (floor["reached"], floor["kept"], floor["pixel"], floor["to original"]) == (0, 1, 0, 0)
    assert (ceiling["reached"], ceiling["kept"], ceiling["to edited"]) == (1, 1, 0)
    assert ceiling["image similarity"] == pytest.approx(1, abs=1e-5) and ceiling["target"] > 0.9 > 0.1 > floor["target"]
    assert ceiling["text similarity"] > floor["text similarity"]
    assert drawn(after)[1]["kept"] < 1, "the material is another, which was to be kept"


def test_what_a_judge_cannot_tell_is_none_and_the_change_outside_is_then_of_pixels(scoring) -> None:
    after = pictures(6, 7, 8)
    blind = Scoring(None, ITEMS, scoring.masks, scoring.original, scoring.edited)(after)
    for i, score in enumerate(blind):
        assert [name for name, value in score.items() if value is not None] == ["outside", "pixel"][i == 1 :]
    change = np.abs(after[0].astype(float) - scoring.original[0])[3:, 2:]
    assert blind[0]["outside"] == pytest.approx(change.mean())

    class Reading(EmbeddingJudge):
        def textual(self, pictures, texts):
            return np.array([len(text) / 100 for text in texts])

    drawn = np.stack([render(each.after) for each in ITEMS]) / np.float32(255)
    told = Scoring(Reading(WorldEmbed()), ITEMS, [(np.zeros((2, 2), bool),) * 2] * 3, drawn, drawn)(drawn)
    for given, score in zip(ITEMS, told, strict=True):
        assert score["text similarity"] == pytest.approx(len(given.edited) / 100)
        assert score["image similarity"] == pytest.approx(1, abs=1e-5)
        assert all(score[name] is None for name in ("reached", "target", "kept", "to original", "to edited"))


def test_items_without_scenes_have_no_target_and_no_factors_to_keep() -> None:
    real = Item("1", "change object", "a cat", "a dog", "cat", "dog")
    (score,) = Scoring(Told(), [real], boxes((1, 1)), pictures(0), pictures(1))(pictures(2))
    told = {name for name, value in score.items() if value is not None}
    assert told == {"outside", "pixel", "to original", "to edited", "image similarity"}


def test_masks_of_any_size_count_where_they_cover_half_of_a_place() -> None:
    maps = np.arange(16.0).reshape(1, 4, 4)
    coarse = np.array([[True, False], [False, False]])
    assert covered(coarse, (4, 4)).tolist() == np.kron(coarse, np.ones((2, 2), bool)).tolist()
    fine = np.zeros((8, 8), bool)
    fine[:2, 0] = True  # half of the first place
    fine[0, 2] = True  # a quarter of the second
    assert covered(fine, (4, 4)).sum() == 1 and covered(fine, (4, 4))[0, 0]
    nothing = np.zeros((3, 5), bool)
    assert outside(maps, [(coarse, nothing)]) == [(maps.sum() - 0 - 1 - 4 - 5) / 12]
    assert outside(maps, [(nothing, ~nothing)]) == [None]
    assert outside(maps, [(nothing, nothing)]) == [7.5]

"""Scores of edits: each is what a plain loop over its definition gives, and what cannot be told is None."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_sae_kit.items import Item, load_items
from sdxl_sae_kit.judges import EmbeddingJudge, WorldJudge
from sdxl_sae_kit.masks import covered
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies.scoring import MEASURES, Scoring, answered, kept, outside
from sdxl_sae_kit.tiny.edits import edit
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import COLOURS, FACTORS, SHAPES, Scene, caption, render

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
        same = [list(told[f]).index(max(told[f])) == list(was[f]).index(max(was[f])) for f, _ in given.others]
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


COUNTED = load_items("world", 12).of("add object", "delete object")


def scored(*drawn: list[Scene]) -> list[list[dict]]:
    """The scores of each set of pictures, one for each of `COUNTED`."""
    wide = [(np.ones((4, 4), bool),) * 2] * len(COUNTED)
    before, after, *others = (
        np.stack([render(scene) for scene in scenes]) / np.float32(255)
        for scenes in ([item.before for item in COUNTED], [item.after for item in COUNTED], *drawn)
    )
    score = Scoring(WorldJudge(), COUNTED, wide, before, after)
    return [score(pictures) for pictures in (before, after, *others)]


def another(value: str, values, *but: str | None) -> str:
    return next(each for each in values if each not in (value, *but))


def test_where_an_object_comes_or_goes_the_other_is_watched_wherever_it_stands() -> None:
    """Doing nothing keeps all, so does the edit itself; another colour or shape of what stays does not."""
    recoloured = [
        edit(item.after, "colour", another(item.after.colour, COLOURS, item.after.colour2, item.before.colour2))
        for item in COUNTED
    ]
    not_edited = [
        edit(item.before, "shape", another(item.before.shape, SHAPES, item.before.shape2, item.after.shape2))
        for item in COUNTED
    ]
    nothing, done, *spoilt = scored(recoloured, not_edited)
    turned = {i.kind for i in COUNTED if (i.before.relation or i.after.relation) in ("right of", "below")}
    assert turned == {"add object", "delete object"}, "items of which what stays is the judge's second"
    assert {score["kept"] for score in nothing} == {1.0} and {score["reached"] for score in nothing} == {0.0}
    assert {score["kept"] for score in done} == {1.0} and {score["reached"] for score in done} == {1.0}
    assert all(score["kept"] < 1 for scores in spoilt for score in scores)


@pytest.mark.parametrize(("factor", "values"), [("shape", SHAPES), ("colour", tuple(COLOURS))])
def test_an_added_object_counts_only_in_its_shape_and_colour(factor, values) -> None:
    def wrong(item: Item) -> Scene:
        after = item.after
        if item.kind == "delete object":
            return after
        return edit(after, f"{factor}2", another(getattr(after, f"{factor}2"), values, getattr(after, factor)))

    _, done, spoilt = scored([wrong(item) for item in COUNTED])
    for item, well, badly in zip(COUNTED, done, spoilt, strict=True):
        added = item.kind == "add object"
        assert badly["reached"] == (0.0 if added else 1.0)
        assert (badly["target"] < 0.5 < well["target"]) == added
    assert np.mean([score["kept"] for score in spoilt]) > 0.97, "what was there before is as it was"


def test_what_is_reached_is_all_that_is_wanted_and_the_target_its_least_probability() -> None:
    told = {"count": np.array([[0.2, 0.8, 0.0]]), "shape": np.full((1, len(SHAPES) + 1), 0.01)}
    told["shape"][0, 1] = 0.5
    wanted = {"count": "two", "shape": SHAPES[1]}
    assert answered(told, [wanted]) == ([1.0], [0.5])
    assert answered(told, [wanted | {"shape": SHAPES[0]}]) == ([0.0], [0.01])
    assert answered(told, [{"count": "one"}]) == ([0.0], [0.2])
    for unknown in ({}, wanted | {"colour": "red"}, wanted | {"shape": "yes"}):
        assert answered(told, [unknown]) == ([None], [None])
    assert answered(None, [wanted]) == ([None], [None])


def test_what_stays_is_found_under_either_name_and_only_what_is_told_counts() -> None:
    def says(*places: int) -> np.ndarray:
        return np.eye(3)[list(places)]

    before = {"shape": says(0, 0, 0), "size": says(1, 1, 1)}
    after = {"shape": says(1, 0, 1), "shape2": says(0, 2, 2), "size": says(1, 1, 2)}
    moved = (("shape", "shape2"), ("size", "size"), ("colour", "colour"))
    assert kept(before, after, [moved] * 3) == [1, 1, 0]
    assert kept(before, after, [(("shape", "shape"),)] * 3) == [0, 1, 0]
    assert kept(before, {"shape": after["shape"]}, [moved, moved, ()]) == [None] * 3
    assert kept(None, after, [moved]) == kept(before, None, [moved]) == [None]


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

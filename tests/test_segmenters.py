"""Mask prompts mean what the rules say, a failure costs its own item only; the tiny world's masks are nearly true."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.masks import Polygon
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.segmenters import GivenMasks, Segmenter, Shot, WorldSegmenter, find_masks, segmenter_of
from sdxl_sae_kit.tiny.world import object_mask, render, sample_scene

DOG = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
FOREGROUND = np.array([[1, 1, 1], [1, 0, 0]], dtype=bool)
ALL = np.ones((4, 6), dtype=bool)  # of the picture's size; a segmenter's masks may have any


class Knowing:
    """Finds what it was told of, refuses the rest, and notes what it was asked."""

    name = "knowing"

    def __init__(self, **known):
        self.known, self.calls = {"dog": DOG, "foreground": FOREGROUND} | known, []

    def __call__(self, shots, asked):
        self.calls.append([(shot.item, shot.side, words) for shot, words in zip(shots, asked, strict=True)])
        for words in asked:
            if words not in self.known:
                raise KitError(f"I do not know {words}.")
        return [self.known[words] for words in asked]


class Broken:
    name = "broken"

    def __call__(self, shots, asked):
        raise KeyError("lost")


def item(name, original, edited, kind="change object"):
    return SimpleNamespace(name=name, kind=kind, original_mask=original, edited_mask=edited)


def shots(items, side):
    return [Shot(each.name, side, "a dog", 0, np.zeros((4, 6, 3), dtype=np.float32)) for each in items]


def found(segmenter, *items):
    return find_masks(segmenter, items, shots(items, "original"), shots(items, "edited"))


@pytest.mark.parametrize(
    ("prompt", "mask", "asked"),
    [
        ("dog", DOG, "dog"),
        (" dog ", DOG, "dog"),
        ("~dog", ~DOG, "dog"),
        ("~ dog", ~DOG, "dog"),
        ("background", ~FOREGROUND, "foreground"),
        ("the dark Background", ~FOREGROUND, "foreground"),
        ("~background", FOREGROUND, "foreground"),
        ("foreground", FOREGROUND, "foreground"),
        ("#everything", ALL, None),
    ],
)
def test_a_mask_prompt_means_what_the_rules_say(prompt, mask, asked):
    segmenter = Knowing()
    ((original, edited),) = found(segmenter, item("1", prompt, "dog"))
    assert (original == mask).all() and (edited == DOG).all()
    assert segmenter.calls == [[("1", "original", asked)] * (asked is not None) + [("1", "edited", "dog")]]


@pytest.mark.parametrize(("kind", "side"), [("add object", "edited"), ("delete object", "original")])
def test_what_is_on_one_picture_only_is_looked_for_there(kind, side):
    segmenter = Knowing()
    prompts = {"original": "unknown", "edited": "unknown"} | {side: "dog"}
    ((original, edited),) = found(segmenter, item("1", *prompts.values(), kind))
    assert (original == DOG).all() and (edited == DOG).all()
    assert segmenter.calls == [[("1", side, "dog")]]


def test_everything_of_a_batch_is_asked_at_once_and_nothing_is_not_asked():
    segmenter = Knowing()
    items = [item("1", "dog", "~dog"), item("2", "#everything", "#everything"), item("3", "dog", "background")]
    masks = found(segmenter, *items)
    assert segmenter.calls == [
        [("1", "original", "dog"), ("1", "edited", "dog"), ("3", "original", "dog"), ("3", "edited", "foreground")]
    ]
    expected = [(DOG, ~DOG), (ALL, ALL), (DOG, ~FOREGROUND)]
    assert all(
        (one == other).all() for a, b in zip(masks, expected, strict=True) for one, other in zip(a, b, strict=True)
    )
    assert found(segmenter, items[1])[0][0].all() and len(segmenter.calls) == 1


def test_an_empty_mask_fails_its_item_and_says_whose_it_is():
    segmenter = Knowing(cat=np.zeros((2, 3), dtype=bool), sky=np.ones((5, 5), dtype=bool))
    empty, left, both, good = found(
        segmenter, item("1", "dog", "cat"), item("2", "~sky", "dog"), item("3", "cat", "~#everything"),
        item("4", "dog", "sky"),
    )  # fmt: skip
    assert empty == "the mask of the edited picture is empty: knowing finds nothing for 'cat'"
    assert left == "the mask of the original picture is empty: knowing finds nothing for '~sky'"
    assert "original picture is empty" in both and "edited picture is empty" in both
    assert (good[0] == DOG).all() and good[1].shape == (5, 5)


def test_a_refusal_fails_its_item_only():
    segmenter = Knowing()
    good, bad, also_good = found(
        segmenter, item("1", "dog", "dog"), item("2", "dog", "whale"), item("3", "~dog", "dog")
    )
    assert bad == "there is no mask of the edited picture for 'whale': knowing says: I do not know whale."
    assert (good[1] == DOG).all() and (also_good[0] == ~DOG).all()


@pytest.mark.parametrize("bad", range(0, 16, 5))
def test_after_a_refusal_halves_are_asked_not_each_shot(bad):
    segmenter = Knowing()
    names = ["whale" if at == bad else "dog" for at in range(16)]
    told = found(segmenter, *[item(str(at), "dog", name) for at, name in enumerate(names)])
    assert [isinstance(each, str) for each in told] == [name == "whale" for name in names]
    assert len(segmenter.calls) == 1 + 2 * 5  # 32 shots are halved five times


def test_what_is_no_items_fault_is_raised_at_once():
    class Unfit(Knowing):
        def __call__(self, shots, asked):
            super().__call__(shots, asked)
            raise ModelError("made by another model")

    segmenter = Unfit()
    with pytest.raises(ModelError, match="made by another model"):
        found(segmenter, *[item(str(at), "dog", "dog") for at in range(4)])
    assert len(segmenter.calls) == 1


@pytest.mark.parametrize(("prompt", "words"), [("~cat", "cat"), ("background", "foreground")])
def test_what_is_to_be_left_out_must_be_found(prompt, words):
    """Else the mask would be the whole picture without a word."""
    segmenter = Knowing(**{words: np.zeros((2, 3), dtype=bool)})
    (reason,) = found(segmenter, item("1", "dog", prompt))
    assert reason == (
        f"there is no mask of the edited picture for {prompt!r}: knowing finds no {words!r}, which was to be left out"
    )
    (other,) = found(segmenter, item("1", "dog", words))
    assert "is empty" in other


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([], "asked for 2 masks and gave 0"),
        (None, "asked for 2 masks and gave NoneType"),
        ([DOG.astype(float)] * 2, "arrays .* of bool as masks, not float64 of shape"),
        ([[[True]]] * 2, "of bool as masks, not list"),
    ],
)
def test_what_is_no_answer_is_refused_by_the_segmenters_name(answer, complaint, unchecked_types):
    def strange(shots, asked):
        return answer

    strange.name = "my own"
    with pytest.raises(ModelError, match=f"The segmenter 'my own' .*{complaint}"):
        found(strange, item("1", "dog", "dog"))


def test_one_reason_for_both_pictures_is_told_once():
    (told,) = found(Knowing(), item("1", "whale", "whale"))
    assert told == "there is no mask of either picture for 'whale': knowing says: I do not know whale."


def test_what_is_no_refusal_is_not_hidden():
    with pytest.raises(KeyError, match="lost"):
        found(Broken(), item("1", "dog", "dog"))


# The tiny world -----------------------------------------------------------------------------------------------------

_SIDES = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def rendered(scenes):
    return [Shot(str(i), "original", "", 0, render(scene).astype(np.float32) / 255) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def world():
    return WorldSegmenter()


def test_an_object_of_two_is_found_where_it_is(world):
    rng = np.random.RandomState(7)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(350)) if scene.relation]
    shots, overlaps, wrong = rendered(scenes), [], []
    for at, which in enumerate(("first", "second")):
        sides = [_SIDES[scene.relation][at] for scene in scenes]
        for mask, scene in zip(world(shots, [f"object {side}" for side in sides]), scenes, strict=True):
            overlaps.append(overlap(mask, object_mask(scene, which)))
            wrong.append(overlap(mask, object_mask(scene, "second" if which == "first" else "first")))
    assert len(scenes) >= 100 and np.mean(overlaps) >= 0.9 and np.quantile(overlaps, 0.05) >= 0.75
    assert np.mean(wrong) < 0.05


def test_all_objects_are_the_foreground(world):
    scenes = [sample_scene(np.random.RandomState(i)) for i in range(40)]
    masks = world(rendered(scenes), ["object", "foreground"] * 20)
    assert np.mean([overlap(m, object_mask(scene)) for m, scene in zip(masks, scenes, strict=True)]) >= 0.9


def test_what_spans_both_halves_is_cut_and_what_leans_over_is_not(world, monkeypatch):
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:20, 5:59] = True  # spans both
    mask[30:40, 20:34] = True  # 12 of 14 columns lie on the left
    monkeypatch.setattr(world, "_judge", SimpleNamespace(read=lambda pictures: SimpleNamespace(mask=[mask] * 2)))
    shot = Shot("1", "original", "", 0, np.zeros((64, 64, 3), dtype=np.float32))
    left, right = world([shot] * 2, ["object on the left", "object on the right"])
    assert left[10:20, 5:32].all() and not left[10:20, 32:].any() and left[30:40, 20:34].all()
    assert right[10:20, 32:59].all() and not right[30:40].any()
    assert (left | right == mask).all() and not (left & right).any()


def test_the_world_knows_few_words_and_one_size(world):
    shot = rendered([sample_scene(np.random.RandomState(0))])[0]
    with pytest.raises(
        KitError, match="no 'object on the lefd'.*object at the bottom.*Did you mean 'object on the left'"
    ):
        world([shot], ["object on the lefd"])
    with pytest.raises(KitError, match="64×64 pixels; it got 6×4"):
        world(shots([item("1", "", "")], "original"), ["object"])


def test_only_the_embedded_model_brings_a_segmenter(pipe, monkeypatch):
    assert isinstance(segmenter_of(pipe), WorldSegmenter) and isinstance(segmenter_of(pipe), Segmenter)
    monkeypatch.setattr(pipe, "sdxl_sae_kit_model", replace(describe(pipe), name="stabilityai/sdxl-turbo"))
    assert segmenter_of(pipe) is None


# Masks by hand ------------------------------------------------------------------------------------------------------

HALF = Polygon([(0, 0), (0.5, 0), (0.5, 1), (0, 1)])


def test_given_masks_are_taken_as_they_are_whatever_the_prompts_say():
    upper = np.array([[1.0], [0.0]])
    segmenter = GivenMasks({"1": (HALF, upper), "2": [HALF], "3": [[0.5, 0.49]]})
    prompts = [("~dog", "background"), ("#everything", "x"), ("", "")]
    kinds = ["add object", "change object", "delete object"]
    items = [item(str(i + 1), *pair, kind) for i, (pair, kind) in enumerate(zip(prompts, kinds, strict=True))]
    (left, top), (one, same), (third, _) = found(segmenter, *items)
    n = len(left)
    assert left[:, : n // 2].all() and not left[:, n // 2 :].any()
    assert top[: n // 2].all() and not top[n // 2 :].any()
    assert (one == left).all() and (same == left).all() and (third == left).all()


def test_an_item_without_a_mask_fails():
    none, good = found(GivenMasks({"item 10": HALF}), item("item 11", "dog", "dog"), item("item 10", "", ""))
    assert (
        "No mask is given for item 'item 11'" in none
        and "Did you mean 'item 10'?" in none
        and not isinstance(good, str)
    )


def test_given_masks_are_named_by_what_they_cover():
    one, same, swapped = (
        GivenMasks({"a": HALF, "b": ([[1]], HALF)}),
        GivenMasks({"b": ([[1]], HALF), "a": [[1, 0]]}),
        (GivenMasks({"a": HALF, "b": (HALF, [[1]])})),
    )
    assert isinstance(one, Segmenter) and one.name == same.name != swapped.name
    assert GivenMasks({"ab": HALF}).name != GivenMasks({"a": HALF}).name


@pytest.mark.parametrize("wrong", ["a dog", [[-1, 0]], np.ones((2, 3, 3)), np.ones((0, 3))])
def test_what_is_no_mask_is_refused_by_the_items_name(wrong, unchecked_types):
    with pytest.raises(KitError, match="GivenMasks: .*item '7'"):
        GivenMasks({"7": wrong})


def test_given_masks_are_by_name_and_not_empty(unchecked_types):
    for wrong in (np.ones((2, 2)), [HALF]):
        with pytest.raises(KitError, match="GivenMasks takes a mapping"):
            GivenMasks(wrong)
    with pytest.raises(KitError, match="the mask of item '7' is empty"):
        GivenMasks({"7": (HALF, np.zeros((2, 2)))})

"""The picture world: the same pictures and words for ever, exact masks, captions that tell, edits of one factor."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from sdxl_sae_kit.errors import EditError
from sdxl_sae_kit.tiny.edits import EDIT_KINDS, add_object, delete_object, edit, edits
from sdxl_sae_kit.tiny.world import FACTORS, WORDS, Scene, caption, factors, object_mask, render, sample_scene

SCENES = [sample_scene(rng) for rng in [np.random.RandomState(0)] for _ in range(200)]
PAIRS = [scene for scene in SCENES if scene.count == "two"]
PLAIN = Scene("star", "red", "plain", "navy", "plain", "flat", "upright", position="on the left")
UNSAID = {"style": "flat", "pose": "upright", "material": "plain", "pattern": "plain"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shifted(mask: np.ndarray) -> np.ndarray:
    """The mask moved by up to one pixel in each of the nine directions."""
    padded = np.pad(mask, 1, mode="edge")
    return np.stack([padded[y : y + 64, x : x + 64] for y in range(3) for x in range(3)])


def grown(mask: np.ndarray, pixels: int = 3) -> np.ndarray:
    """The mask and a rim as wide as what lies beyond it at the tips of a small star, which are thinner than a pixel."""
    for _ in range(pixels):
        mask = shifted(mask).any(0)
    return mask


def shrunk(mask: np.ndarray) -> np.ndarray:
    return shifted(mask).all(0)


def changed(before: Scene, after: Scene) -> np.ndarray:
    """Pixels that two scenes draw differently, beyond rounding."""
    return (np.abs(render(before).astype(int) - render(after).astype(int)) > 1).any(-1)


# The weights were trained on exactly these: hashes of the world as it was then.


def test_pictures_never_change():
    pictures = b"".join(render(scene).tobytes() for scene in SCENES)
    assert sha256(pictures) == "0b3ebb2338f1694d163b05d7f60007489819b820549e1f893044fa079722c65f"


def test_masks_never_change():
    masks = b"".join(object_mask(scene).tobytes() for scene in SCENES)
    assert sha256(masks) == "3b50dbc6d314bc56678d223fc5e204e589392aee33295bc28711d90fe81edba1"
    single = b"".join(object_mask(scene, which).tobytes() for scene in PAIRS for which in ("first", "second"))
    assert sha256(single) == "666ec65c5b7887812d3d2ce8420f3fdbe4ebc592a0b2b65d1be15112a06fe260"


@pytest.mark.parametrize(
    ("seed", "drop", "expected"),
    [
        (None, 0.25, "4b7d635d8f960c7f42973fdb07340a88fd2d013b4ffc99010a209fab6d6785c7"),
        (1, 0.25, "f818be4e57d76ccf20d61cb6cdbab5f0ed0951a3bbd152c9b780167d50766c85"),
        (2, 0.5, "0031c6689d440ed7d2af7de3e63aa864c0998d1af8574489bdd77321dcbbae0e"),
        (3, 0.0, "f40d7dd0325e1d9dcbd7d5a211bbfa6cda836a17f14b3b13c72828fe7294f096"),
    ],
)
def test_captions_never_change(seed, drop, expected):
    rng = None if seed is None else np.random.RandomState(seed)
    assert sha256("\n".join(caption(scene, rng, drop) for scene in SCENES).encode()) == expected


def test_words_never_change():
    assert sha256(" ".join(WORDS).encode()) == "a90e525cb9b178740859a9e8f30748e579a32510a970b13ac6ac3aa98caeda6c"


def test_captions_tell_every_factor_that_is_not_the_usual():
    for scene in SCENES:
        words = caption(scene)
        for factor, value in factors(scene).items():
            usual = factor == "count" or value == UNSAID.get(factor) or (factor == "position" and scene.size == "large")
            assert usual or value in words, (factor, value, words)


def test_captions_use_the_worlds_words_only_and_fit_the_text_encoders():
    rng = np.random.RandomState(4)
    captions = [caption(scene, rng, drop).split() for scene in SCENES for drop in (0.0, 0.3)]
    assert {word for words in captions for word in words} <= set(WORDS)
    assert max(map(len, captions)) <= 22  # of 24 tokens, the first and the last are not words


def test_masks_are_where_the_object_is_drawn():
    for scene in SCENES:
        scene = replace(scene, style="flat")
        recoloured = edit(scene, "colour", "blue" if scene.colour == "red" else "red")
        front = object_mask(scene, "first")
        touched = changed(scene, recoloured)
        assert not (touched & ~grown(front, 3 if scene.shape == "star" else 2)).any()
        assert not (shrunk(front) & ~touched).any()


def test_second_object_lies_behind_the_first():
    for scene in PAIRS:
        scene = replace(scene, style="flat")
        touched = changed(scene, edit(scene, "colour2", "blue" if scene.colour2 == "red" else "red"))
        first, second = object_mask(scene, "first"), object_mask(scene, "second")
        assert not (touched & ~grown(second)).any()
        assert not (touched & shrunk(first)).any()
        assert (object_mask(scene) == (first | second)).all()


def test_one_object_has_no_second():
    assert not object_mask(PLAIN, "second").any()
    with pytest.raises(EditError, match="Did you mean 'first'"):
        object_mask(PLAIN, "frst")


def test_edits_change_one_factor_and_no_other():
    for scene in SCENES[:40]:
        found = edits(scene)
        assert {made.kind for made in found} >= {kind for kind, factor in EDIT_KINDS.items() if factor != "count"}
        for made in found:
            before, after = factors(made.before), factors(made.after)
            differing = {name for name in before.keys() & after.keys() if before[name] != after[name]}
            assert differing == {EDIT_KINDS[made.kind]}
            assert made.before == scene


def test_captions_of_an_edit_differ_in_its_words_only():
    for scene in SCENES[:15]:
        for made in edits(scene):
            factor = EDIT_KINDS[made.kind]
            values = f"{getattr(made.before, factor)} {getattr(made.after, factor)} a sketch of".split()
            differing = set(caption(made.before).split()) ^ set(caption(made.after).split())
            assert differing
            assert factor == "count" or differing <= set(values)


def test_edits_of_the_object_leave_the_rest_of_the_picture():
    for scene in (replace(scene, style="flat") for scene in SCENES[:40]):
        for made in edits(scene):
            if made.kind in ("change object", "change pose", "change colour", "change material"):
                either = object_mask(made.before, "first") | object_mask(made.after, "first")
                assert not (changed(made.before, made.after) & ~grown(either)).any()


@pytest.mark.parametrize("position", ["on the left", "on the right", "at the top", "at the bottom"])
def test_adding_an_object_leaves_the_first_where_it_is(position):
    scene = replace(PLAIN, position=position, jitter=(0.4, -0.7, 0.2, 0.9))
    pair = add_object(scene, "circle", "blue")
    assert (object_mask(pair, "first") == object_mask(scene)).all()
    assert not (changed(scene, pair) & ~grown(object_mask(pair, "second"))).any()
    alone = delete_object(pair)
    assert replace(alone, jitter=scene.jitter) == scene
    np.testing.assert_allclose(alone.jitter, scene.jitter, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: edit(PLAIN, "color", "red"), "Did you mean 'colour'"),
        (lambda: edit(PLAIN, "colour", "gren"), "Did you mean 'green'"),
        (lambda: edit(PLAIN, "count", "two"), "add_object"),
        (lambda: edit(PLAIN, "colour2", "red"), "has no 'colour2'"),
        (lambda: edit(PLAIN, "size", "large"), "always in the center"),
        (lambda: edit(PAIRS[0], "position", "on the left"), "has no 'position'"),
        (lambda: add_object(PAIRS[0], "star", "red"), "one object"),
        (lambda: add_object(replace(PLAIN, position="in the center"), "star", "red"), "at a side"),
        (lambda: add_object(PLAIN, "stra", "red"), "Did you mean 'star'"),
        (lambda: delete_object(PLAIN), "needs two objects"),
    ],
)
def test_what_cannot_be_edited_says_why(change, message):
    with pytest.raises(EditError, match=message):
        change()


def test_every_value_of_every_factor_is_drawn_by_the_sampler():
    drawn = {(factor, value) for scene in SCENES for factor, value in factors(scene).items()}
    assert drawn == {(factor, value) for factor, values in FACTORS.items() for value in values}

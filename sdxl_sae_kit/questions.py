"""Questions: what images that show known factors can be asked, and which of them show each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import FACTORS, ONE_OBJECT_FACTORS, TWO_OBJECT_FACTORS, Scene

MIN_IMAGES = 5
"""A value is asked for if at least so many training and so many held-out images show it, and as many do not."""

ROLES = {
    "composition": ("size", "position", "count", "relation"),
    "content": ("shape", "shape2", "pose"),
    "detail": ("material", "pattern"),
    "style": ("colour", "colour2", "background", "style"),
}
"""Which factors of the world say where things are, what they are, how their surface is, and how all of it looks."""

_SCENES = [set(FACTORS) - set(absent) for absent in (ONE_OBJECT_FACTORS, TWO_OBJECT_FACTORS)]


class Question(NamedTuple):
    """A factor, its values, the images that it is asked of, and which of them show each value."""

    factor: str
    values: list[str]
    asked: Bool[np.ndarray, "image"]
    shows: Bool[np.ndarray, "image value"]
    """Which of them each image shows."""


def ask_of(
    cache: Activations, images: Int[np.ndarray, " image"], training: Bool[np.ndarray, " image"]
) -> list[Question]:
    """The factors that these images' prompts tell, with the values that are shown often enough.

    Images show what their prompts say as far as the model draws it. What cannot be seen (the pose of a plain circle,
    the material of a small sketch) is not asked. Size and position are asked of scenes of one object, the relation of
    pairs, from the left or upper object on; a shape or colour is there when either object has it. Factors that are not
    those of a whole scene of the world are taken as they are.

    Args:
        cache: where they are from.
        images: their indices.
        training: which of them candidates will be chosen on; a value must be shown often enough in both parts.

    Raises:
        KitError: the prompts tell no factors, or none often enough: 5 images of each part with a value and 5 without.
    """
    return ask(cache.name, [cache.prompts.factors[image] for image in images.tolist()], training)


def ask(name: str, factors: Sequence[Mapping[str, str]], training: Bool[np.ndarray, " image"]) -> list[Question]:
    """The same of images of any origin, which `name` says, from the factors that their prompts tell.

    Raises:
        KitError: as `ask_of`.
    """
    known = [_shown(each) for each in factors]
    if not any(known):
        raise KitError(
            f"{name}: its prompts tell no factors, so there is nothing to recover. Collect prompts of 'world', "
            "or JSON lines with a field factors."
        )
    if questions := list(_often_shown(known, training)):
        return questions
    raise KitError(
        f"{name}: no factor has a value that {MIN_IMAGES} training and {MIN_IMAGES} held-out images show and as "
        "many do not. Collect more prompts."
    )


def expected(factors: Mapping[str, str]) -> dict[str, str]:
    """What a judge should say of an image that shows these factors of its prompt, where it can be seen.

    Of a whole scene of the world the left or upper object counts as the first, as the judge has it; other factors are
    taken as they are.
    """
    if set(factors) not in _SCENES:
        return dict(factors)
    scene = Scene(**{factor: value for factor, value in factors.items() if factor != "count"})  # type: ignore[arg-type]
    return {factor: value for factor, value in expected_answers(scene).items() if value is not None}


def _shown(factors: Mapping[str, str]) -> dict[str, set[str]]:
    """The values of every factor that an image shows, if it shows what its prompt says."""
    answers = expected(factors)
    if set(factors) not in _SCENES:
        return {factor: {value} for factor, value in answers.items()}
    seconds = {factor: answers.pop(f"{factor}2", answers[factor]) for factor in ("shape", "colour")}
    return {factor: {value, seconds.get(factor, value)} for factor, value in answers.items()}


def _often_shown(known: Sequence[Mapping[str, set[str]]], training: Bool[np.ndarray, " image"]) -> Iterator[Question]:
    names = dict.fromkeys([*FACTORS, *(factor for each in known for factor in each)])
    for factor in names:
        values = sorted({value for each in known for value in each.get(factor, ())})
        asked = np.array([factor in each for each in known])
        shows = np.array([[value in each.get(factor, ()) for each in known] for value in values], dtype=bool).T
        often = [
            value
            for value in range(len(values))
            if min(
                (asked & part & (shows[:, value] == kind)).sum() for part in (training, ~training) for kind in (0, 1)
            )
            >= MIN_IMAGES
        ]
        if often:
            yield Question(factor, [values[value] for value in often], asked, shows[:, often])

"""Where a picture shows what a mask prompt asks for: segmenters, and the rules of mask prompts that they share.

A mask prompt is words such as "dog"; "#everything" is the whole picture, "background" what is no foreground, and "~dog"
what is no dog.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from sdxl_sae_kit.errors import KitError, ModelError, did_you_mean
from sdxl_sae_kit.files import hash_file, sha256
from sdxl_sae_kit.masks import Where, as_mask, shortened
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.tiny import NAMES, WEIGHTS
from sdxl_sae_kit.tiny.judge import FILE, load_judge
from sdxl_sae_kit.tiny.world import SIZE

if TYPE_CHECKING:
    from sdxl_sae_kit.items import Item

EVERYTHING, FOREGROUND = "#everything", "foreground"
GRID = 64
"""Rows and columns of a mask given by hand: the tokens of SDXL's finest hookpoints at 1,024 pixels."""
WHOLE = 0.75
"""Share of an object's pixels in a half of the picture from which on it counts to it whole."""

Mask = Bool[np.ndarray, "_y _x"]
"""Of any size; it covers the whole picture."""
Side = Literal["original", "edited"]
T = TypeVar("T")


@dataclass(frozen=True)
class Shot:
    """One picture and how it was made."""

    item: str
    """Name of the item that it belongs to."""
    side: Side
    """Whether it shows the original or the edited prompt."""
    prompt: str
    seed: int
    picture: Float[np.ndarray, "y x 3"]
    """Colours 0 to 1."""


@runtime_checkable
class Segmenter(Protocol):
    """Finds on pictures what words ask for."""

    @property
    def name(self) -> str:
        """Which segmenter this is, weights included: what masks are kept under."""

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Mask]:
        """Where each shot shows what is asked of it: nowhere, if it does not.

        Raises:
            KitError: it cannot tell of one of them.
            ModelError: it cannot tell of any, such as one that was made for another model.
        """


# The rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """A mask prompt and the picture that it is asked of."""

    shot: Shot
    prompt: str
    words: str
    """What to ask the segmenter for."""
    wanted: bool = True
    """Whether that itself is wanted, not what it leaves."""


def find_masks(
    segmenter: Segmenter, items: Sequence[Item], originals: Sequence[Shot], edited: Sequence[Shot]
) -> list[tuple[Mask, Mask] | str]:
    """The masks of the original and the edited picture of every item, or why there are none.

    "#everything" is the whole picture; a prompt with "background" is what is no foreground, one that starts with "~"
    what is not the rest of it, which must be found for that. An added object is looked for on the edited picture only
    and a deleted one on the original only: that mask is then both (method.md §6). `GivenMasks` are taken as they are,
    without these rules.

    Args:
        segmenter: what finds things; it is asked for all items at once and, if it refuses, for either half of them.
        items: the edits.
        originals: their pictures of the original prompt, in the same order.
        edited: their pictures of the edited prompt.

    Raises:
        ModelError: the segmenter's, which is no item's fault.
    """
    questions = _as_they_are if isinstance(segmenter, GivenMasks) else _by_the_rules
    asked = [questions(*each) for each in zip(items, originals, edited, strict=True)]
    answers = iter(_answers(segmenter, [question for each in asked for question in each]))
    return [_paired([next(answers) for _ in each]) for each in asked]


def _as_they_are(item: Item, original: Shot, edited: Shot) -> list[_Question]:
    prompts = (original, item.original_mask), (edited, item.edited_mask)
    return [_Question(shot, prompt, words="") for shot, prompt in prompts]


def _by_the_rules(item: Item, original: Shot, edited: Shot) -> list[_Question]:
    before, after = (
        _Question(each.shot, each.prompt, *_read(each.prompt.strip())) for each in _as_they_are(item, original, edited)
    )
    return _looked_for(item, before, after)


def _looked_for(item: Item, before: T, after: T) -> list[T]:
    """Nothing is on the original picture of what is added, nor on the edited one of what is deleted."""
    return {"add object": [after], "delete object": [before]}.get(item.kind, [before, after])


def _read(prompt: str) -> tuple[str, bool]:
    """What to ask for, and whether that itself is wanted."""
    if prompt.startswith("~"):
        words, wanted = _read_plain(prompt[1:].strip())
        return words, not wanted
    return _read_plain(prompt)


def _read_plain(prompt: str) -> tuple[str, bool]:
    if prompt != EVERYTHING and "background" in prompt.lower():
        return FOREGROUND, False
    return prompt, True


def _paired(answers: Sequence[Mask | str]) -> tuple[Mask, Mask] | str:
    reasons = [answer for answer in answers if isinstance(answer, str)]
    masks = [answer for answer in answers if not isinstance(answer, str)]
    if len(reasons) == 2 and reasons[0].replace("original picture", "edited picture") == reasons[1]:
        return reasons[1].replace("the edited picture", "either picture")
    return "; ".join(reasons) if reasons else (masks[0], masks[-1])


def _answers(segmenter: Segmenter, questions: Sequence[_Question]) -> list[Mask | str]:
    """The mask that each asks for, or why there is none."""
    found = iter(_found(segmenter, [question for question in questions if question.words != EVERYTHING]))
    return [_answer(segmenter, each, _whole(each) if each.words == EVERYTHING else next(found)) for each in questions]


def _whole(question: _Question) -> Mask:
    return np.ones(question.shot.picture.shape[:2], dtype=bool)


def _answer(segmenter: Segmenter, question: _Question, found: Mask | str) -> Mask | str:
    if isinstance(found, str):
        return found
    mask = found if question.wanted else ~found
    side, prompt = question.shot.side, question.prompt
    if not found.any() and not question.wanted:
        return (
            f"there is no mask of the {side} picture for {prompt!r}: {segmenter.name} finds no {question.words!r}, "
            "which was to be left out"
        )
    nothing = f"the mask of the {side} picture is empty: {segmenter.name} finds nothing for {prompt!r}"
    return mask if mask.any() else nothing


def _found(segmenter: Segmenter, questions: Sequence[_Question]) -> list[Mask | str]:
    """What the segmenter finds for the words of each; one that it refuses costs the others nothing."""
    if not (n := len(questions)):
        return []
    try:
        return _checked(segmenter, segmenter([each.shot for each in questions], [each.words for each in questions]), n)
    except ModelError:
        raise
    except KitError as error:
        if n > 1:
            half = n // 2
            return _found(segmenter, questions[:half]) + _found(segmenter, questions[half:])
        side, prompt = questions[0].shot.side, questions[0].prompt
        return [f"there is no mask of the {side} picture for {prompt!r}: {segmenter.name} says: {error}"]


def _checked(segmenter: Segmenter, masks: Any, n: int) -> list[Mask | str]:
    """The answer of a segmenter, which may be anyone's."""
    if not isinstance(masks, Sequence | np.ndarray) or len(masks) != n:
        found = f"{len(masks)}" if isinstance(masks, Sequence | np.ndarray) else f"{type(masks).__name__}"
        raise ModelError(
            f"The segmenter {segmenter.name!r} was asked for {n} masks and gave {found}. Give one for each."
        )
    for mask in masks:
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or not mask.size:
            found = f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise ModelError(f"The segmenter {segmenter.name!r} gives arrays (y, x) of bool as masks, not {found}.")
    return list(masks)


def check_asked(segmenter: Segmenter, items: Sequence[Item]) -> None:
    """Refuse, before anything is drawn, items of which it is clear that no mask will be found.

    Raises:
        KitError: masks are given and one is missing, or none of the words asked for are the tiny world's.
    """
    if isinstance(segmenter, GivenMasks):
        segmenter.check([item.name for item in items])
    if isinstance(segmenter, WorldSegmenter):
        prompts = (_looked_for(item, item.original_mask, item.edited_mask) for item in items)
        asked = [_read(prompt.strip())[0] for pair in prompts for prompt in pair]
        sought = [words for words in asked if words not in (EVERYTHING, FOREGROUND)]
        if sought and not set(sought) & set(segmenter.KNOWN):
            segmenter.check(sought)


# The tiny world and masks by hand -----------------------------------------------------------------------------------

_HALVES = {
    "object on the left": (slice(None), slice(None, SIZE // 2)),
    "object on the right": (slice(None), slice(SIZE // 2, None)),
    "object at the top": (slice(None, SIZE // 2), slice(None)),
    "object at the bottom": (slice(SIZE // 2, None), slice(None)),
}


class WorldSegmenter:
    """The embedded judge's masks, for pictures of the tiny world.

    It knows "object" and "foreground", which are all objects, and "object on the left", "on the right", "at the top"
    and "at the bottom": the objects that lie in that half of the picture. What spans both halves, such as two objects
    that touch, is cut between them.
    """

    KNOWN = ("object", FOREGROUND, *_HALVES)

    def __init__(self) -> None:
        self._judge = load_judge()
        self.name = f"world judge's masks {hash_file(WEIGHTS / 'judge' / FILE)[:8]}"

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Mask]:
        """One mask of 64 × 64 pixels for every shot.

        Raises:
            KitError: it does not know the words, or a picture has another size.
        """
        self.check(asked)
        pictures = [np.clip(shot.picture * 255, 0, 255).round().astype(np.uint8) for shot in shots]
        masks = self._judge.read([Image.fromarray(picture) for picture in pictures]).mask
        pairs = zip(masks, asked, strict=True)
        return [_in_half(mask, _HALVES[words]) if words in _HALVES else mask for mask, words in pairs]

    def check(self, asked: Sequence[str]) -> None:
        """Refuse words that it does not know.

        Raises:
            KitError: naming the first of them.
        """
        if words := next((words for words in asked if words not in self.KNOWN), None):
            raise KitError(
                f"The tiny world has no {words!r}, only {', '.join(self.KNOWN)}. Take load_items('world'), or "
                f"segmenter=AttentionSegmenter(pipe).{did_you_mean(words, self.KNOWN)}"
            )


def _in_half(mask: Bool[np.ndarray, "64 64"], half: tuple[slice, slice]) -> Bool[np.ndarray, "64 64"]:
    inside, found = np.zeros_like(mask), np.zeros_like(mask)
    inside[half] = True
    labels, n = ndimage.label(mask)
    for label in range(1, n + 1):
        component = labels == label
        share = inside[component].mean()
        if share >= WHOLE:
            found |= component
        elif share > 1 - WHOLE:
            found |= component & inside
    return found


class GivenMasks:
    """Masks made beforehand, by hand for example.

    Args:
        masks: of items by name. A tuple of two is (of the original picture, of the edited one); anything else is one
            for both: a map as an array or list, a picture, a polygon or a list of them, as `steer` takes for `where`.
            A token is in the mask where at least half of it is covered.

    Raises:
        KitError: it is no mapping, or one is no mask or empty.

    >>> segmenter = GivenMasks({"0007": Polygon([(0, 0), (0.5, 0), (0.5, 1), (0, 1)])})                # doctest: +SKIP
    """

    def __init__(self, masks: Mapping[str, Where | tuple[Where, Where]]) -> None:
        if not isinstance(masks, Mapping):
            raise KitError(
                f"GivenMasks takes a mapping such as {{'0007': mask}} by items' names, not {shortened(masks)}."
            )
        self._masks = {str(item): _pair(str(item), given) for item, given in masks.items()}
        bits = b"".join(
            f"{item}\n".encode() + np.packbits(pair).tobytes() for item, pair in sorted(self._masks.items())
        )
        self.name = f"given masks {sha256(bits)[:8]}"

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Mask]:
        """The mask given for each shot's item and side, whatever is asked; `GRID` rows and columns.

        Raises:
            KitError: there is none.
        """
        self.check([shot.item for shot in shots])
        return [self._masks[shot.item][shot.side == "edited"] for shot in shots]

    def check(self, names: Sequence[str]) -> None:
        """Refuse items that it has no mask for.

        Raises:
            KitError: naming the first of them.
        """
        if missing := [name for name in names if name not in self._masks]:
            raise KitError(
                f"No mask is given for item {missing[0]!r}; there are {len(self._masks)}. Add it to the masks."
                f"{did_you_mean(missing[0], self._masks)}"
            )


def _pair(item: str, given: Any) -> tuple[Mask, Mask]:
    if isinstance(given, tuple) and len(given) == 2:
        return _filled(item, given[0]), _filled(item, given[1])
    both = _filled(item, given)
    return both, both


def _filled(item: str, where: Any) -> Mask:
    try:
        covered = as_mask(where, (GRID, GRID)).numpy()
    except KitError as error:
        raise KitError(f"GivenMasks: the mask of item {item!r} is none: {error}") from None
    if len(covered) != 1:
        raise KitError(
            f"GivenMasks: item {item!r} has {len(covered)} masks in one array. Pass (original, edited) as a tuple."
        )
    mask = np.asarray(covered[0] >= 0.5)
    if not mask.any():
        raise KitError(
            f"GivenMasks: the mask of item {item!r} is empty: it covers no token by half. Give a larger one."
        )
    return mask


def segmenter_of(pipe: Any) -> Segmenter | None:
    """The segmenter that comes with a model: the embedded one's; others have none."""
    return WorldSegmenter() if describe(pipe).name in NAMES else None

"""What is measured of pictures that an edit made, beside the pictures of the two prompts that it stands between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from sdxl_sae_kit.items import Item
from sdxl_sae_kit.judges import PictureJudge, Pictures, TextJudge
from sdxl_sae_kit.masks import covered
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import FACTORS

MEASURES = (
    "reached", "target", "kept", "outside", "pixel", "to original", "to edited", "image similarity", "text similarity"
)  # fmt: skip

Pair = tuple[Bool[np.ndarray, "_y _x"], Bool[np.ndarray, "_y _x"]]
"""Masks on the picture of the original prompt and of the edited one; each of any size covers the whole picture."""
Told = Mapping[str, Float[np.ndarray, "image answer"]]
"""As `PictureJudge.factors` tells them."""
Values = list[float | None]
"""One for every image; None where the judge cannot tell."""


@dataclass(frozen=True)
class Scoring:
    """Measures pictures made of a batch of items, one for each; what the judge cannot tell is None.

    `reached` is 1 where the judge's likeliest answer to every factor that the item wants is the wanted value, `target`
    the least probability of those values; most items want one, an added object also its shape and colour. `kept` is the
    share of the item's other factors whose likeliest answer is that of the original picture (see `kept`); `outside` the
    mean, outside both masks, of the judge's perceptual map, or of the pixels' difference where it has none; `pixel` the
    mean difference to the original, colours being 0 to 1; `to original` and `to edited` the mean perceptual map to the
    picture of either prompt; `image similarity` 1 − the semantic distance to the picture of the edited prompt; `text
    similarity` what a judge that reads texts says of the edited prompt, else the mean probability of what the edited
    scene should be said to show.
    """

    judge: PictureJudge | None
    items: Sequence[Item]
    masks: Sequence[Pair] = field(repr=False)
    original: Pictures = field(repr=False)
    edited: Pictures = field(repr=False)

    def __call__(self, pictures: Pictures) -> list[dict[str, float | None]]:
        """Every one of `MEASURES`, picture by picture."""
        told = self.judge.factors(pictures) if self.judge else None
        change = np.abs(pictures - self.original).mean(axis=3, dtype=np.float64)
        from_original, from_edited = (self._map(before, pictures) for before in (self.original, self.edited))
        reached, target = answered(told, [item.wanted for item in self.items])
        columns = {
            "reached": reached,
            "target": target,
            "kept": kept(self._before, told, [item.others for item in self.items]),
            "outside": outside(change if from_original is None else from_original, self.masks),
            "pixel": change.mean(axis=(1, 2)).tolist(),
            "to original": self._means(from_original),
            "to edited": self._means(from_edited),
            "image similarity": self._alike(pictures),
            "text similarity": self._as_told(pictures, told),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @cached_property
    def _before(self) -> Told | None:
        return self.judge.factors(self.original) if self.judge else None

    def _map(self, before: Pictures, pictures: Pictures) -> Float[np.ndarray, "image y x"] | None:
        return self.judge.perceptual(before, pictures) if self.judge else None

    def _means(self, maps: Float[np.ndarray, "image y x"] | None) -> Values:
        return self._unknown if maps is None else maps.mean(axis=(1, 2), dtype=np.float64).tolist()

    def _alike(self, pictures: Pictures) -> Values:
        apart = self.judge.semantic(self.edited, pictures) if self.judge else None
        return self._unknown if apart is None else [1 - float(each) for each in apart]

    def _as_told(self, pictures: Pictures, told: Told | None) -> Values:
        if isinstance(self.judge, TextJudge):
            return [float(each) for each in self.judge.textual(pictures, [item.edited for item in self.items])]
        return expected(told, self.items)

    @property
    def _unknown(self) -> Values:
        return [None] * len(self.items)


def answered(told: Told | None, wanted: Sequence[Mapping[str, str]]) -> tuple[Values, Values]:
    """Whether each wanted value is the likeliest answer to its factor (1 or 0), and the least probability of them.

    The least, and no product, so that it means the same for items that want one value and those that want several.
    """
    reached: Values = []
    target: Values = []
    for image, values in enumerate(wanted):
        answers = [_answer(told, image, *each) for each in values.items()]
        found = [answer for answer in answers if answer is not None]
        known = bool(answers) and len(found) == len(answers)
        reached.append(min(likeliest for _, likeliest in found) if known else None)
        target.append(min(probability for probability, _ in found) if known else None)
    return reached, target


def kept(before: Told | None, after: Told | None, others: Sequence[Sequence[tuple[str, str]]]) -> Values:
    """The share of these factors, image by image, whose likeliest answer is the same before and after.

    Each comes with its name on the original picture and on the edited one, as an object that stays may be the judge's
    second of two where another comes or goes. What was said of the first name may be said of either: an edit that did
    nothing has kept all, and one that succeeded, too. (So a colour counts as kept where it is found on the object that
    came or should have gone alone.)
    """
    if before is None or after is None:
        return [None] * len(others)
    was, now = ({factor: each.argmax(axis=1) for factor, each in told.items()} for told in (before, after))
    by_image = [
        [
            any(was[one][image] == now[name][image] for name in (one, other))
            for one, other in each
            if one in was and {one, other} <= now.keys()
        ]
        for image, each in enumerate(others)
    ]
    return [float(np.mean(same)) if same else None for same in by_image]


def outside(maps: Float[np.ndarray, "image y x"], masks: Sequence[Pair]) -> Values:
    """The mean of each map over the places that neither of its masks covers; None where there are none."""
    size = maps.shape[1], maps.shape[2]
    free = [~(covered(one, size) | covered(other, size)) for one, other in masks]
    return [
        float(each[there].mean(dtype=np.float64)) if there.any() else None
        for each, there in zip(maps, free, strict=True)
    ]


def expected(told: Told | None, items: Sequence[Item]) -> Values:
    """The mean probability of all that the judge should say of each item's edited scene, where that is known."""
    values: Values = []
    for image, item in enumerate(items):
        answers = expected_answers(item.after) if item.after else {}
        found = [answer for each in answers.items() if (answer := _answer(told, image, *each))]
        values.append(float(np.mean([probability for probability, _ in found])) if found else None)
    return values


def _answer(told: Told | None, image: int, factor: str, value: str | None) -> tuple[float, float] | None:
    """The probability of a factor's value, None being none of them, and whether it is the likeliest: 1 or 0."""
    known = (*FACTORS.get(factor, ()), None)
    if not told or factor not in told or value not in known:
        return None
    probabilities = told[factor][image]
    place = known.index(value)
    return float(probabilities[place]), float(probabilities.argmax() == place)

"""Labels over denoising steps: how well latents chosen elsewhere tell what images show, and when that rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from sdxl_sae_kit.questions import ROLES, Question
from sdxl_sae_kit.recovery import Choice, Estimate, area_of, mean_of

MEAN = "all"
"""Names the mean over all values of all factors, and that over all steps."""

_DRAWS = 500

Strengths = Float[np.ndarray, "image row candidate"]


def can_be_told(questions: Sequence[Question]) -> bool:
    """Whether some images show each value, and some do not."""
    shown = (question.shows[question.asked] for question in questions)
    return all(bool((shows.any(axis=0) & ~shows.all(axis=0)).all()) for shows in shown)


@dataclass(frozen=True)
class Asked:
    """Images of one cache, what they are asked, and what was chosen elsewhere to answer."""

    questions: Sequence[Question]
    choices: Mapping[str, Sequence[Sequence[Choice]]]
    """By kind of candidate, of each question, for each value."""
    strengths: Mapping[str, Strengths]
    """By kind, of every candidate in every image; first the kind that the others are compared with."""
    texts: Sequence[str]
    """The images' prompts, which are resampled as a whole: images that differ in their seeds are alike."""

    @property
    def n_images(self) -> int:
        """How many."""
        return len(self.questions[0].asked)

    @cached_property
    def draws(self) -> Int[np.ndarray, "sample image"]:
        """How often each bootstrap sample of the prompts holds each image."""
        names, prompts = np.unique(np.asarray(self.texts), return_inverse=True)
        n = len(names)
        return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)[:, prompts]

    @cached_property
    def _draws(self) -> list[Int[np.ndarray, "sample asked"]]:
        """Of the images that each question is asked of."""
        return [self.draws[:, question.asked] for question in self.questions]

    @cached_property
    def areas(self) -> list[list[list[dict[str, Estimate]]]]:
        """At each row, of each question, for each value, the AUC of every kind of candidate."""
        return [
            [
                [self._areas(at, value, row) for value in range(len(question.values))]
                for at, question in enumerate(self.questions)
            ]
            for row in range(next(iter(self.strengths.values())).shape[1])
        ]

    def _areas(self, at: int, value: int, row: int) -> dict[str, Estimate]:
        asked, shows = self.questions[at].asked, self.questions[at].shows[:, value]
        draws = self._draws[at]
        return {
            kind: area_of(_signed(of[asked, row], self.choices[kind][at][value]), shows[asked], draws)
            for kind, of in self.strengths.items()
        }

    def groups(self) -> dict[tuple[str, str], list[int]]:
        """Which questions belong to each factor, to each role, and to all."""
        names = [question.factor for question in self.questions]
        found = {("factor", name): [at] for at, name in enumerate(names)}
        found |= {("role", role): [at for at, name in enumerate(names) if name in of] for role, of in ROLES.items()}
        found[MEAN, MEAN] = list(range(len(names)))
        return {group: places for group, places in found.items() if places}

    def rows(self, places: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """AUC by group and kind at each of these sets of rows, with what names it, as means over values and rows.

        `SAE − this` is how far the first kind is ahead on the same images. All with 95 % intervals over prompts.
        """
        found = []
        for rows, place in places:
            for (group, name), members in self.groups().items():
                told = [each for row in rows for at in members for each in self.areas[row][at]]
                means = mean_of(told)
                first = next(iter(means.values()))
                for kind, (value, samples) in means.items():
                    found.append(
                        {"group": group, "name": name, **place, "who": kind}
                        | {"AUC": value, "AUC interval": _end(samples)}
                        | {"SAE − this": first.value - value, "SAE − this interval": _end(first.samples - samples)}
                        | {"values": len(told) // len(rows), "images": self.n_images, "prompts": len(set(self.texts))}
                    )
        return found

    def roles(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Role by role, what each kind of candidate does at these rows: see `Generalization.trajectories`."""
        found = []
        for (group, role), members in self.groups().items():
            if group != "role":
                continue
            for kind in self.strengths:
                told = [mean_of([value for at in members for value in self.areas[row][at]])[kind] for row in rows]
                value, samples = np.array([e.value for e in told]), np.stack([e.samples for e in told], axis=1)
                strength = self._strength(kind, members, rows)
                found.append(
                    {"role": role, "who": kind, "AUC": value.tolist(), "AUC interval": _ends(samples)}
                    | {"strength": _or_null(strength[0]), "strength interval": _ends(strength[1:])}
                    | _rises(value, samples)
                    | {"values": sum(len(self.questions[at].values) for at in members), "images": self.n_images}
                )
        return found

    def _strength(self, kind: str, members: Sequence[int], rows: Sequence[int]) -> Float[np.ndarray, "sample row"]:
        """The lead of images that show a value, relative to its greatest; first that of all images.

        In units of the candidate's standard deviation over images and rows, so that values count alike, and averaged
        over them before it is put in relation: a candidate that tells nothing has no greatest to speak of.
        """
        leads = []
        for at in members:
            question = self.questions[at]
            draws = np.concatenate([np.ones_like(self._draws[at][:1]), self._draws[at]]).astype(np.float64)
            for value, shows in enumerate(question.shows[question.asked].T):
                strengths = self.strengths[kind][question.asked][:, rows].astype(np.float64)
                signed = _signed(strengths, self.choices[kind][at][value])
                with np.errstate(invalid="ignore"):  # a sample may hold no image that shows the value
                    lead = _mean(draws, signed, shows) - _mean(draws, signed, ~shows)
                leads.append(lead / (signed.std() or 1))
        told = np.isfinite(leads)
        mean = np.where(told, leads, 0).sum(axis=0) / np.where(told.any(axis=0), told.sum(axis=0), np.nan)
        greatest = mean.max(axis=1, keepdims=True)
        return np.asarray(mean / np.where(greatest > 0, greatest, np.nan))


def _signed(strengths: Float[np.ndarray, "*image candidate"], choice: Choice) -> NDArray[np.floating]:
    """What is strong where the value is told: by the chosen candidate's strength, or by its lack."""
    signed: NDArray[np.floating] = strengths[..., choice.candidate] * (1 if choice.fires else -1)
    return signed


def _mean(
    draws: Float[np.ndarray, "sample image"], values: Float[np.ndarray, "image row"], of: Bool[np.ndarray, " image"]
) -> Float[np.ndarray, "sample row"]:
    """Mean over some images in every sample; NaN where it holds none of them."""
    mean: NDArray[np.float64] = draws[:, of] @ values[of] / draws[:, of].sum(axis=1, keepdims=True)
    return mean


def _rises(areas: Float[np.ndarray, " step"], samples: Float[np.ndarray, "sample step"]) -> dict[str, Any]:
    """Where AUC rises, with its interval; None unless the interval of the greatest AUC lies above ½."""
    best = int(np.argmax(areas))
    if not np.nanquantile(samples[:, best], 0.025) > 0.5:
        return {"rises at": None, "rises at interval": [None, None]}
    ends = np.quantile([_rise(each) for each in samples], [0.025, 0.975], method="nearest")
    return {"rises at": _rise(areas), "rises at interval": ends.astype(int).tolist()}


def _rise(areas: Float[np.ndarray, " step"]) -> int:
    """The first step at which AUC − ½ reaches half of its greatest."""
    lead = np.nan_to_num(areas - 0.5)
    return int(np.argmax(lead >= lead.max() / 2))


def _or_null(numbers: Float[np.ndarray, " step"]) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [None if np.isnan(number) else number for number in numbers.tolist()]


def _end(samples: Float[np.ndarray, " sample"]) -> list[float]:
    """A 95 % interval."""
    ends: list[float] = np.nanquantile(samples, [0.025, 0.975]).tolist()
    return ends


def _ends(samples: Float[np.ndarray, "sample step"]) -> list[list[float | None]]:
    """95 % intervals, step by step."""
    known = ~np.isnan(samples).all(axis=0)
    ends = np.full((2, samples.shape[1]), np.nan)
    ends[:, known] = np.nanquantile(samples[:, known], [0.025, 0.975], axis=0)
    return [_or_null(end) for end in ends.T]

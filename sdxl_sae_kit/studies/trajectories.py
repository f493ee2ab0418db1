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
"""Names the mean over all values of all factors."""

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
    """By kind, of every candidate in every image."""

    @property
    def n_images(self) -> int:
        """How many."""
        return len(self.questions[0].asked)

    @cached_property
    def draws(self) -> Int[np.ndarray, "sample image"]:
        """How often each bootstrap sample holds each image."""
        n = self.n_images
        return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)

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

    def rows(self, places: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """AUC by row, group and kind, means over values, with 95 % intervals over images; `places` names the rows."""
        found = []
        for row, place in places.items():
            for (group, name), members in self.groups().items():
                told = [each for at in members for each in self.areas[row][at]]
                for kind, estimate in mean_of(told).items():
                    interval = np.nanquantile(estimate.samples, [0.025, 0.975]).tolist()
                    found.append(
                        {"group": group, "name": name, **place, "who": kind, "AUC": estimate.value}
                        | {"AUC interval": interval, "values": len(told), "images": self.n_images}
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
                    | {"rises at": _rise(value), "rises at interval": _range([_rise(each) for each in samples])}
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
                leads.append(np.nan_to_num(lead / (signed.std() or 1)))
        mean = np.mean(leads, axis=0)
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


def _rise(areas: Float[np.ndarray, " step"]) -> int:
    """The first step at which AUC − ½ reaches half of its greatest; the first of all if it is nowhere above ½."""
    lead = np.nan_to_num(areas - 0.5)
    return int(np.argmax(lead >= lead.max() / 2)) if lead.max() > 0 else 0


def _or_null(numbers: Float[np.ndarray, " step"]) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [None if np.isnan(number) else number for number in numbers.tolist()]


def _range(rises: Sequence[int]) -> list[int]:
    return [int(end) for end in np.quantile(rises, [0.025, 0.975], method="nearest")]


def _ends(samples: Float[np.ndarray, "sample step"]) -> list[list[float | None]]:
    """95 % intervals, step by step."""
    known = ~np.isnan(samples).all(axis=0)
    ends = np.full((2, samples.shape[1]), np.nan)
    ends[:, known] = np.nanquantile(samples[:, known], [0.025, 0.975], axis=0)
    return [_or_null(end) for end in ends.T]

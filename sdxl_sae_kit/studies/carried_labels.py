"""Whether what was chosen on a source's images to tell what they show tells it of a target's, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.questions import Question, ask
from sdxl_sae_kit.recovery import Choice, choose, either_end, spread, strongest
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.carryover import AXIS, CHANNEL, OWN, TRAINED
from sdxl_sae_kit.studies.fidelity import Axes, Measured
from sdxl_sae_kit.studies.trajectories import MEAN, Asked, can_be_told

_Strength = Callable[[Tensor], Tensor]
"""What gives every candidate's strength in every image: of (image, token, d_in) the (image, candidate)."""


def carried_labels(
    saes: Mapping[str, SAE],
    axes: Axes,
    cache: Activations,
    target: Activations,
    here: Mapping[str, Measured],
    there: Mapping[str, Measured],
    places: Int[np.ndarray, " image"],
) -> dict[str, Any]:
    """How well latents, channels and axes chosen on the source's training images tell what the target's show.

    Chosen at the source's first step; those of an SAE trained on the target on its training images, by their maximum
    over all its steps. Without factors, or too few images that show them, the reason why not.

    Args:
        saes: those of `carryover.TRAINED`, `UNTRAINED` and perhaps `OWN`.
        axes: the source's principal axes.
        cache: the source.
        target: what its held-out images show is told.
        here, there: what the SAEs make of the images that are shared, in the source, and of the target's.
        places: where each of the target's is in the source, or −1.
    """
    hookpoint, texts = saes[TRAINED].hookpoint, np.array(target.prompts.texts)
    train, trained, images = spread(cache.images("train")), target.images("train"), target.images("held_out")
    several = ((cache, train), (target, trained if OWN in saes else trained[:0]), (target, images))
    factors = [of.prompts.factors[image] for of, some in several for image in some.tolist()]
    part = np.repeat(range(3), [len(some) for _, some in several])
    try:
        questions = ask(target.name, factors, part < 2)
    except KitError as reason:
        return _left_out(str(reason))
    questions = [question for question in questions if can_be_told([_only(question, part == 0)])]
    if not questions:
        return _left_out("no training image of the source shows what the target's do. Collect more prompts.")
    of_source, of_target, asked = ([_only(question, part == at) for question in questions] for at in range(3))
    latents = {who: _strongest(sae) for who, sae in saes.items() if who != OWN}
    parts: dict[str, _Strength] = {CHANNEL: either_end, AXIS: lambda x: either_end(x @ axes.axes.to(x).T)}
    choices = _choices(latents | parts, cache, hookpoint, steps_of(cache)[:1], train, of_source)
    if OWN in saes and can_be_told(of_target):
        latents |= {OWN: _strongest(saes[OWN])}
        choices |= _choices({OWN: latents[OWN]}, target, hookpoint, steps_of(target), trained, of_target)
    strengths = {who: there[who].peak for who in latents} | _peaks(parts, target, hookpoint, images)
    told = Asked(asked, choices, strengths, texts[images].tolist())
    rows, common = told.rows(_named(target, "target")), places >= 0
    if can_be_told(shared := [_only(question, common) for question in asked]):
        known = {who: here[who].peak for who in latents if who != OWN}
        known |= _peaks(parts, cache, hookpoint, places[common])
        rows = Asked(shared, choices, known, texts[images[common]].tolist()).rows(_named(cache, "source")) + rows
    roles = told.roles(steps_of(target))
    return {"labels": rows, "roles": roles, "chosen": _chosen(questions, choices[TRAINED]), "no labels": ""}


def _left_out(reason: str) -> dict[str, Any]:
    return {"labels": [], "roles": [], "chosen": [], "no labels": reason}


def _strongest(sae: SAE) -> _Strength:
    return lambda x: strongest(sae, x.to(sae.W_enc))


def _choices(
    kinds: Mapping[str, _Strength],
    cache: Activations,
    hookpoint: str,
    rows: Sequence[int],
    images: Int[np.ndarray, " image"],
    questions: Sequence[Question],
) -> dict[str, list[list[Choice]]]:
    """By kind, the candidate whose maximum over the tokens of these rows tells each value best of these images."""
    everyone = np.ones(len(images), dtype=bool)
    found = _peaks(kinds, cache, hookpoint, images, rows)
    return {kind: choose(questions, peaks.max(axis=1), everyone, hookpoint) for kind, peaks in found.items()}


@torch.no_grad()
def _peaks(
    kinds: Mapping[str, _Strength],
    cache: Activations,
    hookpoint: str,
    images: Int[np.ndarray, " image"],
    rows: Sequence[int] | slice = slice(None),
) -> dict[str, NDArray[np.float32]]:
    """By kind, every candidate's strength in each update of these rows: (image, row, candidate)."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for part in cache.parts(hookpoint, images):
        x = cache.read(hookpoint, part)[:, rows].float()
        for kind, strength in kinds.items():
            found[kind].append(strength(x.flatten(0, 1)).unflatten(0, x.shape[:2]).cpu())
    return {kind: torch.cat(each).numpy() for kind, each in found.items()}


def _only(question: Question, images: Bool[np.ndarray, " image"]) -> Question:
    return question._replace(asked=question.asked[images], shows=question.shows[images])


def steps_of(cache: Activations) -> list[int]:
    """The rows of one half, step by step: cond, where it has both."""
    halves = len(cache.layout.halves)
    return list(range(halves - 1, cache.rows_per_image, halves))


def _named(cache: Activations, place: str) -> list[tuple[list[int], dict[str, Any]]]:
    """Each of a cache's rows with what tells it apart, and last all steps of one half together."""
    halves = cache.layout.halves
    rows: list[tuple[list[int], int | str, str]] = [
        ([cache.row(step, half)], step, half) for step in cache.layout.steps for half in halves
    ]
    rows += [(steps_of(cache), MEAN, halves[-1])]
    return [(members, {"updates of": place, "step": step, "half": half}) for members, step, half in rows]


def _chosen(questions: Sequence[Question], choices: Sequence[Sequence[Choice]]) -> list[dict[str, Any]]:
    return [
        {"factor": question.factor, "value": value, "latent": choice.candidate}
        | {"tells by": "firing" if choice.fires else "silence", "AUC there": choice.area}
        for question, of_values in zip(questions, choices, strict=True)
        for value, choice in zip(question.values, of_values, strict=True)
    ]

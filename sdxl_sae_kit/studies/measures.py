"""What a changed picture differs in from the same picture as it was, inside and outside a feature's region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sdxl_sae_kit.judges import PictureJudge
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.studies.controls import HARDEST, at_dose
from sdxl_sae_kit.studies.pairs import Key, Pairs
from sdxl_sae_kit.studies.statistics import read_doses

MEASURES = ("pixel", "perceptual", "semantic")
"""Mean |difference| of colours 0 to 1; the judge's map of how different it looks; its distance of what they show."""
DOSED = ("ablated", HARDEST)
"""The conditions that are drawn at every dose."""
MIN_DOSES = 3
"""Fewer cannot be in any order that tells something."""


def measure(
    pairs: Pairs, others: Mapping[int, int], doses: Sequence[float], judge: PictureJudge | None, pixels: int
) -> dict[str, Any]:
    """One line of results: of every feature that fires on this image what each condition changed.

    `others` gives the feature that is turned off as a control, `doses` includes 0 (ablated) and 1 (as it is), `pixels`
    is how many there are across a token. Means are over the pixels of the tokens on which the feature fires in the
    image as it is, and over the others (None where there are none).
    """
    seen = _judged(pairs, judge)
    found: dict[str, Any] = {}
    for feature in dict.fromkeys(feature for feature, _ in pairs.order.changes):
        fires = pairs.z[..., feature] > FIRES
        if fires.any():
            found[str(feature)] = _measure_feature(pairs, feature, enlarged(fires, pixels), doses, seen) | {
                "overlap": float((pairs.z[..., others[feature]] > FIRES)[fires].mean())
            }
    return {"answers": seen["answers"], "features": found}


def _judged(pairs: Pairs, judge: PictureJudge | None) -> dict[str, Any]:
    """What the judge says of all of an image's pictures at once; what it cannot tell is None."""
    if judge is None:
        return dict.fromkeys(["perceptual", "semantic", "changed", "answers"])
    clean, after = pairs.clean[None], np.stack([edited for _, edited in pairs.pictures.values()])
    before, told = judge.factors(clean), judge.factors(after)
    changed = answers = None
    if before is not None and told is not None:  # the likeliest answer, none among them
        answers = {factor: int(p[0].argmax()) for factor, p in before.items()}
        changed = [
            [factor for factor, p in told.items() if int(p[row].argmax()) != answers[factor]]
            for row in range(len(after))
        ]
    perceptual, semantic = judge.perceptual(clean, after), judge.semantic(clean, after)
    return {"perceptual": perceptual, "semantic": semantic, "changed": changed, "answers": answers}


def _measure_feature(
    pairs: Pairs, feature: int, region: Bool[np.ndarray, "y x"], doses: Sequence[float], seen: Mapping[str, Any]
) -> dict[str, Any]:
    effects: dict[str, dict[str, Any]] = {}
    for row, ((mine, condition), (clean, edited)) in enumerate(pairs.pictures.items()):
        if mine != feature:
            continue
        effects[condition] = {"pixel": inside_and_outside(np.abs(edited - clean).mean(axis=2), region)}
        if seen["perceptual"] is not None:
            effects[condition]["perceptual"] = inside_and_outside(seen["perceptual"][row], region)
        if seen["semantic"] is not None:
            effects[condition]["semantic"] = [float(seen["semantic"][row]), None]
        if seen["changed"] is not None:
            effects[condition]["changed"] = seen["changed"][row]
    readings = {condition: _readings(pairs, feature, condition, region, doses) for condition in DOSED}
    return {"area": float(region.mean()), "effects": effects, "readings": readings if len(doses) >= MIN_DOSES else None}


def _readings(
    pairs: Pairs, feature: int, condition: str, region: Bool[np.ndarray, "y x"], doses: Sequence[float]
) -> list[float]:
    """The dose that can be read off each dose's picture inside the region."""
    changes = []
    for dose in doses:
        clean, edited = pairs.pictures[dose_key(feature, 0 if dose == 1 else dose, condition)]
        changes.append((clean - clean if dose == 1 else edited - clean)[region])
    return [float(reading) for reading in read_doses(doses, np.stack(changes).reshape(len(doses), -1))]


def dose_key(feature: int, dose: float, condition: str) -> Key:
    """Which picture shows a feature, or its control, at a dose."""
    return feature, condition if dose == 0 else at_dose(condition, dose)


def inside_and_outside(change: Float[np.ndarray, "y x"], region: Bool[np.ndarray, "y x"]) -> list[float | None]:
    """Mean change over the pixels of a region, and over the others; None where there are none."""
    return [float(change[where].mean(dtype=np.float64)) if where.any() else None for where in (region, ~region)]


def enlarged(tokens: Bool[np.ndarray, "height width"], pixels: int) -> Bool[np.ndarray, "y x"]:
    """The pixels of these tokens, each of which is so many across."""
    return tokens.repeat(pixels, axis=0).repeat(pixels, axis=1)

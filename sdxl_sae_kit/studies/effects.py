"""What every change of one feature did to every picture, and what that says of a feature and of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.search import MIN_IMAGES
from sdxl_sae_kit.studies.controls import CONDITIONS, CONTROLS, at_dose
from sdxl_sae_kit.studies.measures import DOSED
from sdxl_sae_kit.studies.statistics import by_cluster, rank_correlation, sign_flip_p

Values = Float[np.ndarray, "cluster"]


@dataclass(frozen=True)
class FeatureEffects:
    """The effects of one feature and of its controls, image by image; all else is computed from them.

    An image on which the feature does not fire has none. `area` is the region's share of the picture, `overlap` the
    share of it on which the control's other feature fires too, both at most 1.
    """

    feature: int
    other_feature: int
    """The one that is turned off as a control."""
    images: Sequence[int] = field(repr=False)
    """Numbers of the images in this study."""
    prompts: Sequence[str] = field(repr=False)
    seeds: Sequence[int] = field(repr=False)
    lines: Sequence[Mapping[str, Any]] = field(repr=False)
    """What `measures.measure` found of this feature on each image."""
    answers: Sequence[Mapping[str, int] | None] = field(repr=False)
    """The judge's answer to every factor of each image as it is."""

    @property
    def skipped(self) -> str:
        """Why nothing is said of it; empty where something is."""
        n = len(set(self.prompts))
        return f"it fires on images of {n} prompts, and {MIN_IMAGES} are the least" if n < MIN_IMAGES else ""

    @property
    def area(self) -> list[float]:
        """The region's share of every image."""
        return [float(line["area"]) for line in self.lines]

    @property
    def overlap(self) -> float:
        """Mean over prompts of the share of the region on which the control's other feature fires too."""
        return float(by_cluster(np.array([line["overlap"] for line in self.lines], np.float64), self.prompts).mean())

    def values(self, condition: str, measure: str) -> Float[np.ndarray, "image 2"]:
        """An effect inside and outside the region of every image; NaN where there is no such place."""
        found = [line["effects"][condition][measure] for line in self.lines]
        return np.array([[np.nan if value is None else value for value in pair] for pair in found]).reshape(-1, 2)

    def clustered(
        self, measure: str, conditions: Sequence[str] = CONDITIONS
    ) -> Float[np.ndarray, "cluster condition 2"]:
        """The same for several conditions, averaged over the images of each prompt."""
        return by_cluster(np.stack([self.values(c, measure) for c in conditions], axis=1), self.prompts)

    def inside(self, condition: str, measure: str) -> Values:
        """The effect inside the region by prompt."""
        return by_cluster(self.values(condition, measure)[:, 0], self.prompts)

    def response(self, condition: str, dose: float, measure: str) -> Values:
        """The same at a dose: nothing at 1, which is the image as it is."""
        if dose == 1:
            return np.zeros(len(set(self.prompts)))
        return self.inside(condition if dose == 0 else at_dose(condition, dose), measure)

    def changed(self, condition: str, factor: str) -> Values:
        """The share of each prompt's images in which the judge's answer to a factor changed."""
        flags = [factor in line["effects"][condition]["changed"] for line in self.lines]
        return by_cluster(np.array(flags, np.float64), self.prompts)

    def changed_beyond(self, condition: str, factors: Sequence[str]) -> Values:
        """The share of each prompt's images in which an answer to any other factor changed."""
        flags = [bool(set(line["effects"][condition]["changed"]) - set(factors)) for line in self.lines]
        return by_cluster(np.array(flags, np.float64), self.prompts)

    def readings(self, condition: str) -> Float[np.ndarray, "image dose"]:
        """The doses read off the pictures."""
        return np.array([line["readings"][condition] for line in self.lines])

    def in_order(self, doses: Sequence[float], condition: str) -> tuple[Values, Values]:
        """By prompt: the share of images whose readings rise with every dose, and their mean Spearman's ρ."""
        readings = self.readings(condition)
        rises = np.asarray((np.diff(readings, axis=1) > 0).all(axis=1), np.float64)
        rho = np.array([rank_correlation(doses, each) for each in readings], np.float64)
        return by_cluster(rises, self.prompts), by_cluster(rho, self.prompts)


def compare(
    inside: Float[np.ndarray, "unit condition"], paired: Float[np.ndarray, "paired condition 2"]
) -> dict[str, Any]:
    """Means, localities and differences with intervals over units, which are prompts or features.

    What concerns the outside, and the inside beside it, is over the `with outside` units that have one.
    """
    row: dict[str, Any] = {"with outside": len(paired)}
    for at, condition in enumerate(CONDITIONS):
        row |= estimate(condition, inside[:, at])
        means = paired[:, at].mean(axis=0) if len(paired) else np.full(2, np.nan)
        row[f"{condition} outside"] = float(means[1])
        row[f"{condition} locality"] = float(_ratio(means))
        row[f"{condition} locality interval"] = bootstrap_interval(paired[:, at], _ratio)
    for at, control in enumerate(CONTROLS, 1):
        row |= estimate(f"ablated − {control}", inside[:, 0] - inside[:, at])
    return row


def compare_feature(effects: FeatureEffects, measure: str) -> dict[str, Any]:
    """A feature's row: `compare` over its prompts, and p-values against every control; `p` is the largest of them.

    That one is the p-value of being above all controls at once (an intersection–union test).
    """
    clusters = effects.clustered(measure)
    inside, paired = clusters[..., 0], _with_outside(clusters)
    paired = paired[: len(paired) if len(paired) >= MIN_IMAGES else 0]
    p = {f"p {c}": sign_flip_p(inside[:, 0] - inside[:, at]) for at, c in enumerate(CONTROLS, 1)}
    counts = {"feature": effects.feature, "images": len(effects.images), "prompts": len(inside)}
    return counts | compare(inside, paired) | p | {"p": max(p.values())}


def compare_all(features: Sequence[FeatureEffects], measure: str) -> dict[str, Any]:
    """The same over features, each counting once: intervals resample them, for images of one feature are alike.

    Of one feature alone they are over its prompts; `over` says which.
    """
    clusters = [effects.clustered(measure) for effects in features]
    inside = as_units([each[..., 0] for each in clusters]).reshape(-1, len(CONDITIONS))
    enough = [both for both in map(_with_outside, clusters) if len(both) >= MIN_IMAGES]
    paired = as_units(enough) if len(features) == 1 else np.array([both.mean(axis=0) for both in enough])
    overlap = float(np.mean([effects.overlap for effects in features])) if features else float("nan")
    counts = {"features": len(features), "images": sum(len(effects.images) for effects in features)}
    over = {"over": f"{len(inside)} {'prompts' if len(features) == 1 else 'features'}", "overlap": overlap}
    return counts | over | compare(inside, paired.reshape(-1, len(CONDITIONS), 2))


def describe_order(orders: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Any]:
    """Of the feature and its control: the share `monotone` and `rho` (see `in_order`), with intervals over units."""
    row: dict[str, Any] = {}
    for condition, values in orders.items():
        for name, each in zip(("monotone", "rho"), values, strict=True):
            row |= estimate(name if condition == "ablated" else f"{name}, {condition}", each)
    return row


def order_of(effects: FeatureEffects, doses: Sequence[float]) -> dict[str, Any]:
    """Whether the readings of one feature rise with the dose, over its prompts."""
    return describe_order({condition: effects.in_order(doses, condition) for condition in DOSED})


def order_of_all(features: Sequence[FeatureEffects], doses: Sequence[float]) -> dict[str, Any]:
    """The same over features, each counting once; of one feature alone, over its prompts."""
    orders = {}
    for condition in DOSED:
        rises, rho = zip(*(effects.in_order(doses, condition) for effects in features), strict=True)
        orders[condition] = as_units(rises), as_units(rho)
    return describe_order(orders)


def as_units(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """What intervals are over: features, each by the mean of its prompts; of one feature alone, its prompts."""
    if len(values) == 1:
        return values[0]
    return np.array([each.mean(axis=0) for each in values], np.float64)


def estimate(name: str, values: Float[np.ndarray, "unit"]) -> dict[str, Any]:
    """A mean and its 95 % bootstrap interval over units."""
    return {name: float(values.mean()) if len(values) else float("nan"), f"{name} interval": bootstrap_interval(values)}


def _with_outside(clusters: Float[np.ndarray, "cluster condition 2"]) -> Float[np.ndarray, "paired condition 2"]:
    return np.asarray(clusters[np.isfinite(clusters[:, 0, 1])])


def _ratio(means: Float[np.ndarray, "*draw 2"]) -> Float[np.ndarray, "*draw"]:
    inside, outside = means[..., 0], means[..., 1]
    return np.asarray(np.divide(inside, outside, out=np.full_like(inside, np.nan), where=outside > 0))

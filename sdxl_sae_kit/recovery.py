"""Recovery: how well single latents of SAEs tell what is known of the images, beside channels, PCA and chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.hookpoints import by_hookpoint
from sdxl_sae_kit.maps import confusion_map
from sdxl_sae_kit.metrics import areas_under_curve, resampled_areas
from sdxl_sae_kit.questions import Question, ask_of
from sdxl_sae_kit.sae import SAE

Row = dict[str, Any]
SAEs = SAE | Mapping[Any, SAE] | Iterable[SAE]

MAX_IMAGES = 2048
"""At most so many images of a split are read, spread over all of it."""

ALL = "all"
"""Says hookpoint where candidates of all of them compete."""

_SAE, _RESAMPLES, _SAMPLE = "AUC", 2000, 40_960


class Estimate(NamedTuple):
    """A number, and what it is in every bootstrap sample; NaN where a sample cannot tell."""

    value: float
    """An AUC or a share, 0 to 1."""
    samples: Float[np.ndarray, "sample"]
    """The same in every sample."""


class Choice(NamedTuple):
    """The candidate that tells a value best on training images."""

    area: float
    """AUC there, of what it tells by."""
    hookpoint: str
    candidate: int
    fires: bool
    """Whether it tells by strength, or by its lack."""
    strength: Float[np.ndarray, "image"]
    """Of every image; negative where it tells by its lack."""


_Choices = dict[str, list[list[Choice]]]
"""By kind of candidate, of each question, for each value."""


@torch.no_grad()
def measure_recovery(saes: SAEs, cache: Activations, step: int = 0) -> list[Row]:
    """How well the best single latent tells the images that show a value of a factor from those that do not.

    An image's strength of a latent is the maximum of z over its tokens: objects cover few tokens, and a mean would mix
    whether something is there with how large it is. For each value a latent is chosen on training images: the one of
    greatest |AUC − ½|, as some values are told by silence (upright by that of a latent for tilted things); so is a
    threshold, that of greatest F1. Its `AUC`, and `precision` and `recall` from that threshold on, are measured on
    held-out images, each with its 95 % bootstrap interval over those images. Chance is 0.5 for AUC and
    `with it / images` for precision. Beside it, pooled, chosen and measured in the same way, the AUC of the best

    - `untrained SAE`: latent of `sae.untrained()`, as many random directions, of whitened tokens where the SAE's are;
    - `channel`: channel of the update itself, by its maximum or its minimum;
    - `PCA axis`: principal axis of training tokens, by its maximum or its minimum.

    Of each hookpoint one row per value, after a factor's values their `mean`, and last the mean over all values of all
    factors. Of several hookpoints there are rows of "all" too, last: there the candidates of all of them compete, and
    `from` says whose latent won. `tells by` is firing or silence. What images are asked, `questions.ask_of` says; as
    they show what their prompts say only as far as the model draws it, 1 may be out of reach.

    Args:
        saes: one trained SAE, or several, each of another hookpoint; of a mapping its values.
        cache: images whose prompts tell their factors, such as those of `load_prompts("world", 600)`; up to 2,048 of
            each split are read, with guidance their cond half.
        step: which denoising step.

    Raises:
        HookpointError: the cache does not have an SAE's hookpoint.
        KitError: no SAE, or two of one hookpoint; the prompts tell no factors, or none often enough: 5 images of each
            split with a value and 5 without; or the cache does not have this step.

    >>> rows = measure_recovery({h: saes[h, "k10"] for h in cache.hookpoints}, cache)              # doctest: +SKIP
    >>> show_table([row for row in rows if row["value"] == "mean"], "Recovery of known factors")   # doctest: +SKIP
    """
    questions, training, found = _search(saes, cache, step, controls=True)
    n = int((~training).sum())
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    rows = list[Row]()
    for hookpoint, choices in found.items():
        told = list[dict[str, Estimate]]()
        for at, question in enumerate(questions):
            of_values = {kind: chosen[at] for kind, chosen in choices.items()}
            estimates = list(_estimates(question, of_values, training, draws))
            told += estimates
            rows += _rows(hookpoint, question, of_values[_SAE], estimates, ~training)
        rows.append(_mean_row(hookpoint, "mean", told) | {"images": n, "with it": "–"})
    return rows


@dataclass(frozen=True)
class Confusion:
    """For what else the latents fire that tell the values best: shares of held-out images."""

    values: tuple[tuple[str, str], ...]
    """Factor and value of every row, and of every column."""
    latents: tuple[str, ...]
    """Whose row it is: hookpoint and latent, with "not" where it tells by silence."""
    shares: Float[np.ndarray, "value value"] = field(repr=False)
    """Of the images that show the column's value, those on which the row's latent tells its own: 0 to 1."""
    images: Int[np.ndarray, "value"] = field(repr=False)
    """Held-out images that show each value."""

    def plot(self) -> go.Figure:
        """A heat map, its factors set apart."""
        return confusion_map(self.values, self.latents, self.shares)


@torch.no_grad()
def measure_confusion(saes: SAEs, cache: Activations, step: int = 0) -> Confusion:
    """What else the latents that `measure_recovery` chooses, of all hookpoints together, tell their values of.

    A latent tells its value of an image if its maximum there reaches the threshold of greatest F1 on training images,
    or does not exceed it where it tells by silence. A perfect latent has 1 on the diagonal, 0 at the other values of
    its factor (two objects may have two shapes and two colours), and everywhere else how often its value comes with the
    column's. Arguments and errors are those of `measure_recovery`.

    >>> measure_confusion(saes_by_hookpoint, cache).plot()                                         # doctest: +SKIP
    """
    questions, training, found = _search(saes, cache, step, controls=False)
    by_question = list(found.values())[-1][_SAE]
    chosen = [choice for choices in by_question for choice in choices]
    told = [
        choice.strength >= _threshold(choice.strength[question.asked & training], shows[question.asked & training])
        for question, choices in zip(questions, by_question, strict=True)
        for choice, shows in zip(choices, question.shows.T, strict=True)
    ]
    shows = np.concatenate([question.shows for question in questions], axis=1)
    images = shows[~training].sum(axis=0)
    return Confusion(
        tuple((question.factor, value) for question in questions for value in question.values),
        tuple(f"{'' if each.fires else 'not '}{each.hookpoint} {each.candidate}" for each in chosen),
        np.stack(told)[:, ~training].astype(np.float64) @ shows[~training] / images,
        images,
    )


def _search(
    saes: SAEs, cache: Activations, step: int, *, controls: bool
) -> tuple[list[Question], Bool[np.ndarray, " image"], dict[str, _Choices]]:
    """The questions, which images are for training, and by hookpoint, all of them last, the candidates chosen there."""
    placed = by_hookpoint("recovery", "saes", SAE, saes)
    for hookpoint in placed:
        cache.grid(hookpoint)  # refuses a hookpoint that the cache does not have
    row = cache.row(step)
    train, held_out = (spread(cache.images(split)) for split in ("train", "held_out"))
    training = np.arange(len(train) + len(held_out)) < len(train)
    images = np.concatenate([train, held_out])
    questions = ask_of(cache, images, training)
    found = dict[str, _Choices]()
    for hookpoint, sae in placed.items():  # of each, only what was chosen is kept
        strengths = _strengths(sae, cache, images, row, controls=controls)
        found[hookpoint] = {
            kind: choose(questions, strength, training, hookpoint) for kind, strength in strengths.items()
        }
    if len(found) > 1:
        found[ALL] = {kind: _best([each[kind] for each in found.values()]) for kind in next(iter(found.values()))}
    return questions, training, found


def spread(images: Int[np.ndarray, " image"], n: int = MAX_IMAGES) -> NDArray[np.integer]:
    """At most n of these images, spread over all of them."""
    chosen: NDArray[np.integer] = images[np.linspace(0, len(images) - 1, min(len(images), n)).astype(int)]
    return chosen


def _strengths(
    sae: SAE, cache: Activations, images: Int[np.ndarray, " image"], row: int, *, controls: bool
) -> dict[str, Float[np.ndarray, "image candidate"]]:
    """By kind, every candidate's maximum over every image."""
    tokens = cache.sample(sae.hookpoint, _SAMPLE).to(sae.W_enc.device)
    axes = torch.linalg.eigh((tokens - tokens.mean(dim=0)).T @ (tokens - tokens.mean(dim=0)))[1]  # (d_in, axis)
    untrained, parts = sae.untrained(), list[dict[str, Tensor]]()
    for part in cache.parts(sae.hookpoint, images):
        x = cache.read(sae.hookpoint, part)[:, row].to(axes)  # (image, token, d_in)
        found = {_SAE: strongest(sae, x)}
        if controls:
            found |= {"untrained SAE": strongest(untrained, x)}
            found |= {"channel": either_end(x), "PCA axis": either_end(x @ axes)}
        parts.append({kind: strength.cpu() for kind, strength in found.items()})
    return {kind: torch.cat([part[kind] for part in parts]).numpy() for kind in parts[0]}


def strongest(sae: SAE, x: Float[Tensor, "image token d_in"]) -> Float[Tensor, "image d_sae"]:
    """Every latent's maximum over each image's tokens."""
    indices, values = (code.flatten(1) for code in sae.encode_sparse(x))
    return values.new_zeros(len(x), sae.d_sae).scatter_reduce(1, indices, values, "amax")


def either_end(x: Float[Tensor, "image token axis"]) -> Float[Tensor, "image two_axes"]:
    """The maximum of every axis, then of its opposite."""
    return torch.cat([x.amax(dim=1), -x.amin(dim=1)], dim=1)


def choose(
    questions: Sequence[Question],
    strength: Float[np.ndarray, "image candidate"],
    training: Bool[np.ndarray, " image"],
    hookpoint: str,
) -> list[list[Choice]]:
    """For each value of each question the best of these candidates; where it tells by its lack, the AUC is 1 − AUC."""
    areas = dict[int, Float[np.ndarray, "value candidate"]]()
    by_asked = dict[bytes, list[int]]()  # ranking is the dear part, and most factors are asked of the same images
    for at, question in enumerate(questions):
        by_asked.setdefault(question.asked.tobytes(), []).append(at)
    for group in by_asked.values():
        seen = questions[group[0]].asked & training
        shows = np.concatenate([questions[at].shows[seen] for at in group], axis=1)
        ends = np.cumsum([len(questions[at].values) for at in group])[:-1]
        areas |= zip(group, np.split(areas_under_curve(strength[seen], shows), ends), strict=True)
    return [[_choice(area, strength, hookpoint) for area in areas[at]] for at in range(len(questions))]


def _choice(
    areas: Float[np.ndarray, " candidate"], strength: Float[np.ndarray, "image candidate"], hookpoint: str
) -> Choice:
    best = int(np.abs(areas - 0.5).argmax())
    area, fires = float(areas[best]), bool(areas[best] >= 0.5)
    return Choice(max(area, 1 - area), hookpoint, best, fires, strength[:, best] * (1 if fires else -1))


def _best(found: Sequence[list[list[Choice]]]) -> list[list[Choice]]:
    """Of the choices at several hookpoints those that tell best on training images."""
    return [
        [max(rivals, key=lambda choice: choice.area) for rivals in zip(*of_values, strict=True)]
        for of_values in zip(*found, strict=True)
    ]


def _estimates(
    question: Question,
    choices: Mapping[str, Sequence[Choice]],
    training: Bool[np.ndarray, " image"],
    draws: Int[np.ndarray, "sample held_out"],
) -> Iterator[dict[str, Estimate]]:
    """For each value, what held-out images say of the candidates chosen for it."""
    seen, tested = question.asked & training, question.asked & ~training
    drawn = draws[:, question.asked[~training]]
    for value, shows in enumerate(question.shows.T):
        strengths = {kind: chosen[value].strength for kind, chosen in choices.items()}
        estimates = {kind: area_of(strength[tested], shows[tested], drawn) for kind, strength in strengths.items()}
        told = strengths[_SAE][tested] >= _threshold(strengths[_SAE][seen], shows[seen])
        estimates["precision"] = _rate(told & shows[tested], told, drawn)
        estimates["recall"] = _rate(told & shows[tested], shows[tested], drawn)
        yield estimates


def area_of(
    strength: Float[np.ndarray, " image"], shows: Bool[np.ndarray, " image"], draws: Int[np.ndarray, "sample image"]
) -> Estimate:
    """AUC of one latent, and what it is in bootstrap samples of the images: `metrics.resampled_areas`."""
    area = float(areas_under_curve(strength[:, None], shows)[0])
    return Estimate(area, resampled_areas(strength, shows, draws))


def _threshold(strength: Float[np.ndarray, " image"], shows: Bool[np.ndarray, " image"]) -> float:
    """The strength of greatest F1 = 2 · precision · recall / (precision + recall) when it and all above are told."""
    precision, recall, thresholds = precision_recall_curve(shows, strength)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def _rate(
    hits: Bool[np.ndarray, " image"], of: Bool[np.ndarray, " image"], draws: Int[np.ndarray, "sample image"]
) -> Estimate:
    """Hits per image that they are of; 0 where there is none."""
    return Estimate(float(hits.sum() / max(of.sum(), 1)), draws @ hits / np.maximum(draws @ of, 1))


def mean_of(estimates: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """By name, the mean over values; a bootstrap sample that cannot tell some of them tells the mean of the others."""
    means = {}
    for name in estimates[0]:
        samples = np.stack([each[name].samples for each in estimates])
        told = np.maximum((~np.isnan(samples)).sum(axis=0), 1)
        mean = np.where(np.isnan(samples).all(axis=0), np.nan, np.nansum(samples, axis=0) / told)
        means[name] = Estimate(float(np.mean([each[name].value for each in estimates])), mean)
    return means


def _rows(
    hookpoint: str,
    question: Question,
    choices: Sequence[Choice],
    estimates: Sequence[Mapping[str, Estimate]],
    held_out: Bool[np.ndarray, " image"],
) -> list[Row]:
    """A row for each value of a factor, and their mean."""
    tested = question.asked & held_out
    n, with_it = int(tested.sum()), question.shows[tested].sum(axis=0).tolist()
    rows: list[Row] = [
        {"hookpoint": hookpoint, "factor": question.factor, "value": value, "latent": choice.candidate}
        | {"from": choice.hookpoint, "tells by": "firing" if choice.fires else "silence"}
        | _cells(told)
        | {"images": n, "with it": shown}
        for value, choice, told, shown in zip(question.values, choices, estimates, with_it, strict=True)
    ]
    return [*rows, _mean_row(hookpoint, question.factor, estimates) | {"images": n, "with it": "–"}]


def _mean_row(hookpoint: str, factor: str, estimates: Sequence[Mapping[str, Estimate]]) -> Row:
    blank = dict.fromkeys(("latent", "from", "tells by"), "–")
    return {"hookpoint": hookpoint, "factor": factor, "value": "mean"} | blank | _cells(mean_of(estimates))


def _cells(estimates: Mapping[str, Estimate]) -> Row:
    row: Row = {}
    for name, (value, samples) in estimates.items():
        low, high = np.nanquantile(samples, [0.025, 0.975]).tolist()
        row |= {name: value, "interval" if name == _SAE else f"{name} interval": (low, high)}
    return row

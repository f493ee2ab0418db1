"""Recovery: how well single latents of an SAE tell what is known of the images, beside channels, PCA and chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import areas_under_curve, resampled_areas
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import FACTORS, ONE_OBJECT_FACTORS, TWO_OBJECT_FACTORS, Scene

Row = dict[str, Any]

MIN_IMAGES = 5
"""A value is asked for if at least so many training and so many held-out images show it, and as many do not."""

MAX_IMAGES = 2048
"""At most so many images of a split are read, spread over all of it."""

_SAE, _RESAMPLES, _SAMPLE = "AUC", 2000, 40_960
_SCENES = [set(FACTORS) - set(absent) for absent in (ONE_OBJECT_FACTORS, TWO_OBJECT_FACTORS)]


class _Estimate(NamedTuple):
    """A number, and what it is in every bootstrap sample; NaN where a sample cannot tell."""

    value: float
    samples: Float[NDArray[np.float64], "sample"]


class _Question(NamedTuple):
    """A factor, its values, the images that it is asked of, and which of them show each value."""

    factor: str
    values: list[str]
    asked: Bool[NDArray[np.bool_], "image"]
    shows: Bool[NDArray[np.bool_], "image value"]


@torch.no_grad()
def measure_recovery(sae: SAE, cache: Activations, step: int = 0) -> list[Row]:
    """How well the best single latent tells the images that show a value of a factor from those that do not.

    An image's activation is the maximum over its tokens: objects cover few tokens, and a mean would mix whether
    something is there with how large it is. (On the embedded model the mean leaves latents where they are and lifts PCA
    axes by about 0.03.) For each value, the latent that is active where the value is shown, and a threshold (by F1),
    are chosen on training images. Its `AUC`, and `precision` and `recall` from that threshold on, are measured on
    held-out images, each with its 95 % bootstrap interval over those images. Chance is 0.5 for AUC and
    `with it / images` for precision. Beside it, chosen and measured in the same way, the AUC of the best

    - `untrained SAE`: latent of `sae.untrained()`, as many random directions;
    - `channel`: channel of the update itself, up or down, whichever is better on training images;
    - `PCA axis`: principal axis of training tokens, up or down.

    One row per value, after a factor's values their `mean`, and last the mean over factors. Images show what their
    prompts say as far as the model draws it, so 1 may be out of reach. What cannot be seen (the pose of a plain circle,
    the material of a small sketch) is not asked. Size and position are asked of scenes of one object, the relation of
    pairs, from the left or upper object on; a shape or colour is there when either object has it. Factors that are not
    those of a whole scene of the world are taken as they are.

    Args:
        sae: a trained SAE.
        cache: images whose prompts tell their factors, such as those of `load_prompts("world", 600)`; up to 2,048 of
            each split are read, with guidance their cond half.
        step: which denoising step.

    Raises:
        HookpointError: the cache does not have the SAE's hookpoint.
        KitError: the prompts tell no factors, or none often enough: 5 images of each split with a value and 5 without;
            or the cache does not have this step.

    >>> rows = measure_recovery(saes["up.0.1", "k10"], cache)                                      # doctest: +SKIP
    >>> show_table([row for row in rows if row["value"] == "mean"], "Recovery of known factors")   # doctest: +SKIP
    """
    cache.grid(sae.hookpoint)  # refuses a hookpoint that the cache does not have
    row = cache.row(step)
    train, held_out = (_spread(cache.images(split)) for split in ("train", "held_out"))
    training = np.arange(len(train) + len(held_out)) < len(train)
    images = np.concatenate([train, held_out])
    questions = _questions(cache, images, training)
    strengths = _strengths(sae, cache, images, row)
    n = len(held_out)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    rows, means = list[Row](), list[dict[str, _Estimate]]()
    for question in questions:
        found = _recover(question, strengths, training, draws)
        means.append(_mean([estimates for _, estimates in found]))
        rows += _rows(question, found, means[-1], ~training)
    overall = {"factor": "mean", "value": "mean", "latent": "–"} | _cells(_mean(means))
    return [*rows, overall | {"images": n, "with it": "–"}]


def _spread(images: Int[np.ndarray, " image"]) -> NDArray[np.integer]:
    chosen: NDArray[np.integer] = images[np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).astype(int)]
    return chosen


def _shown(factors: Mapping[str, str]) -> dict[str, set[str]]:
    """The values of every factor that an image shows, if it shows what its prompt says."""
    if set(factors) not in _SCENES:
        return {factor: {value} for factor, value in factors.items()}
    scene = Scene(**{factor: value for factor, value in factors.items() if factor != "count"})  # type: ignore[arg-type]
    answers = {factor: value for factor, value in expected_answers(scene).items() if value is not None}
    seconds = {factor: answers.pop(f"{factor}2", answers[factor]) for factor in ("shape", "colour")}
    return {factor: {value, seconds.get(factor, value)} for factor, value in answers.items()}


def _questions(
    cache: Activations, images: Int[np.ndarray, " image"], training: Bool[np.ndarray, " image"]
) -> list[_Question]:
    """What can be asked; refused where there is nothing."""
    known = [_shown(cache.prompts.factors[image]) for image in images]
    if not any(known):
        raise KitError(
            f"{cache.name}: its prompts tell no factors, so there is nothing to recover. Collect prompts of 'world', "
            "or JSON lines with a field factors."
        )
    if questions := list(_often_shown(known, training)):
        return questions
    raise KitError(
        f"{cache.name}: no factor has a value that {MIN_IMAGES} training and {MIN_IMAGES} held-out images show and as "
        "many do not. Collect more prompts."
    )


def _often_shown(known: Sequence[Mapping[str, set[str]]], training: Bool[np.ndarray, " image"]) -> Iterator[_Question]:
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
            yield _Question(factor, [values[value] for value in often], asked, shows[:, often])


def _strengths(
    sae: SAE, cache: Activations, images: Int[np.ndarray, " image"], row: int
) -> dict[str, Float[NDArray[np.float32], "image candidate"]]:
    """By kind of detector, every candidate's maximum over every image."""
    tokens = cache.sample(sae.hookpoint, _SAMPLE).to(sae.W_enc.device)
    axes = torch.linalg.eigh((tokens - tokens.mean(dim=0)).T @ (tokens - tokens.mean(dim=0)))[1]  # (d_in, axis)
    untrained, parts = sae.untrained(), list[dict[str, Tensor]]()
    for part in cache.parts(sae.hookpoint, images):
        x = cache.read(sae.hookpoint, part)[:, row].to(axes)  # (image, token, d_in)
        latents = {_SAE: _strongest(sae, x), "untrained SAE": _strongest(untrained, x)}
        others = {"channel": _either_way(x), "PCA axis": _either_way(x @ axes)}
        parts.append({name: found.cpu() for name, found in (latents | others).items()})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _strongest(sae: SAE, x: Float[Tensor, "image token d_in"]) -> Float[Tensor, "image d_sae"]:
    indices, values = (code.flatten(1) for code in sae.encode_sparse(x))
    return values.new_zeros(len(x), sae.d_sae).scatter_reduce(1, indices, values, "amax")


def _either_way(x: Float[Tensor, "image token axis"]) -> Float[Tensor, "image two_axes"]:
    """The maximum of every axis, then of its opposite."""
    return torch.cat([x.amax(dim=1), -x.amin(dim=1)], dim=1)


def _recover(
    question: _Question,
    strengths: Mapping[str, Float[np.ndarray, "image _"]],
    training: Bool[np.ndarray, " image"],
    draws: Int[np.ndarray, "sample held_out"],
) -> list[tuple[int, dict[str, _Estimate]]]:
    """For each value the latent chosen on training images, and what held-out images say of it and of the controls."""
    seen, tested = question.asked & training, question.asked & ~training
    drawn = draws[:, question.asked[~training]]
    best = {
        kind: areas_under_curve(strength[seen], question.shows[seen]).argmax(axis=1)
        for kind, strength in strengths.items()
    }
    found = []
    for value, shows in enumerate(question.shows.T):
        estimates = {
            kind: _area(strength[tested, best[kind][value]], shows[tested], drawn)
            for kind, strength in strengths.items()
        }
        latent = int(best[_SAE][value])
        strength = strengths[_SAE][:, latent]
        told = strength[tested] >= _threshold(strength[seen], shows[seen])
        estimates["precision"] = _rate(told & shows[tested], told, drawn)
        estimates["recall"] = _rate(told & shows[tested], shows[tested], drawn)
        found.append((latent, estimates))
    return found


def _area(
    strength: Float[np.ndarray, " image"], shows: Bool[np.ndarray, " image"], draws: Int[np.ndarray, "sample image"]
) -> _Estimate:
    area = float(areas_under_curve(strength[:, None], shows)[0])
    return _Estimate(area, resampled_areas(strength, shows, draws))


def _threshold(strength: Float[np.ndarray, " image"], shows: Bool[np.ndarray, " image"]) -> float:
    """The strength of greatest F1 = 2 · precision · recall / (precision + recall) when it and all above are told."""
    precision, recall, thresholds = precision_recall_curve(shows, strength)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def _rate(
    hits: Bool[np.ndarray, " image"], of: Bool[np.ndarray, " image"], draws: Int[np.ndarray, "sample image"]
) -> _Estimate:
    """Hits per image that they are of; 0 where there is none."""
    return _Estimate(float(hits.sum() / max(of.sum(), 1)), draws @ hits / np.maximum(draws @ of, 1))


def _mean(estimates: Sequence[Mapping[str, _Estimate]]) -> dict[str, _Estimate]:
    """By name, the mean over values; a bootstrap sample that cannot tell some of them tells the mean of the others."""
    means = {}
    for name in estimates[0]:
        samples = np.stack([each[name].samples for each in estimates])
        told = np.maximum((~np.isnan(samples)).sum(axis=0), 1)
        mean = np.where(np.isnan(samples).all(axis=0), np.nan, np.nansum(samples, axis=0) / told)
        means[name] = _Estimate(float(np.mean([each[name].value for each in estimates])), mean)
    return means


def _rows(
    question: _Question,
    found: Sequence[tuple[int, Mapping[str, _Estimate]]],
    mean: Mapping[str, _Estimate],
    held_out: Bool[np.ndarray, " image"],
) -> list[Row]:
    """A row for each value of a factor, and their mean."""
    tested = question.asked & held_out
    n, with_it = int(tested.sum()), question.shows[tested].sum(axis=0).tolist()
    rows: list[Row] = [
        {"factor": question.factor, "value": value, "latent": latent}
        | _cells(estimates)
        | {"images": n, "with it": shown}
        for value, (latent, estimates), shown in zip(question.values, found, with_it, strict=True)
    ]
    last = {"factor": question.factor, "value": "mean", "latent": "–"} | _cells(mean)
    return [*rows, last | {"images": n, "with it": "–"}]


def _cells(estimates: Mapping[str, _Estimate]) -> Row:
    row: Row = {}
    for name, (value, samples) in estimates.items():
        low, high = np.nanquantile(samples, [0.025, 0.975]).tolist()
        row |= {name: value, "interval" if name == _SAE else f"{name} interval": (low, high)}
    return row

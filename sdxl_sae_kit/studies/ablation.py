"""Causal ablation: what turning one feature off changes in an image, against controls that should change less."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.interventions import check_measured
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pipelines import scheduler
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.search import MIN_IMAGES, most_energetic
from sdxl_sae_kit.studies.controls import HARDEST, Change, at_dose, at_step, choose_other, draw_controls
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.measures import measure
from sdxl_sae_kit.studies.pairs import (
    Key,
    Order,
    Pairs,
    count_pictures,
    draw_pairs,
    find_firing,
    strongest_held_out,
    token_pixels,
)
from sdxl_sae_kit.studies.results import LINES, PLAN, SHOWN, STRIP, Ablation
from sdxl_sae_kit.studies.strips import draw_strip

Labels = LabelStore | Mapping[int, str]


@checked
def ablate(
    pipe: Any,
    sae: SAE,
    stats: FeatureStats,
    features: Sequence[int] | int | None = None,
    prompts: Prompts | Iterable[Any] | str | Path | None = None,
    *,
    doses: Sequence[float] = (-1.0, 0.0, 1.0, 2.0, 4.0),
    prompts_per_feature: int = 12,
    by_step: bool = False,
    judge: PictureJudge | EllipsisType | None = ...,
    labels: Labels | None = None,
    seed: int = 0,
    batch_size: int = 32,
    store: Store | Path | str | None = None,
) -> Ablation:
    """Turn features off one at a time on images on which they fire, give them other doses, and measure what changes.

    Each image is made from its prompt and seed as it is; with the feature's activation multiplied by every dose (0 is
    ablated); and with four controls: three subtract the same amounts at the same tokens along another direction, a
    random one, a decoder row of an untrained SAE, and a random mixture of all features in proportion to their spread,
    which varies as the updates themselves do and is the hardest to beat (so it is given every other dose too); in the
    fourth the alive feature of the nearest density is turned off instead. Effects of all are measured inside and
    outside the feature's own region: the tokens on which it fires in the image as it is, at the step of `stats`.
    Intervals are over prompts, images of one prompt with several seeds counting as one. Killed at any moment, it goes
    on at the batch in hand.

    Args:
        pipe: the pipeline whose updates the SAE was trained on.
        sae: a trained SAE.
        stats: its feature statistics.
        features: latents, or one of them; by default the dozen that `most_energetic` gives.
        prompts: what `load_prompts` takes; of them each feature is measured on those on which it fires. By default the
            held-out images of `stats` on which it fires, at most `prompts_per_feature`, by highest spatial mean.
        doses: multiples of the activation; 0 and 1 (as it is) are always among them.
        prompts_per_feature: at most so many images for each feature where no prompts are given; from 4.
        by_step: also turn the feature off at each denoising step alone, beside the hardest control.
        judge: tells what pictures look like and show; by default the model's own (`judge_of`), None for pixels only.
        labels: what features are called; on the embedded model's world it is told whether what a label names changes.
            Pictures do not depend on it, so labels given later cost nothing.
        seed: of the random directions.
        batch_size: pictures made at once, from 2.
        store: folder of artifacts.

    Raises:
        ArtifactError: `stats` belong to another SAE, or the SAE to another model.
        KitError: a latent that does not exist or never fires, too few prompts, doses that are no numbers, a model that
            has one step by step, or an SAE whose latents have no direction that is the same for all tokens.

    Example:
        >>> ablate(pipe, saes["down.2.1", "k10"], stats, [17, 40]).plot_doses()        # doctest: +SKIP
    """
    check_measured("ablate", pipe, sae, stats)
    _ = sae.directions  # refuses an SAE that has none
    given = None if prompts is None else load_prompts(prompts)
    judge = chosen_judge("ablate", pipe, judge)
    chosen = _choose(stats, features)
    recipe = {
        "study": "ablation",
        "sae": sae.digest,
        "sae_name": sae.name,
        "hookpoint": sae.hookpoint,
        "stats": stats.artifact.digest,
        "features": chosen,
        "prompts": None if given is None else given.digest,
        "prompts_per_feature": whole_number("ablate: prompts_per_feature", prompts_per_feature, least=MIN_IMAGES),
        "doses": _read_doses(doses),
        "readings": 2,  # how doses are read off pictures (`statistics.read_doses`); other readings are another study
        "steps_alone": _count_steps(sae) if by_step else 0,
        "judge": None if judge is None else judge.name,
        "seed": whole_number("ablate: seed", seed, least=0),
        "batch_size": whole_number("ablate: batch_size", batch_size, least=2),
        "scheduler": scheduler(pipe),
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    if given is not None and len(set(given.texts)) < MIN_IMAGES:
        raise KitError(
            f"ablate: intervals are over prompts, and {MIN_IMAGES} are the least; it got {len(set(given.texts))}. "
            "Give more, each as often as you want seeds of it."
        )
    labelled = {} if labels is None else _name(labels, chosen, stats)
    artifact = Store.at(store).artifact("studies", f"ablation_{sae.name.rsplit('-', 1)[0]}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, copy.deepcopy(sae).to(pipe.device), stats, given, judge, artifact)
    return replace(Ablation.open(artifact.folder), labelled=labelled)


# What is asked --------------------------------------------------------------------------------------------------------


def _choose(stats: FeatureStats, features: Any) -> list[int]:
    if features is None:
        return most_energetic(stats)
    given = [features] if isinstance(features, Integral) else list(features)
    for feature in given:
        if isinstance(feature, bool) or not isinstance(feature, Integral) or not 0 <= int(feature) < stats.d_sae:
            raise KitError(f"ablate: {stats.sae} has latents 0 to {stats.d_sae - 1}; there is no {feature!r}.")
        if stats.density[feature] == 0:
            raise KitError(
                f"ablate: latent {feature} of {stats.sae} is dead on these images. Take some of stats.alive."
            )
    if not given or len(set(given)) < len(given):
        raise KitError(f"ablate: features={given} must name one latent or more, each once.")
    return [int(feature) for feature in given]


def _read_doses(doses: Any) -> list[float]:
    given = list(doses)
    if not all(isinstance(dose, Real) and not isinstance(dose, bool) and np.isfinite(float(dose)) for dose in given):
        raise KitError(f"ablate: doses must be finite numbers, such as (-1, 0, 1, 2, 4), not {doses!r}.")
    return sorted({0.0, 1.0, *map(float, given)})


def _count_steps(sae: SAE) -> int:
    assert sae.site is not None
    if sae.site.num_inference_steps < 2:
        raise KitError(f"ablate: {sae.name} is of images made in one step, so by_step=True asks nothing. Leave it out.")
    return sae.site.num_inference_steps


def _name(labels: Labels, features: Sequence[int], stats: FeatureStats) -> dict[int, tuple[str, tuple[str, ...]]]:
    """What features are called, and the factors (as the prompts of `stats` tell them) whose values the label names."""
    texts = labels.all() if isinstance(labels, LabelStore) else dict(labels)
    if unknown := [latent for latent in texts if not 0 <= latent < stats.d_sae]:
        raise KitError(f"ablate: labels of {unknown}, but {stats.sae} has latents 0 to {stats.d_sae - 1}. Drop them.")
    values: dict[str, set[str]] = {}
    for told in stats.prompts.factors:
        for factor, value in told.items():
            values.setdefault(factor, set()).add(value)
    return {f: (texts[f], tuple(k for k, v in values.items() if _names(texts[f], v))) for f in features if f in texts}


def _names(text: str, values: Iterable[str]) -> bool:
    """Whether the text has one of the values among its words, in the singular or plural."""
    return any(re.search(rf"\b{re.escape(value)}s?\b", text, re.IGNORECASE) for value in values)


# The work -------------------------------------------------------------------------------------------------------------


def _run(
    pipe: Any, sae: SAE, stats: FeatureStats, prompts: Prompts | None, judge: PictureJudge | None, artifact: Artifact
) -> None:
    recipe, lines = artifact.recipe, Lines(artifact, LINES)
    features, doses, batch_size = recipe["features"], recipe["doses"], recipe["batch_size"]
    if not artifact.file(PLAN).exists():
        plan = _plan(pipe, sae, stats, prompts, recipe)
        write_atomically(artifact.file(PLAN), json.dumps(plan).encode())
    plan = artifact.read_json(PLAN)
    others = {feature: plan["others"][str(feature)] for feature in features}
    orders = _order(plan, _changes(draw_controls(sae, stats, features, recipe["seed"]), doses, recipe["steps_alone"]))
    done = {int(image) for image in lines}
    cost = count_pictures(orders, done, batch_size)
    tqdm.write(
        f"Ablating {len(features)} features of {sae.name} on {len(orders) - len(done):,} images: {cost:,} pictures to "
        f"make, as {artifact.name}."
    )
    pixels = token_pixels(pipe, sae)
    with tqdm(total=len(orders), initial=len(done), desc="ablate", unit="image") as bar:
        for pairs in draw_pairs(pipe, sae, stats, orders, done, batch_size):
            line = measure(pairs, others, doses, judge, pixels)
            _show(pairs, line, plan, doses, artifact)
            lines.add(str(pairs.order.image), line)
            bar.update()
    artifact.seal(facts={"features": len(features), "images": len(orders)})


def _plan(
    pipe: Any, sae: SAE, stats: FeatureStats, prompts: Prompts | None, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Which images there are, on which of them each feature is tried, and which other feature is its control."""
    features = recipe["features"]
    if prompts is None:
        prompts = stats.prompts
        tried = strongest_held_out(stats, features, recipe["prompts_per_feature"])
    else:
        tqdm.write(f"Looking on which of {len(prompts):,} images {len(features)} features of {sae.name} fire.")
        firing = find_firing(pipe, sae, stats, prompts, features, recipe["batch_size"])
        tried = {feature: np.flatnonzero(firing[:, at]).tolist() for at, feature in enumerate(features)}
    used = list(dict.fromkeys(image for images in tried.values() for image in images))
    place = {image: at for at, image in enumerate(used)}
    return {
        "images": [[prompts.texts[image], prompts.seeds[image]] for image in used],
        "features": {str(feature): [place[image] for image in images] for feature, images in tried.items()},
        "others": {str(feature): choose_other(stats, feature) for feature in features},
    }


def _changes(
    controls: Mapping[int, Mapping[str, Change]], doses: Sequence[float], steps: int
) -> dict[int, dict[Key, Change]]:
    """Every change that is made for each feature."""
    changes: dict[int, dict[Key, Change]] = {}
    for feature, conditions in controls.items():
        changes[feature] = {(feature, condition): change for condition, change in conditions.items()}
        for condition in ("ablated", HARDEST):
            change = conditions[condition]
            given = {at_dose(condition, dose): replace(change, dose=dose) for dose in doses if dose not in (0, 1)}
            alone = {at_step(condition, step): replace(change, step=step) for step in range(steps)}
            changes[feature] |= {(feature, name): each for name, each in (given | alone).items()}
    return changes


def _order(plan: Mapping[str, Any], changes: Mapping[int, Mapping[Key, Change]]) -> list[Order]:
    """Each image with the changes of all features that are tried on it."""
    wanted: list[dict[Key, Change]] = [{} for _ in plan["images"]]
    for feature, images in plan["features"].items():
        for image in images:
            wanted[image] |= changes[int(feature)]
    return [Order(at, text, seed, wanted[at]) for at, (text, seed) in enumerate(plan["images"])]


def _show(
    pairs: Pairs, line: Mapping[str, Any], plan: Mapping[str, Any], doses: Sequence[float], artifact: Artifact
) -> None:
    """Keep a strip of pictures of each feature that fires, where this image is among its first; note its gain."""
    image = pairs.order.image
    for feature, found in line["features"].items():
        if image in plan["features"][feature][:SHOWN]:
            strip, found["gain"] = draw_strip(pairs, int(feature), doses)
            write_atomically(artifact.file(STRIP.format(int(feature), image)), strip)

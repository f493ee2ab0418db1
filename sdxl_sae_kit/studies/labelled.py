"""Labelled features: which features tell which values, on which prompts to edit them, and what answers then say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.arguments import is_sae
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.interventions import check_model
from sdxl_sae_kit.metrics import areas_under_curve
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.questions import ask_of, expected
from sdxl_sae_kit.recovery import spread, strongest
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.tiny.world import FACTORS

DOSES: tuple[tuple[str, float], ...] = (("scale", 0.0), ("scale", -3.0), ("add", 5.0), ("add", 15.0))
"""The edits that are tried of each feature: its activation times 0 or −3 where it fires and its value is shown; and,
where another value is, so many times its mean activation added everywhere."""
LEAST_AREA = 0.75
"""AUC from which on a feature is labelled."""
NOTHING = 0.01
"""Smaller changes of log-odds are none."""
_IMAGES = 1024

Answers = dict[str, Float[np.ndarray, "image answer"]]
"""The judge's probabilities, by factor."""


@dataclass(frozen=True)
class Labelled:
    """A feature and the value of a factor that it tells best, by its AUC on training images."""

    place: int
    """Of its SAE among those given."""
    latent: int
    factor: str
    value: str
    area: float
    """The AUC, 0.75 to 1."""


class Labels:
    """What features of several SAEs tell of training images."""

    def __init__(self, saes: Sequence[SAE], cache: Activations) -> None:
        self._saes, self._cache = saes, cache
        self._images = spread(cache.images("train"), _IMAGES)
        self._strengths = [measure_strengths(sae, cache, self._images) for sae in saes]
        self._share_firing = [(strength > FIRES).mean(axis=0) for strength in self._strengths]

    def best(self, per_value: int) -> Iterator[Labelled]:
        """Of every value of every factor the features, of all SAEs together, that tell it best."""
        n = len(self._images)
        for question in ask_of(self._cache, self._images, np.arange(n) < n * 4 // 5):
            if question.factor not in FACTORS:
                continue
            areas = [areas_under_curve(s[question.asked], question.shows[question.asked]) for s in self._strengths]
            for at, value in enumerate(question.values):
                found = [
                    Labelled(place, int(latent), question.factor, value, float(area[at, latent]))
                    for place, area in enumerate(areas)
                    for latent in np.argsort(-np.nan_to_num(area[at]))[:per_value]
                ]
                found.sort(key=lambda each: -each.area)
                yield from (each for each in found[:per_value] if each.area >= LEAST_AREA)

    def directions(self, labelled: Labelled, seed: int, n: int) -> dict[str, Float[np.ndarray, "n d_in"]]:
        """Directions as long as the feature's: n random ones, and n times that of the feature that fires on most nearly
        as many images, and that of the untrained SAE's latent."""
        sae, latent = self._saes[labelled.place], labelled.latent
        rows, share = sae.directions.detach().cpu().numpy(), self._share_firing[labelled.place]
        others = np.flatnonzero((share > 0) & (np.arange(len(share)) != latent))
        other = int(others[np.abs(share[others] - share[latent]).argmin()])
        random = np.random.default_rng([seed, labelled.place, latent]).standard_normal((n, sae.d_in))
        untrained, length = sae.untrained().directions[latent].cpu().numpy(), np.linalg.norm(rows[latent])
        vectors = {"random direction": random, "other feature": rows[other], "untrained SAE": untrained}
        return {
            name: np.broadcast_to(vector * (length / np.linalg.norm(vector, axis=-1, keepdims=True)), (n, sae.d_in))
            for name, vector in vectors.items()
        }


class Pool:
    """Prompts of one object of one split, what they show, and how strongly features fire on their images."""

    def __init__(self, saes: Sequence[SAE], cache: Activations, split: Any, n: int, seed: int) -> None:
        known = [expected(factors) for factors in cache.prompts.factors]
        images = [i for i in cache.images(split).tolist() if known[i] and known[i].get("count", "one") == "one"]
        rng = np.random.default_rng([seed, len(split)])
        self.images = np.sort(rng.permutation(np.array(images, dtype=np.int64))[:n])
        self._known = [known[image] for image in self.images.tolist()]
        self._strengths = [measure_strengths(sae, cache, self.images) for sae in saes]

    def choose(self, labelled: Labelled, *, off: bool) -> Int[np.ndarray, " image"]:
        """Those that show the label's value while the feature fires (`off`), or that show another value."""
        values = [known.get(labelled.factor) for known in self._known]
        shows = np.array([value == labelled.value for value in values], dtype=bool)
        others = np.array([value is not None for value in values], dtype=bool) & ~shows
        chosen = shows & (self._strengths[labelled.place][:, labelled.latent] > FIRES) if off else others
        return self.images[chosen]


@torch.no_grad()
def measure_strengths(
    sae: SAE, cache: Activations, images: Int[np.ndarray, " image"]
) -> Float[np.ndarray, "image latent"]:
    """Every latent's maximum over each image, at the first step (with guidance, in the cond half)."""
    parts, row = cache.parts(sae.hookpoint, images), cache.row(0)
    read = (cache.read(sae.hookpoint, part)[:, row].to(sae.W_enc) for part in parts)
    return torch.cat([strongest(sae, x).cpu() for x in read]).numpy()


def read_saes(asked: str, pipe: Any, saes: Any, cache: Activations) -> list[SAE]:
    """One SAE, several, or a mapping, of which the values are taken, as a list.

    Raises:
        KitError: there are none, one is there twice, or things of another kind.
        ArtifactError: an SAE or the cache is of another model than the pipeline holds.
        HookpointError: the cache does not have an SAE's hookpoint.
    """
    several = saes.values() if isinstance(saes, Mapping) else saes if isinstance(saes, Iterable) else [saes]
    chosen: list[Any] = list(several)
    if not chosen or not all(is_sae(sae) for sae in chosen):
        raise KitError(f"{asked}: saes are one or more SAEs, such as [saes['up.0.1', 'k10']]. Pass nothing else.")
    if len({sae.digest for sae in chosen}) < len(chosen):
        raise KitError(f"{asked}: an SAE is there twice. Pass each once.")
    for sae in chosen:
        check_model(asked, pipe, sae)
        cache.grid(sae.hookpoint)
        _ = sae.directions  # refuses an SAE that has none
    model, of = describe(pipe), (cache.recipe["model"], cache.recipe["revision"])
    if of != (model.name, model.revision):
        raise ArtifactError(
            f"{asked}: {cache.name} holds updates of {of[0]} (revision {of[1]}), but the pipeline is {model.name} "
            f"(revision {model.revision}). Pass a cache of the same model."
        )
    return chosen


def gain(
    labelled: Labelled, before: Mapping[str, Any], after: Mapping[str, Any], *, up: bool
) -> tuple[list[float], list[bool]]:
    """How far the log-odds of the label's value move as expected, and whether the likeliest answer follows.

    As expected is up for a feature that is added and down for one that is turned off; the answer follows where it comes
    to be the value, or ceases to be.
    """
    column, sign = FACTORS[labelled.factor].index(labelled.value), 1 if up else -1
    own = [log_odds(answers[labelled.factor], column) for answers in (before, after)]
    said, says = (answers[labelled.factor].argmax(axis=1) == column for answers in (before, after))
    return (sign * (own[1] - own[0])).tolist(), ((said != up) & (says == up)).tolist()


def log_odds(told: Float[np.ndarray, "image answer"], column: int) -> Float[np.ndarray, " image"]:
    """ln p / (1 − p) of an answer, 1 − p being the sum of the others: it does not saturate where p rounds to 1."""
    p = np.maximum(told.astype(np.float64), 1e-30)
    return np.asarray(np.log(p[:, column]) - np.log(np.delete(p, column, axis=1).sum(axis=1)))

"""Selectivity: which labelled features, when edited, move what their label says and leave the other factors alone.

Labels come from what features respond to; edits are chosen on training prompts and confirmed on held-out ones, beside
edits of the same size along other directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.artifacts import Artifact, Store, whole_number
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.interventions import check_model, steer
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.metrics import areas_under_curve
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.questions import ask_of, expected
from sdxl_sae_kit.recovery import strongest
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.studies.distances import draw, drawing, made_by
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.selected import CONDITIONS, CONTROLS, FILE, KEPT, Labelled, Outcome, Selectivity
from sdxl_sae_kit.tiny.world import FACTORS

DOSES: tuple[tuple[str, float], ...] = (("scale", 0.0), ("scale", -3.0), ("add", 5.0), ("add", 15.0))
"""The edits that are tried of each feature: its activation times 0 or −3 where it fires and its value is shown; and,
where another value is, so many times its mean activation added everywhere."""
_LEAST_AREA, _IMAGES, _POOL, _FEWEST = 0.75, 1024, 240, 6
_BATCH = 48

Answers = dict[str, Float[np.ndarray, "image answer"]]
"""The judge's probabilities, by factor."""


def screen(
    pipe: Any,
    saes: SAE | Iterable[SAE] | Mapping[Any, SAE],
    cache: Activations,
    *,
    n: int = 20,
    per_value: int = 2,
    trials: int = 16,
    prompts: int = 24,
    judge: PictureJudge | EllipsisType | None = ...,
    seed: int = 0,
    store: Store | Path | str | None = None,
) -> Selectivity:
    """Find the labelled features that move their own factor and nothing else, and confirm them on held-out prompts.

    A feature's label is a value of a factor that it tells on training images (AUC of its maximum over tokens, at least
    0.75). Of every value the best few are tried: each edit of `DOSES` on training prompts of one object, those that
    turn it off on prompts on which it fires. The edits that keep every other factor well enough to pass there come
    first, of them those that move the greatest share, then those with the greatest mean / deviation of the change;
    each feature once, with its best edit, if enough held-out prompts show what it needs. On these it stands beside
    three controls, each the same edit, of the same amounts at the same tokens, along another direction as long: a
    random one, that of the feature that fires on most nearly as many images, and that of the untrained SAE's. The dose
    is the one chosen for the feature; features of two SAEs of one hookpoint may be alike. Killed at any moment, it
    goes on at the feature in hand.

    Args:
        pipe: the pipeline whose updates the SAEs were trained on.
        saes: several SAEs, also of one hookpoint.
        cache: their updates, of prompts that tell their factors; its split says which prompts are held out.
        n: features to confirm.
        per_value: features tried for each value of each factor.
        trials: training prompts of each trial.
        prompts: held-out prompts of each confirmation.
        judge: one that names factors; by default the embedded model's.
        seed: for the choice of prompts and the random directions.
        store: folder of artifacts.

    Raises:
        ArtifactError: an SAE of another model.
        HookpointError: the cache does not have an SAE's hookpoint.
        KitError: no SAE, prompts without factors, or a judge that names none.

    >>> screen(pipe, saes, cache).plot()                                                           # doctest: +SKIP
    """
    chosen = _as_list(saes)
    for sae in chosen:
        check_model("screen", pipe, sae)
        cache.grid(sae.hookpoint)
        _ = sae.directions  # refuses an SAE that has none
    judge = chosen_judge("screen", pipe, judge)
    if judge is None:
        raise KitError("screen: this model has no judge that names factors. Pass judge=, such as WorldJudge().")
    recipe = made_by(pipe) | drawing(pipe, None, None)
    recipe |= {"study": "selectivity", "cache": cache.digest, "judge": judge.name, "edits": list(map(list, DOSES))}
    recipe |= {"saes": [[sae.hookpoint, sae.name, sae.digest] for sae in chosen]}
    recipe |= {name: whole_number(f"screen: {name}", value) for name, value in (("n", n), ("per_value", per_value))}
    recipe |= {
        "trials": whole_number("screen: trials", trials, least=_FEWEST),
        "seed": whole_number("screen: seed", seed, least=0),
    }
    recipe |= {"prompts": whole_number("screen: prompts", prompts, least=_FEWEST)}
    artifact = Store.at(store).artifact("studies", f"selectivity_{len(chosen)}saes", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _Screening(pipe, chosen, cache, judge, artifact).run()
    return Selectivity.open(artifact.folder)


def _as_list(saes: Any) -> list[SAE]:
    several = saes.values() if isinstance(saes, Mapping) else saes if isinstance(saes, Iterable) else [saes]
    chosen: list[Any] = list(several)
    if not chosen or not all(isinstance(sae, SAE) for sae in chosen):
        raise KitError("screen: saes are one or more SAEs, such as [saes['up.0.1', 'k10']]. Pass nothing else.")
    if len({sae.digest for sae in chosen}) < len(chosen):
        raise KitError("screen: an SAE is there twice. Pass each once.")
    return chosen


class _Tried(NamedTuple):
    """A feature, an edit, and what it did on training prompts."""

    labelled: Labelled
    verb: str
    dose: float
    outcome: Outcome


class _Screening:
    """One run: labels, trials, confirmations."""

    def __init__(
        self, pipe: Any, saes: Sequence[SAE], cache: Activations, judge: PictureJudge, artifact: Artifact
    ) -> None:
        self.pipe, self.saes, self.cache, self.judge, self.artifact = pipe, saes, cache, judge, artifact
        self.recipe, self.lines = artifact.recipe, Lines(artifact, FILE)
        self.settings = {
            name: self.recipe[name] for name in ("num_inference_steps", "guidance_scale", "height", "width")
        }
        self.share_firing: list[Float[np.ndarray, " latent"]] = []

    def run(self) -> None:
        candidates = list(self._label())
        n = min(self.recipe["n"], len({(each.place, each.latent) for each in candidates}))
        cost = len(candidates) * len(DOSES) * self.recipe["trials"] + n * len(CONDITIONS) * self.recipe["prompts"]
        tqdm.write(
            f"Screening {len(candidates)} labelled features of {len(self.saes)} SAEs and confirming {n}: about "
            f"{cost:,} pictures, as {self.artifact.name}."
        )
        training, held_out = (_Pool(self, split) for split in ("train", "held_out"))
        tried = [self._try(each, training) for each in tqdm(candidates, desc="screen", unit="feature")]
        best = sorted((each for each in tried if each), key=lambda each: _merit(each.outcome), reverse=True)
        chosen = dict[tuple[int, int], _Tried]()
        for each in best:
            if len(held_out.choose(each.labelled, off=each.verb == "scale", n=_FEWEST)) == _FEWEST:
                chosen.setdefault((each.labelled.place, each.labelled.latent), each)
        for place, each in enumerate(tqdm(list(chosen.values())[:n], desc="confirm", unit="feature")):
            if f"confirmed {place}" not in self.lines:
                told = {"labelled": asdict(each.labelled), "verb": each.verb, "dose": each.dose}
                self.lines.add(f"confirmed {place}", told | {"outcomes": self._confirm(each, held_out)})
        self.artifact.seal(facts={"tried": len(candidates), "confirmed": min(n, len(chosen))})

    @torch.no_grad()
    def _label(self) -> Iterator[Labelled]:
        """Of every value of every factor the features that tell it best on training images."""
        images = _spread(self.cache.images("train"), _IMAGES)
        questions = ask_of(self.cache, images, np.arange(len(images)) < len(images) * 4 // 5)
        strengths = [self.measure(sae, images) for sae in self.saes]
        self.share_firing = [(strength > FIRES).mean(axis=0) for strength in strengths]
        for question in questions:
            if question.factor not in FACTORS:
                continue
            areas = [areas_under_curve(s[question.asked], question.shows[question.asked]) for s in strengths]
            for at, value in enumerate(question.values):
                found = [
                    Labelled(place, int(latent), question.factor, value, float(area[at, latent]))
                    for place, area in enumerate(areas)
                    for latent in np.argsort(-np.nan_to_num(area[at]))[: self.recipe["per_value"]]
                ]
                found.sort(key=lambda each: -each.area)
                yield from (each for each in found[: self.recipe["per_value"]] if each.area >= _LEAST_AREA)

    @torch.no_grad()
    def measure(self, sae: SAE, images: Int[np.ndarray, " image"]) -> Float[np.ndarray, "image latent"]:
        """Every latent's maximum over each image."""
        parts = self.cache.parts(sae.hookpoint, images)
        row = self.cache.row(0)
        read = (self.cache.read(sae.hookpoint, part)[:, row].to(sae.W_enc) for part in parts)
        return torch.cat([strongest(sae, x).cpu() for x in read]).numpy()

    def _try(self, labelled: Labelled, pool: _Pool) -> _Tried | None:
        """The best edit on training prompts, and what it did; none where too few prompts show the value or lack it."""
        unit = f"tried {labelled.place} {labelled.latent} {labelled.factor} {labelled.value}"
        if unit not in self.lines:
            outcomes = [self._edit(labelled, verb, dose, pool, self.recipe["trials"], {}) for verb, dose in DOSES]
            self.lines.add(unit, {"outcomes": [each and asdict(each) for each in outcomes]})
        told = zip(DOSES, self.lines[unit]["outcomes"], strict=True)
        done = [_Tried(labelled, verb, dose, Outcome(**each)) for (verb, dose), each in told if each]
        return max(done, key=lambda each: _merit(each.outcome), default=None)

    def _confirm(self, chosen: _Tried, pool: _Pool) -> dict[str, Any]:
        return {
            condition: asdict(outcome)
            for condition, along in self._directions(chosen.labelled).items()
            if (outcome := self._edit(*chosen[:3], pool, self.recipe["prompts"], along))
        }

    def _directions(self, labelled: Labelled) -> dict[str, dict[int, Float[np.ndarray, " d_in"]]]:
        """What `steer` is to write along in each condition."""
        sae, latent = self.saes[labelled.place], labelled.latent
        rows = sae.directions.detach().cpu().numpy()
        share = self.share_firing[labelled.place]
        others = np.flatnonzero((share > 0) & (np.arange(len(share)) != latent))
        other = int(others[np.abs(share[others] - share[latent]).argmin()])
        random = np.random.default_rng([self.recipe["seed"], labelled.place, latent]).standard_normal(sae.d_in)
        untrained = sae.untrained().directions[latent].cpu().numpy()
        length = np.linalg.norm(rows[latent])
        along = (vector * (length / np.linalg.norm(vector)) for vector in (random, rows[other], untrained))
        return {"feature": {}} | {name: {latent: vector} for name, vector in zip(CONTROLS, along, strict=True)}

    def _edit(
        self, labelled: Labelled, verb: str, dose: float, pool: _Pool, n: int, along: Mapping[int, Any]
    ) -> Outcome | None:
        """Edit prompts that show the value, or lack it where the feature is added; None where there are too few."""
        images = pool.choose(labelled, off=verb == "scale", n=n)
        if len(images) < _FEWEST:
            return None
        edit: dict[str, Any] = {verb: {labelled.latent: dose}}
        with steer(self.pipe, self.saes[labelled.place], along=along, **edit):
            after = self.read(self.cache.prompts.take(images.tolist()))
        return compare(labelled, pool.answers(images), after, up=verb == "add")

    def read(self, prompts: Prompts) -> Answers:
        """What the judge says of pictures of these prompts."""
        told = self.judge.factors(draw(self.pipe, prompts, self.settings))
        if told is None:
            raise KitError(f"screen: {self.judge.name} names no factors. Pass a judge that does, such as WorldJudge().")
        return told


class _Pool:
    """Prompts of one object of one split, and what the judge says of their pictures without any edit."""

    def __init__(self, screening: _Screening, split: Any) -> None:
        cache = screening.cache
        known = [expected(factors) for factors in cache.prompts.factors]
        images = [i for i in cache.images(split).tolist() if known[i] and known[i].get("count", "one") == "one"]
        rng = np.random.default_rng([screening.recipe["seed"], len(split)])
        self.images = np.sort(rng.permutation(np.array(images, dtype=np.int64))[:_POOL])
        self.known = {image: known[image] for image in self.images.tolist()}
        self.strengths = [screening.measure(sae, self.images) for sae in screening.saes]
        parts = [self.images[start : start + _BATCH] for start in range(0, len(self.images), _BATCH)]
        read = [screening.read(cache.prompts.take(part.tolist())) for part in parts]
        self._answers = {
            factor: np.concatenate([each[factor] for each in read]) for factor in (read[0] if read else {})
        }

    def choose(self, labelled: Labelled, *, off: bool, n: int) -> Int[np.ndarray, " image"]:
        """The first n that show the label's value while the feature fires (`off`), or that show another value."""
        values = [self.known[image].get(labelled.factor) for image in self.images.tolist()]
        shows = np.array([value == labelled.value for value in values])
        others = np.array([value is not None for value in values]) & ~shows
        chosen = shows & (self.strengths[labelled.place][:, labelled.latent] > FIRES) if off else others
        return self.images[chosen][:n]

    def answers(self, images: Int[np.ndarray, " image"]) -> Answers:
        at = np.searchsorted(self.images, images)
        return {factor: told[at] for factor, told in self._answers.items()}


def compare(labelled: Labelled, before: Answers, after: Answers, *, up: bool) -> Outcome:
    """What an edit did to the judge's answers."""
    column, sign = FACTORS[labelled.factor].index(labelled.value), 1 if up else -1
    own = [log_odds(answers[labelled.factor], column) for answers in (before, after)]
    said, says = (answers[labelled.factor].argmax(axis=1) == column for answers in (before, after))
    changed = {
        factor: (before[factor].argmax(axis=1) != after[factor].argmax(axis=1)).tolist()
        for factor in before
        if factor != labelled.factor
    }
    return Outcome((sign * (own[1] - own[0])).tolist(), ((said != up) & (says == up)).tolist(), changed)


def log_odds(told: Float[np.ndarray, "image answer"], column: int) -> Float[np.ndarray, " image"]:
    """ln p / (1 − p) of an answer, 1 − p being the sum of the others: it does not saturate where p rounds to 1."""
    p = np.maximum(told.astype(np.float64), 1e-30)
    return np.asarray(np.log(p[:, column]) - np.log(np.delete(p, column, axis=1).sum(axis=1)))


def _merit(outcome: Outcome) -> tuple[float, float, float]:
    """Edits that keep other factors first; among them by the share moved, then by how surely (mean / deviation)."""
    moved = np.array(outcome.moved)
    return (min(*outcome.kept.values(), KEPT), outcome.share_moved, float(moved.mean() / (moved.std() + 1e-9)))


def _spread(images: Int[np.ndarray, " image"], n: int) -> Int[np.ndarray, " image"]:
    return np.asarray(images[np.linspace(0, len(images) - 1, min(len(images), n)).astype(int)])

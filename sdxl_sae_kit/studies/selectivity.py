"""Selectivity: which labelled features, when edited, move what their label says and leave the other factors alone.

Labels come from what features respond to; edits are chosen on training prompts and confirmed on held-out ones, beside
edits of the same size along other directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.distances import draw, drawing, made_by
from sdxl_sae_kit.studies.labelled import DOSES, Answers, Labelled, Labels, Pool, gain, read_saes
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.selected import CONDITIONS, CONTROLS, FILE, KEPT, Outcome, Selectivity

_POOL, _FEWEST = 240, 6
_BATCH = 48


@checked
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
        trials: training prompts of each trial, from 6.
        prompts: held-out prompts of each confirmation, from 6: fewer where there are no more.
        judge: one that names factors; by default the embedded model's.
        seed: for the choice of prompts and the random directions.
        store: folder of artifacts.

    Raises:
        ArtifactError: an SAE or a cache of another model.
        HookpointError: the cache does not have an SAE's hookpoint.
        KitError: no SAE, prompts without factors, or a judge that names none.

    >>> screen(pipe, saes, cache).plot()                                                           # doctest: +SKIP
    """
    chosen = read_saes("screen", pipe, saes, cache)
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
        self.labels = Labels(saes, cache)

    def run(self) -> None:
        candidates = list(self.labels.best(self.recipe["per_value"]))
        n = min(self.recipe["n"], len({(each.place, each.latent) for each in candidates}))
        cost = len(candidates) * len(DOSES) * self.recipe["trials"] + n * len(CONDITIONS) * self.recipe["prompts"]
        tqdm.write(
            f"Screening {len(candidates)} labelled features of {len(self.saes)} SAEs and confirming {n}: about "
            f"{cost:,} pictures, as {self.artifact.name}."
        )
        training, held_out = (_Read(self, split) for split in ("train", "held_out"))
        tried = [self._try(each, training) for each in tqdm(candidates, desc="screen", unit="feature")]
        best = sorted((each for each in tried if each), key=lambda each: _merit(each.outcome), reverse=True)
        chosen = dict[tuple[int, int], _Tried]()
        for each in best:
            if len(held_out.choose(each.labelled, off=each.verb == "scale")) >= _FEWEST:
                chosen.setdefault((each.labelled.place, each.labelled.latent), each)
        for place, each in enumerate(tqdm(list(chosen.values())[:n], desc="confirm", unit="feature")):
            if f"confirmed {place}" not in self.lines:
                told = {"labelled": asdict(each.labelled), "verb": each.verb, "dose": each.dose}
                self.lines.add(f"confirmed {place}", told | {"outcomes": self._confirm(each, held_out)})
        self.artifact.seal(facts={"tried": len(candidates), "confirmed": min(n, len(chosen))})

    def _try(self, labelled: Labelled, pool: _Read) -> _Tried | None:
        """The best edit on training prompts, and what it did; none where too few prompts show the value or lack it."""
        unit = f"tried {labelled.place} {labelled.latent} {labelled.factor} {labelled.value}"
        if unit not in self.lines:
            outcomes = [self._edit(labelled, verb, dose, pool, self.recipe["trials"], {}) for verb, dose in DOSES]
            self.lines.add(unit, {"outcomes": [each and asdict(each) for each in outcomes]})
        told = zip(DOSES, self.lines[unit]["outcomes"], strict=True)
        done = [_Tried(labelled, verb, dose, Outcome(**each)) for (verb, dose), each in told if each]
        return max(done, key=lambda each: _merit(each.outcome), default=None)

    def _confirm(self, chosen: _Tried, pool: _Read) -> dict[str, Any]:
        return {
            condition: asdict(outcome)
            for condition, along in self._directions(chosen.labelled).items()
            if (outcome := self._edit(*chosen[:3], pool, self.recipe["prompts"], along))
        }

    def _directions(self, labelled: Labelled) -> dict[str, dict[int, Float[np.ndarray, " d_in"]]]:
        """What `steer` is to write along in each condition."""
        vectors = self.labels.directions(labelled, self.recipe["seed"], 1)
        return {"feature": {}} | {control: {labelled.latent: vectors[control][0]} for control in CONTROLS}

    def _edit(
        self, labelled: Labelled, verb: str, dose: float, pool: _Read, n: int, along: Mapping[int, Any]
    ) -> Outcome | None:
        """Edit prompts that show the value, or lack it where the feature is added; None where there are too few."""
        images = pool.choose(labelled, off=verb == "scale")[:n]
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


class _Read(Pool):
    """A pool of prompts, with what the judge says of their pictures without any edit."""

    def __init__(self, screening: _Screening, split: Any) -> None:
        super().__init__(screening.saes, screening.cache, split, _POOL, screening.recipe["seed"])
        parts = [self.images[start : start + _BATCH] for start in range(0, len(self.images), _BATCH)]
        read = [screening.read(screening.cache.prompts.take(part.tolist())) for part in parts]
        self._answers = {
            factor: np.concatenate([each[factor] for each in read]) for factor in (read[0] if read else {})
        }

    def answers(self, images: Int[np.ndarray, " image"]) -> Answers:
        at = np.searchsorted(self.images, images)
        return {factor: told[at] for factor, told in self._answers.items()}


def compare(labelled: Labelled, before: Answers, after: Answers, *, up: bool) -> Outcome:
    """What an edit did to the judge's answers."""
    moved, flipped = gain(labelled, before, after, up=up)
    changed = {
        factor: (before[factor].argmax(axis=1) != after[factor].argmax(axis=1)).tolist()
        for factor in before
        if factor != labelled.factor
    }
    return Outcome(moved, flipped, changed)


def _merit(outcome: Outcome) -> tuple[float, float, float]:
    """Edits that keep other factors first; among them by the share moved, then by how surely (mean / deviation)."""
    moved = np.array(outcome.moved)
    return (min(*outcome.kept.values(), KEPT), outcome.share_moved, float(moved.mean() / (moved.std() + 1e-9)))

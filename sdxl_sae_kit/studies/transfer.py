"""Transfer of edits: do edits found in one setting of a model work in another setting, or in another model?

Edits are found where the SAEs were trained, on training prompts, and tried on held-out ones, there and elsewhere, in
windows of denoising steps, beside the same edits along other directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.edits import Edit
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.interventions import check_fit, steer
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.distances import distances, draw, drawing, made_by, sheet
from sdxl_sae_kit.studies.labelled import DOSES, NOTHING, Answers, Labelled, Labels, Pool, gain, read_saes
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.transferred import ALL, CONDITIONS, FILE, PICTURE, SETTINGS, Transfer
from sdxl_sae_kit.tiny.world import FACTORS

THIRDS: Mapping[str, tuple[float, float]] = {"early": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1.0)}
"""Windows as fractions of all steps: step i of n is in one where start ≤ i / n < end."""
_POOL, _TRIED, _LEAST = 240, "tried.jsonl", 2
_NEUTRAL = {"scale": 1.0, "add": 0.0}


class Change(NamedTuple):
    """One way to edit a latent: how much, in which steps, and along what if not its own direction, by prompt."""

    dose: float
    """What the activation is multiplied by, or how many times the mean activation is added."""
    steps: tuple[float, float] | None = None
    along: Float[np.ndarray, "prompt d_in"] | None = None

    def on(self, prompts: slice) -> Change:
        """The same on some of the prompts."""
        return self if self.along is None else self._replace(along=self.along[prompts])


class _Chosen(NamedTuple):
    """An edit, and the held-out prompts on which it is tried."""

    labelled: Labelled
    verb: str
    dose: float
    prompts: Prompts


@checked
def transfer_edits(
    pipe: Any,
    saes: SAE | Iterable[SAE] | Mapping[Any, SAE],
    cache: Activations,
    to: Any,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    n: int = 6,
    prompts: int = 4,
    trials: int = 6,
    windows: Mapping[str, tuple[float, float]] = THIRDS,
    judge: PictureJudge | EllipsisType | None = ...,
    seed: int = 0,
    batch_size: int = 44,
    store: Store | Path | str | None = None,
) -> Transfer:
    """Find edits that work where the SAEs were trained, and try the same edits elsewhere, window by window of steps.

    For each value of each factor the latent that tells it best on training images (AUC of its maximum over tokens, at
    least 0.75) is tried with each edit of `DOSES`, on `trials` training prompts of one object: turned off where the
    value is shown and the latent fires, added where another value is shown. The n edits, each of another latent, that
    move the log-odds of their value as expected on the greatest share of these prompts, then with the greatest mean /
    deviation, are taken; targets that are tried later find them done. Each is then tried on `prompts` held-out prompts,
    which no other edit gets, at the source and at the target: over all steps, and in each window alone that holds some
    of the steps but not all. Beside it stands the same edit, of the same amounts at the same tokens, along a random
    direction as long, another one for every prompt, and, over all steps, along those of the feature which fires on most
    nearly as many images and of the untrained SAE's latent. All pictures of a prompt are made in one batch. It is told
    how often the log-odds of the value move as expected (by more than 0.01), how far, how often the likeliest answer
    follows, and how far the picture moves.

    With guidance what is added goes to the cond half and is subtracted from the uncond half (`cfg="both"` of `steer`);
    a scaled latent is scaled in each half by its own activation.

    Killed at any moment, it goes on at the edit in hand.

    Args:
        pipe: the source: the pipeline whose updates the SAEs were trained on.
        saes: one SAE or several, also of one hookpoint.
        cache: their updates, of prompts that tell their factors; its steps and guidance are those of the source, its
            split says which prompts are held out.
        to: the target: the same pipeline, to be tried with other settings, or another SDXL-shaped one of this width.
        num_inference_steps, guidance_scale: of the target; as it is meant to be used unless given.
        n: edits.
        prompts: held-out prompts for each edit; fewer where there are no more, and at least 2.
        trials: training prompts on which edits are found, from 2.
        windows: name → (start, end): the steps i of n_steps with start ≤ i / n_steps < end.
        judge: one that names the world's factors; by default the embedded model's. Real models have none.
        seed: for the choice of prompts and the random directions.
        batch_size: pictures made at once; at least those of one prompt are.
        store: folder of artifacts.

    Raises:
        ArtifactError: an SAE or a cache of another model than the source, or an SAE of another width than the target.
        HookpointError: the cache or the target does not have an SAE's hookpoint.
        KitError: no SAE or one twice, prompts without factors, no edit that can be tried, no judge that names factors,
            impossible windows, or a target that is the source itself.

    Example:
        >>> transfer_edits(pipe, saes_by_hookpoint, cache, pipe, num_inference_steps=4)           # doctest: +SKIP
    """
    asked = "transfer_edits"
    chosen = read_saes(asked, pipe, saes, cache)
    with warnings.catch_warnings():
        _expect_another_model()
        for sae in chosen:
            check_fit(to, sae)
    judge = chosen_judge(asked, pipe, judge)
    if judge is None:
        raise KitError(
            f"{asked}: this model has no judge that names factors, so nothing tells whether an edit worked. Pass "
            "judge=, one that gives the probabilities of the world's factors; generalize needs none."
        )
    source = made_by(pipe) | {name: cache.recipe[name] for name in SETTINGS}
    target = made_by(to) | drawing(to, num_inference_steps, guidance_scale)
    if source == target:
        raise KitError(f"{asked}: the target is the source itself. Pass num_inference_steps=, or another pipeline.")
    found: dict[str, Any] = {"study": "edits", "source": source, "cache": cache.digest, "judge": judge.name}
    found |= {"saes": [[sae.hookpoint, sae.name, sae.digest] for sae in chosen], "edits": list(map(list, DOSES))}
    for name, value, least in (("trials", trials, _LEAST), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        found[name] = whole_number(f"{asked}: {name}", value, least=least)
    recipe: dict[str, Any] = {
        "study": "transfer",
        "found": found,
        "target": target,
        "windows": _read_windows(asked, windows),
    }
    for name, value, least in (("n", n, 1), ("prompts", prompts, _LEAST)):
        recipe[name] = whole_number(f"{asked}: {name}", value, least=least)
    place = Store.at(store)
    artifact = place.artifact("studies", f"transfer_{source['model']}_to_{target['model']}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                edits = place.artifact("studies", f"edits_{source['model']}_{len(chosen)}saes", found)
                _Trying(pipe, to, chosen, cache, judge, artifact).run(edits)
    return Transfer.open(artifact.folder)


# What is asked --------------------------------------------------------------------------------------------------------


def _expect_another_model() -> None:
    """Do not warn of what is the question here."""
    warnings.filterwarnings("ignore", message=".*its features may mean something else here")


def _read_windows(asked: str, windows: Any) -> list[list[Any]]:
    """As a list, whose order a recipe keeps."""
    if not isinstance(windows, Mapping) or ALL in windows or not all(isinstance(name, str) for name in windows):
        raise KitError(
            f"{asked}: windows are named fractions of all steps, such as {{'early': (0.0, 0.5)}}, and {ALL!r} is "
            f"always among them; not {windows!r}."
        )
    for name, ends in windows.items():
        try:
            Edit("any", steps=[float(end) for end in ends])
        except (KitError, TypeError, ValueError):
            raise KitError(
                f"{asked}: window {name!r} is two fractions, 0 ≤ start < end ≤ 1, such as (0.0, 0.5), not {ends!r}."
            ) from None
    return [[name, *map(float, ends)] for name, ends in windows.items()]


def windows_of(windows: Sequence[Sequence[Any]], n_steps: int) -> dict[str, tuple[float, float] | None]:
    """All steps (None), and of these (name, start, end) the windows that hold some of the steps but not all."""
    held = {name: sum(start <= i / n_steps < end for i in range(n_steps)) for name, start, end in windows}
    return {ALL: None} | {name: (start, end) for name, start, end in windows if 0 < held[name] < n_steps}


# The work -------------------------------------------------------------------------------------------------------------


class _Trying:
    """One run: edits are found at the source, then tried there and at the target."""

    def __init__(
        self, pipe: Any, to: Any, saes: Sequence[SAE], cache: Activations, judge: PictureJudge, artifact: Artifact
    ) -> None:
        self.pipe, self.to, self.saes, self.cache, self.judge, self.artifact = pipe, to, saes, cache, judge, artifact
        self.recipe, self.found = artifact.recipe, artifact.recipe["found"]
        self.labels = Labels(saes, cache)

    def run(self, edits: Artifact) -> None:
        """Find edits, unless another target's call did, and try them."""
        if not edits.finished:
            with edits.lock():
                if not edits.finished:
                    self._find(edits)
        chosen = list(self._choose(Lines(edits, _TRIED)))
        if not chosen:
            raise KitError(
                f"transfer_edits: no feature of these {len(self.saes)} SAEs tells a value of which there are enough "
                "prompts of one object, so no edit can be tried. Collect more prompts of 'world', or pass other SAEs."
            )
        self._say_cost(chosen)
        lines = Lines(self.artifact, FILE)
        for place, each in enumerate(tqdm(chosen, desc="transfer edits", unit="edit")):
            if f"edit {place}" not in lines:
                lines.add(f"edit {place}", self._try(place, each))
        self.artifact.seal(facts={"edits": len(chosen), "prompts": sum(len(each.prompts) for each in chosen)})

    def _say_cost(self, chosen: Sequence[_Chosen]) -> None:
        n = sum(len(each.prompts) for each in chosen)
        here, there = (
            n * (len(CONDITIONS) - 1 + 2 * len(windows_of(self.recipe["windows"], place["num_inference_steps"])))
            for place in (self.found["source"], self.recipe["target"])
        )
        steps = self.recipe["target"]["num_inference_steps"]
        tqdm.write(
            f"Trying {len(chosen)} edits on {n} held-out prompts: {here:,} pictures of the source and {there:,} of the "
            f"target in {steps} step(s), as {self.artifact.name}."
        )

    def _find(self, edits: Artifact) -> None:
        """Try every edit of every labelled feature on training prompts."""
        candidates, lines = list(self.labels.best(per_value=1)), Lines(edits, _TRIED)
        pool, trials = self._pool("train"), self.found["trials"]
        tqdm.write(
            f"Looking for edits among {len(candidates)} labelled features of {len(self.saes)} SAEs: at most "
            f"{len(candidates) * trials * (len(DOSES) + len(_NEUTRAL)):,} pictures, as {edits.name}."
        )
        for each in tqdm(candidates, desc="find edits", unit="feature"):
            unit = f"{each.place} {each.latent} {each.factor} {each.value}"
            if unit not in lines:
                lines.add(unit, {"labelled": asdict(each), "moved": dict(self._find_moves(each, pool))})
        edits.seal(facts={"features": len(candidates)})

    def _find_moves(self, labelled: Labelled, pool: Pool) -> Iterator[tuple[str, list[list[float]]]]:
        """By verb, for each of its doses the changes of log-odds; none where too few prompts show what it needs."""
        for verb in _NEUTRAL:
            images = pool.choose(labelled, off=verb == "scale")[: self.found["trials"]]
            if len(images) == self.found["trials"]:
                doses = [dose for each, dose in DOSES if each == verb]
                given = self.cache.prompts.take(images.tolist())
                told = self._draw(self.pipe, self.found["source"], labelled, verb, list(map(Change, doses)), given)
                before, *after = (self._read(told[:, at]) for at in range(1 + len(doses)))
                yield verb, [gain(labelled, before, each, up=verb == "add")[0] for each in after]

    def _choose(self, tried: Mapping[str, Mapping[str, Any]]) -> Iterator[_Chosen]:
        """The best edits, each with held-out prompts of its own."""
        pool, texts = self._pool("held_out"), self.cache.prompts.texts
        used, features = set[str](), set[tuple[int, int]]()
        for labelled, verb, dose in _rank(tried):
            if len(features) == self.recipe["n"]:
                return
            free = {texts[i]: i for i in pool.choose(labelled, off=verb == "scale").tolist() if texts[i] not in used}
            given = list(free)[: self.recipe["prompts"]]
            if (labelled.place, labelled.latent) not in features and len(given) >= _LEAST:
                features.add((labelled.place, labelled.latent))
                used |= set(given)
                yield _Chosen(labelled, verb, dose, self.cache.prompts.take(free[text] for text in given))

    def _try(self, place: int, chosen: _Chosen) -> dict[str, Any]:
        """What an edit does at the source and at the target; keeps pictures of its first prompt."""
        source, here = self._measure(self.pipe, self.found["source"], chosen)
        target, there = self._measure(self.to, self.recipe["target"], chosen)
        write_atomically(self.artifact.file(PICTURE.format(place)), sheet([[*here[:2], *there]]))
        told = {"labelled": asdict(chosen.labelled), "verb": chosen.verb, "dose": chosen.dose}
        return told | {"texts": list(chosen.prompts.texts), "source": source, "target": target}

    def _measure(
        self, pipe: Any, settings: Mapping[str, Any], chosen: _Chosen
    ) -> tuple[dict[str, dict[str, Any]], list[Float[np.ndarray, "y x 3"]]]:
        """By window and condition what the edit does; and pictures: as it is, and edited in every window."""
        labelled, verb, dose, prompts = chosen
        along = {"feature": None} | dict(self.labels.directions(labelled, self.found["seed"], len(prompts)))
        windows = windows_of(self.recipe["windows"], settings["num_inference_steps"])
        tried = {
            (window, condition): Change(dose, steps, along[condition])
            for window, steps in windows.items()
            for condition in (CONDITIONS if window == ALL else CONDITIONS[:2])
        }
        pictures = self._draw(pipe, settings, labelled, verb, list(tried.values()), prompts)
        before, outcomes = self._read(pictures[:, 0]), {window: dict[str, Any]() for window in windows}
        for at, (window, condition) in enumerate(tried, 1):
            moved, follows = gain(labelled, before, self._read(pictures[:, at]), up=verb == "add")
            far = distances(self.judge, pictures[:, 0], pictures[:, at])
            outcomes[window][condition] = {"moved": moved, "follows": follows, **far}
        edited = [pictures[0, at] for at, (_, condition) in enumerate(tried, 1) if condition == "feature"]
        return outcomes, [pictures[0, 0], *edited]

    def _draw(
        self, pipe: Any, settings: Mapping[str, Any], labelled: Labelled, verb: str,
        changes: Sequence[Change], prompts: Prompts,
    ) -> Float[np.ndarray, "prompt change y x 3"]:  # fmt: skip
        sae, given = self.saes[labelled.place], {name: settings[name] for name in SETTINGS}
        size = max(1, self.found["batch_size"] // (1 + len(changes)))
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        drawn = (
            draw_changes(pipe, sae, verb, labelled.latent, [each.on(part) for each in changes], prompts[part], given)
            for part in parts
        )
        return np.concatenate(list(drawn))

    def _pool(self, split: str) -> Pool:
        return Pool(self.saes, self.cache, split, _POOL, self.found["seed"])

    def _read(self, pictures: Float[np.ndarray, "image y x 3"]) -> Answers:
        """What the judge says of pictures."""
        told = self.judge.factors(pictures)
        if not told or not set(FACTORS) <= set(told):
            raise KitError(
                f"transfer_edits: {self.judge.name} does not name the world's factors. Pass a judge that does, such as "
                "WorldJudge()."
            )
        return told


def draw_changes(
    pipe: Any,
    sae: SAE,
    verb: str,
    latent: int,
    changes: Sequence[Change],
    prompts: Prompts,
    settings: Mapping[str, Any],
) -> Float[np.ndarray, "prompt change y x 3"]:
    """Every prompt as it is and with each change, in one batch: one `steer` for each, which is neutral to the others.

    So nothing that a batch of another size rounds otherwise counts as a change. A change along vectors of its own takes
    one `steer` for each prompt.
    """
    width = 1 + len(changes)
    rows = prompts.take(np.repeat(np.arange(len(prompts)), width).tolist())
    with ExitStack() as stack, warnings.catch_warnings():
        _expect_another_model()
        for at, change in enumerate(changes, 1):
            along = [{}] if change.along is None else [{latent: vector} for vector in change.along]
            for first, vectors in enumerate(along):
                strengths = np.full((len(prompts), width), _NEUTRAL[verb])
                strengths[first :: len(along), at] = change.dose
                edit: dict[str, Any] = {verb: {latent: strengths.ravel()}, "steps": change.steps, "along": vectors}
                stack.enter_context(steer(pipe, sae, **edit))
        pictures = draw(pipe, rows, settings)
    return pictures.reshape(len(prompts), width, *pictures.shape[1:])


def _rank(tried: Mapping[str, Mapping[str, Any]]) -> list[tuple[Labelled, str, float]]:
    """Every edit that was tried: by the share of prompts that it moves as expected, then by mean / deviation."""
    ranked = []
    for told in tried.values():
        for verb, by_dose in told["moved"].items():
            doses = [dose for each, dose in DOSES if each == verb]
            for dose, each in zip(doses, by_dose, strict=True):
                moved = np.array(each)
                merit = (float((moved > NOTHING).mean()), float(moved.mean() / (moved.std() + 1e-9)))
                ranked.append((merit, (Labelled(**told["labelled"]), verb, dose)))
    return [edit for _, edit in sorted(ranked, key=lambda each: each[0], reverse=True)]

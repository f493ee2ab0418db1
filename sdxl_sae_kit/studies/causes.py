"""What each feature causes: every feature of an SAE turned off, one at a time, beside equal amounts elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.interventions import check_measured
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.plots import effects_by_group
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.studies.controls import Change, as_long
from sdxl_sae_kit.studies.descriptors import describable
from sdxl_sae_kit.studies.distances import made_by, written
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.measures import enlarged, inside_and_outside
from sdxl_sae_kit.studies.pairs import Order, Pairs, count_pictures, draw_pairs, strongest_held_out, token_pixels
from sdxl_sae_kit.studies.statistics import bhattacharyya, coarse_share, colour_share

LOOKS = ("inside", "outside", "coarse share", "colour share")
"""What is measured of pictures alone: mean |difference| of colours 0 to 1 over the tokens on which the feature fires,
and over the others; and how the energy of the difference is shared out (`statistics`)."""

SEMANTIC = "semantic"
"""What is measured by a judge that tells how different two pictures are, but names no factors."""

OFF, RANDOM = "feature", "random direction"
"""What is turned off: the feature, or as much along a random direction."""

FLOOR = 1e-6
"""Differences below it are rounding, and count as 0."""

_FILE = "causes.jsonl"


@dataclass(frozen=True)
class Causes:
    """What changes in pictures when each feature of an SAE is turned off.

    Attributes:
        latents (feature,): the features.
        names: what is measured. Of each factor that the judge names, Bhattacharyya's distance of its answers to the two
            pictures, 0 to 1; or else `SEMANTIC`, where the judge tells that; and `LOOKS`.
        values (feature, name): mean over a feature's prompts, differences below `FLOOR` taken as 0; NaN where it cannot
            be told: where the feature fires on no held-out image, or (outside) on every token.
        control (feature, name): the same of equal amounts at the same tokens along a random direction.
        n_prompts (feature,): held-out images on which each was turned off.
    """

    artifact: Artifact = field(repr=False)
    sae: str
    hookpoint: str
    latents: Int[np.ndarray, "feature"] = field(repr=False)
    names: tuple[str, ...]
    values: Float[np.ndarray, "feature name"] = field(repr=False)
    control: Float[np.ndarray, "feature name"] = field(repr=False)
    n_prompts: Int[np.ndarray, "feature"] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Causes:
        """Read what `measure_causes` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "causes", "measure_causes")
        recipe, found = artifact.recipe, list(Lines(artifact, _FILE).values())
        names = next((tuple(told[OFF]) for line in found for told in line.values()), LOOKS)
        place = {str(latent): at for at, latent in enumerate(recipe["latents"])}
        told = np.full((2, len(place), recipe["prompts_per_feature"], len(names)), np.nan)
        n_prompts = np.zeros(len(place), dtype=np.int64)
        for line in found:
            for latent, numbers in line.items():
                at = place[latent]
                told[:, at, n_prompts[at]] = [_numbers(numbers[what], names) for what in (OFF, RANDOM)]
                n_prompts[at] += 1
        values, control = _means(np.where((told < FLOOR) & [not _is_share(name) for name in names], 0, told))
        latents = np.array(recipe["latents"], dtype=np.int64)
        return cls(artifact, recipe["sae_name"], recipe["hookpoint"], latents, names, values, control, n_prompts)

    @property
    def factors(self) -> tuple[str, ...]:
        """What a judge told, which is all but `LOOKS`."""
        return tuple(name for name in self.names if name not in LOOKS)

    def rows(self) -> list[dict[str, Any]]:
        """A row per name, with 95 % bootstrap intervals over the n features of which both could be measured.

        `feature` is the mean of what turning a feature off changes, `random direction` that of equal amounts along a
        random direction on the same prompts, `difference` the mean of feature − random direction, and `larger` the
        share of features that change more than the random direction does, ties half: ½ by chance. Means hang on few
        features, `larger` on none. Features that were tried on the same images are taken as independent, which they
        are only roughly; each interval is of its own name alone, not corrected for how many there are.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for at, name in enumerate(self.names):
            both = np.stack([self.values[:, at], self.control[:, at]])
            feature, random = both[:, np.isfinite(both).all(axis=0)]
            larger = (1 + np.sign(feature - random)) / 2
            row: dict[str, Any] = {"changes": name}
            for column, values in {
                OFF: feature,
                RANDOM: random,
                "difference": feature - random,
                "larger": larger,
            }.items():
                row[column] = float(values.mean()) if len(values) else np.nan
                row[f"{column} interval"] = bootstrap_interval(values)
            rows.append(row | {"n": len(feature)})
        return rows

    def sentence(self) -> str:
        """What the numbers say."""
        rows = {row["changes"]: row for row in self.rows()}
        inside, outside = rows["inside"], rows["outside"]
        return (
            f"Turning off a feature of {self.hookpoint} changes colours by {written(inside, OFF)} of their range where "
            f"it fires and {written(outside, OFF)} elsewhere, equal amounts along a random direction by "
            f"{written(inside, RANDOM)} and {written(outside, RANDOM)} (means over {inside['n']:,} features on up to "
            f"{self.artifact.recipe['prompts_per_feature']} held-out images each, with 95 % intervals over features). "
            f"{self._on_factors(rows)}"
        )

    def _on_factors(self, rows: Mapping[str, Mapping[str, Any]]) -> str:
        if not self.factors:
            return "No judge told what the pictures show."
        verdicts: dict[str, list[str]] = {"more often": [], "less often": [], "as often, within the interval,": []}
        for name in self.factors:
            low, high = rows[name]["larger interval"]
            kind = "more often" if low > 0.5 else "less often" if high < 0.5 else "as often, within the interval,"
            verdicts[kind].append(f"{name} ({written(rows[name], 'larger', share=True)})")
        told = "; ".join(f"{kind} for {', '.join(names)}" for kind, names in verdicts.items() if names)
        most = max(self.factors, key=lambda name: float(rows[name][OFF]))
        return (
            f"What the judge says changes most in {most}, by {written(rows[most], OFF)} ({self._distance}; random "
            f"direction {written(rows[most], RANDOM)}), {self._top_share(most):.0%} of it by the tenth of the "
            "features that changes it most. On the same prompts a feature changes it more than the random direction "
            f"does, compared with one feature in two, {told}."
        )

    @property
    def _distance(self) -> str:
        return "the judge's own distance" if self.factors == (SEMANTIC,) else "Bhattacharyya's distance"

    def _top_share(self, name: str) -> float:
        """Of all that features change: what the tenth that changes most does."""
        values = self.values[:, self.names.index(name)]
        told = np.sort(values[np.isfinite(values)])
        return float(told[len(told) // -10 :].sum() / max(told.sum(), 1e-300))

    def plot(self) -> Any:
        """What features change beside a random direction, with 95 % intervals (plotly)."""
        rows = [row for row in self.rows() if not _is_share(row["changes"])]
        series = {column: [(row[column], *row[f"{column} interval"]) for row in rows] for column in (OFF, RANDOM)}
        title = f"What turning off a feature of {self.hookpoint} changes: mean over features"
        y = f"{self._distance}; inside, outside: mean |difference|"
        return effects_by_group([row["changes"] for row in rows], series, title=title, y=y)

    def _repr_html_(self) -> str:
        caption = (
            "Mean change when a feature is turned off, and when equal amounts along a random direction are on the same "
            "prompts; 95 % bootstrap intervals over features"
        )
        title = html.heading(f"What the features of {self.hookpoint} cause", html.escape(self.sentence()))
        return html.fragment(title, html.table(self.rows(), caption))

    def __repr__(self) -> str:
        return f"Causes of {len(self.latents)} features of {self.sae}: {', '.join(self.names)}"


@checked
def measure_causes(
    pipe: Any,
    sae: SAE,
    stats: FeatureStats,
    latents: Sequence[int] | Int[np.ndarray, "feature"] | None = None,
    *,
    prompts_per_feature: int = 2,
    judge: PictureJudge | EllipsisType | None = ...,
    seed: int = 0,
    batch_size: int = 32,
    store: Store | Path | str | None = None,
) -> Causes:
    """Turn off many features, one at a time, each on the held-out images on which it is strongest, and measure.

    The feature's activation is multiplied by 0 at every token and step, and the SAE's error kept. Each feature is tried
    on the images of the highest spatial mean; on each of them, as the control, the same amounts are subtracted along a
    random direction as long as its own. Features that share an image share the picture as it is, and pictures of
    different features come from one call of the pipeline. All changed pictures of an image are held until the last of
    them is made; killed at any moment, it keeps the images that were whole by then, and goes on with the others. What
    one feature does at other doses and beside harder controls, `ablate` tells.

    Args:
        pipe: the pipeline whose updates the SAE was trained on.
        sae: a trained SAE.
        stats: its feature statistics.
        latents: which; by default all that fire on at least 5 images (`describable` takes some of them).
        prompts_per_feature: at most so many images for each.
        judge: tells what pictures show; by default the model's own (`judge_of`), None for pixels only.
        seed: of the random directions.
        batch_size: pictures made at once, from 2.
        store: folder of artifacts.

    Raises:
        ArtifactError: `stats` belong to another SAE, or the SAE to another model.
        KitError: a latent that does not exist or comes twice, none that fires on held-out images, an impossible
            setting, or an SAE whose latents have no direction that is the same for all tokens.

    Example:
        >>> measure_causes(pipe, saes["down.2.1", "k5"], stats).sentence()                # doctest: +SKIP
    """
    check_measured("measure_causes", pipe, sae, stats)
    judge = chosen_judge("measure_causes", pipe, judge)
    chosen = _read_latents(stats, latents)
    recipe = {
        "study": "causes",
        "sae": sae.digest,
        "sae_name": sae.name,
        "hookpoint": sae.hookpoint,
        "stats": stats.artifact.digest,
        "latents": chosen,
        "prompts_per_feature": whole_number("measure_causes: prompts_per_feature", prompts_per_feature),
        "judge": None if judge is None else judge.name,
        "seed": whole_number("measure_causes: seed", seed, least=0),
        "batch_size": whole_number("measure_causes: batch_size", batch_size, least=2),
        **made_by(pipe),
    }
    orders = _order(sae, stats, recipe)
    artifact = Store.at(store).artifact("studies", f"causes_{sae.name.rsplit('-', 1)[0]}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, copy.deepcopy(sae).to(pipe.device), stats, orders, judge, artifact)
    return Causes.open(artifact.folder)


def _read_latents(stats: FeatureStats, latents: Any) -> list[int]:
    given = describable(stats).tolist() if latents is None else list(latents)
    for latent in given:
        if isinstance(latent, bool) or not isinstance(latent, Integral) or not 0 <= int(latent) < stats.d_sae:
            raise KitError(
                f"measure_causes: {stats.sae} has latents 0 to {stats.d_sae - 1}; there is no {latent!r}. "
                "Take some of stats.alive."
            )
    if len(set(given)) < len(given):
        raise KitError(f"measure_causes: latents {given} hold one twice. Give each once.")
    return [int(latent) for latent in given]


def _order(sae: SAE, stats: FeatureStats, recipe: Mapping[str, Any]) -> list[Order]:
    """Each image with the features to be turned off on it, each beside a random direction."""
    tried = strongest_held_out(stats, recipe["latents"], recipe["prompts_per_feature"])
    decoder, orders = sae.directions.detach().cpu().numpy(), dict[int, Order]()
    for latent, images in tried.items():
        random = np.random.default_rng([recipe["seed"], latent]).standard_normal(sae.d_in)
        changes = {OFF: Change(latent, decoder[latent]), RANDOM: Change(latent, as_long(decoder[latent], random))}
        for image in images:
            made = Order(image, stats.prompts.texts[image], stats.prompts.seeds[image], {})
            given = orders.setdefault(image, made).changes
            given |= {(latent, name): change for name, change in changes.items()}  # type: ignore[operator]
    if not orders:
        raise KitError(
            f"measure_causes: none of {len(tried)} latents of {stats.sae} fires on a held-out image, so there is "
            "nothing to turn off. Measure on more prompts, or take other latents."
        )
    return list(orders.values())


def _run(
    pipe: Any, sae: SAE, stats: FeatureStats, orders: Sequence[Order], judge: PictureJudge | None, artifact: Artifact
) -> None:
    recipe, lines = artifact.recipe, Lines(artifact, _FILE)
    done = {int(image) for image in lines}
    tqdm.write(
        f"Turning off {counted(len(recipe['latents']), 'features')} of {sae.name} on "
        f"{counted(len(orders), 'images')}: {count_pictures(orders, done, recipe['batch_size']):,} pictures to make, "
        f"as {artifact.name}."
    )
    pixels = token_pixels(pipe, sae)
    with tqdm(total=len(orders), initial=len(done), desc="causes", unit="image") as bar:
        for pairs in draw_pairs(pipe, sae, stats, orders, done, recipe["batch_size"]):
            lines.add(str(pairs.order.image), _measure(pairs, judge, pixels))
            bar.update()
    artifact.seal(facts={"features": len(recipe["latents"]), "images": len(orders)})


def _measure(pairs: Pairs, judge: PictureJudge | None, pixels: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """By feature that fires on this image and by what is turned off, every name's number; None where there is none."""
    told = _judged(judge, pairs.clean[None], np.stack([changed for _, changed in pairs.pictures.values()]))
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for row, ((latent, what), (clean, changed)) in enumerate(pairs.pictures.items()):
        fires = pairs.z[..., latent] > FIRES
        if fires.any():
            change = changed - clean
            inside, outside = inside_and_outside(np.abs(change).mean(axis=2), enlarged(fires, pixels))
            looks = (inside, outside, coarse_share(change, pixels), colour_share(change))
            numbers = {name: values[row] for name, values in told.items()} | dict(zip(LOOKS, looks, strict=True))
            known = {
                name: None if value is None or np.isnan(value) else float(value) for name, value in numbers.items()
            }
            found.setdefault(str(latent), {})[what] = known
    return found


def _judged(
    judge: PictureJudge | None, clean: Float[np.ndarray, "1 y x 3"], changed: Float[np.ndarray, "image y x 3"]
) -> dict[str, NDArray[np.floating]]:
    """How far each changed picture is from the one as it is, by what the judge can tell."""
    if judge is None:
        return {}
    answers = judge.factors(np.concatenate([clean, changed]))
    if answers is not None:
        return {factor: bhattacharyya(p[:1], p[1:]) for factor, p in answers.items()}
    semantic = judge.semantic(clean, changed)
    return {} if semantic is None else {SEMANTIC: semantic}


def _numbers(told: Mapping[str, float | None], names: Sequence[str]) -> list[float]:
    return [np.nan if (value := told[name]) is None else value for name in names]


def _means(told: Float[np.ndarray, "what feature prompt name"]) -> Float[np.ndarray, "what feature name"]:
    """Over the prompts of which something is told; NaN where there are none."""
    there = np.isfinite(told).sum(axis=2)
    return np.asarray(np.nansum(told, axis=2) / np.where(there > 0, there, np.nan))


def _is_share(name: str) -> bool:
    return name.endswith("share")

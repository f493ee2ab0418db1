"""Ranking of blocks: what each block of the U-Net adds is left out, one block at a time, to see what hangs on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import kendalltau
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import list_blocks, resolve_block
from sdxl_sae_kit.hooks import silence
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.maps import share_map
from sdxl_sae_kit.observation import as_prompts
from sdxl_sae_kit.plots import ranked_bars
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.studies.distances import (
    MEASURES,
    answers,
    batches,
    by_prompt,
    distances,
    draw,
    drawing,
    estimate,
    made_by,
    sheet,
    written,
)
from sdxl_sae_kit.studies.lines import Lines, open_study

OTHER_SEED = "another seed"
"""The yardstick: another picture of the same prompt, with every block at work."""
MIN_PROMPTS = 4
"""Halves of fewer tell nothing of how stable a ranking is."""

_FILE, _PICTURE = "blocks.jsonl", "first-{}.webp"
_FURTHER = 1_000_003  # the other seed is so much higher
_SPLITS, _SAMPLES = 200, 2000


@dataclass(frozen=True)
class BlockRanking:
    """What each block's contribution is worth: how far pictures move from the clean ones when it is left out."""

    artifact: Artifact = field(repr=False)
    blocks: tuple[str, ...]
    """In the order of the forward pass."""
    measures: tuple[str, ...]
    """The distances that could be told, each from 0: see `distances.MEASURES`."""
    n_images: int
    """Pictures in each condition, one of every prompt and seed."""
    _results: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> BlockRanking:
        """Read what `rank_blocks` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "block ranking", "rank_blocks")
        recipe = artifact.recipe
        results = Lines(artifact, _FILE)
        first = next(iter(results.values()))["changed"][OTHER_SEED]
        measures = tuple(measure for measure in MEASURES if measure in first)
        images = sum(len(result["texts"]) for result in results.values())
        return cls(artifact, tuple(recipe["blocks"]), measures, images, results)

    @property
    def measure(self) -> str:
        """The distance that ranks: as a viewer would judge it, if that can be told."""
        return "perceptual" if "perceptual" in self.measures else "pixel"

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that the judge reads; none without one that knows them."""
        return tuple(next(iter(self._results.values()))["changed"][OTHER_SEED]["factors"])

    def rows(self) -> list[dict[str, Any]]:
        """A row per block, the one whose absence moves pictures furthest first, with 95 % intervals over prompts.

        Each distance from the clean picture; the `rank` by `measure` with its bootstrap interval (NaN of one prompt
        alone); and `most changed`, the factor to which the judge's answer differs from the clean picture's most often,
        in which `share` of images.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        distances_of = self._by_block(self.measure)
        places, order = _ranks(distances_of.mean(axis=0)), np.argsort(-distances_of.mean(axis=0), kind="stable")
        intervals = self._rank_intervals(distances_of).T.tolist()
        if len(distances_of) < 2:  # samples of one prompt are all the same, which makes no rank certain
            intervals = [[np.nan, np.nan]] * len(self.blocks)
        return [
            {"block": self.blocks[at], "rank": int(places[at]), "rank interval": tuple(intervals[at])}
            | self._row(self.blocks[at])
            for at in order
        ]

    def _row(self, condition: str) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for measure in self.measures:
            row |= estimate(measure, self._values(condition, measure))
        if self.factors:
            changed = {factor: self._factor(condition, factor) for factor in self.factors}
            most = max(changed, key=lambda factor: float(changed[factor].mean()))
            row |= {"most changed": most} | estimate("share", changed[most])
        return row

    def other_seed(self) -> dict[str, Any]:
        """The same for another picture of the same prompt, as a yardstick."""
        return self._row(OTHER_SEED)

    def damage(self) -> list[dict[str, Any]]:
        """A row per block in the order of the forward pass: for each factor the share of images whose answer differs.

        The answer is the judge's likeliest, none included, and it differs from that to the clean picture.
        """
        return [
            {"block": block} | {factor: float(self._factor(block, factor).mean()) for factor in self.factors}
            for block in self.blocks
        ]

    def stability(self) -> dict[str, Any]:
        """Kendall's τ-b between the rankings by two random halves of the prompts: mean and 95 % range of 200 splits.

        `tau`, −1 to 1, and `tau interval`, both NaN of fewer than 4 prompts. The halves have half as many prompts as
        the ranking itself, so it is, if anything, more stable than this says.
        """
        return self._stability

    @cached_property
    def _stability(self) -> dict[str, Any]:
        values, rng, found = self._by_block(self.measure), np.random.default_rng(0), []
        for _ in range(_SPLITS if len(values) >= MIN_PROMPTS else 0):
            dealt = rng.permutation(len(values))
            one, other = (values[half].mean(axis=0) for half in np.array_split(dealt, 2))
            found.append(kendalltau(one, other).statistic)
        low, high = np.quantile(found, [0.025, 0.975]) if found else (np.nan, np.nan)
        return {"tau": float(np.mean(found)) if found else float("nan"), "tau interval": (float(low), float(high))}

    def sentence(self) -> str:
        """What the numbers say."""
        rows, measure = self.rows(), self.measure
        first = ", ".join(f"{row['block']} {written(row, measure)}" for row in rows[:3])
        beyond = sum(row[measure] > self.other_seed()[measure] for row in rows)
        stable = self.stability()
        steady = (
            f"Kendall's τ-b between rankings by halves of the prompts is {written(stable, 'tau')} ({_SPLITS} random "
            "splits, 95 % of them)"
            if np.isfinite(stable["tau"])
            else f"fewer than {MIN_PROMPTS} prompts do not tell how stable the ranking is"
        )
        return (
            f"Of {len(rows)} blocks, leaving out what one adds moves pictures furthest at {first} ({measure} distance "
            f"from the clean picture) and least at {rows[-1]['block']}, {written(rows[-1], measure)}; in brackets 95 % "
            f"bootstrap intervals over {self._n_prompts} prompts ({self.n_images} images). Another seed's picture of "
            f"the same prompt is {written(self.other_seed(), measure)} away: {beyond} of the blocks are worth more "
            f"than that. {steady[0].upper() + steady[1:]}.{self._on_factors()}"
        )

    def _on_factors(self) -> str:
        if not self.factors:
            return ""
        told = (
            f"{row['block']} {row['most changed']} ({written(row, 'share', share=True)})" for row in self.rows()[:3]
        )
        return f" The factor to which the judge's answer changes most often: {', '.join(told)}."

    def plot(self) -> Any:
        """Bars of the distance by block, largest first, with 95 % intervals; the line is another seed (plotly)."""
        rows, measure = self.rows(), self.measure
        kinds = ["resnet" if "resnet" in row["block"] else "transformer block" for row in rows]
        points = [(row[measure], *row[f"{measure} interval"]) for row in rows]
        yardstick = (OTHER_SEED, self.other_seed()[measure])
        x = f"{measure} distance from the clean picture"
        title = "What is lost when a block adds nothing"
        return ranked_bars([row["block"] for row in rows], kinds, points, yardstick, title=title, x=x)

    def plot_damage(self) -> Any:
        """Heat map of blocks and factors: in which share of images the judge's answer changes (plotly).

        Raises:
            KitError: no judge told factors.
        """
        if not self.factors:
            raise KitError("plot_damage: no factors were judged here, as for real models. Look at plot() instead.")
        shares = np.array([[row[factor] for factor in self.factors] for row in self.damage()])
        title = "Share of images to which the judge's answer changes when a block adds nothing"
        return share_map(self.blocks, self.factors, shares, title=title)

    def _repr_html_(self) -> str:
        caption = f"In brackets 95 % bootstrap intervals over {self._n_prompts} prompts"
        prompt = next(iter(self._results.values()))["texts"][0]
        drawn = [("clean", "clean"), *((row["block"], f"{row['rank']}. {row['block']}") for row in self.rows())]
        damage = "Share of images to which the judge's answer changes"
        pictures = [(self._picture(name, title), "", title) for name, title in drawn]
        return html.fragment(
            f"<h3>What each block is worth</h3><p>{html.escape(self.sentence())}</p>",
            html.table([self._readable(row) for row in self.rows()], caption),
            html.folded("Block by factor", html.table(self.damage(), damage)) if self.factors else "",
            f"<h4>Without each block: {html.words(prompt)}</h4>",
            html.figures(pictures),
        )

    def _picture(self, name: str, title: str) -> str:
        at = 0 if name == "clean" else 1 + self.blocks.index(name)
        return html.picture(self.artifact.file(_PICTURE.format(at)).read_bytes(), f"the picture of {title}")

    def _readable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the table people see."""
        low, high = ("–" if np.isnan(rank) else rank for rank in row["rank interval"])
        shown: dict[str, Any] = {"block": row["block"], "rank": f"{row['rank']} [{low}, {high}]"}
        shown |= {measure: written(row, measure) for measure in self.measures}
        told = {"most changed": row["most changed"], "share": written(row, "share")} if self.factors else {}
        return shown | told

    @cached_property
    def _texts(self) -> list[str]:
        return [text for result in self._results.values() for text in result["texts"]]

    @property
    def _n_prompts(self) -> int:
        return len(set(self._texts))

    def _values(self, condition: str, measure: str) -> NDArray[np.float64]:
        """A distance, prompt by prompt."""
        return by_prompt([v for r in self._results.values() for v in r["changed"][condition][measure]], self._texts)

    def _factor(self, condition: str, factor: str) -> NDArray[np.float64]:
        """Whether the judge's answer changed, prompt by prompt."""
        results = self._results.values()
        return by_prompt([v for r in results for v in r["changed"][condition]["factors"][factor]], self._texts)

    def _by_block(self, measure: str) -> Float[np.ndarray, "prompt block"]:
        return np.stack([self._values(block, measure) for block in self.blocks], axis=1)

    def _rank_intervals(self, values: Float[np.ndarray, "prompt block"]) -> Int[np.ndarray, "2 block"]:
        """Lowest and highest rank of each block in 95 % of bootstrap samples of the prompts."""
        rng, n = np.random.default_rng(0), len(values)
        ranks = [_ranks(values[rng.integers(n, size=n)].mean(axis=0)) for _ in range(_SAMPLES)]
        return np.asarray(np.quantile(ranks, [0.025, 0.975], axis=0, method="nearest"))


@checked
def rank_blocks(
    pipe: Any,
    prompts: Prompts | Iterable[str],
    *,
    blocks: Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 12,
    judge: PictureJudge | EllipsisType | None = ...,
    store: Store | Path | str | None = None,
) -> BlockRanking:
    """Leave out what each block adds, one block at a time, and rank blocks by how far the pictures move.

    A transformer block's update becomes 0; of a resnet only its shortcut is left (`hooks.silence`); at every step, in
    both guidance halves. Prompts and noise are those of the clean picture. Beside it stands another seed's picture of
    the same prompt. Killed at any moment, it goes on at the batch in hand. After the paper's ranking of all 28 blocks
    by image distance over 20 prompts (arXiv 2410.22366).

    Args:
        pipe: an SDXL pipeline of diffusers.
        prompts: at least 20 make a ranking; held-out ones of a cache, such as `cache.prompts.take(…)`, or texts.
        blocks: names of `list_blocks(pipe)`, by default all: 28 of the real SDXL.
        num_inference_steps, guidance_scale: as the model is meant to be used unless given.
        batch_size: pictures made at once.
        judge: tells distances and factors; by default the model's own, None for pixels only: real
            models have none.
        store: folder of artifacts.

    Raises:
        HookpointError: the U-Net has no such block.
        KitError: fewer than two blocks, one named twice, or impossible settings.
        PromptError: no prompts.

    Example:
        >>> rank_blocks(pipe, kit.load_prompts("world", 24)).plot()                       # doctest: +SKIP
    """
    given, judge = as_prompts(prompts), chosen_judge("rank_blocks", pipe, judge)
    known = list_blocks(pipe)
    named = list(known) if blocks is None else [resolve_block(pipe.unet, name).name for name in blocks]
    if len(named) < 2 or len(set(named)) < len(named):
        raise KitError(f"rank_blocks: blocks={named} must name two blocks or more, each once. Leave it out for all.")
    recipe = {
        "study": "block ranking",
        "blocks": [name for name in known if name in named],
        "prompts": given.digest,
        "batch_size": whole_number("rank_blocks: batch_size", batch_size),
        "judge": judge.name if judge else None,
        **drawing(pipe, num_inference_steps, guidance_scale),
        **made_by(pipe),
    }
    artifact = Store.at(store).artifact("studies", f"blocks_{made_by(pipe)['model']}_{len(named)}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, given, judge, artifact)
    return BlockRanking.open(artifact.folder)


def _run(pipe: Any, prompts: Prompts, judge: PictureJudge | None, artifact: Artifact) -> None:
    results, parts = Lines(artifact, _FILE), batches(prompts, artifact.recipe["batch_size"])
    missing, per_image = [name for name in parts if name not in results], 2 + len(artifact.recipe["blocks"])
    cost = sum(len(parts[name]) for name in missing) * per_image
    tqdm.write(f"Ranking {per_image - 2} blocks: {cost:,} pictures to make, as {artifact.name}.")
    for name in tqdm(missing, desc="rank blocks", unit="batch"):
        result, pictures = _measure(pipe, parts[name], judge, artifact.recipe)
        if name == next(iter(parts)):
            for at, picture in enumerate(pictures):
                write_atomically(artifact.file(_PICTURE.format(at)), sheet([[picture]]))
        results.add(name, result)
    artifact.seal(facts={"images": len(prompts), "pictures": len(prompts) * per_image})


@torch.no_grad()
def _measure(
    pipe: Any, prompts: Prompts, judge: PictureJudge | None, recipe: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Float[np.ndarray, "y x 3"]]]:
    """One batch in every condition, and its first prompt's pictures: clean, and without each block."""
    settings = {key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    clean = draw(pipe, prompts, settings)
    seen, pictures = answers(judge, clean), [clean[0]]

    def compare(changed: Float[np.ndarray, "image y x 3"]) -> dict[str, Any]:
        told = answers(judge, changed)
        factors = {factor: (told[factor] != seen[factor]).astype(int).tolist() for factor in seen}
        return {**distances(judge, clean, changed), "factors": factors}

    further = replace(prompts, seeds=tuple(seed + _FURTHER for seed in prompts.seeds))
    results = {OTHER_SEED: compare(draw(pipe, further, settings))}
    for block in recipe["blocks"]:
        with silence(pipe, [block]):
            drawn = draw(pipe, prompts, settings)
        results[block] = compare(drawn)
        pictures.append(drawn[0])
    return {"texts": list(prompts.texts), "changed": results}, pictures


def _ranks(values: NDArray[np.float64]) -> Int[np.ndarray, " block"]:
    """1 for the largest."""
    return np.argsort(np.argsort(-values, kind="stable")) + 1

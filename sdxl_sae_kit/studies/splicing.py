"""Reconstruction in the loop: what becomes of a picture when a block's update is replaced by its reconstruction."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import by_hookpoint, list_hookpoints
from sdxl_sae_kit.hooks import Call, rewrite
from sdxl_sae_kit.interventions import check_fit, check_model
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.observation import as_prompts
from sdxl_sae_kit.plots import effects_by_group
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.distances import (
    MEASURES,
    adherence,
    answers,
    batches,
    by_prompt,
    distances,
    draw,
    estimate,
    made_by,
    sheet,
    written,
)
from sdxl_sae_kit.studies.lines import Lines, open_study

REPLACEMENTS = ("zero", "mean", "untrained x̂", "x̂")
"""What the update becomes: 0; the mean update of training tokens; the untrained SAE's reconstruction; the SAE's."""
ALL = "all at once"

_FILE, _PICTURE = "splicing.jsonl", "first.webp"
_MEAN_TOKENS = 65_536


@dataclass(frozen=True)
class Splicing:
    """How far pictures move when updates are replaced, at one hookpoint or at all at once, from the clean ones."""

    artifact: Artifact = field(repr=False)
    hookpoints: tuple[str, ...]
    measures: tuple[str, ...]
    """The distances that could be told: see `distances.MEASURES`."""
    n_images: int
    """Pictures in each condition."""
    _results: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Splicing:
        """Read what `splice` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "splicing", "splice")
        recipe = artifact.recipe
        results = Lines(artifact, _FILE)
        first = next(iter(results.values()))["changed"][recipe["hookpoints"][0]]["zero"]
        measures, images = tuple(m for m in MEASURES if m in first), sum(len(r["texts"]) for r in results.values())
        return cls(artifact, tuple(recipe["hookpoints"]), measures, images, results)

    @property
    def places(self) -> tuple[str, ...]:
        """Each hookpoint and, if there are several, all at once."""
        return (*self.hookpoints, ALL) if len(self.hookpoints) > 1 else self.hookpoints

    @property
    def measure(self) -> str:
        """The distance that sentence and figure are about: as a viewer would judge it, if that can be told."""
        return "perceptual" if "perceptual" in self.measures else "pixel"

    def rows(self) -> list[dict[str, Any]]:
        """A row per place and replacement, with 95 % bootstrap intervals over prompts.

        Each distance from the clean picture; `adherence`, the share of the prompt's visible factors that the judge
        sees, where it can be told; `repaired` = 1 − d / d(zero), the share of the zero-ablation damage that the
        replacement repairs, in `measure`; and `x̂ − mean`, for x̂ alone, the paired difference from mean ablation.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [self._row(place, replacement) for place in self.places for replacement in REPLACEMENTS]

    def _row(self, place: str, replacement: str) -> dict[str, Any]:
        row: dict[str, Any] = {"hookpoint": place, "update becomes": replacement}
        for measure in self.measures:
            row |= estimate(measure, self._values(place, replacement, measure))
        row |= self._adherence([r["changed"][place][replacement] for r in self._results.values()])
        pair = np.stack([self._values(place, which, self.measure) for which in (replacement, "zero")], axis=1)
        row |= estimate("repaired", pair, lambda m: 1 - m[..., 0] / m[..., 1])
        if replacement == "x̂":
            difference = self._values(place, "x̂", self.measure) - self._values(place, "mean", self.measure)
            row |= estimate("x̂ − mean", difference)
        return row

    def clean_adherence(self) -> dict[str, Any]:
        """The adherence of the clean pictures, with its interval; empty where it cannot be told."""
        return self._adherence([result["clean"] for result in self._results.values()])

    def variances(self) -> list[dict[str, Any]]:
        """Explained variance, at most 1, of the live updates of these very images, a row per hookpoint.

        With intervals; of x̂ when spliced there alone; when spliced at all at once, where blocks further on get changed
        inputs; and of the untrained SAE's x̂ when spliced alone.
        """
        columns = {"alone": ("x̂", None), ALL: ("x̂", ALL), "untrained, alone": ("untrained x̂", None)}
        rows = []
        for hookpoint in self.hookpoints:
            row: dict[str, Any] = {"hookpoint": hookpoint}
            for name, (replacement, place) in columns.items():
                if place is None or place in self.places:
                    row |= estimate(name, *self._variance(place or hookpoint, replacement, hookpoint))
            rows.append(row)
        return rows

    def sentence(self) -> str:
        """What the numbers say."""
        rows = {(row["hookpoint"], row["update becomes"]): row for row in self.rows()}
        place, measure = self.places[-1], self.measure
        zero, mean, control, own = (rows[place, replacement] for replacement in REPLACEMENTS)
        where = f"at all {len(self.hookpoints)} hookpoints at once" if place == ALL else f"at {place}"
        worse = [p for p in self.places if not rows[p, "x̂"]["x̂ − mean interval"][1] < 0]
        verdict = f"not clearly closer than the mean update's at {', '.join(worse)}" if worse else (
            "closer than the mean update's everywhere"
        )  # fmt: skip
        adhering = ""
        if "adherence" in own:
            shares = {"with x̂": own, "clean": self.clean_adherence(), "with the update at 0": zero}
            told = ", ".join(f"{how} {written(row, 'adherence', share=True)}" for how, row in shares.items())
            adhering = f" Of what the prompts say, the judge sees: {told}."
        told = ", ".join(f"{h} {written(rows[h, 'x̂'], 'repaired', share=True)}" for h in self.hookpoints)
        alone = f" Alone: {told}." if place == ALL else ""
        return (
            f"With x̂ for the update {where}, pictures move by {written(own, measure)} from the clean ones ({measure} "
            f"distance), against {written(mean, measure)} with the mean update and {written(zero, measure)} with 0: "
            f"x̂ repairs {written(own, 'repaired', share=True)} of the zero-ablation damage (1 − d(x̂) / d(zero)), the "
            f"untrained SAE's x̂ {written(control, 'repaired', share=True)}.{alone} Paired by prompt, x̂'s "
            f"pictures are {verdict}. In brackets 95 % bootstrap intervals over {self._n_prompts} prompts "
            f"({self.n_images} images).{adhering}{self._on_the_mean()}"
        )

    def _on_the_mean(self) -> str:
        """What the mean update does not tell apart, where there is something."""
        steps, guidance = (self.artifact.recipe[key] for key in ("num_inference_steps", "guidance_scale"))
        shared = [f"all {steps} steps"] if steps > 1 else []
        shared += ["both guidance halves"] if guidance > 1 else []
        return f" The mean update is one vector for {' and '.join(shared)}, not one for each." if shared else ""

    def plot(self) -> Any:
        """Distance from the clean picture by place and replacement, with 95 % intervals, on a log axis (plotly)."""
        series: dict[str, list[tuple[float, float, float]]] = {replacement: [] for replacement in REPLACEMENTS}
        for row in self.rows():
            series[row["update becomes"]].append((row[self.measure], *row[f"{self.measure} interval"]))
        title = "Replacing the update while the picture is made"
        return effects_by_group(self.places, series, title=title, y=f"{self.measure} distance from the clean picture")

    def _repr_html_(self) -> str:
        clean = self.clean_adherence()
        beside = f" The clean pictures' adherence is {written(clean, 'adherence')}." if clean else ""
        caption = f"In brackets 95 % bootstrap intervals over {self._n_prompts} prompts.{beside}"
        variances = [
            {key: row[key] if key == "hookpoint" else written(row, key) for key in row if "interval" not in key}
            for row in self.variances()
        ]
        columns = ", ".join(("clean", *REPLACEMENTS))
        prompt = next(iter(self._results.values()))["texts"][0]
        alt = f"Pictures of “{prompt}”. Columns: {columns}. Rows: {', '.join(self.places)}."
        return html.fragment(
            f"<h3>Reconstruction in the loop</h3><p>{html.escape(self.sentence())}</p>",
            html.table([self._readable(row) for row in self.rows()], caption),
            html.table(variances, "Explained variance of the live updates of these images"),
            f"<h4>{html.words(prompt)}</h4>",
            html.picture(self.artifact.file(_PICTURE).read_bytes(), alt),
            html.quiet(f"Columns: {columns}. Rows: {', '.join(self.places)}."),
        )

    def _readable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the table people see."""
        names = [*self.measures, *(["adherence"] if "adherence" in row else []), "repaired"]
        shown = {"hookpoint": row["hookpoint"], "update becomes": row["update becomes"]}
        shown |= {name: written(row, name) for name in names}
        return shown | {"x̂ − mean": written(row, "x̂ − mean") if "x̂ − mean" in row else "–"}

    @cached_property
    def _texts(self) -> list[str]:
        return [text for result in self._results.values() for text in result["texts"]]

    @property
    def _n_prompts(self) -> int:
        return len(set(self._texts))

    def _values(self, place: str, replacement: str, measure: str) -> NDArray[np.float64]:
        """A distance, prompt by prompt."""
        results = self._results.values()
        return by_prompt([v for r in results for v in r["changed"][place][replacement][measure]], self._texts)

    def _adherence(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        told = [value for result in results for value in result["adherence"]]
        known = [(value, text) for value, text in zip(told, self._texts, strict=True) if value is not None]
        if not known:
            return {}
        values, texts = zip(*known, strict=True)
        return estimate("adherence", by_prompt(values, texts))

    def _variance(self, place: str, replacement: str, hookpoint: str) -> tuple[NDArray[np.float64], Any]:
        """Error and variance of each prompt's tokens, and the formula of the two."""
        sums = [r["changed"][place][replacement]["updates"][hookpoint] for r in self._results.values()]
        error, square = (np.array([v for each in sums for v in each[name]]) for name in ("error", "square"))
        total, n_tokens = np.sum([each["sum"] for each in sums], axis=0), sum(each["tokens"] for each in sums)
        # ‖x − c‖² summed about a fixed c; what the mean of these very tokens takes off is dealt to all images alike
        variance = square - (total @ total) / n_tokens / len(square)
        return by_prompt(np.stack([error, variance], axis=1), self._texts), lambda m: 1 - m[..., 0] / m[..., 1]


@checked
def splice(
    pipe: Any,
    saes: SAE | Mapping[Any, SAE] | Iterable[SAE],
    cache: Activations,
    prompts: Prompts | Iterable[str] | None = None,
    *,
    n: int = 32,
    batch_size: int = 16,
    judge: PictureJudge | EllipsisType | None = ...,
    store: Store | Path | str | None = None,
) -> Splicing:
    """Make pictures with x̂ in place of the update, at each SAE's hookpoint and at all at once, beside three controls.

    Each prompt is drawn clean and, from the same noise, with the update replaced at every token, step and guidance half
    by: 0 (zero ablation); the mean of 65,536 training tokens of the cache, one vector for all (mean ablation; b_dec is
    no substitute, being a median that training moved); the untrained SAE's x̂; and x̂. Drawn as the cache was. Killed at
    any moment, it goes on at the batch in hand.

    Args:
        pipe: the pipeline whose updates the SAEs were trained on.
        saes: one for each hookpoint.
        cache: gives the mean updates, the settings of drawing, and the prompts.
        prompts: by default the cache's held-out ones.
        n: at most so many of them, the first.
        batch_size: pictures made at once.
        judge: tells distances and factors; by default the model's own, None for pixels only: real
            models have none.
        store: folder of artifacts.

    Raises:
        ArtifactError: SAEs or a cache of another model than the pipeline's.
        HookpointError, KitError: a hookpoint that is not there, nothing to draw, or no SAE.

    Example:
        >>> chosen = [saes[h, "k20-white"] for h in cache.hookpoints]                    # doctest: +SKIP
        >>> splice(pipe, chosen, cache).plot()                                           # doctest: +SKIP
    """
    placed, judge = _in_order(pipe, saes, cache), chosen_judge("splice", pipe, judge)
    given = cache.prompts.take(cache.images("held_out").tolist()) if prompts is None else as_prompts(prompts)
    chosen = given[: whole_number("splice: n", n)]
    if not len(chosen):
        raise KitError("splice: there are no prompts. Collect some that are held out, or pass prompts=.")
    recipe = {
        "study": "splicing",
        "hookpoints": list(placed),
        "saes": [sae.digest for sae in placed.values()],
        "cache": cache.digest,
        "prompts": chosen.digest,
        "batch_size": whole_number("splice: batch_size", batch_size),
        "judge": judge.name if judge else None,
        **{key: cache.recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")},
        **made_by(pipe),
    }
    artifact = Store.at(store).artifact("studies", f"splicing_{made_by(pipe)['model']}_{len(placed)}saes", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, placed, cache, chosen, judge, artifact)
    return Splicing.open(artifact.folder)


def _in_order(pipe: Any, saes: Any, cache: Activations) -> dict[str, SAE]:
    """The SAEs by hookpoint, in the order of the forward pass, if they and the cache belong to the pipeline."""
    placed = by_hookpoint("splice", "SAEs", SAE, saes)
    for hookpoint, sae in placed.items():
        check_model("splice", pipe, sae)
        check_fit(pipe, sae)
        cache.grid(hookpoint)  # refuses a cache without it
        if (site := cache.site(hookpoint)) and sae.site and (site.model, site.revision) != (
            sae.site.model, sae.site.revision,
        ):  # fmt: skip
            raise ArtifactError(
                f"splice: {cache.name} holds updates of {site.model} (revision {site.revision}), and {sae.name} was "
                f"trained on {sae.site.model} (revision {sae.site.revision}). Pass a cache of the same model."
            )
    return {hookpoint: placed[hookpoint] for hookpoint in list_hookpoints(pipe) if hookpoint in placed}


def _run(
    pipe: Any,
    saes: Mapping[str, SAE],
    cache: Activations,
    prompts: Prompts,
    judge: PictureJudge | None,
    artifact: Artifact,
) -> None:
    results, parts = Lines(artifact, _FILE), batches(prompts, artifact.recipe["batch_size"])
    places = {hookpoint: (hookpoint,) for hookpoint in saes} | ({ALL: tuple(saes)} if len(saes) > 1 else {})
    missing = [name for name in parts if name not in results]
    cost = sum(len(parts[name]) for name in missing) * (1 + len(places) * len(REPLACEMENTS))
    tqdm.write(f"Splicing at {', '.join(places)}: {cost:,} pictures to make, as {artifact.name}.")
    device = pipe.unet.device
    placed = {"x̂": {h: copy.deepcopy(sae).to(device) for h, sae in saes.items()}}
    placed["untrained x̂"] = {h: sae.untrained() for h, sae in placed["x̂"].items()}
    means = {h: cache.sample(h, _MEAN_TOKENS).double().mean(0).float().to(device) for h in saes} if missing else {}
    for name in tqdm(missing, desc="splice", unit="batch"):
        result, pictures = _measure(pipe, placed, means, places, parts[name], judge, artifact.recipe)
        if name == next(iter(parts)):
            write_atomically(artifact.file(_PICTURE), sheet(pictures))
        results.add(name, result)
    artifact.seal(facts={"images": len(prompts), "pictures": len(prompts) * (1 + len(places) * len(REPLACEMENTS))})


@torch.no_grad()
def _measure(
    pipe: Any,
    saes: Mapping[str, Mapping[str, SAE]],
    means: Mapping[str, Float[Tensor, "d_in"]],
    places: Mapping[str, Sequence[str]],
    prompts: Prompts,
    judge: PictureJudge | None,
    recipe: Mapping[str, Any],
) -> tuple[dict[str, Any], list[list[Float[np.ndarray, "y x 3"]]]]:
    """One batch in every condition, and the pictures of its first prompt, a row for each place."""
    settings = {key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    clean = draw(pipe, prompts, settings)
    changed: dict[str, dict[str, Any]] = {place: {} for place in places}
    pictures = [[clean[0]] for _ in places]
    for at, (place, hookpoints) in enumerate(places.items()):
        for replacement in REPLACEMENTS:
            edits = {h: _edit(replacement, saes.get(replacement, {}).get(h), means[h], prompts) for h in hookpoints}
            with rewrite(pipe, edits):
                drawn = draw(pipe, prompts, settings)
            changed[place][replacement] = {
                **distances(judge, clean, drawn),
                "adherence": adherence(answers(judge, drawn), prompts),
                "updates": {h: edit.sums() for h, edit in edits.items()} if replacement in saes else {},
            }
            pictures[at].append(drawn[0])
    told = {"adherence": adherence(answers(judge, clean), prompts)}
    return {"texts": list(prompts.texts), "clean": told, "changed": changed}, pictures


def _edit(replacement: str, sae: SAE | None, mean: Float[Tensor, "d_in"], prompts: Prompts) -> Any:
    """What `rewrite` calls with each update."""
    if sae is not None:
        return _Reconstructing(sae, mean, len(prompts))
    value = torch.zeros_like(mean) if replacement == "zero" else mean
    return lambda update, _call: value.expand(update.shape)


class _Reconstructing:
    """Puts x̂ in the update's place; sums the error of x̂ and the spread of x, image by image."""

    def __init__(self, sae: SAE, mean: Float[Tensor, "d_in"], n_images: int) -> None:
        self.sae, self.mean, self.n_images, self.n_tokens = sae, mean, n_images, 0
        self.error, self.square = (torch.zeros(n_images, dtype=torch.float64) for _ in range(2))
        self.sum = torch.zeros(len(mean), dtype=torch.float64)

    def __call__(self, update: Float[Tensor, "batch height width d_in"], call: Call) -> Tensor:
        x = update.float()
        x_hat: Tensor = self.sae(x)
        self.error += self._by_image((x - x_hat).double().square())
        self.square += self._by_image((x - self.mean).double().square())
        self.sum += (x - self.mean).double().sum((0, 1, 2)).cpu()
        self.n_tokens += x.shape[:3].numel()
        return x_hat

    def _by_image(self, squares: Float[Tensor, "batch height width d_in"]) -> Float[Tensor, " image"]:
        """Sums over tokens, with both guidance halves of an image together."""
        return squares.sum((1, 2, 3)).view(-1, self.n_images).sum(0).cpu()

    def sums(self) -> dict[str, Any]:
        """The sums as JSON values."""
        named = {"error": self.error, "square": self.square, "sum": self.sum}
        return {name: each.tolist() for name, each in named.items()} | {"tokens": self.n_tokens}

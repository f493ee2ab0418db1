"""Attribution: which latents a number read off the picture hangs on, by gradient, checked against true ablation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import human_bytes, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.gradients import differentiate
from sdxl_sae_kit.hookpoints import by_hookpoint, list_hookpoints
from sdxl_sae_kit.interventions import check_fit, check_model, steer
from sdxl_sae_kit.observation import as_prompts
from sdxl_sae_kit.pictures import encode_picture
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.plots import predicted_and_true
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.attributed import KINDS, Attributed, pack
from sdxl_sae_kit.studies.distances import batches, by_prompt, drawing, estimate, made_by, written
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.rank_agreement import rank_correlation, shuffled_range
from sdxl_sae_kit.targets import FactorScore

GROUPS = ("top", "bottom", "random")
"""Latents that are checked: of the highest mean attribution, of the lowest, and drawn from all others that fire."""

_PART, _PICTURE, _CHECKS = "part-{:05d}.h5", "picture-{:05d}.webp", "checks.jsonl"
_SHOWN, _PICTURES, _TILE = 4, 3, 96

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attribution:
    """What each latent contributes to a number of the picture, to first order, and how true that turned out to be.

    The attribution of a latent at a token is gradient × activation: ∂value/∂z · z, in the value's unit. Summed over
    tokens, steps and guidance halves it is what the value would lose, to first order, if the latent were turned off.
    """

    artifact: Artifact = field(repr=False)
    target: str
    """Name of the number."""
    hookpoints: tuple[str, ...]
    prompts: tuple[str, ...] = field(repr=False)
    values: Float[np.ndarray, " image"] = field(repr=False)
    """The number of each clean picture."""
    _found: Mapping[str, Attributed] = field(repr=False)
    _checks: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Attribution:
        """Read what `attribute` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "attribution", "attribute")
        recipe = artifact.recipe
        found = {kind: _attributed(artifact, kind) for kind in KINDS}
        texts = Prompts.from_jsonl(artifact.read_text("prompts.jsonl")).texts
        values = found["trained"].values
        return cls(
            artifact, recipe["target"], tuple(recipe["hookpoints"]), texts, values, found, Lines(artifact, _CHECKS)
        )

    def totals(self, hookpoint: str) -> Float[np.ndarray, "image latent"]:
        """The attribution of every latent in every image.

        Raises:
            KitError: another hookpoint.
        """
        return self._found["trained"].totals(hookpoint)

    def heat_map(self, hookpoint: str, latent: int, image: int) -> Float[np.ndarray, "height width"]:
        """A latent's attribution at every token of an image, summed over steps and halves; KitError for none."""
        return self._found["trained"].heat_map(hookpoint, latent, image)

    def rows(self, n: int = 10) -> list[dict[str, Any]]:
        """The n latents of the highest and the n of the lowest mean attribution, of all hookpoints, highest first.

        With 95 % bootstrap intervals over prompts; `images` is in how many it fires; `true change` is that of the
        value when the latent is turned off, where it was checked (compare it with minus the attribution).
        """
        ranked = self._found["trained"].ranked()
        chosen = ranked if len(ranked) <= 2 * n else [*ranked[:n], *ranked[-n:]]
        return [self._row(hookpoint, latent) for hookpoint, latent in chosen]

    def _row(self, hookpoint: str, latent: int) -> dict[str, Any]:
        attributed, found = self.totals(hookpoint)[:, latent], self._found["trained"]
        row: dict[str, Any] = {"hookpoint": hookpoint, "latent": latent}
        row |= estimate("attribution", by_prompt(attributed, self.prompts))
        row |= {"images": int((found.activations(hookpoint)[:, latent] > 0).sum())}
        check = self._checks.get(_unit("trained", hookpoint, latent))
        return row | (estimate("true change", by_prompt(check["changes"], self.prompts)) if check else {})

    def agreement(self) -> list[dict[str, Any]]:
        """How well orders of latents agree with the true changes: Spearman's ρ over the checked latents, row by row.

        Predicted and true changes are means over images; intervals resample prompts. Signed changes are what
        attribution predicts; sizes |change| are also what activation alone (Σ z, no gradient) could tell. For `random
        order` the interval is the 95 % range over shuffles.
        """
        return self._agreement

    @cached_property
    def _agreement(self) -> list[dict[str, Any]]:
        predicted, true, activation, groups = self._checked("trained")
        untrained = self._checked("untrained")
        pairs = {
            "attribution": (predicted, true, False),
            "attribution, random latents only": (predicted[:, groups == 2], true[:, groups == 2], False),
            "attribution, untrained SAE": (*untrained[:2], False),
            "|attribution|, sizes": (predicted, true, True),
            "activation alone, sizes": (activation, true, True),
        }
        rows = [
            {"order": name, "latents": one.shape[1]} | rank_correlation(one, other, sizes=sizes)
            for name, (one, other, sizes) in pairs.items()
        ]
        return [*rows, {"order": "random order", "latents": true.shape[1]} | shuffled_range(true)]

    def sentence(self) -> str:
        """What the numbers say."""
        orders = {row["order"]: row for row in self.agreement()}
        own, size, activation = (
            orders[name] for name in ("attribution", "|attribution|, sizes", "activation alone, sizes")
        )
        chance = orders["random order"]["ρ interval"]
        verdict = "predicts" if own["ρ interval"][0] > chance[1] else "does not clearly predict"
        better = "better than" if size["ρ interval"][0] > activation["ρ interval"][1] else "not clearly better than"
        told = {name: written(row, "ρ") for name, row in orders.items()}
        largest = {kind: html.short(float(np.abs(self._checked(kind)[1].mean(axis=0)).max())) for kind in KINDS}
        predicted, true = (each.mean(axis=0) for each in self._checked("trained")[:2])
        worst = int(np.abs(true - predicted).argmax())
        hookpoint, latent = self._chosen("trained")[worst]
        highest, *_, lowest = (
            f"{r['hookpoint']} latent {r['latent']}, {written(r, 'attribution')}" for r in self.rows(1)
        )
        return (
            f"For {self.target} (mean {html.short(float(self.values.mean()))} over {len(self.values)} images), the "
            f"highest attribution is that of {highest}, the lowest that of {lowest}. Attribution {verdict} what "
            f"turning a latent off does: Spearman's ρ is {told['attribution']} over {own['latents']} checked latents, "
            f"{told['attribution, random latents only']} over the random ones of them and "
            f"{told['attribution, untrained SAE']} for latents of untrained SAEs; 95 % of random orders lie within "
            f"{chance[0]:.2f} and {chance[1]:.2f}. Of the sizes of changes it tells {told['|attribution|, sizes']}, "
            f"{better} activation without gradient, {told['activation alone, sizes']}. It is furthest off for "
            f"{hookpoint} latent {latent}: {html.short(predicted[worst])} predicted, {html.short(true[worst])} true. "
            f"The largest true change is {largest['trained']}, of untrained SAEs' latents {largest['untrained']}. In "
            f"brackets 95 % bootstrap intervals over {len(set(self.prompts))} prompts."
        )

    def plot(self) -> Any:
        """Predicted and true change of the checked latents, with the untrained SAE's beside (plotly)."""
        series: dict[str, list[tuple[float, float, str]]] = {group: [] for group in (*GROUPS, "untrained SAE")}
        for kind in KINDS:
            predicted, true, _, groups = self._checked(kind)
            for at, (hookpoint, latent) in enumerate(self._chosen(kind)):
                name = GROUPS[groups[at]] if kind == "trained" else "untrained SAE"
                point = (float(predicted[:, at].mean()), float(true[:, at].mean()), f"{hookpoint}, latent {latent}")
                series[name].append(point)
        first = self.agreement()[0]
        told = f"Spearman's ρ of the SAE's {first['latents']} latents is {written(first, 'ρ')}."
        title = f"Turning latents off: change of {self.target.partition(',')[0]}"
        return predicted_and_true(
            series, told, title=title, x="predicted change, −Σ gradient × activation", y="true change"
        )

    def _repr_html_(self) -> str:
        table = [
            {"hookpoint": row["hookpoint"], "latent": str(row["latent"]), "attribution": written(row, "attribution"),
             "images": row["images"], "true change": written(row, "true change") if "true change" in row else "–"}
            for row in self.rows()
        ]  # fmt: skip
        orders = [
            {"order": row["order"], "latents": row["latents"], "Spearman's ρ": written(row, "ρ")}
            for row in self.agreement()
        ]
        ranked = self._found["trained"].ranked()
        cards = [self._card(*each) for each in [*ranked[:_SHOWN], *ranked[::-1][:_SHOWN]]]
        facts = (
            f"The {_SHOWN} latents of the highest and of the lowest attribution, each on the images where it is "
            "largest: where in the picture it comes from, in the scale of the latent's own peak."
        )
        return html.fragment(
            f"<h3>What {html.words(self.target)} hangs on</h3><p>{html.escape(self.sentence())}</p>",
            html.table(table, "Highest and lowest mean attribution; in brackets 95 % bootstrap intervals over prompts"),
            html.table(orders, "Agreement with the true changes of the checked latents when they are turned off"),
            f"<h4>Where it comes from</h4>{html.quiet(facts)}",
            html.grid(cards),
        )

    def _card(self, hookpoint: str, latent: int) -> str:
        totals = self.totals(hookpoint)[:, latent]
        sign = 1.0 if totals.mean() >= 0 else -1.0
        images = np.argsort(-sign * totals, kind="stable")[:_PICTURES].tolist()
        maps = [np.maximum(sign * self.heat_map(hookpoint, latent, image), 0) for image in images]
        pictures = [self.artifact.file(_PICTURE.format(image)).read_bytes() for image in images]
        strip = html.strip(list(zip(pictures, maps, strict=True)), max(float(each.max()) for each in maps), _TILE)
        told = html.short(float(totals.mean()))
        alt = f"{hookpoint}, latent {latent}, attribution {told}: {'; '.join(self.prompts[image] for image in images)}"
        return html.card(f"{hookpoint}, latent {latent}", "", told, html.picture(strip, alt))

    def _chosen(self, kind: str) -> list[tuple[str, int]]:
        return [(check["hookpoint"], check["latent"]) for check in self._checks.values() if check["kind"] == kind]

    def _checked(self, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], Any]:
        """Predicted and true changes and summed activations, (prompt, latent), and each latent's group."""
        chosen, found = self._chosen(kind), self._found[kind]
        predicted = np.stack([-found.totals(h)[:, latent] for h, latent in chosen], axis=1)
        activation = np.stack([found.activations(h)[:, latent] for h, latent in chosen], axis=1)
        checks = [self._checks[_unit(kind, *each)] for each in chosen]
        true = np.array([check["changes"] for check in checks]).T
        groups = np.array([GROUPS.index(check["group"]) for check in checks])
        return *(by_prompt(each, self.prompts) for each in (predicted, true, activation)), groups  # type: ignore[return-value]


@checked
def attribute(
    pipe: Any,
    saes: SAE | Mapping[Any, SAE] | Iterable[SAE],
    prompts: Prompts | Iterable[str] | str,
    target: Function | tuple[str, str],
    *,
    name: str = "",
    checked: int = 8,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
    store: Store | Path | str | None = None,
) -> Attribution:
    """Find the latents that a number read off the picture hangs on, and check them by turning latents off one by one.

    One backward pass through the VAE and all steps gives the gradient to every update, and so to every latent at every
    token, at all hookpoints at once. The SAE's error stays in the update, so the picture is the clean one. Checked are
    the latents of the highest and the lowest attribution and random others that fire, of all hookpoints together, and
    as many of untrained SAEs: each is turned off (`steer` with scale 0), and the change of the number is measured.
    Killed at any moment, it goes on at the batch or latent in hand.

    The backward pass needs memory: the graph keeps what the networks computed since the first hookpoint, at every step,
    and in the VAE; the first batch measures it and tells how much it is per image. `batch_size` divides it.

    Args:
        pipe: the pipeline whose updates the SAEs were trained on.
        saes: one for each hookpoint.
        prompts: one or several, with their seeds.
        target: ("colour", "red") for the embedded judge's log-odds (`FactorScore`); `RegionColour`; or any
            function from pictures (image, 3, y, x), colours 0 to 1, to (image,) numbers, made of torch operations.
        name: of a function that has none, which results are kept under: another function, another name.
        checked: latents checked of each kind, from 2.
        num_inference_steps, guidance_scale: as the model is meant to be used unless given.
        batch_size: pictures made at once.
        seed: of the random latents.
        store: folder of artifacts.

    Raises:
        ArtifactError: SAEs of another model than the pipeline's.
        KitError: a target that cannot be read or differentiated, has no name, or on which no latent fires.

    Example:
        >>> chosen = [saes[h, "k20-white"] for h in cache.hookpoints]                    # doctest: +SKIP
        >>> attribute(pipe, chosen, ["a large red circle"], ("colour", "red")).plot()    # doctest: +SKIP
    """
    number, told = _named(target, name)
    placed = by_hookpoint("attribute", "SAEs", SAE, saes)
    for sae in placed.values():
        check_model("attribute", pipe, sae)
        check_fit(pipe, sae)
        _ = sae.directions  # refuses an SAE that has none
    placed = {hookpoint: placed[hookpoint] for hookpoint in list_hookpoints(pipe) if hookpoint in placed}
    given = as_prompts([prompts] if isinstance(prompts, str) else prompts)
    recipe = {
        "study": "attribution",
        "hookpoints": list(placed),
        "saes": [sae.digest for sae in placed.values()],
        "prompts": given.digest,
        "target": told,
        "checked": whole_number("attribute: checked", checked, least=2),
        "batch_size": whole_number("attribute: batch_size", batch_size),
        "seed": whole_number("attribute: seed", seed, least=0),
        **drawing(pipe, num_inference_steps, guidance_scale),
        **made_by(pipe),
    }
    artifact = Store.at(store).artifact("studies", f"attribution_{told.partition(',')[0]}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, placed, given, number, artifact)
    return Attribution.open(artifact.folder)


def _named(target: Any, name: str) -> tuple[Function, str]:
    """The function, and the name that its results are kept under."""
    if isinstance(target, tuple) and len(target) == 2 and all(isinstance(part, str) for part in target):
        target = FactorScore(*target)
    if not callable(target):
        raise KitError(
            f"attribute: a target is ('colour', 'red'), a RegionColour, or a function of pictures, not {target!r}."
        )
    told = name or getattr(target, "name", "")
    if not told or not isinstance(told, str):
        raise KitError(
            "attribute: this target has no name to keep results under. Pass name='…', and another for another function."
        )
    return target, told


def _run(pipe: Any, saes: Mapping[str, SAE], prompts: Prompts, target: Function, artifact: Artifact) -> None:
    recipe, device = artifact.recipe, pipe.unet.device
    trained = {hookpoint: copy.deepcopy(sae).to(device) for hookpoint, sae in saes.items()}
    placed = {"trained": trained, "untrained": {hookpoint: sae.untrained() for hookpoint, sae in trained.items()}}
    parts = list(batches(prompts, recipe["batch_size"]).values())
    missing = [at for at in range(len(parts)) if not artifact.file(_PART.format(at)).exists()]
    checks = Lines(artifact, _CHECKS)
    n_checked = len(KINDS) * len(GROUPS) * recipe["checked"]
    tqdm.write(
        f"Attributing {recipe['target']} to latents of {len(saes)} SAEs: {sum(len(parts[at]) for at in missing):,} "
        f"pictures with gradients, then {max(n_checked - len(checks), 0) * len(prompts):,} with a latent turned off, "
        f"as {artifact.name}."
    )
    write_atomically(artifact.file("prompts.jsonl"), prompts.to_jsonl().encode())
    for at in tqdm(missing, desc="gradients", unit="batch"):
        _differentiate(pipe, placed, parts[at], target, artifact, at)
    found = {kind: _attributed(artifact, kind) for kind in KINDS}
    units: dict[str, dict[str, Any]] = {
        _unit(kind, *latent): {"kind": kind, "group": group, "hookpoint": latent[0], "latent": latent[1]}
        for kind in KINDS
        for group, latents in found[kind].choose(recipe["checked"], recipe["seed"]).items()
        for latent in latents
    }
    for unit, about in tqdm(units.items(), desc="check", unit="latent"):
        if unit not in checks:
            sae = placed[about["kind"]][about["hookpoint"]]
            changed = _turned_off(pipe, sae, about["latent"], parts, target, recipe)
            checks.add(unit, about | {"changes": (changed - found["trained"].values).tolist()})
    artifact.seal(facts={"images": len(prompts), "checked": len(units)})


def _differentiate(
    pipe: Any,
    saes: Mapping[str, Mapping[str, SAE]],
    prompts: Prompts,
    target: Function,
    artifact: Artifact,
    part: int,
) -> None:
    """One batch: its gradients, turned into the attributions of active latents, and its pictures."""
    recipe = artifact.recipe
    made = differentiate(
        pipe, recipe["hookpoints"], target, prompts.texts, prompts.seeds,
        **{key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")},
    )  # fmt: skip
    if part == 0:
        tqdm.write(f"The graph takes {human_bytes(made.graph_bytes / len(prompts))} per image beside the weights.")
    for at, picture in enumerate(made.pictures.float().cpu().numpy()):
        webp = encode_picture(
            Image.fromarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8)), "thumbnails"
        )
        write_atomically(artifact.file(_PICTURE.format(part * recipe["batch_size"] + at)), webp)
    write_atomically(artifact.file(_PART.format(part)), pack(made, saes))


@torch.no_grad()
def _turned_off(
    pipe: Any, sae: SAE, latent: int, parts: Sequence[Prompts], target: Function, recipe: Mapping[str, Any]
) -> Float[np.ndarray, " image"]:
    """The number of every picture with a latent turned off."""
    settings = {key: recipe[key] for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    values = []
    with steer(pipe, sae, scale={latent: 0.0}):
        for prompts in parts:
            drawn = generate(pipe, list(prompts.texts), list(prompts.seeds), **settings, output_type="pt")
            values.append(target(drawn).float().cpu())
    return torch.cat(values).numpy()


def _attributed(artifact: Artifact, kind: str) -> Attributed:
    """What the parts written so far say of trained or untrained latents."""
    paths = sorted(artifact.folder.glob("part-*.h5"))
    return Attributed.read(paths, kind, artifact.recipe["hookpoints"])


def _unit(kind: str, hookpoint: str, latent: int) -> str:
    return f"{kind} {hookpoint} {latent}"

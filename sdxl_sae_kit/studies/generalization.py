"""Generalisation: what SAEs trained in one place make of updates of another setting or another model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import counted, human_bytes
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import Site
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import by_hookpoint
from sdxl_sae_kit.recovery import spread
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.carried_labels import carried_labels, steps_of
from sdxl_sae_kit.studies.carryover import OWN, PCA_SOURCE, PCA_TARGET, TRAINED, UNTRAINED
from sdxl_sae_kit.studies.fidelity import Axes, Beside, Measured, by_prompt, measure
from sdxl_sae_kit.studies.generalized import ARRAYS, FILE, Generalization
from sdxl_sae_kit.studies.lines import Lines

SAEs = SAE | Mapping[Any, SAE] | Iterable[SAE]


@checked
def generalize(
    saes: SAEs,
    cache: ActivationCache,
    target: ActivationCache,
    *,
    own: SAEs | None = None,
    store: Store | Path | str | None = None,
) -> Generalization:
    """What SAEs make of updates that they were not trained on: of more denoising steps, or of another model.

    Everything is measured on the target's held-out images, whose prompts no training saw, at every denoising step and
    in both guidance halves: how well updates are reconstructed (`fidelity.measure` has the formulas), how alike the
    codes of adjacent steps are and those of the same image in the source, or of another one, whether latents chosen in
    the source for what images show still tell it, when in the process they do, and which latents vanish or appear.
    Beside the SAE:

    - `trained here`: `own`, trained on the target, and its latents chosen there;
    - `untrained`: `sae.untrained()`;
    - `PCA of the source`, `PCA of the target`: the first k principal axes of training tokens of either from their
      mean, k being the SAE's L0.

    Images of both caches are the same where text and seed are. Killed at any moment, it goes on at the hookpoint in
    hand. After the paper's study of one-step SAEs at 4 steps of Turbo and 20 of SDXL base (arXiv 2410.22366).

    Args:
        saes: one for each hookpoint, trained on `cache`.
        cache: the source; of its steps the first is what the target's codes are compared with, if it has whole grids.
        target: a cache of (some of) the same prompts and seeds, with whole grids: made with more steps, by another
            model, by a fine-tune of the same shape. With training images among them, for PCA, and held-out ones.
        own: SAEs trained on the target, for some or all of these hookpoints.
        store: folder of artifacts.

    Raises:
        ArtifactError: SAEs of another model or other settings than their cache's.
        HookpointError: a cache does not have an SAE's hookpoint.
        KitError: something else than a cache, or a target without held-out images, of other widths, or of whose tokens
            some were sampled.

    Example:
        >>> base = kit.load_pipeline("tiny-base")                                                    # doctest: +SKIP
        >>> target = kit.collect(base, cache.prompts[:160], num_inference_steps=20)                  # doctest: +SKIP
        >>> generalize([saes[h, "k10"] for h in cache.hookpoints], cache, target).plot()             # doctest: +SKIP
    """
    placed = by_hookpoint("generalize", "SAEs", SAE, saes)
    here = {} if own is None else by_hookpoint("generalize", "SAEs of own=", SAE, own)
    for given, of in ((placed, cache), (here, target)):
        for sae in given.values():
            _check_trained(sae, of)
    for sae in placed.values():
        _check_fit(sae, target)
    _check_whole(target)
    if strange := [hookpoint for hookpoint in here if hookpoint not in placed]:
        raise KitError(
            f"generalize: own= has an SAE of {', '.join(strange)}, but saes are of {', '.join(placed)}. Leave it out."
        )
    if not len(target.images("held_out")):
        raise KitError(
            f"generalize: {target.name} has no held-out images, and others may have been trained on. Collect more "
            "prompts, such as cache.prompts.take(cache.images('held_out')[:100])."
        )
    recipe = {
        "study": "generalization",
        "hookpoints": list(placed),
        "saes": [sae.digest for sae in placed.values()],
        "own": {hookpoint: sae.digest for hookpoint, sae in here.items()},
        "source": cache.digest,
        "target": target.digest,
    }
    readable = f"generalization_{target.recipe['model']}_{target.recipe['num_inference_steps']}step_{len(placed)}saes"
    artifact = Store.at(store).artifact("studies", readable, recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(placed, here, cache, target, artifact)
    return Generalization.open(artifact.folder)


def _check_fit(sae: SAE, cache: Activations) -> None:
    cache.grid(sae.hookpoint)  # refuses a cache without it
    if cache.d_in(sae.hookpoint) != sae.d_in:
        raise KitError(
            f"generalize: {sae.name} reads tokens of {sae.d_in} numbers, but those of {sae.hookpoint} in {cache.name} "
            f"have {cache.d_in(sae.hookpoint)}. Take a model of the same shape."
        )


def _check_trained(sae: SAE, cache: Activations) -> None:
    _check_fit(sae, cache)
    site = cache.site(sae.hookpoint)
    if sae.site and sae.site != site:
        raise ArtifactError(
            f"generalize: {sae.name} was trained on {_setting(sae.site)}, but {cache.name} is of {_setting(site)}. "
            "saes= belong to the source cache, own= to the target."
        )


def _setting(site: Site) -> str:
    steps = counted(site.num_inference_steps, "steps")
    return f"{site.model} (revision {site.revision}, {steps}, guidance {site.guidance_scale:g})"


def _check_whole(cache: Activations) -> None:
    if kept := cache.layout.tokens_per_image:
        raise KitError(
            f"generalize: of each grid {cache.name} keeps {kept} tokens, so images cannot be compared as a whole. "
            "Collect it without tokens_per_image."
        )


def _run(
    saes: Mapping[str, SAE], own: Mapping[str, SAE], cache: Activations, target: Activations, artifact: Artifact
) -> None:
    results, images = Lines(artifact, FILE), target.images("held_out")
    missing = [hookpoint for hookpoint in saes if hookpoint not in results]
    tokens = len(images) * target.rows_per_image * sum(target.tokens_per_row(h) for h in missing)
    size = human_bytes(target.layout.nbytes(len(images)) * len(missing) / len(target.hookpoints))
    tqdm.write(f"Reading {tokens:,} tokens of {len(images):,} images at {', '.join(missing)}, {size}.")
    for hookpoint in tqdm(missing, desc="generalize", unit="hookpoint"):
        facts, arrays = _measure(saes[hookpoint], own.get(hookpoint), cache, target)
        write_atomically(artifact.file(ARRAYS.format(hookpoint)), _packed(arrays))
        results.add(hookpoint, facts)
    artifact.seal(facts={"images": len(images), "hookpoints": len(saes)})


def _packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v108", "v110")) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", compression_opts=1, shuffle=True)
    return buffer.getvalue()


@torch.no_grad()
def _measure(
    sae: SAE, own: SAE | None, cache: Activations, target: Activations
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The facts and arrays of one hookpoint."""
    hookpoint, images = sae.hookpoint, target.images("held_out")
    places = _places(cache, target, images)
    same = places[places >= 0]
    k = min(sae.untrained().k or 1, sae.d_in)
    axes = Axes.of(cache, hookpoint)
    saes, mine = {TRAINED: sae, UNTRAINED: sae.untrained()}, {OWN: own} if own else {}
    made: dict[str, SAE | Axes] = {**saes, PCA_SOURCE: axes.first(k)}
    further = {PCA_TARGET: Axes.of(target, hookpoint).first(k)} if len(target.images("train")) else {}
    apart = _apart(cache, target, hookpoint, len(same))
    beside = None if apart else Beside(cache, cache.row(cache.layout.steps[0], cache.layout.halves[-1]), places)
    there = measure(made | mine | further, target, hookpoint, images, beside)
    reference = same if len(same) else spread(cache.images("held_out"))
    here = measure(made, cache, hookpoint, reference) if len(reference) else {}
    arrays = _arrays("target", there, target, images) | _arrays("source", here, cache, reference)
    if not apart:
        arrays |= _shared(here, there, cache, target, same, places, target.tokens_per_row(hookpoint))
    facts = {
        "source": _about(cache, hookpoint, reference, here),
        "target": _about(target, hookpoint, images, there),
        "shared": len(same),
        "not compared": apart,
        "k": k,
        **carried_labels(saes | mine, axes, cache, target, here, there, places),
    }
    return facts, arrays


def _apart(cache: Activations, target: Activations, hookpoint: str, shared: int) -> str:
    """Why codes of the two cannot be compared token by token; empty where they can."""
    if not shared:
        return "the target has no image of the source's prompts and seeds"
    if cache.layout.tokens_per_image:
        return "of its grids the source keeps only some tokens"
    return "" if cache.grid(hookpoint) == target.grid(hookpoint) else "grids differ"


def _places(cache: Activations, target: Activations, images: Int[np.ndarray, " image"]) -> Int[np.ndarray, " image"]:
    """Where each image is in the source, by text and seed; −1 if it is not."""
    known = {key: at for at, key in enumerate(zip(cache.prompts.texts, cache.prompts.seeds, strict=True))}
    texts, seeds, present = target.prompts.texts, target.prompts.seeds, set(cache.images().tolist())
    found = (known.get((texts[image], seeds[image]), -1) for image in images.tolist())
    return np.array([place if place in present else -1 for place in found])


def _about(
    cache: Activations, hookpoint: str, images: Int[np.ndarray, " image"], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """What a cache is, which of its images were read, and the shares of latents that are dead, row by row."""
    recipe, layout = cache.recipe, cache.layout
    steps = counted(recipe["num_inference_steps"], "steps")
    dead = {
        who: (each.fired.sum(axis=0) == 0).mean(axis=-1).tolist()
        for who, each in measured.items()
        if each.fired.shape[-1]
    }
    return {
        "name": f"{recipe['model']}, {steps}, guidance {recipe['guidance_scale']:g}",
        "rows": [[step, half] for step in layout.steps for half in layout.halves],
        "images": len(images),
        "tokens": len(images) * cache.tokens_per_row(hookpoint),
        "prompts": len({cache.prompts.texts[image] for image in images.tolist()}),
        "who": list(measured),
        "dead share": dead,
    }


def _arrays(
    place: str, measured: Mapping[str, Measured], cache: Activations, images: Int[np.ndarray, " image"]
) -> dict[str, NDArray[Any]]:
    """Sums by prompt; of the SAE also how active its latents are."""
    texts = [cache.prompts.texts[image] for image in images.tolist()]
    arrays: dict[str, NDArray[Any]] = {
        f"{place}/sums/{who}": by_prompt(each.sums, texts) for who, each in measured.items()
    }
    if measured:
        arrays[f"{place}/total"] = by_prompt(measured[TRAINED].total, texts).astype(np.float32)
        arrays[f"{place}/images"] = by_prompt(np.ones(len(texts), np.int32), texts)
    return arrays


def _shared(
    here: Mapping[str, Measured],
    there: Mapping[str, Measured],
    cache: Activations,
    target: Activations,
    same: Int[np.ndarray, " image"],
    places: Int[np.ndarray, " image"],
    n_tokens: int,
) -> dict[str, NDArray[Any]]:
    """On how many tokens of each prompt that both caches have every latent fires, of the cond half where both are."""
    texts = [cache.prompts.texts[image] for image in same.tolist()]
    arrays: dict[str, NDArray[Any]] = {"shared/tokens": by_prompt(np.full(len(texts), n_tokens), texts)}
    for who in (TRAINED, UNTRAINED):
        arrays[f"shared/source/{who}"] = by_prompt(here[who].fired[:, steps_of(cache)], texts)
        arrays[f"shared/target/{who}"] = by_prompt(there[who].fired[places >= 0][:, steps_of(target)], texts)
    return arrays

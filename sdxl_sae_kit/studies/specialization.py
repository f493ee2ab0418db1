"""Block specialisation: what each hookpoint's features respond to and cause, and whether hookpoints differ by it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.evaluation import controls
from sdxl_sae_kit.features import FeatureStats, check_fit
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import by_hookpoint
from sdxl_sae_kit.interventions import check_model
from sdxl_sae_kit.judges import PictureJudge, chosen_judge
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.similarity import Embed
from sdxl_sae_kit.studies.causes import Causes, measure_causes
from sdxl_sae_kit.studies.claims import RANDOM, SAME_PROMPT, TRAINED, weigh_claims
from sdxl_sae_kit.studies.clustering import (
    Embedding,
    Method,
    check_choice,
    choose_number,
    cluster,
    load_umap,
    measure_stability,
    place,
)
from sdxl_sae_kit.studies.contrasts import Pool, association, contrasts, resampled_information
from sdxl_sae_kit.studies.descriptors import Descriptors, Kind, describable, describe, describe_causes
from sdxl_sae_kit.studies.distances import made_by
from sdxl_sae_kit.studies.robustness import vary
from sdxl_sae_kit.studies.specialized import ARRAYS, TABLES, Specialization

CONTROLS = ("untrained", "channels")
"""What is measured beside the SAEs: see `evaluation.controls`."""

_MEASURED: tuple[Kind, ...] = ("response", "space", "look", "time")
_COMPARED: tuple[tuple[str, tuple[str, ...], tuple[Kind, ...], str], ...] = (
    (TRAINED, CONTROLS, _MEASURED, "those of controls"),
    (SAME_PROMPT, (RANDOM,), ("cause",), "causes"),
)
"""Features, what is compared with them, by which descriptors, and what these are called."""
_SHOWN, _TILE = 3, 56
_LEAST = 20


@checked
def specialize(
    pipe: Any,
    saes: SAE | Mapping[Any, SAE] | Sequence[SAE],
    cache: ActivationCache,
    *,
    timing: ActivationCache | None = None,
    embed: Embed | None = None,
    features_per_block: int = 100,
    prompts_per_feature: int = 2,
    method: Method = "kmeans",
    clusters: int | None = None,
    embedding: Embedding = "tsne",
    judge: PictureJudge | EllipsisType | None = ...,
    seed: int = 0,
    permutations: int = 500,
    batch_size: int = 32,
    store: Store | Path | str | None = None,
) -> Specialization:
    """Describe live features of several hookpoints, cluster them, and test how hookpoints differ, beside controls.

    Each feature is described by what it responds to, where it fires, how that looks, when it is active, and what
    turning it off causes (see `describe`). The clusters of all hookpoints' features together, their number by stability
    (see `measure_stability`), are compared with the hookpoints by mutual information; single descriptors by
    standardised mean differences; and the published claims about four blocks are tested (see `claims.RULE`). The
    features of untrained SAEs and raw channels are measured in the same way, but for what they cause: beside that
    stands a random direction. What is measured on the way is kept, so that a call that was killed goes on; the rest
    takes about a minute with the default settings.

    Args:
        pipe: the pipeline whose updates the SAEs were trained on.
        saes: one SAE for each of two hookpoints or more, in a list or a mapping.
        cache: updates of these hookpoints, whole grids.
        timing: updates of several denoising steps; without it nothing is said of when features are active.
        embed: a judge of images, such as `ClipEmbed`, that tells how alike a feature's top images are.
        features_per_block: at most so many of each hookpoint's features that fire on 5 images or more, spread evenly
            over the ranks of their density; and of each control's.
        prompts_per_feature: held-out images on which each feature is turned off, and beside it as much along a random
            direction: two pictures each. 0 leaves causes out.
        method: how to cluster: "kmeans", "ward" or "mixture" (of Gaussians).
        clusters: how many; the most stable number unless given.
        embedding: the plane in which features are drawn: "tsne", "pca" or "umap" (needs the extra `umap`).
        judge: tells what pictures show; by default the model's own, None for pixels only.
        seed: of clustering, plane, shuffles and random directions.
        permutations: shuffles of the block labels.
        batch_size: pictures made at once, from 2.
        store: folder of artifacts.

    Raises:
        ArtifactError: an SAE or a cache of another model, or a cache that lacks a hookpoint or keeps only some tokens.
        KitError: fewer than two hookpoints, two SAEs of one, updates of a single step as `timing`, something else than
            a cache or a judge, too few features, or impossible settings.

    Example:
        >>> study = specialize(pipe, [saes[h, "k5"] for h in cache.hookpoints], cache)            # doctest: +SKIP
        >>> study.plot_clusters()                                                                # doctest: +SKIP
    """
    placed = by_hookpoint("specialize", "saes", SAE, saes)
    if len(placed) < 2:
        raise KitError(f"specialize compares hookpoints; there is only {', '.join(placed)}. Pass SAEs of two or more.")
    _check(pipe, placed, cache, timing, embed)
    settings = _settings(method, clusters, embedding, seed, permutations)
    counts = {
        "features_per_block": whole_number("specialize: features_per_block", features_per_block, least=2),
        "prompts_per_feature": whole_number("specialize: prompts_per_feature", prompts_per_feature, least=0),
        "batch_size": whole_number("specialize: batch_size", batch_size, least=2),
    }
    judge = chosen_judge("specialize", pipe, judge) if prompts_per_feature else None
    recipe = {
        "study": "block specialisation",
        "saes": [[sae.hookpoint, sae.name, sae.digest] for sae in placed.values()],
        "cache": cache.artifact.digest,
        "timing": timing.artifact.digest if timing else None,
        "embed": embed.name if embed else None,
        "judge": judge.name if judge else None,
        **counts,
        **settings,
        **made_by(pipe),
    }
    artifact = Store.at(store).artifact("studies", f"specialization_{made_by(pipe)['model']}_{len(placed)}", recipe)
    if not artifact.finished:
        measured = _Measurement(pipe, cache, timing, embed, judge=judge, seed=seed, store=store, **counts)
        stats, described = measured.describe(placed)
        with artifact.lock():
            if not artifact.finished:
                _write(artifact, described, [stats[hookpoint] for hookpoint in placed], settings)
    return Specialization.open(artifact.folder)


def _check(
    pipe: Any, saes: Mapping[str, SAE], cache: ActivationCache, timing: ActivationCache | None, embed: Embed | None
) -> None:
    """Refuse what does not belong together, before anything is measured."""
    for sae in saes.values():
        check_model("specialize", pipe, sae)
        for each in (cache, timing):
            if each is not None:
                check_fit(sae, each)
    if timing is not None and len(timing.layout.steps) < 2:
        raise KitError(
            f"specialize: {timing.name} holds one denoising step, which does not tell when features are active. "
            "Collect with num_inference_steps=4, or leave timing out."
        )
    if embed is not None and (isinstance(embed, type) or not isinstance(embed, Embed)):
        raise KitError(f"specialize: embed is a judge such as WorldEmbed() or ClipEmbed(), or None, not {embed!r}.")


def _settings(
    method: Method, clusters: int | None, embedding: Embedding, seed: int, permutations: int
) -> dict[str, Any]:
    check_choice("method", method, Method)
    check_choice("embedding", embedding, Embedding)
    if embedding == "umap":
        load_umap()  # refused before anything is measured
    return {
        "method": method,
        "clusters": None if clusters is None else whole_number("specialize: clusters", clusters, least=2),
        "embedding": embedding,
        "seed": whole_number("specialize: seed", seed, least=0),
        "permutations": whole_number("specialize: permutations", permutations),
    }


@dataclass(frozen=True)
class _Measurement:
    """What is measured of the SAEs and of their controls."""

    pipe: Any
    cache: ActivationCache
    timing: ActivationCache | None
    embed: Embed | None
    features_per_block: int
    prompts_per_feature: int
    batch_size: int
    judge: PictureJudge | None
    seed: int
    store: Store | Path | str | None

    def describe(self, saes: Mapping[str, SAE]) -> tuple[dict[str, FeatureStats], dict[str, list[Descriptors]]]:
        """The SAEs' statistics, and the descriptors of their features and of all controls', by what they are of."""
        n, caches = len(saes) * (1 + len(CONTROLS)), 1 if self.timing is None else 2
        steps = f" and {self.timing.n_images:,} of several steps" if self.timing else ""
        off = f"; then features are turned off, each on up to {self.prompts_per_feature} images"
        tqdm.write(
            f"Specialisation: statistics of {n} SAEs and controls on {self.cache.n_images:,} images{steps}; up to "
            f"{self.features_per_block} features of each are described{off if self.prompts_per_feature else ''}. What "
            "was measured before is read."
        )
        stats, described = dict[str, FeatureStats](), dict[str, list[Descriptors]]()
        with tqdm(total=n * caches, desc="specialize", unit="measurement") as bar:
            for hookpoint, sae in saes.items():
                beside = controls(sae, self.cache)
                for name, each in {TRAINED: sae, **{name: beside[name] for name in CONTROLS}}.items():
                    measured, timed = self._measure(each, bar)
                    if name == TRAINED:
                        stats[hookpoint] = measured
                    latents = describable(measured, self.features_per_block)
                    described.setdefault(name, []).append(describe(measured, latents, timing=timed, embed=self.embed))
        if self.prompts_per_feature:
            trained = described[TRAINED]
            causes = [self._turn_off(saes[d.hookpoint], stats[d.hookpoint], d.latents) for d in trained]
            described |= _with_causes(trained, causes)
        return stats, described

    def _measure(self, sae: SAE, bar: Any) -> tuple[FeatureStats, FeatureStats | None]:
        found = [FeatureStats.measure(sae, each, store=self.store) for each in (self.cache, self.timing) if each]
        bar.update(len(found))
        return found[0], found[1] if len(found) > 1 else None

    def _turn_off(self, sae: SAE, stats: FeatureStats, latents: Int[np.ndarray, "feature"]) -> Causes:
        return measure_causes(
            self.pipe, sae, stats, latents, prompts_per_feature=self.prompts_per_feature, judge=self.judge,
            seed=self.seed, batch_size=self.batch_size, store=self.store,
        )  # fmt: skip


def _with_causes(trained: Sequence[Descriptors], causes: Sequence[Causes]) -> dict[str, list[Descriptors]]:
    """The trained features with what they cause; that alone; and what random directions cause on the same prompts."""
    caused = [describe_causes(told, each.latents) for each, told in zip(trained, causes, strict=True)]
    random = [
        describe_causes(replace(told, values=told.control), each.latents)
        for each, told in zip(trained, causes, strict=True)
    ]
    complete = [each.beside(own) for each, own in zip(trained, caused, strict=True)]
    return {TRAINED: complete, SAME_PROMPT: caused, RANDOM: random}


def compare_blocks(
    described: Mapping[str, Sequence[Descriptors]],
    *,
    method: Method = "kmeans",
    clusters: int | None = None,
    embedding: Embedding = "tsne",
    seed: int = 0,
    permutations: int = 500,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The study but for its measurements: tables and arrays over features, as `Specialization` holds them.

    Args:
        described: the descriptors of every hookpoint, by what they are of: "trained", and what stands beside it.
        method, clusters, embedding, seed, permutations: see `specialize`.

    Raises:
        KitError: too few features.
    """
    pools = {name: Pool.of(each) for name, each in described.items()}
    pool = pools[TRAINED]
    if min(sizes := np.bincount(pool.block, minlength=len(pool.blocks)).tolist()) < 2 or len(pool) < _LEAST:
        told = ", ".join(f"{n} of {block}" for block, n in zip(pool.blocks, sizes, strict=True))
        raise KitError(
            f"specialize: features that fire on 5 images or more are {told}; that is too few. Measure on more prompts."
        )
    stability = [] if clusters else measure_stability(pool.bounded, method, seed)
    found = clusters or choose_number(stability)
    number = max(found, 2)  # blocks can be compared where features form no groups, too
    labels = cluster(pool.bounded, number, method, seed)
    tables = {
        "hookpoints": list(pool.blocks),
        "clusters": [f"{at + 1}: {_name(pool, labels == at)}" for at in range(number)],
        "stability": stability,
        "stable_number": None if clusters else found,
        "information": _informations(pools, labels, number, method, seed, permutations),
        "effects": _effects(pools, seed),
        "claims": weigh_claims(pools, seed),
        "robustness": vary(pool, labels, number, method, seed, permutations),
    }
    arrays = {
        "hookpoint": pool.block, "cluster": labels, "feature": pool.latents, "descriptors": pool.values,
        "position": place(pool.bounded, embedding, seed), "central": _distance(pool.bounded, labels),
    }  # fmt: skip
    return tables, arrays


def _name(pool: Pool, mine: NDArray[np.bool_]) -> str:
    """The two descriptors in which a cluster's centre stands out most."""
    centre = np.nan_to_num(pool.points)[mine].mean(axis=0)
    strongest = np.argsort(-np.abs(centre), kind="stable")[:2]
    return ", ".join(f"{'high' if centre[at] > 0 else 'low'} {pool.names[at]}" for at in strongest)


def _distance(
    points: Float[np.ndarray, "feature descriptor"], labels: Int[np.ndarray, "feature"]
) -> NDArray[np.float64]:
    """Of every feature from its cluster's centre."""
    centres = np.stack([points[labels == at].mean(axis=0) for at in range(labels.max() + 1)])
    return np.asarray(np.linalg.norm(points - centres[labels], axis=1))


def _informations(
    pools: Mapping[str, Pool],
    labels: Int[np.ndarray, "feature"],
    number: int,
    method: Method,
    seed: int,
    permutations: int,
) -> list[dict[str, Any]]:
    """What clusters tell of blocks: by all descriptors; and by those that controls have, of features and of controls.

    Each is clustered by itself into as many clusters, those of its features of which anything is told. The first row
    also holds `untold`, the share of values that are not told, and the names of controls with `too few` features.
    """
    rows: list[dict[str, Any]] = [{"of": TRAINED, "descriptors": "all", "untold": pools[TRAINED].untold, "too few": []}]
    rows[0] |= association(pools[TRAINED].block, labels, permutations, seed)
    for own, beside, kinds, words in _COMPARED:
        compared = {name: pools[name].only(*kinds).told for name in (own, *beside) if name in pools}
        enough = {name: pool for name, pool in compared.items() if len(pool) > number and pool.bounded.size}
        rows[0]["too few"] += [name for name in compared if name not in enough]
        found = {name: cluster(pool.bounded, number, method, seed) for name, pool in enough.items()}
        told = {name: association(enough[name].block, found[name], permutations, seed) for name in found}
        if own in told and len(told) > 1:
            gaps = {name: _gap(told, own, name, enough, found, seed) for name in told if name != own}
            rows += [{"of": name, "descriptors": words} | told[name] | gaps.get(name, {}) for name in told]
    return rows


def _gap(
    told: Mapping[str, Mapping[str, Any]],
    own: str,
    control: str,
    pools: Mapping[str, Pool],
    clusters: Mapping[str, Int[np.ndarray, "feature"]],
    seed: int,
) -> dict[str, Any]:
    """The features' share of the entropy above chance minus the control's, with its 95 % bootstrap interval.

    Features are drawn anew, and keep the clusters that they were put in.
    """
    samples = [
        resampled_information(pools[name].block, clusters[name], seed + at) for at, name in enumerate((own, control))
    ]
    gap = told[own]["above"] - told[control]["above"]
    low, high = gap + np.quantile(samples[0] - samples[1], [0.025, 0.975])
    return {"gap": float(gap), "gap interval": (float(low), float(high))}


def _effects(pools: Mapping[str, Pool], seed: int) -> list[dict[str, Any]]:
    """A row per descriptor and block, the controls' numbers beside the features'."""
    rows = {(row["descriptor"], row["block"]): row for row in contrasts(pools[TRAINED], seed)}
    for name, pool in pools.items():
        if name not in (TRAINED, SAME_PROMPT):
            for beside in contrasts(pool, seed):
                if row := rows.get((beside["descriptor"], beside["block"])):
                    row |= {f"{name} {key}": beside[key] for key in ("mean", "effect", "effect interval")}
    return list(rows.values())


def _write(
    artifact: Artifact,
    described: Mapping[str, Sequence[Descriptors]],
    stats: Sequence[FeatureStats],
    settings: Mapping[str, Any],
) -> None:
    n = sum(len(each.latents) for each in described[TRAINED])
    tqdm.write(f"Clustering {n:,} features of {len(stats)} hookpoints, with {settings['permutations']} shuffles.")
    tables, arrays = compare_blocks(described, **settings)
    places = zip(arrays["hookpoint"].tolist(), arrays["feature"].tolist(), strict=True)
    pictures = [_picture(stats[at], latent) for at, latent in places]
    arrays["pictures"] = np.frombuffer(b"".join(pictures), dtype=np.uint8)
    arrays["picture_ends"] = np.cumsum([len(picture) for picture in pictures])
    with h5py.File(artifact.file(ARRAYS), "w", libver=("v108", "v110")) as file:
        for name, array in arrays.items():
            file[name] = array
    write_atomically(artifact.file(TABLES), json.dumps(tables, indent=1).encode())
    artifact.seal(facts={"features": n, "bits": tables["information"][0]["bits"], "p": tables["information"][0]["p"]})


def _picture(stats: FeatureStats, latent: int) -> bytes:
    """A feature's strongest images over their heat maps."""
    examples = stats.examples(latent, n=_SHOWN)
    shown = [(example.thumbnail, example.heat_map) for example in examples]
    return html.strip(shown, max(example.value for example in examples), _TILE, places=_SHOWN)

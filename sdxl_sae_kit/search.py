"""Find features: by what two prompts differ in, by region, by image, by label, by likeness to another, by text.

Every search gives `Results`: features ranked by a score whose formula stands beside it, with an interval where the
score is an estimate, and what chance gives where that can be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import KitError, PromptError
from sdxl_sae_kit.features import FeatureStats, Ranking
from sdxl_sae_kit.findings import Found, Results
from sdxl_sae_kit.hookpoints import by_hookpoint
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.interventions import check_model
from sdxl_sae_kit.labels import LabelStore, check_stats
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.similarity import MIN_IMAGES as FEWEST_PICTURES
from sdxl_sae_kit.similarity import Embed, embed_pictures, top_pictures

MIN_IMAGES = 4
"""What can be said of a feature that at least so many images show."""
MIN_PAIRS = 6
"""Fewer pairs cannot differ from chance at 95 %: their signs can be flipped in too few ways."""
_RESAMPLES, _BATCH = 2000, 16


# By what two prompts differ in ----------------------------------------------------------------------------------------


@checked
def by_contrast(
    pipe: Any,
    saes: SAE | Iterable[SAE] | Mapping[Any, SAE],
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    *,
    n: int = 16,
    seed: int = 0,
) -> Results:
    """Features that are more active on images of one prompt (or list) than on those of another, at any hookpoints.

    Both images of a pair start from the same noise. The score is the mean over pairs of the difference positive −
    negative of a latent's mean activation over all tokens (and steps; with guidance, the cond half); its interval is a
    95 % bootstrap over pairs. `chance` is what the largest |score| of all latents of the hookpoint stays below in 95 %
    of 2,000 random flips of the pairs' signs: a score beyond it is not due to having looked at many latents. Ranked by
    score / chance, which compares hookpoints; the last are those that the negative prompt has more of.

    Of several pairs of prompts each is one unit, its images averaged first: what is found holds for prompts like them.
    Of one pair of prompts the pairs of images are the units: what is found holds for these two prompts only.

    Args:
        pipe: the pipeline whose updates the SAEs were trained on.
        saes: one SAE, or several of different hookpoints, such as what `train` gives.
        positive: prompt or prompts to have more of.
        negative: as many, the i-th paired with the i-th; a single one is paired with all. No pair comes twice.
        n: image pairs for each pair of prompts, all with seeds of their own.
        seed: the first of them.

    Raises:
        ArtifactError: an SAE of another model.
        PromptError: no prompts, lists of different length, or a pair that comes twice.
        KitError: two SAEs of one hookpoint, of different steps or guidance, or fewer than 6 units:
            pairs of prompts or, of one pair of prompts, n.

    >>> by_contrast(pipe, saes, "a red circle", "a blue circle")[0]                                # doctest: +SKIP
    """
    used = _read_saes(pipe, saes)
    pairs = _read_pairs(positive, negative)
    n = whole_number("by_contrast: n", n)
    seed = whole_number("by_contrast: seed", seed, least=0)
    _check_units(len(pairs), n)
    more, less = ([pair[side] for pair in pairs for _ in range(n)] for side in (0, 1))
    seeds = list(range(seed, seed + len(more)))
    tqdm.write(f"Making {2 * len(more)} images to contrast them at {', '.join(used)}.")
    with tqdm(total=2 * len(more), desc="contrast", unit="image") as bar:
        high, low = (_mean_codes(pipe, used, texts, seeds, bar) for texts in (more, less))
    differences = {hookpoint: _by_unit(high[hookpoint] - low[hookpoint], len(pairs)) for hookpoint in used}
    found = [each for hookpoint in used for each in _contrasted(hookpoint, differences[hookpoint])]
    found.sort(key=lambda each: -each.score / max(each.chance, 1e-30))
    unit, scope = "prompt pairs", f"Of each prompt pair the mean over its image pairs counts; image pairs: {n}."
    if len(pairs) == 1:
        unit, scope = "image pairs", "This holds for these two prompts only."
    formula = (
        f"mean over {unit} of the difference positive − negative of the mean activation over tokens; interval: "
        f"bootstrap over {unit}; chance: 95 % quantile of the largest |score| under random flips of their signs. "
        f"{scope}"
    )
    return Results(tuple(found), "mean difference", unit, formula)


def _check_units(n_pairs: int, n: int) -> None:
    units, kind, remedy = n_pairs, "prompt pairs", "Give more, or one alone with a larger n"
    if n_pairs == 1:
        units, kind, remedy = n, "image pairs", "Ask for a larger n"
    if units < MIN_PAIRS:
        raise KitError(f"by_contrast: {units} {kind} cannot differ from chance at 95 %; {MIN_PAIRS} can. {remedy}.")


def _by_unit(differences: Float[np.ndarray, "image latent"], n_pairs: int) -> Float[np.ndarray, "unit latent"]:
    """What is independent: the mean over the images of each pair of prompts; of a single pair, its images."""
    if n_pairs == 1:
        return differences
    return np.asarray(differences.reshape(n_pairs, -1, differences.shape[1]).mean(axis=1))


def _read_saes(pipe: Any, saes: Any) -> dict[str, SAE]:
    """SAEs by hookpoint; refused where they do not belong together or to the pipeline."""
    used = by_hookpoint("by_contrast", "saes", SAE, saes)
    for sae in used.values():
        check_model("by_contrast", pipe, sae)
    if len(_settings(used)) > 1:
        raise KitError("by_contrast: these SAEs were trained at different steps or guidance. Contrast them one by one.")
    return used


def _settings(saes: Mapping[str, SAE]) -> set[tuple[int, float]]:
    return {(s.site.num_inference_steps, s.site.guidance_scale) for s in saes.values() if s.site}


def _read_pairs(positive: str | Sequence[str], negative: str | Sequence[str]) -> list[tuple[str, str]]:
    sides = [[side] if isinstance(side, str) else list(side) for side in (positive, negative)]
    longest = max(map(len, sides))
    if not longest or any(len(side) not in (1, longest) for side in sides):
        raise PromptError(
            f"by_contrast pairs prompts one by one; it got {len(sides[0])} and {len(sides[1])}. "
            "Give as many of each, or a single one."
        )
    more, less = (side * longest if len(side) == 1 else side for side in sides)
    pairs = list(zip(more, less, strict=True))
    if len(set(pairs)) < longest:
        raise PromptError("by_contrast: a pair of prompts comes twice. Give each once; n says how many images of each.")
    return pairs


@torch.no_grad()
def _mean_codes(
    pipe: Any, saes: Mapping[str, SAE], texts: Sequence[str], seeds: Sequence[int], bar: Any
) -> dict[str, Float[np.ndarray, "image latent"]]:
    """By hookpoint, every latent's mean activation over the tokens and steps of every image."""
    ((steps, guidance),) = _settings(saes)
    means: dict[str, list[Tensor]] = {hookpoint: [] for hookpoint in saes}
    for start in range(0, len(texts), _BATCH):
        batch = slice(start, start + _BATCH)
        with record(pipe, saes, stop_early=True) as recording:
            generate(pipe, texts[batch], seeds[batch], num_inference_steps=steps, guidance_scale=guidance)
        for hookpoint, sae in saes.items():
            x = torch.cat([recording.update(hookpoint, step).flatten(1, 2) for step in recording.steps], dim=1)
            indices, values = (code.flatten(1) for code in sae.encode_sparse(x.to(sae.W_enc.device, torch.float32)))
            summed = values.new_zeros(len(x), sae.d_sae).scatter_add(1, indices, values)
            means[hookpoint].append(summed.cpu() / x.shape[1])
        bar.update(len(texts[batch]))
    return {hookpoint: torch.cat(parts).numpy() for hookpoint, parts in means.items()}


def _contrasted(hookpoint: str, differences: Float[np.ndarray, "pair latent"]) -> list[Found]:
    """The latents that differ in some pair."""
    rng, n = np.random.default_rng(0), len(differences)
    latents = np.flatnonzero(differences.any(axis=0))
    if not len(latents):
        return []
    score = differences[:, latents].mean(axis=0)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float32) / n
    low, high = np.quantile(draws @ differences[:, latents], [0.025, 0.975], axis=0)
    signs = rng.choice(np.array([-1, 1], dtype=np.float32), (_RESAMPLES, n)) / n
    chance = float(np.quantile(np.abs(signs @ differences[:, latents]).max(axis=1), 0.95))
    columns = (each.tolist() for each in (latents, score, low, high))
    return [Found(hookpoint, latent, s, n, a, b, chance) for latent, s, a, b in zip(*columns, strict=True)]


# By region and by image -----------------------------------------------------------------------------------------------


@checked
def by_region(stats: FeatureStats, image: int, mask: ArrayLike) -> Results:
    """Features most active under a mask of one image: mean activation inside, beside that outside.

    Args:
        stats: feature statistics.
        image: index in the cache they were measured on.
        mask: (height, width) at the hookpoint's grid, the picture's size or any other; nonzero is inside. A token that
            the mask covers in part counts in part.

    Raises:
        KitError: the mask is no map of finite numbers from 0 on, or is zero everywhere; or there is no such image.

    >>> by_region(stats, 3, np.eye(8))[0].score                                                    # doctest: +SKIP
    """
    check_stats("by_region", stats)
    inside = _token_shares(mask, stats.grid)
    maps = stats.heat_maps(image)
    within = np.einsum("lyx,yx->l", maps, inside) / inside.sum()
    outside = 1 - inside
    without = np.einsum("lyx,yx->l", maps, outside) / outside.sum() if outside.any() else np.full(len(maps), nan)
    order = np.argsort(-within, kind="stable")
    n = int((inside > 0).sum())
    found = (
        Found(stats.hookpoint, latent, float(within[latent]), n, beside=_contrast(within[latent], without[latent]))
        for latent in order[within[order] > 0].tolist()
    )
    formula = (
        "mean activation over the tokens under the mask; outside: over the others; contrast: inside − outside. "
        f"Image {image}: {stats.prompts.texts[image]}"
    )
    return Results(tuple(found), "mean inside", "tokens", formula)


def _contrast(inside: float, outside: float) -> dict[str, float]:
    return {"mean outside": float(outside), "contrast": float(inside - outside)}


def _token_shares(mask: ArrayLike, grid: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Share of each token that the mask covers."""
    array = np.asarray(mask)
    if (
        array.ndim != 2
        or array.dtype.kind not in "biuf"
        or not np.isfinite(array).all()
        or not array.any()
        or array.min() < 0
    ):
        raise KitError(
            f"by_region: mask must be a map of finite numbers from 0 on, nonzero inside, such as ({grid[0]}, {grid[1]})"
            f" or as large as the picture; this has shape {array.shape} and marks nothing, or is no such map."
        )
    covered = Image.fromarray((array != 0).astype(np.float32))
    shares = np.asarray(covered.resize((grid[1], grid[0]), Image.Resampling.BOX), dtype=np.float64)
    return shares.clip(0, 1)


@checked
def by_image(stats: FeatureStats, image: int, by: Ranking = "max") -> Results:
    """Features strongest on one image of the cache: by maximum or mean over tokens, or by the share they fire on.

    Raises:
        KitError: there is no such image, or no such ranking ("max", "mean" or "area").

    >>> by_image(stats, 3, "area")[0].latent                                                       # doctest: +SKIP
    """
    check_stats("by_image", stats)
    tokens = stats.heat_maps(image).reshape(stats.d_sae, -1)
    kinds = {"max": tokens.max(axis=1), "mean": tokens.mean(axis=1), "area": (tokens > FIRES).mean(axis=1)}
    if by not in kinds:
        raise KitError(f"by_image: by is one of {', '.join(map(repr, kinds))}, not {by!r}.")
    order = np.argsort(-kinds[by], kind="stable")
    found = (
        Found(
            stats.hookpoint,
            latent,
            float(kinds[by][latent]),
            tokens.shape[1],
            beside={kind: float(values[latent]) for kind, values in kinds.items() if kind != by},
        )
        for latent in order[kinds["max"][order] > FIRES].tolist()
    )
    formula = f"{by} of the activation over the tokens of image {image}: {stats.prompts.texts[image]}"
    return Results(tuple(found), by, "tokens", formula)


# By label, likeness and text ------------------------------------------------------------------------------------------


@checked
def by_label(labels: LabelStore, text: str) -> Results:
    """Features whose label or tags hold every word of the text, or a word that it begins, in any order and case.

    The score is the share of the label's words (tags included) that were asked for, 0 to 1.

    Raises:
        KitError: the text has no words.

    >>> by_label(LabelStore.of(stats), "red circle").rows()                                        # doctest: +SKIP
    """
    asked = text.casefold().split()
    if not asked:
        raise KitError("by_label looks for words, such as 'red circle'; it got none. Say what to look for.")
    found = []
    for feature, named in labels.all().items():
        label = labels.latest(feature)
        tags = label.tags if label else ()
        told = " ".join([named, *tags]).casefold().split()
        if all(any(word.startswith(a) for word in told) for a in asked):
            share = sum(any(word.startswith(a) for a in asked) for word in told) / len(told)
            found.append(Found("", feature, share, len(told), beside={"label": named, "tags": ", ".join(tags)}))
    found.sort(key=lambda each: (-each.score, each.latent))
    return Results(tuple(found), "share", "words", f"share of the label's words that {text!r} asks for.")


@checked
def by_similarity(stats: FeatureStats, feature: int) -> Results:
    """The features nearest to one: the 8 of the most similar decoder rows, and the 8 that fire most on its tokens.

    The score is the cosine of decoder rows; beside it the Jaccard index of firing tokens, both / either, and what that
    would be if the two fired independently, each as often as it does. NaN where it is not among the 8 of that kind.

    Raises:
        KitError: there is no such latent.
    """
    check_stats("by_similarity", stats)
    cosines = {each.latent: each.value for each in stats.similar(feature)}
    together = {each.latent: each for each in stats.coactive(feature)}
    p, q = float(stats.density[feature]), stats.density.astype(np.float64)
    independent = p * q / np.maximum(p + q - p * q, 1e-30)
    found = []
    for latent in dict.fromkeys([*cosines, *together]):  # most similar first, then those that only fire together
        joint = together.get(latent)
        beside = {"co-activation": joint.value if joint else nan, "if independent": float(independent[latent])}
        counted = (joint.n or stats.n_tokens) if joint else None  # a cosine is not taken over tokens
        found.append(Found(stats.hookpoint, latent, cosines.get(latent, nan), counted, beside=beside))
    formula = (
        f"cosine of decoder rows with feature {feature}; co-activation: tokens on which both fire / on which either "
        "does; if independent: the same, were they independent; –: not among the 8 nearest of that kind."
    )
    return Results(tuple(found), "cosine", "tokens of co-activation", formula)


@checked
def by_text(
    stats: FeatureStats, text: str, embed: Embed, *, n: int = 12, store: Store | Path | str | None = None
) -> Results:
    """Features whose top images are like a text, by a judge that knows texts, such as `ClipEmbed`.

    The score is the mean cosine similarity of the text to a feature's top images, with a 95 % bootstrap interval over
    them; z says how many standard deviations that is above the mean of all features (with 8 images or more).

    Args:
        stats: feature statistics of a cache with images.
        text: what to look for.
        embed: the judge.
        n: at most so many top images (by maximum) of each feature.
        store: folder of artifacts in which the embeddings of the images are kept; by default that of `stats`.

    Raises:
        KitError: the judge knows no texts, or the statistics keep fewer than 8 examples of each feature.
    """
    check_stats("by_text", stats)
    if not callable(getattr(embed, "texts", None)):
        raise KitError(f"by_text needs a judge that knows texts, such as ClipEmbed('folder'), not {embed!r}.")
    n = whole_number("by_text: n", n, least=FEWEST_PICTURES)
    pictures = top_pictures(stats, n)
    alike = embed_pictures(stats, embed, store) @ embed.texts([text])[0]  # type: ignore[attr-defined]
    top = {latent: alike[at] for latent, at in pictures.items() if len(at) >= FEWEST_PICTURES}
    scores = np.array([values.mean() for values in top.values()])
    spread = scores.std() if len(scores) else nan
    found = []
    for (latent, values), score in zip(top.items(), scores.tolist(), strict=True):
        low, high = bootstrap_interval(values)
        z = (score - scores.mean()) / spread if spread else nan
        found.append(Found(stats.hookpoint, latent, score, len(values), low, high, beside={"z": float(z)}))
    found.sort(key=lambda each: -each.score)
    formula = (
        f"mean cosine similarity of {text!r} to the top images; all {len(alike):,} pictures have "
        f"{html.short(float(alike.mean()))}. Judge: {embed.name}."
    )
    return Results(tuple(found), "similarity", "images", formula)


# By energy ------------------------------------------------------------------------------------------------------------


def held_out_firing(stats: FeatureStats) -> Bool[np.ndarray, "image latent"]:
    """Which latents fire on which images; False for images that are not held out."""
    return np.asarray((stats.image_activations("max") > FIRES) & stats.prompts.held_out[:, None])


@checked
def most_energetic(stats: FeatureStats, n: int = 12) -> list[int]:
    """Latents with the most energy, density · (mean² + std²), among the local ones of which something can be measured.

    They fire on at least 4 held-out images and on at most half of the tokens.

    Raises:
        KitError: there is none.
    """
    check_stats("most_energetic", stats)
    n = whole_number("most_energetic: n", n)
    local = (held_out_firing(stats).sum(axis=0) >= MIN_IMAGES) & (stats.density <= 0.5)
    if not local.any():
        raise KitError(f"No latent of {stats.sae} fires on {MIN_IMAGES} held-out images. Measure more prompts.")
    energy = np.where(local, stats.density * (stats.mean**2 + stats.std**2), -1)
    chosen: list[int] = np.argsort(-energy, kind="stable")[: min(n, int(local.sum()))].tolist()
    return chosen

"""Measure SAEs: held-out reconstruction, the strength at which latents fire, and whether seeds agree on latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.configs import SAEConfig, Split
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import (
    ReconstructionMetrics,
    bootstrap_interval,
    matched_cosine,
    shares_above,
    shuffled_rows,
)
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.tokens import Tokens

MAX_IMAGES = 2048
"""Evaluation reads at most so many images of a split, spread over all of it."""

_SAMPLE = 40_960


@checked
@torch.no_grad()
def evaluate(
    sae: SAE, cache: Activations | Tokens, split: Split = "held_out", *, hookpoint: str | None = None
) -> dict[str, Any]:
    """Measure how well an SAE reconstructs tokens, by default such as it was not trained on.

    Args:
        sae: an SAE.
        cache: updates of its hookpoint, or `Tokens`.
        split: "held_out", "train" or, of a cache, "all"; of a cache at most 2,048 images, spread over all of the split;
            of `Tokens` the first 131,072, of which 64 that came one after the other count as an image.
        hookpoint: by default the SAE's.

    Returns:
        `explained_variance` (at most 1) with `explained_variance_interval`, a 95 % bootstrap interval over images;
        `explained_variance_per_channel`; `l0`, active latents per token; `dead_share` (0 to 1), of latents those that
        never fired on these tokens; `relative_norm` and `gamma`; `n_tokens` and `n_images`. For the formulas see
        `metrics.ReconstructionMetrics`. A number that is not defined (the interval of one image, the variance of what
        does not vary) is None.

    Raises:
        ArtifactError: the SAE was trained at another hookpoint, or on something else than updates.
        HookpointError: the cache does not have the hookpoint.
        KitError: what is given is neither a cache nor `Tokens`, or has no such split, or no image in it.

    >>> evaluate(saes["up.0.1", "k10"], cache)["explained_variance"]                              # doctest: +SKIP
    """
    if not isinstance(cache, Activations | Tokens):
        raise KitError(
            f"evaluate takes a cache, or Tokens(batches), not {type(cache).__name__}. Call evaluate(sae, cache)."
        )
    sae.check_site(hookpoint := hookpoint or (sae.hookpoint if sae.site else cache.hookpoints[0]))
    metrics, fired = ReconstructionMetrics(), torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    squared_errors, sums, squares = [], [], []
    for part in cache.by_image(hookpoint, split, MAX_IMAGES):
        x = part.to(sae.W_enc.device)
        tokens = x.flatten(0, 1)
        indices, values = sae.encode_sparse(tokens)
        x_hat = sae.decode_sparse(indices, values, tokens)
        metrics.update(tokens, x_hat, (values > FIRES).sum(dim=1))
        fired[indices[values > FIRES]] = True
        squared_errors.append((x - x_hat.view_as(x)).double().square().sum((1, 2)))
        sums.append(x.double().sum(1))
        squares.append(x.double().square().sum((1, 2)))
    image_error, image_sum, image_square = (torch.cat(parts).cpu() for parts in (squared_errors, sums, squares))
    interval: Any = _interval(image_error, image_sum, image_square, x.shape[1])
    interval = None if any(map(math.isnan, interval)) else interval
    measured = {
        "explained_variance": metrics.explained_variance,
        "explained_variance_interval": interval,
        "explained_variance_per_channel": metrics.explained_variance_per_channel,
        "l0": metrics.l0,
        "dead_share": 1 - fired.double().mean().item(),
        "relative_norm": metrics.relative_norm,
        "gamma": metrics.gamma,
        "n_tokens": metrics.n_tokens,
        "n_images": len(torch.cat(squares)),
    }
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in measured.items()}


@torch.no_grad()
def controls(sae: SAE, cache: Activations) -> dict[str, SAE]:
    """What any claim about an SAE's features is shown beside: SAEs of the same L0 that were not trained.

    - `untrained`: `sae.untrained()`, as many random directions.
    - `channels`: the raw channels of the update, up and down, from the mean of training tokens.
    - `PCA`: the principal axes of training tokens, up and down, from their mean.

    Of the last two, the k largest on each token are active (k is the SAE's L0), which is the best that k axes can do.
    They go wherever the SAE goes, so that what is measured of them is computed in the same way.

    >>> stats = FeatureStats.measure(controls(sae, cache)["PCA"], cache)     # doctest: +SKIP
    """
    untrained, tokens = sae.untrained(), cache.sample(sae.hookpoint, _SAMPLE).to(sae.W_enc.device)
    mean = tokens.mean(dim=0)
    axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))[1].T.flip(0)
    bases = {"channels": torch.eye(sae.d_in, device=axes.device), "PCA": axes}
    k = min(untrained.k or 1, sae.d_in)  # of two opposite directions at most one is active
    return {"untrained": untrained} | {name: _basis(name, rows, mean, k, sae) for name, rows in bases.items()}


def _basis(name: str, rows: Float[Tensor, "axis d_in"], mean: Float[Tensor, "d_in"], k: int, like: SAE) -> SAE:
    """An SAE whose latents are these orthonormal rows and their opposites."""
    both = torch.cat([rows, -rows])
    sae = SAE(SAEConfig(k=k, expansion=2), like.d_in, like.site, f"{name}_{like.name}").to(rows.device)
    for parameter, value in ((sae.W_enc, both.T), (sae.W_dec, both), (sae.b_dec, mean)):
        parameter.copy_(value)
    return sae.eval().requires_grad_(False)


@torch.no_grad()
def pca_explained_variance(cache: Activations, hookpoint: str, k: int) -> float:
    """Explained variance of held-out tokens by the first k principal axes of training tokens: a control for L0."""
    sample = cache.sample(hookpoint, _SAMPLE)
    mean = sample.mean(dim=0)
    axes = torch.linalg.svd((sample - mean).T @ (sample - mean))[2][:k]
    metrics = ReconstructionMetrics()
    for x in cache.by_image(hookpoint, "held_out", MAX_IMAGES):
        tokens = x.flatten(0, 1)
        metrics.update(tokens, (tokens - mean) @ axes.T @ axes + mean)
    return metrics.explained_variance


@torch.no_grad()
def mean_activation(sae: SAE, cache: Activations | Tokens, hookpoint: str) -> Float[Tensor, "d_sae"]:
    """Mean value of each latent over the tokens on which it fires, of up to 2,048 training images; 0 if none."""
    total = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.W_enc.device)
    count = torch.zeros_like(total)
    for x in cache.by_image(hookpoint, "train", MAX_IMAGES):
        indices, values = sae.encode_sparse(x.flatten(0, 1).to(sae.W_enc.device))
        fires = values > FIRES
        total.index_add_(0, indices[fires], values[fires].double())
        count.index_add_(0, indices[fires], torch.ones_like(values[fires]).double())
    return (total / count.clamp_min(1)).float()


@checked
def stability(saes: Mapping[Any, SAE] | Iterable[SAE]) -> list[dict[str, Any]]:
    """How far SAEs that differ in their seed only learn the same latents, pair by pair, beside two controls.

    Alive latents (mean_activation > 0) of one are matched one to one with those of the other so that the sum of the
    cosines of their decoder rows is greatest (`metrics.matched_cosine`). Per pair and condition: the mean cosine of
    matched latents, the shares matched above 0.7 and 0.9, each with its 95 % bootstrap interval over matched latents
    (taken as independent, which matching makes only roughly true), their number, and how many latents are left over
    because one of the two has more alive. Conditions:

    - `trained`: the pair.
    - `shuffled`: along each principal axis of the second's alive decoder rows, the rows' entries are dealt out anew
      among them. This keeps the rows' mean, covariance and distribution along every axis, all that two dictionaries
      share merely because they describe the same updates, and destroys each latent's combination of entries. Shuffling
      the entries within rows instead would lose the strong axes too, and so make agreement look better than it is.
    - `untrained`: `untrained()` of both, at the same numbers of latents: what matching finds among random directions.

    The cost is that of three matchings a pair: 15 seconds on one core at d_sae = 5,120 and d_in = 1,280.

    Args:
        saes: two or more, or what `train` gave for one hookpoint.

    Raises:
        KitError: fewer than two, a seed twice, SAEs that differ in more than the seed, or one without alive latents.

    >>> saes = train(cache, {f"seed{i}": SAEConfig(seed=i) for i in range(3)}, hookpoints=["mid.0"])  # doctest: +SKIP
    >>> show_table(stability(saes), "Latents that seeds agree on")                                    # doctest: +SKIP
    """
    chosen = list(saes.values() if isinstance(saes, Mapping) else saes)
    _check_seeds(chosen)
    return [row for one, other in combinations(chosen, 2) for row in _agreement(one, other)]


def _check_seeds(saes: list[SAE]) -> None:
    if len(saes) < 2:
        raise KitError(f"stability compares SAEs of different seeds, but got {len(saes)}. Give two or more.")
    first, *others = saes
    for sae in others:
        differing = [
            name
            for name, one, other in (
                ("site", first.site, sae.site),
                ("data", first.data, sae.data),
                ("shape", (first.d_in, first.d_sae), (sae.d_in, sae.d_sae)),
                ("config", replace(first.config, seed=0), replace(sae.config, seed=0)),
            )
            if one != other
        ]
        if differing:
            raise KitError(
                f"stability: {first.name} and {sae.name} differ in {differing[0]}, not in the seed only. "
                "Give SAEs of one hookpoint with one configuration."
            )
    seeds = [sae.config.seed for sae in saes]
    if len(set(seeds)) < len(seeds):
        raise KitError(f"stability: the seeds are {', '.join(map(str, seeds))}. Give each seed once.")
    if dead := [sae.name for sae in saes if not (sae.mean_activation > 0).any()]:
        raise KitError(f"stability: {', '.join(dead)} has no alive latent (mean_activation is 0). Train it first.")


@torch.no_grad()
def _agreement(one: SAE, other: SAE) -> list[dict[str, Any]]:
    """The rows of one pair."""
    alive = [sae.mean_activation > 0 for sae in (one, other)]
    mine, theirs = (sae.W_dec[at].cpu().double() for sae, at in zip((one, other), alive, strict=True))
    random = (sae.untrained().W_dec[at] for sae, at in zip((one, other), alive, strict=True))
    pairs = {"trained": (mine, theirs), "shuffled": (mine, shuffled_rows(theirs)), "untrained": tuple(random)}
    rows = []
    for condition, (left, right) in pairs.items():
        cosines = matched_cosine(left, right)
        cosines = cosines[~np.isnan(cosines)]
        row: dict[str, Any] = {
            "hookpoint": one.site.hookpoint if one.site else "–",
            "seeds": f"{one.config.seed} and {other.config.seed}",
        }
        row |= {"condition": condition, "mean cosine": float(cosines.mean()), "interval": bootstrap_interval(cosines)}
        rows.append(row | shares_above(cosines) | {"latents": len(cosines), "left over": abs(len(mine) - len(theirs))})
    return rows


def _interval(error: Tensor, sums: Tensor, squares: Tensor, tokens_per_image: int) -> tuple[float, float]:
    """Interval of 1 − Σerror / Σ‖x − mean‖², resampling images."""
    mean = sums.sum(0) / (len(sums) * tokens_per_image)
    total = squares - 2 * sums @ mean + tokens_per_image * mean.square().sum()
    return bootstrap_interval(torch.stack([error, total], dim=1).numpy(), lambda m: 1 - m[..., 0] / m[..., 1])

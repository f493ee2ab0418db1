"""Measure an SAE on a cache: held-out reconstruction metrics, and the strength at which its latents fire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.activations import Activations, Split
from sdxl_sae_kit.metrics import ReconstructionMetrics, bootstrap_interval
from sdxl_sae_kit.sae import FIRES, SAE

MAX_IMAGES = 2048
"""Evaluation reads at most so many images of a split, spread over all of it."""


@torch.no_grad()
def evaluate(sae: SAE, cache: Activations, split: Split = "held_out") -> dict[str, Any]:
    """Reconstruction metrics (see `metrics`) and their n; explained variance has a 95 % bootstrap interval over images.

    `dead_share` is the share of latents that never fired on the tokens evaluated.
    """
    metrics, fired = ReconstructionMetrics(), torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    squared_errors, sums, squares = [], [], []
    for x in _images(cache, sae.hookpoint, split, sae.W_enc.device):
        tokens = x.flatten(0, 1)
        indices, values = sae.encode_sparse(tokens)
        x_hat = sae.decode_sparse(indices, values)
        metrics.update(tokens, x_hat, (values > FIRES).sum(dim=1))
        fired[indices[values > FIRES]] = True
        squared_errors.append((x - x_hat.view_as(x)).double().square().sum((1, 2)))
        sums.append(x.double().sum(1))
        squares.append(x.double().square().sum((1, 2)))
    image_error, image_sum, image_square = (torch.cat(parts).cpu() for parts in (squared_errors, sums, squares))
    interval = _interval(image_error, image_sum, image_square, x.shape[1])
    return {
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


@torch.no_grad()
def pca_explained_variance(cache: Activations, hookpoint: str, k: int) -> float:
    """Explained variance of held-out tokens by the first k principal axes of training tokens: a control for L0."""
    sample = cache.sample(hookpoint, 40_960)
    mean = sample.mean(dim=0)
    axes = torch.linalg.svd((sample - mean).T @ (sample - mean))[2][:k]
    metrics = ReconstructionMetrics()
    for x in _images(cache, hookpoint, "held_out", sample.device):
        tokens = x.flatten(0, 1)
        metrics.update(tokens, (tokens - mean) @ axes.T @ axes + mean)
    return metrics.explained_variance


@torch.no_grad()
def mean_activation(sae: SAE, cache: Activations) -> Float[Tensor, "d_sae"]:
    """Mean value of each latent over the tokens on which it fires, of up to 2,048 training images; 0 if none."""
    total = torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.W_enc.device)
    count = torch.zeros_like(total)
    for x in _images(cache, sae.hookpoint, "train", sae.W_enc.device):
        indices, values = sae.encode_sparse(x.flatten(0, 1))
        fires = values > FIRES
        total.index_add_(0, indices[fires], values[fires].double())
        count.index_add_(0, indices[fires], torch.ones_like(values[fires]).double())
    return (total / count.clamp_min(1)).float()


def _images(
    cache: Activations, hookpoint: str, split: Split, device: torch.device
) -> Iterator[Float[Tensor, "image token d_in"]]:
    images = cache.images(split)
    if len(images) > MAX_IMAGES:
        images = images[np.linspace(0, len(images) - 1, MAX_IMAGES).astype(int)]
    for part in cache.parts(hookpoint, images):
        yield cache.read(hookpoint, part).flatten(1, 2).to(device, torch.float32)


def _interval(error: Tensor, sums: Tensor, squares: Tensor, tokens_per_image: int) -> tuple[float, float]:
    """Interval of 1 − Σerror / Σ‖x − mean‖², resampling images."""
    mean = sums.sum(0) / (len(sums) * tokens_per_image)
    total = squares - 2 * sums @ mean + tokens_per_image * mean.square().sum()
    return bootstrap_interval(torch.stack([error, total], dim=1).numpy(), lambda m: 1 - m[..., 0] / m[..., 1])

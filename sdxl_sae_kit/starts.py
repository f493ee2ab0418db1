"""What the data decide about an SAE before its first step: input statistics, b_dec, and where thresholds start."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.buffers import thinned
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import geometric_median
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.scaling import whitening_scale
from sdxl_sae_kit.sparse import largest

SAMPLE_TOKENS = 8192
"""As many are enough for a threshold, and to draw from when latents start anew."""

_MEDIAN_TOKENS = 32_768
_START_L0 = 64  # of a jumprelu that aims at no L0


@torch.no_grad()
def start(sae: SAE, x: Float[Tensor, "token d_in"]) -> None:
    """Set the SAE's input statistics and b_dec (paper §3), and thresholds that are learnt.

    Raises:
        KitError: the tokens are not finite.
    """
    if not x.isfinite().all():
        raise KitError(f"The first tokens that {sae.name} is to start from are not finite. Look for their cause.")
    if sae.config.normalize in ("channels", "whiten"):
        sae.input_mean.copy_(x.mean(dim=0))
    if sae.config.normalize == "whiten":
        sae.input_scale.copy_(whitening_scale(x))
    if sae.config.normalize == "channels":
        sae.input_scale.copy_(x.std(dim=0, correction=0).clamp_min(1e-6))
    if sae.config.normalize == "scale":
        sae.input_scale.fill_(x.square().mean().sqrt().clamp_min(1e-6).item())
    sae.b_dec.copy_(geometric_median(sae.normalised(thinned(x, _MEDIAN_TOKENS))))
    if sae.kind.threshold == "learnt":
        set_threshold(sae, x, sae.config.k or min(_START_L0, sae.d_sae // 4))


@torch.no_grad()
def set_threshold(sae: SAE, x: Float[Tensor, "token d_in"], l0: float) -> None:
    """Give all latents the one threshold that leaves `l0` of them active on each of these tokens, on average."""
    h = sae.pre_activations(thinned(x, SAMPLE_TOKENS))
    n = min(round(l0 * len(h)) + 1, h.numel())
    sae.threshold.fill_(largest(h, n)[-1].clamp_min(0).item())

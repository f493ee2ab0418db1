"""What the pictures of one prompt hold at one place of the U-Net at every step, and what some of it amounts to there.

A place is a hookpoint, or one layer of neurons. What it holds is dense, its update or neurons, or the codes that an SAE
makes of its update, which stay sparse: of real SDXL 256 tokens × 20 active features instead of 256 × 5,120 numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.sparse import active, combine

Mask = Float[Tensor, "item token 1"]
"""1 at each item's tokens that count, else 0."""
Chosen = Bool[Tensor, "item feature"]
Written = Float[Tensor, "item token width"]


@dataclass(frozen=True)
class Values:
    """Dense features, each its own coordinate of what the place holds: neurons, or the channels of an update."""

    steps: Sequence[Float[Tensor, "item token feature"]]
    """As they were recorded, on the CPU in the model's dtype."""
    device: torch.device

    @property
    def n_features(self) -> int:
        """How many there are."""
        return self.steps[0].shape[2]

    def means(self, mask: Mask) -> Float[Tensor, "item feature"]:
        """Mean magnitude of every feature over an item's tokens in the mask, at the first step; 0 where it has none."""
        return mean_under(self._at(0).abs(), mask)[:, 0]

    def written(self, step: int, chosen: Chosen) -> Written:
        """What each item's chosen features amount to at this step, as the place itself holds it, in float32."""
        return self._at(step) * chosen[:, None]

    def _at(self, step: int) -> Float[Tensor, "item token feature"]:
        return self.steps[step].to(self.device).float()


class Encoder:
    """One SAE as it encodes the updates of one pipeline: on its device, in float32, with its directions at hand.

    Raises:
        KitError: it normalises each token by itself, so its features have no direction that is the same for all tokens.
    """

    @torch.no_grad()
    def __init__(self, sae: SAE, device: torch.device) -> None:
        here = (sae.W_enc.device, sae.W_enc.dtype) == (device, torch.float32)
        self.sae = sae if here else copy.deepcopy(sae).to(device, torch.float32)
        self.directions = self.sae.directions.detach()
        self.lengths = self.directions.norm(dim=1).cpu().double()

    @torch.no_grad()
    def read(self, updates: Iterable[Float[Tensor, "item token d_in"]]) -> Codes:
        """The codes of a place's updates, step by step."""
        device = self.directions.device
        return Codes(self, [self.sae.encode_sparse(update.to(device).float()) for update in updates])


@dataclass(frozen=True)
class Codes:
    """Features of an SAE: which are active at each token and how strongly, (item, token, width) each."""

    encoder: Encoder
    steps: Sequence[tuple[Tensor, Tensor]]
    """Latents and their z, as `SAE.encode_sparse` gives them."""

    @property
    def n_features(self) -> int:
        """How many there are."""
        return self.encoder.sae.d_sae

    def means(self, mask: Mask) -> Float[Tensor, "item feature"]:
        """Mean length of what every feature writes over an item's tokens in the mask, at the first step; 0 if none.

        On the CPU in float64, where sums do not depend on the order in which a GPU's threads happen to come.
        """
        indices, values = (each.cpu().flatten(1) for each in (self.steps[0][0], self.steps[0][1] * mask))
        sums = torch.zeros(len(values), self.n_features, dtype=torch.float64)
        sums.scatter_add_(1, indices, values.double())
        means: Tensor = self.encoder.lengths * sums / mask.sum(dim=1).clamp_min(1).cpu()
        return means

    def written(self, step: int, chosen: Chosen) -> Written:
        """What each item's chosen features amount to at this step: only these are decoded."""
        indices, values = self.steps[step]
        kept = (chosen.gather(1, indices.flatten(1)) & (values.flatten(1) > 0)).flatten()
        entries = active(indices.flatten(0, 1), self.encoder.sae.d_sae).where(kept)
        return combine(entries, values.flatten()[kept], self.encoder.directions).view(*indices.shape[:2], -1)


Trace = Values | Codes
"""Features of a batch of items at one place, at every step."""


def mean_under(values: Written, mask: Mask) -> Float[Tensor, "item 1 width"]:
    """The mean over an item's tokens in the mask; 0 where it has none."""
    return (values * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)

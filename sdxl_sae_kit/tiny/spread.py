"""Keeps the updates of the default hookpoints from shouting in a few directions while the U-Net is trained.

What follows a block normalises its input, so nothing holds a direction back that the block once writes loudly: left to
itself, down.2.1 comes to say little but the layout, in two directions that hold nine tenths of its variance and are the
same at every token. Two penalties hold against that. With C the covariance of an update's tokens and C_w that of what
differs between the tokens of one image,

    participation ratio  PR = tr(C)² / tr(C²)        penalty −log PR      until PR reaches 12
    share within images  s  = tr(C_w) / tr(C)        penalty −log s       until s reaches 0.4

Noise has many directions too, and passing it on must not count: C and C_w are estimated from pairs of rows that share
caption and picture but not noise, E[(u − m)(u′ − m)ᵀ], in which what depends on the noise alone cancels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, resolve

ENOUGH_DIRECTIONS, ENOUGH_WITHIN = 12.0, 0.4
_MEMORY = 50
"""Steps over which moments are averaged: the pairs of one step are too few to tell a covariance."""


class Spread:
    """Moments of the updates of a U-Net in training, and the penalty that they ask for.

    Its `state` goes into checkpoints; with several processes every one has the same.
    """

    def __init__(self, unet: Any, processes: int = 1) -> None:
        self.processes = processes
        self._updates: dict[str, Tensor] = {}
        points = [resolve(unet, name) for name in DEFAULT_HOOKPOINTS]
        for point in points:
            unet.get_submodule(point.path).proj_out.register_forward_hook(self._reader(point.name))
        n, d_in = len(points), points[0].d_in
        self.state = {
            "seen": torch.zeros((), device=unet.device),
            "mean": torch.zeros(n, d_in, device=unet.device),
            "covariance": torch.zeros(n, d_in, d_in, device=unet.device),
            "within": torch.zeros(n, device=unet.device),
        }

    def _reader(self, name: str) -> Any:
        def read(_module: Any, _inputs: Any, output: Tensor) -> None:
            self._updates[name] = output

        return read

    @property
    def directions(self) -> Float[Tensor, " hookpoint"]:
        """The participation ratio of what captions cause, at each hookpoint."""
        covariance = self.state["covariance"]
        return _trace(covariance).square() / covariance.square().sum((1, 2)).clamp_min(1e-12)

    @property
    def within(self) -> Float[Tensor, " hookpoint"]:
        """The share of that variance which lies within images."""
        return self.state["within"] / _trace(self.state["covariance"]).clamp_min(1e-12)

    def facts(self) -> dict[str, list[float]]:
        """Both, for a log."""
        both = {"directions": self.directions, "within": self.within}
        return {name: [round(value, 3) for value in values.tolist()] for name, values in both.items()}

    def penalty(self, pairs: int) -> Float[Tensor, ""]:
        """What the last forward pass owes; its first 2 · `pairs` rows are pairs that differ in noise only.

        Its gradient is that of the two penalties at the averaged moments; its value means nothing.
        """
        updates = torch.stack([self._updates[name] for name in DEFAULT_HOOKPOINTS])[:, : 2 * pairs]
        self.state["seen"] += 1
        self._remember("mean", updates.mean((1, 2)))
        covariance, within = self._moments(updates.unflatten(1, (pairs, 2)))
        self._remember("covariance", covariance)
        self._remember("within", within)
        if self.state["seen"] < _MEMORY:
            return updates.new_zeros(())
        c = self.state["covariance"]
        # Where nearly all is noise, what captions cause may come out as nothing or less.
        least = 0.01 * (updates.detach() - self.state["mean"][:, None, None]).square().sum(3).mean((1, 2))
        trace = _trace(c).maximum(least)
        square = c.square().sum((1, 2)).maximum(least.square() / c.shape[1])
        loud = 2 * (c * covariance).sum((1, 2)) / square - 2 * _trace(covariance) / trace
        flat = _trace(covariance) / trace - within / self.state["within"].maximum(0.01 * trace)
        return (loud * (self.directions < ENOUGH_DIRECTIONS) + flat * (self.within < ENOUGH_WITHIN)).mean()

    def _moments(
        self, updates: Float[Tensor, "hookpoint pair 2 token d_in"]
    ) -> tuple[Float[Tensor, "hookpoint d_in d_in"], Float[Tensor, " hookpoint"]]:
        centred = updates - self.state["mean"][:, None, None, None]
        first, second = centred[:, :, 0].flatten(1, 2), centred[:, :, 1].flatten(1, 2)
        product = first.mT @ second / first.shape[1]
        differing = updates - updates.mean(3, keepdim=True)
        within = (differing[:, :, 0] * differing[:, :, 1]).sum(-1).mean((1, 2))
        return (product + product.mT) / 2, within

    @torch.no_grad()
    def _remember(self, name: str, moment: Tensor) -> None:
        shared = moment.detach().clone()
        if self.processes > 1:
            dist.all_reduce(shared)
            shared /= self.processes
        self.state[name].lerp_(shared, max(1 / self.state["seen"].item(), 1 / _MEMORY))


def _trace(matrices: Float[Tensor, "hookpoint d_in d_in"]) -> Float[Tensor, " hookpoint"]:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)

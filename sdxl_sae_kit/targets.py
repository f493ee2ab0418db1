"""Targets: scalars of a picture that gradients can be taken of, and effects measured in."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.files import hash_file, sha256
from sdxl_sae_kit.tiny import WEIGHTS
from sdxl_sae_kit.tiny.judge import FILE, Judge, load_judge
from sdxl_sae_kit.tiny.world import FACTORS, SIZE


@runtime_checkable
class Target(Protocol):
    """A number for each picture, of which torch can take the gradient."""

    @property
    def name(self) -> str:
        """What it is, with all that decides it: what results are kept under."""

    def __call__(self, pictures: Float[Tensor, "image 3 y x"]) -> Float[Tensor, " image"]:
        """The number of each picture; colours are 0 to 1."""


@dataclass(frozen=True)
class FactorScore:
    """The embedded judge's log-odds, in nats, that a picture shows a value of a factor: ln(p / (1 − p)).

    Where p is near 1 the logarithm of p itself has no slope left to tell latents apart by; that of the odds has.

    For pictures of the embedded model, which have 64 × 64 pixels.

    Raises:
        KitError: no such factor or value.

    >>> FactorScore("colour", "red").name.partition(",")[0]
    'log-odds of colour = red'
    """

    factor: str
    value: str

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("factor", self.factor, FACTORS),
            (f"value of {self.factor}", self.value, FACTORS.get(self.factor, ())),
        ):
            if name not in known:
                raise KitError(
                    f"FactorScore: there is no {kind} {name!r}; there are {', '.join(known)}."
                    f"{did_you_mean(str(name), known)}"
                )

    @property
    def name(self) -> str:
        """Factor, value and which judge."""
        return f"log-odds of {self.factor} = {self.value}, world judge {hash_file(WEIGHTS / 'judge' / FILE)[:8]}"

    def __call__(self, pictures: Float[Tensor, "image 3 y x"]) -> Float[Tensor, " image"]:
        """ln(p / (1 − p)) of each picture, whose colours are 0 to 1.

        Raises:
            KitError: pictures of another size.
        """
        if pictures.shape[2:] != (SIZE, SIZE):
            raise KitError(
                f"FactorScore reads pictures of {SIZE}×{SIZE} pixels, not {pictures.shape[3]}×{pictures.shape[2]}. "
                "Take RegionColour, or a function of your own."
            )
        logits = _judge(pictures.device).logits(pictures.float())[self.factor]
        at = FACTORS[self.factor].index(self.value)
        others = torch.cat([logits[:, :at], logits[:, at + 1 :]], dim=1)
        return logits[:, at] - others.logsumexp(1)


@dataclass(frozen=True)
class RegionColour:
    """How far a region's mean colour goes along a given one: mean over its pixels of ⟨colour, direction⟩.

    The direction is made of length 1: (1, 0, 0) reads red, (1, 1, 1) brightness, (1, -0.5, -0.5) red against the rest.

    Raises:
        KitError: a direction or region that cannot be read.

    >>> RegionColour((1, 0, 0)).name
    'colour along (1, 0, 0), whole picture'
    """

    direction: tuple[float, float, float]
    """Red, green, blue; any numbers, not all 0."""
    where: ArrayLike | None = field(default=None, repr=False)
    """2-D mask of any size, in proportion: it is fitted to the picture by area. By default the whole picture."""

    def __post_init__(self) -> None:
        direction = np.asarray(self.direction, dtype=np.float64)
        if direction.shape != (3,) or not np.isfinite(direction).all() or not direction.any():
            raise KitError(f"RegionColour: the direction is red, green, blue, not all 0, not {self.direction!r}.")
        if self.where is not None and (
            self._mask.ndim != 2
            or not np.isfinite(self._mask).all()
            or not (self._mask >= 0).all()
            or not self._mask.any()
        ):
            raise KitError("RegionColour: where must be a 2-D mask of finite numbers from 0 on, and not all 0.")

    @property
    def _mask(self) -> Float[np.ndarray, "*size"]:
        return np.asarray(self.where, dtype=np.float32)

    @property
    def name(self) -> str:
        """Direction and region."""
        direction = ", ".join(f"{part:g}" for part in self.direction)
        region = "whole picture"
        if self.where is not None:
            digest = sha256(np.ascontiguousarray(self._mask).tobytes())[:8]
            region = (
                f"{self._mask.mean():.0%} of the picture (mask {self._mask.shape[0]}×{self._mask.shape[1]} {digest})"
            )
        return f"colour along ({direction}), {region}"

    def __call__(self, pictures: Float[Tensor, "image 3 y x"]) -> Float[Tensor, " image"]:
        """The mean of each picture, −√3 to √3; colours are 0 to 1."""
        direction = F.normalize(torch.tensor(self.direction, dtype=torch.float32, device=pictures.device), dim=0)
        along = torch.einsum("icyx,c->iyx", pictures.float(), direction)
        if self.where is None:
            return along.mean((1, 2))
        mask = torch.from_numpy(self._mask).to(pictures.device)[None, None]
        weights = F.interpolate(mask, size=along.shape[1:], mode="area")[0, 0]
        return (along * weights).sum((1, 2)) / weights.sum()


@lru_cache(maxsize=1)
def _judge(device: torch.device) -> Judge:
    return load_judge().to(device)

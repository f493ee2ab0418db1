"""What makes a latent a feature: the images on which it fires, its values, and the latents near it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

Ranking = Literal["max", "mean", "area"]
"""Images are ranked by a latent's maximum, its mean, or the share of tokens on which it fires."""


@dataclass(frozen=True)
class Example:
    """One image on which a latent fires."""

    image: int
    """Index in the cache."""
    prompt: str
    seed: int
    value: float
    """What it was ranked by: the maximum over the image, the mean, or the share of tokens."""
    heat_map: Float[np.ndarray, "height width"] = field(repr=False)
    """The latent's value at every token."""
    thumbnail: bytes = field(repr=False)
    """The image, small, as WebP; empty where pictures were not kept."""


class Curve(NamedTuple):
    """What every latent does at one denoising step in one guidance half."""

    step: int
    half: str
    density: Float[np.ndarray, " latent"]
    """Share of tokens on which it fires."""
    mean: Float[np.ndarray, " latent"]
    """Mean value over those."""


class Histogram(NamedTuple):
    """How many firing tokens have a value between two edges, for every latent."""

    edges: Float[np.ndarray, " bins_and_1"]
    counts: Int[np.ndarray, "latent bin"]


class Neighbour(NamedTuple):
    """Another latent, how near it is, and, where that is an estimate, over how many tokens."""

    latent: int
    value: float
    n: int | None = None

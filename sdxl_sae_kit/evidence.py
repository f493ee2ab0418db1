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
    """Of its noise."""
    value: float
    """What it was ranked by: the maximum of z over the image, the mean over all its tokens, or the share of tokens on
    which it fires (0 to 1)."""
    heat_map: Float[np.ndarray, "height width"] = field(repr=False)
    """The latent's z at every token, from 0."""
    thumbnail: bytes = field(repr=False)
    """The image as WebP of at most 160 pixels; empty where pictures were not kept."""


class Curve(NamedTuple):
    """What every latent does at one denoising step in one guidance half."""

    step: int
    """From 0."""
    half: str
    """"cond" or "uncond"."""
    density: Float[np.ndarray, " latent"]
    """Share of tokens on which it fires, 0 to 1."""
    mean: Float[np.ndarray, " latent"]
    """Mean z over those; 0 where there are none."""


class Histogram(NamedTuple):
    """How many firing tokens have a value between two edges, for every latent."""

    edges: Float[np.ndarray, " bins_and_1"]
    """Values of z, from 0.001 on, each √2 times the one before; the last bin takes what is larger too."""
    counts: Int[np.ndarray, "latent bin"]
    """Tokens."""


class Neighbour(NamedTuple):
    """Another latent, how near it is, and, where that is an estimate, over how many tokens."""

    latent: int
    value: float
    """Tokens on which both fire per token on which either does (Jaccard, 0 to 1), or the rows' cosine (−1 to 1)."""
    n: int | None = None
    """Tokens counted; None for a cosine, which is no estimate."""

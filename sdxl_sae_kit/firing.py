"""Where latents fire: sums over the entries of sparse codes, exact and without writing the zeros out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, Integer, Shaped
from numpy.typing import NDArray
from scipy.stats import t as student

from sdxl_sae_kit.sae import FIRES

EDGES: NDArray[np.float64] = FIRES * 2.0 ** (np.arange(41) / 2)
"""Bounds of a histogram's 40 bins: two for each doubling, from 0.001 to 1,048; the last takes what is larger too."""


@dataclass(frozen=True)
class Firing:
    """One entry for each image, latent and token whose `value` z > 0.001, by image, then latent, then token."""

    image: Int[np.ndarray, " entry"]
    latent: Int[np.ndarray, " entry"]
    token: Int[np.ndarray, " entry"]
    value: Float[np.ndarray, " entry"]
    grid: tuple[int, int]
    d_sae: int

    @classmethod
    def of(
        cls,
        indices: Integer[np.ndarray, "image token width"],
        values: Float[np.ndarray, "image token width"],
        grid: tuple[int, int],
        d_sae: int,
    ) -> Firing:
        """The entries of codes as `SAE.encode_sparse` gives them."""
        image, token, slot = np.nonzero(values > FIRES)
        latent = indices[image, token, slot].astype(np.int64)
        order = np.lexsort((token, latent, image))
        value = values[image, token, slot].astype(np.float64)
        return cls(image[order], latent[order], token[order], value[order], grid, d_sae)

    def __len__(self) -> int:
        return len(self.value)

    @cached_property
    def _key(self) -> Int[np.ndarray, " entry"]:
        tokens = self.grid[0] * self.grid[1]
        return np.asarray((self.image * self.d_sae + self.latent) * tokens + self.token)

    def by_image(self) -> Tally:
        """What each latent does on each image on which it fires."""
        tokens = self.grid[0] * self.grid[1]
        starts = np.flatnonzero(np.diff(self._key // tokens, prepend=-1))
        sums = np.add.reduceat(self.value, starts)
        return Tally(
            self.image[starts],
            self.latent[starts],
            np.maximum.reduceat(self.value, starts),
            sums / tokens,
            np.diff(starts, append=len(self)),
            self._moran(starts, sums),
        )

    def _moran(self, starts: Int[np.ndarray, " pair"], sums: Float[np.ndarray, " pair"]) -> NDArray[np.float64]:
        """Moran's I of each heat map with z_i z_j summed over edges, Σ(z_i − m)(z_j − m) being written out."""
        height, width = self.grid
        tokens, edges = height * width, height * (width - 1) + (height - 1) * width
        y, x = np.divmod(self.token, width)
        degree = (x > 0) * 1 + (x < width - 1) + (y > 0) + (y < height - 1)
        products = np.zeros(len(self))
        for offset, inside in ((1, x < width - 1), (width, y < height - 1)):
            place = np.minimum(np.searchsorted(self._key, self._key + offset), len(self) - 1)
            adjacent = inside & (self._key[place] == self._key + offset)
            products += np.where(adjacent, self.value * self.value[place], 0)
        mean = sums / tokens
        shared = np.add.reduceat(products, starts) - mean * np.add.reduceat(degree * self.value, starts)
        spread = np.add.reduceat(self.value**2, starts) - tokens * mean**2
        varies = spread > 1e-9 * np.add.reduceat(self.value**2, starts)
        moran = np.full(len(starts), np.nan)
        np.divide(tokens * (shared + edges * mean**2), max(edges, 1) * spread, out=moran, where=varies & (edges > 0))
        return moran

    def histogram(self) -> Int[np.ndarray, "latent bin"]:
        """How many entries of each latent fall between `EDGES`."""
        bins = len(EDGES) - 1
        at = np.clip(np.searchsorted(EDGES, self.value, side="right") - 1, 0, bins - 1)
        counts = np.bincount(self.latent * bins + at, minlength=self.d_sae * bins)
        return counts.reshape(self.d_sae, bins)


@dataclass(frozen=True)
class Tally:
    """One entry for each image and latent that fires on it.

    Attributes:
        max, mean: of z over the image's tokens.
        area: number of tokens on which it fires.
        moran: Moran's I of the heat map, (N / E) Σ_edges (z_i − m)(z_j − m) / Σ_i (z_i − m)², over the E pairs of
            tokens that touch at a side, m the mean of all N tokens (Moran 1950, weights 1 and 0). Without spatial order
            it is −1 / (N − 1) on average; NaN where z is the same everywhere.
    """

    image: Int[np.ndarray, " pair"]
    latent: Int[np.ndarray, " pair"]
    max: Float[np.ndarray, " pair"]
    mean: Float[np.ndarray, " pair"]
    area: Int[np.ndarray, " pair"]
    moran: Float[np.ndarray, " pair"]


@dataclass
class Moments:
    """Number, mean and summed squared deviation of each latent's values, merged without loss (Chan et al. 1979)."""

    n: Float[np.ndarray, " latent"]
    """Counts, from 0."""
    mean: Float[np.ndarray, " latent"]
    squares: Float[np.ndarray, " latent"]
    """Σ(value − mean)²."""

    @classmethod
    def of(cls, latent: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], d_sae: int) -> Moments:
        """Those of these values."""
        n = total(latent, np.ones(len(latent)), d_sae)
        mean = total(latent, value, d_sae) / np.maximum(n, 1)
        return cls(n, mean, total(latent, (value - mean[latent]) ** 2, d_sae))

    def merged(self, other: Moments) -> Moments:
        """Those of both sets of values."""
        n, apart = self.n + other.n, other.mean - self.mean
        share = other.n / np.maximum(n, 1)
        return Moments(n, self.mean + apart * share, self.squares + other.squares + apart**2 * self.n * share)

    @property
    def std(self) -> Float[np.ndarray, " latent"]:
        """Standard deviation, √(Σ(v − mean)² / n); 0 where there is none."""
        return np.asarray(np.sqrt(self.squares / np.maximum(self.n, 1)))

    def interval(self, level: float = 0.95) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
        """Student's interval of the mean, mean ± t s / √n, the values taken as independent; NaN for fewer than two."""
        free = np.maximum(self.n - 1, 1)
        half = student.ppf((1 + level) / 2, free) * np.sqrt(self.squares / free / np.maximum(self.n, 1))
        half = np.where(self.n > 1, half, np.nan)
        return self.mean - half, self.mean + half


def total(
    latent: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], d_sae: int
) -> Float[np.ndarray, " latent"]:
    """The sum of each latent's values."""
    return np.bincount(latent, value, minlength=d_sae).astype(np.float64)  # of nothing, NumPy counts in integers


def group_ranks(*keys: Shaped[np.ndarray, " entry"]) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
    """Order of entries by their keys, the first foremost, and each one's place among those of its first key."""
    order = np.lexsort(keys[::-1])
    first = keys[0][order]
    starts = np.flatnonzero(np.diff(first, prepend=first[:1] - 1))
    return order, np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))

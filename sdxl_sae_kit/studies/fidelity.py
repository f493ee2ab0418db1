"""How faithful reconstructions and codes are, image by image and row by row: sums from which every number is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.sae import FIRES, SAE

METRICS = (
    "explained variance",
    "explained variance per channel",
    "relative error",
    "relative norm",
    "L0",
    "cosine of adjacent steps",
    "IoU of adjacent steps",
    "cosine with the source",
    "IoU with the source",
)
"""What is measured; each is a ratio of two sums over images."""

_BYTES, _SAMPLE = 16 * 2**20, 40_960


@dataclass(frozen=True)
class Axes:
    """Reconstruction by the first k principal axes of tokens, from their mean."""

    mean: Float[Tensor, "d_in"]
    axes: Float[Tensor, "axis d_in"]

    @classmethod
    def of(cls, cache: Activations, hookpoint: str, k: int) -> Axes:
        """Those of 40,960 training tokens of a cache, of all its rows together."""
        tokens = cache.sample(hookpoint, _SAMPLE)
        mean = tokens.mean(dim=0)
        axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))[1].T.flip(0)
        return cls(mean, axes[:k])

    def __call__(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_in"]:
        """x̂."""
        mean, axes = self.mean.to(x), self.axes.to(x)
        x_hat: Tensor = (x - mean) @ axes.T @ axes + mean
        return x_hat


@dataclass(frozen=True)
class Beside:
    """Where else the same images are: another cache of the same grid, one of its rows, their places or −1."""

    cache: Activations
    row: int
    places: Int[np.ndarray, "image"]

    def read(self, hookpoint: str, part: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Which images of a part are there, and the updates of these."""
        places = self.places[part]
        there = places >= 0
        x = self.cache.read(hookpoint, places[there])[:, self.row]
        return torch.from_numpy(there).to(like.device), x.to(like)


@dataclass(frozen=True)
class Measured:
    """What one SAE, or axes, make of some images; rows are those of their cache."""

    sums: Float[np.ndarray, "image row metric 2"]
    """Numerator and denominator of each of `METRICS`, to be summed over images; 0 and 0 where it is not defined."""
    fired: Int[np.ndarray, "image row latent"]
    """On how many tokens each latent fires; no latents for axes."""
    total: Float[np.ndarray, "image row latent"]
    """Sum of z over tokens."""
    peak: Float[np.ndarray, "image row latent"]
    """Maximum of z over tokens."""


@torch.no_grad()
def measure(
    made: Mapping[str, SAE | Axes],
    cache: Activations,
    hookpoint: str,
    images: Int[np.ndarray, " image"],
    beside: Beside | None = None,
) -> dict[str, Measured]:
    """What each of these, by name, makes of the updates of some images, in one pass over them.

    Row by row of the cache, over the tokens of these images:

    - explained variance: 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², where mean is that of all of them; the parts that images have
      in it take the mean as given, as the interval of `evaluate` does;
    - explained variance per channel: mean over channels of 1 − Var(x_c − x̂_c) / Var(x_c); the parts that images have
      in it are those of its linearisation around all of them;
    - relative error, relative norm: mean over tokens of ‖x − x̂‖ / ‖x‖ and of ‖x̂‖ / ‖x‖;
    - L0: mean number of latents per token that fire;
    - cosine and IoU of codes: mean over tokens of z·z′ / ‖z‖‖z′‖ and of |A ∩ A′| / |A ∪ A′| (Jaccard), A being the
      latents that fire, 0 where a code is empty; z′ is the code of the same token, image and guidance half at the step
      kept before, or of the same token and image in the other cache.
    """
    n_tokens, d_in = cache.tokens_per_row(hookpoint), cache.d_in(hookpoint)
    width = max([d_in, *(each.d_sae for each in made.values() if isinstance(each, SAE))])
    device = next((each.W_enc.device for each in made.values() if isinstance(each, SAE)), torch.device("cpu"))
    size = max(1, _BYTES // (4 * cache.rows_per_image * n_tokens * width))
    spread, found = _Spread(n_tokens), {name: _Found(n_tokens) for name in made}
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        x = cache.read(hookpoint, images[part]).float().to(device)
        other = beside.read(hookpoint, part, x) if beside else None
        spread.add(x)
        for name, each in made.items():
            found[name].add(each, x, other, len(cache.layout.halves))
    return {name: each.measured(spread) for name, each in found.items()}


class _Spread:
    """Sums over the tokens of each image and row, channel by channel, in float64."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, x: Float[Tensor, "image row token d_in"]) -> None:
        self._sums.append(x.double().sum(2).cpu())
        self._squares.append(x.double().square().sum(2).cpu())

    def squares(self) -> Float[np.ndarray, "image row d_in"]:
        """Σ x²."""
        return torch.cat(self._squares).numpy()

    def around_mean(self) -> Float[np.ndarray, "image row d_in"]:
        """Σ (x − mean)², the mean being that over all images' tokens at that row."""
        sums = torch.cat(self._sums)
        mean = sums.mean(0) / self.n_tokens
        around: NDArray[np.float64] = (
            torch.cat(self._squares) - 2 * sums * mean + self.n_tokens * mean.square()
        ).numpy()
        return around


class _Found:
    """What one SAE or axes make of images, added part by part."""

    def __init__(self, n_tokens: int) -> None:
        self._error = _Spread(n_tokens)
        self._means: list[Tensor] = []  # of the metrics after the first two
        self._codes: dict[str, list[Tensor]] = {"fired": [], "total": [], "peak": []}

    def add(self, made: SAE | Axes, x: Tensor, other: tuple[Tensor, Tensor] | None, halves: int) -> None:
        empty = x.new_zeros(*x.shape[:3], 0)
        z, x_hat = _coded(made, x) if isinstance(made, SAE) else (empty, made(x))
        fires = _fires(z)
        self._error.add(x - x_hat)
        norm = x.norm(dim=-1).clamp_min(1e-30)
        means = [(x - x_hat).norm(dim=-1) / norm, x_hat.norm(dim=-1) / norm]
        unknown = torch.full_like(norm, torch.nan)
        if isinstance(made, SAE):
            before, source = unknown.unflatten(1, (-1, halves)).repeat(2, 1, 1, 1, 1), unknown.repeat(2, 1, 1, 1)
            steps, fired = (each.unflatten(1, (-1, halves)) for each in (z, fires))
            before[:, :, 1:] = torch.stack(likeness(steps[:, 1:], steps[:, :-1], fired[:, 1:], fired[:, :-1]))
            if other and len(other[1]):
                there, same = other
                known = _coded(made, same)[0][:, None]
                source[:, there] = torch.stack(likeness(z[there], known, fires[there], _fires(known)))
            means += [fires.sum(-1), *before.flatten(2, 3), *source]
        else:
            means += [torch.full_like(norm, len(made.axes)), *[unknown] * 4]
        self._means.append(torch.stack(means, dim=-1).double().mean(2).cpu())
        for name, kept in (("fired", fires.sum(2)), ("total", z.sum(2)), ("peak", z.amax(2))):
            self._codes[name].append(kept.cpu())

    def measured(self, spread: _Spread) -> Measured:
        means = torch.cat(self._means).numpy()
        known = np.isfinite(means)
        others = np.stack([np.where(known, means, 0), known], axis=-1)
        error, around = self._error.squares().sum(-1), spread.around_mean()
        first = np.stack([around.sum(-1) - error, around.sum(-1)], axis=-1)
        second = _per_channel(self._error.around_mean(), around)
        sums = np.concatenate([first[:, :, None], second[:, :, None], others], axis=2)
        fired, total, peak = (torch.cat(self._codes[name]).numpy() for name in ("fired", "total", "peak"))
        return Measured(sums, fired.astype(np.int32), total, peak)


def likeness(
    one: Float[Tensor, "*token d_sae"],
    other: Float[Tensor, "*token2 d_sae"],
    fires: Float[Tensor, "*token d_sae"],
    fires_too: Float[Tensor, "*token2 d_sae"],
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token"]]:
    """Cosine and IoU (Jaccard) of codes: z·z′ / ‖z‖‖z′‖, and |A ∩ A′| / |A ∪ A′| of the latents that fire.

    Of two codes and of where their latents fire; 0 where either is empty.
    """
    cosine = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1)).clamp_min(1e-30)
    both = (fires * fires_too).sum(-1)
    return cosine, both / (fires.sum(-1) + fires_too.sum(-1) - both).clamp_min(1)


def _fires(z: Float[Tensor, "*token d_sae"]) -> Float[Tensor, "*token d_sae"]:
    """1 where a latent fires, else 0: sums of floats are ten times quicker than those of booleans."""
    return (z > FIRES).to(z)


def _coded(sae: SAE, x: Float[Tensor, "*token d_in"]) -> tuple[Float[Tensor, "*token d_sae"], Tensor]:
    """z and x̂."""
    indices, values = sae.encode_sparse(x)
    z = values.new_zeros(*x.shape[:-1], sae.d_sae).scatter_add_(-1, indices, values)
    return z, sae.decode_sparse(indices, values, x)


def _per_channel(
    error: Float[np.ndarray, "image row d_in"], around: Float[np.ndarray, "image row d_in"]
) -> Float[np.ndarray, "image row 2"]:
    """Each image's part in the mean over channels of 1 − Var(x_c − x̂_c) / Var(x_c), and 1.

    With a and v the images' sums of squares of error and update around their means, and A and V those over all images,
    the formula is 1 − mean(A / V); its derivative gives image i of n the value of it − n · mean(aᵢ / V − A vᵢ / V²).
    """
    a, v = error.sum(0), around.sum(0)
    varies = v > 0
    v = np.where(varies, v, 1)
    parts = np.where(varies, error / v - a * around / v**2, 0).sum(-1) / varies.sum(-1)
    value = 1 - np.where(varies, a / v, 0).sum(-1) / varies.sum(-1)
    return np.stack([value - len(error) * parts, np.ones_like(parts)], axis=-1)


def by_prompt(values: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Sums over the images of each prompt, in order of first appearance: the clusters of a bootstrap."""
    names = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    sums = np.zeros((len(names), *values.shape[1:]), values.dtype)
    np.add.at(sums, [names[text] for text in texts], values)
    return sums

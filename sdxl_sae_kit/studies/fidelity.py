"""How faithful reconstructions and codes are, image by image and row by row: sums from which every number is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    "cosine with another image",
    "IoU with another image",
)
"""What is measured; each is a ratio of two sums over images."""

_BYTES, _SAMPLE = 16 * 2**20, 40_960


@dataclass(frozen=True)
class Axes:
    """Reconstruction by the first k principal axes of tokens, from their mean."""

    mean: Float[Tensor, "d_in"]
    axes: Float[Tensor, "axis d_in"]

    @classmethod
    def of(cls, cache: Activations, hookpoint: str) -> Axes:
        """All those of 40,960 training tokens of a cache, of all its rows together."""
        tokens = cache.sample(hookpoint, _SAMPLE)
        mean = tokens.mean(dim=0)
        axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))[1].T.flip(0)
        return cls(mean, axes)

    def first(self, k: int) -> Axes:
        """The first k."""
        return Axes(self.mean, self.axes[:k])

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

    def read(self, hookpoint: str, part: slice, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Which images of a part are there; the updates of these, and those of the next image that is there."""
        there, following = self.places >= 0, self.places.copy()
        following[there] = np.roll(self.places[there], -1)
        known = [self.cache.read(hookpoint, at[part][there[part]])[:, self.row] for at in (self.places, following)]
        return torch.from_numpy(there[part]).to(like.device), [x.to(like) for x in known]


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
      kept before, or in the other cache of the same token of the same image or, to compare with, of another one.
    """
    n_tokens, d_in = cache.tokens_per_row(hookpoint), cache.d_in(hookpoint)
    width = max([d_in, *(each.d_sae for each in made.values() if isinstance(each, SAE))])
    device = next((each.W_enc.device for each in made.values() if isinstance(each, SAE)), torch.device("cpu"))
    size = max(1, _BYTES // (4 * n_tokens * max(width, cache.rows_per_image * d_in)))
    spread, found = _Spread(n_tokens), {name: _Found(each, n_tokens) for name, each in made.items()}
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        x = cache.read(hookpoint, images[part]).float().to(device)
        other = beside.read(hookpoint, part, x) if beside else None
        spread.add(torch.stack([_moments(tokens) for tokens in x.unbind(1)], dim=2))
        for each in found.values():
            each.add(x, other, len(cache.layout.halves))
    return {name: each.measured(spread) for name, each in found.items()}


class _Spread:
    """Sums over the tokens of each image and row, channel by channel, in float64."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, moments: Float[Tensor, "2 image row d_in"]) -> None:
        self._sums.append(moments[0].cpu())
        self._squares.append(moments[1].cpu())

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
    """What one SAE or axes make of images, added part by part, each row by row so that few dense codes are alive."""

    def __init__(self, made: SAE | Axes, n_tokens: int) -> None:
        self._made, self._error = made, _Spread(n_tokens)
        self._means: list[Tensor] = []  # of the metrics after the first two
        self._codes: list[Tensor] = []

    def add(self, x: Tensor, other: tuple[Tensor, list[Tensor]] | None, halves: int) -> None:
        there, updates = other or (None, [])
        known: list[Code | None] = [None, None]  # of the same images there, and of others
        if isinstance(self._made, SAE) and updates and len(updates[0]):
            known = [Code(self._made, each) for each in updates]
        before = deque[Code](maxlen=halves)
        errors, means, codes = list[Tensor](), list[Tensor](), list[Tensor]()
        for tokens in x.unbind(1):
            if isinstance(self._made, SAE):
                code = Code(self._made, tokens)
                x_hat, n_active = self._made.decode_sparse(code.indices, code.values, tokens), code.fires.sum(-1)
                alike = [*_alike(code, before[0] if len(before) == halves else None)]
                for each in known:
                    alike += _alike(code, each, there)
                before.append(code)
                codes.append(code.per_image())
            else:
                x_hat, n_active = self._made(tokens), tokens.new_full(tokens.shape[:2], len(self._made.axes))
                alike = [tokens.new_full(tokens.shape[:2], torch.nan)] * 6
                codes.append(tokens.new_zeros(3, len(tokens), 0))
            norm, error = tokens.norm(dim=-1).clamp_min(1e-30), tokens - x_hat
            told = [error.norm(dim=-1) / norm, x_hat.norm(dim=-1) / norm, n_active, *alike]
            means.append(torch.stack(told, dim=-1).double().mean(1))
            errors.append(_moments(error))
        self._error.add(torch.stack(errors, dim=2))
        self._means.append(torch.stack(means, dim=1).cpu())
        self._codes.append(torch.stack(codes, dim=2).cpu())

    def measured(self, spread: _Spread) -> Measured:
        means = torch.cat(self._means).numpy()
        known = np.isfinite(means)
        others = np.stack([np.where(known, means, 0), known], axis=-1)
        error, around = self._error.squares().sum(-1), spread.around_mean()
        first = np.stack([around.sum(-1) - error, around.sum(-1)], axis=-1)
        second = _per_channel(self._error.around_mean(), around)
        sums = np.concatenate([first[:, :, None], second[:, :, None], others], axis=2)
        fired, total, peak = torch.cat(self._codes, dim=1).numpy()
        return Measured(sums, fired.astype(np.int32), total, peak)


class Code:
    """The codes of some tokens: the entries of each, and whether its latents fire."""

    def __init__(self, sae: SAE, x: Float[Tensor, "*token d_in"]) -> None:
        self.d_sae, (self.indices, self.values) = sae.d_sae, sae.encode_sparse(x)
        self.fires = self.values > FIRES

    @cached_property
    def dense(self) -> Float[Tensor, "*token d_sae"]:
        """z with its zeros."""
        return self.values.new_zeros(*self.values.shape[:-1], self.d_sae).scatter_add_(-1, self.indices, self.values)

    def per_image(self) -> Float[Tensor, "3 image d_sae"]:
        """On how many tokens each latent fires, the sum and the maximum of z over tokens."""
        fired = self.values.new_zeros(len(self.values), self.d_sae)
        fired.scatter_add_(1, self.indices.flatten(1), self.fires.to(fired).flatten(1))
        return torch.stack([fired, self.dense.sum(1), self.dense.amax(1)])

    def likeness(
        self, other: Code, there: Tensor | slice = slice(None)
    ) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token"]]:
        """Cosine and IoU (Jaccard), z·z′ / ‖z‖‖z′‖ and |A ∩ A′| / |A ∪ A′| of the latents that fire, with another's.

        Of the images that are `there`; 0 where either code is empty. Sums run over the entries alone.
        """
        values, fires = self.values[there], self.fires[there]
        same = other.dense.gather(-1, self.indices[there])
        norms = values.norm(dim=-1) * other.values.norm(dim=-1)
        both = (fires & (same > FIRES)).sum(-1)
        either = fires.sum(-1) + other.fires.sum(-1) - both
        return (values * same).sum(-1) / norms.clamp_min(1e-30), both / either.clamp_min(1)


def _alike(code: Code, other: Code | None, there: Tensor | None = None) -> Float[Tensor, "2 image token"]:
    """The likeness of images that are there; NaN where they are not."""
    alike = code.values.new_full((2, *code.values.shape[:2]), torch.nan)
    if other is not None:
        at = slice(None) if there is None else there
        alike[:, at] = torch.stack(code.likeness(other, at))
    return alike


def _moments(x: Float[Tensor, "image token d_in"]) -> Float[Tensor, "2 image d_in"]:
    """Σ x and Σ x² over tokens, in float64."""
    return torch.stack([x.double().sum(1), x.double().square().sum(1)])


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

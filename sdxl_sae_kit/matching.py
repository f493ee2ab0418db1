"""Which latent of one SAE is which of another: partners one to one, by decoder rows and by codes, beside controls.

Two SAEs may differ in seed, k, width, block or model. Their latents are matched so that the sum of similarities is the
greatest (Hungarian method), in up to two bases that know nothing of each other:

    decoder   cosine of what one unit of each latent adds to an update       says: they write the same
    codes     Pearson correlation of z over all tokens of the same images    says: they fire at the same places

What matching finds where there is nothing to find is measured too, in the same way: see `match`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sdxl_sae_kit.amounts import counted, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.matched import Basis, Compared, Matches, Matching
from sdxl_sae_kit.metrics import cosines, shuffled_rows
from sdxl_sae_kit.sae import SAE


@checked
def match(
    one: SAE,
    other: SAE,
    cache: ActivationCache | None = None,
    other_cache: ActivationCache | None = None,
    *,
    step: int = 0,
    n_images: int = 512,
) -> Matching:
    """Find which latents of two SAEs are the same, one to one, by their decoder rows and by their codes.

    Alive latents (mean_activation > 0) are matched so that the sum of similarities is the greatest. By decoder, where
    both read tokens of one width: the cosine of `directions`. By codes, where a cache is given: the Pearson correlation
    of z over all tokens of the same held-out images, of the latents that fire on them. Beside them two controls:

    - `shuffled`: decoder rows as in `stability`, entries dealt out anew along their principal axes; images so that each
      has another's codes, which keeps every latent's distribution and places and destroys what images have in common.
    - `untrained`: `untrained()` of both, with two seeds, at the same latents: what matching finds among random
      directions of the same tokens.

    Nothing is kept: every call matches anew, in seconds for a few hundred latents. With codes of 5,120 latents each,
    matrices of similarities take 0.2 GB apiece and the six matchings about a minute.

    Args:
        one, other: SAEs of different seeds, k, blocks or models.
        cache: updates that the first reads.
        other_cache: those that the second reads, by default the same cache; images belong together that have prompt
            text and seed in common.
        step: which denoising step of both caches; with guidance, its cond half.
        n_images: at most so many held-out images, from 2, spread over all that there are.

    Raises:
        HookpointError: a cache does not have an SAE's hookpoint.
        KitError: no alive latents, nothing to match by, different grids, or fewer than two images in common.

    >>> found = match(saes["mid.0", "k10"], saes["mid.0", "k20"], cache)                        # doctest: +SKIP
    >>> show_table(found.rows(), found.sentence())                                              # doctest: +SKIP
    """
    _check(one, other, cache, other_cache)
    n_images = whole_number("n_images", n_images, least=2)
    pair, alive = (one, other), [_alive(sae) for sae in (one, other)]
    untrained = (one.untrained(one.config.seed + 1), other.untrained(one.config.seed + 2))
    bases: dict[Basis, Compared] = {}
    if one.d_in == other.d_in:
        bases["decoder"] = _by_decoder(pair, untrained, alive)
    images: list[Any] = [[], []]
    if cache is not None:
        caches = (cache, other_cache or cache)
        images = _shared_images(pair, caches, n_images)
        reads = [_Reading(c, c.row(step), at) for c, at in zip(caches, images, strict=True)]
        _check_places(pair, reads)
        bases["codes"] = _by_codes(pair, untrained, alive, reads)
    return Matching(one.name, other.name, bases, len(images[0]))


def _check(one: Any, other: Any, cache: Any, other_cache: Any) -> None:
    if other_cache is not None and cache is None:
        raise KitError("match: other_cache= is given without cache=. Give the first SAE's cache too.")
    if one.d_in != other.d_in and cache is None:
        raise KitError(
            f"{one.name} reads tokens of {one.d_in} numbers and {other.name} of {other.d_in}, so their decoder rows "
            "cannot be compared. Give match a cache, to compare codes."
        )


def _alive(sae: SAE) -> NDArray[np.int64]:
    alive: NDArray[np.int64] = np.flatnonzero((sae.mean_activation > 0).cpu().numpy())
    if not len(alive):
        raise KitError(f"{sae.name} has no alive latent (mean_activation is 0). Train it first.")
    return alive


# By decoder -----------------------------------------------------------------------------------------------------------


def _by_decoder(pair: tuple[SAE, SAE], untrained: tuple[SAE, SAE], alive: list[NDArray[np.int64]]) -> Compared:
    mine, theirs = (_rows(sae)[at] for sae, at in zip(pair, alive, strict=True))
    random = (_rows(sae)[at] for sae, at in zip(untrained, alive, strict=True))
    similarities = {
        "trained": cosines(mine, theirs),
        "shuffled": cosines(mine, shuffled_rows(theirs)),
        "untrained": cosines(*random),
    }
    return _compared(alive, similarities)


@torch.no_grad()
def _rows(sae: SAE) -> Float[Tensor, "latent d_in"]:
    """What one unit of each latent adds to an update; where each token is scaled by itself, but for that scale."""
    per_token = sae.config.normalize in ("layer_norm", "constant_norm")
    return (sae.W_dec if per_token else sae.directions).detach().cpu().double()


def _compared(latents: list[NDArray[np.int64]], similarities: Mapping[str, NDArray[np.float64]]) -> Compared:
    mine, theirs = latents
    return Compared(
        {"one": mine, "other": theirs}, {condition: Matches.of(each) for condition, each in similarities.items()}
    )


# By codes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Where the codes of an SAE are read."""

    cache: ActivationCache
    row: int
    images: NDArray[np.int64]

    @torch.no_grad()
    def codes(self, sae: SAE, latents: NDArray[np.int64]) -> csr_array:
        """z of these latents at every token, (image · token, latent); sparse, so as large as they are active."""
        return vstack(list(self._parts(sae)), format="csr")[:, latents]

    def _parts(self, sae: SAE) -> Iterator[csr_array]:
        for part in self.cache.parts(sae.hookpoint, self.images):
            x = self.cache.read(sae.hookpoint, part)[:, self.row].to(sae.W_enc.device, torch.float32)
            indices, values = (each.cpu().numpy() for each in sae.encode_sparse(x.flatten(0, 1)))
            rows = np.arange(len(values)).repeat(values.shape[1])
            entries = (values.ravel().astype(np.float64), (rows, indices.ravel()))
            code = csr_array(entries, shape=(len(values), sae.d_sae))
            code.eliminate_zeros()
            yield code


def _shared_images(
    pair: tuple[SAE, SAE], caches: tuple[ActivationCache, ActivationCache], n_images: int
) -> list[NDArray[np.int64]]:
    """Held-out images of the same prompt and seed in both caches, by their number in each."""
    for sae, cache in zip(pair, caches, strict=True):
        cache.grid(sae.hookpoint)  # refuses a hookpoint that the cache does not have
    mine, theirs = (
        {(c.prompts.texts[i], c.prompts.seeds[i]): i for i in c.images("held_out")[::-1].tolist()} for c in caches
    )
    shared = sorted(mine.keys() & theirs.keys(), key=mine.__getitem__)
    if len(shared) < 2:
        raise KitError(
            f"match: {caches[0].name} and {caches[1].name} have {counted(len(shared), 'held-out images')} of the same "
            "prompt and seed in common, and codes need two at least. Collect both from the same prompts."
        )
    chosen = [shared[i] for i in np.linspace(0, len(shared) - 1, min(n_images, len(shared))).astype(int)]
    return [np.array([number[key] for key in chosen]) for number in (mine, theirs)]


def _check_places(pair: tuple[SAE, SAE], reads: list[_Reading]) -> None:
    (grid, places), (grid2, places2) = (
        (read.cache.grid(sae.hookpoint), read.cache.positions(sae.hookpoint, read.images))
        for sae, read in zip(pair, reads, strict=True)
    )
    if grid != grid2 or not np.array_equal(places, places2):
        raise KitError(
            f"match: the tokens of {pair[0].hookpoint} ({grid[0]}×{grid[1]}, {places.shape[1]} kept) and of "
            f"{pair[1].hookpoint} ({grid2[0]}×{grid2[1]}, {places2.shape[1]} kept) do not lie at the same places, so "
            "codes cannot be compared. Take hookpoints of one grid, and caches of whole grids."
        )


def _by_codes(
    pair: tuple[SAE, SAE], untrained: tuple[SAE, SAE], alive: list[NDArray[np.int64]], reads: list[_Reading]
) -> Compared:
    codes = [read.codes(sae, at) for sae, read, at in zip(pair, reads, alive, strict=True)]
    fires = [code.max(axis=0).toarray().ravel() > 0 for code in codes]
    for sae, any_ in zip(pair, fires, strict=True):
        if not any_.any():
            raise KitError(f"{sae.name}: no alive latent fires on the images compared. Give match more images.")
    mine, theirs = (code[:, any_] for code, any_ in zip(codes, fires, strict=True))
    latents = [at[any_] for at, any_ in zip(alive, fires, strict=True)]
    random = [read.codes(sae, at) for sae, read, at in zip(untrained, reads, latents, strict=True)]
    similarities = {
        "trained": correlations(mine, theirs),
        "shuffled": correlations(mine, _dealt_anew(theirs, len(reads[0].images))),
        "untrained": correlations(*random),
    }
    return _compared(latents, similarities)


def correlations(one: csr_array, other: csr_array) -> Float[np.ndarray, "latent latent2"]:
    """Pearson correlation of every column of `one` with every column of `other`, 0 where one of them is constant.

    Σxy − n · x̄ · ȳ over the roots of Σx² − n · x̄² and Σy² − n · ȳ²: only the first is a product, of sparse matrices.
    """
    n = one.shape[0]
    covariance: NDArray[np.float64] = (one.T @ other).toarray()
    means = [np.asarray(code.sum(axis=0)) / n for code in (one, other)]
    covariance -= n * np.outer(*means)
    for code, mean, axis in zip((one, other), means, (1, 0), strict=True):
        squares = np.asarray(code.multiply(code).sum(axis=0))
        spread = np.sqrt(np.maximum(squares - n * mean**2, 0))
        scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 1e-9 * np.sqrt(squares))
        covariance *= np.expand_dims(scale, axis)
    return covariance


def _dealt_anew(codes: csr_array, n_images: int) -> csr_array:
    """The codes of images dealt out so that each image has those of another."""
    order = np.random.default_rng(0).permutation(n_images)
    source = np.empty(n_images, dtype=np.int64)
    source[order] = np.roll(order, 1)  # one cycle through all images, so none keeps its own
    tokens = codes.shape[0] // n_images
    return codes[(source[:, None] * tokens + np.arange(tokens)).ravel()]

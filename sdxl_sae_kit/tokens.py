"""Tokens from any iterator of batches, for training on what was not collected by this kit.

The first batches are put aside to measure on (at least 4,096 tokens); all others are trained on, in the order and sizes
in which they come. The tokens' content is their identity: SAEs trained on them are found again, and a training that was
interrupted goes on, where an iterator begins with the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.configs import Site, Split
from sdxl_sae_kit.errors import HookpointError, KitError, did_you_mean

_HELD_OUT, _SAMPLE = 4096, 40_960  # tokens
_TOGETHER, _PART = 64, 64  # tokens to an image, images read at once

Batch = dict[str, Float[Tensor, "_token _d_in"]]


class Tokens:
    """Batches (n, d_in) of one hookpoint, or mappings of hookpoints to such batches, as `train` reads them.

    Args:
        batches: any iterable; one that can be iterated over again where there are several epochs.
        site: where the tokens come from. Its hookpoint names them, unless they are named already.
        epochs: how often they will be iterated over.

    Raises:
        KitError: not batches of tokens, too few of them, or numbers that are not finite among the first.

    >>> evaluate(sae, Tokens(x.split(4096), sae.site))["explained_variance"]                     # doctest: +SKIP
    """

    name = "tokens"

    def __init__(self, batches: Iterable[Any], site: Site | None = None, epochs: int = 1) -> None:
        if epochs > 1 and iter(batches) is batches:
            raise KitError(
                f"An iterator gives its batches once, but epochs={epochs}. Give a list, or what can begin anew."
            )
        self._batches, self._site = batches, site
        self._rest = self._read(iter(batches))
        self._held_out = self._take(_HELD_OUT)
        self._first = self._take(_SAMPLE)
        if not self._held_out or not self._first:
            n = sum(len(next(iter(batch.values()))) for batch in self._held_out)
            raise KitError(
                f"There are {n} tokens: the first {_HELD_OUT}, in whole batches, are put aside to measure on, and none "
                "is left to train on. Give more, or smaller batches."
            )
        for number, batch in enumerate(self._held_out):
            for hookpoint, x in batch.items():
                if not x.isfinite().all():
                    raise KitError(
                        f"Batch {number} has tokens of {hookpoint} that are not finite. Look for their cause."
                    )
        hashed = hashlib.sha256()
        for batch in self._held_out + self._first:
            for hookpoint, x in sorted(batch.items()):
                hashed.update(hookpoint.encode() + x.numpy().tobytes())
        self.digest = hashed.hexdigest()

    def _take(self, n: int) -> list[Batch]:
        """The next batches, until they have n tokens."""
        taken, tokens = [], 0
        while tokens < n and (batch := next(self._rest, None)):
            taken.append({hookpoint: x.clone() for hookpoint, x in batch.items()})  # an iterator may reuse its memory
            tokens += len(next(iter(batch.values())))
        return taken

    def _read(self, batches: Iterator[Any]) -> Iterator[Batch]:
        widths: dict[str, int] = {}
        for number, batch in enumerate(batches):
            named = batch if isinstance(batch, Mapping) else {self._site.hookpoint if self._site else "tokens": batch}
            read = {str(hookpoint): _as_tokens(x, number) for hookpoint, x in named.items()}
            if not any(len(x) for x in read.values()):
                continue
            found = {hookpoint: x.shape[1] for hookpoint, x in read.items()}
            if (widths := widths or found) != found or len({len(x) for x in read.values()}) != 1:
                raise KitError(
                    f"Batch {number} has {_shapes(read)}, but the first had widths {widths}. Give every batch the same "
                    "hookpoints and widths, and within a batch equally many tokens of each."
                )
            yield read

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Names of the hookpoints; "tokens" where nothing names them."""
        return tuple(self._first[0])

    def d_in(self, hookpoint: str) -> int:
        """How many numbers a token has."""
        return self._of(self._first[:1], hookpoint).shape[1]

    def grid(self, hookpoint: str) -> tuple[int, int]:
        """A token comes alone."""
        self._of(self._first[:1], hookpoint)
        return 1, 1

    def site(self, hookpoint: str) -> Site | None:
        """Where the tokens come from, if that was said."""
        return replace(self._site, hookpoint=hookpoint) if self._site else None

    def steps(self, hookpoint: str, batch_size: int) -> int | None:
        """Batches in one epoch, where their number is known; they come in sizes of their own."""
        try:
            return len(self._batches) - len(self._held_out)  # type: ignore[arg-type]
        except TypeError:
            return None

    def sample(self, hookpoint: str, n: int, *, seed: int = 0) -> Float[Tensor, "token d_in"]:
        """The first n training tokens, at most 40,960 or a few more."""
        return self._of(self._first, hookpoint)[:n]

    def batches(self, hookpoints: Sequence[str], batch_size: int, *, epoch: int = 0) -> Iterator[Batch]:
        """The training batches, as they come.

        Raises:
            KitError: another epoch of what can be iterated over only once.
        """
        if epoch == 0 and self._rest is not None:
            batches: Iterator[Batch] = itertools.chain(self._first, self._rest)
            self._rest = iter(())
        else:
            batches = itertools.islice(self._read(iter(self._batches)), len(self._held_out), None)
        for batch in batches:
            yield {hookpoint: batch[hookpoint] for hookpoint in hookpoints}

    def by_image(self, hookpoint: str, split: Split, max_images: int) -> Iterator[Float[Tensor, "image token d_in"]]:
        """Some tokens of a split; of the training tokens those of `sample`.

        Nobody knows which were of one image: 64 that came one after the other count as one, and a rest is left out.

        Raises:
            KitError: no such split.
        """
        splits = {"held_out": self._held_out, "train": self._first}
        if split not in splits:
            raise KitError(f"Tokens have no split {split!r}, but {' and '.join(splits)}.{did_you_mean(split, splits)}")
        tokens = self._of(splits[split], hookpoint)
        together = min(_TOGETHER, max(1, len(tokens) // 2))
        images = tokens[: len(tokens) // together * together].unflatten(0, (-1, together))
        yield from images[:max_images].split(_PART)

    def _of(self, batches: Sequence[Batch], hookpoint: str) -> Float[Tensor, "token d_in"]:
        if hookpoint not in batches[0]:
            raise HookpointError(
                f"These batches have no tokens of {hookpoint!r}; they have {', '.join(batches[0])}."
                f"{did_you_mean(hookpoint, batches[0])}"
            )
        return torch.cat([batch[hookpoint] for batch in batches])


def _as_tokens(x: Any, number: int) -> Float[Tensor, "token d_in"]:
    array = x if isinstance(x, Tensor) else np.ascontiguousarray(x)
    floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if array.ndim != 2 or not floating:
        raise KitError(
            f"Batch {number} is {array.dtype} of shape {tuple(array.shape)}; train needs floating-point numbers of "
            "shape (n, d_in), one row per token."
        )
    return torch.as_tensor(array).detach().cpu().float()


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{hookpoint} {tuple(x.shape)}" for hookpoint, x in batch.items())

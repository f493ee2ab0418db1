"""A swap buffer that mixes a stream of tokens within bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Tokens = Mapping[str, Float[Tensor, "_token _d_in"]]
"""Tokens of several hookpoints: equally many of each, taken from the same places."""


def thinned(x: Float[Tensor, "token d_in"], n: int) -> Float[Tensor, "_token d_in"]:
    """At most n of these tokens, evenly spaced."""
    return x if len(x) <= n else x[torch.linspace(0, len(x) - 1, n).long().to(x.device)]


def mix(
    blocks: Iterable[Tokens], batch_size: int, capacity: int, rng: np.random.Generator
) -> Iterator[dict[str, Float[Tensor, "_token _d_in"]]]:
    """Batches of tokens in float32, each drawn at random from a buffer that the blocks keep full; nothing is lost.

    The buffer holds `capacity` tokens (at least a batch). A batch leaves it from random places, new tokens take those
    places, and in the end it empties in random order; the last batch is what remains. The order depends on `rng` alone.
    """
    capacity = max(capacity, batch_size)
    buffer: dict[str, Tensor] = {}
    filled, free = 0, torch.empty(0, dtype=torch.int64)
    for block in blocks:
        n, start = len(next(iter(block.values()))), 0
        if not buffer:
            buffer = {name: tokens.new_empty(capacity, tokens.shape[1]) for name, tokens in block.items()}
        while start < n:
            if not len(free) and filled == capacity:
                free = torch.from_numpy(rng.choice(capacity, batch_size, replace=False))
                yield _take(buffer, free)
            if filled < capacity:
                stop = min(n, start + capacity - filled)
                places: slice | Tensor = slice(filled, filled + stop - start)
                filled += stop - start
            else:
                stop = min(n, start + len(free))
                places, free = free[: stop - start], free[stop - start :]
            for name, tokens in block.items():
                buffer[name][places] = tokens[start:stop]
            start = stop
    left = torch.ones(filled, dtype=torch.bool)
    left[free] = False
    order = left.nonzero().flatten()[torch.from_numpy(rng.permutation(int(left.sum())))]
    for last in order.split(batch_size) if len(order) else ():
        yield _take(buffer, last)


def _take(buffer: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    return {name: tokens.index_select(0, places).float() for name, tokens in buffer.items()}

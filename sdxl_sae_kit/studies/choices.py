"""Which features are transported: the choice of every item, from means of features and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdxl_sae_kit.neurons import hookpoint_of

_DIGITS = 10
"""Of a score: far more than tell features apart, and fewer than the order of a sum changes."""

Pair = list[Int[np.ndarray, " _n"]]
"""Features of one item that are removed, and those that are added."""


def rank(original: Float[np.ndarray, " f"], edited: Float[np.ndarray, " f"]) -> Pair:
    """What to remove and what to add, best first, by the means of features in the original and in the edited picture.

    The score is a feature's share of all means in the edited picture less that in the original (0 where there are
    none); below 0 it may be removed, above 0 added. Ties, up to how sums are rounded, go to the feature that comes
    first.

    >>> [each.tolist() for each in rank(np.array([0.0, 3, 1]), np.array([1.0, 0, 1]))]
    [[1], [0, 2]]
    """
    score = (_shares(edited) - _shares(original)).round(_DIGITS)
    ascending, descending = (np.argsort(each, kind="stable") for each in (score, -score))
    return [ascending[score[ascending] < 0], descending[score[descending] > 0]]


def _shares(means: Float[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    total = means.sum()
    return means / total if total > 0 else np.zeros_like(means)


def draw_alike(chosen: Pair, means: Sequence[Float[np.ndarray, " f"]], seed: int) -> Pair:
    """As many other features as were chosen, at random from those with means above 0 in the same picture.

    None of the chosen is among them, on either side, and none is drawn twice: what is active in both pictures goes to
    the side that still wants more. Where there are too few such features, fewer are drawn.
    """
    wanted, active = np.array([len(each) for each in chosen]), np.stack(means) > 0
    free: Bool[np.ndarray, " f"] = np.asarray(active.any(axis=0))
    free[np.concatenate(chosen)] = False
    drawn: tuple[list[int], list[int]] = [], []
    for feature in np.random.default_rng(seed).permutation(np.flatnonzero(free)):
        side = int((wanted * active[:, feature]).argmax())
        if wanted[side] and active[side, feature]:
            drawn[side].append(feature)
            wanted[side] -= 1
    return [np.array(each, dtype=np.intp) for each in drawn]


@dataclass(frozen=True)
class Choice:
    """Which features of each item are removed and which are added."""

    chosen: Mapping[str, tuple[Bool[Tensor, "item feature"], Bool[Tensor, "item feature"]]]
    """By place; those are left out where nothing is chosen of any item."""
    counts: list[dict[str, tuple[int, int]]]
    """For each item, how many were added and removed, by hookpoint; nothing where all are transported."""

    @classmethod
    def of(cls, places: Mapping[str, int], pairs: Sequence[Pair], device: torch.device) -> Choice:
        """The choice of these pairs, whose features are numbered over all places, given by how many each has."""
        table = np.zeros((2, len(pairs), sum(places.values())), dtype=bool)
        for item, pair in enumerate(pairs):
            for side, features in enumerate(pair):
                table[side, item, features] = True
        parts = torch.from_numpy(table).to(device).split(list(places.values()), dim=2)
        chosen = {place: (part[0], part[1]) for place, part in zip(places, parts, strict=True) if part.any()}
        return cls(chosen, _count(places, table))

    @classmethod
    def everything(cls, places: Mapping[str, int], n: int, device: torch.device) -> Choice:
        """All features of n items."""
        full = {place: torch.ones(n, width, dtype=torch.bool, device=device) for place, width in places.items()}
        return cls({place: (each, each) for place, each in full.items()}, [{} for _ in range(n)])


def _count(places: Mapping[str, int], table: Bool[np.ndarray, "2 item feature"]) -> list[dict[str, tuple[int, int]]]:
    blocks = np.repeat([hookpoint_of(place) for place in places], list(places.values()))
    totals = {block: table[:, :, blocks == block].sum(axis=2).T.tolist() for block in dict.fromkeys(blocks.tolist())}
    return [
        {block: (added, removed) for block, by_item in totals.items() for removed, added in [by_item[item]]}
        for item in range(table.shape[1])
    ]

"""Which block does most for which kind of edit: each block alone, each left out, and where features are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.studies.benchmark_scores import Row, Scores, estimates, named
from sdxl_sae_kit.studies.rank_agreement import spearman

ALL = "all"
_ORDERS = 2000


def gains(scores: Scores, measure: str) -> list[Row]:
    """A row per kind, and for all, and block, of the setting that was tried at each block.

    `alone`: how much greater the mean is with this block alone than without any edit; `left out`: how much less it is
    without this block than with all of them. Paired, with 95 % bootstrap intervals over items; NaN where that was not
    tried. No rows where no block was tried by itself.
    """
    by_blocks, blocks = _by_blocks(scores), scores.blocks
    if len(by_blocks) < 2:
        return []
    values, floor = scores.values[measure], scores.floor(measure)

    def at(those: frozenset[str]) -> Float[np.ndarray, " item"]:
        return values[:, by_blocks[those]] if those in by_blocks else np.full(len(scores), np.nan)

    everything = frozenset(blocks)
    alone = [at(frozenset({block})) - floor for block in blocks]
    lost = [at(everything) - at(everything - {block}) for block in blocks]
    return _by_kind(scores, ("alone", "left out"), np.stack([alone, lost], axis=-1).transpose(1, 0, 2))


def chosen_shares(
    scores: Scores, chosen: Sequence[Mapping[str, Mapping[str, Sequence[int]]]], sizes: Mapping[str, int]
) -> list[Row]:
    """A row per kind, and for all, and block: the share of the features that were added and removed there.

    Means over items of `sae` at all blocks, averaged over its settings, with 95 % bootstrap intervals over items.
    `expected` is the share if features were spread by their number in each block; NaN where `sizes` does not tell it.
    """
    keys = [scores.settings[at].key for at in scores.methods.get("sae", [])]
    counts = np.array(
        [[[told[key].get(block, (0, 0)) for block in scores.blocks] for key in keys] for told in chosen], dtype=float
    ).reshape(len(chosen), len(keys), len(scores.blocks), 2)
    total = sum(sizes.get(block, np.nan) for block in scores.blocks)
    with np.errstate(invalid="ignore"):
        shares = (counts / counts.sum(axis=2, keepdims=True)).mean(axis=1)  # (item, block, 2)
    rows = _by_kind(scores, ("added", "removed"), shares) if keys else []
    return [row | {"expected": sizes.get(row["block"], np.nan) / total} for row in rows]


def _by_kind(scores: Scores, names: tuple[str, str], values: Float[np.ndarray, "item block 2"]) -> list[Row]:
    """A row per kind, and for all, and block, of two numbers of each item at each block."""
    rows = []
    for kind, mine in _masks(scores):
        found = estimates(values[mine].reshape(int(mine.sum()), -1))
        for at, block in enumerate(scores.blocks):
            row: Row = {"kind": kind, "block": block, "n": int(mine.sum())}
            rows.append(row | named(names[0], found[2 * at]) | named(names[1], found[2 * at + 1]))
    return rows


def agreement(one: Sequence[Row], other: Sequence[Row]) -> Row:
    """Spearman's ρ of two tables of what each block alone does for each kind, as `gains` gives them.

    `ρ` is over all cells; `ρ within kinds` the mean over kinds of that over its blocks, which no easy or hard kind can
    raise. p is one-sided, the share of orders with as large a ρ, blocks being shuffled within each kind: of 2,000 and
    their own. NaN where a block does the same for all. `verdict` says in words what that comes to.

    Raises:
        KitError: one of them tells nothing of blocks, or they are of other blocks or kinds.
    """
    a, b = _table(one, "This result"), _table(other, "The other result")
    if set(a) != set(b):
        odd = ", ".join(f"{kind} at {block}" for kind, block in sorted(set(a) ^ set(b)))
        raise KitError(
            f"The two results have other blocks or kinds: only one of them has {odd}. Compare like with like."
        )
    kinds, blocks = (list(dict.fromkeys(key[at] for key in a)) for at in (0, 1))
    left, right = (np.array([[t[kind, block] for block in blocks] for kind in kinds]) for t in (a, b))
    shuffled = np.random.default_rng(0).permuted(np.tile(left, (_ORDERS, 1, 1)), axis=-1)
    tables = np.concatenate([left[None], shuffled])
    beside = np.broadcast_to(right, tables.shape)
    row: Row = {"cells": left.size, "kinds": len(kinds), "blocks": len(blocks)}
    for name, found in {
        "ρ": spearman(*(each.reshape(len(tables), -1) for each in (tables, beside))),
        "ρ within kinds": _mean_over_kinds(spearman(tables, beside)),
    }.items():
        row |= {name: float(found[0]), f"{name} p": float((found >= found[0] - 1e-12).mean())}
    return row | {"verdict": _verdict(row)}


def _mean_over_kinds(each: Float[np.ndarray, "order kind"]) -> Float[np.ndarray, " order"]:
    """The mean of those that can be told; ties are the same in every order, so the same kinds count in each."""
    there = np.isfinite(each)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, each, 0).sum(axis=-1) / there.sum(axis=-1))


def _verdict(row: Mapping[str, Any]) -> str:
    rho, p = row["ρ within kinds"], row["ρ within kinds p"]
    if np.isnan(rho):
        return "whether the same blocks do most cannot be told: blocks do not differ"
    agrees = "the same blocks do most for the same kinds" if p <= 0.05 else "no evidence that the same blocks do most"
    return f"{agrees} (ρ {rho:.2f} within kinds, p = {p:.3g}; {row['ρ']:.2f} over all {row['cells']} cells)"


def _table(rows: Sequence[Row], whose: str) -> dict[tuple[str, str], float]:
    told = {(row["kind"], row["block"]): float(row["alone"]) for row in rows if row["kind"] != ALL}
    if not told or not np.isfinite(list(told.values())).all():
        raise KitError(f"{whose} does not tell what each block does alone. Call riebench with by_block.")
    return told


def _by_blocks(scores: Scores) -> dict[frozenset[str], int]:
    """The places of the settings that differ only in their blocks, of the one that was tried at some of them."""
    settings = scores.settings
    partial = [s for s in settings if s.blocks and len(s.blocks) < len(scores.blocks)]
    tried = {(s.method, s.k, s.strength) for s in partial[:1]}
    return {frozenset(s.blocks): at for at, s in enumerate(settings) if (s.method, s.k, s.strength) in tried}


def _masks(scores: Scores) -> list[tuple[str, Any]]:
    """All items, then those of each kind."""
    each = [(kind, scores.of_kind(kind)) for kind in dict.fromkeys(scores.kinds)]
    return [(ALL, np.ones(len(scores), dtype=bool)), *each]

"""Which block does most for which kind of edit: each block alone, each left out, and where features are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.studies.benchmark_scores import LEAST, LESS_IS_BETTER, Row, Scores, estimates, named
from sdxl_sae_kit.studies.rank_agreement import spearman
from sdxl_sae_kit.studies.transport import Setting

ALL = "all"
_ORDERS, _SAMPLES = 2000, 1000


def gains(scores: Scores, measure: str) -> list[Row]:
    """A row per kind, and for all, and block, of the setting that was tried at each block.

    `alone`: how much greater the mean is with this block alone than without any edit; `left out`: how much less it is
    without this block than with all of them. Paired, with 95 % bootstrap intervals over items; NaN where that was not
    tried. No rows where no block was tried by itself.
    """
    by_blocks, blocks = _by_blocks(scores), scores.blocks
    if len(by_blocks) < 2:
        return []
    values = scores.values[measure]

    def at(those: frozenset[str]) -> Float[np.ndarray, " item"]:
        return values[:, by_blocks[those]] if those in by_blocks else np.full(len(scores), np.nan)

    everything = frozenset(blocks)
    lost = np.stack([at(everything) - at(everything - {block}) for block in blocks], axis=1)
    return _by_kind(scores, ("alone", "left out"), np.stack([_alone(scores, measure), lost], axis=-1))


def tried_by_block(scores: Scores) -> Setting | None:
    """The first of the settings that were tried at some of the blocks; None where none was."""
    return next((s for s in scores.settings if s.blocks and len(s.blocks) < len(scores.blocks)), None)


def _alone(scores: Scores, measure: str) -> Float[np.ndarray, "item block"]:
    """What each block alone changes, beside no edit; NaN where it was not tried alone."""
    by_blocks = _by_blocks(scores)
    places = [by_blocks.get(frozenset({block})) for block in scores.blocks]
    values, unknown = scores.values[measure], np.full(len(scores), np.nan)
    found = [unknown if place is None else values[:, place] - scores.floor(measure) for place in places]
    return np.stack(found, axis=1) if found else np.zeros((len(scores), 0))


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
    if not keys:
        return []
    with np.errstate(invalid="ignore"):
        shares = (counts / counts.sum(axis=2, keepdims=True)).mean(axis=1)  # (item, block, 2)
    rows = _by_kind(scores, ("added", "removed"), shares)
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


def agreement(one: Scores, other: Scores, measure: str) -> Row:
    """Whether two results agree on what each block alone does for each kind of edit.

    `ρ within kinds`: Spearman's ρ over the blocks of a kind, mean over kinds; it is high too where the same blocks do
    most for every kind. `ρ of what is special`: over all cells, once the mean of each block and of each kind is taken
    off both tables. p is one-sided, the share of orders with as large a ρ, of 2,000 and their own: blocks are shuffled
    within each kind, and for what is special, which kind is which. Intervals (95 %) are of 1,000 bootstrap samples of
    the items of each kind of either result. `top agrees`: for how many kinds the block that does most is the same, and
    `top by chance` for how many it would be. NaN where a block does the same for all. `n` is how many items tell it in
    the result that has fewer; of under 20 nothing is concluded.

    Raises:
        KitError: one of them tells nothing of blocks, or they are of other settings, blocks or kinds.
    """
    kinds, blocks = _shared(one, other, measure)
    rng = np.random.default_rng(0)
    left, right = (_tables(scores, measure, kinds, blocks, rng) for scores in (one, other))
    told = [int(np.isfinite(_alone(scores, measure)).all(axis=1).sum()) for scores in (one, other)]
    row: Row = {"n": min(told), "kinds": len(kinds), "blocks": len(blocks)}
    orders = {
        "ρ within kinds": (_within_kinds, rng.permuted(np.tile(left[0], (_ORDERS, 1, 1)), axis=-1)),
        "ρ of what is special": (_of_special, np.stack([rng.permutation(left[0]) for _ in range(_ORDERS)])),
    }
    for name, (of, shuffled) in orders.items():
        found, chance = of(left, right), of(shuffled, np.broadcast_to(right[0], shuffled.shape))
        rho, drawn = float(found[0]), found[1:][np.isfinite(found[1:])]
        known = np.isfinite(rho)
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if known and len(drawn) else (np.nan, np.nan)
        p = float((1 + (chance >= rho - 1e-12).sum()) / (1 + _ORDERS)) if known else np.nan
        row |= {name: rho, f"{name} interval": (low, high), f"{name} p": p}
    sign = -1 if measure in LESS_IS_BETTER else 1
    tops = [(sign * table[0]).argmax(axis=1) for table in (left, right)]
    row |= {"top agrees": int((tops[0] == tops[1]).sum()), "top by chance": len(kinds) / len(blocks)}
    return row | {"verdict": _verdict(row)}


def _shared(one: Scores, other: Scores, measure: str) -> tuple[list[str], list[str]]:
    """The kinds and blocks of two results of which the same can be asked."""
    tried = [tried_by_block(scores) for scores in (one, other)]
    for whose, scores, setting in zip(("This result", "The other result"), (one, other), tried, strict=True):
        if setting is None or not np.isfinite(_alone(scores, measure)).any(axis=0).all():
            raise KitError(f"{whose} does not tell what each block does alone. Call riebench with by_block.")
    mine, theirs = (f"{s.method}, k {s.k}, strength {s.strength:g}" for s in tried if s)
    if mine != theirs:
        raise KitError(f"Blocks were tried with {mine} here and with {theirs} there. Compare like with like.")
    for what, a, b in (("kinds", set(one.kinds), set(other.kinds)), ("blocks", set(one.blocks), set(other.blocks))):
        if a != b:
            raise KitError(
                f"The two results have other {what}: only one of them has {', '.join(sorted(a ^ b))}. Compare like "
                "with like."
            )
    return list(dict.fromkeys(one.kinds)), list(one.blocks)


def _tables(
    scores: Scores, measure: str, kinds: Sequence[str], blocks: Sequence[str], rng: np.random.Generator
) -> Float[np.ndarray, "draw kind block"]:
    """What each block alone does for each kind: of all items, then of samples of the items of each kind."""
    values = _alone(scores, measure)[:, [scores.blocks.index(block) for block in blocks]]
    made = []
    for kind in kinds:
        own = values[scores.of_kind(kind)]
        own = own[np.isfinite(own).all(axis=1)]
        if not len(own):
            made.append(np.full((1 + _SAMPLES, len(blocks)), np.nan))
            continue
        drawn = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=_SAMPLES)
        made.append(np.concatenate([np.ones((1, len(own))), drawn]) @ own / len(own))
    return np.stack(made, axis=1)


def _within_kinds(
    one: Float[np.ndarray, "draw kind block"], other: Float[np.ndarray, "draw kind block"]
) -> Float[np.ndarray, " draw"]:
    return _mean_over_kinds(spearman(one, other))


def _of_special(
    one: Float[np.ndarray, "draw kind block"], other: Float[np.ndarray, "draw kind block"]
) -> Float[np.ndarray, " draw"]:
    return spearman(*(_special(each).reshape(len(each), -1) for each in (one, other)))


def _special(tables: Float[np.ndarray, "draw kind block"]) -> Float[np.ndarray, "draw kind block"]:
    """Without what a block does for all kinds, and what all blocks do for a kind."""
    left = tables - tables.mean(axis=2, keepdims=True)
    return np.asarray(np.round(left - left.mean(axis=1, keepdims=True), 12))  # what rounding leaves is no order


def _mean_over_kinds(each: Float[np.ndarray, "order kind"]) -> Float[np.ndarray, " order"]:
    """The mean of those that can be told; ties are the same in every order, so the same kinds count in each."""
    there = np.isfinite(each)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, each, 0).sum(axis=-1) / there.sum(axis=-1))


def _verdict(row: Mapping[str, Any]) -> str:
    name = "ρ within kinds"
    if row["n"] < LEAST:
        return f"too few items ({row['n']} of at least {LEAST})"
    if np.isnan(row[name]):
        return "whether blocks rank alike cannot be told: blocks do not differ"
    alike = "blocks rank alike within kinds" if row[f"{name} p"] <= 0.05 else "no evidence that blocks rank alike"
    (low, high), special, p = row[f"{name} interval"], row["ρ of what is special"], row["ρ of what is special p"]
    apart = (
        "what is special to kinds cannot be told apart"
        if np.isnan(special)
        else f"what is special to kinds {'agrees too' if p <= 0.05 else 'does not visibly agree'} "
        f"(ρ {special:.2f}, p = {p:.3g})"
    )
    return (
        f"{alike} (mean ρ {row[name]:.2f} [{low:.2f}, {high:.2f}], p = {row[f'{name} p']:.3g}); the block that does "
        f"most is the same for {row['top agrees']} of {row['kinds']} kinds, by chance {row['top by chance']:.2g}; "
        f"{apart}"
    )


def _by_blocks(scores: Scores) -> dict[frozenset[str], int]:
    """The places of the settings that differ only in their blocks, of the one that was tried at some of them."""
    tried = tried_by_block(scores)
    dose = tried and (tried.method, tried.k, tried.strength)
    return {frozenset(s.blocks): at for at, s in enumerate(scores.settings) if (s.method, s.k, s.strength) == dose}


def _masks(scores: Scores) -> list[tuple[str, Any]]:
    """All items, then those of each kind."""
    each = [(kind, scores.of_kind(kind)) for kind in dict.fromkeys(scores.kinds)]
    return [(ALL, np.ones(len(scores), dtype=bool)), *each]

"""Fair comparisons of methods with many settings: settings chosen on other items, and results at equal damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

_SAMPLES = 1000


@dataclass(frozen=True)
class Trade:
    """What settings of a method come to, item by item: what they reach and what damage they do."""

    reached: Float[np.ndarray, "item setting"]
    damage: Float[np.ndarray, "item setting"]
    merit: Callable[[Any, Any], Any]
    """How good a setting with these means is: the greater the better."""


def halves(kinds: Sequence[str]) -> Bool[np.ndarray, " item"]:
    """Which items are of the second half: every other one of each kind."""
    seen, second = Counter[str](), list[bool]()
    for kind in kinds:
        second.append(seen[kind] % 2 == 1)
        seen[kind] += 1
    return np.array(second, dtype=bool)


def cross_fitted(
    trade: Trade, counts: Float[np.ndarray, "draw item"], second: Bool[np.ndarray, " item"]
) -> Int[np.ndarray, "2 draw"]:
    """The setting at which the items of each half are scored: the one of greatest merit on the *other* half.

    So no item has a say in its own setting, and choosing the best of many does not flatter. `counts` says how often
    each draw holds each item.
    """
    others = np.stack([counts * second, counts * ~second])
    sizes = np.maximum(others.sum(axis=-1, keepdims=True), 1)
    return np.asarray(trade.merit(others @ trade.reached / sizes, others @ trade.damage / sizes).argmax(axis=-1))


def means_at(
    values: Float[np.ndarray, "item setting"],
    taken: Int[np.ndarray, "2 draw"],
    counts: Float[np.ndarray, "draw item"],
    second: Bool[np.ndarray, " item"],
) -> Float[np.ndarray, " draw"]:
    """Means over all items, each half at the setting that was taken for it."""
    sums = np.stack([counts * ~second, counts * second]) @ values
    return np.asarray(np.take_along_axis(sums, taken[..., None], axis=-1)[..., 0].sum(axis=0) / counts.sum(axis=-1))


def mixed_at(
    damage: Float[np.ndarray, "*draw point"], reached: Float[np.ndarray, "*draw point"], at: Float[np.ndarray, "*draw"]
) -> Float[np.ndarray, "*draw"]:
    """The most that mixing two points reaches on average at a mean damage of no more than `at`.

    This is the upper concave hull of the points, which from its highest point on is level: whoever may do some damage
    may do less. At least one point must have no more damage than `at`.
    """
    d1, d2 = damage[..., :, None], damage[..., None, :]
    r1, r2 = reached[..., :, None], reached[..., None, :]
    room, step = at[..., None, None] - d1, d2 - d1
    share = np.divide(room, step, out=np.zeros(step.shape), where=step > 0)
    mixed = r1 + np.clip(share, 0, 1) * (r2 - r1)
    return np.asarray(np.where(room >= 0, mixed, -np.inf).max(axis=(-2, -1)))


def compare_at_equal_damage(mine: Trade, other: Trade, second: Bool[np.ndarray, " item"]) -> dict[str, Any]:
    """What one method reaches, and what the other does at most at the same damage, on the same items.

    Mine is cross-fitted. The other is read off the hull of its settings' means (see `mixed_at`) at mine's damage; noise
    can only lift a hull, so the comparison leans to the other. The 95 % intervals are of 1,000 bootstrap samples of the
    items, in each of which settings are chosen and the hull is drawn anew. `beyond`: mine does more damage than any
    setting of the other, whose highest value then holds.
    """
    n = len(second)
    drawn = np.random.default_rng(0).integers(n, size=(_SAMPLES, n))
    resampled = np.stack([np.bincount(each, minlength=n) for each in drawn])
    counts = np.concatenate([np.ones((1, n)), resampled])  # the items themselves, then samples of them
    taken = cross_fitted(mine, counts, second)
    reached, damage = (np.asarray(means_at(of, taken, counts, second)) for of in (mine.reached, mine.damage))
    damages, most = (counts @ of / n for of in (other.damage, other.reached))
    beside = mixed_at(damages, most, np.maximum(damage, 0))
    told = {"reached": reached, "damage": damage, "other reached": beside, "difference": reached - beside}
    row: dict[str, Any] = {"n": n, "beyond": bool(damage[0] > damages[0].max())}
    for name, draws in told.items():
        low, high = np.quantile(draws[1:], [0.025, 0.975]) if n > 1 else (np.nan, np.nan)
        row |= {name: float(draws[0]), f"{name} interval": (float(low), float(high))}
    return row

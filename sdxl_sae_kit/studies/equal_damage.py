"""Fair comparisons of methods with many settings: settings chosen on other items, and results at equal damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

_SAMPLES = 1000


@dataclass(frozen=True)
class Trade:
    """What settings of a method come to, item by item, beside no edit, which does no damage."""

    reached: Float[np.ndarray, "item setting"]
    """What tells success, the greater the better."""
    damage: Float[np.ndarray, "item setting"]
    """What else changes, from 0."""
    unedited: Float[np.ndarray, " item"]
    """What is reached without any edit."""
    merit: Callable[[Any, Any], Any]
    """How good a setting with these means is: the greater the better."""
    limits: tuple[float, float] | None = None
    """Between which means of what is reached must lie; None where nothing says so."""

    def with_none(self) -> tuple[Float[np.ndarray, "item point"], Float[np.ndarray, "item point"]]:
        """Reached and damage of no edit and of every setting."""
        none = self.unedited[:, None]
        return np.hstack([none, self.reached]), np.hstack([np.zeros_like(none), self.damage])


def halves(n: int) -> Bool[np.ndarray, " item"]:
    """Which items are of the second half: every other one, so that of items in order of kinds either has as many."""
    return np.asarray(np.arange(n) % 2 == 1)


def choose(
    trade: Trade, items: Bool[np.ndarray, " item"], counts: Float[np.ndarray, "draw item"]
) -> Int[np.ndarray, " draw"]:
    """The setting of greatest merit on these items, where each draw holds an item so many times."""
    return np.asarray(
        np.argmax(trade.merit(_means(trade.reached, items, counts), _means(trade.damage, items, counts)), axis=-1)
    )


def hull(damage: Float[np.ndarray, " point"], reached: Float[np.ndarray, " point"]) -> list[int]:
    """The points that no mixture of others beats, in order of damage: the upper concave hull up to its highest."""
    return [
        at for at in np.lexsort((-reached, damage)).tolist()
        if _best_mixture(damage[None], reached[None], damage[None, at])[0][0, at] == 1
    ]  # fmt: skip


def _best_mixture(
    damage: Float[np.ndarray, "draw point"], reached: Float[np.ndarray, "draw point"], at: Float[np.ndarray, " draw"]
) -> tuple[Float[np.ndarray, "draw point"], Float[np.ndarray, " draw"]]:
    """The mixture of at most two points that reaches most at no more damage than `at`, and what more damage adds.

    That is the upper concave hull, and its slope there. From its highest point on it is level, as whoever may do some
    damage may do less: that point alone, and slope 0. Some point must have no more damage than `at`.
    """
    draws, points = damage.shape
    room, step = (at[:, None] - damage)[:, :, None], damage[:, None, :] - damage[:, :, None]
    gain = reached[:, None, :] - reached[:, :, None]
    share = np.divide(room, step, out=np.zeros(step.shape), where=step > 0)
    mixed = np.where(room >= 0, reached[:, :, None] + np.clip(share, 0, 1) * gain, -np.inf)
    first, second = np.divmod(mixed.reshape(draws, -1).argmax(axis=1), points)
    each = np.arange(draws)
    share, gain, step = (table[each, first, second] for table in (share, gain, step))
    weights = np.zeros(damage.shape)
    weights[each, first] += 1 - np.clip(share, 0, 1)
    weights[each, second] += np.clip(share, 0, 1)
    return weights, np.divide(gain, step, out=np.zeros(draws), where=(step > 0) & (share <= 1))


def _means(
    values: Float[np.ndarray, "item number"], items: Bool[np.ndarray, " item"], counts: Float[np.ndarray, "draw item"]
) -> Float[np.ndarray, "draw number"]:
    """Means over these items, 0 where a draw holds none of them."""
    own = counts[:, items]
    return np.asarray(own @ values[items] / np.maximum(own.sum(axis=1, keepdims=True), 1))


@dataclass(frozen=True)
class Reading:
    """What a method reaches, and the other at the same damage, draw by draw."""

    reached: Float[np.ndarray, " draw"]
    """By the method that is not read off a hull, at its best; so is the damage."""
    damage: Float[np.ndarray, " draw"]
    more: Float[np.ndarray, " draw"]
    """How much more it reaches than the other at this damage."""
    beyond: int
    """On how many halves it does more damage than any setting of the other, whose highest value then holds."""
    below: int
    """On how many it does less than every setting of the other, which is read between no edit and a setting."""


def read(
    mine: Trade,
    other: Trade,
    second: Bool[np.ndarray, " item"],
    scored: Bool[np.ndarray, " item"],
    counts: Float[np.ndarray, "draw item"],
) -> Reading:
    """Read the other method at the mean damage of this one, either half of the items by choices made on the other half.

    Chosen there are this method's setting of greatest merit, the mixture of the other's settings (see `_best_mixture`)
    that does as much damage, and the slope of the other's hull. The half is then scored by what this one reaches more
    than the other, read as that mixture and slope × what damage this one does more: whatever was chosen, the items that
    chose it are not those that are scored. The other is read within its limits, or else those of its points.

    Args:
        mine, other: of the same items. Neither half may be empty.
        second: which items are of the second half.
        scored: the items that are told of; all take part in choosing.
        counts: how many times each draw holds each item; the first draw holds each once.
    """
    told, flags = np.zeros((3, len(counts))), []
    points, size = other.with_none(), np.maximum(counts[:, scored].sum(axis=1), 1)
    for half in (~second, second):
        taken = choose(mine, ~half, counts)[:, None]
        at = np.take_along_axis(_means(mine.damage, ~half, counts), taken, axis=1)[:, 0]
        heights, widths = (_means(of, ~half, counts) for of in points)
        weights, slope = _best_mixture(widths, heights, at)
        share = counts[:, half & scored].sum(axis=1) / size
        reached, damage = (
            np.take_along_axis(_means(of, half & scored, counts), taken, axis=1)[:, 0]
            for of in (mine.reached, mine.damage)
        )
        there, harms = (_means(of, half & scored, counts) for of in points)
        beside, harm = ((weights * of).sum(axis=1) for of in (there, harms))
        least, most = other.limits or (there.min(axis=1), there.max(axis=1))
        told += share * np.stack([reached, damage, reached - np.clip(beside + slope * (damage - harm), least, most)])
        flags.append((at[0] > widths[0].max(), at[0] < widths[0, 1:].min()))
    beyond, below = (int(sum(each)) for each in zip(*flags, strict=True))
    return Reading(told[0], told[1], told[2], beyond, below)


def compare_at_equal_damage(
    mine: Trade, other: Trade, second: Bool[np.ndarray, " item"], scored: Bool[np.ndarray, " item"]
) -> dict[str, Any]:
    """How much more one method reaches than another at equal damage, on the same items.

    Each is read at the damage of the other at its best, and the difference is the mean of both: reading noisy settings
    off a hull helps the method that is not read, and this way it helps neither. Its 95 % interval is of 1,000 bootstrap
    samples of the items, drawn within either half, in each of which everything is chosen anew; NaN for fewer than two
    items. For the arguments see `read`.
    """
    counts = _resampled(second)
    there, back = read(mine, other, second, scored, counts), read(other, mine, second, scored, counts)
    differences, n = (there.more - back.more) / 2, int(scored.sum())
    drawn = differences[1:][counts[1:, scored].any(axis=1)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if n > 1 else (np.nan, np.nan)
    return {
        "n": n,
        "value": float(there.reached[0]) if n else np.nan,
        "damage": float(there.damage[0]) if n else np.nan,
        "other damage": float(back.damage[0]) if n else np.nan,
        "difference": float(differences[0]) if n else np.nan,
        "difference interval": (float(low), float(high)),
        "difference at own damage": float(there.more[0]) if n else np.nan,
        "difference at other damage": float(-back.more[0]) if n else np.nan,
        "beyond": there.beyond,
        "below": there.below,
        "other beyond": back.beyond,
        "other below": back.below,
    }


def _resampled(second: Bool[np.ndarray, " item"]) -> Float[np.ndarray, "draw item"]:
    """How many times samples hold each item: each once, then samples drawn with replacement within either half."""
    rng, counts = np.random.default_rng(0), np.ones((1 + _SAMPLES, len(second)))
    for half in (np.flatnonzero(~second), np.flatnonzero(second)):
        counts[1:, half] = rng.multinomial(len(half), np.full(len(half), 1 / len(half)), size=_SAMPLES)
    return counts

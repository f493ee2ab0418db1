"""Scores of a benchmark as arrays over items and settings: means with intervals, and each method at its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import bootstrap_intervals
from sdxl_sae_kit.studies.equal_damage import Trade, compare_at_equal_damage, cross_fitted, halves
from sdxl_sae_kit.studies.statistics import wilson
from sdxl_sae_kit.studies.transport import Setting

MEASURES = (
    "reached", "target", "kept", "outside", "pixel", "to original", "to edited", "image similarity", "text similarity",
)  # fmt: skip
OUTCOMES = ("reached", "to edited", "image similarity")
"""What tells whether an edit succeeded, the first that was told."""
NEARNESS = {"to edited": -1, "image similarity": 1}
"""Measures that tell of no success by themselves, only beside no edit, and which way is nearer."""
CEILING, FLOOR = "prompt", "none"
"""The changed prompt itself, and no edit at all."""

Row = dict[str, Any]
Line = Mapping[str, Any]
Estimate = tuple[float, tuple[float, float], int]
"""A mean, its interval and n."""


@dataclass(frozen=True)
class Scores:
    """Every scored item at every setting; NaN is what a judge could not tell."""

    kinds: Sequence[str]
    settings: Sequence[Setting]
    values: Mapping[str, Float[np.ndarray, "item setting"]] = field(repr=False)
    """By measure."""

    @classmethod
    def read(cls, lines: Sequence[Line], settings: Sequence[Setting]) -> Scores:
        """From the lines of items that were scored."""
        values = {
            measure: np.array([[_number(line["scores"][s.key][measure]) for s in settings] for line in lines])
            for measure in MEASURES
        }
        return cls(
            [line["kind"] for line in lines],
            settings,
            {measure: each.reshape(len(lines), len(settings)) for measure, each in values.items()},
        )

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """All hookpoints that are edited."""
        return tuple(dict.fromkeys(block for setting in self.settings for block in setting.blocks))

    @cached_property
    def methods(self) -> dict[str, list[int]]:
        """The places of each method's settings at all blocks; the ceiling and the floor are the last two."""
        found: dict[str, list[int]] = {}
        for at, setting in enumerate(self.settings):
            if set(setting.blocks) in (set(), set(self.blocks)):
                found.setdefault(setting.method, []).append(at)
        return {method: found[method] for method in sorted(found, key=(CEILING, FLOOR).__contains__)}

    @property
    def measures(self) -> list[str]:
        """Those that were told for some item."""
        return [measure for measure in MEASURES if self.told(measure)]

    @property
    def judged(self) -> bool:
        """Whether anything tells that an edit succeeded."""
        return any(self.told(measure) for measure in OUTCOMES)

    @property
    def outcome(self) -> str:
        """What tells whether an edit succeeded: the first of `OUTCOMES` that was told.

        Raises:
            KitError: none was.
        """
        for measure in OUTCOMES:
            if self.told(measure):
                return measure
        raise KitError(
            f"Nothing here tells whether edits succeeded: {', '.join(self.measures) or 'no measure'} alone cannot. "
            "Call riebench with a judge that names factors or compares pictures."
        )

    @property
    def gain(self) -> str:
        """The same in degrees: `target` where that was told, else the outcome."""
        return "target" if self.told("target") else self.outcome

    @property
    def harm(self) -> str:
        """What damage is read off: what is kept, else how far it is from the original."""
        return next(measure for measure in ("kept", "to original", "pixel") if self.told(measure))

    def told(self, measure: str) -> bool:
        """Whether it was told for some item."""
        return bool(np.isfinite(self.values[measure]).any())

    def floor(self, measure: str) -> Float[np.ndarray, " item"]:
        """Item by item, without any edit."""
        return self.values[measure][:, self.methods[FLOOR][0]]

    def of(self, mask: Bool[np.ndarray, " item"]) -> Scores:
        """Some of the items."""
        kinds = [kind for kind, mine in zip(self.kinds, mask, strict=True) if mine]
        return Scores(kinds, self.settings, {measure: each[mask] for measure, each in self.values.items()})

    def of_kind(self, kind: str) -> Bool[np.ndarray, " item"]:
        """Which items are of this kind."""
        return np.array([each == kind for each in self.kinds], dtype=bool)

    # Means ------------------------------------------------------------------------------------------------------------

    def means(self) -> list[Row]:
        """A row per setting with every measure, over all items."""
        told = [
            {"method": s.method, "k": s.k, "strength": s.strength, "blocks": s.blocks, "n": len(self)}
            for s in self.settings
        ]
        for measure in MEASURES:
            found = estimates(self.values[measure], shares=measure == "reached")
            told = [row | named(measure, each) for row, each in zip(told, found, strict=True)]
        return told

    # Methods at their best --------------------------------------------------------------------------------------------

    def trade(self, method: str, by: str) -> Trade:
        """What each of a method's settings reaches and what damage it does.

        Reached is the measure `by`; of `to edited` and `image similarity`, how much nearer to the edited prompt's
        picture it comes than without any edit. Damage is 1 − kept; where nothing tells that, the distance to the
        original.
        """
        at, kept = self.methods[method], self.harm == "kept"
        reached, harm = self.values[by][:, at], self.values[self.harm][:, at]
        if by in NEARNESS:
            reached = NEARNESS[by] * (reached - self.floor(by)[:, None])
        return Trade(reached, 1 - harm if kept else harm, _times_kept if kept and by not in NEARNESS else np.subtract)

    def taken(self, method: str) -> Int[np.ndarray, " item"]:
        """The setting at which each item is scored: the method's best on the other half of the items."""
        trade, second = self.trade(method, self.outcome), halves(self.kinds)
        there = _told(trade)
        counts = there.astype(np.float64)[None]
        first, other = cross_fitted(_filled(trade), counts, second)[:, 0].tolist()
        at = np.array(self.methods[method])
        return np.asarray(np.where(second, at[other], at[first]))

    def best(self, method: str) -> Row:
        """Means of every measure, each item at the setting taken for it, and which settings those are."""
        taken = self.taken(method)
        row: Row = {"method": method, "settings": [self.settings[at].key for at in dict.fromkeys(taken.tolist())]}
        row["n"] = len(self)
        columns = np.stack([self.at(measure, taken) for measure in MEASURES], axis=1)
        found = dict(zip(MEASURES, estimates(columns), strict=True))
        found["reached"] = estimates(columns[:, :1], shares=True)[0]
        for measure, each in found.items():
            row |= named(measure, each)
        return row

    def at(self, measure: str, taken: Int[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
        """A measure, each item at its own setting."""
        return np.asarray(self.values[measure][np.arange(len(self)), taken])

    def compare(self, method: str, other: str, by: str) -> Row:
        """One method beside another at equal damage: see `equal_damage.compare_at_equal_damage`."""
        mine, theirs, floor = (self.trade(name, by) for name in (method, other, FLOOR))
        curve = Trade(
            np.concatenate([theirs.reached, floor.reached], axis=1),
            np.concatenate([theirs.damage, np.zeros_like(floor.damage)], axis=1),
            theirs.merit,
        )
        there = _told(mine) & _told(curve)
        second = halves(self.kinds)[there]
        return compare_at_equal_damage(_only(mine, there), _only(curve, there), second)


def estimates(values: Float[np.ndarray, "item number"], *, shares: bool = False) -> list[Estimate]:
    """Means over the items for which each number is told, with 95 % intervals over items and how many items those are.

    Wilson's intervals of shares, whose values are 0 or 1; else bootstrap intervals, of all numbers from the same
    samples.
    """
    there = np.isfinite(values)
    counts = there.sum(axis=0).tolist()
    if shares:
        hits = np.where(there, values, 0).sum(axis=0).round().astype(int).tolist()
        return [(*(wilson(hit, n) if n else _UNKNOWN), n) for hit, n in zip(hits, counts, strict=True)]
    if not len(values):
        return [(*_UNKNOWN, 0)] * values.shape[1]
    rows = np.stack([np.where(there, values, 0), there], axis=-1)
    with np.errstate(invalid="ignore"):
        means, ends = _ratio(rows.mean(axis=0)), bootstrap_intervals(rows, _ratio)
    return [(mean, (low, high), n) for mean, low, high, n in zip(means.tolist(), *ends.tolist(), counts, strict=True)]


def named(name: str, estimate: Estimate) -> Row:
    """An estimate as a row of a table has it."""
    value, interval, n = estimate
    return {name: value, f"{name} interval": interval, f"{name} n": n}


_UNKNOWN = (float("nan"), (float("nan"), float("nan")))


def _ratio(means: Float[np.ndarray, "*draw number 2"]) -> Float[np.ndarray, "*draw number"]:
    return np.asarray(means[..., 0] / means[..., 1])


def _times_kept(reached: Any, damage: Any) -> Any:
    return reached * (1 - damage)


def _told(trade: Trade) -> Bool[np.ndarray, " item"]:
    """The items for which everything is told."""
    return np.asarray(np.isfinite(trade.reached).all(axis=1) & np.isfinite(trade.damage).all(axis=1))


def _only(trade: Trade, mask: Bool[np.ndarray, " item"]) -> Trade:
    return Trade(trade.reached[mask], trade.damage[mask], trade.merit)


def _filled(trade: Trade) -> Trade:
    """With 0 for NaN, where counts of 0 are to leave items out."""
    return Trade(np.nan_to_num(trade.reached), np.nan_to_num(trade.damage), trade.merit)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)

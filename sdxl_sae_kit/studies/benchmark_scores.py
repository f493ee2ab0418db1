"""Scores of a benchmark as arrays over items and settings: means with intervals, and each method at its best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import bootstrap_intervals
from sdxl_sae_kit.studies.equal_damage import Trade, choose, compare_at_equal_damage, halves
from sdxl_sae_kit.studies.scoring import MEASURES
from sdxl_sae_kit.studies.statistics import wilson
from sdxl_sae_kit.studies.transport import ENDS, Setting

OUTCOMES = ("reached", "to edited", "image similarity")
"""What tells whether an edit succeeded, the first that was told."""
NEARNESS = {"to edited": -1, "image similarity": 1}
"""Measures that tell of no success by themselves, only beside no edit, and which way is nearer."""
LESS_IS_BETTER = ("outside", "pixel", "to original", "to edited")
LEAST = 20
"""Items from which on a comparison is concluded from."""
FLOOR, CEILING = ENDS
"""No edit at all, and the changed prompt itself."""

Row = dict[str, Any]
Line = Mapping[str, Any]
Estimate = tuple[float, tuple[float, float], int]
"""A mean, its interval and n."""


@dataclass(frozen=True)
class Scores:
    """Every scored item at every setting; NaN is what a judge could not tell."""

    kinds: Sequence[str]
    """Of every item; items are in order of their kinds."""
    settings: Sequence[Setting]
    values: Mapping[str, Float[np.ndarray, "item setting"]] = field(repr=False)
    """By measure."""
    n_contest: int | None = None
    """So many of the settings, the first, are their methods' grids; the others were tried for their blocks' sake."""

    @classmethod
    def read(cls, lines: Sequence[Line], settings: Sequence[Setting], n_contest: int | None = None) -> Scores:
        """From the lines of items that were scored; what is null there is NaN."""
        told = [[[line["scores"][s.key][measure] for s in settings] for line in lines] for measure in MEASURES]
        values = np.array(told, dtype=np.float64).reshape(len(MEASURES), len(lines), len(settings))
        return cls([line["kind"] for line in lines], settings, dict(zip(MEASURES, values, strict=True)), n_contest)

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """All hookpoints that are edited."""
        return tuple(dict.fromkeys(block for setting in self.settings for block in setting.blocks))

    @cached_property
    def methods(self) -> dict[str, list[int]]:
        """The places of the settings of each method's grid; the ceiling and the floor are the last two."""
        found: dict[str, list[int]] = {}
        for at, setting in enumerate(self.settings):
            tried = self.n_contest is None or at < self.n_contest
            if not setting.blocks or (tried and set(setting.blocks) == set(self.blocks)):
                found.setdefault(setting.method, []).append(at)
        return {method: found[method] for method in sorted(found, key=(CEILING, FLOOR).__contains__)}

    @property
    def measures(self) -> list[str]:
        """Those that were told for some item."""
        return [measure for measure in MEASURES if self.told(measure)]

    @property
    def succeeds(self) -> bool:
        """Whether something tells that edits succeeded."""
        return bool(self._outcomes)

    @property
    def judged(self) -> bool:
        """Whether something tells that edits succeeded, of enough items to choose settings by."""
        return self.succeeds and self._on_both_halves(self.outcome)

    @property
    def _outcomes(self) -> list[str]:
        return [measure for measure in OUTCOMES if self.told(measure)]

    def counted(self, by: str) -> Bool[np.ndarray, " item"]:
        """The items of which this measure and the damage are told at every setting: settings are chosen by them."""
        return np.asarray(np.isfinite(self.values[by]).all(axis=1) & np.isfinite(self.values[self.harm]).all(axis=1))

    def _on_both_halves(self, by: str) -> bool:
        counted, second = self.counted(by), halves(len(self))
        return bool(counted[second].any() and counted[~second].any())

    @property
    def outcome(self) -> str:
        """What tells whether an edit succeeded: the first of `OUTCOMES` that was told.

        Raises:
            KitError: none was.
        """
        if self._outcomes:
            return self._outcomes[0]
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
        original. The best setting has the greatest reached × kept; where those are not told, there is no best, so it is
        the one that reaches most.
        """
        at, kept, sign = self.methods[method], self.harm == "kept", NEARNESS.get(by, 1)
        reached, harm = sign * self.values[by][:, at], self.values[self.harm][:, at]
        floor = sign * self.floor(by)
        if by in NEARNESS:
            reached, floor = reached - floor[:, None], np.zeros_like(floor)
        best = _times_kept if self.by_product(by) else _reached_alone
        return Trade(reached, 1 - harm if kept else harm, floor, best, None if by in NEARNESS else (0.0, 1.0))

    def by_product(self, by: str) -> bool:
        """Whether settings are chosen by reached × kept; else by reached alone."""
        return self.harm == "kept" and by not in NEARNESS

    def check_halves(self, by: str) -> None:
        """Refuse to choose settings by what was told of no item of one half.

        Raises:
            KitError: so it is.
        """
        if len(self) < 2:
            raise KitError("At least 2 items must be scored; 1 is. Run more.")
        if not self._on_both_halves(by):
            raise KitError(
                f"Settings are chosen on one half of the items for the other, and {by} and {self.harm} are told of "
                f"{int(self.counted(by).sum())} of {len(self)} items, which are not on both halves. Score more items."
            )

    def taken(self, method: str) -> Int[np.ndarray, " item"]:
        """The setting at which each item is scored: the method's best on the other half of the items."""
        self.check_halves(self.outcome)
        second = halves(len(self))
        first, other = (self._best_on(method, half) for half in (second, ~second))
        return np.where(second, other, first)

    def shown(self, method: str) -> Int[np.ndarray, " item"]:
        """The same where that can be chosen, else the best on all items, which flatters: for pictures alone."""
        if self.judged:
            return self.taken(method)
        return np.full(len(self), self._best_on(method, np.ones(len(self), dtype=bool)))

    def _best_on(self, method: str, items: Bool[np.ndarray, " item"]) -> int:
        best = choose(self.trade(method, self.outcome), items & self.counted(self.outcome), np.ones((1, len(self))))
        return self.methods[method][int(best[0])]

    def best(self, method: str) -> Row:
        """Means of every measure, each item at the setting taken for it, and which settings those are."""
        taken = self.taken(method)
        row: Row = {"method": method, "settings": [self.settings[at].key for at in dict.fromkeys(taken.tolist())]}
        row["n"] = len(self)
        for measure in MEASURES:
            (found,) = estimates(self.at(measure, taken)[:, None], shares=measure == "reached")
            row |= named(measure, found)
        return row

    def at(self, measure: str, taken: Int[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
        """A measure, each item at its own setting."""
        return np.asarray(self.values[measure][np.arange(len(self)), taken])

    def compare(self, method: str, other: str, by: str, kind: str | None = None) -> Row:
        """One method beside another at equal damage: see `equal_damage.compare_at_equal_damage`."""
        self.check_halves(by)
        there = self.counted(by)
        scored = there if kind is None else there & self.of_kind(kind)
        mine, theirs = (_only(self.trade(name, by), there) for name in (method, other))
        return compare_at_equal_damage(mine, theirs, halves(len(self))[there], scored[there])


def estimates(values: Float[np.ndarray, "item number"], *, shares: bool = False) -> list[Estimate]:
    """Means over the items for which each number is told, with 95 % intervals over items and how many items those are.

    Wilson's intervals of shares, whose values are 0 or 1; else bootstrap intervals, of all numbers from the same
    samples, and NaN for fewer than two items.
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
    ends[:, there.sum(axis=0) < 2] = np.nan  # of one value samples tell nothing
    return [(mean, (low, high), n) for mean, low, high, n in zip(means.tolist(), *ends.tolist(), counts, strict=True)]


def named(name: str, estimate: Estimate) -> Row:
    """An estimate as a row of a table has it."""
    value, interval, n = estimate
    return {name: value, f"{name} interval": interval, f"{name} n": n}


def plain(told: Any) -> Any:
    """The same for JSON: lists for tuples, null for NaN."""
    if isinstance(told, Mapping):
        return {key: plain(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [plain(each) for each in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


_UNKNOWN = (float("nan"), (float("nan"), float("nan")))


def _ratio(means: Float[np.ndarray, "*draw number 2"]) -> Float[np.ndarray, "*draw number"]:
    return np.asarray(means[..., 0] / means[..., 1])


def _times_kept(reached: Any, damage: Any) -> Any:
    return reached * (1 - damage)


def _reached_alone(reached: Any, _: Any) -> Any:
    return reached


def _only(trade: Trade, mask: Bool[np.ndarray, " item"]) -> Trade:
    return Trade(trade.reached[mask], trade.damage[mask], trade.unedited[mask], trade.merit, trade.limits)

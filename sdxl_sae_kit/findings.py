"""What a search finds: features ranked by a score, with its formula, its n and, where it is estimated, an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, overload

from sdxl_sae_kit import html

_SHOWN = 16


@dataclass(frozen=True)
class Found:
    """One feature that a search found."""

    hookpoint: str
    """Empty where the search does not know it."""
    latent: int
    score: float
    """In the unit of `Results.measure`; NaN where it is not known."""
    n: int | None
    """Over how many things the score is taken; `Results.unit` says which. None where it is not taken over any."""
    low: float = nan
    """Lower end of the score's 95 % interval; NaN where the score is no estimate."""
    high: float = nan
    """Upper end."""
    chance: float = nan
    """What a score must exceed, up or down; NaN where that is not known."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Other facts, by the name of their column."""

    @property
    def beyond_chance(self) -> bool:
        """Whether chance would hardly give a score so far from 0; False where `chance` is not known."""
        return abs(self.score) > self.chance


@dataclass(frozen=True, repr=False)
class Results(Sequence[Found]):
    """Features in the order of their score, strongest first."""

    found: tuple[Found, ...]
    measure: str
    """Name of the score."""
    unit: str
    """What n counts."""
    formula: str
    """What the score is, in words."""

    def __len__(self) -> int:
        return len(self.found)

    @overload
    def __getitem__(self, place: int) -> Found: ...
    @overload
    def __getitem__(self, place: slice) -> Results: ...
    def __getitem__(self, place: int | slice) -> Found | Results:
        if not isinstance(place, slice):
            return self.found[place]
        return Results(self.found[place], self.measure, self.unit, self.formula)

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature."""
        return [self._row(found) for found in self.found]

    def _row(self, found: Found) -> dict[str, Any]:
        row: dict[str, Any] = {"hookpoint": found.hookpoint} if found.hookpoint else {}
        row |= {"feature": str(found.latent), self.measure: found.score}
        if isfinite(found.low):
            row["95 % interval"] = f"[{html.short(found.low)}, {html.short(found.high)}]"
        if isfinite(found.chance):
            row |= {"chance": found.chance, "beyond chance": "yes" if found.beyond_chance else "no"}
        row |= dict(found.beside) | {self.unit: "–" if found.n is None else found.n}
        return {name: "–" if value != value else value for name, value in row.items()}  # NaN: not known

    def _repr_html_(self) -> str:
        last = range(max(_SHOWN, len(self) - _SHOWN), len(self))
        opposite = [self._row(self.found[place]) for place in last if self.found[place].score < 0]
        shown = self[:_SHOWN].rows() + opposite
        caption = f"{len(shown)} of {len(self):,} features found, ranked by {self.measure}: {self.formula}"
        return html.fragment(html.table(shown, caption))

    def __repr__(self) -> str:
        first = ", ".join(f"{f.latent} ({html.short(f.score)})" for f in self.found[:5])
        return f"Results: {len(self):,} features by {self.measure}; {first}{', …' if len(self) > 5 else ''}"

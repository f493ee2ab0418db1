"""What a run of RIEBench found: methods on the same items, at their best and at equal damage, by kind and by block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.files import writable, write_atomically
from sdxl_sae_kit.items import EDIT_TYPES
from sdxl_sae_kit.studies import benchmark_figures as figures
from sdxl_sae_kit.studies import benchmark_views as views
from sdxl_sae_kit.studies.benchmark_blocks import agreement, chosen_shares, gains
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, Line, Row, Scores, estimates, named, plain
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.scoring import MEASURES
from sdxl_sae_kit.studies.transport import Setting

FILE, PICTURE = "items.jsonl", "item-{}.webp"
FORMAT, VERSION, SCHEMA = "sdxl-sae-kit riebench", 1, "urn:sdxl-sae-kit:riebench:1"
_BY = ("reached", "target", "to edited", "image similarity")


@dataclass(frozen=True)
class RIEBench:
    """How far methods bring pictures to what an edited prompt shows, and what else they change, item by item.

    Measures, of each item at each setting: `reached` (0 or 1: the judge's likeliest answers are what the item wants),
    `target` (the least probability it gives one of these), `kept` (share of the other factors whose answer stays),
    `outside` (change outside the masks), `pixel` (mean |difference| of colours 0 to 1), `to original` and `to edited`
    (the judge's distances, from 0), `image similarity` to the edited prompt's picture and `text similarity` to its
    text, both at most 1. Items whose masks are empty are in `failed`, never dropped silently. What takes a measure
    raises KitError for one that was not told, or where nothing was scored.

    >>> bench = RIEBench.open(folder)  # doctest: +SKIP
    >>> bench.compare("sae", "random")["difference interval"]  # doctest: +SKIP
    """

    artifact: Artifact = field(repr=False)
    lines: Mapping[str, Line] = field(repr=False)
    """Every item's line by its name, in order of kinds and names."""

    @classmethod
    def open(cls, folder: Path | str) -> RIEBench:
        """Read what `riebench` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "riebench", "riebench")
        found = Lines(artifact, FILE)
        kinds = list(EDIT_TYPES.values())
        order = sorted(found, key=lambda name: (kinds.index(found[name]["kind"]), name))
        return cls(artifact, {name: found[name] for name in order})

    @cached_property
    def settings(self) -> list[Setting]:
        """Every setting that was measured, in order; `prompt` and `none` are among them."""
        told = [Setting(m, k, strength, tuple(blocks)) for m, k, strength, blocks in self.artifact.recipe["settings"]]
        return list(dict.fromkeys([*told, Setting(CEILING, None, 0.0, ()), Setting(FLOOR, None, 0.0, ())]))

    @cached_property
    def failed(self) -> list[Row]:
        """A row per item that could not be scored: `item`, `kind`, `reason`."""
        return [
            {"item": name, "kind": line["kind"], "reason": line["failed"]}
            for name, line in self.lines.items()
            if line["failed"] is not None
        ]

    @cached_property
    def scored(self) -> list[tuple[str, Line]]:
        """The items that were scored, by name, in the order of `scores`."""
        return [(name, line) for name, line in self.lines.items() if line["failed"] is None]

    @cached_property
    def scores(self) -> Scores:
        """The scores as arrays.

        Raises:
            KitError: no item was scored.
        """
        if not self.scored:
            raise KitError(f"All {len(self.failed)} items failed, so nothing was scored: see .failed for the reasons.")
        return Scores.read([line for _, line in self.scored], self.settings, self.artifact.recipe.get("n_contest"))

    @property
    def n(self) -> int:
        """Items that were scored."""
        return len(self.scored)

    @property
    def methods(self) -> list[str]:
        """Those that were run, `none` and `prompt` last."""
        return list(self.scores.methods)

    @property
    def edits(self) -> list[str]:
        """The same without `none` and `prompt`."""
        return [method for method in self.methods if method not in (CEILING, FLOOR)]

    @cached_property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Of every kind of edit that was asked for, in the benchmark's order, how many items were scored and failed."""
        found: dict[str, tuple[int, int]] = {}
        for line in self.lines.values():
            scored, failed = found.get(line["kind"], (0, 0))
            lost = line["failed"] is not None
            found[line["kind"]] = scored + (not lost), failed + lost
        return found

    # Numbers ----------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """A row per setting over all scored items: `method`, `k`, `strength`, `blocks`, `n` and each measure's mean.

        Beside each measure its `… interval` (95 %, over items: Wilson's of `reached`, else bootstrap) and `… n`, of how
        many items it was told; NaN where it never was.
        """
        return [dict(row) for row in self._rows]

    @cached_property
    def _rows(self) -> list[Row]:
        return self.scores.means()

    def best(self, method: str) -> Row:
        """A method at its best setting at all blocks, chosen so that choosing does not flatter.

        Items are cut into halves, every other one in order of kinds; those of a half are scored at the setting of
        greatest mean(reached) × mean(kept) on the *other* half. Where the judge knows no factors, nothing tells a best
        setting: it is the one that comes nearest to the edited prompt's picture, so the strongest. Returns the measures
        as in `rows`, every item counting once, with intervals over items given the settings; and `settings`, those
        that were taken.

        Raises:
            KitError: no such method was run, or too few items were scored to choose by.
        """
        return self.scores.best(self._method(method))

    @cached_property
    def _best(self) -> dict[str, Row]:
        return {method: self.scores.best(method) for method in self.methods} if self.n and self.scores.judged else {}

    def compare(self, method: str, other: str, by: str | None = None, kind: str | None = None) -> Row:
        """How much more a method reaches than another at equal damage, on the same items.

        Each is read at the damage of the other at its best: off the upper concave hull of its settings' means over
        damage, no edit being at damage 0. Settings and hulls are chosen on one half of the items for the other.

        Args:
            method, other: of those that were run.
            by: "reached", "target" (the probability), "to edited" or "image similarity" (how much nearer than without
                any edit); by default the first that was told, `target` aside. Settings are chosen by it too.
            kind: a kind of edit to tell of alone; choices are still made on all kinds.

        Returns:
            `difference`, the mean of `difference at own damage` and `difference at other damage`, with its 95 %
            bootstrap interval over items (everything chosen anew in each sample); `value` (of `by`) and `damage` at its
            best, `other damage`; `n`; `beyond`: on how many halves of the items it does more damage than any setting of
            the other, whose highest value then holds; `below`: on how many less than all of them, the other being read
            on the line to no edit; `other beyond`, `other below`: the same of the other; `verdict`: "more", "less",
            "not told apart", or "too few items" (under 20).

        Raises:
            KitError: no such method was run, both are the same, nothing tells what is asked, or too few items were
                scored to choose by.
        """
        by = by or self.scores.outcome
        if by not in _BY or not self.scores.told(by):
            raise KitError(f"compare by {by!r}: this result tells {', '.join(m for m in _BY if self.scores.told(m))}.")
        pair: Row = {"method": self._method(method), "other": self._method(other), "by": by, "kind": self._kind(kind)}
        if method == other:
            raise KitError(f"compare: both are {method!r}. Name two of {', '.join(self.methods)}.")
        found = self.scores.compare(method, other, by, kind)
        formulas = {"damage is": views.damage_formula(self.scores), "chosen by": views.choice_formula(self.scores, by)}
        return pair | found | {"verdict": views.verdict(found)} | formulas

    @cached_property
    def _pairs(self) -> list[Row]:
        return self._compared(None)

    @cached_property
    def _pairs_by_kind(self) -> list[Row]:
        return [row for kind, (scored, _) in self.kinds.items() if scored for row in self._compared(kind)]

    def _compared(self, kind: str | None) -> list[Row]:
        """The first method (`sae` if it was run) beside each other one."""
        edits = self.edits if self._best else []
        first = "sae" if "sae" in edits else "".join(edits[:1])
        return [self.compare(first, other, kind=kind) for other in edits if other != first]

    def kind_rows(self, measure: str | None = None) -> list[Row]:
        """A row per kind and method at its best: mean of a measure with its interval and n; by default the outcome.

        Of a kind whose items all failed the mean is NaN and n 0; `failed` says how many did.
        """
        measure = self._measure(measure or self.scores.outcome)
        columns = np.stack([self.scores.at(measure, self.scores.taken(method)) for method in self.methods], axis=1)
        rows = []
        for kind, (_, failed) in self.kinds.items():
            found = estimates(columns[self.scores.of_kind(kind)], shares=measure == "reached")
            for method, each in zip(self.methods, found, strict=True):
                rows.append({"kind": kind, "method": method, "failed": failed} | named(measure, each))
        return rows

    def block_rows(self, measure: str | None = None) -> list[Row]:
        """A row per kind (and "all") and block: what the block does `alone`, and what is lost where it is `left out`.

        Of the setting that `by_block` named; no rows where none was. `alone`: mean of the measure less that without any
        edit; `left out`: that with all blocks less that without this one; paired, with 95 % bootstrap intervals over
        items. The measure is by default `target`, or `to edited`, where less is better.
        """
        return gains(self.scores, self._measure(measure or self.scores.gain))

    def choices(self) -> list[Row]:
        """A row per kind (and "all") and block: the share of `sae`'s features `added` and `removed` there.

        Over items, with 95 % bootstrap intervals; `expected` if features were spread by their numbers in the blocks.
        """
        chosen = [line["chosen"] for _, line in self.scored]
        return chosen_shares(self.scores, chosen, self.artifact.recipe.get("features", {}))

    def block_agreement(self, other: RIEBench) -> Row:
        """Whether two results (other seeds, SAEs or items) agree on which block does most for which kind.

        See `benchmark_blocks.agreement`: Spearman's ρ of what each block does alone within kinds, the same of what is
        special to kinds, each with p and interval, and how often the block that does most is the same.

        Raises:
            KitError: they are the same result, one of them was run without `by_block`, or they are of other settings,
                blocks or kinds.
        """
        if not isinstance(other, RIEBench):
            raise KitError(f"block_agreement: pass another RIEBench, not {type(other).__name__}.")
        if self.artifact.recipe == other.artifact.recipe:
            raise KitError("block_agreement: both are the same result. Pass one of other seeds, SAEs or items.")
        return agreement(self.scores, other.scores, self.scores.gain)

    def _method(self, name: str) -> str:
        if name not in self.methods:
            hint = did_you_mean(name, self.methods)
            raise KitError(f"No method {name!r} in this result; it has {', '.join(self.methods)}.{hint}")
        return name

    def _kind(self, name: str | None) -> str | None:
        if name is not None and name not in list(self.kinds):
            hint = did_you_mean(name, self.kinds)
            raise KitError(f"No items of kind {name!r} in this result; it has {', '.join(self.kinds)}.{hint}")
        return name

    def _measure(self, name: str) -> str:
        if name not in self.scores.measures:
            hint = did_you_mean(name, self.scores.measures)
            raise KitError(f"Measure {name!r} was not told; this result has {', '.join(self.scores.measures)}.{hint}")
        return name

    # Figures ----------------------------------------------------------------------------------------------------------

    def plot(self, x: str | None = None, y: str | None = None) -> Any:
        """Two measures of every setting of the methods' grids, with `prompt` and `none` marked (plotly).

        The line of a method is its front: what no setting of it, no edit, or mixture of them beats in both measures.
        By default what is kept and what is reached, or, where the judge knows no factors, both distances.
        """
        x, y = self._measure(x or self.scores.harm), self._measure(y or self.scores.outcome)
        return figures.trade_offs(self.scores, self._rows, x, y)

    def plot_kinds(self, measure: str | None = None) -> Any:
        """A measure by kind with its intervals, each method at its best (plotly); by default the outcome."""
        measure = measure or self.scores.outcome
        return figures.kind_points(self.scores, self.kind_rows(measure), self.kinds, measure)

    def plot_blocks(self, measure: str | None = None, what: str = "alone") -> Any:
        """Heat map of what each block does for each kind of edit, blue where that is better (plotly).

        Args:
            measure: by default `target`, or what tells success.
            what: "alone", beside no edit, or "left out", what is lost without it.

        Raises:
            KitError: no block was tried by itself, or `what` is neither.
        """
        return figures.block_map(self.scores, self.block_rows(measure), measure or self.scores.gain, what)

    def contact_sheet(self) -> str:
        """HTML of each method's best, median and worst item, by a rule that it states."""
        return views.contact_sheet(self.scores, self.scored, self._picture)

    def _picture(self, place: int) -> bytes:
        return self.artifact.file(PICTURE.format(place)).read_bytes()

    # Results for others -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, as the package's `riebench.schema.json` says; what is not told is null."""
        items = [
            {"name": name} | {key: line.get(key) for key in ("kind", "original", "edited", "seed", "target", "failed")}
            for name, line in self.lines.items()
        ]
        told: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "schema": SCHEMA,
            "recipe": dict(self.artifact.recipe),
            "settings": [{"key": s.key, "method": s.method, "k": s.k, "strength": s.strength, "blocks": s.blocks}
                         for s in self.settings],
            "items": items,
            "scores": {name: line["scores"] for name, line in self.scored},
            "chosen": {name: line["chosen"] for name, line in self.scored},
            "rows": self.rows() if self.n else [],
            "best": list(self._best.values()),
            "comparisons": [*self._pairs, *self._pairs_by_kind],
            "kinds": self._kind_measures(),
            "blocks": self.block_rows() if self._best else [],
            "choices": self.choices() if self.n else [],
        }  # fmt: skip
        made: dict[str, Any] = plain(told)
        return made

    def _kind_measures(self) -> list[Row]:
        """`kind_rows` of every measure that was told, one row per kind and method."""
        found = map(self.kind_rows, self.scores.measures if self._best else [])
        return [{key: value for row in rows for key, value in row.items()} for rows in zip(*found, strict=True)]

    def write_json(self, path: Path | str) -> Path:
        """Write `to_json` to a file; returns where it is.

        Raises:
            KitError: it cannot be written there.
        """
        if not isinstance(path, str | PathLike):
            raise KitError(f"write_json: name a file, as text or a Path, not {path!r}.")
        target = writable("benchmark", Path(path))
        told = json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False).encode()
        try:
            write_atomically(target, told)
        except OSError as error:
            raise KitError(f"The benchmark cannot go to {target}: {error}. Choose another place.") from None
        return target

    def to_frame(self) -> Any:
        """A pandas DataFrame, a row per item and setting; failed items have a reason and no scores.

        Raises:
            KitError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise KitError(
                "to_frame needs pandas, which is not installed. Install it with pip install pandas."
            ) from None
        return pandas.DataFrame(
            [
                {"item": name} | {key: line[key] for key in ("kind", "original", "edited", "seed", "failed")}
                | {"setting": s.key, "method": s.method, "k": s.k, "strength": s.strength, "blocks": "+".join(s.blocks)}
                | {m: line["scores"][s.key][m] if line["failed"] is None else None for m in MEASURES}
                for name, line in self.lines.items()
                for s in self.settings
            ]
        )  # fmt: skip

    def sentence(self) -> str:
        """What the numbers say; that a method reaches more only where the interval of the difference is above 0."""
        return " ".join(self._clauses())

    def _clauses(self) -> list[str]:
        if not self.n:
            return [f"All {len(self.failed)} items failed, so nothing can be told: see the reasons in .failed."]
        return views.clauses(self.scores, len(self.failed), self._best, self._pairs)

    def _repr_html_(self) -> str:
        title = html.heading("RIEBench: editing while the picture is being made", views.paragraph(self._clauses()))
        folds = {"Every setting": views.every_setting(self.scores, self._rows)} if self.n else {}
        folds |= self._by_parts() if self._best else {}
        if self.n and self.scores.succeeds:
            folds["Best, median and worst items"] = self.contact_sheet()
        if self.failed:
            folds[f"Failed items ({len(self.failed)})"] = html.table(self.failed, "They count for no method")
        best = views.at_best(self.scores, self._best, self._pairs) if self._best else ""
        return html.fragment(title, best, *(html.folded(name, part) for name, part in folds.items() if part))

    def _by_parts(self) -> dict[str, str]:
        """By kind and by block."""
        return {
            "Kinds of edits": views.by_kind(self.scores, self.kind_rows(), self._pairs_by_kind),
            "Blocks": views.by_block(self.scores, self.block_rows()),
            "Where features are chosen": views.by_choice(self.choices()),
        }

    def __repr__(self) -> str:
        return f"RIEBench of {self.n} items and {len(self.settings)} settings: {self.sentence()}"

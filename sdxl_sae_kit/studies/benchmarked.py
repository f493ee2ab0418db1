"""What a run of RIEBench found: methods on the same items, at their best and at equal damage, by kind and by block."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.files import writable, write_atomically
from sdxl_sae_kit.maps import gain_map
from sdxl_sae_kit.plots import bars_by_group, pareto
from sdxl_sae_kit.studies import benchmark_views as views
from sdxl_sae_kit.studies.benchmark_blocks import agreement, chosen_shares, gains
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, MEASURES, Line, Row, Scores, estimates, named
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.transport import Setting

FILE, PICTURE = "items.jsonl", "item-{}.webp"
FORMAT, VERSION, SCHEMA = "sdxl-sae-kit riebench", 1, "urn:sdxl-sae-kit:riebench:1"
_BY = ("reached", "target", "to edited", "image similarity")


@dataclass(frozen=True)
class RIEBench:
    """How far methods bring pictures to what an edited prompt shows, and what else they change, item by item.

    Measures, of each item at each setting: `reached` (0 or 1: the judge's likeliest answer is the target), `target`
    (the probability it gives it), `kept` (share of the other factors whose answer stays), `outside` (change outside
    the masks), `pixel`, `to original` and `to edited` (distances), `image similarity` to the edited prompt's picture
    and `text similarity` to its text. Items whose masks are empty are in `failed`, never dropped silently.

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
        return cls(
            artifact, {name: found[name] for name in sorted(found, key=lambda name: (found[name]["kind"], name))}
        )

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
        """The scores as arrays."""
        return Scores.read([line for _, line in self.scored], self.settings)

    @property
    def n(self) -> int:
        """Items that were scored."""
        return len(self.scored)

    @property
    def methods(self) -> list[str]:
        """Those that were run, `prompt` and `none` last."""
        return list(self.scores.methods)

    # Numbers ----------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """A row per setting over all scored items: `method`, `k`, `strength`, `blocks`, `n` and each measure's mean.

        Beside each measure its `… interval` (95 %, over items: Wilson's of `reached`, else bootstrap, from the same
        samples at all settings) and `… n`, for how many items it was told; NaN where it never was.
        """
        return [dict(row) for row in self._rows]

    @cached_property
    def _rows(self) -> list[Row]:
        return self.scores.means()

    def best(self, method: str) -> Row:
        """A method at its best setting at all blocks, chosen so that choosing does not flatter.

        Items are cut into halves, every other one of each kind; those of a half are scored at the setting of greatest
        mean(reached) × mean(kept) on the *other* half, or, where the judge knows no factors, of least mean(to edited) +
        mean(to original). Returns the measures as in `rows`, and `settings`, those that were taken.

        Raises:
            KitError: no such method was run.
        """
        return self.scores.best(self._method(method))

    @cached_property
    def _best(self) -> dict[str, Row]:
        return {method: self.scores.best(method) for method in self.methods} if self.n and self.scores.judged else {}

    def compare(self, method: str, other: str, by: str | None = None) -> Row:
        """What a method at its best reaches, and the other at most at equal damage, on the same items.

        Args:
            method: its settings are cross-fitted, as in `best`.
            other: read off the upper concave hull of its settings' means over damage, no edit being at damage 0.
            by: "reached", "target" (the probability), "to edited" or "image similarity" (how much nearer than without
                any edit); by default the first that was told, `target` aside. Settings are chosen by it too.

        Returns:
            `reached`, `damage`, `other reached` at that damage and `difference`, each with its 95 % bootstrap interval
            over items (choice and hull made anew in every sample); `n`; `beyond`, whether it does more damage than any
            setting of the other, whose highest value then holds; and what damage and choice are. An interval of the
            difference above 0 says that the method is better; as noise lifts hulls, one below 0 does not yet say that
            the other is: for that, compare the other with it.

        Raises:
            KitError: no such method was run, or nothing tells what is asked.
        """
        by = by or self.scores.outcome
        if by not in _BY or not self.scores.told(by):
            raise KitError(f"compare by {by!r}: this result tells {', '.join(m for m in _BY if self.scores.told(m))}.")
        pair: Row = {"method": self._method(method), "other": self._method(other), "by": by}
        formulas = {"damage is": views.damage_formula(self.scores), "chosen by": views.choice_formula(self.scores, by)}
        return pair | self.scores.compare(method, other, by) | formulas

    @cached_property
    def _pairs(self) -> list[tuple[Row, Row]]:
        """The first method (`sae` if it was run) beside each other one, and each beside it."""
        edits = [method for method in self.methods if method not in (CEILING, FLOOR)]
        first = "sae" if "sae" in edits else next(iter(edits), "")
        rivals = [method for method in edits if method != first] if self._best else []
        return [(self.compare(first, other), self.compare(other, first)) for other in rivals]

    def kind_rows(self, measure: str | None = None) -> list[Row]:
        """A row per kind and method at its best: mean of a measure with its interval and n; by default the outcome."""
        measure = self._measure(measure or self.scores.outcome)
        columns = np.stack([self.scores.at(measure, self.scores.taken(method)) for method in self.methods], axis=1)
        shares = measure == "reached"
        return [
            {"kind": kind, "method": method} | named(measure, each)
            for kind in dict.fromkeys(self.scores.kinds)
            for method, each in zip(
                self.methods, estimates(columns[self.scores.of_kind(kind)], shares=shares), strict=True
            )
        ]

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

        See `benchmark_blocks.agreement`: Spearman's ρ over kind × block of what each block does alone, and its mean
        within kinds, with p by shuffling blocks within kinds.

        Raises:
            KitError: one of them was run without `by_block`, or they are of other blocks or kinds.
        """
        return agreement(self.block_rows(), other.block_rows(self.scores.gain))

    def _method(self, name: str) -> str:
        if name not in self.methods:
            hint = did_you_mean(name, self.methods)
            raise KitError(f"No method {name!r} in this result; it has {', '.join(self.methods)}.{hint}")
        return name

    def _measure(self, name: str) -> str:
        if name not in self.scores.measures:
            hint = did_you_mean(name, self.scores.measures)
            raise KitError(f"Measure {name!r} was not told; this result has {', '.join(self.scores.measures)}.{hint}")
        return name

    # Figures ----------------------------------------------------------------------------------------------------------

    def plot(self, x: str | None = None, y: str | None = None) -> Any:
        """Two measures of every setting at all blocks, a line per method, with `prompt` and `none` marked (plotly).

        By default what is kept and what is reached, or, where the judge knows no factors, both distances.
        """
        x, y = self._measure(x or self.scores.harm), self._measure(y or self.scores.outcome)
        lines = {
            method: [
                (
                    (row := self._rows[at])[x],
                    *row[f"{x} interval"],
                    row[y],
                    *row[f"{y} interval"],
                    self.settings[at].key,
                )
                for at in places
            ]
            for method, places in self.scores.methods.items()
        }
        title = f"{y} against {x}: every setting, {self.n} items"
        return pareto(lines, (CEILING, FLOOR), title=title, x=x, y=y)

    def plot_kinds(self, measure: str | None = None) -> Any:
        """Bars of a measure by kind, each method at its best (plotly); by default the outcome."""
        measure = measure or self.scores.outcome
        rows = self.kind_rows(measure)
        bars = {
            method: [(row[measure], *row[f"{measure} interval"]) for row in rows if row["method"] == method]
            for method in self.methods
        }
        kinds = [f"{kind} ({row_n})" for kind, row_n in self._kind_counts().items()]
        return bars_by_group(kinds, bars, title=f"{measure} by kind of edit, each method at its best", y=measure)

    def _kind_counts(self) -> dict[str, int]:
        return {kind: int(self.scores.of_kind(kind).sum()) for kind in dict.fromkeys(self.scores.kinds)}

    def plot_blocks(self, measure: str | None = None) -> Any:
        """Heat map of what each block does alone for each kind of edit (plotly).

        Raises:
            KitError: no block was tried by itself.
        """
        rows = self.block_rows(measure)
        if not rows:
            raise KitError("plot_blocks: no block was tried by itself. Call riebench with by_block.")
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        told = np.array([[row["alone"], *row["alone interval"]] for row in rows])
        told = told.reshape(len(kinds), len(self.scores.blocks), 3)
        of = measure or self.scores.gain
        title = f"Change of {of} by each block alone, beside no edit{' (below 0 is nearer)' * (of == 'to edited')}"
        return gain_map(kinds, self.scores.blocks, told, title=title)

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
            "rows": self.rows(),
            "best": list(self._best.values()),
            "comparisons": [row for pair in self._pairs for row in pair],
            "blocks": self.block_rows() if self._best else [],
        }  # fmt: skip
        plain: dict[str, Any] = _plain(told)
        return plain

    def write_json(self, path: Path | str) -> Path:
        """Write `to_json` to a file; returns where it is.

        Raises:
            KitError: it cannot be written there.
        """
        target = writable("benchmark", Path(path))
        write_atomically(target, json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False).encode())
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
        """What the numbers say; that one method is better only where the interval of the difference does not hold 0."""
        return views.sentence(self.scores, len(self.failed), self._best, self._pairs)

    def _repr_html_(self) -> str:
        title = html.heading("RIEBench: editing while the picture is being made", html.escape(self.sentence()))
        grid = html.table(views.grid_table(self.scores, self._rows), views.GRID) if self.n else ""
        folds = {"Every setting": grid} | (self._by_parts() if self._best else {})
        if self.failed:
            folds[f"Failed items ({len(self.failed)})"] = html.table(self.failed, "They count for no method")
        best = self._at_best() if self._best else ""
        return html.fragment(title, best, *(html.folded(name, part) for name, part in folds.items() if part))

    def _at_best(self) -> str:
        caption = f"{views.BEST}. Best: {views.choice_formula(self.scores)}"
        best = html.table(views.best_table(self.scores, self._best), caption)
        return best + html.table(views.pair_table(self._pairs), views.EQUAL_DAMAGE) if self._pairs else best

    def _by_parts(self) -> dict[str, str]:
        """By kind, by block and item by item."""
        kinds, blocks, choices = self.kind_rows(), self.block_rows(), self.choices()
        by_kind = f"Mean of {self.scores.outcome}, each method at its best, with 95 % intervals over items"
        by_block = views.block_table(blocks, ("alone", "left out")), f"{views.BLOCKS}; of {self.scores.gain}"
        by_choice = views.block_table(choices, ("added", "removed", "expected")), views.CHOICES
        return {
            "Kinds of edits": html.table(views.kind_table(kinds, self.scores.outcome), by_kind),
            "Blocks": html.table(*by_block) if blocks else "",
            "Where features are chosen": html.table(*by_choice) if choices else "",
            "Best, median and worst items": self.contact_sheet(),
        }

    def __repr__(self) -> str:
        return f"RIEBench of {self.n} items and {len(self.settings)} settings: {self.sentence()}"


def _plain(told: Any) -> Any:
    """The same for JSON: lists for tuples, null for NaN."""
    if isinstance(told, Mapping):
        return {key: _plain(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_plain(each) for each in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told

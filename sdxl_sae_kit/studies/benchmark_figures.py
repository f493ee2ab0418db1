"""Figures of a benchmark's numbers: what is paid for what is got, kinds of edits, and blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.maps import gain_map
from sdxl_sae_kit.plots import pareto, points_by_group
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, LESS_IS_BETTER, Row, Scores
from sdxl_sae_kit.studies.equal_damage import hull

_WHAT = {"alone": "{Gain} of {of} by each block alone, beside no edit", "left out": "{of} lost without each block"}


def trade_offs(scores: Scores, rows: Sequence[Row], x: str, y: str) -> go.Figure:
    """Two measures of every setting of the methods' grids, and each method's front. `rows`: one per setting."""
    points = {
        method: [
            (row[x], *row[f"{x} interval"], row[y], *row[f"{y} interval"], scores.settings[at].key)
            for at in places
            for row in (rows[at],)
        ]
        for method, places in scores.methods.items()
    }
    fronts = {method: _front(scores, rows, method, x, y) for method in points if method not in (CEILING, FLOOR)}
    title = f"{y} against {x}: every setting, {counted(len(scores), 'items')}; lines are fronts"
    return pareto(points, fronts, title=title, x=x, y=y)


def _front(scores: Scores, rows: Sequence[Row], method: str, x: str, y: str) -> list[tuple[float, float]]:
    """What no setting of a method, no edit, or mixture of them beats in both measures."""
    points = [(rows[at][x], rows[at][y]) for at in (*scores.methods[FLOOR], *scores.methods[method])]
    worse, better = (1 if x in LESS_IS_BETTER else -1), (-1 if y in LESS_IS_BETTER else 1)
    xs, ys = np.array(points, dtype=np.float64).T
    return [points[at] for at in hull(worse * xs, better * ys)]


def kind_points(scores: Scores, rows: Sequence[Row], kinds: Mapping[str, tuple[int, int]], measure: str) -> go.Figure:
    """A measure by kind and method. `rows`: of `RIEBench.kind_rows`; `kinds`: how many items were scored and failed."""
    points = {
        method: [
            (row[measure], *row[f"{measure} interval"]) if row[f"{measure} n"] else None
            for row in rows
            if row["method"] == method
        ]
        for method in scores.methods
    }
    names = [f"{kind} ({n}{f' of {n + failed}' if failed else ''})" for kind, (n, failed) in kinds.items()]
    title = f"{measure} by kind of edit (items), each method at the setting taken for it"
    return points_by_group(names, points, title=title, y=measure).update_layout(height=520)


def block_map(scores: Scores, rows: Sequence[Row], measure: str, what: str) -> go.Figure:
    """What each block does for each kind of edit. `rows`: of `RIEBench.block_rows`.

    Raises:
        KitError: there are no rows, or `what` is neither "alone" nor "left out".
    """
    if what not in list(_WHAT):
        raise KitError(f"plot_blocks: what is {' or '.join(map(repr, _WHAT))}, not {what!r}.")
    if not rows:
        raise KitError("plot_blocks: no block was tried by itself. Call riebench with by_block.")
    kinds = {row["kind"]: row["n"] for row in rows}
    gain = "change" if measure in LESS_IS_BETTER else "gain"
    told = np.array([[row[what], *row[f"{what} interval"]] for row in rows])
    return gain_map(
        [f"{kind} ({n})" for kind, n in kinds.items()],
        scores.blocks,
        told.reshape(len(kinds), len(scores.blocks), 3),
        title=f"{_WHAT[what].format(of=measure, Gain=gain.capitalize())}, by kind of edit (items)",
        scale=f"{gain} of {measure}",
        less_is_better=measure in LESS_IS_BETTER,
    )

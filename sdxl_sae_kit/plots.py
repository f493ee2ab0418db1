"""Plotly figures from plain numbers; every figure carries its alt text in `layout.meta["alt"]`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.colors import qualitative

from sdxl_sae_kit.amounts import human_bytes

COLOURS = qualitative.Safe
_STRONG = [COLOURS[at] for at in (4, 1, 3, 7, 6, 5)]
"""The same for points with thin intervals, the darkest first."""
"""Colour-blind-safe."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon")


class LiveFigure:
    """A figure in a notebook that is redrawn every few seconds while something runs, and cleared at the end.

    Outside a notebook it does nothing.
    """

    def __init__(self, every: float = 3.0) -> None:
        self.every, self.drawn, self.handle = every, time.monotonic(), None

    def __enter__(self) -> LiveFigure:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell is not None and hasattr(shell, "kernel"):
            from IPython.display import display

            self.handle = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        return self

    def show(self, figure: Callable[[], go.Figure]) -> None:
        """Draw the figure that this function makes, unless the last drawing is too recent."""
        if self.handle is not None and time.monotonic() - self.drawn > self.every:
            # as raw data: a plotly figure would display itself anew instead of taking the old one's place
            self.handle.update({"application/vnd.plotly.v1+json": json.loads(figure().to_json())}, raw=True)
            self.drawn = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)


def figure(alt: str, *, title: str, x: str = "", y: str = "", height: int = 420) -> go.Figure:
    """An empty figure in the kit's style with its alt text."""
    made = go.Figure()
    made.update_layout(
        meta={"alt": alt}, title=title, xaxis_title=x, yaxis_title=y, height=height,
        template="plotly_white", colorway=COLOURS, margin={"l": 60, "r": 20, "t": 60, "b": 60},
    )  # fmt: skip
    return made


def training_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """Unexplained share of each logged batch's variance over steps, one line per SAE, on a log axis."""
    curves = {name: [(line["step"], line["unexplained"]) for line in log] for name, log in logs.items()}
    title = "Training: squared error of each batch, as a share of the data's variance"
    return line_figure(curves, title=title, x="step", y="unexplained share").update_yaxes(type="log")


def line_figure(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> go.Figure:
    """One line of (x, y) points per name."""
    ends = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in curves.items() if points)
    made = figure(f"{title}: {len(curves)} lines of {y} over {x}; last values: {ends}.", title=title, x=x, y=y)
    for name, points in curves.items():
        made.add_scatter(x=[px for px, _ in points], y=[py for _, py in points], name=name, mode="lines")
    return made


def trade_off(curves: Mapping[str, Sequence[tuple[float, float, float, float]]], *, title: str) -> go.Figure:
    """Explained variance against L0: one line of (L0, value, low, high) points per name, with their intervals.

    The axis is logarithmic in the share that is left unexplained, so that 0.98 and 0.99 are as far apart as 0.8 and
    0.9. Filled points are the Pareto front: no other is as good or better in both, less L0 and more explained.
    """
    points = [point[:2] for line in curves.values() for point in line]
    front = {(l0, ev) for l0, ev in points if not any(x <= l0 and y >= ev and (x, y) != (l0, ev) for x, y in points)}
    found = [(name, *point) for name, line in curves.items() for point in line if point[:2] in front]
    best = "; ".join(f"{name} {ev:.3g} [{low:.3g}, {high:.3g}] at {l0:.3g}" for name, l0, ev, low, high in found)
    alt = f"{title}: {len(curves)} lines of explained variance over L0, with 95 % intervals. No other point is better"
    made = figure(f"{alt} than: {best}.", title=title, x="L0", y="explained variance", height=520)
    for at, (name, line) in enumerate(curves.items()):
        l0, value, low, high = np.array(line, dtype=float).reshape(-1, 4).T
        symbol = _SYMBOLS[at % len(_SYMBOLS)]
        made.add_scatter(
            x=l0, y=np.maximum(1 - value, 1e-9), name=name, mode="lines+markers", hoverinfo="text+name",
            error_y={"type": "data", "symmetric": False, "array": value - low, "arrayminus": high - value},
            marker={"symbol": [symbol if point[:2] in front else f"{symbol}-open" for point in line], "size": 9},
            hovertext=[f"L0 {x:.3g}: {y:.4f} [{left:.4f}, {right:.4f}]" for x, y, left, right in line],
        )  # fmt: skip
    ticks = (0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
    made.update_yaxes(type="log", autorange="reversed", tickvals=[1 - tick for tick in ticks], ticktext=ticks)
    return made


def byte_bars(sizes: Mapping[str, float], *, title: str) -> go.Figure:
    """Bars of bytes on a log axis, one per name, each with its size beside it."""
    texts = [human_bytes(size) for size in sizes.values()]
    told = "; ".join(f"{name} {text}" for name, text in zip(sizes, texts, strict=True))
    made = figure(f"{title}: {told}.", title=title, x="bytes", height=110 + 46 * len(sizes))
    made.add_bar(
        y=list(sizes), x=list(sizes.values()), text=texts, orientation="h", textposition="auto", cliponaxis=False
    )
    made.update_xaxes(type="log", exponentformat="SI")
    made.update_yaxes(autorange="reversed")
    made.update_layout(margin={"l": 250})
    return made


def effects_by_group(
    groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], *, title: str, y: str
) -> go.Figure:
    """Points (value, low, high) with their intervals on a log axis, the series side by side in every group."""
    made = figure(f"{title}: {y}, with 95 % intervals. {_last_group(groups, series)}", title=title, y=y)
    for at, (name, points) in enumerate(series.items()):
        values, low, high = np.array(points, dtype=float).reshape(-1, 3).T
        made.add_scatter(
            x=[place + 0.16 * (at - (len(series) - 1) / 2) for place in range(len(points))], y=values, name=name,
            error_y={"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low},
            mode="markers", marker={"symbol": at, "size": 8}, hovertext=list(groups), hoverinfo="text+y+name",
        )  # fmt: skip
    made.update_xaxes(tickvals=list(range(len(groups))), ticktext=list(groups))
    made.update_yaxes(type="log", exponentformat="power")
    return made


def _last_group(groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """The last group in numbers, and in how many groups the first series is the highest."""
    if not groups:
        return "There is nothing to show."
    last = {name: points[-1] for name, points in series.items()}
    ends = "; ".join(f"{name} {value:.3g} [{low:.3g}, {high:.3g}]" for name, (value, low, high) in last.items())
    first, *others = ([value for value, *_ in points] for points in series.values())
    highest = sum(value > max(rivals) for value, *rivals in zip(first, *others, strict=True))
    return f"For {groups[-1]}: {ends}. {next(iter(series))} is the highest in {highest} of {len(groups)} groups."


def ranked_bars(
    names: Sequence[str],
    kinds: Sequence[str],
    points: Sequence[tuple[float, float, float]],
    line: tuple[str, float],
    *,
    title: str,
    x: str,
) -> go.Figure:
    """Bars (value, low, high) from the largest down, coloured by kind, with their intervals; a line is a yardstick."""
    values, low, high = np.array(points, dtype=float).reshape(-1, 3).T
    told = "; ".join(f"{n} {v:.3g} [{a:.3g}, {b:.3g}]" for n, v, a, b in zip(names, values, low, high, strict=True))
    alt = f"{title}: bars of {x} with 95 % intervals, largest first. {told}. The line is {line[0]}, {line[1]:.3g}."
    made = figure(alt, title=title, x=x, height=160 + 22 * len(names))
    above, below = high - values, values - low
    for kind in dict.fromkeys(kinds):
        at = np.flatnonzero(np.array(kinds) == kind)
        made.add_bar(
            y=[names[i] for i in at.tolist()], x=values[at], name=kind, orientation="h", hoverinfo="x+y+name",
            error_x={"type": "data", "symmetric": False, "array": above[at], "arrayminus": below[at]},
        )  # fmt: skip
    made.add_vline(line[1], line={"dash": "dot"}, annotation_text=line[0], annotation_position="bottom right")
    made.update_yaxes(categoryorder="array", categoryarray=list(names)[::-1], automargin=True, dtick=1)
    return made


def predicted_and_true(
    series: Mapping[str, Sequence[tuple[float, float, str]]], told: str, *, title: str, x: str, y: str
) -> go.Figure:
    """Points (predicted, true, name), one series each, with the line on which they are equal."""
    counts = ", ".join(f"{len(points)} of {name}" for name, points in series.items())
    alt = f"{title}: scatter of {y} over {x}, {counts}, with the line of equality. {told}"
    made = figure(alt, title=title, x=x, y=y)
    ends = [value for points in series.values() for point in points for value in point[:2]] or [0.0]
    made.add_scatter(
        x=[min(ends), max(ends)], y=[min(ends), max(ends)], mode="lines", name="equal", hoverinfo="skip",
        line={"dash": "dot", "color": "grey"},
    )  # fmt: skip
    for at, (name, points) in enumerate(series.items()):
        made.add_scatter(
            x=[point[0] for point in points], y=[point[1] for point in points], name=name, mode="markers",
            hovertext=[point[2] for point in points], hoverinfo="text+x+y", marker={"symbol": at, "size": 8},
        )  # fmt: skip
    return made


def dose_responses(
    means: Mapping[str, Sequence[tuple[float, float, float, float]]],
    each: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    y: str,
) -> go.Figure:
    """Means (dose, value, low, high) with their intervals, a line per name, over thin lines (dose, value) of `each`."""
    told = "; ".join(
        f"{name} " + ", ".join(f"{value:.3g} [{low:.3g}, {high:.3g}] at {dose:g}" for dose, value, low, high in line)
        for name, line in means.items()
    )
    alt = f"{title}: {y} over the dose, means over {len(each)} features with 95 % intervals. {told}."
    made = figure(alt, title=title, x="dose: multiple of the activation (1 is the image as it is)", y=y)
    for name, points in each.items():
        made.add_scatter(
            x=[dose for dose, _ in points], y=[value for _, value in points], name=name, mode="lines", opacity=0.35,
            line={"width": 1, "color": COLOURS[0]}, showlegend=False, hoverinfo="x+y+name",
        )  # fmt: skip
    for at, (name, line) in enumerate(means.items()):
        dose, value, low, high = np.array(line, dtype=float).reshape(-1, 4).T
        made.add_scatter(
            x=dose, y=value, name=name, mode="lines+markers", marker={"symbol": at, "size": 8},
            line={"width": 3, "color": COLOURS[at]},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low},
        )  # fmt: skip
    return made


def interval_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]], *, title: str, x: str, y: str
) -> go.Figure:
    """A line of points (x, value, low, high) per name, with their intervals."""
    told = "; ".join(
        f"{name} " + ", ".join(f"{value:.3g} [{low:.3g}, {high:.3g}] at {at:g}" for at, value, low, high in line)
        for name, line in lines.items()
    )
    made = figure(f"{title}: {len(lines)} lines of {y} over {x}, with 95 % intervals. {told}.", title=title, x=x, y=y)
    for at, (name, line) in enumerate(lines.items()):
        place, value, low, high = np.array(line, dtype=float).reshape(-1, 4).T
        made.add_scatter(
            x=place, y=value, name=name, mode="lines+markers", marker={"symbol": at, "size": 8},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low},
        )  # fmt: skip
    return made


def step_lines(
    panels: Mapping[str, Mapping[tuple[str, bool], Sequence[tuple[float, float, float, float]]]], *, title: str, y: str
) -> go.Figure:
    """Lines of (step, value, low, high) with their intervals, by name and whether dashed, a panel each."""
    told = "; ".join(
        f"{panel}, {name}{' (dashed)' * dashed}: {_ends(line)}"
        for panel, lines in panels.items()
        for (name, dashed), line in lines.items()
        if line
    )
    alt = f"{title}: {y} over denoising steps with 95 % intervals, {len(panels)} panels. First to last step: {told}."
    made = figure(alt, title=title, height=140 + 280 * -(-len(panels) // 2))
    made.set_subplots(-(-len(panels) // 2), min(2, len(panels)), subplot_titles=list(panels), shared_yaxes=True)
    names = list(dict.fromkeys(name for lines in panels.values() for name, _ in lines))
    listed = set[str]()  # in the legend
    for at, lines in enumerate(panels.values()):
        for (name, dashed), line in lines.items():
            step, value, low, high = np.array(line, dtype=float).reshape(-1, 4).T
            colour = COLOURS[names.index(name) % len(COLOURS)]
            made.add_scatter(
                x=step, y=value, name=name, legendgroup=name, mode="lines+markers", row=at // 2 + 1, col=at % 2 + 1,
                showlegend=not dashed and name not in listed, hoverinfo="x+y+name",
                line={"color": colour, "dash": "dash" if dashed else "solid"},
                marker={"symbol": names.index(name), "size": 6},
                error_y={
                    "type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low,
                    "thickness": 1, "width": 0,
                },
            )  # fmt: skip
            listed |= set() if dashed else {name}
    made.update_xaxes(title_text="denoising step")
    made.update_yaxes(title_text=y, col=1)
    return made


def _ends(line: Sequence[tuple[float, float, float, float]]) -> str:
    """The first and the last point of a line in numbers."""
    points = [line[0], line[-1]] if len(line) > 1 else list(line)
    return " to ".join(f"{value:.3g} [{low:.3g}, {high:.3g}]" for _, value, low, high in points)


def points_by_group(
    groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float] | None]], *, title: str, y: str
) -> go.Figure:
    """Points (value, low, high) with their intervals, the series side by side in every group; None is left out."""
    told = "; ".join(
        f"{group} " + ", ".join(f"{name} {p[0]:.2f} [{p[1]:.2f}, {p[2]:.2f}]" for name, p in there.items() if p)
        for at, group in enumerate(groups)
        for there in ({name: points[at] for name, points in series.items()},)
    )
    made = figure(f"{title}: {y}, with 95 % intervals. {told}.", title=title, y=y)
    apart = min(0.16, 0.8 / max(len(series), 1))
    for at, (name, points) in enumerate(series.items()):
        there = [place for place, point in enumerate(points) if point]
        values, low, high = np.array([points[place] for place in there], dtype=float).reshape(-1, 3).T
        made.add_scatter(
            x=[place + apart * (at - (len(series) - 1) / 2) for place in there], y=values, name=name,
            error_y={"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low},
            mode="markers", marker={"symbol": at, "size": 8, "color": _STRONG[at % len(_STRONG)]},
            hovertext=[groups[place] for place in there], hoverinfo="text+y+name",
        )  # fmt: skip
    made.update_xaxes(tickvals=list(range(len(groups))), ticktext=list(groups), automargin=True)
    return made


def shares_by_group(
    groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float] | None]], *, title: str, y: str
) -> go.Figure:
    """Shares 0 to 1, (value, low, high), with their intervals, series side by side in every group; None is left out."""
    made = points_by_group(groups, series, title=title, y=y)
    made.update_yaxes(range=[-0.02, 1.02])
    return made


def pareto(
    points: Mapping[str, Sequence[tuple[float, float, float, float, float, float, str]]],
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
) -> go.Figure:
    """Points (x, low, high, y, low, high, text) with both intervals, and a line per name along its front (x, y).

    Names without a front are only marked, with a star or a cross. Of those with one, points on it have their intervals.
    """
    marked = [name for name in points if name not in fronts]
    told = "; ".join(f"{name} {_each(there)}" for name, there in points.items())
    lines = "; ".join(
        f"{name} through " + ", ".join(f"({a:.3g}, {b:.3g})" for a, b in line) for name, line in fronts.items()
    )
    alt = f"{title}: points of {y} over {x} with 95 % intervals in both. {told}. Fronts as (x, y): {lines}."
    made = figure(alt, title=title, x=x, y=y, height=520)
    for at, (name, there) in enumerate(points.items()):
        numbers = np.array([point[:6] for point in there], dtype=float).reshape(-1, 6).T
        drawn = np.array([name in marked or (point[0], point[3]) in fronts[name] for point in there], dtype=bool)
        errors = [
            {
                "type": "data", "symmetric": False, "array": np.where(drawn, high - value, 0),
                "arrayminus": np.where(drawn, value - low, 0),
                "thickness": 1, "width": 0,
            }
            for value, low, high in (numbers[:3], numbers[3:])
        ]  # fmt: skip
        colour = _STRONG[at % len(_STRONG)]
        alone = {"symbol": ("star", "x")[marked.index(name) % 2], "size": 13} if name in marked else {}
        made.add_scatter(
            x=numbers[0], y=numbers[3], error_x=errors[0], error_y=errors[1], name=name, hoverinfo="text+x+y",
            mode="markers", hovertext=[point[6] for point in there], legendgroup=name,
            marker={"symbol": at, "size": 8, "color": "#444" if alone else colour} | alone,
        )  # fmt: skip
        if name in fronts:
            along = np.array(fronts[name], dtype=float).reshape(-1, 2).T
            made.add_scatter(
                x=along[0], y=along[1], name=name, mode="lines", line={"color": colour}, hoverinfo="skip",
                legendgroup=name, showlegend=False,
            )  # fmt: skip
    return made


def _each(points: Sequence[tuple[float, float, float, float, float, float, str]]) -> str:
    """Every point in numbers."""
    return ", ".join(f"{p[3]:.3g} [{p[4]:.3g}, {p[5]:.3g}] at {p[0]:.3g} [{p[1]:.3g}, {p[2]:.3g}]" for p in points)


def distributions(series: Mapping[str, Float[np.ndarray, " value"]], *, title: str, x: str) -> go.Figure:
    """Histograms as lines, one per name: the share of its values in each of 40 bins of common width."""
    told = "; ".join(f"{name} median {np.median(values):.3g} of {len(values)}" for name, values in series.items())
    made = figure(f"{title}: histograms of {x}. {told}.", title=title, x=x, y="share")
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), bins=40)
    for name, values in series.items():
        shares = np.histogram(values, edges)[0] / len(values)
        made.add_scatter(x=(edges[:-1] + edges[1:]) / 2, y=shares, name=name, mode="lines", line={"shape": "hvh"})
    return made

"""Plotly figures from plain numbers; every figure carries its alt text in `layout.meta["alt"]`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.colors import qualitative

from sdxl_sae_kit.artifacts import human_bytes

COLOURS = qualitative.Safe
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


def response_map(rows: Sequence[str], columns: Sequence[str], means: Float[np.ndarray, "row column"]) -> go.Figure:
    """A heat map of means with their numbers written in, a row per descriptor and a column per group of features."""
    best = means.argmax(axis=0)
    peaks = "; ".join(f"{columns[at]}: {rows[row]} {means[row, at]:.3f}" for at, row in enumerate(best))
    made = figure(
        f"Heat map of {len(rows)} descriptors in {len(columns)} groups of features. Highest in each: {peaks}.",
        title="What the features respond to: mean over features", height=140 + 28 * len(rows),
    )  # fmt: skip
    texts = [[f"{value:.2f}" for value in row] for row in means]
    made.add_heatmap(z=means, x=list(columns), y=list(rows), text=texts, texttemplate="%{text}", colorscale="Viridis")
    made.update_yaxes(autorange="reversed")
    made.update_layout(margin={"l": 110})
    return made


def cluster_map(
    position: Float[np.ndarray, "feature 2"],
    feature: Int[np.ndarray, "feature"],
    group: Int[np.ndarray, "feature"],
    groups: Sequence[str],
    cluster: Int[np.ndarray, "feature"],
    clusters: Sequence[str],
) -> go.Figure:
    """Features in a plane, coloured by group; the symbol is the cluster, and hovering names the feature."""
    sizes = ", ".join(f"{int((group == at).sum())} of {name}" for at, name in enumerate(groups))
    made = figure(
        f"Scatter of {len(feature)} features ({sizes}) on the first two principal components of their descriptors, "
        f"coloured by hookpoint; symbols are their {len(clusters)} clusters.",
        title="Features by what they respond to", x="first principal component", y="second principal component",
        height=520,
    )  # fmt: skip
    for at, name in enumerate(groups):
        chosen = group == at
        pairs = zip(feature[chosen], cluster[chosen], strict=True)
        made.add_scatter(
            x=position[chosen, 0], y=position[chosen, 1], name=name, mode="markers", hoverinfo="text+name",
            hovertext=[f"feature {latent}, cluster {clusters[which]}" for latent, which in pairs],
            marker={"symbol": cluster[chosen], "size": 7, "opacity": 0.7},
        )  # fmt: skip
    return made


def cluster_shares(
    groups: Sequence[str], clusters: Sequence[str], shares: Float[np.ndarray, "group cluster"]
) -> go.Figure:
    """Stacked bars: the share of each cluster in each group."""
    best = zip(groups, shares.argmax(axis=1), shares.max(axis=1), strict=True)
    largest = "; ".join(f"{name}: {clusters[which]} {share:.0%}" for name, which, share in best)
    made = figure(
        f"Stacked bars: shares of {len(clusters)} clusters in {len(groups)} hookpoints. Largest in each: {largest}.",
        title="Clusters of features in each hookpoint", y="share of features",
    )  # fmt: skip
    for at, cluster in enumerate(clusters):
        made.add_bar(x=list(groups), y=shares[:, at], name=cluster)
    made.update_layout(barmode="stack")
    return made


def confusion_map(
    values: Sequence[tuple[str, str]], latents: Sequence[str], shares: Float[np.ndarray, "value value"]
) -> go.Figure:
    """A heat map of shares of images: in each row the latent for a value, in each column the images that show one.

    `values` are pairs of factor and value, for rows and columns alike; white lines set factors apart.
    """
    names, factors = [f"{factor}: {value}" for factor, value in values], [factor for factor, _ in values]
    right = np.diagonal(shares)
    told = f"{right.mean():.0%} of its images on average, the worst {names[right.argmin()]} ({right.min():.0%})"
    made = figure(
        f"Heat map of {len(values)} latents, each the best for a value of a factor, on the images that show each "
        f"value. They tell their own value of {told}. {_most_confused(names, factors, shares)}",
        title="Share of held-out images on which a value's latent tells it", x="images that show",
        y="latent for", height=240 + 20 * len(values),
    )  # fmt: skip
    made.add_heatmap(
        z=shares, x=names, y=names, zmin=0, zmax=1, colorscale="Viridis", hoverinfo="text", xgap=1, ygap=1,
        hovertext=[
            [f"{latent}, for {one}: {share:.0%} of {other}" for other, share in zip(names, line, strict=True)]
            for one, latent, line in zip(names, latents, shares, strict=True)
        ],
    )  # fmt: skip
    for at in (at for at in range(1, len(factors)) if factors[at] != factors[at - 1]):
        made.add_hline(at - 0.5, line={"color": "white", "width": 3}).add_vline(
            at - 0.5, line={"color": "white", "width": 3}
        )
    made.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 10}, dtick=1)
    made.update_xaxes(automargin=True, tickfont={"size": 10}, dtick=1, tickangle=-60)
    return made


def _most_confused(names: Sequence[str], factors: Sequence[str], shares: Float[np.ndarray, "value value"]) -> str:
    """Which latent most often tells another value of its factor, and how often all do."""
    kin = np.equal.outer(np.array(factors), np.array(factors)) & ~np.eye(len(names), dtype=bool)
    if not kin.any():
        return "No factor has two values."
    row, column = divmod(int(np.where(kin, shares, -1).argmax()), len(names))
    most = f"most often that for {names[row]} of {names[column]} ({shares[row, column]:.0%})"
    return f"They tell it of {shares[kin].mean():.0%} of those of their factor's other values, {most}."


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


def share_map(
    rows: Sequence[str], columns: Sequence[str], shares: Float[np.ndarray, "row column"], *, title: str
) -> go.Figure:
    """A heat map of shares, a row for each thing and a column for each factor, with the numbers written in."""
    row, column = divmod(int(shares.argmax()), len(columns))
    alt = f"{title}: heat map of {len(rows)} rows and {len(columns)} columns, mean {shares.mean():.0%}."
    highest = f"Highest: {rows[row]}, {columns[column]}, {shares[row, column]:.0%}."
    made = figure(f"{alt} {highest}", title=title, height=200 + 22 * len(rows))
    texts = [[f"{share:.0%}" for share in line] for line in shares]
    made.add_heatmap(
        z=shares, x=list(columns), y=list(rows), text=texts, texttemplate="%{text}", colorscale="Viridis", zmin=0,
        hoverinfo="x+y+z",
    )  # fmt: skip
    made.update_yaxes(autorange="reversed", automargin=True, dtick=1)
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


def selectivity_map(points: Mapping[str, Sequence[tuple[float, float, str]]], moved: float, kept: float) -> go.Figure:
    """Points (least share kept, share moved, name) of several conditions; the corner that passes is framed."""
    told = "; ".join(
        f"{name}: {sum(y >= moved and x >= kept for x, y, _ in line)} of {len(line)}" for name, line in points.items()
    )
    made = figure(
        f"Scatter of edits by the share of prompts that move as expected and the lowest share that stay the same in "
        f"another factor. In the corner that passes: {told}.",
        title="Which edits move their own factor and no other", x="lowest share kept among the other factors",
        y="share moved as expected", height=480,
    )  # fmt: skip
    for at, (name, line) in enumerate(points.items()):
        made.add_scatter(
            x=[x for x, _, _ in line], y=[y for _, y, _ in line], name=name, mode="markers", hoverinfo="text+name",
            hovertext=[f"{text}: moved {y:.0%}, kept {x:.0%}" for x, y, text in line],
            marker={"symbol": at, "size": 9, "opacity": 0.75},
        )  # fmt: skip
    made.add_shape(type="rect", x0=kept, x1=1.02, y0=moved, y1=1.04, line={"width": 1, "dash": "dot"}, layer="below")
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

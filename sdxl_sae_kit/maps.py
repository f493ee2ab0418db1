"""Heat maps and scatters of features, blocks and factors: plotly figures from plain numbers, each with alt text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from sdxl_sae_kit.plots import COLOURS, figure


def response_map(
    rows: Sequence[str], columns: Sequence[str], means: Float[np.ndarray, "row column"], *, title: str
) -> go.Figure:
    """A heat map of means with their numbers written in, a row per descriptor and a column per group of features.

    Colours compare the groups in one descriptor: each row is as shares of its largest. NaN is left white.
    """
    peaks = "; ".join(
        f"{name}: {rows[int(np.nanargmax(column))]} {np.nanmax(column):.3f}"
        for name, column in zip(columns, means.T, strict=True)
    )
    made = figure(
        f"{title}: heat map of {len(rows)} descriptors in {len(columns)} groups of features. Highest in each: {peaks}.",
        title=title, height=180 + 28 * len(rows),
    )  # fmt: skip
    texts = [["" if np.isnan(value) else f"{value:.2g}" for value in row] for row in means]
    largest = np.nanmax(np.abs(means), axis=1, keepdims=True)
    made.add_heatmap(
        z=means / np.where(largest > 0, largest, 1), x=list(columns), y=list(rows), text=texts, hoverinfo="x+y+text",
        texttemplate="%{text}", colorscale="Viridis", colorbar={"title": "share of<br>row's largest"},
    )  # fmt: skip
    made.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    made.update_xaxes(automargin=True, dtick=1)
    return made


def cluster_map(
    position: Float[np.ndarray, "feature 2"],
    feature: Int[np.ndarray, "feature"],
    group: Int[np.ndarray, "feature"],
    groups: Sequence[str],
    cluster: Int[np.ndarray, "feature"],
    clusters: Sequence[str],
    plane: str,
) -> go.Figure:
    """Features in a plane, coloured by group; the symbol is the cluster, and hovering names the feature."""
    sizes = ", ".join(f"{int((group == at).sum())} of {name}" for at, name in enumerate(groups))
    told = "; ".join(f"{name}, {int((cluster == at).sum())} features" for at, name in enumerate(clusters))
    made = figure(
        f"Scatter of {len(feature)} features ({sizes}) in the plane of {plane} of their descriptors, coloured by "
        f"hookpoint; symbols are their {len(clusters)} clusters: {told}.",
        title="Features by what they respond to and cause", x=f"{plane} 1", y=f"{plane} 2", height=560,
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


def block_flow(groups: Sequence[str], clusters: Sequence[str], counts: Int[np.ndarray, "group cluster"]) -> go.Figure:
    """How many features of each group flow into each cluster (Sankey)."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    best = zip(groups, shares.argmax(axis=1), shares.max(axis=1), strict=True)
    largest = "; ".join(f"{name}: {clusters[which]} ({share:.0%})" for name, which, share in best)
    made = figure(
        f"Flow of {int(counts.sum())} features from {len(groups)} hookpoints into {len(clusters)} clusters. Largest "
        f"from each: {largest}.",
        title="From hookpoints to clusters", height=220 + 50 * max(counts.shape),
    )  # fmt: skip
    source, target = np.nonzero(counts)
    colours = [_see_through(COLOURS[at % len(COLOURS)]) for at in range(len(groups))]
    made.add_sankey(
        node={"label": [*groups, *clusters], "pad": 18, "color": [*(c for c in colours), *["#999"] * len(clusters)]},
        link={
            "source": source, "target": target + len(groups), "value": counts[source, target],
            "color": [colours[at] for at in source],
        },
    )  # fmt: skip
    return made


def _see_through(colour: str) -> str:
    """`rgb(…)` at half opacity."""
    return colour.replace("rgb(", "rgba(").replace(")", ", 0.5)")


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


_BETTER, _WORSE = "#67a9cf", "#ef8a62"
"""Light enough for black numbers on them."""


def gain_map(
    rows: Sequence[str],
    columns: Sequence[str],
    gains: Float[np.ndarray, "row column 3"],
    *,
    title: str,
    scale: str,
    less_is_better: bool = False,
) -> go.Figure:
    """A heat map of gains (value, low, high), blue where it is better and red where worse, the numbers written in."""
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{block} {v:z.2f} [{a:z.2f}, {b:z.2f}]" for block, (v, a, b) in zip(columns, line, strict=True))
        for name, line in zip(rows, gains.tolist(), strict=True)
    )
    made = figure(
        f"{title}: heat map of {scale}, {len(rows)} rows and {len(columns)} columns, with 95 % intervals. {told}.",
        title=title, height=200 + 34 * len(rows),
    )  # fmt: skip
    largest = float(np.nanmax(np.abs(gains[..., 0]), initial=1e-9))
    texts = [[_gain(*cell) for cell in line] for line in gains.tolist()]
    colours = [_WORSE, "#ffffff", _BETTER]
    made.add_heatmap(
        z=gains[..., 0], x=list(columns), y=list(rows), text=texts, texttemplate="%{text}", hoverinfo="x+y+text",
        colorscale=colours[::-1] if less_is_better else colours, zmin=-largest, zmax=largest,
        textfont={"size": 10, "color": "#111"},
        xgap=1, ygap=1, colorbar={"title": {"text": scale, "side": "right"}},
    )  # fmt: skip
    made.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    made.update_xaxes(automargin=True, dtick=1)
    return made


def _gain(value: float, low: float, high: float) -> str:
    """A gain over its interval, which is left out where all of it is 0 to two digits."""
    told = f"{value:z.2f}<br>[{low:z.2f}, {high:z.2f}]".replace("-", "−")
    return "0.00" if told == "0.00<br>[0.00, 0.00]" else told


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

"""Clusters to look at: a map whose features show their pictures under the pointer, and a sheet of the most central."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool

from sdxl_sae_kit import html
from sdxl_sae_kit.forms import widget

HOW = "Point at a feature to see the images on which it is strongest."


class ClusterView(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """A map of features over the pictures of the one last pointed at.

    Args:
        figure: with one trace of points for each group.
        groups: which features each trace shows, in order.
        tell: a feature's caption and pictures (WebP), by its place among all.
        twin: HTML that stands in exports.
    """

    def __init__(
        self,
        figure: go.Figure,
        groups: Sequence[Bool[np.ndarray, "feature"]],
        tell: Callable[[int], tuple[str, bytes]],
        twin: str,
    ) -> None:
        self.figure = go.FigureWidget(figure)
        self.told = widget(widgets.HTML, "told", value=html.quiet(HOW))
        self._tell, self._twin = tell, twin
        for trace, mine in zip(self.figure.data, groups, strict=True):
            places = np.flatnonzero(mine).tolist()
            trace.on_hover(lambda trace, points, state, places=places: self._show(places, points.point_inds))
        super().__init__([self.figure, self.told])

    def _show(self, places: Sequence[int], pointed: Sequence[int]) -> None:
        if pointed:
            caption, picture = self._tell(places[pointed[0]])
            shown = html.figures([(html.picture(picture, caption), "", caption)])
            self.told.value = html.fragment(shown)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        self.figure._repr_mimebundle_()  # what plotly does before it shows a figure by itself
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self._twin}


def sheet(
    features: Mapping[str, Any],
    blocks: Sequence[str],
    clusters: Sequence[str],
    picture: Callable[[int], bytes],
    n: int,
) -> str:
    """HTML of each cluster's most central features, n of every block, with their pictures."""
    return html.fragment(
        *(_cluster(features, number, name, blocks, picture, n) for number, name in enumerate(clusters))
    )


def _cluster(
    features: Mapping[str, Any],
    number: int,
    name: str,
    blocks: Sequence[str],
    picture: Callable[[int], bytes],
    n: int,
) -> str:
    shown, told = list[tuple[str, str, str]](), list[str]()
    for at, block in enumerate(blocks):
        mine = np.flatnonzero((features["cluster"] == number) & (features["hookpoint"] == at))
        told.append(f"{len(mine)} of {block}")
        for place in mine[np.argsort(features["central"][mine], kind="stable")[:n]].tolist():
            caption = f"{block}, feature {features['feature'][place]}"
            drawn = html.picture(picture(place), f"strongest images of {caption}, with heat maps")
            shown.append((drawn, "", caption))
    return html.heading(f"Cluster {name}", html.escape(", ".join(told))) + html.figures(shown)

"""A picture in a notebook on which tokens are selected: by dragging a rectangle or a lasso, or with sliders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.forms import line, widget

SIDE = 420
"""Pixels of the picture's longer side."""

# Without this a drag that begins in an outline does nothing.
STYLE = "<style>.sae-picture .selectionlayer path { pointer-events: none !important; }</style>"

_BAR = 34  # pixels above the picture, for the two buttons that choose rectangle or lasso
_NOWHERE = {"type": "rect", "xref": "x", "yref": "y", "x0": -9, "x1": -9, "y0": -9, "y1": -9}


class SelectablePicture(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """An image under its grid of tokens; `selected` (height, width) says which of them are chosen, at first all.

    A double click, or the button, selects the whole picture again. `on_select` is called after each change.
    """

    def __init__(self, grid: tuple[int, int], on_select: Callable[[], None]) -> None:
        self.selected: Bool[np.ndarray, "height width"] = np.ones(grid, dtype=bool)
        self._on_select = on_select
        self.figure = _figure(grid)
        (tokens,) = self.figure.data
        tokens.on_selection(self._dragged)
        tokens.on_deselect(lambda trace, points: self._choose(np.ones(grid, dtype=bool)))
        height, width = grid
        self.columns = _slider("columns", width)
        self.rows = _slider("rows", height)
        self.whole = widget(widgets.Button, "whole", 120, description="Whole picture")
        self.told = widget(widgets.HTML, "told")
        for slider in (self.columns, self.rows):
            slider.observe(self._slid, "value")
        self.whole.on_click(lambda button: self._set(np.ones(grid, dtype=bool)))
        super().__init__([self.figure, self.told, self.columns, self.rows, line([self.whole])])
        self.add_class("sae-picture")
        self.layout.flex = f"0 0 {self.figure.layout.width + 10}px"

    def show(self, image: Image.Image, told: str) -> None:
        """Show this image, and below it `told`, which is HTML. What is selected stays."""
        self.figure.layout.images[0].source = html.data_uri(html.to_webp(image))
        self.told.value = STYLE + told

    def prepare(self) -> None:
        """To be called before it is shown as part of another widget.

        A page that is still loading plotly misses changes. Before it shows a figure by itself, plotly therefore writes
        all of it into the widget's state; here nobody else would.
        """
        self.figure._repr_mimebundle_()

    def _dragged(self, trace: Any, points: Any, selector: Any) -> None:
        """A rectangle or lasso was drawn. One around no token's centre selects the whole picture."""
        if selector is None:  # the page answers to what `_set` drew
            return
        chosen = np.zeros(self.selected.size, dtype=bool)
        chosen[points.point_inds] = True
        self._choose(chosen.reshape(self.selected.shape) if chosen.any() else np.ones_like(self.selected))

    def _slid(self, change: Any) -> None:
        (left, right), (top, bottom) = self.columns.value, self.rows.value
        chosen = np.zeros_like(self.selected)
        chosen[top - 1 : bottom, left - 1 : right] = True
        self._set(chosen)

    def _set(self, rectangle: Bool[np.ndarray, "height width"]) -> None:
        """Select these tokens, and draw their outline."""
        self._choose(rectangle)
        (left, right), (top, bottom) = self.columns.value, self.rows.value
        shape = {"type": "rect", "xref": "x", "yref": "y", "x0": left - 1, "x1": right, "y0": top - 1, "y1": bottom}
        # plotly tells Python nothing of the outlines that a drag leaves: only what Python changes replaces them
        self.figure.layout.selections = [_NOWHERE]
        self.figure.layout.selections = [] if rectangle.all() else [shape]

    def _choose(self, chosen: Bool[np.ndarray, "height width"]) -> None:
        """Take over what was selected, and let the sliders tell the smallest rectangle around it."""
        self.selected = chosen
        for slider, places in zip((self.rows, self.columns), np.nonzero(chosen), strict=True):
            slider.unobserve(self._slid, "value")
            slider.value = (int(places.min()) + 1, int(places.max()) + 1)
            slider.observe(self._slid, "value")
        self._on_select()


def at_grid(selected: Bool[np.ndarray, "height width"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """The selection on another grid: tokens of which at least half is selected, or else those with the largest share.

    >>> at_grid(np.array([[True, False], [True, False]]), (1, 1))
    array([[ True]])
    """
    rows, columns = (_overlap(coarse, fine) for coarse, fine in zip(grid, selected.shape, strict=True))
    shares = rows @ selected @ columns.T
    return np.asarray(shares >= min(0.5, shares.max()) - 1e-6)


def _overlap(n: int, of: int) -> Float[np.ndarray, "n of"]:
    """How much of each of n parts of a line lies in each of `of` parts of it; rows sum to 1."""
    start, other = np.arange(n)[:, None] / n, np.arange(of) / of
    shared = np.minimum(start + 1 / n, other + 1 / of) - np.maximum(start, other)
    return np.asarray(n * np.clip(shared, 0, None))


def _slider(name: str, last: int) -> Any:
    return widget(
        widgets.IntRangeSlider,
        f"token-{name}",
        SIDE,
        value=(1, last),
        min=1,
        max=last,
        description=name,
        continuous_update=False,
    )


def _figure(grid: tuple[int, int]) -> go.FigureWidget:
    """An image from (0, 0) to (width, height) in tokens, with one marker in the middle of each, seen when selected."""
    height, width = grid
    cell = SIDE / max(grid)
    y, x = np.mgrid[:height, :width].reshape(2, -1) + 0.5
    made = go.Figure()
    square = {"symbol": "square", "size": 0.84 * cell, "opacity": 0, "color": "white"}
    made.add_scatter(
        x=x, y=y, mode="markers", hoverinfo="skip", marker={**square, "line": {"width": 1, "color": "black"}},
        selected={"marker": {"opacity": 0.3}}, unselected={"marker": {"opacity": 0}},
    )  # fmt: skip
    made.add_layout_image(
        x=0, y=0, sizex=width, sizey=height, xref="x", yref="y", sizing="stretch", layer="below"
    )  # fmt: skip
    made.update_layout(
        width=round(cell * width), height=round(cell * height) + _BAR, margin={"l": 0, "r": 0, "t": _BAR, "b": 0},
        dragmode="select", showlegend=False, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    made.update_xaxes(range=[0, width], visible=False, fixedrange=True)
    made.update_yaxes(range=[height, 0], visible=False, fixedrange=True)
    shown = go.FigureWidget(made)
    buttons = {"displaylogo": False, "displayModeBar": True, "modeBarButtons": [["select2d", "lasso2d"]]}
    shown._config = {**buttons, "editSelection": False}
    return shown

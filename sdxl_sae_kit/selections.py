"""Pictures in a notebook with a part chosen on them: tokens that are selected, or a mask that is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

from sdxl_sae_kit import html
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.masks import SAMPLES, Polygon, as_mask

SIDE = 420
"""Pixels of the longer side of a picture with tokens to select."""
DRAWN_SIDE = 300
"""Pixels of the longer side of a picture to draw a mask on: others stand beside it."""

# Without this a drag that begins in an outline does nothing.
STYLE = "<style>.sae-picture .selectionlayer path { pointer-events: none !important; }</style>"

BAR = 34
"""Pixels above the picture, for the buttons that choose what a drag does."""

_PEN = {"line": {"width": 2, "color": "white"}, "fillcolor": "rgba(255,255,255,0.15)"}
_NEEDED = ("type", "x0", "x1", "y0", "y1", "path", "line", "fillcolor", "editable")
_NOWHERE = {"type": "rect", "xref": "x", "yref": "y", "x0": -9, "x1": -9, "y0": -9, "y1": -9}


class _Picture(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """An image in a plotly figure over what is told of it and controls; the button stands for the whole picture."""

    def __init__(self, figure: go.FigureWidget, controls: list[widgets.Widget], buttons: list[widgets.Widget]) -> None:
        self.figure = figure
        self.whole = widget(widgets.Button, "whole", 120, description="Whole picture")
        self.told = widget(widgets.HTML, "told")
        self._below = [self.told, *controls, line([*buttons, self.whole])]
        self._seen = False
        super().__init__(self._below)
        self.add_class("sae-picture")
        self.layout.flex = f"0 0 {figure.layout.width + 10}px"

    def show(self, image: Image.Image, told: str) -> None:
        """Show this image, and below it `told`, which is HTML. What is chosen stays."""
        self.figure.layout.images[0].source = html.data_uri(html.to_webp(image))
        self.told.value = STYLE + told
        if not self._seen:
            self.prepare()
            self.figure.open()
            self.children, self._seen = [self.figure, *self._below], True

    def prepare(self) -> None:
        """To be called before it is shown as part of another widget.

        A page that is still loading plotly misses changes. Before it shows a figure by itself, plotly therefore writes
        all of it into the widget's state; here nobody else would.
        """
        self.figure._repr_mimebundle_()


class SelectablePicture(_Picture):
    """An image under its grid of tokens; `selected` (height, width) says which of them are chosen, at first all.

    A double click, or the button, selects the whole picture again. `on_select` is called after each change.
    """

    def __init__(self, grid: tuple[int, int], on_select: Callable[[], None]) -> None:
        self.selected: Bool[np.ndarray, "height width"] = np.ones(grid, dtype=bool)
        self._on_select = on_select
        height, width = grid
        self.columns, self.rows = _slider("columns", width, SIDE), _slider("rows", height, SIDE)
        super().__init__(_selectable(grid), [self.columns, self.rows], [])
        (tokens,) = self.figure.data
        tokens.on_selection(self._dragged)
        tokens.on_deselect(lambda trace, points: self._choose(np.ones(grid, dtype=bool)))
        for slider in (self.columns, self.rows):
            slider.observe(self._slid, "value")
        self.whole.on_click(lambda button: self._set(np.ones(grid, dtype=bool)))

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


class MaskedPicture(_Picture):
    """An image to draw a mask on: rectangles, closed outlines and freehand strokes one token wide, which add up.

    `mask` (height, width) is which share of every token they cover, 0 to 1 in hundredths; None without shapes, which
    stands for the whole picture. `on_draw` is called after each change. Sliders and a button do without a mouse.
    """

    def __init__(self, grid: tuple[int, int], on_draw: Callable[[], None]) -> None:
        self.mask: Float[np.ndarray, "height width"] | None = None
        self._grid, self._on_draw = grid, on_draw
        height, width = grid
        self.columns, self.rows = _slider("columns", width, DRAWN_SIDE), _slider("rows", height, DRAWN_SIDE)
        self.add = widget(widgets.Button, "add-rectangle", 130, description="Add rectangle")
        self.remove = widget(widgets.Button, "remove-shape", 110, description="Remove last")
        super().__init__(_drawable(grid), [self.columns, self.rows], [self.add, self.remove])
        self.figure.layout.on_change(lambda layout, shapes: self._changed(), "shapes")
        self.add.on_click(lambda button: self._add())
        self.remove.on_click(lambda button: self._set(self.shapes[:-1]))
        self.whole.on_click(lambda button: self._set([]))

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """What is drawn, as plotly writes it, in tokens from the left and from the top."""
        # what a page draws goes past the objects of `figure.layout.shapes`
        shapes: list[dict[str, Any]] = self.figure.layout.to_plotly_json().get("shapes", [])
        return shapes

    def outline(self, image: Image.Image) -> Image.Image:
        """The image with what is drawn on it, white over black."""
        outlined = image.convert("RGB")
        pen, (height, width) = ImageDraw.Draw(outlined), self._grid
        for shape in self.shapes:
            corners = _corners(shape) * [image.width / width, image.height / height]
            points = [(float(x), float(y)) for x, y in corners]
            points += [] if _is_open(shape) else points[:1]
            for colour, thick in (("black", 4), ("white", 2)):
                pen.line(points, colour, thick, joint="curve")
        return outlined

    def _add(self) -> None:
        (left, right), (top, bottom) = self.columns.value, self.rows.value
        rectangle = {"type": "rect", "x0": left - 1, "x1": right, "y0": top - 1, "y1": bottom}
        self._set([*self.shapes, {**rectangle, **_PEN, "editable": True}])

    def _set(self, shapes: list[dict[str, Any]]) -> None:
        self.figure.plotly_relayout({"shapes": shapes})

    def _changed(self) -> None:
        """Take over what is drawn. A click that covers nothing is no shape, and a stroke is shown as wide as it is."""
        shares = [covered([shape], self._grid) for shape in self.shapes]
        tidy = [self._as_wide(shape) for shape, share in zip(self.shapes, shares, strict=True) if share.any()]
        if tidy != self.shapes:
            self._set(tidy)  # which comes back here
            return
        self.mask = covered(tidy, self._grid) if tidy else None
        self._on_draw()

    def _as_wide(self, shape: dict[str, Any]) -> dict[str, Any]:
        if not _is_open(shape):
            return shape
        return shape | {"line": {"width": DRAWN_SIDE / max(self._grid), "color": "rgba(255,255,255,0.45)"}}


def covered(shapes: Iterable[Mapping[str, Any]], grid: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Which share of every token plotly's shapes cover together, in hundredths, of SAMPLES² points in each.

    Rectangles and closed paths cover what is inside (even-odd, as they are filled on the screen), open paths all
    within half a token.
    """
    height, width = grid
    points = np.zeros((height * SAMPLES, width * SAMPLES), dtype=bool)
    for shape in shapes:
        corners = _corners(shape)
        if _is_open(shape):
            points |= _near(corners, grid)
        elif len(corners) > 2:
            points |= Polygon(np.clip(corners / [width, height], 0, 1).tolist()).shares(grid)
    return np.asarray(points.reshape(height, SAMPLES, width, SAMPLES).mean(axis=(1, 3)).round(2))


def _is_open(shape: Mapping[str, Any]) -> bool:
    return shape["type"] == "path" and not shape["path"].rstrip().endswith("Z")


def _corners(shape: Mapping[str, Any]) -> Float[np.ndarray, "corner 2"]:
    """Corners (x, y) of a rectangle or path."""
    if shape["type"] == "path":
        return np.array(re.findall(r"[ML]\s*([-+\d.e]+)[\s,]+([-+\d.e]+)", shape["path"]), dtype=float).reshape(-1, 2)
    left, right, top, bottom = (float(shape[side]) for side in ("x0", "x1", "y0", "y1"))
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _near(corners: Float[np.ndarray, "corner 2"], grid: tuple[int, int]) -> Bool[np.ndarray, "fine_height fine_width"]:
    """Which of the tokens' points are at most half a token from the line through these corners."""
    y, x = (np.mgrid[: grid[0] * SAMPLES, : grid[1] * SAMPLES] + 0.5) / SAMPLES
    near = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in pairwise(corners):
        across, down = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * across + (y - y0) * down) / max(across**2 + down**2, 1e-12), 0, 1)
        near |= (x - x0 - along * across) ** 2 + (y - y0 - along * down) ** 2 <= 0.25
    return near


def at_grid(selected: Bool[np.ndarray, "height width"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """The selection on another grid: tokens of which at least half is selected, or else those with the largest share.

    >>> at_grid(np.array([[True, False], [True, False]]), (1, 1))
    array([[ True]])
    """
    shares = as_mask(selected, grid)[0].numpy()
    return np.asarray(shares >= min(0.5, shares.max()) - 1e-6)


def _slider(name: str, last: int, side: int) -> Any:
    return widget(
        widgets.IntRangeSlider,
        f"token-{name}",
        side,
        value=(1, last),
        min=1,
        max=last,
        description=name,
        continuous_update=False,
    )


def _selectable(grid: tuple[int, int]) -> go.FigureWidget:
    """An image with one marker in the middle of each token, seen when selected."""
    height, width = grid
    y, x = np.mgrid[:height, :width].reshape(2, -1) + 0.5
    made = _canvas(grid, SIDE).update_layout(dragmode="select", showlegend=False)
    square = {"symbol": "square", "size": 0.84 * SIDE / max(grid), "opacity": 0, "color": "white"}
    made.add_scatter(
        x=x, y=y, mode="markers", hoverinfo="skip", marker={**square, "line": {"width": 1, "color": "black"}},
        selected={"marker": {"opacity": 0.3}}, unselected={"marker": {"opacity": 0}},
    )  # fmt: skip
    return _with_buttons(made, "select2d", "lasso2d")


def _drawable(grid: tuple[int, int]) -> go.FigureWidget:
    """An image to draw shapes on."""
    made = _canvas(grid, DRAWN_SIDE).update_layout(
        dragmode="drawrect", newshape=_PEN, activeshape={"fillcolor": _PEN["fillcolor"], "opacity": 1}
    )
    return _with_buttons(made, "drawrect", "drawclosedpath", "drawopenpath", "eraseshape")


def _canvas(grid: tuple[int, int], side: int) -> go.Figure:
    """An image from (0, 0) to (width, height) in tokens, `side` pixels long."""
    height, width = grid
    cell = side / max(grid)
    made = go.Figure()
    made.add_layout_image(
        x=0, y=0, sizex=width, sizey=height, xref="x", yref="y", sizing="stretch", layer="below"
    )  # fmt: skip
    made.update_layout(
        width=round(cell * width), height=round(cell * height) + BAR, margin={"l": 0, "r": 0, "t": BAR, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    made.update_xaxes(range=[0, width], visible=False, fixedrange=True)
    made.update_yaxes(range=[height, 0], visible=False, fixedrange=True)
    return made


def _with_buttons(made: go.Figure, *buttons: str) -> go.FigureWidget:
    """The figure as a widget that offers these of plotly's buttons and nothing else."""
    shown = _figure_widget()(made)
    shown._config = {
        "displaylogo": False,
        "displayModeBar": True,
        "modeBarButtons": [list(buttons)],
        "editSelection": False,
    }
    return shown


def _figure_widget() -> type[go.FigureWidget]:
    """FigureWidget, which takes long to import, with two changes of what passes between it and a page."""

    class Figure(go.FigureWidget):  # type: ignore[misc]
        _made = False

        def open(self) -> None:
            """A page hears of it when this is called once more, and not while it is being made.

            A slow page shows a figure as it was when the page first heard of it, and misses what came soon after.
            """
            if self._made:
                super().open()
            self._made = True

        def plotly_relayout(self, relayout_data: Mapping[str, Any], **source: Any) -> None:
            """What a page tells of shapes is made whole and plain: see `_with_whole_shapes`."""
            shapes = self.layout.to_plotly_json().get("shapes", [])
            super().plotly_relayout(_with_whole_shapes(relayout_data, shapes), **source)

    return Figure


def _with_whole_shapes(changes: Mapping[str, Any], shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """Changes of a layout in which all shapes stand whole, with nothing but what is needed to draw them.

    A page tells of a dragged shape in parts (`shapes[0].x1`), which plotly refuses where the page drew it, and of a new
    one with attributes that are not defined, which equal nothing.

    >>> _with_whole_shapes({"shapes[0].x1": 5, "dragmode": "drawrect"}, [{"x0": 0, "x1": 1}])
    {'dragmode': 'drawrect', 'shapes': [{'x0': 0, 'x1': 5}]}
    """
    parts = {key: found for key in changes if (found := re.fullmatch(r"shapes\[(\d+)\]\.(\w+)", key))}
    whole = {key: value for key, value in changes.items() if key not in parts}
    if parts:
        whole["shapes"] = shapes
    if "shapes" in whole:
        whole["shapes"] = [{key: shape[key] for key in _NEEDED if key in shape} for shape in whole["shapes"]]
    for key, found in parts.items():
        if int(found[1]) < len(shapes):
            whole["shapes"][int(found[1])][found[2]] = changes[key]
    return whole

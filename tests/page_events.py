"""What plotly sends from the page, sent to a figure that is in no page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SELECTORS: dict[str | None, Any] = {
    None: None,
    "box": {"type": "box", "selector_state": {"xrange": [0, 1], "yrange": [0, 1]}},
    "lasso": {"type": "lasso", "selector_state": {"xs": [0, 1, 1], "ys": [0, 0, 1]}},
}

UNDEFINED = {"name": "_undefined_", "legendwidth": "_undefined_", "editable": True, "xref": "x", "yref": "y"}
"""What else a page says of a shape, among other things."""


def drag(figure: Any, tokens: Sequence[int], kind: str | None = "box") -> None:
    """A drag has enclosed these markers; with `kind` None, an outline that Python drew has."""
    _send(figure, "plotly_selected", tokens, SELECTORS[kind])


def leave(figure: Any) -> None:
    """A double click has ended a selection."""
    _send(figure, "plotly_deselect", [], None)


def draw(figure: Any, *shapes: dict[str, Any]) -> None:
    """These shapes are on the picture now."""
    _relayout(figure, {"shapes": [UNDEFINED | shape for shape in shapes]})


def move(figure: Any, at: int, **places: Any) -> None:
    """A shape that was drawn has been dragged."""
    _relayout(figure, {f"shapes[{at}].{name}": place for name, place in places.items()})


def _relayout(figure: Any, changes: dict[str, Any]) -> None:
    figure.set_state({"_js2py_relayout": {"relayout_data": changes, "source_view_id": "page"}})


def _send(figure: Any, event: str, tokens: Sequence[int], selector: Any) -> None:
    (markers,) = figure.data
    points = {
        "trace_indexes": [0] * len(tokens),
        "point_indexes": list(tokens),
        "xs": [markers.x[token] for token in tokens],
        "ys": [markers.y[token] for token in tokens],
    }
    figure._js2py_pointsCallback = {"event_type": event, "points": points, "selector": selector, "device_state": None}

"""Controls of forms in a notebook, made the same way everywhere so that a page or a test finds them."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets


def widget(kind: type[widgets.DOMWidget], name: str, width: int | None = None, **options: Any) -> Any:
    """A widget of this width in pixels, with the class `sae-<name>`, by which a page or a test finds it."""
    made = kind(layout=widgets.Layout(width=f"{width}px" if width else "auto"), **options)
    made.style.description_width = "initial"
    made.add_class(f"sae-{name}")
    return made


def line(controls: list[widgets.Widget]) -> widgets.HBox:
    """Controls side by side, in as many lines as they need."""
    return widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))

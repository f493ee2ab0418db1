"""Panels: a piece of HTML in a notebook, made here and only shown there, in which a latent's number can be pressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets


class Panel(anywidget.AnyWidget):
    """Shows `value`, HTML made by `html`; a card in it, or what has `data-latent`, calls `on_open` when pressed.

    With the mouse, or with Tab or the arrow keys and Enter. Page Up and Page Down call `on_turn` with −1 and 1.
    """

    _esm = Path(__file__).with_name("panel.js")
    value = traitlets.Unicode().tag(sync=True)
    turns = traitlets.Bool().tag(sync=True)
    takes_focus = traitlets.Unicode().tag(sync=True)
    """CSS selector of what takes the keyboard's focus, once."""

    def __init__(self, name: str, on_open: Callable[[int], None], on_turn: Callable[[int], None] | None = None) -> None:
        super().__init__(turns=on_turn is not None)
        self.add_class(f"sae-{name}")
        self._on_open, self._on_turn = on_open, on_turn
        self.on_msg(lambda panel, content, buffers: self._hear(content))

    def _hear(self, content: Any) -> None:
        """Whatever a page sends: only whole numbers count."""
        said = content if isinstance(content, dict) else {}
        if isinstance(latent := said.get("open"), int):
            self._on_open(latent)
        elif isinstance(pages := said.get("turn"), int) and self._on_turn is not None:
            self._on_turn(pages)

"""Rows of a form in which features are chosen to be changed: which, how, and how strongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from sdxl_sae_kit.forms import line, widget

Feature = tuple[str, int]
"""Hookpoint and latent."""

N_ROWS = 8
"""How many features can be changed at once."""


@dataclass(frozen=True)
class Verb:
    """How a latent can be changed: by strengths from `least` to `most` in steps of `step`, at first by `begin`."""

    least: float
    most: float
    step: float
    begin: float
    unchanging: float | None
    """The strength at which nothing changes, whatever the image."""
    unit: str


VERBS = {
    "scale": Verb(-2, 8, 0.1, 1, 1, "× its activation"),
    "add": Verb(-20, 20, 0.5, 0, 0, "× its mean activation"),
    "clamp": Verb(0, 20, 0.5, 1, None, "× its mean activation"),
}


@dataclass(frozen=True)
class Change:
    """One feature and what is to be done to it."""

    hookpoint: str
    latent: int
    verb: str
    strength: float
    """As `steer` takes it."""

    def __str__(self) -> str:
        return f"{self.verb} latent {self.latent} of {self.hookpoint}: {self.strength:g} {VERBS[self.verb].unit}"


class FeatureRow(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Controls for one feature; `on_change` is called after each change, `tell` says in HTML what is known of it."""

    def __init__(
        self,
        latents: Mapping[str, int],
        first: Change,
        *,
        tell: Callable[[str, int], str],
        on_change: Callable[[], None],
        on_remove: Callable[[FeatureRow], None],
    ) -> None:
        self._latents, self._tell, self._on_change = latents, tell, on_change
        self.block = widget(widgets.Dropdown, "row-block", 105, options=list(latents), value=first.hookpoint)
        last = latents[first.hookpoint] - 1
        self.latent = widget(
            widgets.BoundedIntText, "row-latent", 130, value=first.latent, max=last, description="latent"
        )
        self.verb = widget(widgets.Dropdown, "row-verb", 80, options=list(VERBS), value=first.verb)
        self.strength = widget(
            widgets.FloatSlider, "row-strength", 300, **_range(VERBS[first.verb]), value=first.strength,
            readout_format=".1f",
        )  # fmt: skip
        self.remove = widget(widgets.Button, "row-remove", 36, icon="times", tooltip="Remove this feature")
        self.about = widget(widgets.HTML, "row-about")
        controls = line([self.block, self.latent, self.verb, self.strength, self.remove])
        super().__init__([controls, self.about])
        self.add_class("sae-row")
        self.tell()
        self.block.observe(lambda change: self._moved(), "value")
        self.latent.observe(lambda change: self._told(), "value")
        self.verb.observe(lambda change: self._turned(), "value")
        self.strength.observe(lambda change: on_change(), "value")
        self.remove.on_click(lambda button: on_remove(self))

    @property
    def change(self) -> Change:
        """What the row says; a slider's steps add up to no round numbers, so the strength is rounded."""
        return Change(self.block.value, self.latent.value, self.verb.value, round(self.strength.value, 6))

    def tell(self) -> None:
        """Say anew what is known of the feature."""
        self.about.value = self._tell(self.block.value, self.latent.value)

    def _moved(self) -> None:
        self.latent.max = self._latents[self.block.value] - 1  # which corrects a number that is too large here
        self._told()

    def _told(self) -> None:
        self.tell()
        self._on_change()

    def _turned(self) -> None:
        """Another verb has other strengths, and begins where it changes little."""
        verb = VERBS[self.verb.value]
        with self.strength.hold_trait_notifications():
            self.strength.min, self.strength.max, self.strength.step = verb.least, verb.most, verb.step
            self.strength.value = verb.begin
        self._on_change()


def _range(verb: Verb) -> dict[str, Any]:
    return {"min": verb.least, "max": verb.most, "step": verb.step}


class FeatureRows(widgets.VBox):  # type: ignore[misc]
    """Up to eight rows and the button that adds one; `suggest` says which features to take next, the best first."""

    def __init__(
        self,
        latents: Mapping[str, int],
        *,
        tell: Callable[[str, int], str],
        suggest: Callable[[], Iterable[Feature]],
        on_change: Callable[[], None],
    ) -> None:
        self._latents, self._tell, self._suggest, self._on_change = latents, tell, suggest, on_change
        self.listed = widgets.VBox()
        self.add = widget(widgets.Button, "add", 130, description="Add a feature", icon="plus")
        self.add.on_click(lambda button: self._add())
        super().__init__([self.listed, line([self.add])])

    @property
    def changes(self) -> tuple[Change, ...]:
        """What the rows say."""
        return tuple(row.change for row in self.listed.children)

    def fill(self, features: Iterable[Feature]) -> None:
        """Rows for these features, the first turned off and the others as they are."""
        self._show([self._row(feature, float(at > 0)) for at, feature in enumerate(features)])

    def tell(self) -> None:
        """Say anew what is known of each feature."""
        for row in self.listed.children:
            row.tell()

    def _row(self, feature: Feature, scale: float) -> FeatureRow:
        first = Change(*feature, "scale", scale)
        return FeatureRow(self._latents, first, tell=self._tell, on_change=self._on_change, on_remove=self._remove)

    def _show(self, rows: list[FeatureRow]) -> None:
        self.listed.children = rows
        self.add.disabled = len(rows) >= N_ROWS

    def _add(self) -> None:
        """A row for the best feature that has none yet, as it is."""
        taken = {(change.hookpoint, change.latent) for change in self.changes}
        fallback = (next(iter(self._latents)), 0)
        feature = next((feature for feature in self._suggest() if feature not in taken), fallback)
        self._show([*self.listed.children, self._row(feature, 1.0)])
        self._on_change()

    def _remove(self, removed: FeatureRow) -> None:
        self._show([row for row in self.listed.children if row is not removed])
        self._on_change()

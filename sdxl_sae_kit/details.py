"""One feature in a notebook: its images in several views, what was measured, and the form for its label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, SupportsIndex

import ipywidgets as widgets

from sdxl_sae_kit import cards, html
from sdxl_sae_kit.cards import VIEWS, Subject
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.labels import Label, LabelStore
from sdxl_sae_kit.panels import Panel

NOT_SAID = -1.0
"""Place of the slider where nobody said how sure they are: it has no place for None."""
STATIC = "Static copy: label it in JupyterLab."


class Viewer(widgets.HBox):  # type: ignore[misc]  # ipywidgets has no types
    """Which images of a feature are shown, and how strongly the heat maps cover them; tells `on_change` of a choice."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        views = [(name, key) for key, (name, _) in VIEWS.items()]
        self.view = widget(widgets.ToggleButtons, "view", options=views, tooltips=[told for _, told in VIEWS.values()])
        self.view.style.button_width = "auto"
        self.again = widget(widgets.Button, "again", 120, description="Draw again", icon="random", disabled=True)
        self.opacity = widget(
            widgets.FloatSlider, "opacity", 260, min=0, max=1, step=0.05, value=cards.OPACITY, readout_format=".0%",
            description="heat map", continuous_update=False,
        )  # fmt: skip
        self.draw = 0
        self._on_change = on_change
        row = line([self.view, self.again, self.opacity])
        super().__init__(row.children, layout=row.layout)
        self.view.observe(lambda change: self._switch(), "value")
        self.opacity.observe(lambda change: on_change(), "value")
        self.again.on_click(lambda button: self._draw_again())

    def images(self, stats: FeatureStats, feature: int) -> tuple[str, list[int]]:
        """The chosen images of a feature as HTML, and which they are."""
        examples = cards.chosen(stats, feature, self.view.value, self.draw)
        shown = cards.images(stats, feature, self.view.value, examples, self.opacity.value)
        return shown, [example.image for example in examples]

    def _switch(self) -> None:
        self.again.disabled = self.view.value != "random"
        self._on_change()

    def _draw_again(self) -> None:
        self.draw += 1
        self._on_change()


class LabelForm(widgets.VBox):  # type: ignore[misc]
    """The label of a latent: text, tags and how sure one is, to save, withdraw and undo; `on_change` redraws."""

    def __init__(self, labels: LabelStore, on_change: Callable[[], None]) -> None:
        self._labels, self._on_change = labels, on_change
        self.feature = 0
        self.evidence: dict[str, Any] = {}
        """What is on the screen beside the form."""
        shares = [("not said", NOT_SAID), *((f"{share} %", share / 100) for share in range(0, 101, 5))]
        self.text = widget(widgets.Text, "label", 400, placeholder="What does it respond to?", description="label")
        self.tags = widget(widgets.Text, "tags", 240, placeholder="colour; background", description="tags")
        self.confidence = widget(
            widgets.SelectionSlider, "confidence", 300, options=shares, value=NOT_SAID, description="how sure",
            continuous_update=False,
        )  # fmt: skip
        self.save = widget(widgets.Button, "save", 70, description="Save", button_style="primary")
        self.withdraw = widget(widgets.Button, "withdraw", 100, description="Withdraw")
        self.undo = widget(
            widgets.Button, "undo", 80, description="Undo", tooltip="Take back your last change of a label"
        )
        self.notice = widget(widgets.HTML, "notice")
        super().__init__(
            [line([self.text, self.tags, self.confidence]), line([self.save, self.withdraw, self.undo, self.notice])]
        )
        self.save.on_click(lambda button: self._try(self._save))
        self.withdraw.on_click(lambda button: self._try(self._withdraw))
        self.undo.on_click(lambda button: self._try(self._undo))

    def show(self, feature: int) -> None:
        """The form for this latent, as it is labelled now."""
        self.feature, self.notice.value = feature, ""
        self._fill()

    def _fill(self) -> None:
        label = self._labels.latest(self.feature)
        text, tags, sure = (label.text or "", label.tags, label.confidence) if label else ("", (), None)
        self.text.value, self.tags.value = text.replace("\n", " "), "; ".join(tags)
        self.confidence.value = NOT_SAID if sure is None else 5 * round(20 * sure) / 100
        self._stood = {self.text: (self.text.value, text), self.confidence: (self.confidence.value, sure)}

    def _said(self, field: widgets.Widget) -> Any:
        """What a field says. It has one line or whole steps: what nobody changed is what stood, not what it shows."""
        shown, stood = self._stood[field]
        return stood if field.value == shown else field.value

    def _try(self, change: Callable[[], str]) -> None:
        """Make a change, or say why not where it was asked for."""
        try:
            self.notice.value = change()
        except (KitError, OSError) as error:
            self.notice.value = html.escape(error)
            return
        self._fill()
        self._on_change()

    def _save(self) -> str:
        tags = tuple(tag for tag in self.tags.value.split(";") if tag.strip())
        sure = self._said(self.confidence)
        label = self._labels.set(
            self.feature,
            self._said(self.text),
            tags=tags,
            confidence=None if sure == NOT_SAID else sure,
            evidence=self.evidence,
        )
        return f"Saved {html.words(label.text)} as {_by_whom(label)}."

    def _withdraw(self) -> str:
        self._labels.withdraw(self.feature)
        return "Label withdrawn."

    def _undo(self) -> str:
        label = self._labels.undo()
        now = self._labels.get(label.feature)
        return f"Undone: latent {label.feature} is {html.words(now) if now else 'without label'} again."


class Detail(widgets.VBox):  # type: ignore[misc]
    """One feature: the form for its label, the images it is strongest on, and what was measured."""

    def __init__(
        self,
        subject: Subject,
        *,
        on_open: Callable[[int], None],
        on_back: Callable[[], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        self._subject, self._stats = subject, subject.stats
        self._seen: dict[int, dict[int, None]] = defaultdict(dict)  # latent -> images, in the order they were shown
        self.feature = 0
        self.back = widget(widgets.Button, "back", 130, description="All features", icon="th")
        self.previous = widget(widgets.Button, "previous", 100, description="Previous", icon="chevron-left")
        self.next = widget(widgets.Button, "next", 100, description="Next", icon="chevron-right")
        self.heading = Panel("title", on_open)
        self.form = LabelForm(subject.labels, on_change=self._show_facts)
        self.viewer = Viewer(on_change=self._show_images)
        self.images = widget(widgets.HTML, "images")
        self.facts = Panel("facts", on_open)
        turn = line([self.back, self.previous, self.next])
        super().__init__([turn, self.heading, self.form, self.viewer, self.images, self.facts])
        self.back.on_click(lambda button: on_back())
        self.previous.on_click(lambda button: on_step(self.feature, -1))
        self.next.on_click(lambda button: on_step(self.feature, +1))

    def show(self, feature: SupportsIndex) -> None:
        """Open this latent. Raises KitError if the SAE does not have it."""
        self.feature = cards.known_latent(self._stats, feature)
        self.heading.value = html.fragment(cards.title(self._stats, self.feature))
        self.form.show(self.feature)
        self._show_images()
        self._show_facts()

    def static_html(self) -> str:
        """The same without controls: all views, the label as text."""
        return html.twin(html.quiet(STATIC), cards.feature_html(self._subject, self.feature))

    def _show_images(self) -> None:
        drawn, images = self.viewer.images(self._stats, self.feature)
        self.images.value = html.fragment(drawn)
        seen = self._seen[self.feature]
        seen.update(dict.fromkeys(images))  # an earlier view was seen too, and must not come up in a test
        self.form.evidence = {"shown": self.viewer.view.value, "images": list(seen)}

    def _show_facts(self) -> None:
        self.facts.value = html.fragment(cards.facts(self._subject, self.feature))


def _by_whom(label: Label) -> str:
    return f"{html.words(label.author)}, {label.time:%H:%M:%S} UTC"

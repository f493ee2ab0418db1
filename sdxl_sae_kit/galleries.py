"""Galleries: look through the features of one SAE in a notebook, open one, and give it a label that lasts.

The controls are ipywidgets around one HTML grid. A gallery also has a static twin in plain HTML, which stands in for it
wherever no kernel runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, lru_cache
from typing import Any, SupportsIndex

import ipywidgets as widgets
import numpy as np
from jaxtyping import Bool, Int

from sdxl_sae_kit import cards, html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.cards import Subject
from sdxl_sae_kit.details import Detail
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.panels import Panel
from sdxl_sae_kit.similarity import Specificity

MOST_CARDS = 48
"""Cards on one page: more make a browser slow."""

DRAWING = 4
"""Threads that draw cards: reading and writing WebP lets others run."""

REMEMBERED = 512
"""Pictures of cards kept at hand, so that turning back is quick."""

KEY = "Share of tokens on which the latent fires · below each image, where: dark grey 0 … pale yellow strongest"
KEY_TO_ICONS = " · on the left, what it writes when added alone"
STATIC = "Static copy: see all latents and label them in JupyterLab."

ORDERS = cards.ORDERS | {"specificity": "specificity", "unlabelled": "unlabelled first"}


@checked
def gallery(
    stats: FeatureStats,
    feature: SupportsIndex | None = None,
    *,
    labels: LabelStore | None = None,
    icons: Icons | None = None,
    similarity: Specificity | None = None,
    page_size: int = 24,
    sort: str = "density",
    static: int = 100,
) -> Gallery:
    """Show an SAE's features, or with `feature` the one latent, in a notebook.

    Each card has the four images on which the latent is strongest and, below each, where in it the latent fires; click
    it, or press Enter on its number, to open the latent. Labels are kept in `labels`, by default the file of this SAE
    in the store of `stats`.

    Args:
        stats: of one SAE.
        feature: the latent to open; None shows all.
        labels: where to read and save labels.
        icons: what the features write, from `draw_icons`, to show it too.
        similarity: from `specificity`, to show it and sort by it.
        page_size: cards on a page, at most 48.
        sort: the order to begin with: density, max, mean, moran, specificity, unlabelled or latent.
        static: cards in an exported notebook: the first in the order and filter chosen when it was shown.

    Raises:
        KitError: these are no statistics or have no such latent, there is no such order or it lacks what it sorts by,
            so many cards are impossible, or `icons` or `similarity` are of another SAE.

    >>> kit.gallery(stats)            # doctest: +SKIP
    >>> kit.gallery(stats, 17)        # doctest: +SKIP
    """
    static = whole_number("gallery: static", static, least=0)
    if whole_number("gallery: page_size", page_size) > MOST_CARDS:
        raise KitError(f"gallery: page_size={page_size}, and a page holds 1 to {MOST_CARDS} cards.")
    if sort not in ORDERS:
        raise KitError(f"gallery: no order {sort!r}; there are {', '.join(ORDERS)}.")
    if sort == "specificity" and similarity is None:
        raise KitError("gallery: to sort by specificity, measure it: similarity=kit.specificity(stats).")
    subject = Subject(stats, LabelStore.of(stats) if labels is None else labels, icons, similarity)
    shown = Gallery(subject, page_size=page_size, sort=sort, static=static)
    shown.show(feature)
    return shown


class Gallery(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """All features, a page at a time (`overview`), or one of them (`detail`); made by `gallery`."""

    def __init__(self, subject: Subject, *, page_size: int, sort: str, static: int) -> None:
        super().__init__()
        self.overview = Overview(subject, page_size=page_size, sort=sort, on_open=self._open)
        self._subject, self._static = subject, static

    def __repr__(self) -> str:
        return f"Gallery of {self._subject.stats.sae}"

    @cached_property
    def detail(self) -> Detail:
        """Made when it is first needed: until then its controls would only be messages to the browser."""
        return Detail(self._subject, on_open=self._open, on_back=self._close, on_step=self._step)

    def show(self, feature: SupportsIndex | None = None) -> None:
        """Open one latent, or with None go back to all. Raises KitError for a latent the SAE does not have."""
        if feature is None:
            self.overview.refresh()
            self.children = (self.overview,)
        else:
            self.detail.show(feature)
            self.children = (self.detail,)

    def static_html(self) -> str:
        """What is shown now, without controls: the opened latent, or the first `static` cards as chosen."""
        if self.children == (self.overview,):
            return self.overview.static_html(self._static)
        return self.detail.static_html()

    def _open(self, feature: int) -> None:
        """Open a latent for somebody who pressed it, and who may be using the keyboard."""
        self.show(feature)
        self.detail.heading.takes_focus = "h3"

    def _close(self) -> None:
        self.show()
        self.overview.grid.takes_focus = f'[data-latent="{self.detail.feature}"]'

    def _step(self, feature: int, by: int) -> None:
        """Open the latent that stands `by` places further in the overview's order; at its ends, stay."""
        order = self.overview.chosen()
        place = np.flatnonzero(order == feature)
        if place.size and 0 <= place[0] + by < len(order):
            self.show(int(order[place[0] + by]))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.static_html()}


class Overview(widgets.VBox):  # type: ignore[misc]
    """The controls and the page of cards they choose."""

    def __init__(self, subject: Subject, *, page_size: int, sort: str, on_open: Callable[[int], None]) -> None:
        stats, icons, similarity = subject.stats, subject.icons, subject.similarity
        self._stats, self._labels, self._similarity = stats, subject.labels, similarity
        self._page_size, self._on_open, self.page = page_size, on_open, 0
        self._key = KEY + (KEY_TO_ICONS if icons is not None else "")
        self._picture = lru_cache(REMEMBERED)(lambda latent: cards.card_picture(stats, latent, icons))
        self._ahead = list[Future[str]]()
        orders = [(text, key) for key, text in ORDERS.items() if key != "specificity" or similarity is not None]
        self.sort = widget(widgets.Dropdown, "sort", 190, options=orders, value=sort, description="sort by")
        self.filter = widget(
            widgets.Text, "filter", 280, placeholder="words in labels and prompts", description="filter"
        )
        self.hide_dead = widget(widgets.Checkbox, "hide-dead", 110, value=True, description="hide dead", indent=False)
        self.latent = widget(widgets.IntText, "latent", 140, description="latent")
        self.go = widget(widgets.Button, "open", 70, description="Open")
        self.previous = widget(widgets.Button, "previous", 100, description="Previous", icon="chevron-left")
        self.next = widget(widgets.Button, "next", 100, description="Next", icon="chevron-right")
        self.position = widget(widgets.HTML, "position")
        self.grid = Panel("page", self._try_to_open, on_turn=lambda pages: self.turn_to(self.page + pages))
        choose, turn = (
            [self.sort, self.filter, self.hide_dead, self.latent, self.go],
            [self.previous, self.next, self.position],
        )
        super().__init__([line(choose), line(turn), self.grid])
        self.add_class("sae-overview")
        for control in (self.sort, self.hide_dead, self.filter):
            control.observe(lambda change: self.turn_to(0), "value")
        self.previous.on_click(lambda button: self.turn_to(self.page - 1))
        self.next.on_click(lambda button: self.turn_to(self.page + 1))
        self.go.on_click(lambda button: self._try_to_open(self.latent.value))

    def chosen(self) -> Int[np.ndarray, " chosen"]:
        """Latents that pass the filter, in the chosen order."""
        stats, named, key = self._stats, self._labels.all(), self.sort.value
        latents = stats.alive if self.hide_dead.value else np.arange(stats.d_sae)
        if words := self.filter.value.casefold().split():
            latents = latents[self._matching(words, named)[latents]]
        if key == "specificity" and self._similarity is not None:
            return cards.in_order(latents, self._similarity.value)
        if key == "unlabelled":
            last = np.isin(ranked := cards.in_order(latents, stats.density), list(named))
            return np.concatenate([ranked[~last], ranked[last]])
        return cards.in_order(latents, cards.strength(stats, key))

    def turn_to(self, page: int) -> None:
        """Show this page, or the nearest there is."""
        self.page = page
        self.refresh()

    def refresh(self) -> None:
        """Draw the page anew."""
        latents, size = self.chosen(), self._page_size
        self.page = min(max(self.page, 0), max(len(latents) - 1, 0) // size)
        first, last = self.page * size, min((self.page + 1) * size, len(latents))
        self.previous.disabled, self.next.disabled = first == 0, last == len(latents)
        counted = f"{first + 1:,}–{last:,} of {len(latents):,} latents" if len(latents) else "nothing found"
        self.position.value = f"<span>{counted}{self._left_out()}</span>"
        for picture in self._ahead:
            picture.cancel()
        self.grid.value = html.fragment(self._cards(latents[first:last]))
        # While somebody looks at this page, the next is drawn.
        self._ahead = [_pool().submit(self._picture, latent) for latent in latents[last : last + size].tolist()]

    def static_html(self, most: int) -> str:
        """The first `most` cards, and a line that says what they are of how many."""
        latents = self.chosen()
        counted = f"{min(most, len(latents)):,} of {len(latents):,} latents{self._left_out()}"
        filtered = f", filter: {html.words(self.filter.value)}" if self.filter.value.strip() else ""
        how = f"{counted}, order: {ORDERS[self.sort.value]}{filtered}."
        heading = html.heading(self._stats.sae, how)
        return html.twin(html.quiet(STATIC), heading, self._cards(latents[:most]))

    def _cards(self, latents: np.ndarray) -> str:
        named = self._labels.all()
        pictures = _pool().map(self._picture, latents.tolist())
        drawn = [
            cards.card(self._stats, latent, named.get(latent), picture)
            for latent, picture in zip(latents.tolist(), pictures, strict=True)
        ]
        return (html.quiet(self._key) if drawn else "") + html.grid(drawn)

    def _left_out(self) -> str:
        dead = self._stats.d_sae - len(self._stats.alive)
        return f" ({dead:,} dead hidden)" if dead and self.hide_dead.value else ""

    def _matching(self, words: list[str], named: dict[int, str]) -> Bool[np.ndarray, " latent"]:
        """Latents of which one text, the label or the prompt of one of the strongest images, has words so beginning."""
        beginnings = [re.compile(rf"(?<!\w){re.escape(word)}") for word in words]  # "red" is not in "checkered"

        def has_all(text: str) -> bool:
            return all(beginning.search(text.casefold()) for beginning in beginnings)

        found = np.array([*map(has_all, self._stats.prompts.texts), False])  # the last is for empty places, −1
        matching: Bool[np.ndarray, " latent"] = found[self._stats.top_images].any(axis=1)
        matching[[latent for latent, label in named.items() if has_all(label) and latent < len(matching)]] = True
        return matching

    def _try_to_open(self, latent: int) -> None:
        try:
            self._on_open(latent)
        except KitError as error:
            self.position.value = html.escape(error)


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads of all galleries, made for the first: each shown again is a new one, and nobody closes the old."""
    return ThreadPoolExecutor(DRAWING, "cards")

"""Galleries: look through the features of one SAE in a notebook, open one, and give it a label that lasts.

The controls are ipywidgets around one HTML grid. A gallery also has a static twin in plain HTML, which stands in for it
wherever no kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, SupportsIndex

import ipywidgets as widgets
import numpy as np
from jaxtyping import Bool, Int

from sdxl_sae_kit import html
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import Example, FeatureStats, Ranking
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.sae import FIRES

MOST_CARDS = 48
"""Cards on one page: more make a browser slow."""

SEARCHED = 12
"""Images of each latent, the strongest, whose prompts the filter looks through."""

KEY = "Share of tokens on which the latent fires · below each image, where: dark grey 0 … pale yellow strongest"
STATIC = "Static copy: sort, filter and label it in JupyterLab."

ORDERS = {
    "density": "density",
    "max": "maximum",
    "mean": "mean",
    "unlabelled": "unlabelled first",
    "latent": "latent number",
}


def gallery(
    stats: FeatureStats,
    feature: SupportsIndex | None = None,
    *,
    labels: LabelStore | None = None,
    page_size: int = 24,
    sort: str = "density",
    static: int = 100,
) -> Gallery:
    """Show an SAE's features, or with `feature` the one latent, in a notebook.

    Each card has the four images on which the latent is strongest and, below each, where in it the latent fires. Labels
    are kept in `labels`, by default the file of this SAE in the store of `stats`.

    Args:
        stats: of one SAE.
        feature: the latent to open; None shows all.
        labels: where to read and save labels.
        page_size: cards on a page, at most 48.
        sort: the order to begin with: density, max, mean, unlabelled or latent.
        static: cards in an exported notebook: the first in the order and filter chosen when it was shown.

    Raises:
        KitError: the SAE has no such latent, there is no such order, or a page cannot hold so many cards.

    >>> kit.gallery(stats)            # doctest: +SKIP
    >>> kit.gallery(stats, 17)        # doctest: +SKIP
    """
    if not 1 <= page_size <= MOST_CARDS:
        raise KitError(f"gallery: page_size={page_size}, and a page holds 1 to {MOST_CARDS} cards.")
    if sort not in ORDERS:
        raise KitError(f"gallery: no order {sort!r}; there are {', '.join(ORDERS)}.")
    shown = Gallery(stats, labels or LabelStore.of(stats), page_size=page_size, sort=sort, static=static)
    shown.show(feature)
    return shown


class Gallery(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """All features, a page at a time (`overview`), or one of them (`detail`); made by `gallery`."""

    def __init__(self, stats: FeatureStats, labels: LabelStore, *, page_size: int, sort: str, static: int) -> None:
        super().__init__()
        self.overview = Overview(stats, labels, page_size=page_size, sort=sort, on_open=self.show)
        self.detail = Detail(stats, labels, on_back=self.show, on_step=self._step)
        self._static = static

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
        return self.detail.static_html() if self.children == (self.detail,) else self.overview.static_html(self._static)

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

    def __init__(
        self, stats: FeatureStats, labels: LabelStore, *, page_size: int, sort: str, on_open: Callable[[int], None]
    ) -> None:
        self._stats, self._labels, self._page_size, self._on_open = stats, labels, page_size, on_open
        self.page = 0
        orders = [(text, key) for key, text in ORDERS.items()]
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
        self.grid = widget(widgets.HTML, "page")
        choose, turn = (
            [self.sort, self.filter, self.hide_dead, self.latent, self.go],
            [self.previous, self.next, self.position],
        )
        super().__init__([line(choose), line(turn), self.grid])
        for control in (self.sort, self.hide_dead, self.filter):
            control.observe(lambda change: self.turn_to(0), "value")
        self.previous.on_click(lambda button: self.turn_to(self.page - 1))
        self.next.on_click(lambda button: self.turn_to(self.page + 1))
        self.go.on_click(lambda button: self._open())

    def chosen(self) -> Int[np.ndarray, " chosen"]:
        """Latents that pass the filter, in the chosen order."""
        stats, named, key = self._stats, self._labels.all(), self.sort.value
        latents = stats.alive if self.hide_dead.value else np.arange(stats.d_sae)
        if words := self.filter.value.casefold().split():
            latents = latents[self._matching(words, named)[latents]]
        if key == "latent":
            return latents
        strength = {"max": stats.max, "mean": stats.mean}.get(key, stats.density)
        goes_last = np.isin(latents, list(named)) & (key == "unlabelled")
        return latents[np.lexsort((latents, -strength[latents], goes_last))]

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
        self.grid.value = html.fragment(self._cards(latents[first:last]))

    def static_html(self, most: int) -> str:
        """The first `most` cards, and a line that says what they are of how many."""
        latents = self.chosen()
        counted = f"{min(most, len(latents)):,} of {len(latents):,} latents{self._left_out()}"
        filtered = f", filter: {html.words(self.filter.value)}" if self.filter.value.strip() else ""
        how = f"{counted}, order: {ORDERS[self.sort.value]}{filtered}."
        heading = html.heading(self._stats.sae, how)
        return html.fragment(html.quiet(STATIC), heading, self._cards(latents[:most]))

    def _cards(self, latents: np.ndarray) -> str:
        named = self._labels.all()
        cards = [feature_card(self._stats, latent, named.get(latent)) for latent in latents.tolist()]
        return (html.quiet(KEY) if cards else "") + html.grid(cards)

    def _left_out(self) -> str:
        dead = self._stats.d_sae - len(self._stats.alive)
        return f" ({dead:,} dead hidden)" if dead and self.hide_dead.value else ""

    def _matching(self, words: list[str], named: dict[int, str]) -> Bool[np.ndarray, " latent"]:
        """Latents of which one text, the label or the prompt of one of the strongest images, has all the words."""

        def has_all(text: str) -> bool:
            return all(word in text.casefold() for word in words)

        found = np.array([has_all(prompt) for prompt in self._stats.prompts.texts])
        matching: Bool[np.ndarray, " latent"] = (found[self._strongest] & self._fires).any(axis=0)
        matching[[latent for latent, label in named.items() if has_all(label) and latent < len(matching)]] = True
        return matching

    @cached_property
    def _strongest(self) -> Int[np.ndarray, "searched latent"]:
        """The images whose prompts are searched for each latent."""
        return np.argsort(-self._stats.image_activations("max"), axis=0, kind="stable")[:SEARCHED]

    @cached_property
    def _fires(self) -> Bool[np.ndarray, "searched latent"]:
        return np.take_along_axis(self._stats.image_activations("max"), self._strongest, axis=0) > FIRES

    def _open(self) -> None:
        try:
            self._on_open(self.latent.value)
        except KitError as error:
            self.position.value = html.escape(error)


class Detail(widgets.VBox):  # type: ignore[misc]
    """One feature: what was measured, the images it is strongest on, and the form for its label."""

    def __init__(
        self,
        stats: FeatureStats,
        labels: LabelStore,
        *,
        on_back: Callable[[], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        self._stats, self._labels = stats, labels
        self.feature = 0
        self.back = widget(widgets.Button, "back", 130, description="All features", icon="th")
        self.previous = widget(widgets.Button, "previous", 100, description="Previous", icon="chevron-left")
        self.next = widget(widgets.Button, "next", 100, description="Next", icon="chevron-right")
        self.text = widget(widgets.Text, "label", 400, placeholder="What does it respond to?", description="label")
        self.save = widget(widgets.Button, "save", 70, description="Save", button_style="primary")
        self.withdraw = widget(widgets.Button, "withdraw", 100, description="Withdraw")
        self.notice = widget(widgets.HTML, "notice")
        self.body = widget(widgets.HTML, "feature")
        turn, name = [self.back, self.previous, self.next], [self.text, self.save, self.withdraw, self.notice]
        super().__init__([line(turn), line(name), self.body])
        self.back.on_click(lambda button: on_back())
        self.previous.on_click(lambda button: on_step(self.feature, -1))
        self.next.on_click(lambda button: on_step(self.feature, +1))
        self.save.on_click(lambda button: self._save())
        self.withdraw.on_click(lambda button: self._withdraw())

    def show(self, feature: SupportsIndex) -> None:
        """Open this latent. Raises KitError if the SAE does not have it."""
        self.feature = _known_latent(self._stats, feature)
        self.text.value = self._labels.get(self.feature) or ""
        self.notice.value = ""
        self.body.value = html.fragment(feature_html(self._stats, self.feature))

    def static_html(self) -> str:
        """The same without controls, the label as text."""
        label = self._labels.get(self.feature)
        return html.fragment(html.quiet(STATIC), feature_html(self._stats, self.feature, label or "no label"))

    def _save(self) -> None:
        try:
            label = self._labels.set(self.feature, self.text.value)
        except (KitError, OSError) as error:
            self.notice.value = f"Not saved: {html.escape(error)}"
            return
        self.text.value = label.text or ""
        self.notice.value = f"Saved {html.words(label.text)} as {html.words(label.author)}, {label.time:%H:%M:%S} UTC."

    def _withdraw(self) -> None:
        try:
            self._labels.withdraw(self.feature)
        except (KitError, OSError) as error:
            self.notice.value = html.escape(error)
            return
        self.text.value, self.notice.value = "", "Label withdrawn."


def feature_card(stats: FeatureStats, feature: int, label: str | None) -> str:
    """One card of a gallery: latent, label, density, and its four strongest images in one picture."""
    examples = stats.examples(feature, "max", 4) if stats.density[feature] > 0 else []
    if not examples:
        return html.card(str(feature), label, "dead", '<p class="sae-quiet">It fired on no token.</p>')
    prompts = "; ".join(example.prompt[:80] for example in examples)
    alt = f"Latent {feature}: the images it is strongest on, each with its heat map. Prompts: {prompts}"
    return html.card(
        str(feature),
        label,
        _percent(float(stats.density[feature])),
        _strip(examples, float(stats.max[feature]), alt, tile=64, below=True, places=4),
    )


def feature_html(stats: FeatureStats, feature: int, label: str = "") -> str:
    """Everything measured of one feature: statistics with formula and n, examples by spatial maximum and by mean."""
    title = f"Latent {feature} · {label}" if label else f"Latent {feature}"
    heading = html.heading(title, html.escape(f"{stats.hookpoint}, {stats.sae}"))
    if not stats.density[feature] > 0:
        return f"{heading}<p>This latent is dead: it fired on none of the {stats.n_tokens:,} tokens measured.</p>"
    key = html.scale(float(stats.max[feature]))
    return "".join(
        [
            heading,
            html.table(_measured(stats, feature)),
            f"<h4>Strongest at one token {key}</h4>{_examples(stats, feature, 'max')}",
            f"<h4>Strongest on average over the image {key}</h4>{_examples(stats, feature, 'mean')}",
        ]
    )


def _measured(stats: FeatureStats, feature: int) -> list[dict[str, object]]:
    density, images = float(stats.density[feature]), float(stats.image_density[feature])
    tokens, firing = f"{stats.n_tokens:,} tokens", f"{round(density * stats.n_tokens):,} firing tokens"
    rows = [
        ("density", _percent(density), f"tokens with z > {FIRES} / all tokens", tokens),
        ("image density", _percent(images), "images with a firing token / all images", f"{stats.n_images:,} images"),
        ("mean", html.short(float(stats.mean[feature])), "mean of z over firing tokens", firing),
        (
            "standard deviation",
            html.short(float(stats.std[feature])),
            "standard deviation of z over firing tokens",
            firing,
        ),
        ("maximum", html.short(float(stats.max[feature])), "largest z", tokens),
    ]
    return [dict(zip(("statistic", "value", "formula", "n"), row, strict=True)) for row in rows]


def _examples(stats: FeatureStats, feature: int, by: Ranking) -> str:
    drawn = []
    for example in stats.examples(feature, by):
        alt = f"Image {example.image}, and beside it where latent {feature} fires: {example.prompt}"
        drawn.append(
            (
                _strip([example], float(stats.max[feature]), alt, tile=104, below=False),
                html.short(example.value),
                example.prompt,
            )
        )
    return html.figures(drawn)


def _strip(examples: list[Example], peak: float, alt: str, *, tile: int, below: bool, places: int = 1) -> str:
    pairs = [(example.thumbnail, example.heat_map) for example in examples]
    return html.picture(html.strip(pairs, peak, tile, below, places), alt)


def _percent(share: float) -> str:
    return f"{html.short(100 * share)} %"


def _known_latent(stats: FeatureStats, feature: SupportsIndex) -> int:
    latent = feature.__index__()
    if not 0 <= latent < stats.d_sae:
        raise KitError(f"No latent {latent} in {stats.sae}; it has 0 to {stats.d_sae - 1:,}.")
    return latent

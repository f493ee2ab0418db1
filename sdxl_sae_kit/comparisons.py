"""Comparisons: two features side by side in a notebook, under the same controls."""

from __future__ import annotations

from typing import Any, SupportsIndex

import ipywidgets as widgets

from sdxl_sae_kit import cards, html
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.details import Viewer
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats, Neighbour
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.labels import LabelStore

STATIC = "Static copy: choose other features in JupyterLab."
Side = tuple[FeatureStats, int]
"""One of the two: statistics of an SAE, and a latent of it."""


@checked
def compare(a: tuple[FeatureStats, SupportsIndex], b: tuple[FeatureStats, SupportsIndex]) -> Comparison:
    """Show two features side by side in a notebook: of one SAE, of two, or of one SAE on two caches.

    Args:
        a: statistics and a latent.
        b: the same, for the other side.

    Raises:
        KitError: a side is not such a pair, or its SAE has no such latent.

    >>> kit.compare((stats, 17), (stats, 23))                                          # doctest: +SKIP
    >>> kit.compare((stats["mid.0"], 17), (stats["up.0.1"], 4))                        # doctest: +SKIP
    """
    return Comparison(_side(a), _side(b))


class Comparison(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Two features side by side; made by `compare`."""

    def __init__(self, a: Side, b: Side) -> None:
        self._stats = a[0], b[0]
        self.latents = [
            widget(
                widgets.BoundedIntText,
                f"latent-{name}",
                170,
                value=latent,
                max=stats.d_sae - 1,
                description=f"latent {name}",
            )
            for name, (stats, latent) in zip("AB", (a, b), strict=True)
        ]
        self.viewer = Viewer(on_change=self.refresh)
        self.body = widget(widgets.HTML, "comparison")
        super().__init__([line(self.latents), self.viewer, self.body])
        for latent in self.latents:
            latent.observe(lambda change: self.refresh(), "value")
        self.refresh()

    def __repr__(self) -> str:
        return "Comparison of {} and {}".format(*(stats.sae for stats in self._stats))

    def refresh(self) -> None:
        """Draw both sides anew."""
        self.body.value = html.fragment(self._drawn())

    def static_html(self) -> str:
        """What is shown now, without controls."""
        return html.twin(html.quiet(STATIC), self._drawn())

    def _drawn(self) -> str:
        a, b = ((stats, latent.value) for stats, latent in zip(self._stats, self.latents, strict=True))
        columns = "".join(f"<div>{self._column(name, side)}</div>" for name, side in (("A", a), ("B", b)))
        both = f"{html.table(_measured(a, b))}{html.table(_shared(a, b), 'What they have in common')}"
        return f'<div class="sae-columns">{columns}</div>{both}'

    def _column(self, name: str, side: Side) -> str:
        stats, latent = side
        label = LabelStore.of(stats).get(latent)
        title = html.heading(f"{name}: latent {latent}" + (f" · {label}" if label else ""), html.escape(stats.sae))
        return title + self.viewer.images(stats, latent)[0]

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.static_html()}


def _side(side: Any) -> Side:
    if not (isinstance(side, tuple | list) and len(side) == 2 and isinstance(side[0], FeatureStats)):
        raise KitError(f"compare takes two pairs (statistics, latent), such as (stats, 17), not {side!r}.")
    return side[0], cards.known_latent(*side)


def _measured(a: Side, b: Side) -> list[dict[str, object]]:
    """The statistics of both, each with its formula and n."""
    return [
        {"statistic": name, "A": value, "n of A": n, "B": other, "n of B": other_n, "formula": formula}
        for (name, value, formula, n), (_, other, _, other_n) in zip(
            cards.statistics(*a), cards.statistics(*b), strict=True
        )
    ]


def _shared(a: Side, b: Side) -> list[dict[str, object]]:
    """What only makes sense for features measured on the same images, and of the same SAE."""
    (stats, latent), (other_stats, other) = a, b
    rows: list[tuple[str, str, str, str]] = []
    if stats.prompts.digest == other_stats.prompts.digest:
        top, other_top = ({example.image for example in side.examples(at)} for side, at in (a, b))
        chance = len(top) * len(other_top) / stats.n_images
        formula = f"images among the strongest {len(top)} of A and {len(other_top)} of B"
        rows.append(("top images", f"{len(top & other_top)}", html.short(chance), formula))
    if stats.artifact.folder == other_stats.artifact.folder and latent != other:
        live = min(stats.density[latent], stats.density[other]) > 0  # neighbours are sought among those
        together, alike = (stats.coactive(latent), stats.similar(latent)) if live else ([], [])
        both = html.short(cards.jaccard_by_chance(stats, latent, other))
        rows.append(("fires together", _among(together, other), both, "tokens: both fire / either fires"))
        rows.append(("writes alike", _among(alike, other), "0", "cosine of decoder rows"))
    return [dict(zip(("measure", "value", "by chance", "formula"), row, strict=True)) for row in rows]


def _among(neighbours: list[Neighbour], latent: int) -> str:
    """The value of one of the nearest, or that it is below theirs; – where nothing is known."""
    found = {neighbour.latent: neighbour.value for neighbour in neighbours}
    if latent in found:
        return html.short(found[latent])
    return f"at most {html.short(min(found.values()))}" if found else "–"

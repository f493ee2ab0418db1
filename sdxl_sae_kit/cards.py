"""Cards and pages of features as plain HTML: what was measured of one latent, and the images that show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex, get_args

import numpy as np
from jaxtyping import Float, Int

from sdxl_sae_kit import html, sketches
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import Example, FeatureStats, Neighbour, Ranking
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.similarity import Specificity

VIEWS = {
    "max": ("Strongest", "Strongest at one token, by the largest z"),
    "mean": ("On average", "Strongest on average, by the mean of z over the image"),
    "area": ("Largest area", "Largest area, by the share of tokens on which it fires"),
    "quantiles": ("Quantiles", "From all over the images on which it fires, weakest quarter first, by the largest z"),
    "random": ("Random", "Drawn at random, whether it fires there or not, with the largest z"),
}
"""Which images of a latent are shown: the name of the tab, and what it means."""

ORDERS = {"density": "density", "max": "maximum", "mean": "mean", "moran": "Moran's I", "latent": "latent number"}
"""What all statistics can be sorted by, and what people call it."""

QUARTERS = ("weakest quarter", "second quarter", "third quarter", "strongest quarter")
RANDOM = 12
"""Images drawn at random."""
OPACITY = 0.8
"""Of heat maps, where nobody chose another."""


@dataclass(frozen=True)
class Subject:
    """What is known of the features of one SAE. Raises KitError for labels, icons or specificity of another SAE."""

    stats: FeatureStats
    labels: LabelStore
    icons: Icons | None = None
    similarity: Specificity | None = None

    def __post_init__(self) -> None:
        for name, other in (("labels", self.labels), ("icons", self.icons), ("similarity", self.similarity)):
            if other is not None and other.sae not in (None, self.stats.sae):  # a label file may not say whose it is
                raise KitError(f"The {name} are of {other.sae}, but the statistics of {self.stats.sae}. Pass its own.")


def known_latent(stats: FeatureStats, feature: SupportsIndex) -> int:
    """The latent as an integer. Raises KitError if the SAE does not have it."""
    latent = feature.__index__()
    if not 0 <= latent < stats.d_sae:
        raise KitError(f"No latent {latent} in {stats.sae}; it has 0 to {stats.d_sae - 1:,}.")
    return latent


def strength(stats: FeatureStats, order: str) -> Float[np.ndarray, " latent"] | None:
    """What one of `ORDERS` goes by; None for latent numbers."""
    found: dict[str, Float[np.ndarray, " latent"]] = {
        "density": stats.density, "max": stats.max, "mean": stats.mean, "moran": stats.moran
    }  # fmt: skip
    return found.get(order)


def in_order(
    latents: Int[np.ndarray, " some"], strength: Float[np.ndarray, " latent"] | None
) -> Int[np.ndarray, " some"]:
    """The latents, strongest first and those of unknown strength last; with None, and where equal, by number."""
    if strength is None:
        return np.sort(latents)
    values = strength[latents]
    return latents[np.lexsort((latents, -np.nan_to_num(values), np.isnan(values)))]


def card_picture(stats: FeatureStats, feature: int, icons: Icons | None = None) -> str:
    """What is drawn on a card, which no label changes: icon, and the four strongest images in one picture."""
    if not stats.density[feature] > 0:
        return '<p class="sae-quiet">It fired on no token.</p>'
    examples = stats.examples(feature, "max", 4)
    prompts = "; ".join(example.prompt[:80] for example in examples)
    alt = f"Latent {feature}: the images it is strongest on, each with its heat map. Prompts: {prompts}"
    pairs = [(example.thumbnail, example.heat_map) for example in examples]
    strip = html.picture(html.strip(pairs, float(stats.max[feature]), 64, places=4), alt)
    drawn = icons.get(feature) if icons is not None else None
    if not drawn:
        return strip
    icon = html.picture(drawn[len(drawn) // 2], f"Icon of latent {feature}: what it writes when added alone")
    return f'<div class="sae-pair">{icon}{strip}</div>'


def card(stats: FeatureStats, feature: int, label: str | None, picture: str) -> str:
    """One card of a gallery: latent, label, density and its picture."""
    density, peak = float(stats.density[feature]), float(stats.max[feature])
    fact = percent(density) if density > 0 else "dead"
    return html.card(str(feature), label, fact, picture, feature, {"density": density, "maximum": peak})


def title(stats: FeatureStats, feature: int, label: str | None = None) -> str:
    """The heading of a feature's page."""
    named = f"Latent {feature} · {label}" if label else f"Latent {feature}"
    return html.heading(named, html.escape(f"{stats.hookpoint}, {stats.sae}"))


def chosen(stats: FeatureStats, feature: int, view: str, draw: int = 0) -> list[Example]:
    """The images of a view, fewer for a latent that fires on few; `draw` numbers the random draws."""
    if view == "quantiles":
        return stats.sample(feature)
    if view in get_args(Ranking):
        return stats.examples(feature, view)  # type: ignore[arg-type]  # it is one of them
    there = stats.pictured
    rng = np.random.default_rng([feature, draw])
    drawn = rng.choice(there, min(RANDOM, len(there)), replace=False).tolist()
    return [_example(stats, feature, image) for image in drawn]


def images(stats: FeatureStats, feature: int, view: str, examples: Sequence[Example], opacity: float = OPACITY) -> str:
    """A view's images, each beside its heat map, with the number by which it was chosen and its prompt."""
    peak = float(stats.max[feature])
    if not examples:
        drawn = view == "random"  # whether it fires there or not
        return html.quiet("No image: this cache keeps no pictures." if drawn else "No image: it fired on no token.")
    key = f"<h4>{VIEWS[view][1]} {html.scale(peak)}</h4>"
    return key + html.figures(
        (
            html.picture(
                html.strip([(example.thumbnail, example.heat_map)], peak, 104, below=False, opacity=opacity),
                f"Image {example.image}, and beside it where latent {feature} fires: {example.prompt}",
            ),
            percent(example.value) if view == "area" else html.short(example.value),
            f"{_quarter(place, len(examples))}{example.prompt}" if view == "quantiles" else example.prompt,
        )
        for place, example in enumerate(examples)
    )


def facts(subject: Subject, feature: int) -> str:
    """All that was measured of a feature: statistics with formula and n, curves, neighbours, tests of its label."""
    stats, labels = subject.stats, subject.labels
    if not stats.density[feature] > 0:
        return f"<p>This latent is dead: it fired on none of the {stats.n_tokens:,} tokens measured.</p>"
    table = html.table([_as_row(*row) for row in statistics(stats, feature, subject.similarity)])
    parts = [_tests(labels, feature), f"<h4>Measured</h4>{table}", _sketches(stats, feature)]
    return "".join([*parts, _writes(subject.icons, feature), _neighbours(stats, feature, labels.all())])


def feature_html(subject: Subject, feature: int) -> str:
    """A feature's whole page without controls: what `facts` says, and the images of every view, most of them folded."""
    stats, label = subject.stats, subject.labels.get(feature)
    parts = [title(stats, feature, label or "no label"), facts(subject, feature)]
    if stats.density[feature] > 0:
        drawn = {view: images(stats, feature, view, chosen(stats, feature, view)) for view in VIEWS}
        parts += [drawn.pop("max"), *(html.folded(VIEWS[view][0], shown) for view, shown in drawn.items())]
    return "".join(parts)


Row = tuple[str, str, str, str]
"""Name, value, formula and n of a statistic."""


def statistics(stats: FeatureStats, feature: int, similarity: Specificity | None = None) -> list[Row]:
    """What was measured of a feature over how many, each with its formula and, if it is an estimate, its interval."""
    density, share = float(stats.density[feature]), float(stats.image_density[feature])
    tokens, firing = f"{stats.n_tokens:,} tokens", f"{round(density * stats.n_tokens):,} firing tokens"
    varying = f"{round(float(stats.moran_n[feature])):,} images"
    mean, std, peak = (html.short(float(array[feature])) for array in (stats.mean, stats.std, stats.max))
    chance = html.short(-1 / max(stats.grid[0] * stats.grid[1] - 1, 1))
    moran = _estimate(stats.moran[feature], stats.moran_low[feature], stats.moran_high[feature])
    rows = [
        ("density", percent(density), f"tokens with z > {FIRES} / all tokens", tokens),
        ("image density", percent(share), "images with a firing token / all images", f"{stats.n_images:,} images"),
        ("mean", mean, "mean of z over firing tokens", firing),
        ("standard deviation", std, "standard deviation of z over firing tokens", firing),
        ("maximum", peak, "largest z", tokens),
        ("Moran's I", moran, f"mean over images where it fires and varies; scattered at random: {chance}", varying),
    ]
    if similarity is not None:
        least, most = similarity.baseline_interval
        random = f"random images: {_estimate(similarity.baseline, least, most)}"
        formula = f"mean cosine of all pairs of its top images, by {similarity.judge}; {random}"
        value = _estimate(similarity.value[feature], similarity.low[feature], similarity.high[feature])
        rows.append(("specificity", value, formula, f"{similarity.n[feature]:,} images"))
    return rows


def jaccard_by_chance(stats: FeatureStats, a: int, b: int) -> float:
    """The Jaccard index of two latents that fire as often as these, independently of each other."""
    one, other = float(stats.density[a]), float(stats.density[b])
    return one * other / max(one + other - one * other, 1e-12)


def percent(share: float) -> str:
    """A share in percent, in three figures."""
    return f"{html.short(100 * share)} %"


def _as_row(name: str, value: str, formula: str, n: str) -> dict[str, object]:
    return {"statistic": name, "value": value, "formula": formula, "n": n}


def _estimate(*numbers: SupportsFloat) -> str:
    """A value with the ends of its interval; – where there is none."""
    value, low, high = map(float, numbers)
    return f"{html.short(value)} [{html.short(low)}, {html.short(high)}]" if np.isfinite(value) else "–"


def _example(stats: FeatureStats, feature: int, image: int) -> Example:
    heat_map = stats.heat_map(feature, image)
    prompt, seed = stats.prompts.texts[image], stats.prompts.seeds[image]
    return Example(image, prompt, seed, float(heat_map.max()), heat_map, stats.thumbnail(image))


def _quarter(rank: int, n: int) -> str:
    """The quarter in which the middle of a rank of n lies; none where there are too few to have quarters."""
    return f"{QUARTERS[(4 * rank + 2) // n]}: " if n >= len(QUARTERS) else ""


def _tests(labels: LabelStore, feature: int) -> str:
    label = labels.get(feature)
    tests = [test for test in labels.tests(feature) if test.text == label]
    return html.table([tests[-1].row()], "The latest test of its label; chance is 0.5") if tests else ""


def _sketches(stats: FeatureStats, feature: int) -> str:
    """How often it has which value and, where the cache has more than one step or half, what it does at each."""
    edges, counts = stats.histogram
    drawn = [sketches.histogram("Firing tokens by z, on a log axis", edges, counts[feature])]
    if len(stats.curves) > 1:
        densities, means = defaultdict(list), defaultdict(list)
        for curve in stats.curves:
            densities[curve.half].append((float(curve.step), float(curve.density[feature])))
            means[curve.half].append((float(curve.step), float(curve.mean[feature])))
        drawn.append(sketches.curve("Density by denoising step", densities))
        drawn.append(sketches.curve("Mean of z over firing tokens by denoising step", means))
    return f'<div class="sae-sketches">{"".join(drawn)}</div>'


def _writes(icons: Icons | None, feature: int) -> str:
    drawn = icons.get(feature) if icons is not None else None
    if icons is None or not drawn:
        return ""
    pictures = [(html.picture(icons.plain, "The empty prompt's image"), "0", "nothing added")] + [
        (html.picture(webp, f"What latent {feature} writes at strength {strength:g}"), f"{strength:g}", "× mean × k")
        for webp, strength in zip(drawn, icons.strengths, strict=True)
    ]
    return f"<h4>What it writes, added alone to the empty prompt's image</h4>{html.figures(pictures)}"


def _neighbours(stats: FeatureStats, feature: int, named: Mapping[int, str]) -> str:
    together, alike = stats.coactive(feature), stats.similar(feature)
    n = f", n = {together[0].n:,} tokens" if together else ""

    def with_chance(neighbour: Neighbour) -> str:
        chance = jaccard_by_chance(stats, feature, neighbour.latent)
        return f"{html.short(neighbour.value)} ({html.short(chance)})"

    return _near(
        f"Fires together with: tokens on which both fire / tokens on which either does{n}; in brackets, by chance",
        together,
        named,
        with_chance,
    ) + _near("Writes alike: cosine of decoder rows", alike, named, lambda neighbour: html.short(neighbour.value))


def _near(
    heading: str, neighbours: Sequence[Neighbour], named: Mapping[int, str], told: Callable[[Neighbour], str]
) -> str:
    """Latents in a row, each with how near it is, and its label; in a panel they can be opened."""
    if not neighbours:
        return ""
    chips = (
        f'<span data-latent="{neighbour.latent}"><b>{neighbour.latent}</b> {html.escape(told(neighbour))} '
        f"{html.words(named.get(neighbour.latent, ''))}</span>"
        for neighbour in neighbours
    )
    return f'<h4>{html.escape(heading)}</h4><p class="sae-near">{"".join(chips)}</p>'

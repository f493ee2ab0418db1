"""Features as numbers: what each responds to, where it fires, how it looks, when it is active and what it causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from sdxl_sae_kit.errors import ArtifactError, KitError, did_you_mean
from sdxl_sae_kit.features import Example, FeatureStats
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.questions import expected
from sdxl_sae_kit.similarity import Embed, specificity

if TYPE_CHECKING:
    from sdxl_sae_kit.studies.causes import Causes

MIN_IMAGES = 5
"""A feature is described when it fires on at least so many images, and its looks on the strongest so many."""

Kind = Literal["response", "space", "look", "time", "cause"]

_Columns = dict[str, Float[np.ndarray, "feature"]]
"""By name, a number for each feature; NaN where it is not defined."""


@dataclass(frozen=True)
class Descriptors:
    """Features of one SAE, each described by numbers."""

    hookpoint: str
    latents: Int[np.ndarray, "feature"] = field(repr=False)
    """Which they are."""
    names: tuple[str, ...]
    kinds: tuple[Kind, ...] = field(repr=False)
    """One for each name."""
    values: Float[np.ndarray, "feature descriptor"] = field(repr=False)
    """NaN where a descriptor is not defined, such as the cause of a feature that fires on no held-out image."""

    def only(self, *kinds: Kind) -> Descriptors:
        """The descriptors of these kinds alone.

        Raises:
            KitError: there is no such kind.
        """
        for kind in kinds:
            if kind not in get_args(Kind):
                known = get_args(Kind)
                raise KitError(f"Descriptors are of {', '.join(known)}, not {kind!r}.{did_you_mean(kind, known)}")
        kept = [at for at, kind in enumerate(self.kinds) if kind in kinds]
        names, of = (tuple(each[at] for at in kept) for each in (self.names, self.kinds))
        return Descriptors(self.hookpoint, self.latents, names, of, self.values[:, kept])  # type: ignore[arg-type]

    def beside(self, other: Descriptors) -> Descriptors:
        """These and other descriptors of the same features."""
        values = np.concatenate([self.values, other.values], axis=1)
        return Descriptors(self.hookpoint, self.latents, self.names + other.names, self.kinds + other.kinds, values)


def describe(
    stats: FeatureStats,
    latents: Int[np.ndarray, "feature"] | None = None,
    *,
    causes: Causes | None = None,
    timing: FeatureStats | None = None,
    embed: Embed | None = None,
) -> Descriptors:
    """Describe an SAE's features by numbers.

    - `response`, where the prompts tell factors: `responds to …`, the share of the variance over images of the
      feature's maximum that a factor explains (`omega_squared`), over the images in which it can be seen
      (`questions.expected`).
    - `space`: `active area`, the share of tokens on which it fires, in images where it does; its mean `Moran's I`; and
      of the five images on which it is strongest the `centre-ness` of its heat maps (1 in the middle, 0 in the corners)
      and `same place`, the mean cosine of all pairs of these maps, 1 where it is always at the same tokens.
    - `look`, where pictures are kept: of those images, weighted by activation, `brightness`, `red − green`,
      `yellow − blue` (channels 0 to 1) and `texture`, the mean gradient of the luminance. Where a judge is given
      `alike`: the mean cosine similarity of the feature's top images (`similarity.specificity`).
    - `time`, where `timing` is given: of activity (density × mean) over denoising steps, scaled to 0 (first) to 1
      (last), its centre of mass, `peak step`, and the share after the middle, `late share`.
    - `cause`, where `causes` are given: see `describe_causes`.

    Names do not depend on the hookpoint; a value that is not defined is NaN.

    Args:
        stats: feature statistics.
        latents: which; by default all that are `describable`.
        causes: of the same SAE.
        timing: statistics of the same SAE on a cache of several denoising steps, of whose cond half the `curves` tell.
        embed: a judge of images, such as `WorldEmbed` or `ClipEmbed`.

    Raises:
        ArtifactError: `causes` or `timing` are of another SAE.
        KitError: no pictures are kept, or fewer than 8 examples of each feature, where a judge is given.

    Example:
        >>> describe(stats, causes=measure_causes(pipe, sae, stats)).only("response", "cause")       # doctest: +SKIP
    """
    for given, name in ((causes, "causes"), (timing, "timing")):
        if given is not None and given.sae != stats.sae:
            raise ArtifactError(f"describe: {name} are of {given.sae}, stats of {stats.sae}. Give those of one SAE.")
    chosen = describable(stats) if latents is None else latents
    by_kind: dict[Kind, _Columns] = {"response": _responses(stats, chosen), **_seen(stats, chosen)}
    if embed is not None:
        by_kind["look"]["alike"] = specificity(stats, embed).value[chosen].astype(np.float64)
    if timing is not None:
        by_kind["time"] = _times(timing, chosen)
    described = _of_kinds(stats.hookpoint, chosen, by_kind)
    return described if causes is None else described.beside(describe_causes(causes, chosen))


def describe_causes(causes: Causes, latents: Int[np.ndarray, "feature"]) -> Descriptors:
    """Describe features by what they cause alone; NaN for those that were not turned off.

    `changes …`, the square root of every distance that a judge told (of answers Hellinger's distance, which is in
    proportion to small changes); `change inside`; `spread`, outside / (inside + outside) of the mean |difference| of
    colours; `coarse share` and `colour share`. See `Causes`.
    """
    place = {latent: at for at, latent in enumerate(causes.latents.tolist())}
    values = np.full((len(latents), len(causes.names)), np.nan)
    for row, latent in enumerate(latents.tolist()):
        if latent in place:
            values[row] = causes.values[place[latent]]
    told = dict(zip(causes.names, values.T, strict=True))
    inside, outside = told["inside"], told["outside"]
    both = np.where(inside + outside > 0, inside + outside, np.nan)
    columns = {f"changes {name}": np.sqrt(told[name]) for name in causes.factors}
    columns |= {"change inside": inside, "spread": outside / both}
    columns |= {name: told[name] for name in ("coarse share", "colour share")}
    return _of_kinds(causes.hookpoint, latents, {"cause": columns})


def _of_kinds(hookpoint: str, latents: Int[np.ndarray, "feature"], by_kind: Mapping[Kind, _Columns]) -> Descriptors:
    kinds = tuple(kind for kind, columns in by_kind.items() for _ in columns)
    columns = {name: values for each in by_kind.values() for name, values in each.items()}
    return Descriptors(hookpoint, latents, tuple(columns), kinds, np.stack(list(columns.values()), axis=1))


def describable(stats: FeatureStats, n: int | None = None) -> Int[np.ndarray, "feature"]:
    """The latents that fire on at least 5 images; or n of them, spread evenly over the ranks of their density."""
    latents = np.flatnonzero(stats.image_density * stats.n_images >= MIN_IMAGES - 0.5)
    if n is None or len(latents) <= n:
        return latents
    ranked = latents[np.argsort(stats.density[latents], kind="stable")]
    return np.sort(ranked[np.linspace(0, len(ranked) - 1, n).round().astype(int)])


def omega_squared(responses: Float[np.ndarray, "image feature"], values: Sequence[str]) -> Float[np.ndarray, "feature"]:
    """Share of each feature's variance over images that a factor explains, corrected for its number of values.

    ω² = (SS_between − (g − 1)·MS_within) / (SS_total + MS_within) for g values, where MS_within = SS_within / (n − g);
    0 where that is negative or nothing varies. Uncorrected (η² = SS_between / SS_total), a factor with many values
    would explain more of pure noise than one with few.
    """
    groups, group = np.unique(np.asarray(values), return_inverse=True)
    n, g = len(group), len(groups)
    y = responses.astype(np.float64) - responses.mean(axis=0, dtype=np.float64)
    of_group = np.equal.outer(np.arange(g), group).astype(np.float64)  # (group, image)
    total = np.square(y).sum(axis=0)
    between = (np.square(of_group @ y) / of_group.sum(axis=1, keepdims=True)).sum(axis=0)
    within = np.maximum(total - between, 0) / (n - g)
    varies = total > 0
    explained = (between - (g - 1) * within) / np.where(varies, total + within, 1)
    return np.where(varies, np.maximum(explained, 0), 0)


# Response -------------------------------------------------------------------------------------------------------------


def _responses(stats: FeatureStats, latents: Int[np.ndarray, "feature"]) -> _Columns:
    responses = stats.image_activations("max")[:, latents]
    return {f"responds to {name}": omega_squared(responses[at], values) for name, at, values in _factors(stats)}


def _factors(stats: FeatureStats) -> Iterator[tuple[str, Int[np.ndarray, "image"], list[str]]]:
    """Each factor that varies, with the images in which it can be seen and its values there."""
    known = [expected(factors) for factors in stats.prompts.factors]
    for name in dict.fromkeys(name for factors in known for name in factors):
        images = np.array([i for i, factors in enumerate(known) if name in factors])
        values = [known[i][name] for i in images]
        if 2 <= len(set(values)) < len(values):
            yield name, images, values


# Space and look -------------------------------------------------------------------------------------------------------


def _seen(stats: FeatureStats, latents: Int[np.ndarray, "feature"]) -> dict[Kind, _Columns]:
    """Where the features fire, and how it looks there."""
    names = (*_PLACE, *_LOOK)
    each = [_look(stats.examples(latent, n=MIN_IMAGES)) for latent in latents.tolist()]
    columns = dict(zip(names, np.array(each, dtype=np.float64).reshape(-1, len(names)).T, strict=True))
    space = {
        "active area": (stats.density[latents] / stats.image_density[latents]).astype(np.float64),
        "Moran's I": stats.moran[latents].astype(np.float64),
    }
    return {"space": space | {name: columns[name] for name in _PLACE}, "look": {name: columns[name] for name in _LOOK}}


_Weights = Float[np.ndarray, "example height width"]
_PLACE, _LOOK = ("centre-ness", "same place"), ("brightness", "red − green", "yellow − blue", "texture")


def _place(weights: _Weights) -> list[float]:
    """How central these heat maps are, and how alike."""
    unit = weights / np.sqrt(np.square(weights).sum(axis=(1, 2), keepdims=True))
    n, pairs = len(unit), float(np.square(unit.sum(axis=0)).sum())  # Σ over all pairs, each map with itself among them
    centred = float((weights * _centrality(*weights.shape[1:])).sum(axis=(1, 2)).mean())
    return [centred, (pairs - n) / (n * n - n) if n > 1 else np.nan]


def _look(examples: Sequence[Example]) -> list[float]:
    """How central heat maps are, and how alike, and the colours and texture under them."""
    weights = _weights(examples)
    if not all(example.thumbnail for example in examples):  # of a cache that keeps none
        return [*_place(weights), *[np.nan] * len(_LOOK)]
    pictures = [decode_picture(example.thumbnail) for example in examples]
    return [*_place(weights), *_colour(weights, pictures), _texture(weights, pictures)]


def _weights(examples: Sequence[Example]) -> _Weights:
    maps = np.stack([example.heat_map for example in examples]).astype(np.float64)
    return np.asarray(maps / maps.sum(axis=(1, 2), keepdims=True))


def _centrality(height: int, width: int) -> Float[np.ndarray, "height width"]:
    """1 in the middle of the grid, 0 in its corners, falling with distance."""
    y, x = (np.abs(np.arange(n) - (n - 1) / 2) / max((n - 1) / 2, 1) for n in (height, width))
    return np.asarray(1 - np.hypot(y[:, None], x[None, :]) / np.sqrt(2))


def _colour(weights: _Weights, pictures: Sequence[Image.Image]) -> list[float]:
    """Mean brightness, red − green and yellow − blue of pictures, weighted by activation; channels 0 to 1."""
    size = (weights.shape[2], weights.shape[1])
    pixels = np.stack([np.asarray(picture.resize(size), dtype=np.float64) / 255 for picture in pictures])
    red, green, blue = (weights[..., None] * pixels).sum(axis=(1, 2)).mean(axis=0)
    return [float(value) for value in ((red + green + blue) / 3, red - green, (red + green) / 2 - blue)]


def _texture(weights: _Weights, pictures: Sequence[Image.Image]) -> float:
    """Mean length of the gradient of the luminance (0 to 1, per pixel of the thumbnail), weighted by activation."""
    found = []
    for picture, mine in zip(pictures, weights, strict=True):
        luminance = np.asarray(picture.convert("L"), dtype=np.float64) / 255
        steep = Image.fromarray(np.hypot(*np.gradient(luminance)).astype(np.float32))
        found.append((mine * np.asarray(steep.resize(mine.shape[::-1], Image.Resampling.BOX))).sum())
    return float(np.mean(found))


# Time -----------------------------------------------------------------------------------------------------------------


def _times(timing: FeatureStats, latents: Int[np.ndarray, "feature"]) -> _Columns:
    """Where over the steps activity lies; not defined for a single step, nor for a latent that is silent there."""
    curves = sorted((curve for curve in timing.curves if curve.half == "cond"), key=lambda curve: curve.step)
    activity = np.stack([(c.density[latents] * c.mean[latents]).astype(np.float64) for c in curves])  # (step, feature)
    at = np.linspace(0, 1, len(curves))
    total = activity.sum(axis=0)
    total = np.where((total > 0) & (len(curves) > 1), total, np.nan)
    return {"peak step": at @ activity / total, "late share": (at > 0.5) @ activity / total}

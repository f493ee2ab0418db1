"""Causal ablation: what turning one feature off changes in an image, against equal edits along other directions.

Controls edit the same tokens by the same amount, so they show what any edit of that size would do there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact, Store, write_atomically
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.pipelines import describe, generate
from sdxl_sae_kit.plots import effects_by_group
from sdxl_sae_kit.sae import FIRES, SAE, Site

CONTROLS = ("random direction", "other feature", "untrained SAE")
CONDITIONS = ("ablated", *CONTROLS)
MIN_IMAGES = 4
"""A feature that fires on fewer held-out images is skipped, and the result says so."""

_DEFAULT_FEATURES, _SHOWN, _TILE, _GAP = 12, 3, 96, 4
_FILE, _PICTURE = "ablation.jsonl", "feature-{:05d}.webp"

Pictures = Float[np.ndarray, "image height width 3"]


@dataclass(frozen=True)
class FeatureEffects:
    """What each edit of one feature changed, image by image: one line of the artifact.

    An effect is the mean of |edited − clean| over pixels and channels, colours being 0 to 1: `inside` the feature's
    region (the tokens on which it fires; `area` is its share of the image), and `outside`, None where there is none.
    `other_feature` is the one whose decoder row is a control, `gain` how much the picture exaggerates the difference.
    """

    feature: int
    skipped: str = ""
    """Why nothing was measured; empty when it was."""
    other_feature: int = -1
    images: Sequence[int] = ()
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = ()
    area: Sequence[float] = ()
    gain: float = 1
    inside: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    outside: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """Effects of turning features off, one at a time, on held-out images, with three controls."""

    artifact: Artifact = field(repr=False)
    sae: str
    hookpoint: str
    features: tuple[FeatureEffects, ...]

    @classmethod
    def open(cls, folder: Path | str) -> Ablation:
        """Read what `ablate` made; ArtifactError where there is no finished ablation."""
        artifact = Artifact.open(folder, "studies")
        recipe = artifact.recipe
        if recipe["study"] != "ablation":
            raise ArtifactError(f"{artifact.name} is a study of {recipe['study']}, not an ablation. Call ablate.")
        return cls(artifact, recipe["sae_name"], recipe["hookpoint"], tuple(_read(artifact)))

    @property
    def measured(self) -> list[FeatureEffects]:
        """The features that were not skipped."""
        return [effects for effects in self.features if not effects.skipped]

    def rows(self) -> list[dict[str, Any]]:
        """One row per measured feature, with 95 % bootstrap intervals over its images.

        Per condition the effect inside the region, outside, and `locality` = inside / outside; per control the paired
        difference ablated − control inside.
        """
        return [{"feature": e.feature, "images": len(e.images), **_summarise(*_arrays(e))} for e in self.measured]

    def overall(self) -> dict[str, Any]:
        """The same over all features, each counting once; intervals resample features: images of one are alike.

        `clear` is the number of features of which every difference ablated − control has an interval above 0.
        """
        per_feature = [[_mean_known(values) for values in _arrays(effects)] for effects in self.measured]
        inside, outside = np.array(per_feature).reshape(-1, 2, len(CONDITIONS)).transpose(1, 0, 2)
        clear = sum(all(row[f"ablated − {c} interval"][0] > 0 for c in CONTROLS) for row in self.rows())
        counts = {"features": len(inside), "images": sum(len(e.images) for e in self.measured), "clear": clear}
        return counts | _summarise(inside, outside)

    def sentence(self) -> str:
        """What the numbers say."""
        if not self.measured:
            return "No feature fires on enough held-out images to be measured."
        row = self.overall()
        smaller = [c for c in CONTROLS if row[f"ablated − {c} interval"][0] <= 0]
        verdict = f"not clearly larger than: {', '.join(smaller)}" if smaller else "larger than every control"
        controls = (f"{c} {html.short(row[c])} ({_with_interval(row, f'ablated − {c}')})" for c in CONTROLS)
        localities = (f"{c} {_with_interval(row, f'{c} locality')}" for c in CONTROLS)
        return (
            f"Turning a feature off changes the colours inside its region by {html.short(row['ablated'])} of their "
            f"range ({html.short(255 * row['ablated'])} of 255 levels), {verdict}. Controls: {', '.join(controls)}, in "
            f"brackets the paired difference with its 95 % interval over {row['features']} features ({row['images']} "
            f"held-out images). Taken alone, {row['clear']} exceed every control. The change inside the region is "
            f"{_with_interval(row, 'ablated locality')} times that outside; for the controls: {', '.join(localities)}."
        )

    def plot(self) -> Any:
        """Effect inside the region by feature and over all features, with 95 % intervals (plotly)."""
        rows = [*self.rows(), self.overall()] if self.measured else []
        groups = [f"feature {row['feature']}" if "feature" in row else "all features" for row in rows]
        series = {c: [(row[c], *row[f"{c} interval"]) for row in rows] for c in CONDITIONS}
        title = f"Turning features of {self.hookpoint} off, against edits of the same size"
        return effects_by_group(groups, series, title=title, y="mean |change| inside the region")

    def _repr_html_(self) -> str:
        skipped = (f"Feature {e.feature} was skipped: {e.skipped}." for e in self.features if e.skipped)
        paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in [self.sentence(), *skipped])
        table = html.table([_readable(row) for row in self.rows()], "in brackets 95 % bootstrap intervals over images")
        pictures = map(self._picture, self.measured)
        return html.fragment(f"<h3>Ablation at {html.words(self.hookpoint)}</h3>", paragraphs, table, *pictures)

    def _picture(self, effects: FeatureEffects) -> str:
        columns = f"clean, ablated, difference ×{effects.gain:,.0f}, {', '.join(CONTROLS)}"
        prompts = effects.prompts[:_SHOWN]
        alt = f"Images of feature {effects.feature}. Columns: {columns}. Rows: {'; '.join(prompts)}."
        picture = html.picture(self.artifact.file(_PICTURE.format(effects.feature)).read_bytes(), alt)
        rows = " · ".join(map(html.words, prompts))
        return f'<h4>Feature {effects.feature}</h4>{picture}<p class="sae-quiet">Columns: {columns}. Rows: {rows}</p>'


def ablate(
    pipe: Any,
    sae: SAE,
    stats: FeatureStats,
    features: Sequence[int] | None = None,
    *,
    prompts_per_feature: int = 8,
    seed: int = 0,
    store: Store | Path | str | None = None,
) -> Ablation:
    """Turn features off one at a time on held-out images on which they fire, and measure what changes where.

    Each image is made again from its prompt and seed in five conditions: clean, ablated (the feature's activation is
    0), and three controls that subtract the same amounts at the same tokens along another direction: a random one, the
    decoder row of the alive feature of the nearest density, and a decoder row of an untrained SAE. Killed at any
    moment, it goes on at the feature in hand.

    Args:
        pipe: the pipeline whose updates the SAE was trained on.
        sae: a trained SAE.
        stats: its feature statistics; they give the held-out images and the regions.
        features: latents; by default a dozen of those that fire on at least 4 held-out images, at even steps of their
            rank by `image_density`, from the rarest to the commonest.
        prompts_per_feature: at most so many images for each, those with the highest spatial mean.
        seed: of the random directions.
        store: folder of artifacts.

    Raises:
        ArtifactError: `stats` belong to another SAE, or the SAE to another model.
        KitError: a latent that does not exist or never fires, or nothing to choose from.

    Example:
        >>> ablate(pipe, saes["down.2.1", "k10"], stats, [17, 40]).plot()              # doctest: +SKIP
    """
    site = _check_inputs(pipe, sae, stats)
    chosen = _spread_over_density(stats) if features is None else [int(feature) for feature in features]
    _check_features(stats, chosen)
    if prompts_per_feature < MIN_IMAGES:
        raise KitError(f"ablate: prompts_per_feature={prompts_per_feature}, but {MIN_IMAGES} images are the least.")
    recipe = {
        "study": "ablation",
        "sae": sae.digest,
        "sae_name": sae.name,
        "hookpoint": site.hookpoint,
        "stats": stats.artifact.digest,
        "features": chosen,
        "prompts_per_feature": prompts_per_feature,
        "seed": seed,
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    artifact = Store.at(store).artifact("studies", f"ablation_{sae.name.rsplit('-', 1)[0]}", recipe)
    if not artifact.finished:
        with artifact.lock():
            _run(pipe, sae, stats, artifact)
    return Ablation.open(artifact.folder)


def directions(
    sae: SAE, stats: FeatureStats, feature: int, seed: int
) -> tuple[dict[str, Float[np.ndarray, "d_in"]], int]:
    """What each condition subtracts along, as long as the feature's decoder row, and which other feature was taken."""
    rows = sae.W_dec.detach().float().cpu().numpy()
    others = stats.alive[stats.alive != feature]
    if not len(others):
        raise KitError(f"{sae.name} has no alive feature but {feature}, so nothing to compare it with.")
    other = int(others[np.abs(stats.density[others] - stats.density[feature]).argmin()])
    untrained = SAE(replace(sae.config, seed=sae.config.seed + 1), sae.d_in).W_dec.detach().numpy()
    chosen = {
        "ablated": rows[feature],
        "random direction": np.random.default_rng([seed, feature]).standard_normal(sae.d_in, dtype=np.float32),
        "other feature": rows[other],
        "untrained SAE": untrained[feature],
    }
    length = np.linalg.norm(rows[feature])
    controls = {name: chosen[name] * (length / np.linalg.norm(chosen[name])) for name in CONTROLS}
    return {"ablated": rows[feature], **controls}, other


def _check_inputs(pipe: Any, sae: SAE, stats: FeatureStats) -> Site:
    if sae.site is None:
        raise ArtifactError(f"{sae.name} has no hookpoint: it was never trained. Train it, or load one that was.")
    site, model = sae.site, describe(pipe)
    if (stats.sae, stats.hookpoint) != (sae.name, site.hookpoint):
        raise ArtifactError(
            f"ablate: the statistics are of {stats.sae} at {stats.hookpoint}, but the SAE is {sae.name} at "
            f"{site.hookpoint}. Measure this SAE with FeatureStats.measure."
        )
    if (model.name, model.revision) != (site.model, site.revision):
        raise ArtifactError(
            f"ablate: {sae.name} was trained on {site.model} (revision {site.revision}), but the pipeline is "
            f"{model.name} (revision {model.revision}). Load {site.model}, or train an SAE on {model.name}."
        )
    return site


def _check_features(stats: FeatureStats, features: Sequence[int]) -> None:
    for feature in features:
        if not 0 <= feature < stats.d_sae:
            raise KitError(f"ablate: {stats.sae} has latents 0 to {stats.d_sae - 1}; there is no {feature}.")
        if stats.density[feature] == 0:
            raise KitError(
                f"ablate: latent {feature} of {stats.sae} is dead on these images. Take some of stats.alive."
            )
    if not features or len(set(features)) < len(features):
        raise KitError(f"ablate: features={list(features)} must name one latent or more, each once.")


def _strongest(stats: FeatureStats, feature: int) -> Int[np.ndarray, "image"]:
    """The held-out images on which a feature fires, strongest by spatial mean first."""
    firing = np.flatnonzero(stats.prompts.held_out & (stats.image_activations("max")[:, feature] > FIRES))
    return firing[np.argsort(-stats.image_activations("mean")[firing, feature], kind="stable")]


def _spread_over_density(stats: FeatureStats) -> list[int]:
    enough = [int(feature) for feature in stats.alive if len(_strongest(stats, feature)) >= MIN_IMAGES]
    if not enough:
        raise KitError(f"ablate: no latent of {stats.sae} fires on {MIN_IMAGES} held-out images. Measure more prompts.")
    by_density = sorted(enough, key=lambda feature: stats.image_density[feature])
    steps = np.linspace(0, len(enough) - 1, min(_DEFAULT_FEATURES, len(enough)))
    return [by_density[round(step)] for step in steps]


def _run(pipe: Any, sae: SAE, stats: FeatureStats, artifact: Artifact) -> None:
    recipe = artifact.recipe
    images = {f: _strongest(stats, f)[: recipe["prompts_per_feature"]] for f in recipe["features"]}
    done = list(_read(artifact))
    left = recipe["features"][len(done) :]
    cost = sum(len(images[f]) for f in left if len(images[f]) >= MIN_IMAGES) * (1 + len(CONDITIONS))
    tqdm.write(f"Ablating {len(left)} features of {sae.name}: {cost:,} images to make, into {artifact.folder.parent}.")
    for feature in tqdm(left, desc="ablate", unit="feature"):
        done.append(_measure(pipe, sae, stats, feature, images[feature], artifact))
        write_atomically(artifact.file(_FILE), "".join(json.dumps(asdict(e)) + "\n" for e in done).encode())
    artifact.seal(facts={"features": len(done), "skipped": sum(bool(effects.skipped) for effects in done)})


def _measure(
    pipe: Any, sae: SAE, stats: FeatureStats, feature: int, images: Int[np.ndarray, "image"], artifact: Artifact
) -> FeatureEffects:
    if len(images) < MIN_IMAGES:
        return FeatureEffects(feature, f"it fires on {len(images)} held-out images, and {MIN_IMAGES} are the least")
    along, other = directions(sae, stats, feature, artifact.recipe["seed"])
    texts, seeds = ([values[i] for i in images] for values in (stats.prompts.texts, stats.prompts.seeds))
    drawn = draw_conditions(pipe, sae, stats.grid, texts, seeds, feature, along)
    gain = float(1 / max(np.abs(drawn["ablated"] - drawn["clean"])[:_SHOWN].max(), 1e-6))
    write_atomically(artifact.file(_PICTURE.format(feature)), _compose(drawn, gain))
    size = drawn["clean"].shape[1:3]
    region = np.stack([upsample(stats.heat_map(feature, int(i)) > FIRES, size) for i in images])
    changes = {c: np.abs(drawn[c] - drawn["clean"]).mean(axis=3) for c in CONDITIONS}
    inside, outside = ({c: _means(changes[c], where) for c in CONDITIONS} for where in (region, ~region))
    area = region.mean(axis=(1, 2)).tolist()
    return FeatureEffects(feature, "", other, images.tolist(), texts, seeds, area, gain, inside, outside)


def draw_conditions(
    pipe: Any,
    sae: SAE,
    grid: tuple[int, int],
    texts: Sequence[str],
    seeds: Sequence[int],
    feature: int,
    along: Mapping[str, Float[np.ndarray, "d_in"]],
) -> dict[str, Pictures]:
    """The same images, colours 0 to 1, clean and with the feature's activations taken away along each direction."""
    assert sae.site is not None
    pixels = resolve(pipe.unet, sae.site.hookpoint).reduction * pipe.vae_scale_factor  # per token
    height, width = grid[0] * pixels, grid[1] * pixels
    steps, guidance = sae.site.num_inference_steps, sae.site.guidance_scale
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    draw = partial(generate, pipe, texts, seeds, **settings, output_type="np")
    drawn = {"clean": np.asarray(draw(), dtype=np.float32)}
    for condition, direction in along.items():
        with steer(pipe, sae, scale={feature: 0.0}, along={feature: direction}):
            drawn[condition] = np.asarray(draw(), dtype=np.float32)
    return drawn


def upsample(mask: Bool[np.ndarray, "rows columns"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The mask at the size (height, width) of an image; each pixel takes the value of the token it lies in."""
    down, across = (np.arange(n) * m // n for n, m in zip(size, mask.shape, strict=True))
    return np.asarray(mask[np.ix_(down, across)])


def _means(change: Float[np.ndarray, "image y x"], where: Bool[np.ndarray, "image y x"]) -> list[float | None]:
    return [float(c[w].mean(dtype=np.float64)) if w.any() else None for c, w in zip(change, where, strict=True)]


def _arrays(effects: FeatureEffects) -> list[Float[np.ndarray, "image condition"]]:
    """Effects inside and outside; NaN for None."""
    return [np.array([by[c] for c in CONDITIONS], dtype=np.float64).T for by in (effects.inside, effects.outside)]


def _mean_known(values: Float[np.ndarray, "unit condition"]) -> Float[np.ndarray, "condition"]:
    known = values[np.isfinite(values[:, 0])]
    return known.mean(axis=0) if len(known) else np.full(len(CONDITIONS), np.nan)


def _summarise(
    inside: Float[np.ndarray, "unit condition"], outside: Float[np.ndarray, "unit condition"]
) -> dict[str, Any]:
    """Means, localities and differences with intervals over units, which are images or features."""
    row: dict[str, Any] = {}
    both = np.stack([inside, outside], axis=2)[np.isfinite(outside[:, 0])]  # (unit, condition, 2)
    for at, condition in enumerate(CONDITIONS):
        row[f"{condition} outside"] = float(_mean_known(outside)[at])
        row |= _estimate(condition, inside[:, at])
        row[f"{condition} locality"] = float(_ratio(both[:, at].mean(axis=0))) if len(both) else float("nan")
        row[f"{condition} locality interval"] = bootstrap_interval(both[:, at], _ratio)
    for at, control in enumerate(CONTROLS, 1):
        row |= _estimate(f"ablated − {control}", inside[:, 0] - inside[:, at])
    return row


def _estimate(name: str, values: Float[np.ndarray, "unit"]) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name} interval": bootstrap_interval(values)}


def _ratio(means: Float[np.ndarray, "*draw 2"]) -> Float[np.ndarray, "*draw"]:
    return np.asarray(means[..., 0] / np.maximum(means[..., 1], np.finfo(np.float64).tiny))


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name} interval"]
    return f"{html.short(row[name])} [{html.short(low)}, {html.short(high)}]"


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table people see."""
    means = {"inside": row["ablated"], "outside": row["ablated outside"]}
    names = {"inside / outside": "ablated locality"} | {f"ablated − {c}": f"ablated − {c}" for c in CONTROLS}
    intervals = {shown: _with_interval(row, name) for shown, name in names.items()}
    return {"feature": str(row["feature"]), "images": row["images"], **means, **intervals}


def _compose(drawn: Mapping[str, Pictures], gain: float) -> bytes:
    """A row per image: clean, ablated, difference, controls."""
    difference = np.clip(np.abs(drawn["ablated"] - drawn["clean"]) * gain, 0, 1)
    columns = [drawn["clean"], drawn["ablated"], difference, *(drawn[c] for c in CONTROLS)]
    rows, step = min(_SHOWN, len(difference)), _TILE + _GAP
    sheet = Image.new("RGB", (len(columns) * step - _GAP, rows * step - _GAP), "white")
    for across, pictures in enumerate(columns):
        for down in range(rows):
            tile = Image.fromarray((pictures[down] * 255).round().astype(np.uint8))
            sheet.paste(tile.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (across * step, down * step))
    return html.to_webp(sheet)


def _read(artifact: Artifact) -> Iterator[FeatureEffects]:
    """The lines written so far; each was written whole."""
    path = artifact.file(_FILE)
    if path.exists():
        yield from (FeatureEffects(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())

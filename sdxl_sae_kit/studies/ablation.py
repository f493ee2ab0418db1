"""Causal ablation: what turning one feature off changes in an image, against controls that should change less."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.interventions import check_measured, steer
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.pipelines import generate, scheduler
from sdxl_sae_kit.plots import effects_by_group
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.search import MIN_IMAGES, held_out_firing, most_energetic
from sdxl_sae_kit.studies.controls import CONDITIONS, CONTROLS, edits

_SHOWN, _TILE, _GAP = 3, 96, 4
_FILE, _PICTURE = "ablation.jsonl", "feature-{:05d}.webp"

Pictures = Float[np.ndarray, "image height width 3"]


@dataclass(frozen=True)
class FeatureEffects:
    """What each edit of one feature changed, image by image: one line of the artifact.

    An effect is the mean of |edited − clean| over pixels and channels, colours being 0 to 1: `inside` the feature's
    region (the tokens on which it fires; `area` is its share of the image), and `outside`, None where there is none.
    `other_feature` is the one turned off as a control, `overlap` the share of the region on which it fires too, and
    `gain` how much the picture exaggerates the difference.
    """

    feature: int
    skipped: str = ""
    """Why nothing was measured; empty when it was."""
    other_feature: int = -1
    overlap: float = 0
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

        Per condition the effect inside the region; outside, and `locality` = inside / outside, both over the images
        that have an outside (`with outside`; NaN below 4); per control the paired difference ablated − control inside.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for effects in self.measured:
            inside, paired = _arrays(effects)
            paired = paired[: len(paired) if len(paired) >= MIN_IMAGES else 0]
            rows.append({"feature": effects.feature, "images": len(inside)} | _summarise(inside, paired))
        return rows

    def overall(self) -> dict[str, Any]:
        """The same over all features, each counting once; intervals resample features: images of one are alike.

        `clear` is the number of features of which every difference ablated − control has an interval above 0.
        """
        return self._overall

    @cached_property
    def _overall(self) -> dict[str, Any]:
        arrays = [_arrays(effects) for effects in self.measured]
        inside = np.array([images.mean(axis=0) for images, _ in arrays])
        paired = np.array([both.mean(axis=0) for _, both in arrays if len(both) >= MIN_IMAGES])
        clear = sum(all(row[f"ablated − {c} interval"][0] > 0 for c in CONTROLS) for row in self.rows())
        overlap = float(np.mean([e.overlap for e in self.measured]))
        images = sum(len(e.images) for e in self.measured)
        counts = {"features": len(inside), "images": images, "clear": clear, "overlap": overlap}
        return counts | _summarise(inside, paired.reshape(-1, len(CONDITIONS), 2))

    def sentence(self) -> str:
        """What the numbers say."""
        if not self.measured:
            return "No feature fires on enough held-out images to be measured."
        row = self.overall()
        smaller = [c for c in CONTROLS if row[f"ablated − {c} interval"][0] <= 0]
        verdict = f"not clearly larger than {' or '.join(smaller)}" if smaller else "larger than every control"
        controls = (f"{c} {html.short(row[c])} ({_with_interval(row, f'ablated − {c}')})" for c in CONTROLS)
        return (
            f"Turning a feature off changes the colours inside its region by {html.short(row['ablated'])} of their "
            f"range ({html.short(255 * row['ablated'])} of 255 levels), {verdict}. Controls: {', '.join(controls)}, in "
            f"brackets the paired difference with its 95 % interval over {row['features']} features ({row['images']} "
            f"held-out images). The other feature fires on {row['overlap']:.0%} of the region. Taken alone, "
            f"{row['clear']} of the features exceed every control, not corrected for looking at several. "
            f"{_locality(row)}"
        )

    def plot(self) -> Any:
        """Effect inside the region by feature and over all features, with 95 % intervals (plotly)."""
        rows = [*self.rows(), self.overall()] if self.measured else []
        groups = [f"feature {row['feature']}" if "feature" in row else "all features" for row in rows]
        series = {c: [(row[c], *row[f"{c} interval"]) for row in rows] for c in CONDITIONS}
        title = f"Turning features of {self.hookpoint} off, against controls"
        return effects_by_group(groups, series, title=title, y="mean |change| inside the region")

    def _repr_html_(self) -> str:
        skipped = (f"Feature {e.feature} was skipped: {e.skipped}." for e in self.features if e.skipped)
        paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in [self.sentence(), *skipped])
        table = html.table([_readable(row) for row in self.rows()], "in brackets 95 % bootstrap intervals over images")
        title = f"<h3>Ablation at {html.words(self.hookpoint)}</h3>"
        return html.fragment(title, paragraphs, table, *map(self._picture, self.measured))

    def _picture(self, effects: FeatureEffects) -> str:
        columns = f"clean, ablated, and the differences from clean ×{effects.gain:,.0f}: {', '.join(CONDITIONS)}"
        prompts = effects.prompts[:_SHOWN]
        alt = f"Images of feature {effects.feature}. Columns: {columns}. Rows: {'; '.join(prompts)}."
        picture = html.picture(self.artifact.file(_PICTURE.format(effects.feature)).read_bytes(), alt)
        rows = " · ".join(map(html.words, prompts))
        return f'<h4>Feature {effects.feature}</h4>{picture}<p class="sae-quiet">Columns: {columns}. Rows: {rows}</p>'


def ablate(
    pipe: Any,
    sae: SAE,
    stats: FeatureStats,
    features: Sequence[int] | int | None = None,
    *,
    prompts_per_feature: int = 12,
    seed: int = 0,
    store: Store | Path | str | None = None,
) -> Ablation:
    """Turn features off one at a time on held-out images on which they fire, and measure what changes where.

    Each image is made again from its prompt and seed in six conditions: clean; ablated (the feature's activation is
    0); three controls that subtract the same amounts at the same tokens along another direction: a random one, a
    decoder row of an untrained SAE, and a random mixture of all features in proportion to their spread, which varies
    as the updates themselves do and is the hardest to beat; and one in which the alive feature of the nearest density
    is turned off instead. Effects of all are measured in the feature's own region. Killed at any moment, it goes on
    at the feature in hand.

    Args:
        pipe: the pipeline whose updates the SAE was trained on.
        sae: a trained SAE.
        stats: its feature statistics; they give the held-out images and the regions.
        features: latents, or one of them; by default the dozen that `most_energetic` gives.
        prompts_per_feature: at most so many images for each, those with the highest spatial mean.
        seed: of the random directions.
        store: folder of artifacts.

    Raises:
        ArtifactError: `stats` belong to another SAE, or the SAE to another model.
        KitError: a latent that does not exist or never fires, or nothing to choose from.

    Example:
        >>> ablate(pipe, saes["down.2.1", "k10"], stats, [17, 40]).plot()              # doctest: +SKIP
    """
    check_measured("ablate", pipe, sae, stats)
    given = [features] if isinstance(features, int | np.integer) else features
    chosen = most_energetic(stats) if given is None else [int(feature) for feature in given]
    _check_features(stats, chosen)
    if prompts_per_feature < MIN_IMAGES:
        raise KitError(f"ablate: prompts_per_feature={prompts_per_feature}, but {MIN_IMAGES} images are the least.")
    recipe = {
        "study": "ablation",
        "sae": sae.digest,
        "sae_name": sae.name,
        "hookpoint": sae.hookpoint,
        "stats": stats.artifact.digest,
        "features": chosen,
        "prompts_per_feature": prompts_per_feature,
        "seed": seed,
        "scheduler": scheduler(pipe),
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    artifact = Store.at(store).artifact("studies", f"ablation_{sae.name.rsplit('-', 1)[0]}", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _run(pipe, sae, stats, artifact)
    return Ablation.open(artifact.folder)


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


def _strongest(stats: FeatureStats, features: Sequence[int], n: int) -> dict[int, list[int]]:
    """For each feature the held-out images on which it fires, strongest by spatial mean first."""
    firing, means = held_out_firing(stats), stats.image_activations("mean")
    order = {f: np.argsort(-means[:, f], kind="stable") for f in features}
    return {f: images[firing[images, f]][:n].tolist() for f, images in order.items()}


def _run(pipe: Any, sae: SAE, stats: FeatureStats, artifact: Artifact) -> None:
    recipe = artifact.recipe
    images = _strongest(stats, recipe["features"], recipe["prompts_per_feature"])
    done = list(_read(artifact))
    left = recipe["features"][len(done) :]
    cost = sum(len(images[f]) for f in left if len(images[f]) >= MIN_IMAGES) * (1 + len(CONDITIONS))
    tqdm.write(f"Ablating {len(left)} features of {sae.name}: {cost:,} images to make, as {artifact.name}.")
    for feature in tqdm(left, desc="ablate", unit="feature"):
        done.append(_measure(pipe, sae, stats, feature, images[feature], artifact))
        write_atomically(artifact.file(_FILE), "".join(json.dumps(asdict(e)) + "\n" for e in done).encode())
    artifact.seal(facts={"features": len(done), "skipped": sum(bool(effects.skipped) for effects in done)})


def _measure(
    pipe: Any, sae: SAE, stats: FeatureStats, feature: int, images: list[int], artifact: Artifact
) -> FeatureEffects:
    if len(images) < MIN_IMAGES:
        return FeatureEffects(feature, f"it fires on {len(images)} held-out images, and {MIN_IMAGES} are the least")
    conditions, other = edits(sae, stats, feature, artifact.recipe["seed"])
    drawn = draw_conditions(pipe, sae, stats, images, conditions)
    gain = float(1 / max(np.abs(drawn["ablated"] - drawn["clean"])[:_SHOWN].max(), 1e-6))
    write_atomically(artifact.file(_PICTURE.format(feature)), _compose(drawn, gain))
    fires = np.stack([stats.heat_map(feature, i) for i in images]) > FIRES
    pixels = drawn["clean"].shape[1] // stats.grid[0]
    region = fires.repeat(pixels, axis=1).repeat(pixels, axis=2)
    changes = {c: np.abs(drawn[c] - drawn["clean"]).mean(axis=3) for c in CONDITIONS}
    inside, outside = ({c: _means(changes[c], where) for c in CONDITIONS} for where in (region, ~region))
    area = region.mean(axis=(1, 2)).tolist()
    overlap = float((np.stack([stats.heat_map(other, i) for i in images]) > FIRES)[fires].mean())
    return FeatureEffects(feature, "", other, overlap, images, *_prompts(stats, images), area, gain, inside, outside)


def draw_conditions(
    pipe: Any, sae: SAE, stats: FeatureStats, images: Sequence[int], conditions: Mapping[str, Mapping[str, Any]]
) -> dict[str, Pictures]:
    """The same images, colours 0 to 1, clean and in every condition, which are keyword arguments of `steer`."""
    assert sae.site is not None
    pixels = resolve(pipe.unet, sae.site.hookpoint).reduction * pipe.vae_scale_factor  # per token
    height, width = stats.grid[0] * pixels, stats.grid[1] * pixels
    steps, guidance = sae.site.num_inference_steps, sae.site.guidance_scale
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    texts, seeds = _prompts(stats, images)
    draw = partial(generate, pipe, texts, seeds, **settings, output_type="np")
    drawn = {"clean": np.asarray(draw(), dtype=np.float32)}
    for condition, edit in conditions.items():
        with steer(pipe, sae, **edit):
            drawn[condition] = np.asarray(draw(), dtype=np.float32)
    return drawn


def _prompts(stats: FeatureStats, images: Sequence[int]) -> tuple[list[str], list[int]]:
    return [stats.prompts.texts[i] for i in images], [stats.prompts.seeds[i] for i in images]


def _means(change: Float[np.ndarray, "image y x"], where: Bool[np.ndarray, "image y x"]) -> list[float | None]:
    return [float(c[w].mean(dtype=np.float64)) if w.any() else None for c, w in zip(change, where, strict=True)]


def _arrays(
    effects: FeatureEffects,
) -> tuple[Float[np.ndarray, "image condition"], Float[np.ndarray, "paired condition 2"]]:
    """Effects inside for all images; and inside and outside for those that have an outside."""
    inside, outside = (
        np.array([by[c] for c in CONDITIONS], dtype=np.float64).T for by in (effects.inside, effects.outside)
    )
    return inside, np.stack([inside, outside], axis=2)[np.isfinite(outside[:, 0])]


def _summarise(
    inside: Float[np.ndarray, "unit condition"], paired: Float[np.ndarray, "paired condition 2"]
) -> dict[str, Any]:
    """Means, localities and differences with intervals over units, which are images or features.

    What concerns the outside, and the inside beside it, is over the `with outside` units that have one.
    """
    row: dict[str, Any] = {"with outside": len(paired)}
    for at, condition in enumerate(CONDITIONS):
        row |= _estimate(condition, inside[:, at])
        means = paired[:, at].mean(axis=0) if len(paired) else np.full(2, np.nan)
        row[f"{condition} outside"] = float(means[1])
        row[f"{condition} locality"] = float(_ratio(means))
        row[f"{condition} locality interval"] = bootstrap_interval(paired[:, at], _ratio)
    for at, control in enumerate(CONTROLS, 1):
        row |= _estimate(f"ablated − {control}", inside[:, 0] - inside[:, at])
    return row


def _estimate(name: str, values: Float[np.ndarray, "unit"]) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name} interval": bootstrap_interval(values)}


def _ratio(means: Float[np.ndarray, "*draw 2"]) -> Float[np.ndarray, "*draw"]:
    inside, outside = means[..., 0], means[..., 1]
    return np.asarray(np.divide(inside, outside, out=np.full_like(inside, np.nan), where=outside > 0))


def _locality(row: Mapping[str, Any]) -> str:
    if np.isnan(row["ablated locality"]):
        return "There is no outside to compare with: they fire all over the image, or nothing changes elsewhere."
    controls = ", ".join(f"{c} {_with_interval(row, f'{c} locality')}" for c in CONTROLS)
    own = _with_interval(row, "ablated locality")
    return (
        f"The change inside the region is {own} times that outside; for the controls: {controls} (over the "
        f"{row['with outside']} features that leave {MIN_IMAGES} images or more some outside)."
    )


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    """Value and interval; a dash for what could not be estimated."""
    value, low, high = ("–" if np.isnan(x) else html.short(x) for x in (row[name], *row[f"{name} interval"]))
    return value if value == "–" else f"{value} [{low}, {high}]"


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table people see."""
    names = {"inside / outside": "ablated locality"} | {f"ablated − {c}": f"ablated − {c}" for c in CONTROLS}
    intervals = {title: _with_interval(row, name) for title, name in names.items()}
    shown = {"feature": str(row["feature"]), "images": row["images"]}
    return shown | {"inside": row["ablated"], "with outside": row["with outside"]} | intervals


def _compose(drawn: Mapping[str, Pictures], gain: float) -> bytes:
    """A row per image: clean, ablated, and how each condition differs from clean."""
    differences = [np.clip(np.abs(drawn[c] - drawn["clean"]) * gain, 0, 1) for c in CONDITIONS]
    columns = [drawn["clean"], drawn["ablated"], *differences]
    rows, step = min(_SHOWN, len(columns[0])), _TILE + _GAP
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

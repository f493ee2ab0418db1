"""Similarity of images: how alike the top images of a feature are, by a judge that can be exchanged.

A judge turns images into vectors of length 1, whose dot product is the similarity. `WorldEmbed` reads pictures of the
embedded model; `ClipEmbed` is any CLIP that transformers loads, and knows texts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.numpy import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.devices import choose_device
from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.files import hash_file, sha256, write_atomically
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.tiny import WEIGHTS
from sdxl_sae_kit.tiny.judge import FILE as JUDGE
from sdxl_sae_kit.tiny.judge import load_judge
from sdxl_sae_kit.tiny.quiet import quiet
from sdxl_sae_kit.tiny.world import SIZE

MIN_IMAGES = 8
"""Specificity is given for features with at least so many images: simulated 95 % intervals cover the true mean in 90 %
of features with 8 images, as with 12 (92 %), but in 63 % of those with 3."""
_FILE, _BATCH, _FEATURES, _SHOWN, _RESAMPLES = "embeddings.safetensors", 64, 128, 12, 1000

Unit = Float[np.ndarray, "row d"]
"""Rows of length 1."""


@runtime_checkable
class Embed(Protocol):
    """A judge of images: each becomes a vector of length 1, and the dot product of two says how alike they are."""

    @property
    def name(self) -> str:
        """Which judge this is, weights included: what embeddings are kept under."""

    def __call__(self, images: Sequence[Image.Image]) -> Unit:
        """One row for every image."""


class WorldEmbed:
    """What the embedded judge says of pictures of the tiny world.

    The similarity of two is the mean over the world's factors of Σ √(p q), where p and q are the probabilities of the
    factor's values in either (Bhattacharyya's coefficient): 0 to 1, which says that the judge says the same of both. Of
    what was tried it tells best whether two pictures share a factor: mean AUC 0.70, the judge's last layer 0.63.
    """

    def __init__(self) -> None:
        self._judge = load_judge()
        self.name = f"world judge {hash_file(WEIGHTS / 'judge' / JUDGE)[:8]}"

    def __call__(self, images: Sequence[Image.Image]) -> Unit:
        """One row of length 1 for every picture of 64 × 64 pixels.

        Raises:
            KitError: there are none, or they have another size.
        """
        told = self._judge.probabilities(images).values()
        return np.sqrt(np.concatenate(list(told), axis=1) / len(told))


class ClipEmbed:
    """A CLIP of transformers, from a local folder or the hub, for images and texts; in float32.

    Args:
        model: folder, or hub id such as "openai/clip-vit-large-patch14".
        device: as in `load_pipeline`.

    Raises:
        ModelError: it cannot be loaded as a CLIP, or the device cannot be had.

    >>> clip = ClipEmbed("openai/clip-vit-large-patch14")                                      # doctest: +SKIP
    >>> clip(images) @ clip.texts(["a photo of a dog"]).T                                      # doctest: +SKIP
    """

    def __init__(self, model: str | Path, *, device: str | None = None) -> None:
        self._device = choose_device(device)
        with quiet():
            from transformers import AutoTokenizer, CLIPModel
            from transformers.image_processing_base import ImageProcessingMixin
        try:
            with quiet():
                clip = CLIPModel.from_pretrained(str(model), use_safetensors=True, dtype=torch.float32)
                self._tokenizer = AutoTokenizer.from_pretrained(str(model))
            settings, _ = ImageProcessingMixin.get_image_processor_dict(str(model))
            mean, std = (np.float32(settings[name]) for name in ("image_mean", "image_std"))
        except Exception as cause:  # transformers raises whatever it trips over
            raise ModelError(
                f"{model} cannot be loaded as a CLIP ({cause}). Pass a folder or a hub id such as "
                "'openai/clip-vit-large-patch14'; the hub needs the network."
            ) from None
        self._clip: Any = clip.eval().requires_grad_(False).to(self._device)
        self._mean, self._std = mean, std
        weights = clip.visual_projection.weight.detach().cpu().numpy().tobytes()
        self.name = f"CLIP {Path(model).name} {sha256(weights)[:8]}"

    def __call__(self, images: Sequence[Image.Image]) -> Unit:
        """One row of length 1 for every image: resized (bicubic), centre cropped and normalised as CLIP is used to."""
        batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
        return _normalised(np.concatenate([self._see(batch) for batch in batches]))

    @torch.no_grad()
    def _see(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "image d"]:
        side = self._clip.config.vision_config.image_size
        pixels = np.stack([(_cropped(image, side) - self._mean) / self._std for image in images])
        seen = self._clip.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device))
        return _as_array(self._clip.visual_projection(seen.pooler_output))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Unit:
        """One row of length 1 for every text; what is longer than CLIP reads is cut."""
        longest = self._clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = (tokens[name].to(self._device) for name in ("input_ids", "attention_mask"))
        read = self._clip.text_model(input_ids=ids, attention_mask=mask)
        return _normalised(_as_array(self._clip.text_projection(read.pooler_output)))


def _cropped(image: Image.Image, side: int) -> Float[np.ndarray, "side side 3"]:
    """The middle of the image, its shorter edge made `side` pixels long; colours 0 to 1."""
    shorter = min(image.size)
    width, height = (max(side, int(side * edge / shorter)) for edge in image.size)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(scaled.crop((left, top, left + side, top + side)), dtype=np.float32) / np.float32(255)


def _as_array(tensor: Tensor) -> Float[np.ndarray, "row d"]:
    return np.asarray(tensor.float().cpu().numpy())


def _normalised(rows: Float[np.ndarray, "row d"]) -> Unit:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12), dtype=np.float32)


def default_embed(stats: FeatureStats) -> Embed:
    """The judge of the tiny world, where the pictures are of it.

    Raises:
        KitError: they are not, or there are none.
    """
    _check_pictures(stats)
    size = decode_picture(stats.thumbnail(int(stats.pictured[0]))).size
    if size == (SIZE, SIZE):
        return WorldEmbed()
    raise KitError(
        f"The embedded judge reads pictures of the tiny world; these have {size[0]}×{size[1]} pixels. Name a CLIP: "
        "embed=ClipEmbed('openai/clip-vit-large-patch14'), or a folder that holds one."
    )


def _check_pictures(stats: FeatureStats) -> None:
    if not len(stats.pictured):
        raise KitError(f"No pictures are kept for {stats.sae}. Collect with images='thumbnails' and measure again.")


def embed_pictures(stats: FeatureStats, embed: Embed, store: Store | Path | str | None = None) -> Unit:
    """A row for each of `stats.pictured`, kept in the store: SAEs of one cache share them.

    What the judge sees are the thumbnails, of at most 160 pixels.

    Args:
        stats: feature statistics.
        embed: the judge.
        store: folder of artifacts; by default the one that `stats` are in.

    Raises:
        KitError: no pictures are kept.
    """
    _check_pictures(stats)
    recipe = {
        "study": "embeddings",
        "judge": embed.name,
        "cache": stats.artifact.recipe["cache"],
        "images": sha256(stats.pictured.astype("<i8").tobytes()),
    }
    store = Store.at(store or stats.artifact.folder.parent.parent)
    artifact = store.artifact("studies", f"embeddings_{len(stats.pictured)}images", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _embed(stats, embed, artifact)
    return np.asarray(load_file(artifact.check(_FILE))["embeddings"])


def _embed(stats: FeatureStats, embed: Embed, artifact: Artifact) -> None:
    tqdm.write(f"Looking at {len(stats.pictured):,} pictures with {embed.name}, as {artifact.name}.")
    rows = []
    for start in tqdm(range(0, len(stats.pictured), _BATCH), desc="embed", unit="batch"):
        rows.append(embed([decode_picture(webp) for webp in stats.thumbnails(stats.pictured[start : start + _BATCH])]))
    write_atomically(artifact.file(_FILE), save({"embeddings": np.concatenate(rows).astype(np.float32)}))
    artifact.seal(facts={"pictures": len(stats.pictured), "judge": embed.name})


def top_pictures(stats: FeatureStats, n: int) -> dict[int, Int[np.ndarray, "top"]]:
    """Alive feature → its top images by maximum, at most n, each of another prompt, as places in `stats.pictured`.

    Raises:
        KitError: fewer examples were kept than anything can be said of.
    """
    kept = stats.top_images.shape[1]
    if kept < MIN_IMAGES:
        raise KitError(
            f"{stats.sae}: this takes {MIN_IMAGES} images of each feature, but its statistics keep {kept} examples. "
            f"Measure again with a larger top, such as FeatureStats.measure(sae, cache, top={n})."
        )
    found, texts = {}, stats.prompts.texts
    for feature in stats.alive.tolist():
        best: dict[str, int] = {}
        for image in stats.top_images[feature].tolist():
            if image >= 0:
                best.setdefault(texts[image], image)
        found[feature] = np.searchsorted(stats.pictured, list(best.values())[:n])
    return found


@dataclass(frozen=True)
class Specificity:
    """How alike each feature's top images are: mean cosine similarity of all pairs of them, by a judge.

    Attributes:
        value (d_sae,): −1 to 1; NaN for features with fewer than 8 images.
        low, high (d_sae,): 95 % bootstrap interval over a feature's images; an image is never paired with its own copy.
        n (d_sae,): images of each feature, all of different prompts.
        chance (d_sae,): what 97.5 % of 1,000 random sets of as many pictured images stay below.
        baseline: mean over random sets of as many images as a feature can have (n of `specificity`).
        baseline_interval: what 95 % of these sets have, so where such a feature lies whose images have nothing in
            common; with fewer images it is wider.
        judge: name of the judge.
    """

    sae: str
    hookpoint: str
    judge: str
    value: Float[np.ndarray, "latent"] = field(repr=False)
    low: Float[np.ndarray, "latent"] = field(repr=False)
    high: Float[np.ndarray, "latent"] = field(repr=False)
    n: Int[np.ndarray, "latent"] = field(repr=False)
    chance: Float[np.ndarray, "latent"] = field(repr=False)
    baseline: float
    baseline_interval: tuple[float, float]

    @property
    def measured(self) -> Int[np.ndarray, "measured"]:
        """The features it is given for, most specific first."""
        known = np.flatnonzero(np.isfinite(self.value))
        return np.asarray(known[np.argsort(-self.value[known], kind="stable")])

    @cached_property
    def mean(self) -> tuple[float, float, float]:
        """Mean over the features measured, with its 95 % bootstrap interval over features."""
        values = self.value[self.measured]
        return (float(values.mean()) if len(values) else float("nan"), *bootstrap_interval(values))

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature, most specific first."""
        return [
            {
                "feature": feature,
                "specificity": float(self.value[feature]),
                "interval": (float(self.low[feature]), float(self.high[feature])),
                "images": int(self.n[feature]),
            }
            for feature in self.measured.tolist()
        ]

    def summary(self) -> dict[str, Any]:
        """One row of a table that sets SAEs beside each other."""
        mean, low, high = self.mean
        of_random = {"random images": self.baseline, "95 % of random sets": self.baseline_interval}
        return {"of": self.sae, "specificity": mean, "interval": (low, high), "latents": len(self.measured)} | of_random

    def sentence(self) -> str:
        """What the numbers say."""
        if not len(self.measured):
            return f"No feature has {MIN_IMAGES} images of different prompts."
        above = int((self.low > self.chance).sum())  # NaN, where it is not measured, is above nothing
        mean, low, high = map(html.short, self.mean)
        least, most = map(html.short, self.baseline_interval)
        return (
            f"Top images of a feature have a mean pairwise cosine similarity of {mean} [{low}, {high}] (95 % interval "
            f"over {len(self.measured):,} features), random images {html.short(self.baseline)} [{least}, {most}] (95 % "
            f"of random sets). The interval of {above:,} features lies above what random sets of as many images have. "
            f"Judge: {self.judge}."
        )

    def _repr_html_(self) -> str:
        rows = [
            {**row, "feature": str(row["feature"]), "interval": "[{:.3f}, {:.3f}]".format(*row["interval"])}
            for row in self.rows()[:_SHOWN]
        ]
        caption = "Specificity: mean pairwise cosine similarity of the top images, 95 % bootstrap interval over images."
        title = html.heading(f"Specificity of the features of {self.hookpoint}", html.escape(self.sentence()))
        return html.fragment(title, html.table(rows, caption))


@checked
def specificity(
    stats: FeatureStats, embed: Embed | None = None, *, n: int = 12, store: Store | Path | str | None = None
) -> Specificity:
    """How alike the top images of every alive feature are, beside as many random ones; see `Specificity`.

    The control is the specificity of `FeatureStats.measure(sae.untrained(), cache)`.

    Args:
        stats: feature statistics of a cache with images.
        embed: the judge; by default that of the tiny world, where the pictures are of it.
        n: at most so many top images of each feature, of its `examples` by maximum.
        store: folder of artifacts in which the embeddings are kept; by default that of `stats`.

    Raises:
        KitError: these are no statistics, there are no pictures, they are not of the tiny world and no judge is given,
            or the statistics keep fewer than 8 examples of each feature.

    >>> specificity(stats).sentence()                                                          # doctest: +SKIP
    """
    n = whole_number("specificity: n", n, least=MIN_IMAGES)
    embed = embed or default_embed(stats)
    if not isinstance(embed, Embed):
        raise KitError(f"specificity: embed is a judge such as ClipEmbed('folder'), not {embed!r}.")
    _check_pictures(stats)
    top = top_pictures(stats, n)  # refuses before the judge looks at thousands of pictures
    rows, rng = embed_pictures(stats, embed, store), np.random.default_rng(0)
    value, low, high, chance = (np.full(stats.d_sae, np.nan, dtype=np.float32) for _ in range(4))
    counts = np.zeros(stats.d_sae, dtype=np.int64)
    counts[list(top)] = [len(images) for images in top.values()]
    sizes = sorted(set(counts[counts >= MIN_IMAGES].tolist()))
    random = {size: _random_sets(stats, rows, size, rng) for size in {n, *sizes}}
    for size in sizes:
        draws = _draws(rng, size)
        for features in np.split(sized := np.flatnonzero(counts == size), range(_FEATURES, len(sized), _FEATURES)):
            images = np.stack([top[feature] for feature in features.tolist()])  # (feature, size)
            value[features], low[features], high[features] = _alike(rows[images], draws)
        chance[counts == size] = random[size][1][1]
    return Specificity(stats.sae, stats.hookpoint, embed.name, value, low, high, counts, chance, *random[n])


def _draws(rng: np.random.Generator, n: int) -> Float[np.ndarray, "draw n"]:
    """How often each of n images is in each bootstrap sample; samples of one image alone have no pairs and are left."""
    draws = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    return np.asarray(draws[(draws > 0).sum(axis=1) > 1], dtype=np.float32)


def _alike(
    rows: Float[np.ndarray, "feature n d"], draws: Float[np.ndarray, "draw n"]
) -> tuple[Float[np.ndarray, " feature"], ...]:
    """Mean similarity of all pairs of different images, and its bootstrap interval."""
    n, similar = rows.shape[1], rows @ rows.swapaxes(1, 2)  # (feature, n, n)
    own = np.einsum("fii->fi", similar)
    value = np.asarray((similar.sum((1, 2)) - own.sum(1)) / (n * n - n))
    pairs = np.einsum("fdi,di->fd", draws @ similar, draws) - own @ (draws**2).T  # (feature, draw)
    drawn = pairs / (n * n - (draws**2).sum(1))
    return value, *np.quantile(drawn, [0.025, 0.975], axis=1)


def _random_sets(
    stats: FeatureStats, rows: Unit, n: int, rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """Mean similarity within random sets of pictures of different prompts, and what the middle 95 % of sets have.

    Where only some pictures are kept, those of held-out images, because most others are kept as some latent's example.
    """
    texts = np.array([stats.prompts.texts[image] for image in stats.pictured])
    eligible = np.arange(len(texts))
    if len(texts) < stats.n_images:
        eligible = np.flatnonzero(stats.prompts.held_out[stats.pictured])
    different = eligible[np.unique(texts[eligible], return_index=True)[1]]
    if len(different) < MIN_IMAGES:
        return float("nan"), (float("nan"), float("nan"))
    size = min(n, len(different))
    drawn = []
    for _ in range(_RESAMPLES):
        chosen = rows[rng.choice(different, size, replace=False)].astype(np.float64)
        pairs = (chosen.sum(axis=0) ** 2).sum() - (chosen**2).sum()  # Σ over pairs is ‖Σ‖² − Σ‖·‖²
        drawn.append(pairs / (size * size - size))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.mean(drawn)), (float(low), float(high))

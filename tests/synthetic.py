"""Feature statistics of a made-up SAE on made-up pictures, for tests of what only shows them.

Each latent answers to one colour, and half as much to one place.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdxl_sae_kit import icons
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.features import Curve, Example, FeatureStats, Histogram, Neighbour, Ranking
from sdxl_sae_kit.firing import EDGES
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.pictures import encode_picture
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.tiny.world import BACKGROUNDS, COLOURS

PLACES = {
    "on the left": (18, 32),
    "on the right": (46, 32),
    "at the top": (32, 18),
    "at the bottom": (32, 46),
    "in the center": (32, 32),
}
GRID = (8, 8)
N_IMAGES = 90


@dataclass(frozen=True)
class SyntheticStats(FeatureStats):
    """Statistics computed from `codes` (image, latent, height, width), which are small enough to hold."""

    codes: np.ndarray = field(repr=False, compare=False, kw_only=True)
    texts: tuple[str, ...] = field(repr=False, kw_only=True)
    pictures: tuple[bytes, ...] = field(repr=False, kw_only=True)

    @property
    def prompts(self) -> Prompts:
        """One prompt an image."""
        return Prompts(self.texts, tuple(range(N_IMAGES)), ({},) * N_IMAGES)

    @property
    def curves(self) -> tuple[Curve, ...]:
        """Two steps, the second of which fires half as much."""
        return tuple(Curve(step, "cond", self.density / (step + 1), self.mean / (step + 1)) for step in range(2))

    @property
    def histogram(self) -> Histogram:
        """Counts of every value."""
        firing = [np.histogram(self.codes[:, latent], EDGES)[0] for latent in range(self.d_sae)]
        return Histogram(EDGES, np.stack(firing))

    @property
    def pictured(self) -> np.ndarray:
        """All images."""
        return np.arange(N_IMAGES)

    def thumbnail(self, image: int) -> bytes:
        """The image's picture."""
        return self.pictures[image]

    def image_activations(self, by: Ranking = "max") -> np.ndarray:
        """Maximum, mean or share of firing tokens over each image, (image, latent)."""
        by_name = {"max": self.codes.max((2, 3)), "mean": self.codes.mean((2, 3))}
        return (by_name | {"area": (self.codes > FIRES).mean((2, 3)).astype(np.float32)})[by]

    def strengths(self, feature: int) -> np.ndarray:
        """Its maximum over each image."""
        return self.image_activations()[:, feature]

    def examples(self, feature: int, by: Ranking = "max", n: int | None = None) -> list[Example]:
        """The images on which the latent is strongest at one token, on average, or by area."""
        values = self.image_activations(by)[:, feature]
        strongest = np.argsort(-values, kind="stable")[: n or 12]
        return self._as_examples(feature, strongest[values[strongest] > 0], values)

    @property
    def top_images(self) -> np.ndarray:
        """The twelve images on which each latent is strongest."""
        values = self.image_activations()
        best = np.argsort(-values, axis=0, kind="stable")[:12]
        return np.where(np.take_along_axis(values, best, axis=0) > FIRES, best, -1).T

    def sample(self, feature: int) -> list[Example]:
        """Twelve images from the weakest to the strongest."""
        values = self.image_activations()[:, feature]
        order = np.argsort(values, kind="stable")
        firing = order[values[order] > FIRES]
        if not firing.size:
            return []
        return self._as_examples(feature, firing[np.unique(np.linspace(0, len(firing) - 1, 12).astype(int))], values)

    def _as_examples(self, feature: int, images: np.ndarray, values: np.ndarray) -> list[Example]:
        maps = self.codes[:, feature]
        return [Example(i, self.texts[i], i, float(values[i]), maps[i], self.pictures[i]) for i in images.tolist()]

    def heat_map(self, feature: int, image: int) -> np.ndarray:
        """The latent on one image."""
        return self.codes[image, feature]

    def heat_maps(self, image: int) -> np.ndarray:
        """Every latent on one image."""
        return self.codes[image]

    def coactive(self, feature: int, n: int = 8) -> list[Neighbour]:
        """By Jaccard index of firing tokens."""
        on = self.codes.swapaxes(0, 1).reshape(self.d_sae, -1) > FIRES
        index = (on & on[feature]).sum(1) / np.maximum((on | on[feature]).sum(1), 1)
        index[feature] = 0
        best = np.argsort(-index, kind="stable")[:n]
        return [Neighbour(int(i), float(index[i]), on.shape[1]) for i in best if index[i] > 0]

    def similar(self, feature: int, n: int = 8) -> list[Neighbour]:
        """Made-up cosines, falling with distance."""
        nearest = sorted((i for i in self.alive.tolist() if i != feature), key=lambda i: abs(i - feature))
        return [Neighbour(i, 1 / (1 + abs(i - feature))) for i in nearest[:n]]


def synthetic_stats(
    store: Path | str = "nowhere", *, sae: str = "synthetic_mid.0_k10-0123abcd", d_sae: int = 40, n_dead: int = 5
) -> SyntheticStats:
    """Statistics of `d_sae` latents, the last `n_dead` of which never fire, as if kept in `store`."""
    rng = np.random.default_rng(0)
    colours, places, backgrounds = (list(names) for names in (COLOURS, PLACES, BACKGROUNDS))
    scenes = [
        (rng.choice(colours), rng.choice(places), rng.choice(backgrounds), int(rng.integers(8, 15)))
        for _ in range(N_IMAGES)
    ]
    codes = np.zeros((N_IMAGES, d_sae, *GRID), dtype=np.float32)
    y, x = np.mgrid[0:8, 0:8] * 8 + 4
    for image, (colour, place, _, radius) in enumerate(scenes):
        across, down = PLACES[place]
        blob = np.exp(-((x - across) ** 2 + (y - down) ** 2) / (2 * radius**2)) * rng.uniform(0.6, 1.4)
        for latent in range(d_sae - n_dead):
            match = (latent % 6 == colours.index(colour)) + 0.5 * (latent % 5 == places.index(place))
            codes[image, latent] = np.maximum(match * blob - 0.3, 0) * (1 + latent / 10)
    firing = codes > FIRES
    n_firing = np.maximum(firing.sum((0, 2, 3)), 1)
    mean = np.where(firing, codes, 0).sum((0, 2, 3)) / n_firing
    spread = np.where(firing, (codes - mean[:, None, None]) ** 2, 0).sum((0, 2, 3)) / n_firing
    texts = [
        f"a {'large' if radius > 11 else 'small'} {colour} ball {place}, {background} background"
        for colour, place, background, radius in scenes
    ]
    return SyntheticStats(
        artifact=Artifact(Path(store) / "features" / f"{sae}-9876fedc"),
        step=0,
        sae=sae,
        hookpoint="mid.0",
        grid=GRID,
        n_tokens=N_IMAGES * 64,
        n_images=N_IMAGES,
        density=firing.mean((0, 2, 3)).astype(np.float32),
        image_density=firing.any((2, 3)).mean(0).astype(np.float32),
        mean=mean.astype(np.float32),
        std=np.sqrt(spread).astype(np.float32),
        max=codes.max((0, 2, 3)),
        moran=(moran := np.where(firing.any((0, 2, 3)), np.linspace(0.1, 0.9, d_sae), np.nan).astype(np.float32)),
        moran_low=moran - np.float32(0.05),
        moran_high=moran + np.float32(0.05),
        moran_n=firing.any((2, 3)).sum(0).astype(np.float32),
        codes=codes,
        texts=tuple(texts),
        pictures=tuple(_thumbnail(*scene) for scene in scenes),
    )


def synthetic_icons(store: Path, sae: str, features: list[int], hookpoint: str = "mid.0") -> Icons:
    """Icons of these features, each picture of another colour."""
    recipe = {"sae_name": sae, "hookpoint": hookpoint, "strengths": [0.5, 1, 1.5], "features": features}
    artifact = Store.at(store).artifact("icons", sae.rsplit("-", 1)[0], recipe | {"features_per_part": 2})
    artifact.folder.mkdir(parents=True)
    artifact.file("plain.webp").write_bytes(encode_picture(Image.new("RGB", (64, 64), "white"), "thumbnails"))
    for part in range(-(-len(features) // 2)):
        pictures = [
            Image.new("RGB", (64, 64), (10 * feature % 256, 80 * strength, 0))
            for feature in features[2 * part : 2 * part + 2]
            for strength in range(3)
        ]
        artifact.file(f"part-{part:05d}.h5").write_bytes(icons._packed(pictures, 3))
    return Icons.open(artifact.seal().folder)


def _thumbnail(colour: str, place: str, background: str, radius: int) -> bytes:
    image = Image.new("RGB", (256, 256), BACKGROUNDS[background])
    across, down = PLACES[place]
    ImageDraw.Draw(image).ellipse(
        [4 * (across - radius), 4 * (down - radius), 4 * (across + radius), 4 * (down + radius)], fill=COLOURS[colour]
    )
    file = io.BytesIO()
    image.resize((64, 64), Image.Resampling.LANCZOS).save(file, "WEBP", quality=80)
    return file.getvalue()

"""Feature statistics of a made-up SAE whose latents answer to one factor of rendered scenes each, for label tests."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.features import Example, FeatureStats, Ranking
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.tiny.world import factors, render, sample_scene

N_IMAGES = 500
RED, LEFT, NOISE, DEAD, EVERYWHERE, RARE = range(6)


class WorldStats(FeatureStats):
    """Latents: some object is red; one object on the left; 30 % of images at random; never; always; two images."""

    @property
    def prompts(self) -> Prompts:
        return self.given_prompts

    @property
    def pictured(self) -> np.ndarray:
        return np.arange(N_IMAGES)

    def thumbnail(self, image: int) -> bytes:
        return thumbnails()[image]

    def heat_map(self, feature: int, image: int) -> np.ndarray:
        return np.full((8, 8), self.values[image, feature], dtype=np.float32)

    def image_activations(self, by: Ranking = "max") -> np.ndarray:
        return self.values

    def strengths(self, feature: int) -> np.ndarray:
        return self.values[:, feature]

    def examples(self, feature: int, by: Ranking = "max", n: int | None = None) -> list[Example]:
        order = np.argsort(-self.values[:, feature], kind="stable")[: n or 12]
        return [self.example(feature, image) for image in order.tolist() if self.values[image, feature] > FIRES]

    def sample(self, feature: int) -> list[Example]:
        return self.examples(feature)[-4:]

    def example(self, feature: int, image: int) -> Example:
        value = float(self.values[image, feature])
        return Example(image, self.prompts.texts[image], image, value, self.heat_map(feature, image), b"")


@cache
def scenes() -> list:
    rng = np.random.RandomState(7)
    return [sample_scene(rng) for _ in range(N_IMAGES)]


@cache
def thumbnails() -> list[bytes]:
    """The scenes, as WebP without loss."""
    files = [io.BytesIO() for _ in scenes()]
    for scene, file in zip(scenes(), files, strict=True):
        Image.fromarray(render(scene)).save(file, "WEBP", lossless=True)
    return [file.getvalue() for file in files]


def shows_red(image: int) -> bool:
    told = factors(scenes()[image])
    return "red" in (told["colour"], told.get("colour2"))


def world_stats(store: Path | str = "nowhere") -> WorldStats:
    rng = np.random.default_rng(3)
    told = [factors(scene) for scene in scenes()]
    shows = np.zeros((N_IMAGES, 6), dtype=bool)
    shows[:, RED] = [shows_red(image) for image in range(N_IMAGES)]
    shows[:, LEFT] = [facts.get("position") == "on the left" for facts in told]
    shows[:, NOISE] = rng.random(N_IMAGES) < 0.3
    shows[:, EVERYWHERE] = True
    shows[:2, RARE] = True
    stats = object.__new__(WorldStats)
    texts = tuple(f"scene {image}" for image in range(N_IMAGES))
    for name, value in {
        "artifact": Artifact(Path(store) / "features" / "world_mid.0_k10-0123abcd-9876fedc"),
        "sae": "world_mid.0_k10-0123abcd",
        "density": shows.mean(0).astype(np.float32),
        "values": (shows * rng.uniform(0.5, 3, shows.shape)).astype(np.float32),
        "given_prompts": Prompts(texts, tuple(range(N_IMAGES)), tuple(told)),
    }.items():
        object.__setattr__(stats, name, value)
    return stats

"""Paired pictures: the same prompt and seed, as it is and with each of several changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.hooks import record, rewrite
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.search import held_out_firing
from sdxl_sae_kit.studies.controls import Change, changing

Key = tuple[int, str]
"""A feature and a condition."""
Picture = Float[np.ndarray, "y x 3"]
"""Colours 0 to 1."""


@dataclass(frozen=True)
class Order:
    """An image to be made, and the changes to be made to it."""

    image: int
    prompt: str
    seed: int
    changes: Mapping[Key, Change]


@dataclass
class Pairs:
    """One image with all changes that were ordered: (as it is, changed), both from one batch.

    What a batch of another size rounds otherwise would count as a difference, so each batch draws the image as it is.
    """

    order: Order
    z: Float[np.ndarray, "height width d_sae"]
    """The code of the image as it is, at the step of the statistics (with guidance, of the cond half)."""
    pictures: dict[Key, tuple[Picture, Picture]] = field(default_factory=dict)

    @property
    def clean(self) -> Picture:
        """The image as it is."""
        return next(iter(self.pictures.values()))[0]


def draw_pairs(
    pipe: Any, sae: SAE, stats: FeatureStats, orders: Sequence[Order], done: Collection[int], batch_size: int
) -> Iterator[Pairs]:
    """Every image ordered that is not `done`, in batches that do not depend on what is done."""
    started: dict[int, Pairs] = {}
    for batch in fill_batches(orders, batch_size):
        if all(order.image in done for order, _ in batch):
            continue
        for order, keys, z, pictures in _draw(pipe, sae, stats, batch):
            if order.image in done:  # its other pictures may be in batches that are not drawn: it would never be whole
                continue
            pairs = started.setdefault(order.image, Pairs(order, z))
            pairs.pictures |= {key: (pictures[0], each) for key, each in zip(keys, pictures[1:], strict=True)}
            if len(pairs.pictures) == len(order.changes):
                del started[order.image]
                yield pairs


def count_pictures(orders: Sequence[Order], done: Collection[int], batch_size: int) -> int:
    """How many pictures `draw_pairs` makes."""
    left = [b for b in fill_batches(orders, batch_size) if not all(order.image in done for order, _ in b)]
    return sum(1 + len(keys) for batch in left for _, keys in batch)


def fill_batches(orders: Iterable[Order], size: int) -> list[list[tuple[Order, list[Key]]]]:
    """Full batches; an image whose changes do not fit into one goes on in the next."""
    batches: list[list[tuple[Order, list[Key]]]] = []
    room = 0
    for order in orders:
        left = list(order.changes)
        while left:
            if room < 2:
                batches.append([])
                room = size
            keys, left = left[: room - 1], left[room - 1 :]
            batches[-1].append((order, keys))
            room -= 1 + len(keys)
    return batches


@torch.no_grad()
def _draw(
    pipe: Any, sae: SAE, stats: FeatureStats, batch: Sequence[tuple[Order, list[Key]]]
) -> Iterator[tuple[Order, list[Key], Float[np.ndarray, "height width d_sae"], Float[np.ndarray, "picture y x 3"]]]:
    """One batch: of each image its code, and its pictures, the first of which is as it is."""
    orders = [order for order, keys in batch for _ in range(1 + len(keys))]
    changes = [change for order, keys in batch for change in (None, *(order.changes[key] for key in keys))]
    texts, seeds = [order.prompt for order in orders], [order.seed for order in orders]
    with (
        record(pipe, [sae.hookpoint], steps=[stats.step]) as recording,
        rewrite(pipe, {sae.hookpoint: changing(sae, changes)}),
    ):
        made = generate(pipe, texts, seeds, **_settings(pipe, sae, stats), output_type="np")
    pictures, at = np.asarray(made, dtype=np.float32), 0
    for order, keys in batch:
        end = at + 1 + len(keys)
        yield order, keys, _encode(sae, recording.update(sae.hookpoint, stats.step)[at])[0], pictures[at:end]
        at = end


def strongest_held_out(stats: FeatureStats, features: Sequence[int], n: int) -> dict[int, list[int]]:
    """For each feature the held-out images on which it fires, strongest by spatial mean first; at most n."""
    firing, means = held_out_firing(stats), stats.image_activations("mean")
    order = {f: np.argsort(-means[:, f], kind="stable") for f in features}
    return {f: images[firing[images, f]][:n].tolist() for f, images in order.items()}


@torch.no_grad()
def find_firing(
    pipe: Any, sae: SAE, stats: FeatureStats, prompts: Prompts, features: Sequence[int], batch_size: int
) -> Bool[np.ndarray, "image feature"]:
    """On which images which features fire at the step of the statistics; only as much is made as tells it."""
    found = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        with record(pipe, [sae.hookpoint], steps=[stats.step], stop_early=True) as recording:
            generate(pipe, part.texts, part.seeds, **_settings(pipe, sae, stats))
        z = _encode(sae, recording.update(sae.hookpoint, stats.step))
        found.append((z[..., list(features)] > FIRES).any(axis=(1, 2)))
    return np.concatenate(found)


def _encode(sae: SAE, updates: torch.Tensor) -> Float[np.ndarray, "image height width d_sae"]:
    """Codes of one image's update or of several."""
    x = updates.to(sae.W_enc.device, torch.float32)
    z: Float[np.ndarray, "image height width d_sae"] = sae.encode(x[None] if x.ndim == 3 else x).cpu().numpy()
    return z


def _settings(pipe: Any, sae: SAE, stats: FeatureStats) -> dict[str, Any]:
    """How the images of the statistics were made."""
    assert sae.site is not None
    pixels = token_pixels(pipe, sae)
    steps, guidance = sae.site.num_inference_steps, sae.site.guidance_scale
    height, width = stats.grid[0] * pixels, stats.grid[1] * pixels
    return {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}


def token_pixels(pipe: Any, sae: SAE) -> int:
    """Pixels of the picture across one token of the SAE's hookpoint."""
    return int(resolve(pipe.unet, sae.hookpoint).reduction * pipe.vae_scale_factor)

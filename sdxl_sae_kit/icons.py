"""Icons: what a feature writes when nothing else is asked for, drawn by adding it alone to the empty prompt."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.hooks import Call, rewrite
from sdxl_sae_kit.interventions import check_measured
from sdxl_sae_kit.pictures import decode_picture, encode_picture
from sdxl_sae_kit.pipelines import generate, scheduler
from sdxl_sae_kit.sae import SAE

_PART, _PLAIN = "part-{:05d}.h5", "plain.webp"
_SHOWN, _TILE, _GAP = 12, 88, 4


@dataclass(frozen=True)
class Icons:
    """Pictures of features, each added alone at every token of the empty prompt's image, at several strengths.

    At strength s the update gets s · mean · k · d_f more: the feature's mean activation over firing tokens, times the
    number of latents active at once (whose place it takes), times its direction. Noise and all else are those of
    `plain`, so what differs from it is the feature's. The control is the icons of `sae.untrained()`.
    """

    artifact: Artifact = field(repr=False)
    sae: str
    """Name of the SAE."""
    hookpoint: str
    strengths: tuple[float, ...]
    """The s above."""
    features: Int[np.ndarray, "feature"] = field(repr=False)
    """The latents drawn."""
    plain: bytes = field(repr=False)
    """The same image with nothing added, as WebP."""

    @classmethod
    def open(cls, folder: Path | str) -> Icons:
        """Read what `draw_icons` made.

        Raises:
            ArtifactError: no finished icons there.
        """
        artifact = Artifact.open(folder, "icons")
        recipe = artifact.recipe
        features, strengths = np.array(recipe["features"], dtype=np.int64), tuple(recipe["strengths"])
        return cls(
            artifact, recipe["sae_name"], recipe["hookpoint"], strengths, features, artifact.check(_PLAIN).read_bytes()
        )

    def get(self, feature: int) -> tuple[bytes, ...] | None:
        """One WebP picture of at most 160 pixels for each strength; None for a feature that was not drawn."""
        if feature not in self._places:
            return None
        part, row = divmod(self._places[feature], self.artifact.recipe["features_per_part"])
        with open_checked(self.artifact.file(_PART.format(part))) as file:
            ends, data = file["ends"][()], file["bytes"]
            starts = np.concatenate([[0], ends.flatten()[:-1]]).reshape(ends.shape)
            return tuple(data[a:b].tobytes() for a, b in zip(starts[row], ends[row], strict=True))

    def row(self, feature: int) -> bytes | None:
        """The same pictures side by side in one, after that with nothing added; None for one that was not drawn."""
        drawn = self.get(feature)
        return None if drawn is None else _side_by_side([self.plain, *drawn], 1 + len(drawn))

    @cached_property
    def _places(self) -> Mapping[int, int]:
        return {feature: place for place, feature in enumerate(self.features.tolist())}

    def _repr_html_(self) -> str:
        facts = (
            f"Added alone at every token of the empty prompt's image, at strengths {self._listed} × mean × k. "
            f"The first {min(_SHOWN, len(self.features))} of {len(self.features):,}, after the image without any."
        )
        empty = html.picture(_side_by_side([self.plain], len(self.strengths)), "the empty prompt's image")
        plain = html.card("nothing added", "", "", empty)
        cards = [self._card(feature) for feature in self.features[:_SHOWN].tolist()]
        title = html.heading(f"What features of {self.hookpoint} write", html.escape(facts))
        return html.fragment(title, html.grid([plain, *cards]))

    def _card(self, feature: int) -> str:
        name, row = f"feature {feature}", _side_by_side(self.get(feature) or (), len(self.strengths))
        return html.card(name, "", "", html.picture(row, f"{name} at strengths {self._listed}"))

    @property
    def _listed(self) -> str:
        return ", ".join(f"{strength:g}" for strength in self.strengths)

    def __repr__(self) -> str:
        return f"Icons of {self.sae}: {counted(len(self.features), 'features')} at strengths {self._listed}"


@checked
def draw_icons(
    pipe: Any,
    sae: SAE,
    stats: FeatureStats,
    features: Sequence[int] | Int[np.ndarray, "feature"] | None = None,
    *,
    strengths: Sequence[float] | Float[np.ndarray, "strength"] = (0.5, 1.0, 1.5),
    seed: int = 0,
    batch_size: int = 32,
    store: Store | Path | str | None = None,
) -> Icons:
    """Draw what each feature writes: alone, at every token of the empty prompt's image; loaded instead if done before.

    Killed at any moment, it goes on at the batch in hand. The model draws with the steps and guidance it is meant for;
    with guidance the feature is added to the cond half and subtracted from the other, as `steer` does.

    Args:
        pipe: the pipeline whose updates the SAE was trained on.
        sae: a trained SAE.
        stats: its feature statistics, which give each feature's mean activation.
        features: latents; by default all that fire.
        strengths: in multiples of mean activation × k, where k is the SAE's or, if it has none, its mean L0.
        seed: of the noise, the same for all pictures.
        batch_size: pictures made at once; all strengths of a feature are in one batch.
        store: folder of artifacts.

    Raises:
        ArtifactError: `stats` belong to another SAE, or the SAE to another model.
        KitError: a latent that does not exist or never fires, strengths that are no numbers, or an SAE whose latents
            have no direction that is the same for all tokens.

    >>> draw_icons(pipe, saes["up.0.1", "k10"], stats)                                             # doctest: +SKIP
    """
    check_measured("draw_icons", pipe, sae, stats)
    _ = sae.directions  # refuses an SAE that has none
    chosen = [int(f) for f in stats.alive] if features is None else _checked(stats, features)
    given: list[Any] = list(strengths)
    if not given or not all(isinstance(s, Real) and np.isfinite(float(s)) for s in given):
        raise KitError(f"draw_icons: strengths must be finite numbers, such as (0.5, 1.0, 1.5), not {strengths!r}.")
    recipe = {
        "sae": sae.digest,
        "sae_name": sae.name,
        "hookpoint": sae.hookpoint,
        "stats": stats.artifact.digest,
        "features": chosen,
        "strengths": [float(strength) for strength in strengths],
        "seed": whole_number("draw_icons: seed", seed, least=0),
        "features_per_part": max(1, whole_number("draw_icons: batch_size", batch_size) // len(strengths)),
        "scheduler": scheduler(pipe),
        "compute_dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    artifact = Store.at(store).artifact("icons", sae.name.rsplit("-", 1)[0], recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                _draw(pipe, sae, stats, artifact)
    return Icons.open(artifact.folder)


def _checked(stats: FeatureStats, features: Any) -> list[int]:
    given = [whole_number("draw_icons: a feature", feature, least=0) for feature in features]
    if not given or len(set(given)) < len(given):
        raise KitError(f"draw_icons: features={given} must name one latent or more, each once.")
    for feature in given:
        if feature >= stats.d_sae:
            raise KitError(f"draw_icons: {stats.sae} has latents 0 to {stats.d_sae - 1}; there is no {feature}.")
        if stats.density[feature] == 0:
            raise KitError(
                f"draw_icons: latent {feature} of {stats.sae} is dead on these images. Take some of stats.alive."
            )
    return given


def _draw(pipe: Any, sae: SAE, stats: FeatureStats, artifact: Artifact) -> None:
    features, strengths = artifact.recipe["features"], artifact.recipe["strengths"]
    size, seed = artifact.recipe["features_per_part"], artifact.recipe["seed"]
    scale = _amounts(sae, stats, features, strengths)
    parts = [range(start, min(start + size, len(features))) for start in range(0, len(features), size)]
    missing = [part for part in range(len(parts)) if not artifact.file(_PART.format(part)).exists()]
    cost = sum(len(parts[part]) for part in missing) * len(strengths)
    tqdm.write(
        f"Drawing icons of {counted(len(features), 'features')} of {sae.name} at "
        f"{counted(len(strengths), 'strengths')}: {counted(cost, 'pictures')} to make, as {artifact.name}."
    )
    if not artifact.file(_PLAIN).exists():
        write_atomically(artifact.file(_PLAIN), _as_thumbnail(generate(pipe, [""], [seed])[0]))
    with tqdm(total=cost, desc="icons", unit="picture") as bar:
        for part in missing:
            rows = sae.directions.detach()[[features[place] for place in parts[part]]]
            added = (
                torch.from_numpy(scale[parts[part]]).to(rows)[..., None] * rows[:, None]
            )  # (feature, strength, d_in)
            with rewrite(pipe, {sae.hookpoint: _adding(added.flatten(0, 1))}):
                pictures = generate(pipe, [""] * added.shape[:2].numel(), [seed] * added.shape[:2].numel())
            write_atomically(artifact.file(_PART.format(part)), _packed(pictures, len(strengths)))
            bar.update(len(pictures))
    artifact.seal(facts={"features": len(features), "pictures": len(features) * len(strengths) + 1})


def _amounts(
    sae: SAE, stats: FeatureStats, features: Sequence[int], strengths: Sequence[float]
) -> Float[np.ndarray, "feature strength"]:
    """How much of each feature is added: strength · mean · k."""
    k = sae.k or float(stats.density.sum(dtype=np.float64))  # mean L0 where no k is set
    return np.multiply.outer(stats.mean[features] * k, strengths).astype(np.float32)


def _adding(change: Float[Tensor, "image d_in"]) -> Callable[[Tensor, Call], Tensor]:
    """What adds to each image of the batch a vector of its own, at every token."""

    def edit(update: Tensor, call: Call) -> Tensor:
        signed = torch.cat([-change, change]) if call.guided else change
        return update + signed.to(update.device, update.dtype)[:, None, None]

    return edit


def _packed(pictures: Sequence[Image.Image], n_strengths: int) -> memoryview:
    """A part's file: pictures one after the other and where each ends, (feature, strength)."""
    encoded, buffer = [_as_thumbnail(picture) for picture in pictures], io.BytesIO()
    ends = np.cumsum([len(webp) for webp in encoded], dtype=np.int64).reshape(-1, n_strengths)
    with h5py.File(buffer, "w", libver=("v108", "v110")) as file:
        file.create_dataset("ends", data=ends)
        file.create_dataset("bytes", data=np.frombuffer(b"".join(encoded), np.uint8), fletcher32=True)
    return buffer.getbuffer()


def _side_by_side(pictures: Sequence[bytes], places: int) -> bytes:
    """WebP pictures in a row that has room for so many, each made as wide and high as a tile."""
    sheet = Image.new("RGBA", (places * (_TILE + _GAP) - _GAP, _TILE))
    for place, webp in enumerate(pictures):
        tile = decode_picture(webp).resize((_TILE, _TILE))
        sheet.paste(tile, (place * (_TILE + _GAP), 0))
    return html.to_webp(sheet)


def _as_thumbnail(picture: Image.Image) -> bytes:
    return encode_picture(picture, "thumbnails")

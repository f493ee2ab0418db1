"""Feature statistics: what each latent of an SAE does over a whole cache, and the images on which it does it most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import FIRES, SAE

Ranking = Literal["max", "mean"]
"""Images are ranked by a latent's maximum over the image, or by its mean over the image."""

_FILE = "features.h5"
_CHUNK = 32  # images at once
_PER_LATENT = ("density", "image_density", "mean", "std", "max")


@dataclass(frozen=True)
class Example:
    """One image on which a latent fires."""

    image: int
    """Index in the cache."""
    prompt: str
    seed: int
    value: float
    """What it was ranked by: the maximum over the image, or the mean."""
    heat_map: Float[np.ndarray, "height width"]
    """The latent's value at every token."""
    thumbnail: bytes
    """The image, small, as WebP."""


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of every latent of one SAE over all images of one cache, at one denoising step.

    Attributes:
        density (d_sae,): share of tokens on which the latent fires (value > 0.001).
        image_density (d_sae,): share of images on which it fires somewhere.
        mean, std, max (d_sae,): over the tokens on which it fires; 0 for a latent that never fired.
    """

    artifact: Artifact = field(repr=False)
    sae: str
    """Name of the SAE."""
    hookpoint: str
    grid: tuple[int, int]
    step: int
    n_images: int
    n_tokens: int
    density: Float[np.ndarray, "latent"] = field(repr=False)
    image_density: Float[np.ndarray, "latent"] = field(repr=False)
    mean: Float[np.ndarray, "latent"] = field(repr=False)
    std: Float[np.ndarray, "latent"] = field(repr=False)
    max: Float[np.ndarray, "latent"] = field(repr=False)

    @classmethod
    def measure(
        cls, sae: SAE, cache: ActivationCache, *, step: int = 0, top: int = 12, store: Store | Path | str | None = None
    ) -> FeatureStats:
        """Encode the whole cache once and keep statistics, codes and the top images; loaded instead if done before.

        Args:
            sae: a trained SAE.
            cache: updates of the hookpoint it was trained at; with guidance, the cond half is taken.
            step: which denoising step.
            top: examples kept for each latent and ranking.
            store: folder of artifacts.

        Raises:
            ArtifactError: the SAE was trained at a hookpoint that the cache does not have, or the cache keeps only some
                tokens of each image.
            KitError: the cache does not have this step.
        """
        if not isinstance(sae, SAE):
            raise KitError(f"measure takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
        if not isinstance(cache, ActivationCache):
            raise KitError(f"measure reads a cache from collect, not {cache!r}. Collect some images for it.")
        hookpoint = sae.hookpoint
        if hookpoint not in cache.hookpoints:
            raise ArtifactError(
                f"{sae.name} was trained on updates of {hookpoint}; {cache.name} has {', '.join(cache.hookpoints)}. "
                f"Collect {hookpoint} too."
            )
        row = cache.row(step)
        if cache.layout.tokens_per_image is not None:
            raise ArtifactError(
                f"{cache.name} keeps {cache.layout.tokens_per_image} tokens of each image; heat maps need whole grids. "
                "Collect some images again without tokens_per_image."
            )
        made, trained = ((r["model"], r["revision"]) for r in (cache.recipe, vars(sae.site)))
        if made != trained:
            raise ArtifactError(
                f"{sae.name} was trained on {trained}, but {cache.name} was made by {made}. Use its own cache."
            )
        recipe = {"sae": sae.digest, "name": sae.name, "cache": cache.artifact.digest, "step": step, "top": top}
        artifact = Store.at(store).artifact("features", sae.name.rsplit("-", 1)[0], recipe)
        if not artifact.finished:
            with artifact.lock():
                if not artifact.finished:
                    _measure(sae, cache, hookpoint, step, row, top, artifact)
        return cls.open(artifact.folder)

    @classmethod
    def open(cls, folder: Path | str) -> FeatureStats:
        """Read what `measure` made.

        Raises:
            ArtifactError: no finished feature statistics there.
        """
        artifact = Artifact.open(folder, "features")
        with h5py.File(artifact.check(_FILE), "r") as file:
            arrays = {name: file[name][()] for name in _PER_LATENT}
            a = file.attrs
            grid = (int(a["height"]), int(a["width"]))
            return cls(
                artifact,
                str(a["sae"]),
                str(a["hookpoint"]),
                grid,
                int(a["step"]),
                int(a["n_images"]),
                int(a["n_tokens"]),
                **arrays,
            )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.density)

    @property
    def alive(self) -> Int[np.ndarray, "alive"]:
        """The latents that fired at least once."""
        return np.flatnonzero(self.density > 0)

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt of every image."""
        with h5py.File(self.artifact.file(_FILE), "r") as file:
            return Prompts.from_jsonl(bytes(file["prompts"][()].tobytes()).decode())

    def examples(self, feature: int, by: Ranking = "max", n: int | None = None) -> list[Example]:
        """The images on which a latent fires most, strongest first; fewer than asked for when it fires on fewer.

        Raises:
            KitError: there is no such latent, or no such ranking.
        """
        self._check(feature)
        if by not in ("max", "mean"):
            raise KitError(f"examples: by is 'max' or 'mean', not {by!r}.")
        images, values, maps = (array[feature][:n] for array in self._top[by])
        fires = values > FIRES
        thumbnails = self._thumbnails(images[fires])
        return [
            Example(
                image,
                self.prompts.texts[image],
                self.prompts.seeds[image],
                value,
                heat_map.astype(np.float32),
                thumbnail,
            )
            for image, value, heat_map, thumbnail in zip(
                images[fires].tolist(), values[fires].tolist(), maps[fires], thumbnails, strict=True
            )
        ]

    @cached_property
    def _top(self) -> dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        with h5py.File(self.artifact.file(_FILE), "r") as file:
            return {
                by: tuple(file[f"top/{by}/{name}"][()] for name in ("image", "value", "heat_map"))
                for by in ("max", "mean")
            }

    def _thumbnails(self, images: Int[np.ndarray, " image"]) -> list[bytes]:
        """Pictures of images in some latent's top; they are stored one after the other, in the order of their index."""
        with h5py.File(self.artifact.file(_FILE), "r") as file:
            stored, ends, data = (file[f"thumbnails/{name}"] for name in ("image", "ends", "bytes"))
            place = np.searchsorted(stored[()], images)
            bounds = np.concatenate([[0], ends[()]])
            return [data[bounds[at] : bounds[at + 1]].tobytes() for at in place]

    def heat_map(self, feature: int, image: int) -> Float[np.ndarray, "height width"]:
        """A latent's value at every token of any image of the cache."""
        self._check(feature)
        with h5py.File(self.artifact.file(_FILE), "r") as file:
            indices, values = file["codes/indices"][image], file["codes/values"][image]
        at_tokens: NDArray[Any] = np.where(indices == feature, values, 0).sum(axis=1, dtype=np.float32)
        return at_tokens.reshape(self.grid)

    def image_activations(self, by: Ranking = "max") -> Float[np.ndarray, "image latent"]:
        """Every latent's maximum (or mean) over every image."""
        return self._image_max if by == "max" else self._image_mean

    @cached_property
    def _image_max(self) -> Float[np.ndarray, "image latent"]:
        return np.concatenate([codes.max(axis=1) for codes in self._dense_codes()])

    @cached_property
    def _image_mean(self) -> Float[np.ndarray, "image latent"]:
        return np.concatenate([codes.mean(axis=1) for codes in self._dense_codes()])

    def _dense_codes(self) -> Iterator[Float[np.ndarray, "image token latent"]]:
        with h5py.File(self.artifact.file(_FILE), "r") as file:
            for start in range(0, self.n_images, _CHUNK):
                indices, values = (file[f"codes/{name}"][start : start + _CHUNK] for name in ("indices", "values"))
                dense = np.zeros((*indices.shape[:2], self.d_sae + 1), np.float32)  # one more for what pads short codes
                np.put_along_axis(dense, np.where(values > 0, indices.astype(np.int64), self.d_sae), values, axis=2)
                yield dense[..., :-1]

    def _check(self, feature: int) -> None:
        if not isinstance(feature, Integral) or not 0 <= feature < self.d_sae:
            raise KitError(f"{self.sae} has latents 0 to {self.d_sae - 1}; there is no {feature!r}.")

    def __repr__(self) -> str:
        return (
            f"FeatureStats of {self.sae}: {len(self.alive)} of {self.d_sae} latents fire, "
            f"over {self.n_tokens:,} tokens of {self.n_images:,} images"
        )


@torch.no_grad()
def _measure(
    sae: SAE, cache: ActivationCache, hookpoint: str, step: int, row: int, top: int, artifact: Artifact
) -> None:
    tokens = int(np.prod(cache.grid(hookpoint)))
    moments, leaders = (
        _Moments(sae.d_sae),
        {by: _Leaders(sae.d_sae, min(top, cache.n_images), tokens) for by in ("max", "mean")},
    )
    temporary = artifact.file(_FILE + ".tmp")
    tqdm.write(f"Measuring the {sae.d_sae} latents of {sae.name} over {cache.n_images * tokens:,} tokens.")
    with h5py.File(temporary, "w", libver=("v108", "v110")) as file:
        k = sae.k or 1  # codes without a limit widen the file as they come
        shape, chunk = (cache.n_images, tokens, k), (min(_CHUNK, cache.n_images), tokens, k)
        limit = (cache.n_images, tokens, sae.d_sae)
        compact: dict[str, Any] = {
            "chunks": chunk, "maxshape": limit, "compression": "gzip", "compression_opts": 1, "shuffle": True
        }  # fmt: skip
        stored_indices = file.create_dataset(
            "codes/indices", shape, "uint16" if sae.d_sae < 2**16 else "uint32", **compact
        )
        stored_values = file.create_dataset("codes/values", shape, "float16", **compact)
        for start in tqdm(range(0, cache.n_images, _CHUNK), desc="measure", unit="batch"):
            images = range(start, min(start + _CHUNK, cache.n_images))
            x = cache.read(hookpoint, np.array(images))[:, row].to(sae.W_enc.device, torch.float32)
            indices, values = sae.encode_sparse(x)
            for stored, part in ((stored_indices, indices.cpu()), (stored_values, values.cpu().half())):
                if part.shape[2] > stored.shape[2]:
                    stored.resize(part.shape[2], axis=2)
                stored[start : images.stop, :, : part.shape[2]] = part
            z = torch.zeros(*x.shape[:2], sae.d_sae).scatter_add(2, indices.cpu(), values.cpu())  # padding adds 0
            moments.add(z)
            leaders["max"].add(start, z.amax(dim=1), z)
            leaders["mean"].add(start, z.mean(dim=1), z)
        file.attrs.update(
            sae=sae.name, hookpoint=hookpoint, step=step, n_images=cache.n_images, n_tokens=cache.n_images * tokens
        )
        file.attrs.update(height=cache.grid(hookpoint)[0], width=cache.grid(hookpoint)[1])
        for name, array in moments.statistics().items():
            file.create_dataset(name, data=array.astype(np.float32))
        for by, best in leaders.items():
            file.create_dataset(f"top/{by}/image", data=best.images.numpy())
            file.create_dataset(f"top/{by}/value", data=best.values.numpy())
            file.create_dataset(
                f"top/{by}/heat_map",
                data=best.maps.numpy().reshape(sae.d_sae, -1, *cache.grid(hookpoint)),
                compression="gzip",
                compression_opts=1,
            )
        file.create_dataset("prompts", data=np.frombuffer(cache.prompts.to_jsonl().encode(), np.uint8))
        shown = {int(image) for best in leaders.values() for image in best.images[best.values > FIRES].unique()}
        _store_thumbnails(file, cache, sorted(shown))
    temporary.replace(artifact.file(_FILE))
    artifact.seal(facts={"alive": int((moments.count > 0).sum()), "latents": sae.d_sae})


class _Moments:
    """Sums over firing tokens, in float64."""

    def __init__(self, d_sae: int) -> None:
        self.count, self.total, self.squares, self.images, self.peak = (
            torch.zeros(d_sae, dtype=torch.float64) for _ in range(5)
        )
        self.n_tokens = self.n_images = 0

    def add(self, z: Float[Tensor, "image token latent"]) -> None:
        fires = z > FIRES
        firing = torch.where(fires, z, 0).double()
        self.count += fires.sum((0, 1))
        self.images += fires.any(dim=1).sum(0)
        self.total += firing.sum((0, 1))
        self.squares += firing.square().sum((0, 1))
        self.peak = self.peak.maximum(firing.amax((0, 1)))
        self.n_images += z.shape[0]
        self.n_tokens += z.shape[0] * z.shape[1]

    def statistics(self) -> dict[str, NDArray[Any]]:
        n = self.count.clamp_min(1)
        mean = self.total / n
        std = (self.squares / n - mean.square()).clamp_min(0).sqrt()
        by_name = {
            "density": self.count / self.n_tokens,
            "image_density": self.images / self.n_images,
            "mean": mean,
            "std": std,
            "max": self.peak,
        }
        return {name: tensor.numpy() for name, tensor in by_name.items()}


class _Leaders:
    """The images with the highest score of each latent so far, with their heat maps."""

    def __init__(self, d_sae: int, top: int, tokens: int) -> None:
        self.values = torch.zeros(d_sae, top)
        self.images = torch.zeros(d_sae, top, dtype=torch.int32)
        self.maps = torch.zeros(d_sae, top, tokens, dtype=torch.float16)

    def add(
        self, first_image: int, scores: Float[Tensor, "image latent"], z: Float[Tensor, "image token latent"]
    ) -> None:
        values = torch.cat([self.values, scores.T], dim=1)
        self.values, best = values.topk(self.values.shape[1], dim=1)
        new = torch.arange(first_image, first_image + len(scores), dtype=torch.int32).expand(values.shape[0], -1)
        self.images = torch.cat([self.images, new], dim=1).gather(1, best)
        maps = torch.cat([self.maps, z.permute(2, 0, 1).half()], dim=1)
        self.maps = maps.gather(1, best[..., None].expand(-1, -1, maps.shape[2]))


def _store_thumbnails(file: h5py.File, cache: ActivationCache, images: list[int]) -> None:
    encoded = [cache.thumbnail(image) if cache.layout.images else b"" for image in images]
    file.create_dataset("thumbnails/image", data=np.array(images, np.int64))
    file.create_dataset("thumbnails/ends", data=np.cumsum([len(data) for data in encoded], dtype=np.int64))
    file.create_dataset("thumbnails/bytes", data=np.frombuffer(b"".join(encoded), np.uint8))

"""The activation cache: the updates of many images, read from disk (how they lie there: `layout` and `shards`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdxl_sae_kit import html
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import human_bytes
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.buffers import Tokens
from sdxl_sae_kit.configs import Split
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import folder_path, hash_file
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.pictures import decode_picture, encode_picture
from sdxl_sae_kit.shards import Shard, check_complete, examine, read_manifest, read_prompts, read_recipe

_OPEN_FILES = 64


class ActivationCache(Activations):
    """Updates of n images at some hookpoints, read from a folder.

    `cache["down.2.1"]` is read like an h5py dataset of (image, row, token, d_in), and can be given to a DataLoader.

    >>> cache = ActivationCache.open("artifacts/activations/tiny-turbo_1step_500images-1a2b3c4d")  # doctest: +SKIP
    >>> cache["up.0.1"][cache.images("train")[:8], cache.row(step=0)].shape                        # doctest: +SKIP
    torch.Size([8, 64, 96])
    """

    def __init__(self, artifact: Artifact) -> None:
        layout, finished = Layout.of(artifact.recipe), artifact.finished  # asked first: it may finish meanwhile
        self.artifact = artifact
        super().__init__(artifact.name, artifact.recipe, layout, read_prompts(artifact, layout))
        self._shards = read_manifest(artifact.folder, layout)
        if finished:
            check_complete(artifact.present(), self._shards, layout)
        self._open: dict[tuple[int, str], h5py.File] = {}
        self._confirmed: set[str] = set()

    @classmethod
    def open(cls, folder: Path | str, *, unfinished: bool = False) -> ActivationCache:
        """Open the cache in this folder; with `unfinished` also one that is still being collected, as far as it is.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        artifact = Artifact(folder_path(folder))
        if unfinished and not artifact.finished:
            return cls(Artifact(artifact.folder, read_recipe(artifact)))
        return cls(Artifact.open(folder, "activations"))

    @property
    def digest(self) -> str:
        """What the recipes of SAEs name as their input (sha256).

        Raises:
            ArtifactError: the cache is unfinished, and so has none.
        """
        return self.artifact.digest

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.artifact.nbytes

    @cached_property
    def present(self) -> Int[np.ndarray, "image"]:
        """Indices of the images that are there: all of them, unless the cache is unfinished."""
        return np.concatenate([np.arange(0), *(np.arange(shard.first_image, shard.stop) for shard in self._shards)])

    def images(self, split: Split = "all") -> Int[np.ndarray, "image"]:
        """Indices of the images of a split that are there; the split goes by prompt, so no text is on both sides.

        Raises:
            KitError: no such split.
        """
        return np.intersect1d(super().images(split), self.present, assume_unique=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.hookpoints)

    def __getitem__(self, hookpoint: str) -> Updates:
        """The updates of a hookpoint, to be sliced.

        Raises:
            HookpointError: it does not hold this hookpoint.
        """
        self.grid(hookpoint)
        return Updates(self, hookpoint)

    def read(
        self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]
    ) -> Float[Tensor, "image row token d_in"]:
        """Updates of some images, in the dtype they are stored in; rows go step by step, uncond before cond.

        Raises:
            HookpointError: it does not hold this hookpoint.
            ArtifactError: an image is not there, or its shard is damaged.
        """
        rows, tokens, d_in = self.rows_per_image, self.tokens_per_row(hookpoint), self.d_in(hookpoint)
        runs = list(self._runs(np.asarray(images)))
        for _, _, shard in runs:
            self._file(shard)  # checked before memory is taken for what it claims
        out = np.empty((len(images), rows, tokens, d_in), self.layout.stored_dtype)
        for start, stop, shard in runs:
            first = int(images[start]) - shard.first_image
            place = out[start:stop].reshape(-1, tokens, d_in)
            with self._explained(shard):
                dataset = self._file(shard)[f"updates/{hookpoint}"]
                dataset.read_direct(place, np.s_[first * rows : (first + stop - start) * rows])
                self._confirm(shard, place)
        return self.layout.tensor(out)

    def positions(self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]) -> Int[np.ndarray, "image token"]:
        """Which tokens of the grid `read` gives, as y · width + x: all in order, or those that were sampled.

        Raises:
            HookpointError: it does not hold this hookpoint.
            ArtifactError: an image is not there.
        """
        n_tokens = self.tokens_per_row(hookpoint)
        self._check_present(np.asarray(images))
        kept = [self.layout.positions(hookpoint, int(image)) for image in images]
        return np.array(kept, np.int32).reshape(len(images), n_tokens)

    def _blocks(
        self, hookpoints: Sequence[str], split: Split, rng: np.random.Generator, block: int
    ) -> Iterator[Tokens]:
        """All tokens of a split, in blocks of strips that were drawn from up to 64 shards at a time.

        A strip is what lies in one chunk on disk: it is read through HDF5, which compares its checksum, at once.
        """
        chosen = self.images(split)
        bounds = [np.searchsorted(chosen, (shard.first_image, shard.stop)) for shard in self._shards]
        strip, order = self.layout.strip(hookpoints[0]), rng.permutation(len(self._shards))
        strips_per_row = -(-self.tokens_per_row(hookpoints[0]) // strip)
        for window in (order[i : i + _OPEN_FILES] for i in range(0, len(order), _OPEN_FILES)):
            for number in window.tolist():
                self._file(self._shards[number])  # checked before memory is taken for what it claims
            places = np.concatenate(
                [self._strips(chosen[slice(*bounds[i])], i, strips_per_row) for i in window.tolist()]
            )
            places = rng.permutation(places)
            for start in range(0, len(places), max(1, block // strip)):
                part = places[start : start + max(1, block // strip)]
                part = part[np.lexsort(part.T[::-1])]  # neighbours on disk together: the buffer mixes them anyway
                yield {hookpoint: self._read_strips(hookpoint, part, strip) for hookpoint in hookpoints}

    def _strips(self, images: NDArray[np.integer], shard: int, strips_per_row: int) -> Int[np.ndarray, "strip 3"]:
        """Shard, row in it and number of every strip of these images."""
        first = self._shards[shard].first_image
        rows = (images[:, None] - first) * self.rows_per_image + np.arange(self.rows_per_image)
        shape = np.meshgrid(rows.ravel(), np.arange(strips_per_row), indexing="ij")
        return np.stack([np.full(shape[0].size, shard), *(axis.ravel() for axis in shape)], axis=1).astype(np.int64)

    def _read_strips(
        self, hookpoint: str, places: Int[np.ndarray, "strip 3"], strip: int
    ) -> Float[Tensor, "token d_in"]:
        """The tokens of strips that are sorted by shard; single h5py calls, as its slicing costs ten times more."""
        tokens, d_in = self.tokens_per_row(hookpoint), self.d_in(hookpoint)
        lengths = np.minimum(strip, tokens - places[:, 2] * strip)
        ends = np.cumsum(lengths)
        out = np.empty((int(ends[-1]), d_in), self.layout.stored_dtype)
        by_shard = np.split(np.arange(len(places)), np.flatnonzero(np.diff(places[:, 0])) + 1)
        for part in by_shard:
            shard = self._shards[places[part[0], 0]]
            with self._explained(shard):
                dataset = h5py.h5d.open(self._file(shard).id, f"updates/{hookpoint}".encode())
                space = dataset.get_space()
                for (_, row, number), length, end in zip(
                    places[part].tolist(), lengths[part].tolist(), ends[part].tolist(), strict=True
                ):
                    space.select_hyperslab((row, number * strip, 0), (1, length, d_in))
                    dataset.read(h5py.h5s.create_simple((1, length, d_in)), space, out[end - length : end][None])
                self._confirm(shard, out[ends[part[0]] - lengths[part[0]] : ends[part[-1]]])
        return self.layout.tensor(out)

    def image(self, image: int) -> Image.Image:
        """The picture, as large as it was kept.

        Raises:
            ArtifactError: the cache was collected without images, this one is not there, or the picture is damaged.
        """
        (data,) = self._pictures(np.array([image]))
        with self._explained(self._shard(image)):
            return decode_picture(data)

    def thumbnail(self, image: int) -> bytes:
        """The picture as WebP, at most 160 pixels wide and high.

        Raises:
            ArtifactError: as for `image`.
        """
        return self.thumbnails(np.array([image]))[0]

    def thumbnails(self, images: Sequence[int] | NDArray[np.integer]) -> list[bytes]:
        """The pictures of some images as for `thumbnail`; those of neighbours on disk are read together.

        Raises:
            ArtifactError: as for `image`.
        """
        pictures = self._pictures(np.asarray(images))
        if self.layout.images == "thumbnails":
            return list(pictures)
        return [encode_picture(decode_picture(data), "thumbnails") for data in pictures]

    def _pictures(self, images: NDArray[np.integer]) -> Iterator[bytes]:
        if self.layout.images is None:
            raise ArtifactError(
                f"{self.name} was collected without images. Collect again with images='thumbnails' to see them."
            )
        for start, stop, shard in self._runs(images):
            first = int(images[start]) - shard.first_image
            with self._explained(shard):
                group = self._file(shard)["images"]
                ends = np.concatenate([[0], group["ends"][()]])
                if np.any(np.diff(ends) <= 0) or ends[-1] != len(group["bytes"]):
                    raise ValueError("its pictures do not end where it says")
                bounds = ends[first : first + stop - start + 1]
                data = group["bytes"][bounds[0] : bounds[-1]].tobytes()
                self._confirm(shard, np.array([[bytes(64) not in data]]))
                found = [data[a:b] for a, b in pairwise((bounds - bounds[0]).tolist())]
            yield from found

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ArtifactError: naming each file that is missing, changed or foreign, and the images it affects.
        """
        verify(Artifact(self.artifact.folder))

    def _shard(self, image: int) -> Shard:
        ((_, _, shard),) = self._runs(np.array([image]))
        return shard

    def _check_present(self, images: NDArray[np.integer]) -> None:
        if len(lost := np.setdiff1d(images, self.present)):
            raise ArtifactError(
                f"{self.name} has no image {lost[0]}; it has {len(self.present)} of {self.n_images:,}, counted from 0. "
                "Take one of these."
            )

    def _runs(self, images: NDArray[np.integer]) -> Iterator[tuple[int, int, Shard]]:
        """Stretches (start, stop, shard) of `images` that are consecutive on disk within one shard."""
        self._check_present(images)
        starts = [shard.first_image for shard in self._shards]
        number = np.searchsorted(starts, images, side="right") - 1
        breaks = np.flatnonzero((np.diff(images) != 1) | (np.diff(number) != 0)) + 1
        edges = [0, *breaks.tolist(), len(images)]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            if start < stop:
                yield start, stop, self._shards[number[start]]

    def _confirm(self, shard: Shard, tokens: NDArray[Any]) -> None:
        """Hash a shard where a token (…, d_in) begins with zeros: Fletcher-32 does not notice a chunk lost whole."""
        if not tokens[..., :4].any(axis=-1).all() and shard.file not in self._confirmed:
            if hash_file(self.artifact.file(shard.file)) != shard.sha256:
                raise ArtifactError(
                    f"{shard.file} of {self.name} has changed since it was written. {self.artifact.remedy}"
                )
            self._confirmed.add(shard.file)

    def _file(self, shard: Shard) -> h5py.File:
        key = (os.getpid(), shard.file)  # a handle must not cross a fork
        if key not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[key] = self.layout.open(self.artifact.file(shard.file), shard.first_image, shard.images)
        return self._open[key]

    @contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        """Say of a file that cannot be read what to do."""
        try:
            yield
        except ArtifactError:
            raise
        except Exception as cause:  # a damaged file makes h5py raise whatever it trips over
            raise ArtifactError(
                f"{shard.file} of {self.name} cannot be read ({cause}). {self.artifact.remedy}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __repr__(self) -> str:
        return "\n".join([f"ActivationCache {self.name}", *(f"  {key}: {value}" for key, value in self._facts())])

    def _facts(self) -> list[tuple[str, str]]:
        r = self.recipe
        kept = f", {self.layout.tokens_per_image} tokens of each kept" if self.layout.tokens_per_image else ""
        shapes = ", ".join(f"{h} {height}×{width}×{d}" for h, (height, width, d) in self.layout.hookpoints.items())
        steps = ", ".join(map(str, self.layout.steps))
        rows = f"{len(self.present) * self.rows_per_image:,}, of denoising step {steps} in {r['num_inference_steps']}"
        progress = "finished" if self.artifact.finished else f"unfinished, {len(self.present):,} images so far"
        return [
            ("images", f"{self.n_images:,} of {r['model']}, {progress}"),
            ("rows", f"{rows}, {' and '.join(self.layout.halves)}, guidance {r['guidance_scale']:g}"),
            ("updates", f"{shapes} ({self.layout.dtype}){kept}"),
            ("on disk", f"{human_bytes(self.nbytes)} in {self.artifact.folder}"),
            ("held out by prompt", f"{len(self.images('held_out')):,} images"),
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        facts = html.table(
            [{"fact": key, "value": value} for key, value in self._facts()], f"Activation cache {self.name}"
        )
        recipe = html.table([{"setting": key, "value": value} for key, value in self.recipe.items()], "Recipe")
        prompts = html.table(self.prompts.rows(5), f"The first of {self.n_images:,} prompts")
        return html.fragment(facts + html.folded("Recipe", recipe) + html.folded("Prompts", prompts))


class Updates:
    """The updates of one hookpoint as something to slice: (image, row, token, d_in), read when asked for.

    Images are chosen first, by number, slice or list of numbers; what follows indexes the tensor of what was read.

    >>> cache["mid.0"][10:20, 0].shape                                     # doctest: +SKIP
    torch.Size([10, 64, 96])
    """

    def __init__(self, cache: ActivationCache, hookpoint: str) -> None:
        self.cache, self.hookpoint = cache, hookpoint

    def __repr__(self) -> str:
        return f"Updates of {self.hookpoint}, {self.shape} of {self.cache.layout.dtype}, in {self.cache.name}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, rows of each, tokens of each, d_in."""
        cache, hookpoint = self.cache, self.hookpoint
        return cache.n_images, cache.rows_per_image, cache.tokens_per_row(hookpoint), cache.d_in(hookpoint)

    @property
    def dtype(self) -> torch.dtype:
        """What the numbers are stored as."""
        stored: torch.dtype = getattr(torch, self.cache.layout.dtype)
        return stored

    def __len__(self) -> int:
        return self.cache.n_images

    def __getitem__(self, key: Any) -> Tensor:
        """Images by number, slice or list, then whatever indexes the tensor of what was read."""
        images, *rest = key if isinstance(key, tuple) else (key,)
        if images is ...:
            images, rest = slice(None), [..., *rest]
        chosen = np.arange(len(self))[images]
        read = self.cache.read(self.hookpoint, np.atleast_1d(chosen))
        return read[(slice(None), *rest)] if np.ndim(chosen) else read[0][tuple(rest)]


def verify(artifact: Artifact) -> None:
    """Hash every file of a cache again.

    Raises:
        ArtifactError: naming each file that is missing, changed or foreign, and the images it affects.
    """
    if faults := examine(artifact).faults:
        told = "; ".join(map(str, faults))
        raise ArtifactError(f"The cache in {artifact.folder} is not as it was written: {told}. {artifact.remedy}")

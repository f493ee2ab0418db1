"""The activation cache: the updates of many images, read from disk (how they lie there: `shards`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sdxl_sae_kit.artifacts import Artifact, human_bytes
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError, did_you_mean
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.shards import PROMPTS, check_complete, read_manifest, stored_dtype

Split = Literal["train", "held_out", "all"]

_SHUFFLE_BYTES = 256 * 2**20
_OPEN_FILES = 64


class ActivationCache:
    """Updates of n images at some hookpoints, read from a finished folder.

    A row is one image at one denoising step in one guidance half; it holds one update: `height × width` tokens of
    `d_in` numbers.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.name = artifact.present(), artifact.name
        self._shards = read_manifest(artifact.folder)
        check_complete(artifact, self._shards, self.prompts)
        self._open: dict[tuple[int, str], h5py.File] = {}

    @classmethod
    def open(cls, folder: Path | str) -> ActivationCache:
        """Open the cache in this folder.

        Raises:
            ArtifactError: no finished cache there, or its manifest is damaged.
        """
        return cls(Artifact.open(folder, "activations"))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it was collected from: model, revision, steps, guidance, size, hookpoints, dtype."""
        return self.artifact.recipe

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Names of the hookpoints it holds."""
        return tuple(self.recipe["hookpoints"])

    def grid(self, hookpoint: str) -> tuple[int, int]:
        """Height and width of an update."""
        height, width, _ = self._shape(hookpoint)
        return height, width

    def d_in(self, hookpoint: str) -> int:
        """Width of a token."""
        return self._shape(hookpoint)[2]

    def _shape(self, hookpoint: str) -> tuple[int, int, int]:
        shapes = self.recipe["hookpoints"]
        if hookpoint not in shapes:
            raise HookpointError(
                f"{self.name} has no updates of {hookpoint!r}; it has {', '.join(shapes)}. Collect it too, or take one "
                f"of these.{did_you_mean(hookpoint, shapes)}"
            )
        height, width, d_in = shapes[hookpoint]
        return height, width, d_in

    @property
    def n_images(self) -> int:
        """How many images."""
        return len(self.prompts)

    @property
    def rows_per_image(self) -> int:
        """Denoising steps × guidance halves."""
        steps: int = self.recipe["num_inference_steps"]
        return steps * len(self.recipe["halves"])

    def n_tokens(self, hookpoint: str, split: Split = "all") -> int:
        """How many tokens of a hookpoint a split holds."""
        height, width = self.grid(hookpoint)
        return len(self.images(split)) * self.rows_per_image * height * width

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.artifact.nbytes

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt of every image."""
        return Prompts.from_jsonl(self.artifact.read_text(PROMPTS))

    def images(self, split: Split = "all") -> Int[np.ndarray, "image"]:
        """Indices of the images of a split; the split goes by prompt, so no text is on both sides."""
        held_out = self.prompts.held_out
        chosen = {"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}
        if split not in chosen:
            raise KitError(f"No split {split!r}; there are {', '.join(chosen)}.{did_you_mean(str(split), chosen)}")
        return np.flatnonzero(chosen[split])

    def read(
        self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]
    ) -> Float[Tensor, "image row token d_in"]:
        """Updates of some images, in the dtype they are stored in; rows go step by step, uncond before cond."""
        height, width, d_in = self._shape(hookpoint)
        rows = self.rows_per_image
        out = np.empty((len(images), rows, height * width, d_in), stored_dtype(self.recipe))
        for start, stop, run in _runs(np.asarray(images), self._starts):
            shard = self._shards[run]
            first = int(images[start]) - shard["first_image"]
            dataset = self._file(shard["file"])[f"updates/{hookpoint}"]
            place = out[start:stop].reshape(-1, height * width, d_in)
            with self._explained(shard["file"]):
                dataset.read_direct(place, np.s_[first * rows : (first + stop - start) * rows])
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if self.recipe["dtype"] == "bfloat16" else tensor

    def batches(
        self, hookpoints: Sequence[str], batch_size: int, *, split: Split = "train", seed: int = 0, epoch: int = 0
    ) -> Iterator[dict[str, Float[Tensor, "token d_in"]]]:
        """Shuffled tokens in float32, the same positions for every hookpoint; the last batch is what remains.

        The hookpoints must share a grid. Images are read in random order into a buffer of about 256 MB whose tokens are
        mixed; nothing is dropped or repeated, and the order depends only on `seed` and `epoch`.
        """
        rng = np.random.default_rng([seed, epoch])
        images = rng.permutation(self.images(split))
        per_image = 2 * self.rows_per_image * sum(int(np.prod(self._shape(h))) for h in hookpoints)
        left = {h: torch.empty(0, self.d_in(h)) for h in hookpoints}
        for chunk in np.array_split(images, max(1, -(-len(images) * per_image // _SHUFFLE_BYTES))):
            chunk.sort()  # neighbours on disk are read together; the permutation below undoes the order
            tokens = {h: self.read(h, chunk).flatten(0, 2) for h in hookpoints}
            order = torch.from_numpy(rng.permutation(len(tokens[hookpoints[0]])))
            for part in order.split(batch_size):
                left = {h: torch.cat([left[h], tokens[h][part].float()]) for h in hookpoints}
                if len(left[hookpoints[0]]) >= batch_size:
                    yield {h: t[:batch_size] for h, t in left.items()}
                    left = {h: t[batch_size:] for h, t in left.items()}
        if len(left[hookpoints[0]]):
            yield left

    def sample(self, hookpoint: str, n: int, *, seed: int = 0) -> Float[Tensor, "token d_in"]:
        """About n training tokens (at most all of them) drawn from images all over the cache, in float32."""
        rng = np.random.default_rng(seed)
        images = self.images("train")
        images = np.sort(rng.permutation(images)[: max(1, min(len(images), n))])
        per_image = -(-n // len(images))
        chosen = []
        for part in np.array_split(images, max(1, len(images) // 256)):
            tokens = self.read(hookpoint, part).flatten(1, 2)
            picks = torch.from_numpy(rng.random(tokens.shape[:2])).argsort(1)[:, :per_image]
            chosen.append(tokens.gather(1, picks[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1).float())
        return torch.cat(chosen)[:n]

    def thumbnail(self, image: int) -> bytes:
        """The image, small, as WebP.

        Raises:
            ArtifactError: the cache was collected without images.
        """
        if not self.recipe["thumbnails"]:
            raise ArtifactError(
                f"{self.name} was collected without images. Collect again with thumbnails=True to see them."
            )
        shard = self._shards[int(np.searchsorted(self._starts, image, side="right")) - 1]
        group = self._file(shard["file"])["thumbnails"]
        row = image - shard["first_image"]
        start, stop = (int(group["ends"][row - 1]) if row else 0), int(group["ends"][row])
        return bytes(group["bytes"][start:stop].tobytes())

    @cached_property
    def _starts(self) -> Int[np.ndarray, "shard"]:
        return np.array([shard["first_image"] for shard in self._shards])

    def _file(self, name: str) -> h5py.File:
        key = (os.getpid(), name)  # a handle must not cross a fork
        if key not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            with self._explained(name):
                self._open[key] = h5py.File(self.artifact.file(name), "r")
        return self._open[key]

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Say of a file that cannot be read what to do."""
        try:
            yield
        except OSError as cause:
            raise ArtifactError(
                f"{name} of {self.name} cannot be read ({cause}). Delete its folder and collect again."
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __repr__(self) -> str:
        r = self.recipe
        shapes = ", ".join(f"{h} {height}×{width}×{d}" for h, (height, width, d) in r["hookpoints"].items())
        return (
            f"ActivationCache {self.name}: {self.n_images} images of {r['model']}, "
            f"{r['num_inference_steps']} step(s), guidance {r['guidance_scale']:g}\n"
            f"  updates: {shapes} ({r['dtype']}), {human_bytes(self.nbytes)} in {self.artifact.folder}\n"
            f"  held out by prompt: {len(self.images('held_out'))} images"
        )


def _runs(images: NDArray[np.integer], starts: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Stretches (start, stop, shard) of `images` that are consecutive on disk within one shard."""
    shard = np.searchsorted(starts, images, side="right") - 1
    breaks = np.flatnonzero((np.diff(images) != 1) | (np.diff(shard) != 0)) + 1
    edges = [0, *breaks.tolist(), len(images)]
    yield from ((a, b, int(shard[a])) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b)

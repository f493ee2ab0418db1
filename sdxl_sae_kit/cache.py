"""The activation cache: the updates of many images on disk, in HDF5 shards that only count once a manifest lists them.

Think of a ledger: a shard is written in full, closed and made durable, and only then does one line in `manifest.jsonl`
enter it. What no line names does not exist, so a writer may be killed at any moment and goes on at the next image. The
format is described in `artifacts/README.md`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdxl_sae_kit.artifacts import (
    Artifact,
    canonical_json,
    hash_file,
    human_bytes,
    sha256,
    sync_folder,
    write_atomically,
)
from sdxl_sae_kit.errors import ArtifactError, HookpointError, did_you_mean
from sdxl_sae_kit.prompts import Prompts

Split = Literal["train", "held_out", "all"]

_MANIFEST, _PROMPTS, _VIRTUAL = "manifest.jsonl", "prompts.jsonl", "all.h5"
_LIBVER = ("v108", "v110")  # readable by every HDF5 tool since 1.10
_SHUFFLE_BYTES = 256 * 2**20
_OPEN_FILES = 64


class ActivationCache:
    """Updates of n images at some hookpoints, read from a finished folder.

    A row is one image at one denoising step in one guidance half; it holds one update: `height × width` tokens of
    `d_in` numbers.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.name = artifact, artifact.name
        self._shards = read_manifest(artifact.folder)
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
                f"{self.name} has no updates of {hookpoint!r}; it has {', '.join(shapes)}."
                f"{did_you_mean(hookpoint, shapes)}"
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
        return Prompts.from_jsonl(self.artifact.file(_PROMPTS).read_text(encoding="utf-8"))

    def images(self, split: Split = "all") -> Int[np.ndarray, "image"]:
        """Indices of the images of a split; the split goes by prompt, so no text is on both sides."""
        held_out = self.prompts.held_out
        chosen = {"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}[split]
        return np.flatnonzero(chosen)

    def read(
        self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]
    ) -> Float[Tensor, "image row token d_in"]:
        """Updates of some images, in the dtype they are stored in; rows go step by step, uncond before cond."""
        height, width, d_in = self._shape(hookpoint)
        rows = self.rows_per_image
        out = np.empty(
            (len(images), rows, height * width, d_in),
            np.uint16 if self.recipe["dtype"] == "bfloat16" else self.recipe["dtype"],
        )
        for start, stop, run in _runs(np.asarray(images), self._starts):
            shard = self._shards[run]
            first = int(images[start]) - shard["first_image"]
            dataset = self._file(shard["file"])[f"updates/{hookpoint}"]
            dataset.read_direct(
                out[start:stop].reshape(-1, height * width, d_in), np.s_[first * rows : (first + stop - start) * rows]
            )
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
            if not self.artifact.file(name).is_file():
                raise ArtifactError(f"{self.name} has lost {name}. Delete its folder and collect again.")
            self._open[key] = h5py.File(self.artifact.file(name), "r")
        return self._open[key]

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


class CacheWriter:
    """Appends batches of images to a cache folder; hold the artifact's lock while using it.

    Opening it on a half-made cache cuts a torn last manifest line, deletes shards no line names, and continues at
    `next_image`.
    """

    def __init__(self, artifact: Artifact, prompts: Prompts, images_per_shard: int) -> None:
        self.artifact, self.images_per_shard = artifact, images_per_shard
        _tidy(artifact.folder)
        self._shards = read_manifest(artifact.folder)
        self.next_image = sum(shard["images"] for shard in self._shards)
        self._pending: list[tuple[dict[str, NDArray[Any]], Sequence[Image.Image]]] = []
        write_atomically(artifact.file(_PROMPTS), prompts.to_jsonl().encode())

    def append(self, updates: Mapping[str, NDArray[Any]], images: Sequence[Image.Image]) -> None:
        """Add a batch, per hookpoint an array (image, row, token, d_in), and its pictures (or none).

        It is written once a shard is full.
        """
        self._pending.append((dict(updates), images))
        if sum(_count(updates) for updates, _ in self._pending) >= self.images_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard, make it durable, and enter it in the manifest."""
        if not self._pending:
            return
        name = f"shard-{len(self._shards):05d}.h5"
        path = self.artifact.file(name)
        temporary = path.with_name(name + ".tmp")
        n = self._write_shard(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
        entry = {"file": name, "first_image": self.next_image, "images": n, "sha256": hash_file(path)}
        with open(self.artifact.file(_MANIFEST), "ab") as handle:
            handle.write((canonical_json(entry | {"line": _line_hash(entry)}) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        self._shards.append(entry)
        self.next_image += n
        self._pending = []

    def _write_shard(self, path: Path) -> int:
        hookpoints = self.artifact.recipe["hookpoints"]
        with h5py.File(path, "w", libver=_LIBVER) as file:
            file.attrs.update(format="activations", recipe=sha256(canonical_json(self.artifact.recipe).encode()))
            for hookpoint in hookpoints:
                data = np.concatenate([updates[hookpoint] for updates, _ in self._pending])
                rows = data.reshape(-1, *data.shape[2:])
                dataset = file.create_dataset(
                    f"updates/{hookpoint}", data=rows, chunks=(1, *rows.shape[1:]), fletcher32=True
                )
                dataset.attrs["logical_dtype"] = self.artifact.recipe["dtype"]
            n = len(data)
            halves = len(self.artifact.recipe["halves"])
            steps = data.shape[1] // halves
            columns = {
                "rows/image": np.repeat(np.arange(self.next_image, self.next_image + n), data.shape[1]),
                "rows/step": np.tile(np.repeat(np.arange(steps, dtype=np.int16), halves), n),
                "rows/half": np.tile(np.arange(halves, dtype=np.int8), n * steps),
            }
            if self.artifact.recipe["thumbnails"]:
                encoded = [encode_thumbnail(image) for _, images in self._pending for image in images]
                columns["thumbnails/bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
                columns["thumbnails/ends"] = np.cumsum([len(e) for e in encoded])
            for name, column in columns.items():
                file.create_dataset(name, data=column)  # file[name] = … would store the time and end bit-identity
        return n

    def finish(self) -> ActivationCache:
        """Write the last shard and `all.h5`, seal the artifact, and open it."""
        self.flush()
        _write_virtual(self.artifact, self._shards)
        known = {shard["file"]: shard["sha256"] for shard in self._shards}
        return ActivationCache(self.artifact.seal(known=known, facts={"images": self.next_image}))


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The shards a manifest lists, in order; a torn last line is not counted.

    Raises:
        ArtifactError: a line was edited, or the shards do not follow each other.
    """
    path = folder / _MANIFEST
    if not path.exists():
        return []
    shards: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            stated = entry.pop("line")
        except (ValueError, KeyError, AttributeError, TypeError):
            stated, entry = None, {}
        follows = sum(s["images"] for s in shards) == entry.get("first_image")
        if stated != _line_hash(entry) or not follows or entry["file"] != f"shard-{len(shards):05d}.h5":
            raise ArtifactError(
                f"Line {number} of {path} was changed after it was written. Delete the folder and collect again."
            )
        shards.append(entry)
    return shards


def encode_thumbnail(image: Image.Image, side: int = 160) -> bytes:
    """WebP of a picture, at most `side` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90, method=2)
    return buffer.getvalue()


def _tidy(folder: Path) -> None:
    manifest = folder / _MANIFEST
    if manifest.exists():
        whole = manifest.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        write_atomically(manifest, whole)
    listed = {shard["file"] for shard in read_manifest(folder)}
    for path in folder.glob("shard-*"):
        if path.name not in listed:
            path.unlink()


def _write_virtual(artifact: Artifact, shards: Sequence[Mapping[str, Any]]) -> None:
    """One file in which any HDF5 tool sees all shards as whole datasets."""
    r = artifact.recipe
    rows_per_image = r["num_inference_steps"] * len(r["halves"])
    total = sum(shard["images"] for shard in shards) * rows_per_image
    dtype = np.dtype("uint16" if r["dtype"] == "bfloat16" else r["dtype"])
    wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        f"updates/{h}": ((height * width, d_in), dtype) for h, (height, width, d_in) in r["hookpoints"].items()
    }
    wanted |= {
        "rows/image": ((), np.dtype(np.int64)),
        "rows/step": ((), np.dtype(np.int16)),
        "rows/half": ((), np.dtype(np.int8)),
    }
    temporary = artifact.file(_VIRTUAL + ".tmp")
    with h5py.File(temporary, "w", libver=_LIBVER) as file:
        for name, (shape, kind) in wanted.items():
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            # h5py's own create_virtual_dataset stores the time and ends bit-identity
            settings.set_obj_track_times(False)
            for shard in shards:
                start, rows = shard["first_image"] * rows_per_image, shard["images"] * rows_per_image
                place, source = h5py.h5s.create_simple((total, *shape)), h5py.h5s.create_simple((rows, *shape))
                place.select_hyperslab((start, *[0] * len(shape)), (rows, *shape))
                settings.set_virtual(place, shard["file"].encode(), name.encode(), source)
            group, _, leaf = name.partition("/")
            space = h5py.h5s.create_simple((total, *shape))
            h5py.h5d.create(file.require_group(group).id, leaf.encode(), h5py.h5t.py_create(kind), space, settings)
    temporary.replace(artifact.file(_VIRTUAL))


def _runs(images: NDArray[np.integer], starts: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Stretches (start, stop, shard) of `images` that are consecutive on disk within one shard."""
    shard = np.searchsorted(starts, images, side="right") - 1
    breaks = np.flatnonzero((np.diff(images) != 1) | (np.diff(shard) != 0)) + 1
    edges = [0, *breaks.tolist(), len(images)]
    yield from ((a, b, int(shard[a])) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b)


def _count(updates: Mapping[str, NDArray[Any]]) -> int:
    return len(next(iter(updates.values())))


def _line_hash(entry: Mapping[str, Any]) -> str:
    return sha256(canonical_json(entry).encode())[:16]

"""What is in one shard of an activation cache: written here, and refused here where a file holds anything else.

A cache may come from a stranger. HDF5 follows links into other files, calls plugins, and lets a few kilobytes claim
terabytes, so a shard is opened only as what the recipe says it must be: chunked datasets of exactly these names, shapes
and dtypes, checksummed, with all their bytes present. The format is described in `artifacts/README.md`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import canonical_json, sha256
from sdxl_sae_kit.pictures import IMAGES, encode_picture

LIBVER = ("v108", "v110")  # readable by every HDF5 tool since 1.10
_STRIP_BYTES = 80 * 2**10  # 32 tokens of SDXL: small enough to mix images well, large enough to read fast
_PICTURE_CHUNK = 2**14
_COUNTS = ("n_images", "num_inference_steps", "height", "width", "batch_size", "images_per_shard")
_TEXTS = ("model", "revision", "scheduler", "prompts", "compute_dtype")
_HOOKPOINT = re.compile(r"[A-Za-z0-9_.]+")


Batch = tuple[Mapping[str, NDArray[Any]], Sequence[Image.Image]]
"""Of some images, updates per hookpoint as (image, row, token, d_in), bfloat16 as its bits; and pictures, or none."""


@dataclass(frozen=True)
class Field:
    """One dataset of a shard."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def n_chunks(self) -> int:
        """How many chunks hold them."""
        return prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


@dataclass(frozen=True)
class Layout:
    """The shape of a cache, as its recipe says it.

    A row is one image at one denoising step in one guidance half; rows go image by image, then step by step.
    """

    n_images: int
    hookpoints: Mapping[str, tuple[int, int, int]]
    """Name → height and width of the grid, d_in."""
    steps: tuple[int, ...]
    halves: tuple[str, ...]
    tokens_per_image: int | None
    """How many tokens of each grid are kept; None keeps all."""
    dtype: str
    images: str | None
    images_per_shard: int
    recipe_hash: str

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Layout:
        """The layout that a recipe describes.

        Raises:
            ArtifactError: the recipe is not one that `collect` writes.
        """
        r = dict(recipe)
        good = {
            "hookpoints": _are_shapes(r.get("hookpoints")),
            "steps": _are_steps(r.get("steps")),
            "halves": r.get("halves") in (["cond"], ["uncond"], ["uncond", "cond"]),
            "tokens_per_image": r.get("tokens_per_image", 0) is None or _counts(r.get("tokens_per_image")),
            "dtype": r.get("dtype") in ("float16", "bfloat16", "float32"),
            "images": r.get("images", "") in (None, *IMAGES),
        }
        good |= {name: _counts(r.get(name)) for name in _COUNTS}
        good |= {name: isinstance(r.get(name), str) for name in _TEXTS}
        good["guidance_scale"] = isinstance(r.get("guidance_scale"), int | float)
        if bad := [name for name, fits in good.items() if not fits]:
            raise ArtifactError(
                f"This is no recipe of an activation cache: {', '.join(bad)} cannot be as they are. Collect again."
            )
        return cls(
            n_images=r["n_images"],
            hookpoints={name: (h, w, d) for name, (h, w, d) in r["hookpoints"].items()},
            steps=tuple(r["steps"]),
            halves=tuple(r["halves"]),
            tokens_per_image=r["tokens_per_image"],
            dtype=r["dtype"],
            images=r["images"],
            images_per_shard=r["images_per_shard"],
            recipe_hash=sha256(canonical_json(r).encode()),
        )

    @property
    def rows_per_image(self) -> int:
        """Denoising steps × guidance halves."""
        return len(self.steps) * len(self.halves)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """What numbers are in the file: HDF5 has no bfloat16, so its bits are kept as uint16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def n_tokens(self, hookpoint: str) -> int:
        """Tokens kept of one update."""
        height, width, _ = self.hookpoints[hookpoint]
        return min(height * width, self.tokens_per_image or height * width)

    def strip(self, hookpoint: str) -> int:
        """Tokens that lie together on disk and are read together: a divisor of all of them if one is near 80 kB."""
        tokens = self.n_tokens(hookpoint)
        wanted = max(1, _STRIP_BYTES // (self.hookpoints[hookpoint][2] * self.stored_dtype.itemsize))
        near = [n for n in range(-(-wanted // 2), 2 * wanted + 1) if tokens % n == 0]
        return min(near, key=lambda n: abs(n - wanted), default=min(wanted, tokens))

    def positions(self, hookpoint: str, image: int) -> NDArray[np.int32]:
        """Which tokens of an image's grid are kept: all, or some drawn at random, the same at every step and half.

        Hookpoints of one grid keep the same ones. The draw depends on the image's index and the grid alone.
        """
        height, width, _ = self.hookpoints[hookpoint]
        if self.tokens_per_image is None:
            return np.arange(height * width, dtype=np.int32)
        drawn = np.random.RandomState([image, height, width]).permutation(height * width)  # the same in every NumPy
        return np.sort(drawn[: self.tokens_per_image]).astype(np.int32)

    def keep(self, hookpoint: str, images: Iterable[int], updates: NDArray[Any]) -> NDArray[Any]:
        """Of updates (image, row, token, d_in) with all tokens of the grid, those tokens that are kept."""
        if self.tokens_per_image is None:
            return updates
        kept = np.stack([self.positions(hookpoint, image) for image in images])
        return np.take_along_axis(updates, kept[:, None, :, None], axis=2)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """What is stored, as a tensor of the dtype it means."""
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    def fields(self, n_images: int) -> dict[str, Field]:
        """Every dataset of a shard of so many images, but for the bytes of its pictures."""
        rows, fields = n_images * self.rows_per_image, {}
        for name, (height, width, d_in) in self.hookpoints.items():
            tokens = self.n_tokens(name)
            fields[f"updates/{name}"] = Field((rows, tokens, d_in), self.stored_dtype, (1, self.strip(name), d_in))
            if self.tokens_per_image is not None:
                fields[f"tokens/{height}x{width}"] = Field((n_images, tokens), np.dtype(np.int32), (n_images, tokens))
        for name, kind in (("image", np.int64), ("step", np.int16), ("half", np.int8)):
            fields[f"rows/{name}"] = Field((rows,), np.dtype(kind), (rows,))
        if self.images is not None:
            fields["images/ends"] = Field((n_images,), np.dtype(np.int64), (n_images,))
        return fields

    def nbytes(self, n_images: int) -> int:
        """Bytes on disk of the updates of so many images, with checksums and index."""
        return sum(_on_disk(field) for field in self.fields(n_images).values())

    # Writing ----------------------------------------------------------------------------------------------------------

    def encode(self, first_image: int, batches: Sequence[Batch]) -> memoryview:
        """The bytes of a shard, from batches of images: their updates (image, row, token, d_in) and their pictures."""
        n = sum(len(next(iter(updates.values()))) for updates, _ in batches)
        fields, columns = self.fields(n), self._columns(first_image, n)
        if self.images is not None:
            encoded = [encode_picture(picture, self.images) for _, pictures in batches for picture in pictures]
            columns["images/ends"] = np.cumsum([len(e) for e in encoded])
            columns["images/bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
            fields["images/bytes"] = _picture_field(len(columns["images/bytes"]))
        buffer = io.BytesIO()  # in memory first: a full disk then cannot leave a half-open HDF5 file behind
        with h5py.File(buffer, "w", libver=LIBVER) as file:
            file.attrs.update(format="activations", recipe=self.recipe_hash)
            for name, field in fields.items():
                dataset = file.create_dataset(name, field.shape, field.dtype, chunks=field.chunks, fletcher32=True)
                if name in columns:
                    dataset[...] = columns[name]
                    continue
                dataset.attrs["logical_dtype"] = self.dtype
                start = 0
                for updates, _ in batches:
                    rows = updates[name.removeprefix("updates/")].reshape(-1, *field.shape[1:])
                    dataset[start : start + len(rows)] = rows
                    start += len(rows)
        return buffer.getbuffer()

    def _columns(self, first_image: int, n: int) -> dict[str, NDArray[Any]]:
        """What tells the rows of n images apart."""
        columns: dict[str, NDArray[Any]] = {
            "rows/image": np.repeat(np.arange(first_image, first_image + n), self.rows_per_image),
            "rows/step": np.tile(np.repeat(self.steps, len(self.halves)), n),
            "rows/half": np.tile(np.arange(len(self.halves)), n * len(self.steps)),
        }
        if self.tokens_per_image is not None:
            for name, (height, width, _) in self.hookpoints.items():
                kept = [self.positions(name, image) for image in range(first_image, first_image + n)]
                columns[f"tokens/{height}x{width}"] = np.stack(kept)
        return columns

    # Reading ----------------------------------------------------------------------------------------------------------

    def open(self, path: Path, first_image: int, n_images: int) -> h5py.File:
        """The shard of so many images from this one on, opened for reading after all but its numbers was checked.

        Raises:
            ArtifactError: it cannot be read, or holds anything that `encode` does not write there.
        """
        try:
            file = h5py.File(path, "r")
        except (OSError, RuntimeError, ValueError) as cause:
            raise ArtifactError(f"{path} cannot be read ({cause}). Mend it with repair(pipe, folder).") from None
        try:
            self._check(file, n_images, path.stat().st_size)
            for name, column in self._columns(first_image, n_images).items():
                if not np.array_equal(file[name][()], column):
                    raise ValueError(f"its {name} are those of other images")
        except Exception as cause:  # a damaged file makes h5py raise whatever it trips over
            file.close()
            raise ArtifactError(
                f"{path} is not what collect writes ({cause}). Nothing was read from it. Mend it with "
                "repair(pipe, folder), or collect again."
            ) from None
        return file

    def _check(self, file: h5py.File, n_images: int, size: int) -> None:
        fields = self.fields(n_images)
        if self.images is not None:
            fields["images/bytes"] = Field((), np.dtype(np.uint8), ())
        found = dict(_datasets(file, fields))
        if missing := fields.keys() - found:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        stored = 0
        for name, dataset in found.items():
            field = fields[name] if name != "images/bytes" else _picture_field(prod(dataset.shape))
            if (dataset.shape, dataset.dtype) != (field.shape, field.dtype):
                raise ValueError(f"{name} is {dataset.shape} of {dataset.dtype}, not {field.shape} of {field.dtype}")
            settings = dataset.id.get_create_plist()
            filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
            if settings.get_layout() != h5py.h5d.CHUNKED or filters != [h5py.h5z.FILTER_FLETCHER32]:
                raise ValueError(f"{name} is stored elsewhere or by other means than checksummed chunks")
            if dataset.chunks != field.chunks:
                raise ValueError(f"{name} has chunks of {dataset.chunks}, not {field.chunks}")
            n_chunks, there = field.n_chunks, dataset.id.get_num_chunks()
            if there != n_chunks or dataset.id.get_storage_size() < field.nbytes:
                raise ValueError(f"{name} claims {n_chunks} chunks, {field.nbytes} bytes, and has {there} chunks")
            stored += dataset.id.get_storage_size()
        if stored > size:
            raise ValueError(f"it claims {stored} bytes and has {size}")
        if file.attrs["recipe"] != self.recipe_hash:
            raise ValueError("it belongs to another cache")


def _datasets(group: h5py.Group, fields: Mapping[str, Field], prefix: str = "") -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset below a group by its path, none opened before its link was seen to stay within the file."""
    for name in group:
        path = prefix + name
        kind = h5py.Dataset if path in fields else h5py.Group
        if not any(known == path or known.startswith(f"{path}/") for known in fields):
            raise ValueError(f"{path!r} does not belong there")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is a link to somewhere else")
        item = group[name]
        if not isinstance(item, kind):
            raise ValueError(f"{path} is no {kind.__name__.lower()}")
        if isinstance(item, h5py.Dataset):
            yield path, item
        else:
            yield from _datasets(item, fields, f"{path}/")


def _picture_field(n: int) -> Field:
    return Field((n,), np.dtype(np.uint8), (min(n, _PICTURE_CHUNK),))


def _on_disk(field: Field) -> int:
    """About the bytes of whole chunks, each with a checksum and a line in the index, and of what describes them."""
    return field.n_chunks * (prod(field.chunks) * field.dtype.itemsize + 20) + 3600


def _counts(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_steps(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(step, int) and step >= 0 for step in value):
        return False
    return bool(value) and value == sorted(set(value))


def _are_shapes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(_HOOKPOINT.fullmatch(name) for name in value)
        and all(isinstance(shape, list) and len(shape) == 3 and all(map(_counts, shape)) for shape in value.values())
    )

"""How an activation cache lies on disk: HDF5 shards that only count once a manifest lists them.

Think of a ledger: a shard is written in full, closed and made durable, and only then does one line in `manifest.jsonl`
enter it. What no line names does not exist, so a writer may be killed at any moment and goes on at the next image. The
format is described in `artifacts/README.md`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_sae_kit.artifacts import Artifact, canonical_json, hash_file, sha256, sync_folder, write_atomically
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.prompts import Prompts

PROMPTS = "prompts.jsonl"
_MANIFEST, _VIRTUAL = "manifest.jsonl", "all.h5"
_LIBVER = ("v108", "v110")  # readable by every HDF5 tool since 1.10
_COLUMNS = {"image": np.int64, "step": np.int16, "half": np.int8}
"""What is told of each row, and as what."""


class ShardWriter:
    """Appends batches of images to a cache folder; hold the artifact's lock while using it.

    Opening it on a half-made cache cuts a torn last manifest line, deletes shards no line names, and continues at
    `next_image`.
    """

    def __init__(self, artifact: Artifact, prompts: Prompts, images_per_shard: int) -> None:
        self.artifact, self.prompts, self.images_per_shard = artifact, prompts, images_per_shard
        _tidy(artifact.folder)
        self._shards = read_manifest(artifact.folder)
        self.next_image = sum(shard["images"] for shard in self._shards)
        self._pending: list[tuple[dict[str, NDArray[Any]], Sequence[Image.Image]]] = []
        write_atomically(artifact.file(PROMPTS), prompts.to_jsonl().encode())

    def append(self, updates: Mapping[str, NDArray[Any]], images: Sequence[Image.Image]) -> None:
        """Add a batch, per hookpoint an array (image, row, token, d_in), and its pictures (or none).

        It is written once a shard is full.
        """
        self._pending.append((dict(updates), images))
        if sum(len(next(iter(updates.values()))) for updates, _ in self._pending) >= self.images_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard, make it durable, and enter it in the manifest."""
        if not self._pending:
            return
        name = f"shard-{len(self._shards):05d}.h5"
        path = self.artifact.file(name)
        temporary = path.with_name(name + ".tmp")
        n = self._write_shard(temporary)
        _publish(temporary, path)
        entry = {"file": name, "first_image": self.next_image, "images": n, "sha256": hash_file(path)}
        with open(self.artifact.file(_MANIFEST), "ab") as handle:
            handle.write((canonical_json(entry | {"line": _line_hash(entry)}) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(path.parent)  # the manifest may be new
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
            told = {
                "image": np.repeat(np.arange(self.next_image, self.next_image + n), data.shape[1]),
                "step": np.tile(np.repeat(np.arange(steps), halves), n),
                "half": np.tile(np.arange(halves), n * steps),
            }
            columns = {f"rows/{name}": column.astype(_COLUMNS[name]) for name, column in told.items()}
            if self.artifact.recipe["thumbnails"]:
                encoded = [encode_thumbnail(image) for _, images in self._pending for image in images]
                columns["thumbnails/bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
                columns["thumbnails/ends"] = np.cumsum([len(e) for e in encoded])
            for name, column in columns.items():
                file.create_dataset(name, data=column)  # file[name] = … would store the time and end bit-identity
        return n

    def finish(self) -> Artifact:
        """Write the last shard and `all.h5`, and seal the artifact."""
        self.flush()
        check_complete(self.artifact, self._shards, self.prompts)
        _write_virtual(self.artifact, self._shards)
        known = {shard["file"]: shard["sha256"] for shard in self._shards}
        return self.artifact.seal(known=known, facts={"images": self.next_image})


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


def check_complete(artifact: Artifact, shards: Sequence[Mapping[str, Any]], prompts: Prompts) -> None:
    """Refuse a manifest that does not list every image once."""
    if (found := sum(shard["images"] for shard in shards)) != len(prompts):
        raise ArtifactError(
            f"{artifact.file(_MANIFEST)} lists {found} of {len(prompts)} images. Delete the folder and collect again."
        )


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
        content = manifest.read_bytes()
        write_atomically(manifest, content[: content.rfind(b"\n") + 1])
    listed = {shard["file"] for shard in read_manifest(folder)}
    for path in folder.glob("shard-*"):
        if path.name not in listed:
            path.unlink()


def _write_virtual(artifact: Artifact, shards: Sequence[Mapping[str, Any]]) -> None:
    """One file in which any HDF5 tool sees all shards as whole datasets."""
    r = artifact.recipe
    rows_per_image = r["num_inference_steps"] * len(r["halves"])
    total = sum(shard["images"] for shard in shards) * rows_per_image
    dtype = stored_dtype(r)
    wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        f"updates/{h}": ((height * width, d_in), dtype) for h, (height, width, d_in) in r["hookpoints"].items()
    }
    wanted |= {f"rows/{name}": ((), np.dtype(kind)) for name, kind in _COLUMNS.items()}
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
    _publish(temporary, artifact.file(_VIRTUAL))


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, so that not even a power cut takes it back."""
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def stored_dtype(recipe: Mapping[str, Any]) -> np.dtype[Any]:
    """What numbers are in the file: HDF5 has no bfloat16, so its bits are kept as uint16."""
    return np.dtype("uint16" if recipe["dtype"] == "bfloat16" else recipe["dtype"])


def _line_hash(entry: Mapping[str, Any]) -> str:
    return sha256(canonical_json(entry).encode())[:16]

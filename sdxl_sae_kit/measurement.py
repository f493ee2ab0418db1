"""The pass over a cache in which every update is encoded once: part by part, each made durable, shared by processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sdxl_sae_kit.amounts import human_bytes
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import explain_full, settle
from sdxl_sae_kit.firing import Firing, Moments, total
from sdxl_sae_kit.processes import Processes, find_processes
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.summary import is_whole, open_part, part_name, summarise

MEMORY = 2**30
"""Bytes that measuring may take unless told otherwise."""

PART_IMAGES = 512
"""Images in a part: what an interruption may cost, and what processes share."""

_ARRAYS_OF_CODES = 6  # of the size of a dense code, that encoding and counting hold at once
_BYTES_OF_AN_ENTRY = 4 + 2  # index and value, before they are compressed
_MOMENT = 10  # seconds: what takes less needs no forecast


@dataclass(frozen=True)
class MeasurementPlan:
    """What measuring an SAE's latents will take."""

    d_sae: int
    n_images: int
    n_tokens: int
    """Tokens encoded: images × rows (steps × guidance halves) × tokens of a grid."""
    nbytes: int
    """About so many bytes on disk: images × tokens × L0 × 6 before compression, which outweighs pictures and sums, and
    for each latent its heat maps."""
    memory: int
    """Bytes it may take, beside the SAE."""
    seconds: float | None = None
    """On this machine, as timed on one batch; None if not timed."""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", about {self.seconds / 60:.1f} minutes on this machine"
        return (
            f"{self.d_sae:,} latents over {self.n_tokens:,} tokens of {self.n_images:,} images: about "
            f"{human_bytes(self.nbytes)} on disk and {human_bytes(self.memory)} of memory{took}"
        )


def plan_measurement(
    d_sae: int, l0: float, n_images: int, grid: tuple[int, int], *, rows: int = 1, top: int = 12, memory: int = MEMORY
) -> MeasurementPlan:
    """Forecast what `FeatureStats.measure` takes, before there is a cache or an SAE.

    >>> print(plan_measurement(5120, 10, 100_000, (16, 16)))
    5,120 latents over 25,600,000 tokens of 100,000 images: about 1.57 GB on disk and 1.07 GB of memory
    """
    tokens = grid[0] * grid[1]
    of_latents = d_sae * (3 * top + 12) * (tokens * 2 + 8) * 0.3  # heat maps are mostly zeros
    nbytes = int(n_images * tokens * l0 * _BYTES_OF_AN_ENTRY + of_latents)
    return MeasurementPlan(d_sae, n_images, n_images * rows * tokens, nbytes, memory)


def measure(sae: SAE, cache: ActivationCache, step: int, top: int, memory: int, artifact: Artifact) -> None:
    """Complete the artifact: make the parts that are missing, each process its share, then sum them up."""
    processes = find_processes()
    if processes.count == 1 and artifact.finished:
        return
    with processes.hold(artifact, lambda: None):
        if artifact.finished:  # by others, while this one waited
            return
        parts = range(-(-cache.n_images // PART_IMAGES))
        missing = [part for part in parts if not is_whole(artifact.file(part_name(part)))]
        if processes.first:
            _announce(sae, cache, top, memory, artifact, len(parts) - len(missing))
        _make_parts(sae, cache, step, memory, artifact, missing, processes)
        processes.wait()
        if processes.first:
            summarise(sae, cache, step, top, memory, artifact, [artifact.file(part_name(part)) for part in parts])
        processes.wait()


def _announce(sae: SAE, cache: ActivationCache, top: int, memory: int, artifact: Artifact, n_done: int) -> None:
    """Say what it will cost before it starts, and refuse what does not fit."""
    l0 = float(sae.metrics.get("l0") or sae.k or sae.d_sae / 2)
    grid, rows = cache.grid(sae.hookpoint), cache.rows_per_image
    plan = plan_measurement(sae.d_sae, l0, cache.n_images, grid, rows=rows, top=top, memory=memory)
    needed = plan.nbytes * (1 - min(1, n_done * PART_IMAGES / cache.n_images))
    if (free := shutil.disk_usage(artifact.folder).free) <= needed:
        raise ArtifactError(
            f"Measuring {sae.name} takes about {human_bytes(needed)}, and {human_bytes(free)} are free in "
            f"{artifact.folder.parent}. Make room, or choose another folder with store=."
        )
    images = next(_chunks(sae, cache, range(cache.n_images), memory))
    started = time.perf_counter()
    for _ in _encode(sae, cache, images):
        pass
    seconds = (time.perf_counter() - started) * cache.n_images / len(images)
    there = f" {n_done} parts of {PART_IMAGES} images are there already." if n_done else ""
    timed = MeasurementPlan(plan.d_sae, plan.n_images, plan.n_tokens, plan.nbytes, plan.memory, seconds)
    if seconds > _MOMENT or there:
        tqdm.write(f"Measuring {sae.name}, {timed}.{there}")


def _make_parts(
    sae: SAE,
    cache: ActivationCache,
    step: int,
    memory: int,
    artifact: Artifact,
    missing: Sequence[int],
    processes: Processes,
) -> None:
    of_parts = {part: range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, cache.n_images)) for part in missing}
    n_images, n_missing = cache.n_images, sum(map(len, of_parts.values()))
    bar = tqdm(total=n_images, initial=n_images - n_missing, desc="measure", unit="image", disable=not processes.first)
    with bar:
        for part, images in of_parts.items():
            if part % processes.count != processes.index:  # by number: others' parts may appear while this one lists
                continue
            final = artifact.file(part_name(part))
            temporary = final.with_name(f"{final.name}.tmp")
            with explain_full(final), open_part(temporary, "w") as file:
                _write_part(sae, cache, cache.row(step), images, memory, file, bar)
            settle(temporary, final)


@torch.no_grad()
def _encode(
    sae: SAE, cache: ActivationCache, images: NDArray[np.integer]
) -> Iterator[tuple[Integer[np.ndarray, "image token width"], Float[np.ndarray, "image token width"]]]:
    """The codes of these images, row by row."""
    x = cache.read(sae.hookpoint, images)
    for row in range(x.shape[1]):
        indices, values = sae.encode_sparse(x[:, row].to(sae.W_enc.device, torch.float32))
        yield indices.cpu().numpy(), values.cpu().numpy()


def least_memory(sae: SAE, cache: ActivationCache) -> int:
    """Bytes that one image takes while it is encoded: dense codes of one row, and the updates of all rows."""
    tokens, rows = cache.tokens_per_row(sae.hookpoint), cache.rows_per_image
    return tokens * (sae.d_sae * 4 * _ARRAYS_OF_CODES + rows * sae.d_in * cache.layout.stored_dtype.itemsize)


def _chunks(sae: SAE, cache: ActivationCache, images: range, memory: int) -> Iterator[NDArray[np.integer]]:
    """These images, in runs that can be encoded within the memory."""
    size = max(1, min(32, memory // least_memory(sae, cache)))
    for start in range(images.start, images.stop, size):
        yield np.arange(start, min(start + size, images.stop))


class _Sums:
    """What is summed over the images of a part."""

    def __init__(self, d_sae: int, rows: int) -> None:
        nothing = Moments.of(np.zeros(0, np.int64), np.zeros(0), d_sae)
        self.values = self.morans = nothing
        self.histogram: NDArray[np.int64] | int = 0
        self.counts, self.totals = np.zeros((rows, d_sae)), np.zeros((rows, d_sae))

    def add_row(self, row: int, firing: Firing) -> None:
        self.counts[row] += total(firing.latent, np.ones(len(firing)), firing.d_sae)
        self.totals[row] += total(firing.latent, firing.value, firing.d_sae)

    def arrays(self) -> dict[str, NDArray[Any]]:
        moments = {"values": self.values, "moran": self.morans}
        flat = {f"{name}/{key}": array for name, m in moments.items() for key, array in vars(m).items()}
        rows = {"rows/count": self.counts, "rows/total": self.totals}
        return flat | rows | {"histogram": np.asarray(self.histogram)}


def _write_part(
    sae: SAE, cache: ActivationCache, row: int, images: range, memory: int, file: h5py.File, bar: tqdm[Any]
) -> None:
    """Codes, tallies and sums of these images."""
    sums, tallies = _Sums(sae.d_sae, cache.rows_per_image), []
    codes = _Codes(file, len(images), cache.tokens_per_row(sae.hookpoint), sae)
    for chunk in _chunks(sae, cache, images, memory):
        for at, (indices, values) in enumerate(_encode(sae, cache, chunk)):
            firing = Firing.of(indices, values, cache.grid(sae.hookpoint), sae.d_sae)
            sums.add_row(at, firing)
            if at == row:
                tally = firing.by_image()
                known = ~np.isnan(tally.moran)
                sums.values = sums.values.merged(Moments.of(firing.latent, firing.value, sae.d_sae))
                sums.morans = sums.morans.merged(Moments.of(tally.latent[known], tally.moran[known], sae.d_sae))
                sums.histogram = sums.histogram + firing.histogram()
                tallies.append((int(chunk[0]), tally))
                codes.write(chunk - images.start, indices, values)
        bar.update(len(chunk))
    for name, array in sums.arrays().items():
        file.create_dataset(name, data=array, **_compact(array.shape))
    for name in ("image", "latent", "max", "mean", "area"):
        joined = np.concatenate([getattr(tally, name) + (first if name == "image" else 0) for first, tally in tallies])
        dtype = np.float32 if name in ("max", "mean") else np.int32
        file.create_dataset(f"tallies/{name}", data=joined.astype(dtype), **_compact(joined.shape))
    file.attrs.update(first_image=images.start, n_images=len(images))


def _compact(shape: tuple[int, ...]) -> dict[str, Any]:
    """Compression and checksums, where there is something to store."""
    return {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True} if all(shape) else {}


class _Codes:
    """The codes of a part, widened as longer ones come."""

    def __init__(self, file: h5py.File, n_images: int, tokens: int, sae: SAE) -> None:
        width = sae.k or 1
        shape, limit = (n_images, tokens, width), (n_images, tokens, sae.d_sae)
        chunk = (max(1, min(n_images, 2**15 // (tokens * width))), tokens, width)
        compact: dict[str, Any] = {"chunks": chunk, "maxshape": limit, **_compact(shape)}
        index = "uint16" if sae.d_sae < 2**16 else "uint32"
        self._indices = file.create_dataset("codes/indices", shape, index, **compact)
        self._values = file.create_dataset("codes/values", shape, "float16", **compact)

    def write(
        self,
        images: Int[np.ndarray, " image"],
        indices: Integer[np.ndarray, "image token width"],
        values: Float[np.ndarray, "image token width"],
    ) -> None:
        place = slice(int(images[0]), int(images[-1]) + 1)
        for stored, part in ((self._indices, indices), (self._values, values)):
            if part.shape[2] > stored.shape[2]:
                stored.resize(part.shape[2], axis=2)
            stored[place, :, : part.shape[2]] = part

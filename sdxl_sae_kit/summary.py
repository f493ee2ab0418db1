"""From the parts of a measurement to its statistics, examples and neighbours, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import explain_full, settle
from sdxl_sae_kit.firing import EDGES, Firing, Moments, group_ranks
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.sae import SAE

FILE = "features.h5"
RANKINGS = ("max", "mean", "area")
SAMPLED = 12
"""Images in a latent's stratified sample: three of each quarter of those on which it fires."""
NEIGHBOURS = 8
MOST_PICTURED = 4096
"""Up to so many images, the pictures of all are kept; of more, those of examples and some to compare with."""

_COMPARED = 1024
_PAIRS = 2 * 10**9
"""Co-activation is counted on all tokens if that means at most so many pairs, else on evenly spaced images."""

_AT_ONCE, _PICTURES_AT_ONCE = 32, 1024  # images
_COMPARED_AT_ONCE = 2**24

Entries = dict[str, NDArray[Any]]


def part_name(part: int) -> str:
    """File of the images from part · PART_IMAGES on."""
    return f"part-{part:05}.h5"


def open_part(path: Path, mode: str = "r") -> h5py.File:
    """An HDF5 file: one that HDF5 1.10 can read too, or to be read after it was checked."""
    return open_checked(path) if mode == "r" else h5py.File(path, mode, libver=("v108", "v110"))


def is_whole(path: Path) -> bool:
    """Whether a part is there and undamaged: HDF5 compares the checksums of all that it reads."""
    try:
        with open_part(path) as part:
            part.visititems(_read)
    except (ArtifactError, OSError, KeyError, RuntimeError):
        return False
    return True


def _read(_: str, item: h5py.Group | h5py.Dataset) -> None:
    if isinstance(item, h5py.Dataset):
        item[()]


def summarise(
    sae: SAE,
    cache: ActivationCache,
    step: int,
    top: int,
    memory: int,
    artifact: Artifact,
    parts: Sequence[Path],
) -> None:
    """Write features.h5 from the parts, and seal the artifact."""
    grid, n_images = cache.grid(sae.hookpoint), cache.n_images
    temporary = artifact.file(FILE + ".tmp")
    with explain_full(artifact.file(FILE)), open_part(temporary, "w") as file:
        file.attrs.update(sae=sae.name, hookpoint=sae.hookpoint, step=step, n_images=n_images)
        file.attrs.update(height=grid[0], width=grid[1], n_tokens=n_images * grid[0] * grid[1])
        file.attrs.update(steps=cache.layout.steps, halves=cache.layout.halves)
        with open_part(parts[0]) as first:
            file.attrs["part_images"] = first.attrs["n_images"]
        alive = _write_statistics(file, parts, n_images, grid[0] * grid[1])
        shown = _write_latents(file, parts, sae, grid, min(top, n_images), memory)
        _write_similar(file, sae.W_dec.detach(), alive, memory)
        file.create_dataset("prompts", data=np.frombuffer(cache.prompts.to_jsonl().encode(), np.uint8))
        _write_thumbnails(file, cache, shown)
    settle(temporary, artifact.file(FILE))
    artifact.seal(facts={"alive": int(alive.sum()), "latents": sae.d_sae})


def _write_statistics(file: h5py.File, parts: Sequence[Path], n_images: int, tokens: int) -> NDArray[np.bool_]:
    """Everything that is a sum over parts; returns which latents fire."""
    sums = reduce(_added, map(_sums, parts))
    values, moran, rows = sums["values"], sums["moran"], sums["rows/count"]
    low, high = moran.interval()
    arrays = {
        "density": values.n / (n_images * tokens),
        "image_density": sums["images"] / n_images,
        "mean": values.mean,
        "std": values.std,
        "max": sums["max"],
        "moran/mean": np.where(moran.n > 0, moran.mean, np.nan),
        "moran/low": low,
        "moran/high": high,
        "moran/n": moran.n,
        "curves/density": rows / (n_images * tokens),
        "curves/mean": sums["rows/total"] / np.maximum(rows, 1),
    }
    for name, array in arrays.items():
        file.create_dataset(name, data=array.astype(np.float32))
    file.create_dataset("histogram/edges", data=EDGES)
    file.create_dataset("histogram/counts", data=sums["histogram"], compression="gzip", compression_opts=1)
    return np.asarray(values.n > 0)


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sums of two parts together."""
    how: dict[str, Any] = {"values": Moments.merged, "moran": Moments.merged, "max": np.maximum}
    return {name: how.get(name, np.add)(one[name], other[name]) for name in one}


def _sums(path: Path) -> dict[str, Any]:
    with open_part(path) as part:
        sums: dict[str, Any] = {name: part[name][()] for name in ("rows/count", "rows/total", "histogram")}
        for name in ("values", "moran"):
            sums[name] = Moments(*(part[f"{name}/{key}"][()] for key in ("n", "mean", "squares")))
        latent, peak = part["tallies/latent"][()], np.zeros(len(sums["histogram"]))
        sums["images"] = np.bincount(latent, minlength=len(peak))
        np.maximum.at(peak, latent, part["tallies/max"][()])
        return sums | {"max": peak}


def _write_latents(
    file: h5py.File, parts: Sequence[Path], sae: SAE, grid: tuple[int, int], top: int, memory: int
) -> set[int]:
    """Examples and co-active latents, as many latents at once as the memory holds; returns the images shown."""
    slots, n, tokens = len(RANKINGS) * top + SAMPLED, sae.d_sae, grid[0] * grid[1]
    sizes = dict.fromkeys(RANKINGS, top) | {"sample": SAMPLED}
    for by, size in sizes.items():
        file.create_dataset(f"examples/{by}/image", (n, size), np.int32, fillvalue=-1)
        file.create_dataset(f"examples/{by}/value", (n, size), np.float32)
        file.create_dataset(
            f"examples/{by}/heat_map", (n, size, *grid), np.float16, chunks=(1, size, *grid),
            compression="gzip", compression_opts=1, shuffle=True,
        )  # fmt: skip
    file.create_dataset("coactive/latent", (n, NEIGHBOURS), np.int32, fillvalue=-1)
    file.create_dataset("coactive/value", (n, NEIGHBOURS), np.float32)
    entries = sum(_n_tallies(path) for path in parts)
    per_latent = slots * (tokens * 2 + 16) + 24 * n + 100 * entries // n
    counted = _counted_images(parts, tokens)
    file["coactive"].attrs["n_tokens"] = sum(map(len, counted)) * tokens
    shown: set[int] = set()
    for first in range(0, n, block := max(1, memory // per_latent)):
        latents = range(first, min(first + block, n))
        chosen = _choose(_tallies(parts, latents), len(latents), sizes)
        maps = _heat_maps(parts, {by: images for by, (images, _) in chosen.items()}, latents, grid)
        for by, (images, values) in chosen.items():
            shown |= set(images[images >= 0].tolist())
            for name, array in (("image", images), ("value", values), ("heat_map", maps[by])):
                file[f"examples/{by}/{name}"][latents.start : latents.stop] = array
        near, index = _coactive(parts, counted, latents, n, grid)
        file["coactive/latent"][latents.start : latents.stop] = near
        file["coactive/value"][latents.start : latents.stop] = index
    return shown


def _n_tallies(path: Path) -> int:
    with open_part(path) as part:
        return int(part["tallies/latent"].shape[0])


def _tallies(parts: Sequence[Path], latents: range) -> Entries:
    """What these latents, counted from the first of them, do on every image on which they fire."""
    found: list[Entries] = []
    for path in parts:
        with open_part(path) as part:
            entries = {name: part[f"tallies/{name}"][()] for name in ("image", "latent", *RANKINGS)}
        mine = (entries["latent"] >= latents.start) & (entries["latent"] < latents.stop)
        found.append({name: array[mine] for name, array in entries.items()})
    joined = {name: np.concatenate([entries[name] for entries in found]) for name in found[0]}
    return joined | {"latent": joined["latent"] - latents.start}


def _choose(entries: Entries, n: int, sizes: dict[str, int]) -> dict[str, tuple[NDArray[np.int32], NDArray[Any]]]:
    """Images and values of each latent's examples: the highest of each ranking, and the sample, weakest first."""
    chosen = {}
    counts = np.bincount(entries["latent"], minlength=n)
    for by, size in sizes.items():
        score = entries["max" if by == "sample" else by].astype(np.float64)
        order, rank = group_ranks(entries["latent"], score if by == "sample" else -score, entries["image"])
        latent, image = entries["latent"][order], entries["image"][order]
        slot, kept = rank, rank < size
        if by == "sample":  # the last of each of `size` equal runs of ranks
            taken = np.minimum(counts, size)[latent]
            slot = rank * taken // counts[latent]
            kept = (rank + 1) * taken // counts[latent] > slot
        images, values = np.full((n, size), -1, np.int32), np.zeros((n, size), np.float32)
        images[latent[kept], slot[kept]], values[latent[kept], slot[kept]] = image[kept], score[order][kept]
        chosen[by] = images, values
    return chosen


def _firing(part: h5py.File, images: NDArray[np.integer] | slice, grid: tuple[int, int], d_sae: int) -> Firing:
    return Firing.of(part["codes/indices"][images], part["codes/values"][images].astype(np.float32), grid, d_sae)


def _heat_maps(
    parts: Sequence[Path], wanted: dict[str, NDArray[np.int32]], latents: range, grid: tuple[int, int]
) -> dict[str, NDArray[np.float16]]:
    """The heat map of every example; codes are read once, part by part."""
    maps = {by: np.zeros((*images.shape, grid[0] * grid[1]), np.float16) for by, images in wanted.items()}
    for path in parts:
        with open_part(path) as part:
            first, count = int(part.attrs["first_image"]), int(part.attrs["n_images"])
            for start in range(first, first + count, _AT_ONCE):
                stop = min(start + _AT_ONCE, first + count)
                _fill(part, first, range(start, stop), wanted, maps, latents)
    return {by: found.reshape(*found.shape[:2], *grid) for by, found in maps.items()}


def _fill(
    part: h5py.File,
    first: int,
    images: range,
    wanted: dict[str, NDArray[np.int32]],
    maps: dict[str, NDArray[np.float16]],
    latents: range,
) -> None:
    """Fill in the maps of examples among these images."""
    places = {by: np.nonzero((of >= images.start) & (of < images.stop)) for by, of in wanted.items()}
    if not any(len(latent) for latent, _ in places.values()):
        return
    chunk = slice(images.start - first, images.stop - first)
    indices, values = part["codes/indices"][chunk], part["codes/values"][chunk]
    for by, (latent, slot) in places.items():
        at = wanted[by][latent, slot] - images.start
        for one in range(0, len(at), size := max(1, _COMPARED_AT_ONCE // indices[0].size)):
            some = slice(one, one + size)
            hits = indices[at[some]] == (latent[some] + latents.start)[:, None, None]
            maps[by][latent[some], slot[some]] = np.where(hits, values[at[some]], 0).sum(axis=2)


def _counted_images(parts: Sequence[Path], tokens: int) -> list[NDArray[np.int64]]:
    """Of every part the images on which co-activation is counted, spread over all of them."""
    widths, counts = [], []
    for path in parts:
        with open_part(path) as part:
            widths.append(part["codes/indices"].shape[2])
            counts.append(int(part.attrs["n_images"]))
    most = max(1, _PAIRS // (tokens * max(widths) ** 2))
    every = max(1, -(-sum(counts) // most))
    return [np.arange(-(sum(counts[:at]) % -every), count, every) for at, count in enumerate(counts)]


def _coactive(
    parts: Sequence[Path], counted: Sequence[NDArray[np.int64]], latents: range, n: int, grid: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The latents with the highest Jaccard index of firing tokens, both / either, with each of these."""
    both, fires = np.zeros((len(latents), n), np.int32), np.zeros(n, np.int64)
    for path, images in zip(parts, counted, strict=True):
        with open_part(path) as part:
            for start in range(0, len(images), _AT_ONCE):
                on = _fires(_firing(part, images[start : start + _AT_ONCE], grid, n))
                fires += on.sum(axis=0)
                pairs = (on[:, latents.start : latents.stop].T @ on).tocoo()
                both[pairs.coords] += pairs.data
    either = fires[latents.start : latents.stop, None] + fires - both
    index = np.divide(both, either, out=np.zeros(both.shape, np.float32), where=either > 0)
    index[np.arange(len(latents)), np.arange(latents.start, latents.stop)] = 0  # itself
    return _highest(torch.from_numpy(index))


def _fires(firing: Firing) -> csr_array:
    """1 where a latent (column) fires on a token (row)."""
    tokens = firing.grid[0] * firing.grid[1]
    rows = firing.image * tokens + firing.token
    shape = (int(rows.max(initial=-1)) + 1, firing.d_sae)
    return csr_array((np.ones(len(firing), np.int32), (rows, firing.latent)), shape=shape)


def _write_similar(
    file: h5py.File, decoder: Float[Tensor, "latent d_in"], alive: NDArray[np.bool_], memory: int
) -> None:
    """The latents, among those that fire, whose decoder rows have the highest cosine with each one's."""
    rows = torch.nn.functional.normalize(decoder.cpu().float(), dim=1)
    n = len(rows)
    file.create_dataset("similar/latent", (n, NEIGHBOURS), np.int32, fillvalue=-1)
    file.create_dataset("similar/value", (n, NEIGHBOURS), np.float32)
    for first in range(0, n, block := max(1, memory // (16 * n))):
        some = slice(first, min(first + block, n))
        cosines = rows[some] @ rows.T
        cosines[:, ~torch.from_numpy(alive)] = -2
        cosines[torch.arange(len(cosines)), torch.arange(some.start, some.stop)] = -2
        file["similar/latent"][some], file["similar/value"][some] = _highest(cosines, above=-1.5)


def _highest(
    values: Float[Tensor, "latent other"], above: float = 0
) -> tuple[Int[np.ndarray, "latent near"], Float[np.ndarray, "latent near"]]:
    """The others of the highest values, where these are above a bound; −1 fills empty places."""
    best = values.topk(min(NEIGHBOURS, values.shape[1]), dim=1)
    near, value = np.full((len(values), NEIGHBOURS), -1, np.int32), np.zeros((len(values), NEIGHBOURS), np.float32)
    found = (best.values > above).numpy()
    near[:, : found.shape[1]] = np.where(found, best.indices.numpy(), -1)
    value[:, : found.shape[1]] = np.where(found, best.values.numpy(), 0)
    return near, value


def _write_thumbnails(file: h5py.File, cache: ActivationCache, shown: set[int]) -> None:
    """Pictures one after the other, in the order of their images."""
    if cache.n_images <= MOST_PICTURED:
        shown = set(range(cache.n_images))
    else:
        held_out = np.flatnonzero(cache.prompts.held_out)
        shown = shown | set(np.random.default_rng(0).permutation(held_out)[:_COMPARED].tolist())
    images = np.array(sorted(shown) if cache.layout.images else [], np.int64)
    ends = np.zeros(len(images), np.int64)
    stored = file.create_dataset("thumbnails/bytes", (0,), np.uint8, maxshape=(None,), chunks=(2**18,))
    for start in range(0, len(images), _PICTURES_AT_ONCE):
        encoded = cache.thumbnails(images[start : start + _PICTURES_AT_ONCE])
        before = stored.shape[0]
        ends[start : start + len(encoded)] = before + np.cumsum([len(each) for each in encoded])
        stored.resize(before + sum(map(len, encoded)), axis=0)
        stored[before:] = np.frombuffer(b"".join(encoded), np.uint8)
    file.create_dataset("thumbnails/image", data=images)
    file.create_dataset("thumbnails/ends", data=ends)

"""HDF5 files that a stranger may have written: opened only if all that they name lies in them.

HDF5 can point to other files in three ways (links, external storage, virtual sources) and reads them without a word;
and six kilobytes can claim terabytes. Whoever opens a file here gets numbers that are in it, or a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import h5py

from sdxl_sae_kit.errors import ArtifactError

_MOST_PACKED = 1_000
"""So many times its size a file may claim: deflate packs no better."""
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


def open_checked(path: Path) -> h5py.File:
    """The file, opened for reading after its structure was checked.

    Raises:
        ArtifactError: it is no HDF5 file, has links, other files' data or what is no number, or claims more than a
            thousand times its own size.
    """
    try:
        status = path.stat()
        _check(path, status.st_ino, status.st_mtime_ns, status.st_size)
        return h5py.File(path, "r")
    except Exception as cause:  # a damaged file makes h5py raise whatever it trips over
        raise ArtifactError(
            f"{path} cannot be read ({cause}). No number was read from it: delete its folder and make it again, or get "
            "it again from people you trust."
        ) from None


@lru_cache(maxsize=4096)
def _check(path: Path, inode: int, changed: int, size: int) -> None:
    """Once for each state of a file: a gallery opens the same one for every card."""
    with h5py.File(path, "r") as file:
        claimed = sum(dataset.nbytes for dataset in _datasets(file, set()))
    if claimed > _MOST_PACKED * size:
        raise ValueError(f"it claims {claimed:,} bytes and has {size:,}")


def _datasets(group: h5py.Group, seen: set[int]) -> Iterator[h5py.Dataset]:
    """Every dataset below a group, none opened before its link was seen to stay within the file."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!r} is a link to somewhere else")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:  # a group may hold itself
            raise ValueError(f"{name!r} has two names")
        seen.add(address)
        if isinstance(item, h5py.Group):
            yield from _datasets(item, seen)
        else:
            _check_dataset(name, item)
            yield item


def _check_dataset(name: str, item: h5py.Dataset | h5py.Datatype) -> None:
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "biuf":
        raise ValueError(f"{name!r} holds no numbers")
    settings = item.id.get_create_plist()
    filters = {settings.get_filter(place)[0] for place in range(settings.get_nfilters())}
    if item.is_virtual or settings.get_external_count() or not filters <= _FILTERS:
        raise ValueError(f"{name!r} is stored elsewhere, or by means this kit does not use")

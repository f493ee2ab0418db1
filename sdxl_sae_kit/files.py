"""Files that last: written whole or not at all, made durable, and hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_sae_kit.errors import ArtifactError, KitError


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: bytes | memoryview) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a crash or a full disk leaves either the old content or the new, never a part.

    Raises:
        ArtifactError: the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with explain_full(path), open(temporary, "xb") as handle:  # a link in its place would be followed by "wb"
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def writable(what: str, target: Path) -> Path:
    """The path as it stands in full, in a folder that is there now and takes files.

    Raises:
        KitError: saying why `what` cannot go there.
    """
    target = target.expanduser().resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KitError(f"The {what} cannot go to {target}: {error}. Choose another place.") from None
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        why = "it is a folder" if target.is_dir() else "its folder is read-only"
        raise KitError(f"The {what} cannot go to {target}: {why}. Name a file that may be written.")
    return target


def settle(temporary: Path, final: Path) -> None:
    """Give a file that was written its name, once it would survive a power cut."""
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(final)
    sync_folder(final.parent)


@contextmanager
def explain_full(path: Path) -> Iterator[None]:
    """Say of a disk that is full what to do."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ArtifactError(
            f"There is no space left for {path}. What was written before is kept: make room, and the same call goes on "
            "from there."
        ) from None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_path(given: Any) -> Path:
    """The path of an artifact's folder. Raises ArtifactError for what is none."""
    if not isinstance(given, os.PathLike | str):
        raise ArtifactError(
            f"open takes the path of an artifact's folder, such as stats.artifact.folder, not {given!r}."
        )
    return Path(given)

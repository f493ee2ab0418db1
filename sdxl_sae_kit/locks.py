"""Files that one process, or several together, hold while they write; freed when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import explain_full


@contextmanager
def held(make: Callable[[], IO[str]], name: str, *, shared: bool) -> Iterator[Callable[[], None]]:
    """Hold the file that `make` makes and opens for writing, alone or `shared`; gives what admits others later.

    Raises:
        ArtifactError: another process holds it; it is named, and so is what it writes.
    """
    while True:
        with make() as handle:
            _flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, name)
            if not _is_there(handle):
                continue  # another process deleted it after it was opened
            if not shared:
                with explain_full(Path(handle.name)):
                    handle.truncate(0)
                    handle.write(f"process {os.getpid()} on {os.uname().nodename}")
                    handle.flush()
            yield partial(_flock, handle, fcntl.LOCK_SH, name)
            return


def is_held(path: Path) -> bool:
    """Whether a process holds it at this moment, as far as can be told."""
    try:
        with open(path, "r+") as handle:  # NFS locks alone only what may be written
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # nobody ever held it
        return False
    except OSError:
        return True
    return False


def _flock(handle: IO[str], kind: int, name: str) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        raise ArtifactError(f"{name} is being written by {holder}. Wait for it, or stop it and call again.") from None


def _is_there(handle: IO[str]) -> bool:
    """Whether its path still leads to it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(handle.name))
    except FileNotFoundError:
        return False

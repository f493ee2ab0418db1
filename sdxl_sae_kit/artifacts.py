"""The artifact store: every result is a folder named by the recipe that made it, computed once.

`<store>/<kind>/<readable>-<hash8>/` is finished when it holds `stamp.json`, which is written last and in one step. A
folder without it is work in progress that its writer can resume. The formats are described in `artifacts/README.md`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sdxl_sae_kit.amounts import human_bytes
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import canonical_json, folder_path, hash_file, write_atomically
from sdxl_sae_kit.locks import held, is_held
from sdxl_sae_kit.stamps import check_of, digest_of, is_stamp, kit_version, name_hash

FORMATS = {"activations": 2, "saes": 2, "features": 3, "icons": 1, "studies": 2, "reports": 2}
"""Kinds of artifacts and the version of each one's format; raised whenever the format changes."""

STORE_VARIABLE = "SDXL_SAE_KIT_STORE"
PAGES = Path(__file__).parent / "pages"
"""The notebooks of an installed package; in a checkout they lie in `notebooks/`."""
_STAMP, _LOCK = "stamp.json", ".lock"
DELETING = ".deleting"
"""How a folder's name ends while it is deleted: no artifact's does."""
UNFINISHED = "unfinished"
"""Why an artifact is unused with which the call that began it would go on."""
_ASKED: dict[Path, None] = {}
"""Folders of the artifacts that this process made, found or opened, in that order."""


def checkout() -> Path | None:
    """The folder of the checkout that this runs from; None for an installed package, where nothing may be written."""
    folder = PAGES.parent.parent
    return folder if (folder / "pyproject.toml").is_file() and not PAGES.is_dir() else None


class Store:
    """A folder of artifacts; `root` is its path.

    >>> Store.at().unused()                                                 # doctest: +SKIP
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def at(cls, store: Store | Path | str | None = None) -> Store:
        """The store given; by default `$SDXL_SAE_KIT_STORE`, else `artifacts/` of the checkout or working folder.

        Raises:
            ArtifactError: no folder can have this name.
        """
        if isinstance(store, Store):
            return store
        if not isinstance(store, os.PathLike | str | None):
            raise ArtifactError(
                f"store is a Store or the path of a folder, not {store!r}. Leave it out for the usual one."
            )
        named = store or os.environ.get(STORE_VARIABLE) or (checkout() or Path.cwd()) / "artifacts"
        try:
            return cls(Path(named).expanduser().resolve())
        except (OSError, RuntimeError, ValueError) as cause:  # no such user, links in a circle, a zero in the name
            raise ArtifactError(
                f"No store can be at {str(named)!r} ({cause}). Name a folder with store= or {STORE_VARIABLE}."
            ) from None

    def artifact(self, kind: str, readable: str, recipe: Mapping[str, Any]) -> Artifact:
        """The artifact that this recipe (JSON values only) makes, whether or not it exists yet."""
        recipe = {**json.loads(canonical_json(recipe)), "format": kind, "version": FORMATS[kind]}
        name = f"{slug(readable)}-{name_hash(recipe)}"
        _ASKED[self.root / kind / name] = None
        return Artifact(self.root / kind / name, recipe)

    def artifacts(self) -> list[Artifact]:
        """Every artifact in the store, finished or not, by kind and name."""
        folders = (path for kind in FORMATS for path in sorted((self.root / kind).glob("*-????????")) if path.is_dir())
        return [Artifact(folder) for folder in folders]

    def unused(self) -> list[Artifact]:
        """Those that are only in the way unless a call is to go on with them: see `Artifact.why_unused`."""
        return [artifact for artifact in self.artifacts() if artifact.why_unused]

    def __repr__(self) -> str:
        rows = [
            f"{a.kind:12} {'finished' if a.finished else 'unfinished':10} {human_bytes(a.nbytes):>9}  {a.name}"
            for a in self.artifacts()
        ]
        return "\n".join([f"Artifacts in {self.root}: {len(rows)}", *rows])


class Artifact:
    """One result: a folder, the recipe that names it, and, once finished, a stamp that says what it holds."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any] | None = None) -> None:
        self.folder, self.kind, self.name = folder, folder.parent.name, folder.name
        self._recipe = recipe

    @classmethod
    def open(cls, folder: Path | str, kind: str) -> Artifact:
        """The finished artifact of this kind in a folder.

        Raises:
            ArtifactError: there is none, it is unfinished, or of another kind or format version.
        """
        artifact = cls(folder_path(folder))
        if not artifact.finished:
            hint = " One that is still being collected opens with unfinished=True." if kind == "activations" else ""
            raise ArtifactError(
                f"No finished artifact in {folder}. Make it again with the call that makes its kind ({kind}).{hint}"
            )
        made, known = (artifact.stamp["recipe"][key] for key in ("format", "version"))
        if (made, known) != (kind, FORMATS[kind]):
            raise ArtifactError(
                f"{folder} holds {made} version {known}; this kit reads {kind} version {FORMATS[kind]}."
            )
        _ASKED[artifact.folder.resolve()] = None
        return artifact.present()

    def __repr__(self) -> str:
        return f"Artifact({str(self.folder)!r})"

    @property
    def recipe(self) -> Mapping[str, Any]:
        """All settings and inputs this was made from."""
        return self._recipe if self._recipe is not None else self.stamp["recipe"]

    @property
    def finished(self) -> bool:
        """Whether the stamp is there."""
        return self.holds(_STAMP)

    @cached_property
    def stamp(self) -> dict[str, Any]:
        """What the finished artifact says of itself: recipe, kit version, time, facts, each file's size and sha256.

        Raises:
            ArtifactError: it cannot be read, or is not as it was written.
        """
        try:
            stamp: dict[str, Any] = json.loads(self.file(_STAMP).read_text())
            genuine = is_stamp(stamp) and stamp["check"] == check_of(stamp)
        except (OSError, ValueError, RecursionError) as cause:
            raise ArtifactError(f"The stamp of {self.folder} cannot be read ({cause}). {self.remedy}") from None
        if not genuine or stamp["digest"] != digest_of(stamp["recipe"], stamp["files"]):
            raise ArtifactError(f"The stamp of {self.folder} is not as it was written. {self.remedy}")
        return stamp

    @property
    def digest(self) -> str:
        """sha256 over the recipe and every file: what the recipes of later artifacts name as their input."""
        return str(self.stamp["digest"])

    @property
    def remedy(self) -> str:
        """What to do when it is damaged."""
        if self.kind == "activations":
            return "Mend it with repair(pipe, folder), or delete its folder and collect again."
        return "Delete its folder and make it again."

    @property
    def busy(self) -> bool:
        """Whether a process is writing it at this moment, as far as can be told."""
        return is_held(self.folder / _LOCK)

    @property
    def why_unused(self) -> str:
        """Why it is only in the way; empty for what this kit reads, what is being written and what it does not know.

        Unused is what was left unfinished by a process that is gone, and what is of an older format than this kit
        reads. A finished result is never unused, whether or not another was made from it; nor is one of a newer
        format, which a newer kit reads, one whose stamp is damaged, which `verify` names, or a link to elsewhere.
        """
        if self.folder.is_symlink() or self.busy:
            return ""
        if not self.finished:
            return UNFINISHED
        return "older format" if self.superseded else ""

    @property
    def superseded(self) -> bool:
        """Whether it is finished, and of an older format than this kit reads."""
        try:
            made = self.stamp["recipe"]["version"]
        except ArtifactError:
            return False
        return isinstance(made, int) and made < FORMATS.get(self.kind, 0)

    def remove(self) -> None:
        """Delete the folder, if it is still unused.

        Raises:
            ArtifactError: it is used, or being written, or cannot be deleted.
        """
        with self.lock():
            self.__dict__.pop("stamp", None)  # what another process did meanwhile counts
            if self.finished and not self.superseded:
                raise ArtifactError(f"{self.folder} was finished meanwhile. It is kept.")
            aside = self.folder.with_name(self.name + DELETING)  # in one step: nobody meets it half deleted
            shutil.rmtree(aside, ignore_errors=True)
            self._deleting(lambda: self.folder.rename(aside))
        self._deleting(lambda: shutil.rmtree(aside))  # its lock is closed, or NFS would keep it

    def _deleting(self, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as cause:
            raise ArtifactError(f"{self.folder} cannot be deleted ({cause}). Delete it by hand.") from None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        with os.scandir(self.folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file() and not entry.name.endswith(".tmp"))

    def file(self, name: str) -> Path:
        """Path of one of its files.

        Raises:
            ArtifactError: the name leads out of the folder, or a link lies there, which would.
        """
        path = self.folder / name
        if Path(name).name != name or name in ("", "..") or path.is_symlink():
            raise ArtifactError(
                f"{path} is no file of {self.name} itself, and links are not followed: they lead anywhere. Put a copy "
                "of what you trust in its place."
            )
        return path

    def read_text(self, name: str) -> str:
        """Content of one of its text files.

        Raises:
            ArtifactError: the file is lost or is no text.
        """
        try:
            return self.file(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise ArtifactError(
                f"{name} of {self.name} in {self.folder.parent} cannot be read ({cause}). {self.remedy}"
            ) from None

    def read_json(self, name: str) -> Any:
        """Content of one of its JSON files.

        Raises:
            ArtifactError: the file is lost or is no JSON.
        """
        try:
            return json.loads(self.read_text(name))
        except (ValueError, RecursionError) as cause:
            raise ArtifactError(f"{name} of {self.name} is no JSON ({cause}). {self.remedy}") from None

    def present(self) -> Artifact:
        """Itself, if every file that its stamp lists is there in its size; `verify` hashes them too.

        Raises:
            ArtifactError: naming a file that is missing or of another size.
        """
        for name, entry in self.stamp["files"].items():
            if not self.holds(name) or self.file(name).stat().st_size != entry["bytes"]:
                raise ArtifactError(f"{self.folder / name} is missing or has changed, or is a link. {self.remedy}")
        return self

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name in its folder itself; no other folder is looked into."""
        try:
            return self.file(name).is_file()
        except (ArtifactError, OSError, ValueError):  # a name that no file can have
            return False

    @contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[Callable[[], None]]:
        """Hold the folder (made if need be) for writing; freed when the process ends, however it ends.

        Processes that write it together hold it `shared`: the first takes it alone, makes it ready, and then calls
        what this yields, which admits the others and keeps strangers out.

        Raises:
            ArtifactError: the store cannot be written, a link lies in the folder, which writing would follow, or
                another process is writing it; then the message names it.
        """
        with held(self._open_lock, self.name, shared=shared) as admit_others:
            yield admit_others

    def _open_lock(self) -> IO[str]:
        with explain_unwritable(self.folder.parent.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            if links := [path.name for path in self.folder.iterdir() if path.is_symlink()]:
                raise ArtifactError(f"{self.folder} holds links ({', '.join(links)}). Remove them: nothing is written.")
            return open(self.folder / _LOCK, "a+")

    def seal(
        self,
        *,
        known: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
        names: Iterable[str] | None = None,
    ) -> Artifact:
        """Finish: hash every file (not those whose sha256 is `known`), then write the stamp in one step.

        The files are those `names`, or all there are but hidden ones.
        """
        known = known or {}
        for leftover in self.folder.glob("*.tmp"):  # of a writer that was killed
            leftover.unlink()
        there = (path.name for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        names = sorted(set(there if names is None else names) - {_STAMP})
        files = {
            name: {"bytes": self.file(name).stat().st_size, "sha256": known.get(name) or hash_file(self.file(name))}
            for name in names
        }
        stamp = {
            "recipe": self.recipe,
            "kit": kit_version(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "facts": facts or {},
            "files": files,
            "digest": digest_of(self.recipe, files),
        }
        write_atomically(self.file(_STAMP), json.dumps(stamp | {"check": check_of(stamp)}, indent=1).encode())
        return Artifact(self.folder, self.recipe)

    def unseal(self) -> None:
        """Make it unfinished again, so that what is damaged can be made anew."""
        self.file(_STAMP).unlink(missing_ok=True)
        self.__dict__.pop("stamp", None)

    def check(self, name: str) -> Path:
        """Path of one of its files, hashed again: for files small enough to be read whole anyway.

        Raises:
            ArtifactError: it is missing or has changed.
        """
        path = self.file(name)
        if not path.is_file() or hash_file(path) != self.stamp["files"][name]["sha256"]:
            raise ArtifactError(f"{path} is missing or has changed. Delete its folder and make it again.")
        return path

    def verify(self) -> None:
        """Hash everything again.

        Raises:
            ArtifactError: naming each file that is missing, changed or foreign, or saying that the recipe is not the
                folder's.
        """
        stamp = self.stamp
        faults = [] if self.name.endswith(name_hash(stamp["recipe"])) else ["the recipe is not the one that named it"]
        for name, entry in stamp["files"].items():
            if not self.holds(name):
                faults.append(f"{name} is missing")
            elif hash_file(self.file(name)) != entry["sha256"]:
                faults.append(f"{name} has changed")
        present = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")} - {_STAMP}
        faults += [f"{name} does not belong to it" for name in sorted(present - stamp["files"].keys())]
        if faults:
            raise ArtifactError(f"{self.folder}: {'; '.join(faults)}. Delete the folder and make it again.")


def used() -> list[Artifact]:
    """The finished artifacts that this process made, found or opened, in the order in which it first asked for them."""
    return [artifact for artifact in map(Artifact, _ASKED) if artifact.finished]


@contextmanager
def explain_unwritable(store: Path) -> Iterator[None]:
    """Say of a store that cannot be written what to do."""
    try:
        yield
    except OSError as cause:
        raise ArtifactError(
            f"The store {store} cannot be written ({cause.strerror}). "
            f"Choose another folder with store= or the variable {STORE_VARIABLE}."
        ) from None


def slug(text: str) -> str:
    """The text with everything but letters, digits, `.`, `_` and `-` turned into `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")

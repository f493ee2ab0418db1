"""The shards of an activation cache: written one by one, and counted only once a manifest lists them.

Think of a ledger: a shard is written in full and made durable, and only then does one line in `manifest.jsonl` enter
it. What no line names does not exist, so a writer may be killed at any moment, and several processes may write shards
of one cache side by side. The format is described in `artifacts/README.md`.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import ArtifactError, PromptError
from sdxl_sae_kit.files import canonical_json, explain_full, hash_file, sha256, sync_folder, write_atomically
from sdxl_sae_kit.layout import LIBVER, Batch, Layout
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.stamps import name_hash

PROMPTS, RECIPE = "prompts.jsonl", "recipe.json"
_MANIFEST, _VIRTUAL = "manifest.jsonl", "all.h5"
_SHARD = re.compile(r"shard-\d{5,}\.h5(\.tmp)?")
_MOST_SHARDS = 10**7  # what claims more is refused before it is counted


@dataclass(frozen=True)
class Shard:
    """One file of a cache: a stretch of images, and the sha256 it had when it was written."""

    file: str
    first_image: int
    images: int
    sha256: str

    @property
    def stop(self) -> int:
        """The first image after it."""
        return self.first_image + self.images

    def line(self) -> bytes:
        """Its line in the manifest, which carries a hash of itself."""
        told = {"file": self.file, "first_image": self.first_image, "images": self.images, "sha256": self.sha256}
        return (canonical_json(told | {"line": sha256(canonical_json(told).encode())[:16]}) + "\n").encode()


def plan_shard(layout: Layout, index: int, sha256: str = "") -> Shard:
    """The shard of a cache with this number."""
    first = index * layout.images_per_shard
    return Shard(f"shard-{index:05d}.h5", first, min(layout.images_per_shard, layout.n_images - first), sha256)


def plan_shards(layout: Layout) -> list[Shard]:
    """Every shard of a cache, in order."""
    return [plan_shard(layout, index) for index in range(-(-layout.n_images // layout.images_per_shard))]


class ShardWriter:
    """Writes the shards of a cache in any order; hold the artifact's lock while using it."""

    def __init__(self, artifact: Artifact, prompts: Prompts) -> None:
        self.artifact, self.prompts, self.layout = artifact, prompts, Layout.of(artifact.recipe)

    def prepare(self) -> None:
        """Make the folder ready: say what it is going to hold, and clear away what a killed writer left half done."""
        write_atomically(self.artifact.file(PROMPTS), self.prompts.to_jsonl().encode())
        write_atomically(self.artifact.file(RECIPE), canonical_json(self.artifact.recipe).encode())
        _cut_torn_line(self.artifact.file(_MANIFEST))
        listed = {shard.file for shard in self.shards()}
        for path in self.artifact.folder.glob("shard-*"):
            if path.name not in listed and _SHARD.fullmatch(path.name):
                path.unlink()

    def shards(self) -> list[Shard]:
        """What is written so far."""
        return read_manifest(self.artifact.folder, self.layout)

    def missing(self) -> list[Shard]:
        """What is still to be written, in order."""
        written = {shard.file for shard in self.shards()}
        return [shard for shard in plan_shards(self.layout) if shard.file not in written]

    def write(self, shard: Shard, batches: Sequence[Batch]) -> None:
        """Write one shard, make it durable, and enter it in the manifest.

        Raises:
            ArtifactError: the disk is full.
        """
        data = self.layout.encode(shard.first_image, batches)
        write_atomically(self.artifact.file(shard.file), data)
        entered = Shard(shard.file, shard.first_image, shard.images, sha256(data))
        manifest = self.artifact.file(_MANIFEST)
        new = not manifest.exists()
        with explain_full(manifest), open(manifest, "ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # another process may be entering a shard of its own
            _cut_torn_line(manifest)
            handle.write(entered.line())
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            sync_folder(manifest.parent)

    def finish(self, facts: Mapping[str, Any]) -> Artifact:
        """Sort the manifest, write `all.h5`, and seal the artifact."""
        shards = self.shards()
        check_complete(self.artifact, shards, self.layout)
        write_atomically(self.artifact.file(_MANIFEST), b"".join(shard.line() for shard in shards))
        write_atomically(self.artifact.file(_VIRTUAL), _virtual(self.layout, shards))
        known = {shard.file: shard.sha256 for shard in shards}
        names = [RECIPE, PROMPTS, _MANIFEST, _VIRTUAL, *known]
        return self.artifact.seal(known=known, facts={"images": self.layout.n_images, **facts}, names=names)


def read_manifest(folder: Path, layout: Layout) -> list[Shard]:
    """The shards a manifest lists, by their first image; a torn last line is not counted.

    Raises:
        ArtifactError: a line was edited, occurs twice, or names what a cache of this recipe does not have.
    """
    path = Artifact(folder).file(_MANIFEST)
    if not path.exists():
        return []
    shards: dict[int, Shard] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        shard = _from_line(line, layout)
        if shard is None or shard.first_image in shards:
            raise ArtifactError(f"Line {number} of {path} was changed after it was written. {Artifact(folder).remedy}")
        shards[shard.first_image] = shard
    return [shards[first] for first in sorted(shards)]


def _from_line(line: bytes, layout: Layout) -> Shard | None:
    """The shard that a line of the manifest enters, or None if the line is not one that was written."""
    try:
        told = json.loads(line)
        shard = plan_shard(layout, told["first_image"] // layout.images_per_shard, str(told["sha256"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return shard if line + b"\n" == shard.line() and shard.images > 0 else None


def check_complete(artifact: Artifact, shards: Sequence[Shard], layout: Layout) -> None:
    """Refuse a manifest that does not list every image."""
    if (found := sum(shard.images for shard in shards)) != layout.n_images:
        raise ArtifactError(f"{artifact.file(_MANIFEST)} lists {found} of {layout.n_images} images. {artifact.remedy}")


def read_prompts(artifact: Artifact, layout: Layout) -> Prompts:
    """The prompts of a cache.

    Raises:
        ArtifactError: they are not those that the recipe names.
    """
    text = artifact.read_text(PROMPTS)
    try:
        prompts = Prompts.from_jsonl(text)
    except PromptError as cause:
        raise ArtifactError(f"{artifact.file(PROMPTS)} cannot be read: {cause} {artifact.remedy}") from None
    if sha256(text.encode()) != artifact.recipe["prompts"] or len(prompts) != layout.n_images:
        raise ArtifactError(f"{artifact.file(PROMPTS)} has changed since it was written. {artifact.remedy}")
    return prompts


def read_recipe(artifact: Artifact) -> dict[str, Any]:
    """The recipe as the cache's folder tells it while it is unfinished.

    Raises:
        ArtifactError: there is none.
    """
    try:
        recipe = json.loads(artifact.read_text(RECIPE), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise ArtifactError(f"{artifact.file(RECIPE)} holds no recipe. Delete its folder and collect again.")
    return recipe


@dataclass(frozen=True)
class Fault:
    """Something wrong with a cache, and the images whose rows are affected."""

    what: str
    images: range = range(0)

    def __str__(self) -> str:
        if not self.images:
            return f"{self.what} (no image is lost)"
        return f"{self.what} (images {self.images[0]:,} to {self.images[-1]:,})"


@dataclass(frozen=True)
class Findings:
    """What hashing every file of a cache showed."""

    recipe: Mapping[str, Any]
    faults: list[Fault]
    good: list[Shard]
    """The shards that are as they were written."""
    foreign: list[str]
    """Files that do not belong to it."""


def examine(artifact: Artifact) -> Findings:
    """Hash every file of a cache.

    A shard is good if its sha256 is the one that the stamp or an unharmed line of the manifest tells, so that either of
    them may be lost; so may the recipe, which stands in the stamp and beside it.

    Raises:
        ArtifactError: no recipe is left, so that nothing can be told.
    """
    sums, stamped, faults = _stamped(artifact)
    recipe = _find_recipe(artifact, stamped)
    layout = Layout.of(recipe)
    if layout.n_images > _MOST_SHARDS * layout.images_per_shard:
        raise ArtifactError(f"{artifact.folder} claims {layout.n_images:,} images. {artifact.remedy}")
    if not artifact.name.endswith(name_hash(recipe)) or (stamped is not None and stamped != recipe):
        faults.append(Fault("the recipe is not the one that named the folder", range(layout.n_images)))
    known = {RECIPE: sha256(canonical_json(recipe).encode()), PROMPTS: str(recipe["prompts"])}
    shards = plan_shards(layout)
    files = {shard.file for shard in shards}
    if sums and sums.keys() != {RECIPE, PROMPTS, _MANIFEST, _VIRTUAL} | files:
        faults.append(Fault("the stamp lists other files than such a cache has"))
    others = {name: digest for name, digest in (sums | known).items() if name not in files}
    faults += _compare_files(artifact, others, layout.n_images)
    listed = _listed(artifact, layout)
    if not artifact.finished:
        shards = [shard for shard in shards if shard.file in listed]
    bad, good = _compare(artifact, shards, listed | sums)
    present = {path.name for path in artifact.folder.iterdir() if not path.name.startswith(".")}
    own = {"stamp.json", PROMPTS, RECIPE, _MANIFEST, _VIRTUAL, *files}
    foreign = sorted(name for name in present - own if not name.endswith(".tmp"))
    faults += bad + [Fault(f"{name} does not belong to it: move it elsewhere") for name in foreign]
    return Findings(recipe, faults, good, foreign)


def _stamped(artifact: Artifact) -> tuple[dict[str, str], Mapping[str, Any] | None, list[Fault]]:
    """The sha256 of each file and the recipe as the stamp tells them, and what is wrong with the stamp."""
    try:
        stamp = artifact.stamp
    except ArtifactError:
        return {}, None, [Fault("stamp.json is not as it was written")] if artifact.finished else []
    return {name: entry["sha256"] for name, entry in stamp["files"].items()}, stamp["recipe"], []


def _find_recipe(artifact: Artifact, stamped: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The recipe in the stamp or beside it, whichever named the folder."""
    recipes = [] if stamped is None else [stamped]
    with suppress(ArtifactError):
        recipes.append(read_recipe(artifact))
    named = (recipe for recipe in recipes if artifact.name.endswith(name_hash(recipe)))
    return next(named, None) or (recipes[0] if recipes else read_recipe(artifact))


def _compare_files(artifact: Artifact, sums: Mapping[str, str], n_images: int) -> list[Fault]:
    """What is wrong with the files beside the shards; without its prompts, no image is known."""
    faults = []
    for name in sorted(sums):
        images = range(n_images if name == PROMPTS else 0)
        if not artifact.holds(name):
            faults.append(Fault(f"{name} is missing", images))
        elif hash_file(artifact.file(name)) != sums[name]:
            faults.append(Fault(f"{name} has changed", images))
    return faults


def _listed(artifact: Artifact, layout: Layout) -> dict[str, str]:
    """The sha256 of every shard that an unharmed line of the manifest names."""
    manifest = artifact.file(_MANIFEST)
    lines = manifest.read_bytes().split(b"\n") if manifest.is_file() else []
    shards = [shard for line in lines if (shard := _from_line(line, layout)) is not None]
    return {shard.file: shard.sha256 for shard in shards}


def _compare(artifact: Artifact, shards: Iterable[Shard], sums: Mapping[str, str]) -> tuple[list[Fault], list[Shard]]:
    faults, good = [], []
    for shard in shards:
        path, images = artifact.file(shard.file), range(shard.first_image, shard.stop)
        if not artifact.holds(shard.file):
            faults.append(Fault(f"{shard.file} is missing", images))
        elif shard.file not in sums:
            faults.append(Fault(f"{shard.file} is in no intact list", images))
        elif hash_file(path) != sums[shard.file]:
            faults.append(Fault(f"{shard.file} has changed", images))
        else:
            good.append(replace(shard, sha256=sums[shard.file]))
    return faults, good


def keep_only(artifact: Artifact, shards: Iterable[Shard]) -> None:
    """Make a damaged cache an unfinished one that holds these shards; hold its lock."""
    artifact.unseal()
    write_atomically(artifact.file(_MANIFEST), b"".join(shard.line() for shard in shards))


def _cut_torn_line(manifest: Path) -> None:
    """Remove what a writer that was killed left of a line, so that the next one starts on its own."""
    if manifest.exists():
        with open(manifest, "rb+") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - 4096))  # no line is as long
            tail = handle.read()
            handle.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def _virtual(layout: Layout, shards: Sequence[Shard]) -> memoryview:
    """One file in which any HDF5 tool sees all shards as whole datasets."""
    total = shards[-1].stop
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        for name, field in layout.fields(1).items():
            if name == "images/ends":
                continue  # counts from the beginning of its own shard
            per_image, *shape = field.shape
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            # h5py's own create_virtual_dataset stores the time and ends bit-identity
            settings.set_obj_track_times(False)
            for shard in shards:
                rows = (shard.images * per_image, *shape)
                place = h5py.h5s.create_simple((total * per_image, *shape))
                place.select_hyperslab((shard.first_image * per_image, *[0] * len(shape)), rows)
                settings.set_virtual(place, shard.file.encode(), name.encode(), h5py.h5s.create_simple(rows))
            group, _, leaf = name.partition("/")
            space = h5py.h5s.create_simple((total * per_image, *shape))
            kind = h5py.h5t.py_create(field.dtype)
            h5py.h5d.create(file.require_group(group).id, leaf.encode(), kind, space, settings)
    return buffer.getbuffer()

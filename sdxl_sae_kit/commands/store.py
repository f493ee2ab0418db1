"""`artifacts list`, `verify` and `gc`: what the store holds, whether it is intact, and what is only in the way."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from sdxl_sae_kit.amounts import counted, human_bytes
from sdxl_sae_kit.artifacts import DELETING, UNFINISHED, Artifact, Store
from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.commands.options import add_store, add_verb
from sdxl_sae_kit.errors import ArtifactError

VERIFY = "Every byte of the store is read. Exit code 1 if anything has changed."
GC = """
Lists what is only in the way, with its size, and deletes it with --delete only. That is: what is of an older format
than this kit reads; and what was left unfinished and no process is writing. The same call of the same kit would go on
there, so that is deleted with --delete --unfinished only.

A finished result that this kit reads is never listed, whether or not another was made from it: a study or a report is
the end of a line, and a cache or an SAE without users may be asked for again. Nor is anything of a newer format,
anything damaged (see verify), a link to another folder, or labels.
"""


def add(verbs: Any) -> None:
    """Declare the verbs."""
    artifacts = verbs.add_parser("artifacts", help="what the store holds").add_subparsers(
        required=True, metavar="COMMAND"
    )
    add_store(add_verb(artifacts, "list", _list, "every artifact, finished or not, with its size"))
    add_store(add_verb(artifacts, "verify", _verify, "hash every finished artifact again", VERIFY))
    gc = add_verb(artifacts, "gc", _gc, "find what is unused, and delete it if asked", GC, "sdxl-sae-kit artifacts gc")
    gc.add_argument("--delete", action="store_true", help="delete what is of an older format")
    gc.add_argument("--unfinished", action="store_true", help="with --delete: what no call is to go on with, too")
    add_store(gc)


def _existing(folder: Path | None) -> Store:
    store = Store.at(folder)
    if not store.root.is_dir() and (folder is not None or store.root.exists()):  # the usual one may not be made yet
        raise ArtifactError(f"There is no folder {store.root}. Give the path of a store, or leave --store out.")
    return store


def _told(artifact: Artifact, **more: Any) -> dict[str, Any]:
    return {"folder": str(artifact.folder), "name": artifact.name, "kind": artifact.kind, **more}


def _list(options: argparse.Namespace) -> Answer:
    store = _existing(options.store)
    rows = [_told(each, finished=each.finished, bytes=each.nbytes) for each in store.artifacts()]
    return Answer(repr(store), {"store": str(store.root), "artifacts": rows})


def _verify(options: argparse.Namespace) -> Answer:
    from tqdm import tqdm

    store = _existing(options.store)
    finished = [artifact for artifact in store.artifacts() if artifact.finished]
    faults = {each.folder: _fault(each) for each in tqdm(finished, "verify", unit="artifact", disable=None)}
    rows = [_told(each, intact=not faults[each.folder], fault=faults[each.folder] or None) for each in finished]
    lines = [
        f"FAULTY  {row['kind']}/{row['name']}: {row['fault']}"
        if row["fault"]
        else f"intact  {row['kind']}/{row['name']}"
        for row in rows
    ]
    n, n_faulty = len(finished), sum(not row["intact"] for row in rows)
    failure = None
    if n_faulty:
        failure = ArtifactError(f"{n_faulty} of {n} finished artifacts in {store.root} are not what they were.")
    else:
        lines.append(f"{n} of {n} finished artifacts in {store.root} are intact.")
    return Answer("\n".join(lines), {"store": str(store.root), "artifacts": rows}, failure)


def _fault(artifact: Artifact) -> str:
    """What is wrong with it; nothing if it is empty."""
    from sdxl_sae_kit.cache import verify as verify_cache

    try:
        (verify_cache if artifact.kind == "activations" else Artifact.verify)(artifact)
    except (ArtifactError, OSError) as error:
        return str(error)
    return ""


def _gc(options: argparse.Namespace) -> Answer:
    store = _existing(options.store)
    rows, kept = [], []
    if options.delete:
        for halfway in store.root.glob(f"*/*{DELETING}"):  # of a process that was killed over it
            shutil.rmtree(halfway, ignore_errors=True)
    for artifact in store.unused():
        if not (why := artifact.why_unused):  # somebody has finished it, or goes on with it, since it was listed
            continue
        row = _told(artifact, why=why, bytes=_all_bytes(artifact.folder), deleted=False)
        if options.delete and (why != UNFINISHED or options.unfinished):
            try:
                artifact.remove()
                row["deleted"] = True
            except ArtifactError as error:
                kept.append(str(error))
        rows.append(row)
    total = human_bytes(sum(row["bytes"] for row in rows))
    lines = [f"{row['why']:12} {human_bytes(row['bytes']):>9}  {row['kind']}/{row['name']}" for row in rows]
    lines.append(f"Unused in {store.root}: {counted(len(rows), 'artifacts')}, {total}. {_advice(options, rows)}")
    failure = ArtifactError(f"{counted(len(kept), 'artifacts')} stayed. {' '.join(kept)}") if kept else None
    return Answer("\n".join(lines), {"store": str(store.root), "unused": rows}, failure)


def _advice(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    if not options.delete:
        return "Nothing is deleted without --delete."
    resumable = 0 if options.unfinished else sum(row["why"] == UNFINISHED for row in rows)
    stayed = f" {resumable} unfinished stayed: the same call goes on there. --unfinished deletes them too."
    return f"{sum(row['deleted'] for row in rows)} deleted.{stayed if resumable else ''}"


def _all_bytes(folder: Path) -> int:
    """Bytes of all files in it, half-written ones too."""
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in found)

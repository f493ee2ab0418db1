"""Labels: what people call the features of one SAE, kept as an append-only file of JSON lines that git can merge.

A line, once written, is never changed; a new line for the same latent replaces what was said before, and a line without
text withdraws it. The format is the section "labels" of artifacts/README.md.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol, SupportsIndex, runtime_checkable

from sdxl_sae_kit.artifacts import Artifact, Store, explain_unwritable, slug
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import sync_folder

VERSION = 1
LONGEST = 500  # characters
NOT_A_LABEL = (KitError, ValueError, KeyError, TypeError)
"""What `Label.parse` raises, whatever a line holds."""


@runtime_checkable
class OfAnSAE(Protocol):
    """An artifact about one SAE, such as FeatureStats."""

    @property
    def sae(self) -> str:
        """The SAE's name."""

    @property
    def d_sae(self) -> int:
        """How many latents it has."""

    @property
    def artifact(self) -> Artifact:
        """Where it is kept."""


@dataclass(frozen=True)
class Label:
    """What one person said of one latent at one time; `text` None withdraws what was said before."""

    feature: int
    text: str | None
    author: str
    time: datetime

    def line(self) -> bytes:
        """The label as it stands in the file, newline included."""
        record = {
            "version": VERSION,
            "feature": self.feature,
            "text": self.text,
            "author": self.author,
            "time": self.time.isoformat(timespec="microseconds"),
        }
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Label:
        """The label on a line; what it raises where there is none is listed in `NOT_A_LABEL`."""
        record = json.loads(line)
        if record["version"] != VERSION:
            raise ValueError(f"it has version {record['version']}, and this kit reads version {VERSION}")
        time = datetime.fromisoformat(record["time"])
        if time.tzinfo is None:
            raise ValueError("its time has no time zone")
        text = record["text"]
        return cls(
            _latent(record["feature"]),
            None if text is None else _tidy(text),
            str(record["author"]),
            time.astimezone(UTC),
        )


class LabelStore:
    """The labels of one SAE, in `<store>/labels/<sae name>.jsonl`; several people and processes may write at once.

    The newest time wins and, of equal times, the later line: so git may merge two people's lines in any order.

    >>> labels = LabelStore.of(stats)                 # doctest: +SKIP
    >>> labels.set(17, "red, round")                  # doctest: +SKIP
    >>> labels.get(17)                                # doctest: +SKIP
    'red, round'
    """

    def __init__(self, file: Path, d_sae: int | None = None) -> None:
        self.file = Path(file)
        self.d_sae = d_sae

    @classmethod
    def of(cls, stats: OfAnSAE | str, store: Path | str | None = None) -> LabelStore:
        """The labels of the SAE that has this name or that `stats` are of; by default in the store of `stats`.

        Raises:
            ArtifactError: the name cannot name a file.
        """
        name, beside = (stats, None) if isinstance(stats, str) else (stats.sae, stats.artifact.folder.parent.parent)
        if not name or name != slug(name):
            raise ArtifactError(
                f"Labels are kept in a file named after their SAE, and {name!r} cannot name one. Pass the SAE's name."
            )
        d_sae = None if isinstance(stats, str) else stats.d_sae
        return cls(Store.at(store or beside).root / "labels" / f"{name}.jsonl", d_sae)

    def set(self, feature: SupportsIndex, text: str, *, author: str | None = None) -> Label:
        """Name a latent, as `author` (by default the user logged in).

        Raises:
            KitError: the text is empty or longer than 500 characters, or the SAE has no such latent (how many it has is
                known where the labels were opened for its statistics).
        """
        latent = _latent(feature)
        if self.d_sae is not None and latent >= self.d_sae:
            raise KitError(f"No latent {latent} in {self.file.stem}; it has 0 to {self.d_sae - 1:,}.")
        return self._append(latent, _tidy(text), author)

    def withdraw(self, feature: SupportsIndex, *, author: str | None = None) -> Label:
        """Take a latent's label back; its history stays.

        Raises:
            KitError: it has none.
        """
        if self.get(feature) is None:
            raise KitError(f"Latent {_latent(feature)} has no label that could be withdrawn.")
        return self._append(_latent(feature), None, author)

    def get(self, feature: SupportsIndex) -> str | None:
        """The latent's label, or None."""
        return self.all().get(_latent(feature))

    def all(self) -> dict[int, str]:
        """Every labelled latent and its label, by latent."""
        newest = {label.feature: label for label in self.history()}
        return {feature: label.text for feature, label in sorted(newest.items()) if label.text is not None}

    def history(self, feature: SupportsIndex | None = None) -> list[Label]:
        """All that was ever said of one latent, or of all, oldest first.

        Raises:
            ArtifactError: a line of the file is not a label.
        """
        lines = self._read().split(b"\n")
        labels = [self._parse(line, number) for number, line in enumerate(lines[:-1], start=1) if line.strip()]
        labels += _unless_torn(lines[-1])
        chosen = [label for label in labels if feature is None or label.feature == _latent(feature)]
        return sorted(chosen, key=lambda label: label.time)  # a stable sort: equal times keep the order of the file

    def __repr__(self) -> str:
        return f"LabelStore({str(self.file)!r})"

    def _read(self) -> bytes:
        return self.file.read_bytes() if self.file.exists() else b""

    def _parse(self, line: bytes, number: int) -> Label:
        try:
            return Label.parse(line)
        except NOT_A_LABEL as cause:
            raise ArtifactError(
                f"Line {number} of {self.file} is not a label ({cause}). "
                "If git left a conflict there, keep the lines of both sides and delete its marks."
            ) from cause

    def _append(self, feature: int, text: str | None, author: str | None) -> Label:
        with self._locked() as descriptor:
            said = self.history(feature)
            # A clock that runs behind a colleague's must not make a new label lose against the old one its author saw.
            earliest = said[-1].time + timedelta(microseconds=1) if said else datetime.min.replace(tzinfo=UTC)
            label = Label(feature, text, author or _user(), max(datetime.now(UTC), earliest))
            line = label.line()
            self._mend_last_line(descriptor)
            if os.write(descriptor, line) < len(line):
                raise OSError(
                    errno.ENOSPC, f"no room for the label of latent {feature}; it was not saved", str(self.file)
                )
            os.fsync(descriptor)
            sync_folder(self.file.parent)
        return label

    def _mend_last_line(self, descriptor: int) -> None:
        """End a last line that lacks its newline, or cut what a killed writer left of one."""
        *_, tail = (content := self._read()).split(b"\n")
        if tail and _unless_torn(tail):
            os.write(descriptor, b"\n")
        elif tail:
            os.ftruncate(descriptor, len(content) - len(tail))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with explain_unwritable(self.file.parent.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _unless_torn(line: bytes) -> list[Label]:
    """The label on a line without newline: complete, or nothing, since no beginning of a JSON object is itself JSON."""
    try:
        return [Label.parse(line)]
    except NOT_A_LABEL:
        return []


def _latent(feature: SupportsIndex) -> int:
    number = operator.index(feature)
    if isinstance(feature, bool) or number < 0:
        raise KitError(f"A latent is an integer from 0 on, not {feature!r}.")
    return number


def _tidy(text: str) -> str:
    if not isinstance(text, str):
        raise KitError(f"A label is a text, not {text!r}. To take a label back, withdraw it.")
    tidy = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not tidy:
        raise KitError("A label needs some text. To take a label back, withdraw it.")
    if len(tidy) > LONGEST:
        raise KitError(f"A label has at most {LONGEST} characters, and this one has {len(tidy)}. Shorten it.")
    if any("\ud800" <= character <= "\udfff" for character in tidy):
        raise KitError(
            f"The label {tidy!r} holds half a character (a lone surrogate), which no file can keep. Type it anew."
        )
    return tidy


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"

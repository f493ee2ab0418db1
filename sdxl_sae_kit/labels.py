"""Labels: what people call the features of one SAE, kept as an append-only file of JSON lines that git can merge.

A line, once written, is never changed; a new line for the same latent replaces what was said before, a line without
text withdraws it, and an undo names the line that no longer counts. The format is the section "labels" of
artifacts/README.md.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsIndex, TypeVar, runtime_checkable

from sdxl_sae_kit.artifacts import Artifact, Store, explain_unwritable, slug
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import sync_folder
from sdxl_sae_kit.label_agreement import Agreement, agreement
from sdxl_sae_kit.label_csv import read_rows, write_csv
from sdxl_sae_kit.label_lines import (
    LONGEST,
    NOT_A_LINE,
    Label,
    LabelTest,
    NewerLineError,
    Said,
    Undo,
    after,
    free_time,
    latent,
    parse,
    tidy,
    tidy_author,
    tidy_confidence,
    tidy_counts,
    tidy_evidence,
    tidy_tags,
)

__all__ = ["LONGEST", "Label", "LabelStore", "LabelTest", "Undo"]

_Line = TypeVar("_Line", Label, LabelTest)

_OWN_FILE = re.compile(r"(?<=-[0-9a-f]{8})_\w+$")
"""What may follow an SAE's name where some labels of it have a file of their own."""


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


def check_stats(caller: str, stats: object) -> None:
    """Refuse what is no statistics of an SAE. Raises KitError."""
    if not isinstance(stats, OfAnSAE):
        kind = type(stats).__name__
        raise KitError(f"{caller} takes FeatureStats, such as FeatureStats.measure(sae, cache), not a {kind}.")


class LabelStore:
    """The labels of one SAE, in `<store>/labels/<sae name>.jsonl`; several people and processes may write at once.

    `LabelStore(Path("mine.jsonl"), d_sae)` is of any other file; d_sae, the number of latents, may be left out.

    The newest time wins and, of equal times, the later line: so git may merge two people's lines in any order. Whatever
    reads the file raises ArtifactError where a line of it is none of a label file, or a newer kit's.

    >>> labels = LabelStore.of(stats)                                       # doctest: +SKIP
    >>> labels.set(17, "red, round", tags=("colour",), confidence=0.8)      # doctest: +SKIP
    >>> labels.get(17)                                                      # doctest: +SKIP
    'red, round'
    """

    def __init__(self, file: Path, d_sae: int | None = None, sae: str | None = None) -> None:
        self.file = Path(file)
        self.d_sae, self.sae = d_sae, sae
        self._known = b"", Said(())

    @classmethod
    def of(cls, stats: OfAnSAE | str, store: Path | str | None = None) -> LabelStore:
        """The labels of the SAE that has this name or that `stats` are of; by default in the store of `stats`.

        A name may go on after the SAE's: `…-0123abcd_automatic` is a file of its own for some labels of that SAE.

        Raises:
            ArtifactError: the name cannot name a file.
            KitError: `stats` are something else.
        """
        if not isinstance(stats, str):
            check_stats("LabelStore.of", stats)
        name, beside = (stats, None) if isinstance(stats, str) else (stats.sae, stats.artifact.folder.parent.parent)
        if not name or name != slug(name):
            raise ArtifactError(
                f"Labels are kept in a file named after their SAE, and {name!r} cannot name one. Pass the SAE's name."
            )
        d_sae = None if isinstance(stats, str) else stats.d_sae
        of_sae = _OWN_FILE.sub("", name)
        return cls(Store.at(store or beside).root / "labels" / f"{name}.jsonl", d_sae, of_sae)

    # Saying --------------------------------------------------------------------------------------------------------

    def set(
        self,
        feature: SupportsIndex,
        text: str,
        *,
        tags: Iterable[str] = (),
        confidence: float | None = None,
        evidence: Mapping[str, Any] | None = None,
        author: str | None = None,
    ) -> Label:
        """Name a latent, as `author` (by default the user logged in).

        Args:
            feature: the latent.
            text: 1 to 500 characters.
            tags: each 1 to 50 characters on one line, without a semicolon.
            confidence: how sure the author is, 0 to 1.
            evidence: what the author was shown, as a small dictionary that JSON can hold, such as
                {"shown": "top by max", "images": [3, 17]}.
            author: who says so.

        Raises:
            KitError: one of these is not as described, or the SAE has no such latent (how many it has is known where
                the labels were opened for its statistics).
        """
        said = Label(self._latent(feature), tidy(text), _author(author), datetime.now(UTC),
                     tidy_tags(tags), tidy_confidence(confidence), tidy_evidence(evidence))  # fmt: skip
        return self._say(said)

    def suggest(self, feature: SupportsIndex, text: str, *, evidence: Mapping[str, Any], author: str) -> Label | None:
        """Name a latent that nobody has named; where somebody has, also just now, their word stays and this is None.

        Raises:
            KitError: as for `set`.
        """
        said = Label(self._latent(feature), tidy(text), _author(author), datetime.now(UTC),
                     evidence=tidy_evidence(evidence))  # fmt: skip
        with self._locked() as descriptor:
            return None if said.feature in self._said().newest else self._add(descriptor, said)

    def withdraw(self, feature: SupportsIndex, *, author: str | None = None) -> Label:
        """Take a latent's label back; its history stays.

        Raises:
            KitError: it has none.
        """
        if self.get(feature) is None:
            raise KitError(f"Latent {latent(feature)} has no label that could be withdrawn.")
        return self._say(Label(latent(feature), None, _author(author), datetime.now(UTC)))

    def undo(self, author: str | None = None) -> Label:
        """Take back this author's last change of any label, a withdrawal too; once more takes back the one before it.

        Returns what the latent is called now; its `text` is None where nothing is left. What others said in the
        meantime stays.

        Raises:
            KitError: the author has changed nothing that could be undone.
        """
        author = _author(author)
        with self._locked() as descriptor:
            mine = [label for label in self._said().standing if label.author == author]
            if not mine:
                raise KitError(f"No change by {author} in {self.file.name} is left to undo. Name another author.")
            undone = Undo(mine[-1].feature, mine[-1].time, author, datetime.now(UTC))
            self._append(descriptor, undone.line())
        stands = [label for label in self._said().standing if label.feature == undone.feature]
        return _copy(stands[-1]) if stands else Label(undone.feature, None, author, undone.time)

    def add_test(
        self,
        feature: SupportsIndex,
        text: str,
        *,
        right_active: int,
        n_active: int,
        right_inactive: int,
        n_inactive: int,
        evidence: Mapping[str, Any] | None = None,
        author: str | None = None,
    ) -> LabelTest:
        """Save what a test of the label `text` gave: how many of the active and inactive images were told rightly.

        Raises:
            KitError: more are right than were shown, or a kind was not shown at all.
        """
        counts = tidy_counts(right_active, n_active, right_inactive, n_inactive)
        test = LabelTest(self._latent(feature), tidy(text), *counts, _author(author), datetime.now(UTC),
                         tidy_evidence(evidence))  # fmt: skip
        with self._locked() as descriptor:
            self._append(descriptor, test.line())
        return test

    # Reading -------------------------------------------------------------------------------------------------------

    def get(self, feature: SupportsIndex) -> str | None:
        """The latent's label, or None."""
        newest = self.latest(feature)
        return newest.text if newest else None

    def latest(self, feature: SupportsIndex) -> Label | None:
        """The latent's label with its tags, author and all; None where it has none."""
        newest = self._said().newest.get(latent(feature))
        return newest and _copy(newest)

    def all(self) -> dict[int, str]:
        """Every labelled latent and its label, by latent."""
        return {feature: label.text for feature, label in self._said().newest.items() if label.text is not None}

    def history(self, feature: SupportsIndex | None = None) -> list[Label]:
        """All that was ever said of one latent, or of all, oldest first, also what was undone since."""
        chosen = None if feature is None else latent(feature)
        return [
            _copy(line) for line in self._said().lines if isinstance(line, Label) and chosen in (None, line.feature)
        ]

    def tests(self, feature: SupportsIndex | None = None) -> list[LabelTest]:
        """All tests of one latent's labels, or of all, oldest first; each says which text was tested."""
        chosen = None if feature is None else latent(feature)
        lines = [line for line in self._said().lines if isinstance(line, LabelTest)]
        return [_copy(line) for line in lines if chosen in (None, line.feature)]

    def agreement(self, by: Literal["text", "tags"] = "text") -> Agreement:
        """Cohen's kappa of every two authors, over the features that both labelled.

        Of each author what they said last counts. Texts are the same if they differ only in case; with `by="tags"` the
        sets of tags are compared, which suits free texts better: those rarely coincide.

        Raises:
            KitError: `by` is neither.
        """
        if by not in ("text", "tags"):
            raise KitError(f"agreement: by is 'text' or 'tags', not {by!r}.")
        newest = {(label.author, label.feature): label for label in self._said().standing}
        said: dict[str, dict[int, str]] = {}
        for (author, feature), label in newest.items():
            word = (label.text or "") if by == "text" else "; ".join(sorted(label.tags))
            if label.text and word:
                said.setdefault(author, {})[feature] = word.casefold()
        return agreement(said, by)

    # CSV -----------------------------------------------------------------------------------------------------------

    def to_csv(self, path: Path | str) -> None:
        """Write the current labels as a CSV file in UTF-8 with the columns feature, text, tags (`a; b`), confidence,
        author and time.

        A cell that a spreadsheet would take for a formula gets an apostrophe before it, which `read_csv` takes off.

        Raises:
            KitError: the file cannot be written.
        """
        write_csv(Path(path), self._said().newest.values())

    def read_csv(self, path: Path | str) -> list[Label]:
        """Add the labels of a CSV file that are not here yet, and return those added.

        The columns feature and text are needed; tags, confidence, author and time may be missing or empty, and then
        the user logged in says it now. A row changed in a spreadsheet with its old author and time left in counts as
        said by that author just after that time; if somebody has said something newer, that stays.

        Raises:
            KitError: the file is not UTF-8 or not CSV, or a row is no label; it is named, and nothing is added.
        """
        rows = read_rows(Path(path), user(), self.d_sae)
        with self._locked() as descriptor:
            newest, added = self._said().newest, []
            history: dict[int, list[Label]] = {}
            for known in self.history():
                history.setdefault(known.feature, []).append(known)
            for label, timed in rows:
                before = history.setdefault(label.feature, [])
                same = [known for known in before if known.content == label.content]
                if newest.get(label.feature) in same:
                    continue  # it stands
                if timed and any(known.author == label.author and known.time >= label.time for known in same):
                    continue  # its author said so then or later
                before.append(replace(label, time=free_time(label, before)) if timed else after(label, before))
                added.append(before[-1])
            self._append(descriptor, b"".join(label.line() for label in added))
        return added

    # The file ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"LabelStore({str(self.file)!r})"

    def _latent(self, feature: SupportsIndex) -> int:
        number = latent(feature)
        if self.d_sae is not None and number >= self.d_sae:
            raise KitError(f"No latent {number} in {self.file.stem}; it has 0 to {self.d_sae - 1:,}.")
        return number

    def _said(self) -> Said:
        content, (known, said) = self._read(), self._known
        if content != known:  # a gallery asks for every card
            if not (content.startswith(known) and known.endswith(b"\n")):  # more than lines added
                known, said = b"", Said(())
            *whole, last = content[len(known) :].split(b"\n")
            numbered = enumerate(whole, start=known.count(b"\n") + 1)
            read = [self._parse(line, number) for number, line in numbered if line.strip()]
            self._known = content, Said(said.lines + read + _unless_torn(last))
        return self._known[1]

    def _read(self) -> bytes:
        return self.file.read_bytes() if self.file.exists() else b""

    def _parse(self, line: bytes, number: int) -> Label | Undo | LabelTest:
        try:
            return parse(line)
        except NewerLineError as cause:
            raise ArtifactError(f"Line {number} of {self.file} {cause}. Update the kit to read it.") from cause
        except NOT_A_LINE as cause:
            raise ArtifactError(
                f"Line {number} of {self.file} is not a label ({cause}). "
                "If git left a conflict there, keep the lines of both sides and delete its marks."
            ) from cause

    def _say(self, label: Label) -> Label:
        with self._locked() as descriptor:
            return self._add(descriptor, label)

    def _add(self, descriptor: int, label: Label) -> Label:
        label = after(label, self.history(label.feature))
        self._append(descriptor, label.line())
        return label

    def _append(self, descriptor: int, lines: bytes) -> None:
        self._mend_last_line(descriptor)
        if os.write(descriptor, lines) < len(lines):
            raise OSError(errno.ENOSPC, "no room for what was said of the labels; it was not saved", str(self.file))
        os.fsync(descriptor)
        sync_folder(self.file.parent)

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
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _unless_torn(line: bytes) -> list[Label | Undo | LabelTest]:
    """What a line without newline holds: all of it, or nothing, as no beginning of a JSON object is itself JSON."""
    try:
        return [parse(line)]
    except NOT_A_LINE:
        return []


def _copy(line: _Line) -> _Line:
    """The line with evidence of its own, so that who changes it changes nothing that is kept."""
    return replace(line, evidence=tidy_evidence(line.evidence))


def _author(name: str | None) -> str:
    return tidy_author(user() if name is None or name == "" else name)


def user() -> str:
    """Who is logged in: the author where none is named."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return "unknown"

"""The lines of a label file: what was said of a latent, what a test of it gave, and what was undone.

The format is the section "labels" of artifacts/README.md.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from numbers import Real
from typing import Any, SupportsIndex

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.errors import KitError

VERSION = 2
READABLE = (1, 2)
"""Version 1 had labels only, without tags, confidence and evidence."""
LONGEST = 500  # characters of a label
LONGEST_TAG = 50
MOST_EVIDENCE = 100_000  # bytes
NOT_A_LINE = (KitError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What `parse` raises, whatever a line holds."""
_INSTANT = timedelta(microseconds=1)
LAST_YEAR = 9998  # datetime ends with the next
_COUNTS = ("right_active", "n_active", "right_inactive", "n_inactive")
_Z = 1.959963984540054  # 97.5 % of a normal distribution lies below


class NewerLineError(ValueError):
    """A line that a newer kit wrote."""


@dataclass(frozen=True)
class Label:
    """What one person said of one latent at one time; `text` None withdraws what was said before."""

    feature: int
    text: str | None
    author: str
    time: datetime
    """In UTC."""
    tags: tuple[str, ...] = ()
    confidence: float | None = None
    """How sure the author is, 0 to 1; None: not said."""
    evidence: Mapping[str, Any] | None = field(default=None, hash=False)
    """What the author was shown, such as {"shown": "top by max", "images": [3, 17]}."""

    @property
    def content(self) -> tuple[str | None, tuple[str, ...], float | None]:
        """What was said, whoever said it: text, tags, confidence."""
        return self.text, self.tags, self.confidence

    def line(self) -> bytes:
        """The label as it stands in the file, newline included."""
        return _line(
            "label",
            feature=self.feature,
            text=self.text,
            tags=list(self.tags),
            confidence=self.confidence,
            evidence=self.evidence,
            author=self.author,
            time=written(self.time),
        )


@dataclass(frozen=True)
class Undo:
    """One person takes back their own change of a latent's label, which then counts as never made."""

    feature: int
    undoes: datetime
    """The time of that change."""
    author: str
    time: datetime

    def line(self) -> bytes:
        """The undo as it stands in the file, newline included."""
        return _line(
            "undo",
            feature=self.feature,
            undoes=written(self.undoes),
            author=self.author,
            time=written(self.time),
        )


@dataclass(frozen=True)
class LabelTest:
    """How well somebody who knew only a label's text told images on which the latent fires from others."""

    feature: int
    text: str
    """The label that was tested."""
    right_active: int
    """Pictures with the latent active that were said to show the label."""
    n_active: int
    """Of so many that were shown."""
    right_inactive: int
    """Pictures with the latent inactive that were said not to show it."""
    n_inactive: int
    """Of so many that were shown."""
    author: str
    """The person, or the name of the judge."""
    time: datetime
    evidence: Mapping[str, Any] | None = field(default=None, hash=False)
    """What was shown: the statistics' name and the images."""

    @property
    def n(self) -> int:
        """How many pictures were shown."""
        return self.n_active + self.n_inactive

    @property
    def balanced_accuracy(self) -> float:
        """(right active / active + right inactive / inactive) / 2, 0 to 1; 0.5 is chance."""
        return (self.right_active / self.n_active + self.right_inactive / self.n_inactive) / 2

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the balanced accuracy: Newcombe's hybrid of the two classes' Wilson score intervals.

        With 10 + 10 pictures it covers the truth 95 % of the time on average over all pairs of true rates, and 88 %
        for the worst of them.
        """
        shares = self.right_active / self.n_active, self.right_inactive / self.n_inactive
        bounds = _wilson(self.right_active, self.n_active), _wilson(self.right_inactive, self.n_inactive)
        low, high = (
            math.hypot(*(share - bound[side] for share, bound in zip(shares, bounds, strict=True))) / 2
            for side in (0, 1)
        )
        return max(self.balanced_accuracy - low, 0.0), min(self.balanced_accuracy + high, 1.0)

    def row(self) -> dict[str, object]:
        """The test as a row of a table."""
        low, high = self.interval
        return {
            "latent": self.feature,
            "label": self.text,
            "tested by": self.author,
            "balanced accuracy": f"{html.short(self.balanced_accuracy)} [{html.short(low)}, {html.short(high)}]",
            "active right": f"{self.right_active} of {self.n_active}",
            "inactive right": f"{self.right_inactive} of {self.n_inactive}",
        }

    def line(self) -> bytes:
        """The test as it stands in the file, newline included."""
        return _line(
            "test",
            feature=self.feature,
            text=self.text,
            right_active=self.right_active,
            n_active=self.n_active,
            right_inactive=self.right_inactive,
            n_inactive=self.n_inactive,
            evidence=self.evidence,
            author=self.author,
            time=written(self.time),
        )

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"balanced accuracy {self.balanced_accuracy:.2f} (Newcombe's 95 % interval {low:.2f} to {high:.2f}; chance "
            f"0.50): {self.right_active} of {self.n_active} active and {self.right_inactive} of {self.n_inactive} "
            f"inactive images right, by {self.author}"
        )


def parse(line: bytes) -> Label | Undo | LabelTest:
    """What a line holds; what it raises where it holds nothing of this is listed in `NOT_A_LINE`."""
    record = json.loads(line)
    version = record["version"]
    if isinstance(version, int) and version > VERSION:
        raise NewerLineError(f"has version {version}, and this kit reads versions 1 and {VERSION}")
    if version not in READABLE:
        raise ValueError(f"it has version {version}, and there are versions 1 and {VERSION}")
    said: dict[str, Any] = {
        "feature": latent(record["feature"]), "author": tidy_author(record["author"]), "time": read_time(record["time"])
    }  # fmt: skip
    match record.get("kind", "label"):
        case "label":
            text = record["text"]
            return Label(
                text=None if text is None else tidy(text),
                tags=tidy_tags(record.get("tags", ())),
                confidence=tidy_confidence(record.get("confidence")),
                evidence=tidy_evidence(record.get("evidence")),
                **said,
            )
        case "undo":
            return Undo(undoes=read_time(record["undoes"]), **said)
        case "test":
            said |= zip(_COUNTS, tidy_counts(*(record[name] for name in _COUNTS)), strict=True)
            return LabelTest(text=tidy(record["text"]), evidence=tidy_evidence(record.get("evidence")), **said)
    raise ValueError(f"it is of the kind {record['kind']!r}, which this kit does not know")


class Said:
    """What a file holds, oldest first."""

    def __init__(self, lines: Iterable[Label | Undo | LabelTest]) -> None:
        self.lines = sorted(lines, key=lambda line: line.time)  # stable: equal times keep the order of the file

    @cached_property
    def standing(self) -> list[Label]:
        """What was said and not undone."""
        undone = {(line.feature, line.author, line.undoes) for line in self.lines if isinstance(line, Undo)}
        labels = [line for line in self.lines if isinstance(line, Label)]
        return [label for label in labels if (label.feature, label.author, label.time) not in undone]

    @cached_property
    def newest(self) -> dict[int, Label]:
        """Every labelled latent's label, by latent."""
        newest = {label.feature: label for label in self.standing}
        return {feature: label for feature, label in sorted(newest.items()) if label.text is not None}


def after(label: Label, before: Iterable[Label]) -> Label:
    """The label, said after all of these: a clock that runs behind a colleague's must not make it lose against them."""
    times = [known.time + _INSTANT for known in before]
    return replace(label, time=max([datetime.now(UTC), *times]))


def free_time(label: Label, before: Iterable[Label]) -> datetime:
    """The label's time or the next at which its author said nothing of the latent: author and time name one line."""
    taken, time = {known.time for known in before if known.author == label.author}, label.time
    while time in taken:
        time += _INSTANT
    return time


def read_time(text: str) -> datetime:
    """The time in UTC. Raises ValueError for a time without a zone, KitError for one too late."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("its time has no time zone")
    return _early(time.astimezone(UTC))


def latent(feature: SupportsIndex) -> int:
    """The latent's number. Raises KitError for anything else."""
    try:
        number = -1 if isinstance(feature, bool) else operator.index(feature)
    except TypeError:
        number = -1
    if number < 0:
        whole = isinstance(feature, float) and feature.is_integer() and feature >= 0
        hint = f" Pass {feature:.0f}." if whole else ""  # pandas makes floats of integers
        raise KitError(f"A latent is an integer from 0 on, not {feature!r}.{hint}")
    return number


def tidy(text: str) -> str:
    """A label's text as it is kept. Raises KitError where it is empty, too long or no text."""
    if not isinstance(text, str):
        raise KitError(f"A label is a text, not {text!r}. To take a label back, withdraw it.")
    tidied = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not tidied:
        raise KitError("A label needs some text. To take a label back, withdraw it.")
    if len(tidied) > LONGEST:
        raise KitError(f"A label has at most {LONGEST} characters, and this one has {len(tidied)}. Shorten it.")
    return whole_characters(tidied)


def tidy_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags as they are kept: stripped, each once. Raises KitError for a tag that is empty, too long or holds a `;`."""
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise KitError(f"Tags are several texts, such as ('colour',), not {tags!r}. Put them in a tuple.")
    tidied = []
    for tag in tags:
        stripped = tag.strip() if isinstance(tag, str) else ""
        if not stripped or len(stripped) > LONGEST_TAG or any(mark in stripped for mark in ";\n\r"):
            raise KitError(
                f"A tag is 1 to {LONGEST_TAG} characters on one line without a semicolon, and {tag!r} is not. Mend it."
            )
        tidied.append(whole_characters(stripped))
    return tuple(dict.fromkeys(tidied))


def tidy_confidence(confidence: float | None) -> float | None:
    """A confidence as it is kept. Raises KitError unless it is None or from 0 to 1."""
    if confidence is None:
        return None
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or not 0 <= confidence <= 1:
        raise KitError(f"A label's confidence is a number from 0 (a guess) to 1 (certain), not {confidence!r}.")
    return float(confidence)


def tidy_evidence(evidence: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Evidence as it is kept, that is, as JSON gives it back. Raises KitError where it is no small JSON object."""
    if evidence is None:
        return None
    try:
        kept = json.dumps(dict(evidence), ensure_ascii=False, allow_nan=False, default=operator.index).encode()
    except (TypeError, ValueError) as cause:
        raise KitError(
            f"A label's evidence is a dictionary that JSON can hold, and this one is not: {cause}. "
            "Give names and numbers of images, not the images."
        ) from None
    if len(kept) > MOST_EVIDENCE:
        raise KitError(
            f"A label's evidence has at most {MOST_EVIDENCE:,} bytes as JSON, this one {len(kept):,}. Shorten it."
        )
    return dict(json.loads(kept))


def tidy_author(name: str) -> str:
    """An author's name. Raises KitError where it is no text or holds half a character."""
    if not isinstance(name, str):
        raise KitError(f"An author is named by a text, not {name!r}. Pass a name.")
    return whole_characters(name)


def whole_characters(text: str) -> str:
    """The text. Raises KitError if it holds half a character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise KitError(
            f"The text {text!r} holds half a character (a lone surrogate), which no file can keep. Type it anew."
        )
    return text


def tidy_counts(right_active: int, n_active: int, right_inactive: int, n_inactive: int) -> tuple[int, int, int, int]:
    """The counts. Raises KitError unless both classes had pictures and no more of them are right than were shown."""
    right_active, n_active, right_inactive, n_inactive = (
        whole_number("A test's count", number, least=0)
        for number in (right_active, n_active, right_inactive, n_inactive)
    )
    if not (right_active <= n_active and right_inactive <= n_inactive and n_active and n_inactive):
        raise KitError(
            f"A test needs pictures of both kinds and cannot have more right than shown; {right_active} of {n_active} "
            f"active and {right_inactive} of {n_inactive} inactive were given. Count anew."
        )
    return right_active, n_active, right_inactive, n_inactive


def _line(kind: str, **told: object) -> bytes:
    return json.dumps({"version": VERSION, "kind": kind, **told}, ensure_ascii=False).encode() + b"\n"


def written(time: datetime) -> str:
    """The time as it stands in a file. Raises KitError for one too late."""
    return _early(time).isoformat(timespec="microseconds")


def _early(time: datetime) -> datetime:
    """The time, if one can still speak after it; so whatever is written can be read and answered."""
    if time.year > LAST_YEAR:
        raise KitError(f"A label's time is at most in the year {LAST_YEAR}, not {time.isoformat()}. Mend it.")
    return time


def _wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share."""
    share, weight = right / n, _Z**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return centre - half, centre + half

"""Labels as CSV, to edit in a spreadsheet.

The format is the section "labels" of artifacts/README.md.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.label_lines import (
    NOT_A_LINE,
    Label,
    latent,
    read_time,
    tidy,
    tidy_author,
    tidy_confidence,
    tidy_tags,
    written,
)

COLUMNS = ("feature", "text", "tags", "confidence", "author", "time")
"""The first two are needed."""
_FORMULA = "[=+\\-@＝＋－＠\t\r\n]"  # a spreadsheet runs a cell that begins so
_SHOWN = 200  # characters of a first row that are told
_Number = TypeVar("_Number", int, float)


def write_csv(path: Path, labels: Iterable[Label]) -> None:
    """Write the labels with the columns `COLUMNS`; what a spreadsheet would run gets an apostrophe before it.

    Raises:
        KitError: the file cannot be written.
    """
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(COLUMNS)
    for label in labels:
        sure = "" if label.confidence is None else repr(label.confidence)
        told = [label.text or "", "; ".join(label.tags), sure, label.author]
        table.writerow([label.feature, *map(_harmless, told), written(label.time)])
    try:
        write_atomically(path, file.getvalue().encode("utf-8-sig"))
    except (OSError, ValueError) as cause:  # ValueError: the path has no last part, such as "/"
        raise KitError(
            f"The labels cannot be written to {path} ({getattr(cause, 'strerror', None) or cause}). "
            "Pass the path of a file, such as labels.csv, in a folder that exists."
        ) from None


def read_rows(path: Path, author: str, d_sae: int | None) -> list[tuple[Label, bool]]:
    """The labels of a CSV file, and of each whether it came with a time; `author` said those that name nobody.

    Raises:
        KitError: the file cannot be read, or a row is no label of one of `d_sae` latents.
    """
    read = []
    for number, row in enumerate(_table(path), start=2):
        try:
            read.append(_from_row(row, author))
        except NOT_A_LINE as cause:
            raise KitError(f"Row {number} of {path} is no label ({cause}). Mend it; nothing was added.") from None
        feature = read[-1][0].feature
        if d_sae is not None and feature >= d_sae:
            raise KitError(f"Row {number} of {path} names latent {feature}, and there are {d_sae:,}.")
    return read


def _table(path: Path) -> list[dict[str | Any, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(table)
    except OSError as cause:
        raise KitError(f"{path} cannot be read ({cause.strerror}). Pass the path of a CSV file.") from None
    except (UnicodeDecodeError, csv.Error) as cause:
        raise KitError(f"{path} cannot be read as CSV in UTF-8 ({cause}). Save it as such.") from None
    found = table.fieldnames or ()
    if missing := [column for column in COLUMNS[:2] if column not in found]:
        semicolons = any(";" in (name or "") for name in found)
        advice = "Separate cells by commas, not semicolons" if semicolons else "Name them in its first row"
        raise KitError(
            f"{path} has no column {' and no column '.join(missing)}; its columns are {str(list(found))[:_SHOWN]}. "
            f"{advice}."
        )
    return rows


def _from_row(row: Mapping[str | Any, Any], author: str) -> tuple[Label, bool]:
    if None in row or None in row.values():
        raise ValueError("it has more or fewer cells than the first row")
    cells = {column: re.sub(f"^'(?='*{_FORMULA})", "", cell) for column, cell in row.items()}
    sure, time = (cells.get(column, "").strip() for column in ("confidence", "time"))
    label = Label(
        latent(_number(int, "feature", cells["feature"], "an integer such as 17")),
        tidy(cells["text"]),
        tidy_author(cells.get("author") or author),
        read_time(time) if time else datetime.now(UTC),
        tidy_tags(tag for tag in cells.get("tags", "").split(";") if tag.strip()),
        tidy_confidence(_number(float, "confidence", sure, "a number such as 0.8")) if sure else None,
    )
    return label, bool(time)


def _harmless(cell: str) -> str:
    return "'" + cell if re.match(f"'*{_FORMULA}", cell) else cell


def _number(kind: type[_Number], column: str, cell: str, wanted: str) -> _Number:
    try:
        return kind(cell)
    except ValueError:
        raise ValueError(f"its {column} is {wanted}, not {cell!r}") from None

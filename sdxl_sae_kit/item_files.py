"""Files of edits in RIEBench's published format: JSON in UTF-8, a list of records or an object id → record.

A record has `id`, `editing_type_id` ("1" to "9"), `original_prompt` and `editing_prompt` (what changes stands in
[brackets]), `editing_instruction`, `original_gsam_prompt` and `editing_gsam_prompt`, which say what to find on the two
pictures. Other fields are passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_sae_kit.errors import PromptError, did_you_mean
from sdxl_sae_kit.masks import shortened

RESULT = "sdxl-sae-kit riebench"
"""The format of what `RIEBench.write_json` writes."""
LARGEST_FILE = 64 * 2**20
FIELDS = (
    "id", "editing_type_id", "original_prompt", "editing_prompt", "editing_instruction", "original_gsam_prompt",
    "editing_gsam_prompt",
)  # fmt: skip
_TYPES = [str(number) for number in range(1, 10)]


class Record(NamedTuple):
    """One edit of a file, with brackets stripped."""

    name: str
    type_id: int
    original: str
    edited: str
    original_mask: str
    edited_mask: str
    instruction: str


class _Object(dict[str, Any]):
    """An object of JSON that remembers its keys as they were written, twins too."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.written = [key for key, _ in pairs]


def read_records(path: Path | str) -> list[Record]:
    """The edits of a file, in its order.

    Raises:
        PromptError: there is no such file, it is no JSON in UTF-8, larger than 64 MB or empty, or a record is
            malformed; the message names the item (counted from 1), its id and the field.
    """
    content = _parse(_text_of(Path(path)), path)
    _refuse_twins(content, f"{path}: two items have the id")
    keyed = content.items() if isinstance(content, Mapping) else ((None, record) for record in content)
    records: list[Record] = []
    places: dict[str, int] = {}
    for number, (key, record) in enumerate(keyed, 1):
        try:
            records.append(_record(key, record))
            if (first := places.setdefault(records[-1].name, number)) != number:
                raise PromptError(f"item {first} has the same id. Give each its own.")
        except PromptError as cause:
            raise PromptError(f"Item {number}{_called(key, record)} of the file {path}: {cause}") from None
    if not records:
        raise PromptError(f"{path} holds no items. Write at least one.")
    return records


def _text_of(path: Path) -> str:
    try:
        if not path.is_file():
            raise PromptError(f"There is no file {path}. Give the path of a JSON file.")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise PromptError(f"{path} has {size:,} bytes; files of up to {LARGEST_FILE:,} are read. Split it.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise PromptError(f"{path} is not UTF-8 (byte {cause.start}: {cause.reason}). Save it as UTF-8.") from None
    except OSError as cause:
        raise PromptError(f"{path} cannot be read ({cause.strerror}). Give a file that can.") from None


def _parse(text: str, path: Path | str) -> Any:
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as cause:
        raise PromptError(f"{path} is not JSON ({cause}). Mend it there.") from None
    if not isinstance(content, list | Mapping):
        raise PromptError(f"{path} holds {shortened(content)}. Write a list of records, or an object id → record.")
    if isinstance(content, Mapping) and content.get("format") == RESULT:
        raise PromptError(f"{path} is a result of riebench, not items. Give the file that holds its items.")
    if isinstance(content, Mapping) and set(FIELDS[1:]) & content.keys():
        raise PromptError(f"{path} holds a single record, not a list of them. Write [ before and ] behind it.")
    return content


def _refuse_twins(content: object, complaint: str) -> None:
    seen: set[str] = set()
    for number, key in enumerate(content.written if isinstance(content, _Object) else (), 1):
        if key in seen:
            raise PromptError(f"{complaint} {shortened(key)}; the second is number {number}. Keep one of them.")
        seen.add(key)


def _called(key: str | None, record: object) -> str:
    name = key if key is not None or not isinstance(record, Mapping) else record.get("id")
    return "" if name is None else f" (id {shortened(name)})"


def _record(key: str | None, record: Any) -> Record:
    if not isinstance(record, _Object):
        raise PromptError(f"it is {shortened(record)}, not an object. Write one with {', '.join(FIELDS)}.")
    _refuse_twins(record, "it has a field twice, namely")
    for field, value in record.items():
        _refuse_foreign(field, value)
    name, type_id = _id(key, record), _type_id(record)
    original, edited = _prompt(record, "original_prompt"), _prompt(record, "editing_prompt")
    # What is added is not on the original picture, nor what is deleted on the edited one: nothing is looked for there.
    return Record(
        name,
        int(type_id),
        original,
        edited,
        _text(record, "original_gsam_prompt", needed=type_id != "2"),
        _text(record, "editing_gsam_prompt", needed=type_id != "3"),
        _text(record, "editing_instruction", needed=False),
    )


def _refuse_foreign(field: str, value: Any) -> None:
    """Python reads some things that are no JSON: NaN, infinities, halves of a surrogate pair."""
    try:
        json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise PromptError(f"its {shortened(field)} is {shortened(value)}, no valid Unicode. Mend it.") from None
    except (ValueError, RecursionError):
        found = shortened(value) if isinstance(value, float) else "nested too deep, or holds NaN or an infinite number"
        raise PromptError(f"its {field} is {found}, which is no JSON. Write a text.") from None


def _id(key: str | None, record: _Object) -> str:
    if key is not None and "id" not in record:
        named: object = key
    else:
        named = _found(record, "id", "a text, different for each item")
    whole = isinstance(named, int) and not isinstance(named, bool)
    if not whole and not (isinstance(named, str) and named.strip()):
        raise PromptError(f"its id is {shortened(named)}. Write a text that is not empty.")
    if key is not None and str(named) != key:
        raise PromptError(f"its id is {shortened(named)}, but its key {shortened(key)}. Write the same for both.")
    return str(named)


def _type_id(record: _Object) -> str:
    found = _found(record, "editing_type_id", '"1" to "9"')
    if isinstance(found, bool) or str(found) not in _TYPES:
        raise PromptError(f'its editing_type_id is {shortened(found)}. Write "1" to "9".')
    return str(found)


def _prompt(record: _Object, field: str) -> str:
    """The text without its brackets, which must open and close in turn; around nothing they only mark a place."""
    text = _text(record, field)
    depth = 0
    for mark in re.findall(r"[\[\]]", text):
        depth += 1 if mark == "[" else -1
        if depth < 0:
            break
    if depth:
        raise PromptError(
            f"its {field} is {shortened(text)}, where a bracket lacks its partner. Write both or neither."
        )
    if not (found := _squeezed(re.sub(r"[\[\]]", "", text))):
        raise PromptError(f"its {field} is {shortened(text)}, which says nothing. Write what the picture shows.")
    return found


def _text(record: _Object, field: str, *, needed: bool = True) -> str:
    found = _found(record, field, "a text")
    if not isinstance(found, str):
        raise PromptError(f"its {field} is {shortened(found)}, not a text. Write one.")
    if needed and not found.strip("~ \t\r\n"):
        raise PromptError(f"its {field} is {shortened(found)}, which says nothing. Write what the picture shows.")
    return _squeezed(found)


def _found(record: _Object, field: str, wanted: str) -> Any:
    if field not in record:
        others: Iterable[str] = [name for name in record if name not in FIELDS]
        raise PromptError(f"it has no {field}. Write {wanted}.{did_you_mean(field, others)}")
    return record[field]


def _squeezed(text: str) -> str:
    return " ".join(text.split())

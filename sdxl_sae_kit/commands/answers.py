"""What a command says when it is done: text for people, or one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError

_NO_NUMBER = "–"


@dataclass(frozen=True)
class Answer:
    """The same facts twice, and what went wrong although there is an answer."""

    text: str
    """Ends with a line that names what was made, if anything was."""
    told: Mapping[str, Any]
    failure: KitError | None = None

    def to_json(self) -> str:
        """One JSON object; what is no finite number is null."""
        return json.dumps(_plain(self.told), indent=1, allow_nan=False, ensure_ascii=False)


def of_artifact(artifact: Artifact, text: str, **told: Any) -> Answer:
    """What was made in one artifact, its folder as the last line."""
    named = {"folder": str(artifact.folder), "name": artifact.name, "kind": artifact.kind}
    return Answer(f"{text}\n{artifact.folder}".lstrip("\n"), {**named, **told})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    if not rows:
        return ""
    texts = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in texts)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "[{}]".format(", ".join(map(_text, value)))
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _NO_NUMBER
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """The same in values that JSON has: numbers of NumPy become Python's, what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)

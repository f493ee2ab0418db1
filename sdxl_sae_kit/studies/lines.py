"""Results of a study, one JSON line for each of its units, in a file that a kill at any moment leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import explain_full


def open_study(folder: Path | str, study: str, call: str) -> Artifact:
    """The finished study of this kind in a folder; `call` is what makes one.

    Raises:
        ArtifactError: there is none, or it is of another kind.
    """
    artifact = Artifact.open(folder, "studies")
    if (found := artifact.recipe.get("study", "something else")) != study:
        raise ArtifactError(f"{artifact.name} is a study of {found}, not of {study}. Call {call}.")
    return artifact


class Lines(Mapping[str, dict[str, Any]]):
    """Results by the name of their unit, in the order in which they were added.

    A line counts when it is whole: what a kill left of the last one is cut off before the next is added.
    """

    def __init__(self, artifact: Artifact, name: str) -> None:
        self._path = artifact.file(name)
        self._found: dict[str, dict[str, Any]] = {}
        text = self._path.read_bytes() if self._path.exists() else b""
        self._whole = text.rfind(b"\n") + 1
        for number, line in enumerate(text[: self._whole].splitlines(), 1):
            try:
                unit, result = json.loads(line)
                self._found[unit] = result
            except (ValueError, TypeError, RecursionError):
                raise ArtifactError(f"{self._path}: line {number} is no result. {artifact.remedy}") from None

    def __getitem__(self, unit: str) -> dict[str, Any]:
        return self._found[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, unit: str, result: Mapping[str, Any]) -> None:
        """Add a unit's result; it is on the disk when this returns."""
        try:
            line = json.dumps([unit, result], allow_nan=False).encode() + b"\n"
        except ValueError:
            raise KitError(
                f"A number of {unit} is not finite, so it is not kept: what judges or targets give must be finite "
                "numbers for every picture. Mend that and call again; what was measured before is kept."
            ) from None
        with explain_full(self._path), open(self._path, "ab") as file:
            file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._found[unit] = dict(result)

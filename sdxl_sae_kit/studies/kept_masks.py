"""Masks of a benchmark's items, asked once of a segmenter and kept for every later call with the same pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Bool

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.items import Item
from sdxl_sae_kit.judges import Pictures
from sdxl_sae_kit.segmenters import Segmenter, Shot, Side, find_masks
from sdxl_sae_kit.studies.lines import Lines

FILE = "masks.jsonl"
_SIDES: tuple[Side, Side] = ("original", "edited")

Mask = Bool[np.ndarray, "_y _x"]


class KeptMasks:
    """The masks of items on the pictures of their two prompts: those that are kept, and for others the segmenter's."""

    def __init__(self, artifact: Artifact, segmenter: Segmenter, n_items: int) -> None:
        self._artifact, self._segmenter, self._n_items = artifact, segmenter, n_items
        if artifact.finished:
            artifact.check(FILE)

    @contextmanager
    def open(self) -> Iterator[KeptMasks]:
        """Hold what is not finished for writing, and finish it once every item is there."""
        if self._artifact.finished:
            self._lines = Lines(self._artifact, FILE)
            yield self
            return
        with self._artifact.lock():
            self._lines = Lines(self._artifact, FILE)
            yield self
            if len(self._lines) == self._n_items:
                self._artifact.seal(facts={"items": self._n_items})

    def of(self, items: Sequence[Item], originals: Pictures, edited: Pictures) -> list[tuple[Mask, Mask] | str]:
        """Both masks of each item, or why there are none."""
        new = [at for at, item in enumerate(items) if item.name not in self._lines]
        if new:
            asked = [items[at] for at in new]
            shots = [
                [
                    Shot(item.name, side, _prompt(item, side), item.seed, pictures[at])
                    for at, item in zip(new, asked, strict=True)
                ]
                for side, pictures in zip(_SIDES, (originals, edited), strict=True)
            ]
            for item, found in zip(asked, find_masks(self._segmenter, asked, *shots), strict=True):
                told = (
                    {"failed": found} if isinstance(found, str) else dict(zip(_SIDES, map(_packed, found), strict=True))
                )
                self._lines.add(item.name, told)
        return [self._read(self._lines[item.name]) for item in items]

    def _read(self, told: Any) -> tuple[Mask, Mask] | str:
        try:
            return str(told["failed"]) if "failed" in told else (_unpacked(told["original"]), _unpacked(told["edited"]))
        except (ValueError, TypeError, KeyError):
            path = self._artifact.file(FILE)
            raise ArtifactError(f"{path} holds what is no mask. {self._artifact.remedy}") from None


def _prompt(item: Item, side: str) -> str:
    return item.original if side == "original" else item.edited


def _packed(mask: Mask) -> dict[str, Any]:
    """As JSON: its shape, and its bits row by row, the first in the highest bit of the first byte."""
    return {"shape": list(mask.shape), "bits": base64.b64encode(np.packbits(mask).tobytes()).decode()}


def _unpacked(told: dict[str, Any]) -> Mask:
    height, width = told["shape"]
    bits = np.frombuffer(base64.b64decode(told["bits"], validate=True), dtype=np.uint8)
    return np.unpackbits(bits, count=height * width).astype(bool).reshape(height, width)

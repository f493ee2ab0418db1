"""Masks of a benchmark's items, asked once of a segmenter and kept for every later call with the same pictures."""

from __future__ import annotations

import base64
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Bool

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.items import Item
from sdxl_sae_kit.judges import Pictures
from sdxl_sae_kit.segmenters import GivenMasks, Segmenter, Shot, Side, find_masks
from sdxl_sae_kit.studies.lines import Lines

FILE = "masks.jsonl"
_SIDES: tuple[Side, Side] = ("original", "edited")

Mask = Bool[np.ndarray, "_y _x"]
Found = tuple[Mask, Mask] | str
"""Both masks of an item, or why there are none."""


class KeptMasks:
    """The masks of items on the pictures of their two prompts: those that are kept, and for others the segmenter's.

    Kept are masks, and that there is nothing to find. What a segmenter refused is asked again in the next call, and
    until then the artifact stays unfinished. Several studies may add to it at once: what is there first counts.
    """

    def __init__(self, artifact: Artifact, segmenter: Segmenter, n_items: int) -> None:
        self._artifact, self._segmenter, self._n_items = artifact, segmenter, n_items
        if artifact.finished:
            artifact.check(FILE)
        self._lines = Lines(artifact, FILE)

    def of(self, items: Sequence[Item], originals: Pictures, edited: Pictures) -> list[Found]:
        """Both masks of each item, or why there are none.

        Raises:
            KitError: the segmenter refused all items it was asked about, two or more, and for the same reason, so that
                it is no item's fault; nothing of it is kept.
        """
        refused: dict[str, Found] = {}
        if new := [at for at, item in enumerate(items) if item.name not in self._lines]:
            found = self._ask([items[at] for at in new], originals[new], edited[new])
            refused = {name: told for name, (told, keep) in found.items() if not keep}
            self._add({name: told for name, (told, keep) in found.items() if keep})
        return [refused.get(item.name) or self._read(self._lines[item.name]) for item in items]

    def _ask(self, items: Sequence[Item], *pictures: Pictures) -> dict[str, tuple[Found, bool]]:
        """By item, what the segmenter finds, and whether it is to be kept."""
        shots = [
            [
                Shot(item.name, side, _prompt(item, side), item.seed, picture)
                for item, picture in zip(items, each, strict=True)
            ]
            for side, each in zip(_SIDES, pictures, strict=True)
        ]
        listener = _Listener(self._segmenter)
        # what masks made beforehand refuse, they refuse for ever: their name says which they are
        segmenter = self._segmenter if isinstance(self._segmenter, GivenMasks) else listener
        found = find_masks(segmenter, items, *shots)
        listener.complain()
        return {item.name: (told, item.name not in listener.refused) for item, told in zip(items, found, strict=True)}

    def _add(self, found: Mapping[str, Found]) -> None:
        """Write down what is not there yet, and finish once every item is."""
        with self._alone():
            self._lines = Lines(self._artifact, FILE)
            if not self._artifact.finished:
                for name, told in found.items():
                    if name not in self._lines:
                        self._lines.add(name, _written(told))
                if len(self._lines) == self._n_items:
                    self._artifact.seal(facts={"items": self._n_items})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder for a moment; who else wants to add to it waits."""
        with self._artifact.lock(shared=True), open(self._artifact.file(".adding"), "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _read(self, told: Any) -> Found:
        try:
            return str(told["failed"]) if "failed" in told else (_unpacked(told["original"]), _unpacked(told["edited"]))
        except (ValueError, TypeError, KeyError):
            path = self._artifact.file(FILE)
            raise ArtifactError(f"{path} holds what is no mask. {self._artifact.remedy}") from None


class _Listener:
    """A segmenter that remembers which items it was asked about, and which it refused when asked about each alone."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter, self.name = segmenter, segmenter.name
        self.asked: set[str] = set()
        self.refused: dict[str, KitError] = {}

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Mask]:
        self.asked |= {shot.item for shot in shots}
        try:
            return self._segmenter(shots, asked)
        except KitError as error:
            if len(shots) == 1:
                self.refused[shots[0].item] = error
            raise

    def complain(self) -> None:
        """Raise what the segmenter said, if it said the same of everything."""
        errors = {str(error) for error in self.refused.values()}
        if len(errors) == 1 and len(self.refused) == len(self.asked) > 1:
            raise next(iter(self.refused.values()))


def _prompt(item: Item, side: str) -> str:
    return item.original if side == "original" else item.edited


def _written(found: Found) -> dict[str, Any]:
    return {"failed": found} if isinstance(found, str) else dict(zip(_SIDES, map(_packed, found), strict=True))


def _packed(mask: Mask) -> dict[str, Any]:
    """As JSON: its shape, and its bits row by row, the first in the highest bit of the first byte."""
    return {"shape": list(mask.shape), "bits": base64.b64encode(np.packbits(mask).tobytes()).decode()}


def _unpacked(told: dict[str, Any]) -> Mask:
    height, width = told["shape"]
    bits = np.frombuffer(base64.b64decode(told["bits"], validate=True), dtype=np.uint8)
    return np.unpackbits(bits, count=height * width).astype(bool).reshape(height, width)

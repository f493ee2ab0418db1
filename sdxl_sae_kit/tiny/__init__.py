"""tiny-sdxl: a real SDXL pipeline of 3.4 million parameters, the picture world it draws, and its recipe."""

from __future__ import annotations

from pathlib import Path

NAMES = ("tiny-turbo", "tiny-base")
WEIGHTS = Path(__file__).parent / "weights"
"""Holds a diffusers pipeline folder for each of the names, and the judge."""


def weights_folder(name: str) -> Path:
    """Return the embedded diffusers pipeline folder of a tiny model."""
    if name not in NAMES:
        raise KeyError(name)
    return WEIGHTS / name

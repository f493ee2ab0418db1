"""tiny-sdxl: a real SDXL pipeline of 3.4 million parameters, the picture world it draws, and its recipe."""

from __future__ import annotations

from pathlib import Path

NAMES = ("tiny-turbo", "tiny-base")


def weights_folder(name: str) -> Path:
    """Return the embedded diffusers pipeline folder of a tiny model.

    Both names share one folder, because until a distilled U-Net exists they are one model: `tiny-turbo` draws with the
    folder's own scheduler (Euler ancestral, one step, no guidance), `tiny-base` with Euler, more steps and guidance.
    """
    if name not in NAMES:
        raise KeyError(name)
    return Path(__file__).parent / "weights"

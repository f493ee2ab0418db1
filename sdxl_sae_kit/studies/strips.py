"""Strips of pictures: one image as it is, at every dose, and what each condition changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.studies.controls import CONDITIONS
from sdxl_sae_kit.studies.measures import dose_key
from sdxl_sae_kit.studies.pairs import Pairs, Picture

_TILE, _GAP = 88, 4


def columns(doses: Sequence[float]) -> list[str]:
    """What stands in a strip, from left to right."""
    pictures = ["off" if dose == 0 else f"dose {dose:g}" for dose in doses if dose != 1]
    return ["as it is", *pictures, *(f"difference: {condition}" for condition in CONDITIONS)]


def draw_strip(pairs: Pairs, feature: int, doses: Sequence[float]) -> tuple[bytes, float]:
    """A strip of one feature as WebP, and by what its differences are multiplied: the largest of its own is white."""
    pictures = [pairs.pictures[dose_key(feature, dose, "ablated")][1] for dose in doses if dose != 1]
    differences = [_difference(pairs, feature, condition) for condition in CONDITIONS]
    gain = float(1 / max(differences[0].max(), 1e-6))
    tiles = [pairs.clean, *pictures, *(np.clip(each * gain, 0, 1) for each in differences)]
    sheet = Image.new("RGB", (len(tiles) * (_TILE + _GAP) - _GAP, _TILE), "white")
    for place, tile in enumerate(tiles):
        picture = Image.fromarray((np.asarray(tile) * 255).round().astype(np.uint8))
        sheet.paste(picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (place * (_TILE + _GAP), 0))
    return html.to_webp(sheet), gain


def _difference(pairs: Pairs, feature: int, condition: str) -> Picture:
    clean, edited = pairs.pictures[feature, condition]
    return np.asarray(np.abs(edited - clean))

"""What an edit changed between two pictures: a map of it, and how much of it lies inside a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.errors import KitError

TOPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""What the brightest colour of a map may stand for."""


@dataclass(frozen=True)
class Difference:
    """|change| of each pixel: the mean over its three colours of |after − before|, as a share of their full range.

    All numbers are of two images, so they are exact for these and say nothing of others.

    >>> red, black = (Image.new("RGB", (4, 4), colour) for colour in ("red", "black"))
    >>> round(Difference.between(red, black).mean, 3)
    0.333
    """

    change: Float[np.ndarray, "height width"] = field(repr=False)
    mask: Float[np.ndarray, "height width"] | None = field(repr=False)
    """Share of each pixel that is masked, 0 to 1; None for the whole picture."""

    @classmethod
    def between(
        cls, before: Image.Image, after: Image.Image, mask: Float[np.ndarray, "height width"] | None = None
    ) -> Difference:
        """Compare two pictures of one size.

        Raises:
            KitError: their sizes differ.
        """
        if before.size != after.size:
            raise KitError(f"A picture of {before.size} cannot be compared with one of {after.size}: draw both alike.")
        one, other = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (before, after))
        return cls(np.abs(other - one).mean(axis=2) / 255, mask)

    @property
    def mean(self) -> float:
        """Mean |change| over all pixels."""
        return float(self.change.mean())

    def numbers(self) -> dict[str, float | None]:
        """Every number by its name; None where there are no pixels to take it of, or no change to share out."""
        told: dict[str, float | None] = {"mean |change|": self.mean, "largest |change|": float(self.change.max())}
        if self.mask is None:
            return told
        within, total = float((self.change * self.mask).sum()), float(self.change.sum())
        area, pixels = float(self.mask.sum()), self.mask.size
        return told | {
            "mean |change| inside the mask": within / area if area else None,
            "mean |change| outside the mask": (total - within) / (pixels - area) if pixels - area > 1e-9 else None,
            "share of |change| inside the mask": within / total if total else None,
            "share of the picture inside the mask": area / pixels,
        }

    def map(self, top: float) -> Image.Image:
        """Where it changed, one pixel for each: `top` and what exceeds it in the brightest colour, 0 in black."""
        heat = np.clip(self.change / top, 0, 1)
        colours = html.heat_colours(heat) * np.minimum(1, 8 * heat)[..., None]  # the palette begins at purple
        return Image.fromarray(colours.round().astype(np.uint8))


def top_of(differences: list[Difference]) -> float:
    """The least of TOPS that no |change| of these exceeds, so that their maps can be compared."""
    largest = max(float(difference.change.max()) for difference in differences)
    return next(top for top in TOPS if largest <= top)

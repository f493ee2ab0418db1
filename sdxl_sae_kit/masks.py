"""Where on a picture, and how strongly there: masks and maps of any size, pictures and polygons, as shares of tokens.

A map covers the whole picture, whatever its size. It is resized to a hookpoint's grid by area: a token gets the mean of
what it covers, exactly, so that a map of the grid's own size stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from sdxl_sae_kit.errors import EditError

LARGEST = 2**22
"""Numbers in a map; a picture of 2,048 × 2,048 pixels has as many."""
SAMPLES = 16
"""Points along each side of a token that are asked whether they lie in a polygon."""


@dataclass(frozen=True)
class Polygon:
    """A closed outline on the picture; what it crosses an odd number of times to leave lies inside.

    Args:
        points: at least three (x, y), as fractions from 0 to 1 of the picture's width and height, from the upper left.

    Raises:
        EditError: fewer points, or points outside the picture.

    >>> as_mask(Polygon([(0, 0), (0.5, 0), (0.5, 1), (0, 1)]), (2, 2)).tolist()
    [[[1.0, 0.0], [1.0, 0.0]]]
    """

    points: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        found = numbers(self.points)
        if found is None or found.ndim != 2 or found.shape[1] != 2 or not 3 <= len(found) <= LARGEST:
            raise EditError("A polygon has at least three points (x, y), such as [(0, 0), (0.5, 0), (0, 0.5)].")
        if found.min() < 0 or found.max() > 1:
            raise EditError(
                f"A polygon's points are fractions of the picture's width and height, 0 to 1, not {found.min():g} to "
                f"{found.max():g}. Divide pixels by its size."
            )
        # how a frozen dataclass is normalised
        object.__setattr__(self, "points", tuple((float(x), float(y)) for x, y in found))

    def shares(self, grid: tuple[int, int]) -> Bool[np.ndarray, "fine_height fine_width"]:
        """Which points lie inside, of `SAMPLES` along each side of every token."""
        x, y = np.array(self.points).T
        next_x, next_y = np.roll(x, -1), np.roll(y, -1)
        fine_x, fine_y = ((np.arange(SAMPLES * n) + 0.5) / (SAMPLES * n) for n in (grid[1], grid[0]))
        rows = []
        for at in fine_y:
            crosses = (y <= at) != (next_y <= at)
            a, b, c, d = (each[crosses] for each in (x, y, next_x, next_y))
            rows.append(np.searchsorted(np.sort(a + (at - b) * (c - a) / (d - b)), fine_x) % 2 == 1)
        return np.stack(rows)


Where = ArrayLike | Image.Image | Polygon | Sequence[Polygon]
"""A map (height, width) or (image, height, width) of any size, a picture's luminance, or polygons."""


def plain_mask(where: Any) -> Any:
    """A mask as JSON could hold it: a tuple of polygons, or nested tuples of shares from 0 to 1.

    A map with numbers above 1, such as a heat map, is divided by the largest, image by image; one of bytes by 255.

    Raises:
        EditError: it is something else, is too large, or has numbers that are negative or not finite.
    """
    if isinstance(where, Polygon):
        return (where,)
    if isinstance(where, list | tuple) and where and all(isinstance(each, Polygon) for each in where):
        return tuple(where)
    found = numbers(np.asarray(where.convert("L")) / 255 if isinstance(where, Image.Image) else where)
    if found is None or found.size == 0:
        raise EditError(f"where must be a map of finite numbers, a picture or polygons, not {shortened(where)}.")
    if found.ndim not in (2, 3):
        raise EditError(
            f"where has shape {found.shape}, but a mask is (height, width), or (image, height, width) with one for "
            "each image. Pass a colour picture as Image.fromarray(picture)."
        )
    if found.min() < 0:
        raise EditError(f"where has numbers down to {found.min():g}, but shares start at 0. Clip them.")
    largest = found.max(axis=(-2, -1), keepdims=True)
    if getattr(where, "dtype", None) in (np.uint8, torch.uint8) and found.max() > 1:
        largest = np.array(255.0)
    return _plain("where", found / np.maximum(1.0, largest))


def plain_map(name: str, value: Any, example: str) -> Any:
    """A strength as JSON could hold it: a number, or nested tuples of them.

    Raises:
        EditError: it is something else, too large, or not finite.
    """
    found = numbers(value)
    if found is None or found.size == 0 or found.ndim > 3:
        raise EditError(f"{name} must be a finite number or a map of them, {example} not {shortened(value)}.")
    return _plain(name, found)


def numbers(value: Any) -> NDArray[np.float64] | None:
    """A number, list, array or tensor of any device and dtype as an array, or None if it is not finite numbers."""
    try:
        array = np.asarray(value.detach().float().cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):  # a ragged list
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" and np.isfinite(array).all() else None


def as_mask(where: Any, grid: tuple[int, int]) -> Float[Tensor, "image {grid[0]} {grid[1]}"]:
    """The share of each token that a mask covers, 0 to 1; one image stands for all, unless there is one for each.

    Args:
        where: what `steer` takes as `where`, or None for everywhere.
        grid: (height, width) of the hookpoint for this picture.

    Raises:
        EditError: it is no mask.
    """
    if where is None:
        return torch.ones(1, *grid)
    plain = plain_mask(where)
    if isinstance(plain[0], Polygon):
        inside = np.any([polygon.shares(grid) for polygon in plain], axis=0)
        return resized(torch.from_numpy(inside[None].astype(np.float32)), grid)
    maps = torch.from_numpy(np.asarray(plain))
    return resized(maps if maps.ndim == 3 else maps[None], grid)


def as_map(value: Any, grid: tuple[int, int]) -> Float[Tensor, "image height width"]:
    """A strength by image and token; an axis along which it does not vary has length 1."""
    array = torch.from_numpy(np.asarray(value, dtype=np.float32))
    if array.ndim < 2:
        return array.reshape(-1, 1, 1)
    return resized(array if array.ndim == 3 else array[None], grid)


def resized(maps: Float[Tensor, "image height width"], grid: tuple[int, int]) -> Float[Tensor, "image _h _w"]:
    """Each new cell is the mean of what it covers."""
    rows, columns = (_shares(new, old) for new, old in zip(grid, maps.shape[1:], strict=True))
    return (rows @ maps.double() @ columns.T).float()


def covered(mask: Bool[np.ndarray, "_y _x"], grid: tuple[int, int]) -> Bool[np.ndarray, "_height _width"]:
    """Which cells of a grid (height, width) a mask of the whole picture covers by half or more; there may be none.

    >>> covered(np.eye(4, dtype=bool), (2, 2)).tolist()
    [[True, False], [False, True]]
    """
    if mask.shape == grid:
        return mask
    shares = resized(torch.from_numpy(mask.astype(np.float32))[None], grid)[0]
    return np.asarray(shares.numpy() >= 0.5 - 1e-6)  # sums of thirds are not quite a half


def _shares(new: int, old: int) -> Float[Tensor, "{new} {old}"]:
    """How much of each new cell is covered by each old one, in whole units of 1 / (new · old) of the side."""
    starts, others = torch.arange(new)[:, None] * old, torch.arange(old) * new
    overlap = torch.minimum(starts + old, others + new) - torch.maximum(starts, others)
    return overlap.clamp_min(0).double() / old


def _plain(name: str, found: NDArray[np.float64]) -> Any:
    if found.size > LARGEST:
        raise EditError(f"{name} has {found.size:,} numbers, more than {LARGEST:,}. Resize it: a grid has far fewer.")
    return _as_tuples(found.tolist())


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def shortened(value: Any) -> str:
    """What a message says of a value that may be huge."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"

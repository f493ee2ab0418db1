"""Sketches: curves and histograms the size of a word or two, as inline SVG in the colours of the text around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from sdxl_sae_kit import html

WIDTH, HEIGHT = 250, 64
"""Of the drawing area, in pixels; numbers stand below it."""


def curve(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines of (x, y) points from zero up, each over its name; the caption and the alt text give their ends.

    >>> curve("density over steps", {"cond": [(0, 0.1), (1, 0.2)]}).count("<polyline")
    1
    """
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    left, across, top = min(xs), max(max(xs) - min(xs), 1e-12), max(max(ys), 1e-12)
    drawn = [
        _line([((x - left) / across, y / top) for x, y in line], dashed=bool(number))
        for number, line in enumerate(lines.values())
    ]
    ends = "; ".join(
        f"{name}{' (dashed)' if number else ''} {html.short(line[0][1])} … {html.short(line[-1][1])}"
        for number, (name, line) in enumerate(lines.items())
    )
    told = f"{title}, {left:g} to {max(xs):g}: {ends}; highest {html.short(top)}"
    return _figure("".join(drawn), told)


def histogram(title: str, edges: Float[np.ndarray, " bins_and_1"], counts: Int[np.ndarray, " bin"]) -> str:
    """Bars, all equally wide, from the first bin that holds something to the last."""
    full = np.flatnonzero(counts)
    if not full.size:
        return ""
    first, last = int(full[0]), int(full[-1])
    bars = counts[first : last + 1] / counts.max()
    step = WIDTH / len(bars)
    drawn = "".join(
        f'<rect x="{at * step:.1f}" y="{HEIGHT * (1 - bar):.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{HEIGHT * bar:.1f}" fill="currentColor"></rect>'
        for at, bar in enumerate(bars.tolist())
    )
    fullest = int(counts.argmax())
    told = (
        f"{title}, {html.short(float(edges[first]))} to {html.short(float(edges[last + 1]))}; fullest bin "
        f"{html.short(float(edges[fullest]))} to {html.short(float(edges[fullest + 1]))}: {counts.max():,} "
        f"of {counts.sum():,}"
    )
    return _figure(drawn, told)


def _line(points: Sequence[tuple[float, float]], dashed: bool) -> str:
    """A line through points 0..1, with a dot at each."""
    placed = [(f"{x * WIDTH:.1f}", f"{(1 - y) * HEIGHT:.1f}") for x, y in points]
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="currentColor"></circle>' for x, y in placed)
    path, dashes = " ".join(",".join(place) for place in placed), ' stroke-dasharray="5 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"{dashes}></polyline>{dots}'


def _figure(drawn: str, told: str) -> str:
    """A drawing over a line at zero, and what it shows in words, for the eye and for the ear."""
    ground = f'<path d="M0 {HEIGHT}H{WIDTH}" stroke="currentColor" opacity="0.35"></path>'
    size = f'viewBox="-3 -3 {WIDTH + 6} {HEIGHT + 6}" width="{WIDTH + 6}" height="{HEIGHT + 6}"'
    text = html.escape(told)
    return (
        f'<figure><svg {size} role="img" aria-label="{text}">{ground}{drawn}</svg>'
        f"<figcaption>{text}</figcaption></figure>"
    )

"""sketches: what is drawn has the sizes of the numbers, and says them in words."""

from __future__ import annotations

import numpy as np
from reading_html import read_safely

from sdxl_sae_kit import sketches


def test_bars_are_as_high_as_the_counts() -> None:
    counts = np.array([0, 1, 0, 4, 2, 0])
    read = read_safely(sketches.histogram("tokens by z", np.arange(7.0), counts))
    heights = [float(value) for tag, name, value in read.attributes if (tag, name) == ("rect", "height")]
    assert np.allclose(np.array(heights) / heights[2], counts[1:5] / 4, atol=0.01)
    assert read.values("aria-label") == [read.text]
    assert read.text == "tokens by z, 1.00 to 5.00; fullest bin 3.00 to 4.00: 4 of 7"
    assert sketches.histogram("empty", np.arange(7.0), np.zeros(6, int)) == ""


def test_a_line_goes_through_its_points_from_zero_up() -> None:
    read = read_safely(
        sketches.curve("density by step", {"cond": [(0, 0.0), (1, 0.5), (4, 1.0)], "uncond": [(0, 0.25)]})
    )
    points, other = (np.array([pair.split(",") for pair in path.split()], float) for path in read.values("points"))
    assert np.allclose(points[:, 0] / sketches.WIDTH, [0, 0.25, 1], atol=0.01)
    assert np.allclose(1 - points[:, 1] / sketches.HEIGHT, [0, 0.5, 1], atol=0.01)
    assert np.allclose(1 - other[:, 1] / sketches.HEIGHT, [0.25], atol=0.01)
    assert read.text == "density by step, 0 to 4: cond 0.00 … 1.00; uncond (dashed) 0.250 … 0.250; highest 1.00"


def test_a_curve_of_nothing_but_zeros_lies_on_the_ground() -> None:
    read = read_safely(sketches.curve("x", {"cond": [(0, 0.0), (0, 0.0)]}))
    assert set(read.values("cy")) == {f"{sketches.HEIGHT:.1f}"}

"""Masks of any size and kind, against areas computed another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sdxl_sae_kit.errors import EditError
from sdxl_sae_kit.masks import LARGEST, Polygon, as_mask, covered, plain_map, plain_mask, resized

sides = st.integers(1, 12)


@given(sides, sides, sides, sides, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_resizing_takes_the_mean_of_what_a_token_covers(height, width, new_height, new_width, seed):
    maps = torch.from_numpy(np.random.default_rng(seed).random((2, height, width), dtype=np.float32))
    fine = maps.repeat_interleave(new_height, 1).repeat_interleave(new_width, 2)
    expected = fine.reshape(2, new_height, height, new_width, width).mean((2, 4))
    got = resized(maps, (new_height, new_width))
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(got.mean(), maps.mean(), atol=1e-6)  # a mask keeps its area


def test_a_mask_of_the_grids_size_stays_as_it_is():
    mask = torch.rand(7, 5)
    assert torch.equal(as_mask(mask.tolist(), (7, 5))[0], mask)


def test_a_mask_is_a_share_of_each_token():
    assert as_mask(None, (2, 3)).tolist() == [[[1.0] * 3] * 2]
    assert as_mask(np.array([[True, False]]), (1, 1)).item() == 0.5
    assert as_mask(torch.tensor([[0, 1]], dtype=torch.uint8), (1, 2)).tolist() == [[[0.0, 1.0]]]
    heat = np.array([[0.0, 2.0], [8.0, 4.0]])
    assert as_mask(heat, (2, 2)).tolist() == [[[0.0, 0.25], [1.0, 0.5]]]  # of its maximum
    assert as_mask(heat / 10, (2, 2)).numpy() == pytest.approx(heat[None] / 10)  # nothing above 1: as it is
    assert as_mask(np.stack([heat / 8, heat / 16]), (1, 1)).flatten().tolist() == pytest.approx([14 / 32, 14 / 64])


def test_a_pictures_luminance_is_a_mask():
    picture = Image.new("RGB", (40, 20), "black")
    ImageDraw.Draw(picture).rectangle((0, 0, 19, 19), fill="white")
    assert as_mask(picture, (2, 4)).tolist() == [[[1.0, 1.0, 0.0, 0.0]] * 2]
    grey = Image.new("L", (3, 3), 51)
    assert as_mask(grey, (2, 2)).numpy() == pytest.approx(0.2)


def test_an_axis_aligned_polygon_covers_its_tokens_exactly():
    left = Polygon([(0, 0), (0.5, 0), (0.5, 1), (0, 1)])
    assert as_mask(left, (4, 4))[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4
    assert as_mask(left, (1, 1)).item() == 0.5
    both = [left, Polygon([(0.25, 0), (1, 0), (1, 0.5), (0.25, 0.5)])]  # they overlap
    assert as_mask(both, (2, 4))[0].tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_triangle_has_its_area(points, side):
    (a, b), (c, d), (e, f) = points
    area = abs((c - a) * (f - b) - (e - a) * (d - b)) / 2
    got = as_mask(Polygon(points), (side, side))
    assert float(got.mean()) == pytest.approx(area, abs=3 / (16 * side))  # the outline, one sample wide
    assert got.min() >= 0 and got.max() <= 1


def test_a_polygon_in_a_wide_picture_against_pillow():
    points = [(0.1, 0.2), (0.9, 0.1), (0.5, 0.5), (0.8, 0.9), (0.2, 0.8)]
    drawn = Image.new("L", (480, 240))
    ImageDraw.Draw(drawn).polygon([(x * 480, y * 240) for x, y in points], fill=255)
    assert (as_mask(Polygon(points), (8, 16)) - as_mask(drawn, (8, 16))).abs().max() < 0.05


def test_what_crosses_itself_is_outside_where_it_is_crossed_twice():
    twice = [(0, 0), (1, 0), (1, 1), (0, 1)] * 2
    assert as_mask(Polygon(twice), (3, 3)).abs().max() == 0


def test_plain_masks_are_what_json_can_hold_and_stay_as_they_are():
    for where in (np.eye(3), np.ones((2, 3, 4)) * 7, Image.new("L", (4, 2), 128), Polygon([(0, 0), (1, 0), (0, 1)])):
        plain = plain_mask(where)
        assert isinstance(plain, tuple) and plain_mask(plain) == plain
        assert torch.equal(as_mask(plain, (5, 5)), as_mask(where, (5, 5)))


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("left", "map of finite numbers, a picture or polygons, not 'left'"),
        ([[1.0, float("inf")]], "map of finite numbers"),
        ([[1.0], [1.0, 2.0]], "map of finite numbers"),
        ([], "map of finite numbers"),
        (np.zeros((0, 4)), "map of finite numbers"),
        ([[[[1.0]]]], r"shape \(1, 1, 1, 1\), but a mask is \(height, width\)"),
        (1.0, r"shape \(\), but a mask is"),
        ([[-0.5, 1.0]], "numbers down to -0.5, but shares start at 0. Clip them"),
        (np.zeros((2048, 2049)), f"4,196,352 numbers, more than {LARGEST:,}. Resize it"),
    ],
)
def test_what_is_no_mask_is_refused(where, complaint, unchecked_types):
    with pytest.raises(EditError, match=complaint):
        as_mask(where, (4, 4))


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        ([(0, 0), (1, 1)], "at least three points"),
        ([(0, 0, 0)] * 3, "at least three points"),
        ([(0, 0), (1, 0), (0, float("nan"))], "at least three points"),
        ("triangle", "at least three points"),
        ([(0, 0), (64, 0), (0, 64)], "0 to 1, not 0 to 64. Divide pixels by its size"),
        ([(0, 0), (1, 0), (0, -0.1)], "not -0.1 to 1"),
    ],
)
def test_what_is_no_polygon_is_refused(points, complaint, unchecked_types):
    with pytest.raises(EditError, match=complaint):
        Polygon(points)


def test_a_message_does_not_print_a_huge_value():
    with pytest.raises(EditError) as caught:
        plain_map("add[3]", "x" * 10_000, "such as add={17: 2.0},")
    assert len(str(caught.value)) < 400


def test_heat_maps_are_scaled_image_by_image_and_bytes_by_255():
    found = plain_mask(np.stack([np.full((2, 2), 4.0), np.full((2, 2), 10.0), np.full((2, 2), 0.5)]))
    assert np.allclose(np.array(found)[:, 0, 0], [1, 1, 0.5])
    assert np.allclose(plain_mask(np.array([[0, 128]], np.uint8)), [[0, 128 / 255]])
    assert np.allclose(plain_mask(torch.tensor([[0, 128]], dtype=torch.uint8)), [[0, 128 / 255]])


@pytest.mark.parametrize("size, grid", [((64, 64), (8, 8)), ((12, 18), (4, 6)), ((5, 7), (2, 3)), ((3, 3), (8, 8))])
def test_a_token_belongs_where_half_of_it_is_covered(size, grid):
    mask = np.random.default_rng(1).random(size) < 0.5
    fine = mask.repeat(grid[0], axis=0).repeat(grid[1], axis=1)
    cells = fine.reshape(grid[0], size[0], grid[1], size[1]).mean(axis=(1, 3))
    assert np.array_equal(covered(mask, grid), cells >= 0.5)

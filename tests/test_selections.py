"""selections: what is dragged, slid or cleared is what is selected, on every grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_events import drag, draw, leave, move
from PIL import Image

from sdxl_sae_kit.selections import MaskedPicture, SelectablePicture, at_grid, covered

GRID = (4, 6)  # rows, columns


@pytest.fixture
def calls() -> list[np.ndarray]:
    return []


@pytest.fixture
def picture(calls: list[np.ndarray]) -> SelectablePicture:
    made = SelectablePicture(GRID, lambda: calls.append(made.selected.copy()))
    return made


def test_markers_stand_in_the_middle_of_their_tokens(picture: SelectablePicture) -> None:
    (markers,) = picture.figure.data
    for token, (x, y) in enumerate(zip(markers.x, markers.y, strict=True)):
        row, column = divmod(token, GRID[1])
        assert (x, y) == (column + 0.5, row + 0.5)
    assert tuple(picture.figure.layout.yaxis.range) == (GRID[0], 0)  # rows count from the top, as in the image


@pytest.mark.parametrize("kind", ["box", "lasso"])
def test_what_a_drag_encloses_is_selected(picture: SelectablePicture, calls: list[np.ndarray], kind: str) -> None:
    drag(picture.figure, [7, 8, 14], kind)  # rows and columns (1, 1), (1, 2), (2, 2)
    expected = np.zeros(GRID, dtype=bool)
    expected[[1, 1, 2], [1, 2, 2]] = True
    assert np.array_equal(picture.selected, expected)
    assert len(calls) == 1
    assert (picture.rows.value, picture.columns.value) == ((2, 3), (2, 3))


def test_a_drag_around_nothing_and_a_double_click_select_everything(picture: SelectablePicture) -> None:
    drag(picture.figure, [3])
    drag(picture.figure, [])
    assert picture.selected.all()
    drag(picture.figure, [3])
    leave(picture.figure)
    assert picture.selected.all()
    assert (picture.rows.value, picture.columns.value) == ((1, 4), (1, 6))


def test_what_the_page_answers_to_an_outline_changes_nothing(picture: SelectablePicture) -> None:
    drag(picture.figure, [7, 8, 14])
    before = picture.selected.copy()
    drag(picture.figure, [0, 1, 2], kind=None)
    assert np.array_equal(picture.selected, before)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_sliders_select_the_rectangle_that_they_name_and_outline_it(data: st.DataObject) -> None:
    calls: list[int] = []
    picture = SelectablePicture(GRID, lambda: calls.append(1))
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(1, GRID[0])] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(1, GRID[1])] * 2)))
    picture.rows.value, picture.columns.value = (top, bottom), (left, right)
    named = {(row, column) for row in range(top, bottom + 1) for column in range(left, right + 1)}
    assert {(row + 1, column + 1) for row, column in np.argwhere(picture.selected).tolist()} == named
    outlines = picture.figure.layout.selections
    if len(named) == 24:
        assert not outlines
    else:
        (outline,) = outlines
        assert (outline.x0, outline.x1, outline.y0, outline.y1) == (left - 1, right, top - 1, bottom)


def test_the_button_selects_everything_and_replaces_an_outline_of_which_only_the_page_knows(
    picture: SelectablePicture, calls: list[np.ndarray]
) -> None:
    drag(picture.figure, [7])
    sent = []
    picture.figure.observe(lambda change: sent.append(change.new), "_py2js_relayout")
    picture.whole.click()
    assert picture.selected.all()
    assert len(calls) == 2
    outlines = [message["relayout_data"]["selections"] for message in sent if message]
    assert [len(each) for each in outlines] == [1, 0]  # nothing set to nothing would not be sent


def test_a_new_image_leaves_the_selection(picture: SelectablePicture) -> None:
    drag(picture.figure, [7, 8])
    picture.show(Image.new("RGB", (60, 40), "red"), "<p>told</p>")
    assert picture.selected.sum() == 2
    assert picture.figure.layout.images[0].source.startswith("data:image/webp;base64,")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (2, 2), (4, 4), (3, 5), (8, 8), (2, 8)]))
def test_on_another_grid_tokens_count_of_which_half_is_selected(seed: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    selected = rng.random((8, 8)) < rng.random()
    selected[tuple(rng.integers(0, 8, 2))] = True
    fine = np.kron(selected, np.ones((15, 15)))  # 120 is a multiple of all these sides
    shares = np.array([[part.mean() for part in np.split(band, grid[1], axis=1)] for band in np.split(fine, grid[0])])
    expected = shares >= min(0.5, shares.max()) - 1e-6
    assert np.array_equal(at_grid(selected, grid), expected)
    assert at_grid(selected, grid).any()


RECTANGLE = {"type": "rect", "x0": 1, "x1": 4, "y0": 2, "y1": 3}
TRIANGLE = {"type": "path", "path": "M0,0L6,0L0,4Z"}
STROKE = {"type": "path", "path": "M1,0.5L5,0.5"}


@pytest.fixture
def masked(calls: list[np.ndarray]) -> MaskedPicture:
    made = MaskedPicture(GRID, lambda: calls.append(made.mask))
    return made


def test_a_rectangle_covers_its_tokens_in_proportion(masked: MaskedPicture, calls: list[np.ndarray]) -> None:
    draw(masked.figure, RECTANGLE | {"x1": 3.5})
    expected = np.zeros(GRID)
    expected[2, 1:4] = [1, 1, 0.5]
    assert np.array_equal(masked.mask, expected)
    assert len(calls) == 1
    move(masked.figure, 0, x0=6, x1=4)  # turned over
    assert masked.mask[2].tolist() == [0, 0, 0, 0, 1, 1]
    move(masked.figure, 0, x0=-3, x1=-1)  # out of the picture
    assert masked.mask is None and masked.shapes == []
    move(masked.figure, 0, x0=1)  # a page that has not heard of it yet
    assert masked.shapes == []


def test_shapes_add_up_and_can_be_moved_and_taken_away(masked: MaskedPicture) -> None:
    draw(masked.figure, RECTANGLE)
    draw(masked.figure, RECTANGLE, RECTANGLE | {"x0": 3, "x1": 6})
    assert masked.mask.sum() == 5
    move(masked.figure, 1, y0=0, y1=1)
    assert masked.mask[0].tolist() == [0, 0, 0, 1, 1, 1] and masked.mask[2].tolist() == [0, 1, 1, 1, 0, 0]
    masked.remove.click()
    assert masked.mask.sum() == 3
    masked.whole.click()
    assert masked.mask is None


def test_a_click_that_covers_nothing_is_no_shape(masked: MaskedPicture) -> None:
    draw(masked.figure, RECTANGLE)
    draw(
        masked.figure,
        RECTANGLE,
        {"type": "rect", "x0": 2, "x1": 2, "y0": 1, "y1": 1},
        {"type": "path", "path": "M2,2Z"},
    )
    assert len(masked.shapes) == 1 and masked.mask.sum() == 3


def test_a_stroke_is_one_token_wide_and_shown_so(masked: MaskedPicture) -> None:
    draw(masked.figure, STROKE)
    assert masked.mask[0, 1:5].tolist() == [1, 1, 1, 1]
    round_end = np.pi / 8  # of the half token beyond each end
    assert masked.mask[0, 0] == pytest.approx(round_end, abs=0.02)
    assert not masked.mask[1:].any()
    assert masked.shapes[0]["line"]["width"] == 300 / 6


def test_sliders_and_button_do_without_a_mouse(masked: MaskedPicture) -> None:
    masked.columns.value, masked.rows.value = (2, 4), (3, 3)
    assert masked.mask is None
    masked.add.click()
    by_keyboard = masked.mask
    masked.whole.click()
    draw(masked.figure, RECTANGLE)
    assert np.array_equal(masked.mask, by_keyboard)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_closed_path_covers_as_much_as_its_area(seed: int) -> None:
    """A star-shaped outline around a point inside: its area by the shoelace formula."""
    rng = np.random.default_rng(seed)
    angles, radii = np.sort(rng.random(9)) * 2 * np.pi, 0.4 + 1.4 * rng.random(9)
    if np.diff([*angles, angles[0] + 2 * np.pi]).max() > 3:
        return
    x, y = 3 + radii * np.cos(angles), 2 + radii * np.sin(angles)
    path = "M" + "L".join(f"{a},{b}" for a, b in zip(x, y, strict=True)) + "Z"
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert covered([{"type": "path", "path": path}], GRID).sum() == pytest.approx(area, abs=0.15)


def test_half_of_the_picture_below_a_diagonal(masked: MaskedPicture) -> None:
    draw(masked.figure, TRIANGLE)
    assert masked.mask.mean() == pytest.approx(0.5, abs=0.01)
    assert masked.mask[0, 0] == 1 and masked.mask[3, 5] == 0


def test_the_outline_is_where_the_shape_is(masked: MaskedPicture) -> None:
    draw(masked.figure, RECTANGLE)
    drawn = np.asarray(masked.outline(Image.new("RGB", (60, 40), "red")))
    assert drawn[20, 25].tolist() == [255, 255, 255]  # its upper side
    assert drawn[25, 25].tolist() == drawn[5, 5].tolist() == [255, 0, 0]


def test_a_figure_is_opened_only_with_its_image(masked: MaskedPicture) -> None:
    assert masked.figure.comm is None and masked.figure not in masked.children
    masked.show(Image.new("RGB", (60, 40), "red"), "<p>told</p>")
    assert masked.figure.comm is not None and masked.figure in masked.children
    assert masked.figure._widget_layout["images"][0]["source"].startswith("data:image/webp")

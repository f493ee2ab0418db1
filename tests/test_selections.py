"""selections: what is dragged, slid or cleared is what is selected, on every grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_events import drag, leave
from PIL import Image

from sdxl_sae_kit.selections import SelectablePicture, at_grid

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

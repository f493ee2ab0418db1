"""html: strangers' text stays text, pictures travel inside, heat maps lie where they belong."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import SCRIPTS
from PIL import Image
from reading_html import Reader, read_safely

from sdxl_sae_kit import html
from sdxl_sae_kit.errors import KitError

NASTY = [*SCRIPTS, "a & b &lt; &#60;", "<!-- -->", "<?x?>", "\ud83d", "]]>", "$x$"]
texts = st.one_of(
    st.sampled_from(NASTY), st.text(st.characters(exclude_categories=[])), st.text("<>&\"'=/ \0on-!scriptb")
)


def webp(colour: tuple[int, int, int], side: int = 32) -> bytes:
    return html.to_webp(Image.new("RGB", (side, side), colour))


def opened(webp_bytes: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(webp_bytes)).convert("RGB"), dtype=int)


PICTURE = webp((9, 9, 9))


@given(texts)
def test_text_and_attributes_are_read_back_as_they_were_written(text: str) -> None:
    # HTML itself turns CR into LF, and cannot hold control characters, surrogates and non-characters.
    held = html.UNPRINTABLE.sub("�", text)
    reader = read_safely(f'<p title="{html.escape(text)}">{html.escape(text)}</p>')
    assert reader.values("title") == [held]
    assert reader.text == held
    held.encode()


def every_piece(one: str, two: str, three: str) -> str:
    image = html.picture(PICTURE, "image: " + one)
    return html.page(
        one,
        html.grid([html.card(one, two, three, image), html.card(one, None, three, "")]),
        html.figures([(image, one, two)]),
        html.table([{three: one, "b" + three: two}], caption="of " + two),
        html.scale(1.0),
    )


@settings(deadline=None)
@given(texts, texts, texts)
def test_no_text_changes_the_elements_around_it(one: str, two: str, three: str) -> None:
    def elements(reader: Reader) -> list[tuple[str, str]]:
        return [(tag, name) for tag, name, _ in reader.attributes]

    harmless, read = read_safely(every_piece("x", "y", "z")), read_safely(every_piece(one, two, three))
    assert read.tags == harmless.tags
    assert elements(read) == elements(harmless)


def test_a_page_reaches_nothing_and_has_no_ids() -> None:
    page = html.page("two galleries", html.grid([]), html.grid([]))
    assert "id=" not in page
    assert "default-src 'none'" in page
    assert not [address for address in ("http:", "https:", "//", "url(", "@import") if address in page]


def test_a_picture_is_its_bytes_with_its_size() -> None:
    reader = read_safely(html.picture(webp((255, 0, 0), 20), "a red square"))
    assert (reader.values("width"), reader.values("height"), reader.values("alt")) == (["20"], ["20"], ["a red square"])
    assert opened(base64.b64decode(reader.values("src")[0].split(",")[1])).shape == (20, 20, 3)


def test_the_overlay_is_coloured_where_the_map_is_hot_and_grey_elsewhere() -> None:
    heat_map = np.zeros((4, 8), dtype=np.float32)
    heat_map[0, 7] = 2.0  # top right
    drawn = np.asarray(html.overlay(Image.new("RGB", (64, 32), (200, 30, 30)), heat_map, peak=2.0), dtype=int)
    saturation = drawn.max(-1) - drawn.min(-1)
    assert drawn.shape == (32, 64, 3)
    assert saturation[4, 60] > 50
    assert (saturation[:, :40] == 0).all()
    assert (saturation[20:] == 0).all()


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_heat_is_lighter(one: float, two: float) -> None:
    cooler, hotter = (html.heat_colours(np.float32([heat])) @ [0.2126, 0.7152, 0.0722] for heat in sorted((one, two)))
    assert cooler <= hotter + 1e-3


@pytest.mark.parametrize("peak", [0.0, 1.0])
def test_maps_that_are_zero_or_not_finite_draw_no_heat(peak: float) -> None:
    picture = Image.new("RGB", (8, 8), (0, 90, 0))
    plain = np.asarray(html.overlay(picture, np.zeros((2, 2), dtype=np.float32), 1.0))
    broken = np.full((2, 2), np.nan, dtype=np.float32)
    broken[0, 0] = np.inf
    assert np.array_equal(np.asarray(html.overlay(picture, broken, peak)), plain)


@pytest.mark.parametrize(
    ("below", "size", "step", "overlay_at"), [(True, (43, 66), 23, (33, 10)), (False, (20, 135), 46, (10, 33))]
)
def test_a_strip_has_each_picture_next_to_its_overlay(
    below: bool, size: tuple[int, int], step: int, overlay_at: tuple[int, int]
) -> None:
    examples = [
        (webp(colour), np.zeros((2, 2), dtype=np.float32)) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    ]
    drawn = opened(html.strip(examples, peak=1.0, tile=20, below=below))
    assert drawn.shape == (*size, 3)
    assert [int(drawn[10, 10 + step * index].argmax()) for index in range(3)] == [0, 1, 2]
    assert np.ptp(drawn[overlay_at]) < 12 < np.ptp(drawn[10, 10])  # grey, next to a colour


def test_the_same_strip_has_the_same_bytes() -> None:
    example = (webp((10, 200, 30)), np.ones((2, 2), dtype=np.float32))
    assert html.strip([example], 1.0, 20) == html.strip([example], 1.0, 20)


def test_tables_set_numbers_right() -> None:
    table = html.table([{"name": "mid.0", "L0": 9.5, "tokens": 12345, "kept": True}], caption="SAEs")
    number, text = "sae-number", "sae-text"
    classes = read_safely(table).values("class")
    assert classes == ["sae-wide", text, number, number, text, "sae-short", number, number, "sae-short"]
    assert all(text in table for text in ("9.50", "12,345", "True", "<caption>SAEs"))
    assert html.table([]) == ""
    assert read_safely(html.table([], "0 <labels>")).text == "0 <labels>"


def test_an_interval_stands_below_its_number():
    rows = [
        {"of": "a", "AUC": 0.5, "interval": (0.4, 0.61), "n": 3},
        {"of": "b", "AUC": 1.0, "interval": (1.0, 1.0), "n": 4},
    ]
    written = html.table(rows)
    assert "0.500<br>[0.400, 0.610]" in written and "1.00<br>[1.00, 1.00]" in written
    assert written.count("<th") == 3 + 1  # thead begins so too
    assert rows[0]["interval"] == (0.4, 0.61)
    assert html.table([{"AUC": 0.5, "interval": None}]).count("<th ") == 2  # what is no interval keeps its column


def test_pictures_and_captions_come_in_pairs():
    picture = Image.new("RGB", (8, 4))
    shown = html.show_images([picture, picture], ["one", "<b>two"], side=64)
    assert read_safely(shown.markup).values("alt") == ["one", "<b>two"]
    with pytest.raises(KitError, match="one caption per picture; it got 2 and 1 captions"):
        html.show_images([picture, picture], ["one"])

"""Pure functions that turn pictures, numbers and strangers' text into small pieces of safe, self-contained HTML.

Nothing here loads anything from outside, runs a script or uses an `id`, so any number of pieces fit into one document.
Colours are JupyterLab's CSS variables or, in a plain file, the reader's system colours: both follow a dark theme.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.pictures import decode_picture, picture_size

# The brighter six eighths of matplotlib's "inferno" (CC0): lightness only rises, so it reads with any colour blindness.
HEAT = np.array(
    [(85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)],
    dtype=np.float32,
)

GAP = 3
"""Pixels between the tiles of a strip; they are transparent."""

STYLE = """<style>
.sae-kit { --sae-ink: var(--jp-content-font-color1, CanvasText);
  --sae-quiet: var(--jp-content-font-color2, color-mix(in srgb, CanvasText 66%, Canvas));
  --sae-line: var(--jp-border-color2, color-mix(in srgb, CanvasText 18%, Canvas));
  color: var(--sae-ink);
  font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif); }
.sae-fact { white-space: nowrap; }
.sae-kit p, .sae-kit h3, .sae-kit h4, .sae-kit figure { margin: 0; }
.sae-kit h3 { font-size: 15px; font-weight: 600; margin: 0 0 8px; }
.sae-kit h3 .sae-quiet { font-weight: 400; font-size: 13px; }
.sae-kit h4 { font-size: 13px; font-weight: 600; margin: 16px 0 6px; }
.sae-kit p + h3 { margin-top: 6px; }
.sae-kit h3 + p { margin: -4px 0 10px; }
.sae-kit img { display: block; height: auto; border-radius: 3px; }
.sae-quiet { color: var(--sae-quiet); }
.sae-grid { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(274px, 1fr)); padding: 2px 0; }
.sae-card { border: 1px solid var(--sae-line); border-radius: 5px; padding: 7px 8px 8px; min-width: 0;
  background: var(--jp-layout-color1, Canvas);
  break-inside: avoid; }
.sae-card img { width: 100%; }
.sae-card header { display: flex; gap: 8px; align-items: baseline; margin-bottom: 5px; }
.sae-card header * { white-space: nowrap; }
.sae-card header b, .sae-kit td, .sae-fact { font-variant-numeric: tabular-nums; }
.sae-card .sae-name { flex: 1; overflow: hidden; text-overflow: ellipsis; }
.sae-card .sae-fact { color: var(--sae-quiet); font-size: 12px; }
.sae-card:focus-within { outline: 2px solid var(--jp-brand-color1, Highlight); outline-offset: 1px; }
.sae-card [data-latent]:focus { outline: none; }
.sae-live .sae-card, .sae-live [data-latent] { cursor: pointer; }
.sae-live .sae-card:hover, .sae-live .sae-near [data-latent]:hover { border-color: var(--sae-quiet); }
.sae-pair { display: flex; gap: 3px; align-items: flex-start; }
.sae-pair img:first-child { width: 20%; } .sae-pair img:last-child { flex: 1; min-width: 0; }
.sae-near { display: flex; flex-wrap: wrap; gap: 4px 6px; }
.sae-near > * { border: 1px solid var(--sae-line); border-radius: 5px; padding: 1px 7px; max-width: 22em;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sae-sketches { display: flex; flex-wrap: wrap; gap: 14px 28px; margin-top: 12px; }
.sae-sketches svg { display: block; overflow: visible; max-width: 100%; color: var(--sae-ink); }
.sae-sketches figcaption { font-size: 12px; color: var(--sae-quiet); max-width: 260px; margin-top: 3px; }
.sae-columns { display: grid; gap: 12px 24px; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.sae-columns > * { min-width: 0; }
.sae-kit summary { cursor: pointer; font-weight: 600; margin-top: 10px; }
.sae-bar { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; margin: 4px 0 8px; }
.sae-bar label { display: flex; align-items: baseline; white-space: nowrap; max-width: 100%; }
.sae-bar :is(input, select) { font: inherit; color: inherit; background: var(--jp-layout-color1, Canvas);
  border: 1px solid var(--sae-quiet); border-radius: 3px; padding: 3px 6px; margin-left: 6px; }
.sae-bar input { width: 17em; min-width: 0; box-sizing: border-box; }
.sae-kit [hidden] { display: none; }
.sae-examples { display: grid; gap: 12px 10px; grid-template-columns: repeat(auto-fill, minmax(212px, 1fr)); }
.sae-examples figure { max-width: 260px; min-width: 0; break-inside: avoid; }
.sae-examples img { width: 100%; }
.sae-examples figcaption { display: flex; gap: 8px; font-size: 12px; line-height: 1.35; margin-top: 4px;
  overflow-wrap: anywhere; }
.sae-kit table { border-collapse: collapse; font-size: 13px; margin: 0; }
.sae-kit caption { text-align: left; color: var(--sae-quiet); padding: 0 0 4px; }
.sae-kit th, .sae-kit td { text-align: left; vertical-align: baseline; padding: 3px 18px 3px 0; max-width: 46em;
  border-bottom: 1px solid var(--sae-line); background: none; color: inherit; white-space: normal; }
.sae-kit tbody tr:nth-child(n) { background: none; }
.sae-kit th { color: var(--sae-quiet); font-weight: 600; }
.sae-kit table .sae-number { text-align: right; white-space: nowrap; }
.sae-kit table th.sae-number { white-space: normal; }
.sae-kit thead th { vertical-align: bottom; }
.sae-wide { overflow-x: auto; }
.sae-columns + .sae-wide, .sae-wide + .sae-wide { margin-top: 16px; }
.sae-kit table .sae-text { text-align: left; }
.sae-kit table .sae-short { text-align: left; white-space: nowrap; }
.sae-key { font-weight: 400; font-size: 12px; margin-left: 12px; white-space: nowrap; }
.sae-scale { display: inline-block; width: 96px; height: 9px; border-radius: 2px;
  background: linear-gradient(to right, HEAT); }
</style>""".replace("HEAT", ", ".join(f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in HEAT))

TWIN = 'class="sae-twin"'
"""Marks what stands in for widgets, for the report's script to find."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
FIGURE = r"[+−-]?[\d.,]+(e[+−-]?\d+)?"
NUMBER = re.compile(rf"–|nan|{FIGURE}( %)?( \[{FIGURE}, {FIGURE}\])?")
TILES = 512
"""Tiles kept open: at most 43 kB each where 104 pixels wide."""
UNBROKEN = 32
"""Characters up to which a table's text keeps to one line."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def escape(text: object) -> str:
    """The text for an element or quoted attribute, where HTML shows it literally; what HTML cannot hold becomes U+FFFD.

    >>> escape('<b onclick="x">')
    '&lt;b onclick=&quot;x&quot;&gt;'
    """
    return html.escape(UNPRINTABLE.sub("\ufffd", str(text)), quote=True)


def words(text: object) -> str:
    """A stranger's text, escaped, in an element that keeps right-to-left writing from reordering what is around it."""
    return f"<bdi>{escape(text)}</bdi>"


def data_uri(webp: bytes) -> str:
    """WebP bytes as the address of a picture that travels with its page."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")


def picture(webp: bytes, alt: str) -> str:
    """One `<img>` of WebP bytes, with its size, so that the page does not jump, and `alt` for who cannot see it."""
    width, height = picture_size(webp)
    return f'<img src="{data_uri(webp)}" alt="{escape(alt)}" width="{width}" height="{height}">'


def heat_colours(heat: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """Colours 0..255 of heats 0..1, from purple over orange to pale yellow."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(heat, steps, HEAT[:, channel]) for channel in range(3)], axis=-1).astype(np.float32)


_PALETTE = heat_colours(np.linspace(0, 1, 256, dtype=np.float32)).round().astype(np.uint8).tobytes()
_ROOTS = 255 * np.sqrt(np.linspace(0, 1, 256, dtype=np.float32))
_DARK = (20 + 0.38 * np.arange(256)).round().astype(np.uint8)


def overlay(
    thumbnail: Image.Image, heat_map: Float[np.ndarray, "height width"], peak: float, opacity: float = 0.8
) -> Image.Image:
    """The thumbnail in dark grey with the heat map over it: colour and light mean activation and nothing else.

    `heat_map` (H, W) is drawn bilinearly over the whole picture, `peak` shown brightest. Where it is 0 only the picture
    shows; from there the layer grows to `opacity` (0..1) quickly, to show weak activations. What is not finite is 0.
    """
    return _covered(thumbnail, _shades(heat_map, peak, thumbnail.size), opacity)


def _shades(heat_map: Float[np.ndarray, "height width"], peak: float, size: tuple[int, int]) -> Image.Image:
    """Heats 0..255 of this many pixels."""
    heat = np.clip(np.nan_to_num(heat_map, posinf=0, neginf=0) / peak, 0, 1) if peak > 0 else np.zeros_like(heat_map)
    return Image.fromarray((255 * heat).round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _covered(picture: Image.Image, shades: Image.Image, opacity: float) -> Image.Image:
    """The picture in dark grey under the colours of heats 0..255."""
    cover = Image.fromarray((opacity * _ROOTS)[np.asarray(shades)].round().astype(np.uint8))
    dark_grey = Image.fromarray(_DARK[np.asarray(picture.convert("L"))])
    shades.putpalette(_PALETTE)
    return Image.composite(shades.convert("RGB"), dark_grey.convert("RGB"), cover)


def strip(
    examples: Sequence[tuple[bytes, Float[np.ndarray, "height width"]]],
    peak: float,
    tile: int,
    below: bool = True,
    places: int = 1,
    opacity: float = 0.8,
) -> bytes:
    """One WebP picture of several examples (WebP thumbnail, heat map), each thumbnail with its overlay below or beside.

    A tile is `tile` pixels wide and high; `opacity` (0..1) is that of the heat maps. An empty thumbnail is black, and
    room is left for `places` examples. One picture for a whole card takes far fewer bytes than one per example.
    """
    step, across = tile + GAP, max(len(examples), places)
    columns, rows = (across, 2) if below else (2 * across, 1)
    plain, shades = (Image.new(mode, (across * step - GAP, tile)) for mode in ("RGB", "L"))
    for place, (thumbnail, heat_map) in enumerate(examples):
        plain.paste(_tile(thumbnail, tile), (place * step, 0))
        shades.paste(_shades(heat_map, peak, (tile, tile)), (place * step, 0))
    # covered all at once: what a call costs is mostly the calling
    pair = plain.convert("RGBA"), _covered(plain, shades, opacity).convert("RGBA")
    sheet = Image.new("RGBA", (columns * step - GAP, rows * step - GAP))
    for place in range(len(examples)):
        for second, row in enumerate(pair):
            left, top = (place, second) if below else (2 * place + second, 0)
            sheet.paste(row.crop((place * step, 0, place * step + tile, tile)), (left * step, top * step))
    return to_webp(sheet)


@lru_cache(TILES)
def _tile(thumbnail: bytes, size: int) -> Image.Image:
    """A thumbnail so wide and high, black if empty; kept, since many latents share images, and to open it is dear."""
    opened = decode_picture(thumbnail) if thumbnail else Image.new("RGB", (size, size))
    return opened.resize((size, size), Image.Resampling.BILINEAR)


def to_webp(image: Image.Image) -> bytes:
    """The picture as WebP bytes; the same picture always gives the same bytes."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=75, alpha_quality=50, method=0)  # the quickest
    return file.getvalue()


def quiet(text: str) -> str:
    """A line of text that stands back."""
    return f'<p class="sae-quiet">{escape(text)}</p>'


def heading(title: str, body: str) -> str:
    """A title, which may be a stranger's words, over a quiet line of HTML."""
    return f'<h3>{words(title)}</h3><p class="sae-quiet">{body}</p>'


def card(
    title: str,
    name: str | None,
    fact: str,
    body: str,
    latent: int | None = None,
    data: Mapping[str, float] | None = None,
) -> str:
    """A gallery card: title, name (None shows "no label"), one short fact, and `body`, which is HTML already.

    In a `Panel` the title opens `latent`; `data`, by names of letters only, is what a static twin can be sorted by.
    """
    named = words(name) if name is not None else '<span class="sae-quiet">no label</span>'
    middle = f'<span class="sae-name" title="{escape(name or "")}">{named}</span>'
    opens = f' data-latent="{latent}"' if latent is not None else ""
    header = f'<header><b{opens}>{escape(title)}</b>{middle}<span class="sae-fact">{escape(fact)}</span></header>'
    known = "".join(f' data-{key}="{value:.6g}"' for key, value in (data or {}).items())
    return f'<article class="sae-card"{known}>{header}{body}</article>'


def grid(cards: Iterable[str]) -> str:
    """Cards side by side, as many in a row as there is room for."""
    return f'<div class="sae-grid">{"".join(cards)}</div>'


def figures(pictures: Iterable[tuple[str, str, str]]) -> str:
    """Pictures side by side, each (HTML of the picture, a number to show, a caption in a stranger's words)."""
    drawn = (
        f'<figure>{image}<figcaption><b class="sae-fact">{escape(number)}</b>{words(caption)}</figcaption></figure>'
        for image, number, caption in pictures
    )
    return f'<div class="sae-examples">{"".join(drawn)}</div>'


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """A small table with the keys of the first row as its head; columns of numbers stand right, others left.

    An interval, which is a column of pairs of numbers, is written below the numbers of the column before it.

    >>> table([{"hookpoint": "mid.0", "L0": 10}]).count("<td")
    2
    """
    if not rows:
        return quiet(caption) if caption else ""
    rows = _with_intervals(rows)
    numeric = {column for column in rows[0] if all(_is_number(row[column]) for row in rows)}
    kinds = {column: "sae-number" if column in numeric else "sae-text" for column in rows[0]}
    head = "".join(f'<th scope="col" class="{kind}">{escape(column)}</th>' for column, kind in kinds.items())
    body = "".join("<tr>" + "".join(_cell(row[name], kind) for name, kind in kinds.items()) + "</tr>" for row in rows)
    titled = f"<caption>{escape(caption)}</caption>" if caption else ""
    grid = f"<table>{titled}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sae-wide" tabindex="0" role="group" aria-label="{escape(caption or "table")}">{grid}</div>'


def _with_intervals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with every interval behind the number that it is of."""
    written = [dict(row) for row in rows]
    for number, column in pairwise(rows[0]):
        if all(_is_interval(row[column]) and isinstance(row[number], float) for row in rows):
            for row in written:
                row[number] = "{} [{}, {}]".format(*map(short, (row[number], *row.pop(column))))
    return written


def _is_interval(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(end, float) for end in value)


def _is_number(value: object) -> bool:
    """Whether it is a number, or the text of one, perhaps with a percent sign or an interval."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)
    return number or bool(NUMBER.fullmatch(str(value)))


def _cell(value: object, kind: str) -> str:
    if isinstance(value, float | np.floating):
        text = short(float(value))
    elif isinstance(value, int | np.integer) and not isinstance(value, bool):
        text = f"{value:,}"
    else:  # an interval goes below its number, which keeps wide tables on the page
        text = words(value).replace(" [", "<br>[") if kind == "sae-number" else words(value)
    if kind == "sae-text" and len(str(value)) <= UNBROKEN:
        kind = "sae-short"
    return f'<td class="{kind}">{text}</td>'


def short(value: float) -> str:
    """A number in three figures.

    >>> short(0.012), short(1234.5), short(100.0), short(2.5e7), short(0.0000529)
    ('0.0120', '1,234', '100', '2.50e+07', '5.29e-05')
    """
    if abs(value) >= 999_999.5 or 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".removesuffix(".")


def scale(peak: float) -> str:
    """The key to every heat map: the colours from 0 to `peak`."""
    bar = '<span class="sae-scale" role="img" aria-label="colours from purple over orange to pale yellow"></span>'
    return f'<span class="sae-quiet sae-key">0 {bar} {short(peak)}</span>'


def folded(title: str, content: str) -> str:
    """Content that opens when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def fragment(*parts: str) -> str:
    """Pieces of HTML with the style they need: what a notebook's output or another page takes in."""
    return f'<div class="sae-kit">{STYLE}{"".join(parts)}</div>'


def twin(*parts: str) -> str:
    """What stands in for widgets where no kernel runs: a fragment whose cards the report's script lets one filter."""
    return f"<div {TWIN}>{fragment(*parts)}</div>"


def source_hash(script: str) -> str:
    """What a page's policy names a script by that may run in it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def page(title: str, *parts: str, script: str = "") -> str:
    """A whole document in the reader's light or dark colours, which may load nothing and run nothing but `script`."""
    allowed, runs = (f"; script-src {source_hash(script)}", f"<script>{script}</script>") if script else ("", "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}{allowed}">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title></head><body>{fragment(*parts)}{runs}</body></html>\n"
    )


@dataclass(frozen=True)
class Shown:
    """A piece of HTML that a notebook shows when it is the last thing in a cell."""

    markup: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.markup


@checked
def show_images(images: Sequence[Image.Image], captions: Sequence[str], side: int = 192) -> Shown:
    """Pictures side by side, each over its caption, also its alt text; their longer side is made `side` pixels.

    Raises KitError for more or fewer captions than pictures.

    >>> show_images(pipe(["a red circle", "a blue star"]).images, ["circle", "star"])     # doctest: +SKIP
    """
    if len(images) != len(captions):
        raise KitError(f"show_images needs one caption per picture; it got {len(images)} and {len(captions)} captions.")
    return Shown(fragment(figures((picture(_sized(i, side), c), "", c) for i, c in zip(images, captions, strict=True))))


@checked
def show_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Shown:
    """A table in a notebook, of rows that have the same keys: see `html.table`.

    >>> show_table([{"hookpoint": "mid.0", "L0": 10}], "Active latents")                  # doctest: +SKIP
    """
    return Shown(fragment(table(rows, caption)))


def _sized(image: Image.Image, side: int) -> bytes:
    factor = side / max(image.size)
    return to_webp(image.convert("RGB").resize([round(n * factor) for n in image.size], Image.Resampling.BICUBIC))

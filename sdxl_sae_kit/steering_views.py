"""What a steering did, as HTML: pictures before and after, maps of the difference, and numbers with their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.differences import Difference, top_of
from sdxl_sae_kit.masks import as_mask
from sdxl_sae_kit.selections import BAR, DRAWN_SIDE
from sdxl_sae_kit.steerings import Steering

FEATURES, CONTROL = "features", "random direction"
FORMULA = (
    "|change| of a pixel: mean over its three colours of |after − before|, as a share of their full range. Of this one "
    "image (n = 1), so exact for it and silent about others."
)
STYLE = f"""<style>
.sae-steered {{ display: grid; gap: 10px; margin-bottom: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min({DRAWN_SIDE}px, 100%), {DRAWN_SIDE}px)); }}
.sae-result .sae-steered {{ padding-top: {BAR}px; }}
.sae-steered figure {{ break-inside: avoid; }}
.sae-steered img {{ width: 100%; }}
.sae-steered figcaption {{ margin-top: 4px; }}
.sae-kit pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; color: inherit; }}
</style>"""


@dataclass(frozen=True)
class Steered:
    """A picture that was drawn, what was asked for, and the edits as `steer` recorded them."""

    asked: Steering
    image: Image.Image = field(repr=False)
    edits: list[Any] = field(repr=False)
    control: int | None = None
    """Which random directions were written along; None for the features' own."""

    def difference(self, before: Image.Image) -> Difference:
        """How it differs from the picture without edits, inside and outside the mask."""
        if self.asked.where is None:
            return Difference.between(before, self.image)
        mask = as_mask(self.asked.where, (before.height, before.width))[0].double().numpy()
        return Difference.between(before, self.image, mask)


def view(before: Image.Image, steered: Steered, control: Steered | None, first: str = "") -> str:
    """After and difference, the control's below, and the numbers of both; `first` is HTML that comes before them."""
    shown = {FEATURES: steered} | ({CONTROL: control} if control else {})
    differences = {name: each.difference(before) for name, each in shown.items()}
    top = top_of(list(differences.values()))
    drawn = [_pair(name, shown[name].image, difference, top) for name, difference in differences.items()]
    return f'{STYLE}<div class="sae-steered">{first}{"".join(drawn)}</div>{numbers(differences)}'


def numbers(differences: Mapping[str, Difference]) -> str:
    """A row for every number, a column for every picture, and the formula."""
    columns = {name: difference.numbers() for name, difference in differences.items()}
    names = next(iter(columns.values()))
    rows = [
        {"measure": name} | {column: _written(name, told[name]) for column, told in columns.items()} for name in names
    ]
    return html.table(rows, "How much it changed") + html.quiet(FORMULA)


def sentence(difference: Difference) -> str:
    """The numbers in words.

    >>> black = Image.new("RGB", (4, 4))
    >>> sentence(Difference.between(black, black))
    'mean |change| 0.00, largest 0.00'
    """
    told = difference.numbers()
    written = f"mean |change| {html.short(difference.mean)}, largest {html.short(difference.change.max())}"
    if difference.mask is None:
        return written
    share, area = (_written(name, told[name]) for name in list(told)[-2:])
    return f"{written}; {share} of it inside the mask, which is {area} of the picture"


def figure(image: Image.Image, alt: str, caption: str) -> str:
    """A picture over its caption, which is HTML."""
    return f"<figure>{html.picture(html.to_webp(image), alt)}<figcaption>{caption}</figcaption></figure>"


def _pair(name: str, image: Image.Image, difference: Difference, top: float) -> str:
    larger = image.resize(_shown_size(image), Image.Resampling.BICUBIC)
    heat = difference.map(top).resize(larger.size, Image.Resampling.BILINEAR)
    after = figure(larger, f"After, {name}: {sentence(difference)}", f"<b>After</b>, {name}")
    where = f"Where it changed, {name}, from black (0) to pale yellow ({top:g} or more): {sentence(difference)}"
    return after + figure(heat, where, f"<b>|change|</b>, {name} {html.scale(top)}")


def _shown_size(image: Image.Image) -> tuple[int, int]:
    factor = DRAWN_SIDE / max(image.size)
    return round(image.width * factor), round(image.height * factor)


def _written(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if name.startswith("share") else html.short(value)

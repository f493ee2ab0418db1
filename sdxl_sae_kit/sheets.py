"""Sheets: every feature of an SAE as a small card, in HTML files to look through, filter and print without a kernel."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import SupportsIndex
from urllib.parse import quote

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from sdxl_sae_kit import cards, html
from sdxl_sae_kit.amounts import counted, human_bytes
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cards import ORDERS, Subject
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.files import canonical_json, sha256, writable, write_atomically
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.labels import LabelStore, LabelTest, check_stats
from sdxl_sae_kit.plans import duration

PER_FILE = 400
"""Cards in one file: at most about 15 MB, were every picture noise, and no more than a browser lays out at once."""

_FIRST = "sheet.html"
_TRIED = 8  # cards drawn to know what all will take
_DRAWING = 4  # threads: reading and writing WebP lets others run
_ON_CARD = ("mean", "Moran's I")  # density stands in the card's heading
_TEST = "(right active / active + right inactive / inactive) / 2 on held-out pictures; chance is 0.5"
STYLE = """<style>
.sae-sheet h2 { font-size: 20px; margin: 8px 0; overflow-wrap: anywhere; }
.sae-sheet .sae-wide { margin: 8px 0; }
.sae-sheet nav { margin: 10px 0; display: flex; flex-wrap: wrap; gap: 2px 12px; }
.sae-sheet nav [aria-current] { font-weight: 600; }
.sae-sheet a { color: LinkText; }
.sae-sheet .sae-find { columns: 15em; margin: 6px 0; padding: 0; list-style: none; }
.sae-sheet .sae-find li { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sae-icons { padding-top: 6px; }
.sae-icons figcaption { display: flex; font-size: 11px; line-height: 1.3; color: var(--sae-quiet); }
.sae-icons figcaption span { flex: 1; text-align: center; }
.sae-facts { font-size: 12px; line-height: 1.35; padding-top: 5px; }
.sae-card:has(:target) { outline: 2px solid Highlight; }
@page { size: A4; margin: 10mm; }
@media print {
  .sae-sheet :is(.sae-bar, nav, .sae-finding) { display: none; }
  .sae-sheet .sae-grid { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 5px; }
  .sae-sheet .sae-card { padding: 4px 5px; }
  .sae-sheet .sae-facts { font-size: 9.5px; }
  .sae-sheet .sae-icons figcaption { font-size: 8px; white-space: nowrap; }
  .sae-sheet .sae-card .sae-name, .sae-sheet .sae-name bdi { white-space: normal; }
}
</style>"""


@checked
def draw_sheet(
    stats: FeatureStats,
    *,
    icons: Icons | None = None,
    control: Icons | None = None,
    labels: LabelStore | None = None,
    features: Iterable[SupportsIndex] | None = None,
    by: str = "density",
    out: Path | str | None = None,
    store: Store | Path | str | None = None,
) -> Path:
    """Write a contact sheet of an SAE: every feature a card, in offline HTML that reads without scripts and prints.

    A card has number, label and the latest test of it, the four images the latent is strongest on with their heat maps,
    density, mean and Moran's I and, with `icons`, what it writes. Four hundred cards make a file of a few megabytes;
    further files lie beside the first and are linked from it. With scripts, cards can be filtered and sorted within a
    file. The sheet goes to `out`, by default to an artifact; one that was interrupted goes on at the file in hand, and
    one that is there is not drawn again.

    Args:
        stats: of the SAE.
        icons: what its features write, from `draw_icons`.
        control: icons of `sae.untrained()`, to show below: at the same number, where they show a random direction.
        labels: by default the file of this SAE in the store of `stats`.
        features: latents; by default all that fire.
        by: the order: density, max, mean, moran or latent.
        out: the first file; others are numbered.
        store: folder of artifacts.

    Returns:
        The first file.

    Raises:
        KitError: these are no statistics, `icons` or `labels` are of another SAE or `control` is of another hookpoint,
            there is no such order or latent, or `out` cannot be written.

    >>> kit.draw_sheet(stats, icons=icons)                                                       # doctest: +SKIP
    PosixPath('artifacts/reports/tiny-turbo_up.0.1_k20-white_sheet-1a2b3c4d/sheet.html')
    """
    check_stats("draw_sheet", stats)
    if by not in ORDERS:
        raise KitError(f"draw_sheet: no order {by!r}; there are {', '.join(ORDERS)}.{did_you_mean(str(by), ORDERS)}")
    if control is not None and (control.hookpoint != stats.hookpoint or control.sae == stats.sae):
        raise KitError(
            f"draw_sheet: control={control!r} is no control for {stats.sae}. Draw icons of its sae.untrained()."
        )
    subject = Subject(stats, LabelStore.of(stats) if labels is None else labels, icons)
    shown = _checked(stats, features)
    sheet = _Sheet.of(subject, control, by, cards.in_order(shown, cards.strength(stats, by)))
    if out is not None:
        first = writable("sheet", Path(out))
        _write(sheet, first, list(range(sheet.n_files)), first.name)
        return first
    recipe = {
        "sheet_of": stats.artifact.digest,
        "icons": icons and icons.artifact.digest,
        "control": control and control.artifact.digest,
        "labels": sha256(canonical_json(sheet.said()).encode()),
        "features": sheet.order.tolist(),
        "by": by,
        "per_file": PER_FILE,
    }
    artifact = Store.at(store).artifact("reports", f"{stats.sae.rsplit('-', 1)[0]}_sheet", recipe)
    first = artifact.file(_FIRST)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                missing = [number for number in range(sheet.n_files) if not _file(first, number).exists()]
                _write(sheet, first, missing, artifact.name)
                artifact.seal(facts={"features": len(sheet.order), "files": sheet.n_files})
    return first


def _checked(stats: FeatureStats, features: Iterable[SupportsIndex] | None) -> Int[np.ndarray, " some"]:
    """The latents that were asked for, each once, or all that fire."""
    if isinstance(features, str) or not isinstance(features, Iterable | None):
        raise KitError(f"draw_sheet: features are several latents, such as [3, 17], not {features!r}.")
    given = stats.alive.tolist() if features is None else [cards.known_latent(stats, feature) for feature in features]
    if not given:
        raise KitError(f"draw_sheet: no latent to draw. {len(stats.alive):,} of {stats.sae} fire; pass some.")
    return np.array(list(dict.fromkeys(given)), dtype=np.int64)


@dataclass(frozen=True)
class _Sheet:
    """What stands on a sheet; labels and tests are read once, so that all files say the same."""

    stats: FeatureStats
    icons: Icons | None
    control: Icons | None
    by: str
    order: Int[np.ndarray, " feature"]
    named: Mapping[int, str]
    tests: Mapping[tuple[int, str], LabelTest]
    """The latest of every label's."""

    @classmethod
    def of(cls, subject: Subject, control: Icons | None, by: str, order: Int[np.ndarray, " feature"]) -> _Sheet:
        tests = {(test.feature, test.text): test for test in subject.labels.tests()}
        return cls(subject.stats, subject.icons, control, by, order, subject.labels.all(), tests)

    @property
    def n_files(self) -> int:
        return -(-len(self.order) // PER_FILE)

    def said(self) -> list[tuple[int, str, str]]:
        """All that labels add to it."""
        shown = set(self.order.tolist())
        return [(latent, text, self._test(latent)) for latent, text in sorted(self.named.items()) if latent in shown]

    def page(self, number: int, drawn: Sequence[str], names: Sequence[str]) -> str:
        """A whole file of these cards; `names` are those of all files."""
        title = f"Features of {self.stats.sae}"
        parts = [f"<h2>{html.escape(title)}</h2>", html.quiet(self._counted(number)), self._key(), _turn(number, names)]
        parts += [self._finding(names)] if number == 0 else []
        script = files("sdxl_sae_kit").joinpath("twin.js").read_text("utf-8")
        body = f'<main class="sae-sheet">{"".join(parts)}{html.twin(html.grid(drawn))}{_turn(number, names)}</main>'
        return html.page(title, STYLE, body, script=script)

    def card(self, feature: int) -> str:
        """Everything about one feature in few square centimetres."""
        stats, label = self.stats, self.named.get(feature)
        density = float(stats.density[feature])
        known = {"density": density, "maximum": stats.max[feature], "mean": stats.mean[feature]}
        known["moran"] = stats.moran[feature]
        parts = [f'<span id="latent-{feature}"></span>', cards.card_picture(stats, feature)]
        parts += [_icons(shown, feature, name) for shown, name in ((self.icons, "added"), (self.control, "control"))]
        parts += [f'<p class="sae-facts sae-quiet">{html.escape(" · ".join(self._facts(feature)))}</p>']
        fact = cards.percent(density) if density > 0 else "dead"
        known = {name: float(value) for name, value in known.items() if isfinite(value)}
        return html.card(str(feature), label, fact, "".join(parts), feature, known)

    def _facts(self, feature: int) -> Iterator[str]:
        if self.stats.density[feature] > 0:
            for name, value, _, n in cards.statistics(self.stats, feature):
                if name in _ON_CARD:
                    yield f"{name} {value}, n = {n}"
        if test := self._test(feature):
            yield test

    def _test(self, feature: int) -> str:
        test = self.tests.get((feature, self.named.get(feature, "")))
        return f"label test {test.row()['balanced accuracy']}, n = {test.n} pictures, by {test.author}" if test else ""

    def _counted(self, number: int) -> str:
        stats, n = self.stats, len(self.order)
        first, last = number * PER_FILE + 1, min((number + 1) * PER_FILE, n)
        part = f"{first:,}–{last:,} of {n:,} cards" if self.n_files > 1 else counted(n, "cards")
        return (
            f"{part}, by {ORDERS[self.by]}: the SAE has {stats.d_sae:,} latents at {stats.hookpoint}, of which "
            f"{len(stats.alive):,} fire on the {stats.n_tokens:,} tokens of {stats.n_images:,} images measured."
        )

    def _key(self) -> str:
        """What the numbers and pictures of a card mean."""
        pictures = "the images on which it is strongest at one token; below each, where: dark grey 0 … pale yellow most"
        means = {"images": pictures, **{name: formula for name, _, formula, _ in cards.statistics(self.stats, 0)}}
        rows = [("images", pictures)] + [(name, means[name]) for name in ("density", *_ON_CARD)]
        if self.icons is not None:
            rows.append(("added", "what it writes, added alone to the empty prompt's image at strength × mean × k"))
        if self.control is not None:
            rows.append(("control", f"the same number in {self.control.sae}, with its own mean"))
        if any(test for _, _, test in self.said()):
            rows.append(("label test", _TEST))
        return html.table([{"on a card": name, "what it is": meaning} for name, meaning in rows])

    def _finding(self, names: Sequence[str]) -> str:
        """Every feature by number, and where it is."""
        place = {feature: at // PER_FILE for at, feature in enumerate(self.order.tolist())}
        entries = (
            f'<li><a href="{quote(names[place[latent]]) if place[latent] else ""}#latent-{latent}">{latent}</a> '
            f"{html.words(self.named.get(latent, ''))}</li>"
            for latent in sorted(place)
        )
        listed = f'<ul class="sae-find">{"".join(entries)}</ul>'
        return f'<div class="sae-finding">{html.folded("Find a feature by its number", listed)}</div>'


def _icons(icons: Icons | None, feature: int, name: str) -> str:
    """The pictures of one kind on a card, each over its strength."""
    if icons is None:
        return ""
    row = icons.row(feature)
    if row is None:
        return f'<p class="sae-facts sae-quiet">{name}: not drawn, as this latent is dead or was not asked for.</p>'
    strengths = [f"{strength:g}" for strength in icons.strengths]
    alt = f"Latent {feature} of {icons.sae} {name} to the empty prompt's image at strengths 0, {', '.join(strengths)}"
    under = "".join(f"<span>{text}</span>" for text in (f"{name} 0", *strengths))
    return f'<figure class="sae-icons">{html.picture(row, alt)}<figcaption>{under}</figcaption></figure>'


def _turn(number: int, names: Sequence[str]) -> str:
    """Links to all files of a sheet that has several."""
    if len(names) == 1:
        return ""
    links = (
        f'<a href="{quote(name)}"{" aria-current=page" if at == number else ""}>{at + 1}</a>'
        for at, name in enumerate(names)
    )
    return f'<nav aria-label="Files">{"".join(links)}</nav>'


def _file(first: Path, number: int) -> Path:
    """Where one of the files lies: beside the first, numbered from 2."""
    return first if number == 0 else first.with_name(f"{first.stem}-{number + 1}{first.suffix}")


def _write(sheet: _Sheet, first: Path, missing: Sequence[int], name: str) -> None:
    """Draw and write these files one after the other: memory holds the cards of one."""
    order, names = sheet.order.tolist(), [_file(first, number).name for number in range(sheet.n_files)]
    of_file = {number: order[number * PER_FILE : (number + 1) * PER_FILE] for number in missing}
    n_cards = sum(map(len, of_file.values()))
    tried = order[:: -(-len(order) // _TRIED)]
    sheet.card(tried[0])  # the first opens what all need
    started = time.perf_counter()
    nbytes = sum(len(sheet.card(feature)) for feature in tried) / len(tried) * n_cards
    seconds = (time.perf_counter() - started) / len(tried) * n_cards
    tqdm.write(
        f"Drawing a sheet of {counted(n_cards, 'features')} of {sheet.stats.sae}, as {name}: about "
        f"{human_bytes(nbytes)} in {counted(len(missing), 'files')}, and {duration(seconds)} on this machine."
    )
    with ThreadPoolExecutor(_DRAWING) as pool, tqdm(total=n_cards, desc="sheet", unit="feature") as bar:
        for number, features in of_file.items():
            drawn = []
            for card in pool.map(sheet.card, features):
                drawn.append(card)
                bar.update()
            write_atomically(_file(first, number), sheet.page(number, drawn, names).encode())

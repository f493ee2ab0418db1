"""How a benchmark's numbers are told: sentences, tables and a contact sheet, from rows alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import counted
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, NEARNESS, Line, Row, Scores
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.transport import Setting

EQUAL_DAMAGE = (
    "Each method at its best: items are cut into halves, every other one of each kind, and those of a half are scored "
    "at the setting that is best on the other half. The other method is read at the same mean damage, off the upper "
    "concave hull of its settings' means and of no edit, so what mixing two settings reaches at most; noise can only "
    "lift a hull, so this leans to the other. 95 % bootstrap intervals over items, choice and hull made anew in each "
    "of 1,000 samples"
)
BEST = (
    "Each method, every item at the setting that is best on the other half of the items; prompt is the ceiling, none "
    "the floor. 95 % intervals over items: Wilson's of reached, else bootstrap"
)
GRID = "Every setting, over all items; 95 % intervals over items: Wilson's of reached, else bootstrap"
BLOCKS = (
    "What one block does: alone, beside no edit; and what is lost when it is left out of all. Mean differences on the "
    "same items with 95 % bootstrap intervals over them"
)
CHOICES = (
    "Share of the features that sae adds and removes that are of each block, with 95 % bootstrap intervals over items; "
    "expected if they were spread by the blocks' numbers of features"
)
_REACHES = {
    "reached": "reaches the target on",
    "target": "gives the target a probability of",
    "to edited": "comes nearer to the edited prompt's picture, than no edit does, by",
    "image similarity": "becomes more similar to the edited prompt's picture, than no edit is, by",
}


def damage_formula(scores: Scores) -> str:
    """What damage is."""
    return {"kept": "1 − kept", "to original": "distance to the original"}.get(scores.harm, "pixels' change")


def choice_formula(scores: Scores, by: str | None = None) -> str:
    """By what a method's settings are chosen; `by` is by default the outcome."""
    by = by or scores.outcome
    if by == "to edited":
        return f"least mean(to edited) + {'mean(1 − kept)' if scores.harm == 'kept' else f'mean({scores.harm})'}"
    if scores.harm == "kept":
        return f"greatest mean({by}) {'−' if by in NEARNESS else '×'} mean({'1 − ' if by in NEARNESS else ''}kept)"
    return f"greatest mean({by}) − mean({scores.harm})"


# Sentences ------------------------------------------------------------------------------------------------------------


def sentence(scores: Scores, failed: int, best: Mapping[str, Row], pairs: Sequence[tuple[Row, Row]]) -> str:
    """What the numbers say. `pairs`: the first method beside each other one, and the other beside it."""
    lost = f"; {failed} failed, which are listed with their reasons" if failed else ""
    counts = f"{counted(len(scores), 'items')} scored{lost}."
    if not len(scores):
        return f"{counts} So nothing can be told."
    if not scores.judged:
        return f"{counts} Nothing tells whether edits succeeded: that needs a judge."
    told = " ".join([_own(scores, *pairs[0])] + [_beside(*pair) for pair in pairs]) if pairs else ""
    ends = " and ".join(
        f"{name} {written(best[at], scores.outcome, share=scores.outcome == 'reached')}"
        for at, name in ((CEILING, "changing the prompt itself comes to"), (FLOOR, "no edit to"))
    )
    what = "" if scores.outcome == "reached" else f" ({scores.outcome})"
    return f"{counts} {told} For comparison, {ends}{what}. In brackets 95 % intervals over items."


def _own(scores: Scores, row: Row, _: Row) -> str:
    return (
        f"At its best {row['method']} {_REACHES[row['by']]} {_value(row, 'reached')} at a damage "
        f"({damage_formula(scores)}) of {written(row, 'damage')} (settings chosen on other items; {row['n']} items)."
    )


def _beside(row: Row, back: Row) -> str:
    past = " (its highest: no setting of it does as much damage)" if row["beyond"] else ""
    return (
        f"At equal damage {row['other']} comes to {_value(row, 'other reached')}{past}; {row['method']} less "
        f"{row['other']} is {written(row, 'difference')}: {verdict(row, back)}."
    )


def verdict(row: Row, back: Row) -> str:
    """Which is better, if either: each is said only by the comparison that leans against it."""
    if row["difference interval"][0] > 0:
        return f"{row['method']} is better"
    return f"{row['other']} is better" if back["difference interval"][0] > 0 else "they are not told apart"


def _value(row: Row, name: str) -> str:
    share = row["by"] == "reached"
    return written(row, name, share=share) + (" of items" if share else "")


# Tables ---------------------------------------------------------------------------------------------------------------


def best_table(scores: Scores, best: Mapping[str, Row]) -> list[Row]:
    """A row per method."""
    named = {setting.key: setting for setting in scores.settings}
    measures = _measures(scores, list(best.values()))
    return [
        {"method": method, "settings taken": "; ".join(_dose(named[key]) for key in row["settings"]), "n": row["n"]}
        | told
        for (method, row), told in zip(best.items(), measures, strict=True)
    ]


def _dose(setting: Setting) -> str:
    """How strongly a method is used."""
    if setting.method in (CEILING, FLOOR):
        return "–"
    return (f"k {setting.k}, " if setting.k is not None else "") + f"strength {setting.strength:g}"


def grid_table(scores: Scores, rows: Sequence[Row]) -> list[Row]:
    """A row per setting."""
    return [
        {
            "method": row["method"],
            "k": "–" if row["k"] is None else row["k"],
            "strength": row["strength"],
            "blocks": ", ".join(row["blocks"]) or "–",
            "n": row["n"],
        }
        | told
        for row, told in zip(rows, _measures(scores, rows), strict=True)
    ]


def pair_table(pairs: Sequence[tuple[Row, Row]]) -> list[Row]:
    """A row per comparison."""
    return [
        {
            "at equal damage": f"{row['method']} and {row['other']}",
            "by": row["by"],
            "damage": written(row, "damage"),
            row["method"]: written(row, "reached"),
            "other": written(row, "other reached") + (" (highest)" if row["beyond"] else ""),
            "difference": written(row, "difference"),
            "n": row["n"],
            "so": verdict(row, back),
        }
        for row, back in pairs
    ]


def kind_table(rows: Sequence[Row], measure: str) -> list[Row]:
    """A row per kind, a column per method."""
    found: dict[str, Row] = {}
    for row in rows:
        own = found.setdefault(row["kind"], {"kind": row["kind"], "n": row[f"{measure} n"]})
        own[row["method"]] = written(row, measure)
    return list(found.values())


def block_table(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """A row per kind and block, with these columns."""
    return [
        {"kind": row["kind"], "block": row["block"], "n": row["n"]}
        | {name: written(row, name) if f"{name} interval" in row else _number(row[name]) for name in names}
        for row in rows
    ]


def _number(value: float) -> str:
    return "–" if np.isnan(value) else html.short(value)


def _measures(scores: Scores, rows: Sequence[Row]) -> list[Row]:
    """Those that are told; the head says for how many items where that is not all."""
    heads = {}
    for measure in scores.measures:
        counts = sorted({row[f"{measure} n"] for row in rows})
        few = "" if counts == [len(scores)] else f" (n {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))})"
        heads[measure] = measure + few
    return [{head: written(row, measure) for measure, head in heads.items()} for row in rows]


# Pictures -------------------------------------------------------------------------------------------------------------


def contact_sheet(scores: Scores, lines: Sequence[tuple[str, Line]], picture: Callable[[int], bytes]) -> str:
    """HTML of each method's best, median and worst item: the original, the edited prompt's picture and the method's.

    Args:
        scores: what the items came to.
        lines: each item's name and line, in the order of the scores.
        picture: an item's row of tiles (WebP), by its place.
    """
    drawn = [setting.key for setting in scores.settings if setting.method not in (CEILING, FLOOR)]
    parts = [html.quiet(f"Items are ranked by {_ranking(scores)}; each is shown at the setting at which it counts.")]
    for method in (method for method in scores.methods if method not in (CEILING, FLOOR)):
        taken = scores.taken(method)
        shown = []
        for name, at in _picked(_ranks(scores, taken)).items():
            setting, (item, line) = scores.settings[taken[at]], lines[at]
            tiles = _cut(picture(line["place"]), [0, 1, 2 + drawn.index(setting.key)], 2 + len(drawn))
            about = f"{line['kind']}, “{line['original']}” → “{line['edited']}”"
            alt = f"{about}: the original's picture, the edited prompt's, and the edit by {setting.key}"
            told = ", ".join(
                f"{m} {html.short(scores.values[m][at, taken[at]])}" for m in _ranked_by(scores) if scores.told(m)
            )
            shown.append((html.picture(tiles, alt), name, f"{item}: {about}; {_dose(setting)}: {told}"))
        parts.append(html.heading(method, "original, edited prompt's, this method's") + html.figures(shown))
    return html.fragment(*parts)


def _ranked_by(scores: Scores) -> tuple[str, str, str]:
    """By what items are ranked: success in degrees, what is spared, and what changes outside the masks."""
    return scores.gain, scores.harm, "outside"


def _multiplied(scores: Scores) -> bool:
    return _ranked_by(scores)[:2] == ("target", "kept")


def _ranking(scores: Scores) -> str:
    gain, harm, outside = _ranked_by(scores)
    sign = "− " if NEARNESS.get(gain) == -1 else ""
    return f"{'target × kept' if _multiplied(scores) else f'{sign}{gain} − {harm}'}, then by least {outside}"


def _ranks(scores: Scores, taken: Int[np.ndarray, " item"]) -> list[tuple[float, float, int]]:
    """How good each item is, then how little changes outside, with its place; only of those that can be ranked."""
    gain, harm, outside = (scores.at(measure, taken) for measure in _ranked_by(scores))
    goods = gain * harm if _multiplied(scores) else NEARNESS.get(scores.gain, 1) * gain - harm
    spared = -np.nan_to_num(outside)
    told = enumerate(zip(goods.tolist(), spared.tolist(), strict=True))
    return [(good, least, place) for place, (good, least) in told if np.isfinite(good)]


def _picked(ranks: Sequence[tuple[float, float, int]]) -> dict[str, int]:
    """The best, the median and the worst item, none twice."""
    order = [place for *_, place in sorted(ranks, reverse=True)]
    names = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"}  # of two the other is the worst
    return {names[at]: order[at] for at in sorted(names) if order}


def _cut(row: bytes, places: Sequence[int], tiles: int) -> bytes:
    """Some tiles of a row of square ones, side by side with as wide a gap."""
    whole = Image.open(io.BytesIO(row), formats=("WEBP",)).convert("RGB")
    side, step = whole.height, round((whole.width - whole.height) / (tiles - 1))
    made = Image.new("RGB", ((len(places) - 1) * step + side, side), "white")
    for across, place in enumerate(places):
        made.paste(whole.crop((place * step, 0, place * step + side, side)), (across * step, 0))
    return html.to_webp(made)

"""How a benchmark's numbers are told: sentences, tables and a contact sheet, from rows alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import counted
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, MEASURES, Line, Row, Scores
from sdxl_sae_kit.studies.distances import written

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
_UNITS = {"reached": "reaches the target on", "target": "gives the target a probability of"}
_NEARER = "comes nearer to the edited prompt's picture by"


def damage_formula(scores: Scores) -> str:
    """What damage is."""
    return "1 − kept" if scores.told("kept") else "distance to the original"


def choice_formula(scores: Scores, by: str | None = None) -> str:
    """By what a method's settings are chosen; `by` is by default the outcome."""
    by = by or scores.outcome
    if by == "to edited":
        return f"least mean(to edited) + {'mean(1 − kept)' if scores.told('kept') else 'mean(to original)'}"
    return f"greatest mean({by}) {'× mean(kept)' if scores.told('kept') else '− mean(to original)'}"


# Sentences ------------------------------------------------------------------------------------------------------------


def sentence(scores: Scores, failed: int, best: Mapping[str, Row], pairs: Sequence[tuple[Row, Row]]) -> str:
    """What the numbers say. `pairs`: the first method beside each other one, and the other beside it."""
    lost = f"; {failed} failed, which are listed with their reasons" if failed else ""
    counts = f"{counted(len(scores), 'items')} scored{lost}."
    if not len(scores):
        return f"{counts} So nothing can be told."
    told = " ".join([_own(scores, *pairs[0])] + [_beside(*pair) for pair in pairs]) if pairs else ""
    ends = " and ".join(
        f"{name} {written(best[at], scores.outcome, share=scores.outcome == 'reached')}"
        for at, name in ((CEILING, "changing the prompt itself comes to"), (FLOOR, "no edit to"))
    )
    whose = "" if scores.outcome == "reached" else " from the edited prompt's picture"
    return f"{counts} {told} For comparison, {ends}{whose}. In brackets 95 % intervals over items."


def _own(scores: Scores, row: Row, _: Row) -> str:
    return (
        f"At its best {row['method']} {_UNITS.get(row['by'], _NEARER)} {_value(row, 'reached')} at a damage "
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
    return [
        {"method": method, "n": row["n"]} | _measures(scores, row) | {"settings taken": "; ".join(row["settings"])}
        for method, row in best.items()
    ]


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
        | _measures(scores, row)
        for row in rows
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
        own[row["method"]] = written(row, measure, share=measure == "reached")
    return list(found.values())


def block_table(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """A row per kind and block, with these columns."""
    return [
        {"kind": row["kind"], "block": row["block"], "n": row["n"]}
        | {name: written(row, name) if f"{name} interval" in row else html.short(row[name]) for name in names}
        for row in rows
    ]


def _measures(scores: Scores, row: Row) -> Row:
    """Each that is told, with the number of items where that is not all."""
    return {
        measure: written(row, measure) + ("" if row[f"{measure} n"] == row["n"] else f" (n {row[f'{measure} n']})")
        for measure in scores.measures
    }


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
            key, (item, line) = scores.settings[taken[at]].key, lines[at]
            tiles = _cut(picture(line["place"]), [0, 1, 2 + drawn.index(key)], 2 + len(drawn))
            pair = f"“{line['original']}” → “{line['edited']}”"
            alt = f"{line['kind']}, {pair}: the original's picture, the edited prompt's, and the edit by {key}"
            told = ", ".join(
                f"{m} {html.short(v)}" for m in MEASURES if np.isfinite(v := scores.values[m][at, taken[at]])
            )
            shown.append((html.picture(tiles, alt), name, f"{item}, {line['kind']}: {pair}; {key}: {told}"))
        parts.append(html.heading(method, "original, edited prompt's, this method's") + html.figures(shown))
    return html.fragment(*parts)


def _ranking(scores: Scores) -> str:
    by = "target × kept" if scores.told("target") and scores.told("kept") else "to edited + to original, least first"
    return f"{by}, then by least change outside the masks"


def _ranks(scores: Scores, taken: np.ndarray) -> list[tuple[float, float, int]]:
    """How good each item is, then how little changes outside, with its place; only of those that can be ranked."""
    at = {measure: scores.at(measure, taken) for measure in MEASURES}
    degrees = scores.told("target") and scores.told("kept")
    goods = at["target"] * at["kept"] if degrees else -at["to edited"] - at["to original"]
    inside = -np.nan_to_num(at["outside"])
    told = enumerate(zip(goods.tolist(), inside.tolist(), strict=True))
    return [(good, spared, place) for place, (good, spared) in told if np.isfinite(good)]


def _picked(ranks: Sequence[tuple[float, float, int]]) -> dict[str, int]:
    """The best, the median and the worst item, none twice."""
    order = [place for *_, place in sorted(ranks, reverse=True)]
    if not order:
        return {}
    found = {order[len(order) // 2]: "median", order[-1]: "worst", order[0]: "best"}
    return {
        name: found_at for wanted in ("best", "median", "worst") for found_at, name in found.items() if name == wanted
    }


def _cut(row: bytes, places: Sequence[int], tiles: int) -> bytes:
    """Some tiles of a row of square ones, side by side with as wide a gap."""
    whole = Image.open(io.BytesIO(row), formats=("WEBP",)).convert("RGB")
    side, step = whole.height, round((whole.width - whole.height) / (tiles - 1))
    made = Image.new("RGB", ((len(places) - 1) * step + side, side), "white")
    for across, place in enumerate(places):
        made.paste(whole.crop((place * step, 0, place * step + side, side)), (across * step, 0))
    return html.to_webp(made)

"""How a benchmark's numbers are told: sentences, tables and a contact sheet, from rows alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, LEAST, LESS_IS_BETTER, NEARNESS, Line, Row, Scores
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.transport import Setting

EQUAL_DAMAGE = (
    "Difference: how much more the method reaches than the other at equal damage. Each is read at the mean damage of "
    "the other at its best, off the upper concave hull of its settings' means and of no edit (what mixing two settings "
    "reaches); the difference is the mean of both readings. Settings and hulls are chosen on one half of the items for "
    "the other. Where a method does more damage than any setting of the other, the other's highest value holds; where "
    "less than every one, the other is read on the line to no edit. 95 % bootstrap "
    "intervals over items, everything chosen anew in each of 1,000 samples. Every comparison stands for itself: of "
    "twenty where there is no difference, one is expected to be told apart"
)
KIND_DIFFERENCES = (
    "Differences at equal damage by kind of edit, choices being made on all kinds; 95 % bootstrap intervals over "
    f"items. Every comparison stands for itself; nothing is concluded from fewer than {LEAST} items"
)
GRID = (
    "Every setting, over all items, each counting once; 95 % intervals over items: Wilson's of reached, else bootstrap"
)
CHOICES = (
    "Share of the features that sae adds and removes that are of each block, with 95 % bootstrap intervals over items; "
    "expected if they were spread by the blocks' numbers of features"
)
_TILE = 120
"""Pixels of a side of a picture."""
_SHEET = "display: flex; flex-wrap: wrap; gap: 14px 18px"
_REACHES = {
    "reached": "reaches the target on",
    "target": "gives the target a probability of",
    "to edited": "comes as near to the edited prompt's picture (distance) as",
    "image similarity": "becomes as similar to the edited prompt's picture as",
}


def damage_formula(scores: Scores) -> str:
    """What damage is."""
    return {"kept": "1 − kept", "to original": "distance to the original"}.get(scores.harm, "pixels' change")


def choice_formula(scores: Scores, by: str | None = None) -> str:
    """By what a method's settings are chosen; `by` is by default the outcome."""
    by = by or scores.outcome
    if scores.by_product(by):
        return f"greatest mean({by}) × mean(kept)"
    return f"{'least' if by in LESS_IS_BETTER else 'greatest'} mean({by})"


def choice_words(scores: Scores) -> str:
    """The same in words: where damage does not count, that is no best."""
    return "at its best" if scores.by_product(scores.outcome) else "at its strongest"


def best_caption(scores: Scores) -> str:
    """What the table of methods at their best is."""
    no_best = "" if scores.by_product(scores.outcome) else ", which is its strongest and need not be its best"
    return (
        f"Each method, every item at the setting of {choice_formula(scores)} on the other half of the items{no_best}; "
        "prompt is the ceiling, none the floor. Every item counts once. 95 % intervals over items, given the settings "
        "taken: Wilson's of reached, else bootstrap"
    )


def kind_caption(scores: Scores) -> str:
    """What the table of kinds is."""
    return (
        f"Mean of {scores.outcome}, each method {choice_words(scores)}, with 95 % intervals over items, given the "
        "settings taken"
    )


def block_caption(scores: Scores) -> str:
    """What the table of blocks is."""
    worse = "; less is better, so a block that helps is below 0" if scores.gain in LESS_IS_BETTER else ""
    return (
        f"What one block does to {scores.gain}{worse}: alone, beside no edit; and what is lost when it is left out of "
        "all. Mean differences on the same items with 95 % bootstrap intervals over them"
    )


# Sentences ------------------------------------------------------------------------------------------------------------


def clauses(scores: Scores, failed: int, best: Mapping[str, Row], pairs: Sequence[Row]) -> list[str]:
    """What the numbers say, in sentences. `pairs`: the first method beside each other one."""
    lost = f"; {failed} failed, listed with {'its reason' if failed == 1 else 'their reasons'}" if failed else ""
    counts = f"{counted(len(scores), 'items')} scored{lost}."
    if not best:
        few = "At least 2 items must be scored on which success and damage are told, to choose settings by."
        return [counts, few if scores.succeeds else "Nothing tells whether edits succeeded: that needs a judge."]
    edits = [row for method, row in best.items() if method not in (CEILING, FLOOR)]
    told = "; ".join(_own(scores, row, first=at == 0) for at, row in enumerate(edits))
    own = [f"{choice_words(scores).capitalize()} (settings chosen on other items) {told}."] if edits else []
    ends = (
        f"Changing the prompt itself comes to {_mean(scores, best[CEILING])}, no edit to {_mean(scores, best[FLOOR])}."
    )
    beside = [f"At equal damage {'; '.join(map(_beside, pairs))}."] if pairs else []
    return [counts, *own, ends, *beside]


def paragraph(said: Sequence[str]) -> str:
    """HTML of sentences, each on a line."""
    return "<br>".join(map(html.escape, said))


def _own(scores: Scores, row: Row, *, first: bool) -> str:
    reaches, harm = f"{_REACHES[scores.outcome]} " if first else "", row[scores.harm]
    spared = {
        "kept": f"keeping {harm:.1%} of the other factors".replace("%", " %"),
        "to original": f"at distance {_number(harm)} of the original's picture",
    }.get(scores.harm, f"changing pixels by {_number(harm)}")
    return f"{row['method']} {reaches}{_mean(scores, row)}, {spared}"


def _mean(scores: Scores, row: Row) -> str:
    if scores.outcome != "reached":
        return _written(row, scores.outcome)
    value, low, high = (100 * each for each in (row["reached"], *row["reached interval"]))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}] of items"


def _beside(row: Row) -> str:
    words = {"more": "reaches more than", "less": "reaches less than", "not told apart": "is not told apart from"}
    verb = words.get(row["verdict"], f"has too few items ({row['n']} of at least {LEAST}) to be told from")
    return f"{row['method']} {verb} {row['other']} ({_written(row, 'difference')})"


def _reserve(row: Row) -> str:
    """What weakens a comparison: where one is read beyond its own settings or, if it is not, below them."""
    told = []
    for mine, other, flag in ((row["method"], row["other"], ""), (row["other"], row["method"], "other ")):
        for where, words in (("beyond", "more damage than any"), ("below", "less damage than every")):
            on = row[flag + where]
            if on:
                told.append(
                    f"{mine} does {words} setting of {other}" + (" on one half of the items" if on == 1 else "")
                )
                break
    return "; ".join(told)


def verdict(row: Row) -> str:
    """What a comparison says of the method: "more", "less", "not told apart", or "too few items"."""
    low, high = row["difference interval"]
    if row["n"] < LEAST or np.isnan(low):
        return "too few items"
    return "more" if low > 0 else "less" if high < 0 else "not told apart"


# Tables ---------------------------------------------------------------------------------------------------------------


def titled(title: str, rows: Sequence[Row], caption: str) -> str:
    """HTML of a table below its title and caption, which do not scroll with it."""
    return f"<h4>{html.escape(title)}</h4>{html.quiet(caption)}{html.table(rows)}" if rows else ""


def every_setting(scores: Scores, rows: Sequence[Row]) -> str:
    """HTML of all settings with all measures."""
    return html.quiet(GRID) + html.table(grid_table(scores, rows))


def at_best(scores: Scores, best: Mapping[str, Row], pairs: Sequence[Row]) -> str:
    """HTML of each method at its best, and of comparisons at equal damage."""
    own = titled(f"Each method {choice_words(scores)}", best_table(scores, best), best_caption(scores))
    return own + titled("At equal damage", pair_table(pairs), EQUAL_DAMAGE)


def by_kind(scores: Scores, rows: Sequence[Row], pairs: Sequence[Row]) -> str:
    """HTML of what methods come to for each kind of edit."""
    own = titled(f"Mean of {scores.outcome}", kind_table(rows, scores.outcome), kind_caption(scores))
    return own + titled("Differences at equal damage", kind_pair_table(pairs), KIND_DIFFERENCES)


def by_block(scores: Scores, rows: Sequence[Row]) -> str:
    """HTML of what blocks do."""
    if not rows:
        return ""
    alone, lost = (html.table(block_table(rows, name)) for name in ("alone", "left out"))
    return html.quiet(block_caption(scores)) + f"<h4>Each block alone</h4>{alone}<h4>Each block left out</h4>{lost}"


def by_choice(rows: Sequence[Row]) -> str:
    """HTML of where features are chosen."""
    if not rows:
        return ""
    expected = {"kind": "expected", "n": "–"} | {row["block"]: _number(row["expected"]) for row in rows}
    added, removed = (html.table([*block_table(rows, name), expected]) for name in ("added", "removed"))
    return html.quiet(CHOICES) + f"<h4>Features added</h4>{added}<h4>Features removed</h4>{removed}"


def best_table(scores: Scores, best: Mapping[str, Row]) -> list[Row]:
    """A row per method, of the measures that matter most; the grid has all."""
    named = {setting.key: setting for setting in scores.settings}
    main = (scores.outcome, scores.harm, "outside", "to original", "to edited")
    measures = _measures(scores, list(best.values()), [measure for measure in scores.measures if measure in main])
    return [
        {"method": method, "n": row["n"]}
        | told
        | {"settings taken": "; ".join(_dose(named[key]) for key in row["settings"])}
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
            "blocks": "all" if set(row["blocks"]) == set(scores.blocks) else ", ".join(row["blocks"]) or "–",
            "n": row["n"],
        }
        | told
        for row, told in zip(rows, _measures(scores, rows, scores.measures), strict=True)
    ]


def pair_table(pairs: Sequence[Row]) -> list[Row]:
    """A row per comparison."""
    return [
        {
            "at equal damage": f"{row['method']} beside {row['other']}",
            "by": row["by"],
            "difference": _written(row, "difference"),
            "at own damage": f"{_number(row['difference at own damage'])} at {_number(row['damage'])}",
            "at the other's": f"{_number(row['difference at other damage'])} at {_number(row['other damage'])}",
            "n": row["n"],
            "so it reaches": row["verdict"],
            "but": _reserve(row) or "–",
        }
        for row in pairs
    ]


def kind_pair_table(pairs: Sequence[Row]) -> list[Row]:
    """A row per kind, a column per method that the first is compared with."""
    found: dict[str, Row] = {}
    for row in pairs:
        own = found.setdefault(row["kind"], {"kind": row["kind"], "n": row["n"]})
        own[f"{row['method']} less {row['other']}"] = f"{_written(row, 'difference')}: {row['verdict']}"
    return list(found.values())


def kind_table(rows: Sequence[Row], measure: str) -> list[Row]:
    """A row per kind, a column per method; of a kind whose items all failed, that they did."""
    found: dict[str, Row] = {}
    for row in rows:
        counts = {"kind": row["kind"], "n": row[f"{measure} n"], "failed": row["failed"]}
        found.setdefault(row["kind"], counts)[row["method"]] = _written(row, measure)
    return list(found.values())


def block_table(rows: Sequence[Row], name: str) -> list[Row]:
    """A row per kind, a column per block."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["kind"], {"kind": row["kind"], "n": row["n"]})[row["block"]] = _written(row, name)
    return list(found.values())


def _number(value: float) -> str:
    return "–" if np.isnan(value) else _signed(html.short(value))


def _written(row: Row, name: str) -> str:
    return _signed(written(row, name))


def _signed(text: str) -> str:
    """Numbers with a minus sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _measures(scores: Scores, rows: Sequence[Row], measures: Sequence[str]) -> list[Row]:
    """These; the head says for how many items where that is not all."""
    heads = {}
    for measure in measures:
        counts = sorted({row[f"{measure} n"] for row in rows})
        few = "" if counts == [len(scores)] else f" (n {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))})"
        heads[measure] = measure + few
    return [{head: _written(row, measure) for measure, head in heads.items()} for row in rows]


# Pictures -------------------------------------------------------------------------------------------------------------


def contact_sheet(scores: Scores, lines: Sequence[tuple[str, Line]], picture: Callable[[int], bytes]) -> str:
    """HTML of each method's best, median and worst item: the original, the edited prompt's picture and the method's.

    Args:
        scores: what the items came to.
        lines: each item's name and line, in the order of the scores.
        picture: an item's row of tiles (WebP), by its place.
    """
    drawn = [setting.key for setting in scores.settings if setting.method not in (CEILING, FLOOR)]
    flattering = "" if scores.judged else " Too few were scored to choose settings on others: it was chosen on these."
    parts = [
        html.quiet(
            f"Items are ranked by {_ranking(scores)}; each is shown at the setting at which it counts. From the left: "
            f"the original, the edited prompt's picture, and the method's.{flattering}"
        )
    ]
    for method in (method for method in scores.methods if method not in (CEILING, FLOOR)):
        taken = scores.shown(method)
        shown = []
        for name, at in _picked(_ranks(scores, taken)).items():
            setting, (item, line) = scores.settings[taken[at]], lines[at]
            tiles = _cut(picture(line["place"]), [0, 1, 2 + drawn.index(setting.key)], 2 + len(drawn))
            which = item if item.startswith(line["kind"]) else f"{item}, {line['kind']}"
            about = f"{which}: “{line['original']}” → “{line['edited']}”"
            alt = f"{about}: the original's picture, the edited prompt's, and the edit by {setting.key}"
            told = {measure: scores.values[measure][at, taken[at]] for measure in _ranked_by(scores)}
            numbers = ", ".join(f"{measure} {value:.2f}" for measure, value in told.items() if np.isfinite(value))
            shown.append(_figure(html.picture(tiles, alt), name, f"{about}; {_dose(setting)}: {numbers}"))
        parts.append(f'<h3>{html.escape(method)}</h3><div style="{_SHEET}">{"".join(shown)}</div>')
    return html.fragment(*parts)


def _figure(picture: str, name: str, caption: str) -> str:
    """A row of tiles over what they are."""
    told = f'<figcaption class="sae-quiet"><b>{html.escape(name)}</b> {html.words(caption)}</figcaption>'
    return f'<figure style="width: {3 * _TILE + 8}px">{picture}{told}</figure>'


def _ranked_by(scores: Scores) -> tuple[str, str, str]:
    """By what items are ranked: success in degrees, what is spared, and what changes outside the masks."""
    return scores.gain, scores.harm, "outside"


def _multiplied(scores: Scores) -> bool:
    return scores.by_product(scores.gain)


def _ranking(scores: Scores) -> str:
    gain, harm, outside = _ranked_by(scores)
    sign = "− " if NEARNESS.get(gain) == -1 else ""
    good = f"{gain} × kept" if _multiplied(scores) else f"{sign}{gain} {'+' if harm == 'kept' else '−'} {harm}"
    return f"{good}, then by least {outside}"


def _ranks(scores: Scores, taken: Int[np.ndarray, " item"]) -> list[tuple[float, float, int]]:
    """How good each item is, then how little changes outside, with its place; only of those that can be ranked.

    Of items that are as good, those of which nothing tells what changes outside come last.
    """
    gain, harm, outside = (scores.at(measure, taken) for measure in _ranked_by(scores))
    spared = harm if scores.harm == "kept" else -harm
    goods = gain * harm if _multiplied(scores) else NEARNESS.get(scores.gain, 1) * gain + spared
    least = np.nan_to_num(-outside, nan=-np.inf)
    told = enumerate(zip(goods.tolist(), least.tolist(), strict=True))
    return [(good, less, place) for place, (good, less) in told if np.isfinite(good)]


def _picked(ranks: Sequence[tuple[float, float, int]]) -> dict[str, int]:
    """The best, the median and the worst item, none twice."""
    order = [place for *_, place in sorted(ranks, reverse=True)]
    names = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"}  # of two the other is the worst
    return {names[at]: order[at] for at in sorted(names) if order}


def _cut(row: bytes, places: Sequence[int], tiles: int) -> bytes:
    """Some tiles of a row of square ones, side by side with as wide a gap."""
    whole = decode_picture(row)
    whole = whole.resize((round(whole.width * _TILE / whole.height), _TILE), Image.Resampling.BICUBIC)
    side, step = whole.height, round((whole.width - whole.height) / (tiles - 1))
    made = Image.new("RGB", ((len(places) - 1) * step + side, side), "white")
    for across, place in enumerate(places):
        made.paste(whole.crop((place * step, 0, place * step + side, side)), (across * step, 0))
    return html.to_webp(made)

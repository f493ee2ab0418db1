"""Plotly figures in a document that loads nothing: drawn by a script of the page, with their numbers in a table below.

The table is there for who cannot see the drawing or runs no scripts. Figures are taken as their JSON, since a notebook
holds them so, and all text in them may be a stranger's.
"""

from __future__ import annotations

import base64
import html as entities
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.io

from sdxl_sae_kit import html
from sdxl_sae_kit.errors import KitError

ROWS = 80
"""Most rows of a figure's table: longer curves are thinned out evenly."""
COLUMNS = 24
"""Most columns of a heat map's table."""

_MARKUP = re.compile(r"</?(?:b|i|em|strong|span|sub|sup|a|br)\b[^>]*>", re.IGNORECASE)
_FIELDS = {"labels": "part", "x": "x", "y": "y", "values": "value", "text": "text"}
"""What a trace may hold one of for each point, and its column's name where its axis has no title."""
_BARS = {"arrayminus": "below", "array": "above"}
_CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
"""By default plotly offers a button that sends the figure's data to its makers' server."""


@dataclass(frozen=True)
class Drawing:
    """A figure as the HTML that stands in its place and the script that draws into it."""

    markup: str
    script: str


def draw(spec: Mapping[str, Any], name: str, place: str) -> Drawing:
    """A plotly figure (as JSON) under an id of the page; `place` is where a person finds it, for the error.

    Raises:
        KitError: it has no alt text.

    >>> empty = {"data": [], "layout": {"meta": {"alt": "nothing"}}}
    >>> draw(empty, "figure-1", "a.ipynb, cell 1").script.count("newPlot")
    1
    """
    layout = spec.get("layout", {})
    alt = (layout.get("meta") or {}).get("alt")
    if not alt:
        raise KitError(f"{place}: a plotly figure has no alt text. Say fig.update_layout(meta={{'alt': '…'}}).")
    drawn = plotly.io.to_html(
        {"data": spec.get("data", []), "layout": layout},
        config=_CONFIG,
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,
        default_height=f"{layout.get('height') or 450}px",
        validate=False,
    )
    before, script, after = re.split(r"<script[^>]*>(.*)</script>", drawn, maxsplit=1, flags=re.DOTALL)
    text = html.escape(alt)
    # a group, not an image: it has buttons
    picture = f'<div class="drawn" role="group" aria-label="{text}">{before}{after}</div>'
    unseen = "<noscript><p>Scripts draw this figure; its numbers are in the table.</p></noscript>"
    return Drawing(
        f'<figure class="figure">{picture}{unseen}<figcaption>{text}</figcaption>{_numbers(spec)}</figure>', script
    )


def _numbers(spec: Mapping[str, Any]) -> str:
    """What a figure draws, as folded tables."""
    tables = [html.table(rows, caption) for rows, caption in tabulate(spec) if rows]
    return html.folded("Numbers of this figure", html.fragment(*tables)) if tables else ""


def tabulate(spec: Mapping[str, Any]) -> list[tuple[list[dict[str, Any]], str]]:
    """Tables of what a plotly figure (as JSON) draws, each with its caption: points together, each matrix by itself."""
    traces, layout = spec.get("data", []), spec.get("layout", {})
    flat = [trace for trace in traces if "z" not in trace and "link" not in trace and _columns(trace, layout)]
    tables = [_points(flat, layout)] if flat else []
    tables += [_matrix(trace, layout) for trace in traces if "z" in trace and np.ndim(numbers(trace["z"])) == 2]
    return tables + [_flow(trace) for trace in traces if "link" in trace]


def numbers(values: Any) -> Any:
    """An array of a figure's JSON as numpy; plotly writes long ones as the bytes of an array in base64.

    >>> numbers({"dtype": "i1", "bdata": "AQI="}).tolist()
    [1, 2]
    """
    if not isinstance(values, Mapping):
        return np.array(values, dtype=object) if _is_list(values) and any(map(_is_list, values)) else values
    read = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    shape = [int(n) for n in str(values.get("shape", len(read))).split(",")]
    return read.reshape(shape)


def _columns(trace: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a trace holds for each of its points, by column."""
    found: dict[str, list[Any]] = {}
    for key, name in _FIELDS.items():
        values = numbers(trace.get(key))
        if _is_list(values) and len(values):
            found[_axis(trace, layout, key) or name] = [_plain(value) for value in values]
    for key in ("x", "y"):
        bars = trace.get(f"error_{key}") or {}
        for part, what in _BARS.items():
            values = numbers(bars.get(part))
            if _is_list(values) and len(values):
                found[f"{what} ({key})" if trace.get("error_x") and trace.get("error_y") else what] = list(
                    map(_plain, values)
                )
    longest = max(map(len, found.values()), default=0)
    return {name: values for name, values in found.items() if len(values) == longest}


def _points(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """One row for each point of all traces; where there are many, of even traces even points, their first at least."""
    columns = [_columns(trace, layout) for trace in traces]
    names = list(dict.fromkeys(name for each in columns for name in each))
    lengths = [len(next(iter(each.values()))) for each in columns]
    told = _spread(len(traces), ROWS)
    share = min(1.0, (ROWS - len(told)) / max(1, sum(lengths[i] - 1 for i in told)))
    rows, named = [], any(trace.get("name") for trace in traces)
    for trace, each, length in ((traces[i], columns[i], lengths[i]) for i in told):
        for at in _spread(length, 1 + int(share * (length - 1))):
            row: dict[str, Any] = {"series": _plain(trace.get("name") or "–")} if named else {}
            rows.append(row | {name: each[name][at] if name in each else "–" for name in names})
    return rows, _thinned(len(rows), sum(lengths), "points")


def _matrix(trace: Mapping[str, Any], layout: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A heat map, row by row from the top of its JSON."""
    values = numbers(trace["z"])
    height, width = values.shape
    heads = (numbers(trace.get(key)) for key in ("x", "y"))
    across, down = (
        [str(_plain(text)) for text in head] if _is_list(head) and len(head) == n else [str(i) for i in range(n)]
        for head, n in zip(heads, (width, height), strict=True)
    )
    corner = _axis(trace, layout, "y") or "row"
    places = _spread(width, COLUMNS)
    rows = [
        {corner: down[y]} | {f"{across[x]}" + " " * across[:x].count(across[x]): _plain(values[y, x]) for x in places}
        for y in _spread(height, ROWS)
    ]
    return rows, _thinned(len(rows) * len(places), values.size, "cells")


def _flow(trace: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The links of a Sankey diagram."""
    names = [str(_plain(label)) for label in numbers((trace.get("node") or {}).get("label")) or ()]
    ends = (numbers(trace["link"].get(key)) for key in ("source", "target", "value"))
    links = list(zip(*ends, strict=False))
    shown = (links[at] for at in _spread(len(links), ROWS))
    rows = [{"from": names[int(a)], "to": names[int(b)], "value": _plain(value)} for a, b, value in shown]
    return rows, _thinned(len(rows), len(links), "links")


def _spread(length: int, most: int) -> list[int]:
    """At most so many places, the first and the last among them, evenly."""
    return list(dict.fromkeys(np.linspace(0, length - 1, min(length, most)).round().astype(int).tolist()))


def _thinned(shown: int, all_of_them: int, what: str) -> str:
    return f"{shown:,} of {all_of_them:,} {what}, evenly chosen" if shown < all_of_them else f"{shown:,} {what}"


def _axis(trace: Mapping[str, Any], layout: Mapping[str, Any], key: str) -> str:
    """The title of the axis along which these values lie."""
    which = str(trace.get(f"{key}axis", key))
    title = (layout.get(f"{key}axis{which[1:]}") or {}).get("title") or {}
    return str(_plain(title if isinstance(title, str) else title.get("text") or ""))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _plain(value: Any) -> Any:
    """A number as it is; of text what plotly shows of it, whose few tags and entities it reads."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return value
    return entities.unescape(_MARKUP.sub(" ", "–" if value is None else str(value))).strip()

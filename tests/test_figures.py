"""Figures of a report: what they draw can be read in a table, too."""

import numpy as np
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from made_reports import HOSTILE

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.figures import COLUMNS, ROWS, draw, tabulate


def spec(*traces, **layout):
    """A figure as a notebook holds it: plotly writes arrays as base64."""
    return go.Figure(list(traces), {"meta": {"alt": "alt"}, **layout}).to_plotly_json()


def test_points_are_told_with_the_titles_of_their_axes_and_their_bars():
    curve = go.Scatter(
        x=np.array([1, 2]),
        y=np.array([0.5, 0.25]),
        name="k10",
        error_y={"array": [0.1, 0.2], "arrayminus": [0.05, 0.1]},
    )
    bars = go.Bar(x=["a"], y=[3], name="b")
    ((rows, caption),) = tabulate(spec(curve, bars, xaxis={"title": {"text": "L0"}}))
    assert rows == [
        {"series": "k10", "L0": 1, "y": 0.5, "below": 0.05, "above": 0.1},
        {"series": "k10", "L0": 2, "y": 0.25, "below": 0.1, "above": 0.2},
        {"series": "b", "L0": "a", "y": 3, "below": "–", "above": "–"},
    ]
    assert caption == "3 points"


def test_a_heat_map_is_a_table_of_its_cells():
    ((rows, _),) = tabulate(spec(go.Heatmap(z=[[1, 2], [3, 4.5]], x=["one", "one"], y=["up", "down"])))
    assert [list(row.values()) for row in rows] == [["up", 1, 2], ["down", 3, 4.5]]


def test_a_flow_is_a_table_of_its_links():
    flow = go.Sankey(node={"label": ["a", "b", "c"]}, link={"source": [0, 0], "target": [1, 2], "value": [5, 6]})
    ((rows, _),) = tabulate(spec(flow))
    assert rows == [{"from": "a", "to": "b", "value": 5}, {"from": "a", "to": "c", "value": 6}]


def evenly(places):
    """Whether the gaps between places differ by no more than rounding does."""
    return np.ptp(np.diff(places)) <= 1


def test_of_many_links_and_many_traces_even_ones_are_told():
    flow = go.Sankey(
        node={"label": ["a", "b"]}, link={"source": [0] * 300, "target": [1] * 300, "value": [*range(300)]}
    )
    ((links, caption),) = tabulate(spec(flow))
    values = [row["value"] for row in links]
    assert len(links) == ROWS and (values[0], values[-1]) == (0, 299) and evenly(values)
    assert caption == "80 of 300 links, evenly chosen"
    ((points, caption),) = tabulate(spec(*(go.Bar(x=[i, i], y=[0, 1], name=str(i)) for i in range(200))))
    series = [int(row["series"]) for row in points]
    assert len(points) == ROWS and (series[0], series[-1]) == (0, 199) and evenly(series)
    assert caption == "80 of 400 points, evenly chosen"


def test_short_traces_stay_beside_a_long_one():
    traces = [go.Scatter(y=[*range(5000)], name="long"), *(go.Scatter(y=[1], name=f"mark {i}") for i in range(70))]
    ((rows, _),) = tabulate(spec(*traces))
    series = [row["series"] for row in rows]
    assert len(rows) <= ROWS and {f"mark {i}" for i in range(70)} <= set(series) and series.count("long") == 10


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(1, 90), st.integers(1, 60))
def test_tables_stay_small_and_keep_the_ends_of_a_single_curve(lengths, height, width):
    curves = [{"type": "scatter", "y": list(range(length))} for length in lengths]
    tables = tabulate({"data": [*curves, {"type": "heatmap", "z": np.zeros((height, width)).tolist()}], "layout": {}})
    for rows, _ in tables:
        assert 1 <= len(rows) <= ROWS and len(rows[0]) <= COLUMNS + 1
    told = [row["y"] for row in tables[0][0]]
    if len(lengths) == 1:
        assert told[0] == 0 and told[-1] == (lengths[0] - 1 if len(told) > 1 else 0)
        assert told == sorted(set(told))


def test_text_of_figures_is_shown_as_plotly_shows_it_and_does_nothing():
    marked = go.Bar(x=[HOSTILE, "a<br>b", "&lt;i&gt;"], y=[1, 2, 3], name=HOSTILE)
    drawing = draw(spec(marked, meta={"alt": HOSTILE}), "figure-1", "here")
    page = BeautifulSoup(drawing.markup, "html.parser")
    assert not page.find_all(["script", "img", "svg", "iframe", "meta", "link", "base"])
    assert not [e for e in page.find_all(True) if any(name.startswith("on") for name in e.attrs)]
    assert page.find("figcaption").get_text() == page.find(role="group")["aria-label"] == HOSTILE
    cells = [cell.get_text() for cell in page.find_all("td")]
    assert "a b" in cells and "<i>" in cells
    assert "<" not in drawing.script.split("newPlot")[1]


def test_a_figure_without_alt_text_is_refused():
    with pytest.raises(KitError, match=r"^cell 3: a plotly figure has no alt text\."):
        draw({"data": [], "layout": {}}, "figure", "cell 3")

"""Figures: each has alt text that follows its numbers; the live figure replaces itself and leaves nothing behind."""

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from sdxl_sae_kit import maps, plots

LOGS = {"mid.0 k5": [{"step": 1, "unexplained": 0.9}, {"step": 20, "unexplained": 0.123}]}
FIGURES = {
    "training curves": (lambda: plots.training_curves(LOGS), "0.123"),
    "lines": (lambda: plots.line_figure({"a": [(0, 1.0), (1, 7.25)]}, title="t", x="x", y="y"), "a 7.25"),
    "trade-off": (
        lambda: plots.trade_off({"a": [(2, 0.5, 0.4, 0.6), (5, 0.5, 0.4, 0.6)]}, title="t"),
        "better than: a 0.5 [0.4, 0.6] at 2.",
    ),
    "bytes": (lambda: plots.byte_bars({"all": 2.5e12, "some": 3e9}, title="t"), "all 2.5 TB; some 3 GB"),
    "effects": (
        lambda: plots.effects_by_group(["f 1"], {"off": [(0.5, 0.4, 0.6)], "on": [(0.2, 0.1, 0.3)]}, title="t", y="y"),
        "off 0.5 [0.4, 0.6]",
    ),
    "responses": (
        lambda: maps.response_map(["shape"], ["mid.0"], np.array([[0.321]]), title="t"),
        "mid.0: shape 0.321",
    ),
    "clusters": (
        lambda: maps.cluster_map(
            np.eye(2), np.array([3, 4]), np.array([0, 0]), ["mid.0"], np.array([0, 1]), ["a", "b"], "PCA"
        ),
        "2 of mid.0",
    ),
    "ranking": (
        lambda: plots.ranked_bars(
            ["b", "a"],
            ["resnet", "transformer block"],
            [(0.75, 0.5, 1), (0.25, 0, 0.5)],
            ("line", 0.125),
            title="t",
            x="x",
        ),
        "b 0.75 [0.5, 1]; a 0.25 [0, 0.5]. The line is line, 0.125.",
    ),
    "share map": (
        lambda: maps.share_map(["a", "b"], ["shape", "colour"], np.array([[0, 0.5], [0, 0]]), title="t"),
        "mean 12%. Highest: a, colour, 50%.",
    ),
    "predictions": (
        lambda: plots.predicted_and_true({"top": [(1.0, 2.0, "p")]}, "ρ is 1.", title="t", x="x", y="y"),
        "y over x, 1 of top, with the line of equality. ρ is 1.",
    ),
    "flow": (lambda: maps.block_flow(["mid.0"], ["a", "b"], np.array([[1, 3]])), "mid.0: b (75%)"),
    "by group": (
        lambda: plots.points_by_group(["a", "b"], {"own": [(0.5, 0.4, 0.6), None]}, title="t", y="y"),
        "a own 0.50 [0.40, 0.60]; b .",
    ),
    "fronts": (
        lambda: plots.pareto(
            {"own": [(0.5, 0.4, 0.6, 0.7, 0.6, 0.8, "k 1")], "none": [(1, 1, 1, 0, 0, 0.1, "")]},
            {"own": [(1, 0), (0.5, 0.7)]},
            title="t",
            x="kept",
            y="reached",
        ),
        "own 0.7 [0.6, 0.8] at 0.5 [0.4, 0.6]; none 0 [0, 0.1] at 1 [1, 1]. Fronts as (x, y): own through (1, 0), (0.5",
    ),
    "gains": (
        lambda: maps.gain_map(["a (2)"], ["mid.0"], np.array([[[-0.001, -0.2, 0.3]]]), title="t", scale="s"),
        "a (2): mid.0 0.00 [-0.20, 0.30]",
    ),
    "intervals": (
        lambda: plots.interval_lines({"own": [(2, 0.5, 0.4, 0.6)]}, title="t", x="k", y="v"),
        "own 0.5 [0.4, 0.6] at 2",
    ),
}


@pytest.mark.parametrize(("make", "number"), FIGURES.values(), ids=FIGURES.keys())
def test_alt_text_states_the_numbers_that_are_drawn(make, number):
    assert number in make().layout.meta["alt"]


def test_a_trade_off_fills_the_points_that_no_other_beats():
    small, large = [(2, 0.5, 0.4, 0.55), (5, 0.7, 0.6, 0.8)], [(5.0, 0.6, 0.5, 0.7), (9.0, 0.9, 0.8, 1.0)]
    first, second = plots.trade_off({"small": small, "large": large}, title="t").data
    assert [symbol.endswith("-open") for symbol in (*first.marker.symbol, *second.marker.symbol)] == [0, 0, 1, 0]


def test_a_trade_off_draws_what_is_left_unexplained_and_says_what_is_explained():
    drawn = plots.trade_off({"a": [(2, 0.5, 0.4, 0.55), (5, 1.0, 1.0, 1.0)]}, title="t")
    (line,) = drawn.data
    assert line.y[0] == pytest.approx(0.5) and line.y[1] > 0  # a logarithm is taken
    assert (line.error_y.array[0], line.error_y.arrayminus[0]) == pytest.approx((0.1, 0.05))
    assert line.hovertext[0] == "L0 2: 0.5000 [0.4000, 0.5500]"
    assert dict(zip(drawn.layout.yaxis.ticktext, drawn.layout.yaxis.tickvals, strict=True))[0.98] == pytest.approx(0.02)


LIVE = """
from sdxl_sae_kit.plots import LiveFigure, line_figure
with LiveFigure(every=-1) as live:
    for n in range(4):
        live.show(lambda: line_figure({"a": [(0, n)]}, title="t", x="x", y="y"))
        LAST
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_in_a_notebook_the_live_figure_is_one_output_and_is_cleared_at_the_end(interrupted):
    source = LIVE.replace("LAST", "raise KeyboardInterrupt" if interrupted else "pass")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    (output,) = (o for o in notebook.cells[0].outputs if o.output_type == "display_data")
    assert output.data == {"text/plain": ""}


def test_outside_a_notebook_it_does_nothing():
    with plots.LiveFigure(every=-1) as live:
        live.show(lambda: pytest.fail("nobody is looking"))

"""What people see of RIEBench: no claim without an interval above 0, escaped words, pictures from the right tiles."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from bs4 import BeautifulSoup
from made_riebench import BLOCKS, ENDS, by_block, coin, floor, grid, made_up
from PIL import Image
from test_benchmarked import FULL, plain, real, unjudged

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR
from sdxl_sae_kit.studies.benchmarked import RIEBench
from sdxl_sae_kit.studies.scoring import MEASURES


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> RIEBench:
    """Four methods on 60 items, of which one failed, with pictures."""
    folder = tmp_path_factory.mktemp("views")
    return made_up(folder, FULL, plain, failed={"change style 003": "the mask is <empty>"}, pictures=True)


def test_the_sentence_claims_what_intervals_say_and_nothing_else(bench, tmp_path) -> None:
    said = bench.sentence()
    assert "59 items scored; 1 failed" in said and "sae reaches more than random" in said
    assert "Every comparison stands for itself" in bench._repr_html_() and all(f"{m} " in said for m in bench.edits)
    random = bench.compare("sae", "random")
    assert random["difference interval"][0] > 0 and f"{random['difference']:#.3g}" in said

    def alike(setting, place, rng):
        return floor() | ({"reached": coin(0.5, rng), "kept": 0.9} if setting.k else {"reached": 0.0})

    same = made_up(tmp_path, grid("sae", "random", ks=(8,)), alike)
    assert "sae is not told apart from random" in same.sentence() and "reaches more" not in same.sentence()


def test_the_other_reaches_more_where_the_interval_is_below_0(tmp_path) -> None:
    def score(setting, place, rng):
        often = {"sae": 0.1, "steering": 0.9}.get(setting.method, 0.0)
        return floor() | {"reached": coin(often, rng), "kept": 0.9 if often else 1.0}

    assert "sae reaches less than steering" in made_up(tmp_path, grid("sae", "steering"), score).sentence()


@pytest.mark.parametrize("methods", [("steering",), ("random", "neurons"), ()])
def test_every_method_is_told_of_whichever_were_run(tmp_path, methods) -> None:
    bench = made_up(tmp_path, [*grid(*methods), *ENDS], plain, pictures=True)
    said = bench.sentence()
    assert "  " not in said and said.startswith("60 items scored. ") and "Changing the prompt itself" in said
    assert all(f"{method} " in said for method in methods) and ("At equal damage" in said) == (len(methods) > 1)
    assert "<table" in bench._repr_html_()


def test_html_tells_all_parts_and_escapes_what_strangers_wrote(bench) -> None:
    markup = bench._repr_html_()
    page = BeautifulSoup(markup, "html.parser")
    assert not page.find_all(["b"], string="red") and "a <b>red</b> & round thing" in page.get_text()
    assert "the mask is <empty>" in page.get_text() and "<empty>" not in markup
    folds = [each.summary.get_text() for each in page.find_all("details")]
    assert folds == [
        "Every setting", "Kinds of edits", "Blocks", "Where features are chosen", "Best, median and worst items",
        "Failed items (1)",
    ]  # fmt: skip
    first = page.find("table")
    assert [row.td.get_text() for row in first.tbody.find_all("tr")] == [*bench.methods]
    assert all(image["alt"] and image["src"].startswith("data:image/webp") for image in page.find_all("img"))


def test_the_contact_sheet_shows_best_median_and_worst_of_each_method_from_its_own_tiles(bench) -> None:
    page = BeautifulSoup(bench.contact_sheet(), "html.parser")
    drawn = [setting.key for setting in bench.settings if setting.method not in (CEILING, FLOOR)]
    methods = [method for method in bench.methods if method not in (CEILING, FLOOR)]
    shown = page.find_all("figure")
    assert len(shown) == 3 * len(methods) and "target × kept" in page.get_text()
    for at, figure in enumerate(shown):
        assert figure.b.get_text() == ("best", "median", "worst")[at % 3]
        key = figure.img["alt"].rsplit("the edit by ", 1)[1]
        assert key.startswith(methods[at // 3])
        tiles = Image.open(io.BytesIO(base64.b64decode(figure.img["src"].split(",")[1]))).convert("RGB")
        assert tiles.size == (3 * 120 + 2 * 5, 120)
        greens = [np.asarray(tiles)[60, 60 + 125 * tile, 1] for tile in range(3)]
        n = 2 + len(drawn)
        assert greens == pytest.approx([255 * each / n for each in (0, 1, 2 + drawn.index(key))], abs=4)
    for at in range(0, len(shown), 3):
        goods = [np.prod([float(x) for x in re.search(r"target ([\d.]+), kept ([\d.]+)", f.get_text()).groups()])
                 for f in shown[at : at + 3]]  # fmt: skip
        assert goods == sorted(goods, reverse=True) and goods[0] > goods[2]


def test_figures_have_alt_text_with_their_numbers(bench) -> None:
    row = bench.rows()[0]
    line = bench.plot()
    assert line.layout.xaxis.title.text == "kept" and line.layout.yaxis.title.text == "reached"
    assert list(dict.fromkeys(trace.name for trace in line.data)) == bench.methods
    own, front = (trace for trace in line.data if trace.name == "sae")
    drawn = set(zip(own.x, own.y, strict=True))
    assert len(own.x) == 4 and (row["kept"], row["reached"]) in drawn and own.mode == "markers"
    none = next(row for row in bench.rows() if row["method"] == "none")
    corners = list(zip(front.x, front.y, strict=True))
    assert corners[0] == (none["kept"], none["reached"]) and set(corners[1:]) <= drawn and front.mode == "lines"
    assert max(own.y) == max(front.y) and "59 items" in line.layout.title.text
    alt = line.layout.meta["alt"]
    assert (
        f"none {none['reached']:.3g} [" in alt and f"{row['reached']:.3g} [" in alt and f"at {row['kept']:.3g} [" in alt
    )
    bars = bench.plot_kinds("kept")
    told = {(r["kind"], r["method"]): r["kept"] for r in bench.kind_rows("kept")}
    for trace in bars.data:
        kinds = [kind.rsplit(" (", 1)[0] for kind in trace.hovertext]
        assert list(trace.y) == pytest.approx([told[kind, trace.name] for kind in kinds]) and len(kinds) == 3
    assert list(bars.layout.xaxis.ticktext) == ["change object (20)", "change colour (20)", "change style (19 of 20)"]
    blocks = bench.plot_blocks()
    alone = np.array([r["alone"] for r in bench.block_rows()]).reshape(-1, len(BLOCKS))
    assert np.allclose(np.array(blocks.data[0].z), alone) and "mid.0" in blocks.layout.meta["alt"]
    assert list(blocks.data[0].y)[0] == "all (59)" and blocks.data[0].colorbar.title.text == "gain of target"
    lost = np.array([r["left out"] for r in bench.block_rows()]).reshape(-1, len(BLOCKS))
    assert np.allclose(np.array(bench.plot_blocks(what="left out").data[0].z), lost)
    with pytest.raises(KitError, match="what is 'alone' or 'left out', not 'out'"):
        bench.plot_blocks(what="out")
    nearer, further = (bench.plot_blocks(measure).data[0].colorscale[-1][1] for measure in ("target", "to edited"))
    assert nearer != further, "blue is better, which of distances is less"


@pytest.mark.parametrize("score", [real, unjudged(*MEASURES[:4], *MEASURES[5:])], ids=["real", "pixels"])
def test_other_judges_are_told_of_too(tmp_path, score) -> None:
    bench = made_up(tmp_path, [*grid("sae", "random"), *by_block(), *ENDS], score, per_kind=6, pictures=True)
    page, judged = bench._repr_html_(), bench.scores.judged
    assert ("nan" not in BeautifulSoup(page, "html.parser").get_text()) and ("Best, median" in page) == judged
    if judged:
        assert bench.plot().layout.xaxis.title.text == "to original" and "as near to the edited" in bench.sentence()
    else:
        assert "that needs a judge" in bench.sentence()


def test_where_every_item_failed_that_is_said(tmp_path) -> None:
    names = {f"change colour {i:03}": "no mask" for i in range(3)}
    bench = made_up(tmp_path, FULL, plain, per_kind=3, kinds=("change colour",), failed=names)
    assert bench.n == 0 and "All 3 items failed, so nothing can be told" in bench.sentence()
    for ask in (bench.plot, bench.choices, bench.rows, bench.block_rows, bench.plot_kinds, lambda: bench.best("sae")):
        with pytest.raises(KitError, match=r"All 3 items failed, so nothing was scored: see \.failed"):
            ask()
    assert "Failed items (3)" in bench._repr_html_() and "no mask" in bench._repr_html_()
    assert bench.to_json()["scores"] == {}


def test_items_with_masks_of_everything_have_a_dash_outside_and_come_last_among_equals(tmp_path) -> None:
    def score(setting, place, rng):
        return floor() | {"reached": 1.0, "target": 1.0, "outside": None if place % 3 == 0 else 0.5 + place / 100}

    bench = made_up(tmp_path, [*grid("sae"), *ENDS], score, per_kind=3, pictures=True)
    sheet = BeautifulSoup(bench.contact_sheet(), "html.parser")
    best, _, worst = (figure.get_text() for figure in sheet.find_all("figure"))
    assert "outside 0.51" in best and "outside" not in worst and "nan" not in sheet.get_text()


def test_where_no_target_is_told_what_is_kept_still_counts_for_an_item(tmp_path) -> None:
    def score(setting, place, rng):
        return {"kept": place / 10, "to edited": 0.4, "to original": 0.1, "pixel": 0.1, "outside": 0.1}

    bench = made_up(tmp_path, [*grid("sae"), *ENDS], score, per_kind=3, pictures=True)
    sheet = BeautifulSoup(bench.contact_sheet(), "html.parser")
    best, _, worst = (figure.get_text() for figure in sheet.find_all("figure"))
    assert "kept 0.80" in best and "kept 0.00" in worst and "− to edited + kept" in sheet.get_text()


def test_pictures_of_a_single_item_are_shown_too(tmp_path) -> None:
    bench = made_up(tmp_path, [*grid("sae"), *ENDS], plain, per_kind=1, kinds=("change colour",), pictures=True)
    assert len(BeautifulSoup(bench.contact_sheet(), "html.parser").find_all("figure")) == 1
    assert "Too few were scored to choose settings on others" in bench._repr_html_()


def test_only_points_on_fronts_have_their_intervals_drawn(bench) -> None:
    own, front = (trace for trace in bench.plot().data if trace.name == "sae")
    corners = set(zip(front.x, front.y, strict=True))
    drawn = [bool(high or low) for high, low in zip(own.error_y.array, own.error_y.arrayminus, strict=True)]
    assert drawn == [corner in corners for corner in zip(own.x, own.y, strict=True)] and any(drawn)

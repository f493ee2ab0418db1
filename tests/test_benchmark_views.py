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

from sdxl_sae_kit.studies.benchmark_scores import CEILING, FLOOR, MEASURES
from sdxl_sae_kit.studies.benchmarked import RIEBench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> RIEBench:
    """Four methods on 60 items, of which one failed, with pictures."""
    folder = tmp_path_factory.mktemp("views")
    return made_up(folder, FULL, plain, failed={"change style 003": "the mask is <empty>"}, pictures=True)


def test_the_sentence_claims_what_intervals_say_and_nothing_else(bench, tmp_path) -> None:
    said = bench.sentence()
    assert "59 items scored; 1 failed" in said and "sae is better" in said
    random = bench.compare("sae", "random")
    assert random["difference interval"][0] > 0 and f"{random['difference']:#.3g}" in said

    def alike(setting, place, rng):
        return floor() | ({"reached": coin(0.5, rng), "kept": 0.9} if setting.k else {"reached": 0.0})

    same = made_up(tmp_path, grid("sae", "random", ks=(8,)), alike)
    assert "is better" not in same.sentence() and "they are not told apart" in same.sentence()


def test_the_other_is_better_only_by_the_comparison_that_leans_against_it(tmp_path) -> None:
    def score(setting, place, rng):
        often = {"sae": 0.1, "steering": 0.9}.get(setting.method, 0.0)
        return floor() | {"reached": coin(often, rng), "kept": 0.9 if often else 1.0}

    assert "steering is better" in made_up(tmp_path, grid("sae", "steering"), score).sentence()


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
        assert tiles.size == (3 * 96 + 2 * 4, 96)
        greens = [np.asarray(tiles)[48, 48 + 100 * tile, 1] for tile in range(3)]
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
    assert [trace.name for trace in line.data] == bench.methods
    own = next(trace for trace in line.data if trace.name == "sae")
    assert len(own.x) == 4 and (row["kept"], row["reached"]) in set(zip(own.x, own.y, strict=True))
    assert list(own.x) == sorted(own.x) and f"none {0.0:.3g}"[:5] in line.layout.meta["alt"]
    bars = bench.plot_kinds("kept")
    told = {(r["kind"], r["method"]): r["kept"] for r in bench.kind_rows("kept")}
    for trace in bars.data:
        assert list(trace.y) == pytest.approx([told[kind.rsplit(" (", 1)[0], trace.name] for kind in trace.x])
    blocks = bench.plot_blocks()
    alone = np.array([r["alone"] for r in bench.block_rows()]).reshape(-1, len(BLOCKS))
    assert np.allclose(np.array(blocks.data[0].z), alone) and "mid.0" in blocks.layout.meta["alt"]


@pytest.mark.parametrize("score", [real, unjudged(*MEASURES[:4], *MEASURES[5:])], ids=["real", "pixels"])
def test_other_judges_are_told_of_too(tmp_path, score) -> None:
    bench = made_up(tmp_path, [*grid("sae", "random"), *by_block(), *ENDS], score, per_kind=6, pictures=True)
    page, judged = bench._repr_html_(), bench.scores.judged
    assert ("nan" not in BeautifulSoup(page, "html.parser").get_text()) and ("Best, median" in page) == judged
    if judged:
        assert bench.plot().layout.xaxis.title.text == "to original" and "nearer to the edited" in bench.sentence()
    else:
        assert "that needs a judge" in bench.sentence()


def test_where_every_item_failed_that_is_said(tmp_path) -> None:
    names = {f"change colour {i:03}": "no mask" for i in range(3)}
    bench = made_up(tmp_path, FULL, plain, per_kind=3, kinds=("change colour",), failed=names)
    assert bench.n == 0 and "nothing can be told" in bench.sentence()
    assert "Failed items (3)" in bench._repr_html_() and "no mask" in bench._repr_html_()
    assert bench.to_json()["scores"] == {}

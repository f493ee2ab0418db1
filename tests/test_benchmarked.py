"""Results of RIEBench: choosing does not flatter, damage is equal, blocks agree or do not, all is exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from made_riebench import BLOCKS, ENDS, KINDS, by_block, coin, floor, grid, made_up
from scipy.optimize import linprog
from scipy.stats import spearmanr

import sdxl_sae_kit
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.studies.benchmark_blocks import agreement
from sdxl_sae_kit.studies.benchmark_scores import MEASURES, Scores
from sdxl_sae_kit.studies.benchmarked import RIEBench
from sdxl_sae_kit.studies.equal_damage import halves, mixed_at
from sdxl_sae_kit.studies.statistics import wilson
from sdxl_sae_kit.studies.transport import Setting

REACH = {"sae": 0.7, "sae_adaptive": 0.7, "steering": 0.75, "neurons": 0.4, "random": 0.1, "prompt": 0.95, "none": 0.05}


def plain(setting: Setting, place: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Methods reach as often as `REACH` says and do as much damage as their strength."""
    if setting.method == "none":
        return floor() | {"reached": coin(0.05, rng), "target": 0.05}
    part = len(setting.blocks) / len(BLOCKS) if setting.blocks else 1
    reached, damage = coin(REACH[setting.method] * part, rng), 0.1 * setting.strength
    scores = {"reached": reached, "target": 0.1 + 0.8 * reached, "kept": float(np.mean(rng.random(5) > damage))}
    scores |= {"outside": rng.random() / 9, "pixel": damage, "to original": damage, "to edited": 0.5 - 0.4 * reached}
    return scores | {"image similarity": 0.5 + reached / 3, "text similarity": rng.random()}


def unjudged(*left_out: str) -> Any:
    def score(setting: Setting, place: int, rng: np.random.Generator) -> dict[str, float | None]:
        return {name: value for name, value in plain(setting, place, rng).items() if name not in left_out}

    return score


real = unjudged("reached", "target", "kept", "text similarity")
FULL = [*grid("sae", "steering", "neurons", "random"), *by_block(), *ENDS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> RIEBench:
    """Four methods on 60 items, of which one failed."""
    folder = tmp_path_factory.mktemp("bench")
    return made_up(folder, FULL, plain, failed={"change style 003": "the mask is <empty>"}, pictures=True)


def scores_of(reached: Any, kept: Any, methods: list[str], kinds: list[str] | None = None) -> Scores:
    """Scores with these arrays (item, setting), and no edit at the end."""
    n, width = np.asarray(reached).shape
    settings = [Setting(m, 1 + at, 1.0, BLOCKS) for at, m in enumerate(methods)] + [Setting("none", None, 0.0, ())]
    told = {m: np.full((n, width + 1), np.nan) for m in MEASURES}
    told["reached"] = np.concatenate([reached, np.zeros((n, 1))], axis=1)
    told["kept"] = np.concatenate([kept, np.ones((n, 1))], axis=1)
    return Scores(kinds or ["change colour"] * n, settings, told)


# Means ----------------------------------------------------------------------------------------------------------------


def test_rows_are_means_over_scored_items_with_wilsons_interval_of_reached(bench) -> None:
    told = [json.loads(line)[1] for line in bench.artifact.file("items.jsonl").read_text().splitlines()]
    there = [line for line in told if line["failed"] is None]
    assert bench.n == len(there) == 59 and bench.failed == [
        {"item": "change style 003", "kind": "change style", "reason": "the mask is <empty>"}
    ]
    assert [(row["method"], row["k"], row["strength"], row["blocks"]) for row in bench.rows()] == [
        (s.method, s.k, s.strength, s.blocks) for s in bench.settings
    ]
    for row, setting in zip(bench.rows(), bench.settings, strict=True):
        for measure in MEASURES:
            values = [line["scores"][setting.key][measure] for line in there]
            low, high = row[f"{measure} interval"]
            assert row[measure] == pytest.approx(np.mean(values)) and low - 1e-9 <= row[measure] <= high + 1e-9
            half = 1.96 * np.std(values) / np.sqrt(len(values))
            if measure != "reached" and half > 0:
                assert (high - low) / 2 == pytest.approx(half, rel=0.15)
            assert row["n"] == row[f"{measure} n"] == 59
        hits = sum(line["scores"][setting.key]["reached"] for line in there)
        assert row["reached interval"] == wilson(int(hits), 59)[1]


def test_the_order_of_items_changes_nothing(bench, tmp_path) -> None:
    shuffled = made_up(
        tmp_path, FULL, plain, failed={"change style 003": "?"},
        order=lambda names: [names[at] for at in np.random.default_rng(5).permutation(len(names))],
    )  # fmt: skip
    assert shuffled.rows() == bench.rows() and shuffled.kind_rows() == bench.kind_rows()
    assert shuffled.compare("sae", "random") == bench.compare("sae", "random")
    assert shuffled.best("sae") == bench.best("sae") and shuffled.block_rows() == bench.block_rows()


def test_what_is_not_told_of_an_item_is_left_out_of_that_mean_alone(tmp_path) -> None:
    def score(setting, place, rng):
        return plain(setting, place, rng) | ({"outside": None, "kept": None} if place % 3 == 0 else {"outside": 0.5})

    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], score)
    row = bench.rows()[0]
    assert (row["n"], row["outside n"], row["outside"], row["kept n"]) == (60, 40, pytest.approx(0.5), 40)
    assert row["outside interval"] == pytest.approx((0.5, 0.5)) and np.isfinite(row["kept"])
    assert bench.compare("sae", "random")["n"] == 40 and bench.best("sae")["reached n"] == 60


# Choosing -------------------------------------------------------------------------------------------------------------


def test_halves_take_every_other_item_of_each_kind() -> None:
    assert halves(["a", "a", "b", "a", "b", "b"]).tolist() == [False, True, False, False, True, False]


def test_each_half_is_scored_at_the_setting_that_is_best_on_the_other(tmp_path) -> None:
    """Two settings: the first reaches on even places only, the second on odd ones."""

    def score(setting, place, rng):
        return floor() | {"reached": float((setting.k == 8) == (place % 2 == 0)) if setting.k else 0.0}

    bench = made_up(tmp_path, [Setting("sae", k, 1.0, BLOCKS) for k in (8, 16)], score)
    best = bench.best("sae")
    assert best["reached"] == 0, "what is best for one half reaches nothing in the other"
    assert len(best["settings"]) == 2 and max(row["reached"] for row in bench.rows()) == 0.5


def test_choosing_among_settings_that_are_all_alike_does_not_flatter() -> None:
    rng, p = np.random.default_rng(0), 0.5
    best, flattered = [], []
    for _ in range(400):
        reached = (rng.random((40, 12)) < p).astype(float)
        scores = scores_of(reached, np.ones_like(reached), ["sae"] * 12)
        taken = scores.taken("sae")
        best.append(scores.at("reached", taken).mean())
        flattered.append(reached.mean(axis=0).max())
    error = np.std(best) / np.sqrt(len(best))
    assert abs(np.mean(best) - p) < 3 * error
    assert np.mean(flattered) - p > 10 * error


def test_settings_of_some_blocks_and_other_methods_take_no_part(tmp_path) -> None:
    def score(setting, place, rng):
        return floor() | {"reached": float(len(setting.blocks) == 1), "kept": 0.9}

    bench = made_up(tmp_path, [*grid("sae", "random"), *by_block(), *ENDS], score)
    assert bench.best("sae")["reached"] == 0 and bench.compare("random", "sae")["other reached"] == 0
    assert bench.methods == ["sae", "random", "prompt", "none"]


def test_without_factors_the_least_distances_are_best(tmp_path) -> None:
    def score(setting, place, rng):
        apart = {8: (0.3, 0.3), 16: (0.1, 0.4)}.get(setting.k, (0.0, 0.6))
        return {"to original": apart[0], "to edited": apart[1] + 0.001 * rng.random(), "pixel": 0.1}

    bench = made_up(tmp_path, [Setting(m, k, 1.0, BLOCKS) for m in ("sae", "random") for k in (8, 16)], score)
    assert bench.best("sae")["settings"] == [Setting("sae", 16, 1.0, BLOCKS).key]
    row = bench.compare("sae", "random")
    assert row["by"] == "to edited" and row["damage"] == pytest.approx(0.1) and row["damage is"].startswith("distance")
    assert row["reached"] == pytest.approx(0.2, abs=0.01) and row["difference"] == pytest.approx(0, abs=0.002)
    assert np.isnan(bench.best("sae")["reached"]) and bench.best("sae")["reached n"] == 0


# Equal damage ---------------------------------------------------------------------------------------------------------


def test_the_hull_is_what_any_mixture_reaches_at_no_more_damage() -> None:
    """Against linear programming over mixtures of any number of points, which is another way to say it."""
    rng = np.random.default_rng(0)
    damage, reached = (np.concatenate([np.zeros((60, 1)), rng.random((60, 7))], axis=1) for _ in range(2))
    at = rng.random(60) * 1.2
    found = mixed_at(damage, reached, at)
    for row in range(60):
        best = linprog(-reached[row], damage[row][None], [at[row]], np.ones((1, 8)), [1], bounds=(0, 1))
        assert found[row] == pytest.approx(-best.fun, abs=1e-9)


def test_the_hull_is_the_best_of_all_pairs_of_points() -> None:
    """Against a plain loop over pairs and shares, which is dumb and only nearly exact."""
    damage, reached = [0.0, 0.1, 0.2, 0.2, 0.5], [0.05, 0.5, 0.4, 0.6, 0.55]
    for at in (0.0, 0.05, 0.1, 0.17, 0.3, 0.9):
        best = max(
            (1 - s) * reached[i] + s * reached[j]
            for i in range(5)
            for j in range(5)
            for s in np.linspace(0, 1, 1001)
            if (1 - s) * damage[i] + s * damage[j] <= at + 1e-9
        )
        assert mixed_at(np.array(damage), np.array(reached), np.array(at)) == pytest.approx(best, abs=1e-3)


def two_methods(rng: np.random.Generator, n: int, lead: float) -> Scores:
    """Three settings each of two methods with the same damage; the first reaches more often, by `lead`."""
    each = np.array([0.1, 0.2, 0.3])
    reached = rng.random((n, 6)) < np.concatenate([0.3 + lead + each, 0.3 + each])
    kept = 1 - (rng.random((n, 6)) < np.concatenate([each, each])).astype(float)
    return scores_of(reached.astype(float), kept, ["sae"] * 3 + ["random"] * 3)


def test_a_true_lead_at_equal_damage_is_found() -> None:
    for seed in range(5):
        row = two_methods(np.random.default_rng(seed), 180, 0.3).compare("sae", "random", "reached")
        assert row["difference interval"][0] > 0 and row["difference"] == pytest.approx(0.3, abs=0.15)
        assert row["n"] == 180


@pytest.mark.slow
def test_where_methods_are_equal_a_lead_is_seldom_claimed() -> None:
    claims = []
    for seed in range(200):
        scores = two_methods(np.random.default_rng(seed), 90, 0.0)
        claims.append([scores.compare(*pair, "reached")["difference interval"][0] > 0 for pair in (PAIR, PAIR[::-1])])
    assert np.mean(claims) <= 0.04, "2.5 % either way would be exact; noise in the hull makes it fewer"


PAIR = ("sae", "random")


def test_a_copy_of_a_method_is_not_told_apart(tmp_path) -> None:
    def score(setting, place, rng):
        reached = coin(0.3 + 0.2 * setting.strength, rng) if setting.k else 0.0
        return floor() | {"reached": reached, "kept": 1 - 0.1 * setting.strength if setting.k else 1.0}

    # a line's generator is the same for each setting in turn: strengths differ, methods only by chance
    bench = made_up(tmp_path, grid("sae", "sae_adaptive", ks=(8,)), score, per_kind=60)
    row = bench.compare("sae", "sae_adaptive")
    assert abs(row["difference"]) < 0.12 and row["difference interval"][0] < 0 < row["difference interval"][1] + 0.05
    own = bench.compare("sae", "sae")
    assert -0.05 < own["difference"] <= 1e-9, "its own hull is at least what it reaches, and hardly more"


def test_beyond_the_largest_damage_the_others_highest_value_holds(tmp_path) -> None:
    def score(setting, place, rng):
        reached, damage = {"sae": (1.0, 0.5), "random": (0.4, 0.1)}.get(setting.method, (0.0, 0.0))
        return floor() | {"reached": float(place % 5 < 5 * reached), "kept": 1 - damage}

    bench = made_up(tmp_path, grid("sae", "random"), score)
    row = bench.compare("sae", "random")
    assert row["beyond"] and row["damage"] == pytest.approx(0.5) and row["other reached"] == pytest.approx(0.4)
    back = bench.compare("random", "sae")
    assert not back["beyond"] and back["other reached"] == pytest.approx(0.2), "a fifth of the way from no edit"
    assert "no setting of it does as much damage" in bench.sentence()


def test_the_probability_of_the_target_can_be_what_is_reached(bench) -> None:
    row = bench.compare("sae", "random", by="target")
    assert row["by"] == "target" and 0.1 < row["other reached"] < row["reached"] < 0.9
    assert row["chosen by"] == "greatest mean(target) × mean(kept)"


# Kinds and blocks -----------------------------------------------------------------------------------------------------


def test_kinds_are_scored_at_the_same_settings_as_all(bench) -> None:
    rows = bench.kind_rows("target")
    assert [(row["kind"], row["method"]) for row in rows] == [
        (kind, method) for kind in sorted(KINDS) for method in bench.methods
    ]
    for method in bench.methods:
        mine = [row for row in rows if row["method"] == method]
        whole = sum(row["target"] * row["target n"] for row in mine) / 59
        assert whole == pytest.approx(bench.best(method)["target"]) and sum(row["target n"] for row in mine) == 59


def by_gain(gains: dict[tuple[str, str], float], noise: float = 0.0) -> Any:
    """Each block alone gains so much of the target's probability; all gain their sum."""

    def score(setting, place, rng):
        kind = KINDS[place // 20]
        gain = sum(gains[kind, block] for block in setting.blocks)
        return floor() | {"target": 0.1 + gain + noise * rng.standard_normal(), "reached": 1.0}

    return score


GAINS = {
    (kind, block): 0.05 * (1 + (3 * i + 2 * j) % 5) for i, kind in enumerate(KINDS) for j, block in enumerate(BLOCKS)
}


def test_blocks_are_measured_alone_and_left_out(tmp_path) -> None:
    bench = made_up(tmp_path, [*grid("sae"), *by_block()], by_gain(GAINS, 0.01))
    rows = {(row["kind"], row["block"]): row for row in bench.block_rows()}
    assert len(rows) == (1 + len(KINDS)) * len(BLOCKS)
    for (kind, block), gain in GAINS.items():
        for name in ("alone", "left out"):
            row = rows[kind, block]
            assert row[name] == pytest.approx(gain, abs=0.02) and row["n"] == 20
            assert row[f"{name} interval"][0] <= row[name] <= row[f"{name} interval"][1]
    assert rows["all", "mid.0"]["alone"] == pytest.approx(np.mean([GAINS[k, "mid.0"] for k in KINDS]), abs=0.02)


def test_with_two_blocks_one_alone_is_the_other_left_out(tmp_path) -> None:
    two = BLOCKS[:2]
    bench = made_up(tmp_path, [*grid("sae", blocks=two), *by_block(blocks=two)], by_gain(GAINS))
    rows = {(row["kind"], row["block"]): row for row in bench.block_rows()}
    for kind in KINDS:
        assert rows[kind, two[0]]["left out"] == pytest.approx(GAINS[kind, two[0]])
        assert rows[kind, two[0]]["alone"] == pytest.approx(GAINS[kind, two[0]])


def test_without_blocks_there_are_no_rows_and_no_map(tmp_path) -> None:
    bench = made_up(tmp_path, grid("sae", "random"), plain)
    assert bench.block_rows() == []
    with pytest.raises(KitError, match="Call riebench with by_block"):
        bench.plot_blocks()
    with pytest.raises(KitError, match="This result does not tell what each block does alone"):
        bench.block_agreement(bench)


def test_agreement_is_spearmans_and_orders_within_kinds_are_what_chance_shuffles(tmp_path) -> None:
    settings = [*grid("sae"), *by_block()]
    one = made_up(tmp_path / "1", settings, by_gain(GAINS, 0.02))
    other = made_up(tmp_path / "2", settings, by_gain(GAINS, 0.02), seed=1)
    row = one.block_agreement(other)
    tables = [
        np.array([r["alone"] for r in bench.block_rows() if r["kind"] != "all"]).reshape(3, 3) for bench in (one, other)
    ]
    assert row["ρ"] == pytest.approx(spearmanr(*(table.ravel() for table in tables)).statistic)
    within = [spearmanr(*lines).statistic for lines in zip(*tables, strict=True)]
    assert row["ρ within kinds"] == pytest.approx(np.mean(within)) and row["cells"] == 9
    assert row["ρ within kinds p"] < 0.05 and "the same blocks do most" in row["verdict"]
    turned = {(kind, block): GAINS[kind, BLOCKS[-1 - at]] for kind in KINDS for at, block in enumerate(BLOCKS)}
    against = one.block_agreement(made_up(tmp_path / "3", settings, by_gain(turned, 0.02)))
    assert against["ρ within kinds p"] > 0.05 and "no evidence" in against["verdict"]
    fewer = made_up(tmp_path / "4", settings, by_gain(GAINS), kinds=KINDS[:2])
    with pytest.raises(KitError, match=f"only one of them has {KINDS[2]} at down.2.1"):
        one.block_agreement(fewer)


def test_easy_kinds_alone_are_no_agreement_within_kinds() -> None:
    """Kinds differ by far more than blocks, whose order is drawn anew: ρ over all cells is high, p says chance."""
    rng, p = np.random.default_rng(0), []
    for _ in range(60):
        one, other = (
            [
                {"kind": kind, "block": block, "alone": 0.2 * i + 0.03 * rng.random()}
                for i, kind in enumerate("abcde")
                for block in BLOCKS
            ]
            for _ in range(2)
        )
        row = agreement(one, other)
        assert row["ρ"] > 0.8 and row["cells"] == 15
        p.append((row["ρ p"], row["ρ within kinds p"]))
    assert (np.mean(np.array(p) <= 0.05, axis=0) < 0.15).all() and (np.median(p, axis=0) > 0.3).all()


def test_choices_are_shares_of_the_features_at_each_block(bench) -> None:
    rows = {(row["kind"], row["block"]): row for row in bench.choices()}
    for at, block in enumerate(BLOCKS):  # the made-up items add 1, 2, 3 features and remove 2 everywhere
        row = rows["all", block]
        assert row["added"] == pytest.approx((1 + at) / 6) and row["removed"] == pytest.approx(1 / 3)
        assert row["expected"] == pytest.approx(1 / 3) and row["n"] == 59
    assert sum(rows["change style", block]["added"] for block in BLOCKS) == pytest.approx(1)


# For others -----------------------------------------------------------------------------------------------------------


def schema() -> Any:
    return json.loads((Path(sdxl_sae_kit.__file__).parent / "riebench.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("score", [plain, real, unjudged(*MEASURES[:4], *MEASURES[5:])], ids=["world", "real", "none"])
def test_the_export_is_as_its_schema_says(tmp_path, score) -> None:
    bench = made_up(tmp_path, FULL, score, per_kind=4, failed={"change colour 001": "“<empty>”"})
    told = json.loads(bench.write_json(tmp_path / "deep" / "bench.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    validator.validate(told)
    assert "NaN" not in (tmp_path / "deep" / "bench.json").read_text(encoding="utf-8")
    assert [item["name"] for item in told["items"] if item["failed"]] == ["change colour 001"]
    assert set(told["scores"]) == {item["name"] for item in told["items"] if not item["failed"]}
    assert len(told["rows"]) == len(told["settings"]) == len(bench.settings)
    row, own = told["rows"][0], bench.rows()[0]
    assert row["pixel"] == own["pixel"] and row["pixel interval"] == list(own["pixel interval"])
    for broken in ({"version": 2}, {"more": 1}, {"items": [{"name": "x"}]}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(told | broken)


def test_a_frame_has_a_row_per_item_and_setting(bench, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    rows = bench.to_frame()
    assert len(rows) == 60 * len(bench.settings) and len({(row["item"], row["setting"]) for row in rows}) == len(rows)
    failed = [row for row in rows if row["failed"]]
    assert len(failed) == len(bench.settings) and all(row["reached"] is None for row in failed)
    mean = np.mean([row["kept"] for row in rows if row["setting"] == bench.settings[0].key and not row["failed"]])
    assert mean == pytest.approx(bench.rows()[0]["kept"])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(KitError, match="pip install pandas"):
        bench.to_frame()


def test_what_is_not_there_is_refused_with_what_is(bench, tmp_path) -> None:
    with pytest.raises(KitError, match="No method 'sea' in this result; it has sae, .*Did you mean 'sae'"):
        bench.best("sea")
    with pytest.raises(KitError, match="No method 'stearing'"):
        bench.compare("sae", "stearing")
    with pytest.raises(KitError, match="Measure 'reach' was not told; .*Did you mean 'reached'"):
        bench.kind_rows("reach")
    with pytest.raises(KitError, match="compare by 'kept': this result tells reached, target, to edited"):
        bench.compare("sae", "random", by="kept")
    pixels = made_up(tmp_path, grid("sae", "random"), unjudged(*MEASURES[:4], *MEASURES[5:]))
    with pytest.raises(KitError, match="Nothing here tells whether edits succeeded: pixel alone cannot"):
        pixels.best("sae")
    with pytest.raises(ArtifactError, match="No finished artifact"):
        RIEBench.open(tmp_path / "nowhere")

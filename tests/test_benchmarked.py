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
from sdxl_sae_kit.studies.benchmark_scores import Scores, estimates
from sdxl_sae_kit.studies.benchmark_views import pair_table, verdict
from sdxl_sae_kit.studies.benchmarked import RIEBench
from sdxl_sae_kit.studies.equal_damage import _best_mixture, halves, hull
from sdxl_sae_kit.studies.scoring import MEASURES
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


def test_halves_take_every_other_item_so_that_one_of_each_kind_makes_two_halves(tmp_path) -> None:
    assert halves(5).tolist() == [False, True, False, True, False]
    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], plain, per_kind=1)
    assert bench.best("sae")["n"] == 3 and bench.compare("sae", "random")["verdict"] == "too few items"


def test_one_item_is_not_enough_to_choose_by(tmp_path) -> None:
    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], plain, per_kind=1, kinds=KINDS[:1])
    for ask in (lambda: bench.best("sae"), lambda: bench.compare("sae", "random"), bench.kind_rows):
        with pytest.raises(KitError, match="At least 2 items must be scored; 1 is"):
            ask()
    assert "1 item scored. At least 2 items must be" in bench.sentence() and bench.to_json()["best"] == []


def test_one_value_has_no_interval() -> None:
    (mean, (low, high), n), (_, ends, _) = estimates(np.array([[0.5, 0.1], [np.nan, 0.3], [np.nan, 0.2]]))
    assert (mean, n) == (0.5, 1) and np.isnan([low, high]).all() and np.isfinite(ends).all()


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
    assert bench.best("sae")["reached"] == 0 and bench.compare("random", "sae")["difference"] == 0
    assert bench.methods == ["sae", "random", "none", "prompt"]


def test_what_is_tried_for_the_blocks_sake_is_no_rival(tmp_path) -> None:
    def score(setting, place, rng):
        return floor() | {"reached": float(setting.k == 64 or setting.method == "steering"), "kept": 0.9}

    extra = [Setting("sae", 64, 1.0, BLOCKS), *by_block(k=64)]
    contest = [*ENDS, *grid("sae", "random")]
    bench = made_up(tmp_path / "1", [*contest, *extra], score, recipe={"n_contest": len(contest)})
    assert bench.best("sae")["reached"] == 0 and len(bench.block_rows()) == 12
    assert {len(trace.x) for trace in bench.plot().data if trace.name == "sae" and trace.mode == "markers"} == {4}
    steered = [Setting("steering", None, 1.0, BLOCKS), Setting("steering", None, 1.0, BLOCKS[:1])]
    other = made_up(tmp_path / "2", [*contest, *steered], score, recipe={"n_contest": len(contest)})
    assert other.methods == ["sae", "random", "none", "prompt"]


def test_without_factors_the_strongest_setting_is_taken_and_not_called_best(tmp_path) -> None:
    def score(setting, place, rng):
        apart = {8: (0.3, 0.3), 16: (0.1, 0.4)}.get(setting.k, (0.0, 0.6))
        return {"to original": apart[0], "to edited": apart[1] + 0.001 * rng.random(), "pixel": 0.1}

    bench = made_up(tmp_path, [Setting(m, k, 1.0, BLOCKS) for m in ("sae", "random") for k in (8, 16)], score)
    assert bench.best("sae")["settings"] == [Setting("sae", 8, 1.0, BLOCKS).key]
    row = bench.compare("sae", "random")
    assert row["by"] == "to edited" and row["damage"] == pytest.approx(0.3) and row["damage is"].startswith("distance")
    assert row["value"] == pytest.approx(0.3, abs=0.01) and row["difference"] == pytest.approx(0, abs=0.002)
    assert row["chosen by"] == "least mean(to edited)" and "At its strongest" in bench.sentence()
    assert np.isnan(bench.best("sae")["reached"]) and bench.best("sae")["reached n"] == 0


def test_by_similarity_alone_the_most_similar_is_taken(tmp_path) -> None:
    def score(setting, place, rng):
        return {"pixel": 0.1 * setting.strength, "image similarity": {8: 0.6, 16: 0.9}.get(setting.k, 0.3)}

    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], score)
    assert {key.split(",")[1] for key in bench.best("sae")["settings"]} == {" k 16"}
    assert bench.compare("sae", "random")["chosen by"] == "greatest mean(image similarity)"


# Equal damage ---------------------------------------------------------------------------------------------------------


def test_the_hull_is_what_any_mixture_reaches_at_no_more_damage() -> None:
    """Against linear programming over mixtures of any number of points, which is another way to say it."""
    rng = np.random.default_rng(0)
    damage, reached = (np.concatenate([np.zeros((60, 1)), rng.random((60, 7))], axis=1) for _ in range(2))
    at = rng.random(60) * 1.2
    weights, slopes = _best_mixture(damage, reached, at)
    assert weights.min() >= 0 and weights.sum(axis=1) == pytest.approx(1) and (weights > 0).sum(axis=1).max() == 2

    def best(row: int, damage_at: float) -> float:
        found = linprog(-reached[row], damage[row][None], [damage_at], np.ones((1, 8)), [1], bounds=(0, 1))
        return float(-found.fun)

    for row in range(60):
        assert weights[row] @ reached[row] == pytest.approx(best(row, at[row]), abs=1e-9)
        assert weights[row] @ damage[row] <= at[row] + 1e-9
        rise = best(row, at[row] + 1e-4) - best(row, at[row] - 1e-4)
        if np.abs(damage[row] - at[row]).min() > 1e-3:  # at a corner the slope has two values
            assert slopes[row] == pytest.approx(rise / 2e-4, abs=1e-4)


def test_the_front_goes_through_what_no_mixture_beats() -> None:
    damage, reached = np.array([0.0, 0.1, 0.2, 0.2, 0.5, 0.6]), np.array([0.05, 0.5, 0.4, 0.6, 0.55, 0.65])
    assert hull(damage, reached) == [0, 1, 3, 5]


def methods_alike(rng: np.random.Generator, n: int, settings: int, lead: float = 0.0) -> Scores:
    """Two methods of the same law, item by item: 5 factors kept or not; `lead` is what the first reaches more often."""
    reach, harm = {
        1: ([0.7], [0.15]), 2: ([0.5, 0.7], [0.1, 0.15]), 4: ([0.2, 0.4, 0.6, 0.8], [0.03, 0.08, 0.15, 0.3])
    }[settings]  # fmt: skip
    reached = rng.random((n, 2 * settings)) < np.concatenate([np.add(reach, lead), reach])
    kept = 1 - rng.binomial(5, harm * 2, (n, 2 * settings)) / 5
    return scores_of(reached.astype(float), kept, ["sae"] * settings + ["random"] * settings)


def verdicts(settings: int, n: int, seeds: int, lead: float = 0.0) -> list[float]:
    """How often the first is said to reach more, and less."""
    found = [
        verdict(methods_alike(np.random.default_rng(seed), n, settings, lead).compare("sae", "random", "reached"))
        for seed in range(seeds)
    ]
    return [found.count(word) / seeds for word in ("more", "less")]


def test_of_two_methods_alike_neither_is_favoured() -> None:
    more, less = verdicts(1, 60, 60)
    assert max(more, less) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "n"), [(1, 60), (1, 180), (2, 60), (4, 60), (4, 180)])
def test_where_methods_are_equal_one_is_seldom_told_apart(settings, n) -> None:
    assert max(verdicts(settings, n, 200)) <= 0.04, "2.5 % either way would be exact"


def test_a_true_lead_at_equal_damage_is_found() -> None:
    more, less = verdicts(4, 180, 15, lead=0.15)
    assert more >= 0.8 and less == 0


def test_either_order_tells_the_same(bench) -> None:
    row, back = bench.compare("sae", "steering"), bench.compare("steering", "sae")
    assert row["difference"] == pytest.approx(-back["difference"]) and row["damage"] == back["other damage"]
    assert row["difference interval"] == pytest.approx(
        (-back["difference interval"][1], -back["difference interval"][0])
    )
    assert row["value"] == pytest.approx(bench.best("sae")["reached"])


def test_a_copy_of_a_method_is_not_told_apart(tmp_path) -> None:
    rng = np.random.default_rng(0)
    reached, kept = (rng.random((60, 4)) < p for p in (0.5, 0.9))
    own = scores_of(np.tile(reached, 2), np.tile(kept, 2), ["sae"] * 4 + ["random"] * 4)
    row = own.compare("sae", "random", "reached")
    assert row["difference"] == 0 and row["difference interval"] == (0, 0) and verdict(row) == "not told apart"


def fixed(reach: dict[str, float], harm: dict[str, float]) -> Any:
    """Methods reach a fixed share of items, whatever their setting, at a fixed damage."""

    def score(setting, place, rng):
        reached = float(place % 10 < 10 * reach.get(setting.method, 0))
        return floor() | {"reached": reached, "kept": 1 - harm.get(setting.method, 0)}

    return score


def test_beyond_the_largest_damage_the_others_highest_value_holds(tmp_path) -> None:
    score = fixed({"sae": 1.0, "random": 0.4}, {"sae": 0.5, "random": 0.1})
    bench = made_up(tmp_path, grid("sae", "random"), score)
    row, back = bench.compare("sae", "random"), bench.compare("random", "sae")
    assert (row["beyond"], row["below"], row["other beyond"], row["other below"]) == (2, 0, 0, 2)
    assert (back["beyond"], back["below"], back["other beyond"], back["other below"]) == (0, 2, 2, 0)
    assert row["difference at own damage"] == pytest.approx(1 - 0.4)
    assert row["difference at other damage"] == pytest.approx(0.2 - 0.4), "a fifth of the way from no edit"
    assert row["difference"] == pytest.approx(0.2) and row["verdict"] == "more"
    (told,) = pair_table([row])
    but = "sae does more damage than any setting of random; random does less damage than every setting of sae"
    assert told["but"] == but and "damage than" not in bench.sentence()
    (told,) = pair_table([row | {"beyond": 1, "below": 1, "other below": 0}])
    assert told["but"] == "sae does more damage than any setting of random on one half of the items"


@pytest.mark.parametrize("by", ["reached", "to edited"])
def test_the_other_is_read_within_what_is_possible(tmp_path, by) -> None:
    """A steep hull of the other, read where this one did little damage, for items to which it does much."""

    def score(setting, place, rng):
        damage = {"sae": 0.5 if place % 2 else 0.05, "random": 0.1}.get(setting.method, 0)
        reach = float(setting.method == "random")
        return floor() | {"reached": reach, "kept": 1 - damage, "to edited": 0.5 - 0.5 * reach}

    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], score)
    row = bench.compare("sae", "random", by=by)
    least, most = {"reached": (0, 1), "to edited": (0, 0.5)}[by]
    for name in ("difference at own damage", "difference at other damage"):
        assert least - most <= row[name] <= most - least


def test_a_certain_difference_on_few_items_is_no_verdict(tmp_path) -> None:
    score = fixed({"sae": 1.0}, {"sae": 0.1, "random": 0.1})
    bench = made_up(tmp_path, grid("sae", "random"), score, per_kind=6)
    row = bench.compare("sae", "random")
    assert row["n"] == 18 and row["difference"] == pytest.approx(1) and row["verdict"] == "too few items"
    assert "too few items (18 of at least 20) to be told from random" in bench.sentence()


def test_differences_of_kinds_average_to_that_of_all(bench) -> None:
    rows = [bench.compare("sae", "random", kind=kind) for kind in KINDS]
    counts = [row["n"] for row in rows]
    assert counts == [20, 20, 19] and len({row["difference"] for row in rows}) == 3
    whole = bench.compare("sae", "random")["difference"]
    mean = np.average([row["difference"] for row in rows], weights=counts)
    assert mean == pytest.approx(whole, abs=0.01), "but for the limits of what each is read as"
    with pytest.raises(KitError, match="No items of kind 'change colours'.*Did you mean 'change colour'"):
        bench.compare("sae", "random", kind="change colours")


def test_the_probability_of_the_target_can_be_what_is_reached(bench) -> None:
    row = bench.compare("sae", "random", by="target")
    assert row["by"] == "target" and 0.1 < row["difference"] < row["value"] < 0.9
    assert row["chosen by"] == "greatest mean(target) × mean(kept)"


# Kinds and blocks -----------------------------------------------------------------------------------------------------


def test_kinds_are_scored_at_the_same_settings_as_all(bench) -> None:
    rows = bench.kind_rows("target")
    assert [(row["kind"], row["method"]) for row in rows] == [
        (kind, method) for kind in KINDS for method in bench.methods
    ]
    for method in bench.methods:
        mine = [row for row in rows if row["method"] == method]
        whole = sum(row["target"] * row["target n"] for row in mine) / 59
        assert whole == pytest.approx(bench.best(method)["target"]) and sum(row["target n"] for row in mine) == 59


def test_a_kind_whose_items_all_failed_is_still_told_of(tmp_path) -> None:
    failed = {f"change colour {i:03}": "no mask" for i in range(4)}
    bench = made_up(tmp_path, [*grid("sae", "random"), *ENDS], plain, per_kind=4, failed=failed)
    rows = [row for row in bench.kind_rows() if row["kind"] == "change colour"]
    assert len(rows) == 4 and all(
        (row["reached n"], row["failed"]) == (0, 4) and np.isnan(row["reached"]) for row in rows
    )
    assert "change colour (0 of 4)" in bench.plot_kinds().layout.xaxis.ticktext


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
        bench.block_agreement(made_up(tmp_path, grid("sae", "random"), plain, seed=1))


SETTINGS = [*grid("sae"), *by_block()]


def test_agreement_is_spearmans_and_orders_within_kinds_are_what_chance_shuffles(tmp_path) -> None:
    one = made_up(tmp_path / "1", SETTINGS, by_gain(GAINS, 0.02))
    row = one.block_agreement(made_up(tmp_path / "2", SETTINGS, by_gain(GAINS, 0.02), seed=1))
    other = RIEBench.open(next((tmp_path / "2").glob("studies/*")))
    tables = [
        np.array([r["alone"] for r in bench.block_rows() if r["kind"] != "all"]).reshape(3, 3) for bench in (one, other)
    ]
    within = [spearmanr(*lines).statistic for lines in zip(*tables, strict=True)]
    assert row["ρ within kinds"] == pytest.approx(np.mean(within)) and row["ρ within kinds p"] < 0.05
    special = [t - t.mean(axis=0) - t.mean(axis=1, keepdims=True) + t.mean() for t in tables]
    assert row["ρ of what is special"] == pytest.approx(spearmanr(*(each.ravel() for each in special)).statistic)
    low, high = row["ρ within kinds interval"]
    assert low <= row["ρ within kinds"] <= high
    assert (row["top agrees"], row["kinds"], row["top by chance"]) == (3, 3, 1) and "for 3 of 3 kinds" in row["verdict"]
    assert "blocks rank alike" in row["verdict"] and "no evidence" not in row["verdict"]
    turned = {(kind, block): GAINS[kind, BLOCKS[-1 - at]] for kind in KINDS for at, block in enumerate(BLOCKS)}
    against = one.block_agreement(made_up(tmp_path / "3", SETTINGS, by_gain(turned, 0.02), seed=2))
    assert against["ρ within kinds p"] > 0.05 and "no evidence" in against["verdict"]


def test_only_like_results_agree(tmp_path) -> None:
    one = made_up(tmp_path / "1", SETTINGS, by_gain(GAINS))
    with pytest.raises(KitError, match="both are the same result"):
        one.block_agreement(one)
    with pytest.raises(KitError, match=f"only one of them has {KINDS[2]}"):
        one.block_agreement(made_up(tmp_path / "2", SETTINGS, by_gain(GAINS), kinds=KINDS[:2], seed=1))
    with pytest.raises(KitError, match="sae, k 8, strength 1 here and with sae, k 16, strength 1 there"):
        one.block_agreement(made_up(tmp_path / "3", [*grid("sae"), *by_block(k=16)], by_gain(GAINS), seed=1))


def test_of_few_items_no_agreement_is_concluded(tmp_path) -> None:
    one, other = (made_up(tmp_path / str(n), SETTINGS, by_gain(GAINS), per_kind=n) for n in (20, 6))
    assert (found := one.block_agreement(other))["n"] == 18
    assert found["verdict"] == "too few items (18 of at least 20)"


def test_the_same_block_for_all_kinds_is_nothing_special_to_kinds(tmp_path) -> None:
    """Blocks differ in the same way for every kind, which differ in size: ranks agree, what is special does not."""
    special = []
    same = {(kind, block): 0.1 * i + 0.2 * j for i, kind in enumerate(KINDS) for j, block in enumerate(BLOCKS)}
    for seed in range(3):
        pair = [made_up(tmp_path / f"{seed}{at}", SETTINGS, by_gain(same, 0.05), seed=2 * seed + at) for at in (0, 1)]
        row = pair[0].block_agreement(pair[1])
        assert row["ρ within kinds"] == 1 and row["ρ within kinds p"] < 0.05 and row["top agrees"] == 3
        special.append(row["ρ of what is special p"])
    assert np.median(special) > 0.2


def test_blocks_that_do_not_differ_have_neither_rank_nor_p(tmp_path) -> None:
    flat = dict.fromkeys(GAINS, 0.25)
    one, other = (made_up(tmp_path / str(at), SETTINGS, by_gain(flat), seed=at) for at in (0, 1))
    row = one.block_agreement(other)
    assert np.isnan([row["ρ within kinds"], row["ρ within kinds p"], row["ρ of what is special p"]]).all()
    assert "cannot be told" in row["verdict"]


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
    assert len(told["kinds"]) == (len(KINDS) * len(bench.methods) if bench.scores.judged else 0) and told["choices"]


def _broken(told: dict[str, Any]) -> dict[str, Any]:
    """By name, results that each have one fault."""
    item, name = told["items"][0], next(iter(told["scores"]))
    key, row, pair = next(iter(told["scores"][name])), told["rows"][0], told["comparisons"][0]
    scores = told["scores"][name][key]

    def scored(**change: Any) -> dict[str, Any]:
        return {"scores": {name: {key: scores | {k.replace("_", " "): v for k, v in change.items()}}}}

    return {
        "version": {"version": 2}, "more": {"more": 1}, "no items": {"items": []}, "no settings": {"settings": []},
        "kind": {"items": [item | {"kind": "change nothing"}]}, "no name": {"items": [item | {"name": ""}]},
        "no reason": {"items": [item | {"failed": ""}]}, "reached in part": scored(reached=0.5),
        "a share over 1": scored(kept=1.1), "a probability below 0": scored(target=-0.1),
        "a distance below 0": scored(to_original=-0.1), "a word": scored(pixel="much"),
        "half an interval": {"rows": [row | {"pixel interval": [0.1, None]}]},
        "method": {"rows": [row | {"method": "magic"}]}, "verdict": {"comparisons": [pair | {"verdict": "best"}]},
        "recipe": {"recipe": {"study": "riebench", "settings": told["recipe"]["settings"]}},
    }  # fmt: skip


def test_the_schema_refuses_what_is_wrong(tmp_path) -> None:
    told = made_up(tmp_path, FULL, plain, per_kind=2).to_json()
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(told)
    assert [name for name, change in _broken(told).items() if validator.is_valid(told | change)] == []


class Frame:
    """What is asked of pandas."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.columns, self.rows = list(rows[0]), rows
        assert all(list(row) == self.columns for row in rows), "a column for everything in every row"


def test_a_frame_has_a_row_per_item_and_setting(bench, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Frame))
    frame = bench.to_frame()
    rows = frame.rows
    assert frame.columns[-len(MEASURES) :] == list(MEASURES) and len(rows) == 60 * len(bench.settings)
    assert len({(row["item"], row["setting"]) for row in rows}) == len(rows)
    failed = [row for row in rows if row["failed"]]
    assert len(failed) == len(bench.settings) and all(row["reached"] is None for row in failed)
    lines = dict(json.loads(line) for line in bench.artifact.file("items.jsonl").read_text().splitlines())
    for row in rows:
        scores = lines[row["item"]].get("scores")
        assert scores is None or {m: row[m] for m in MEASURES} == scores[row["setting"]]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(KitError, match="pip install pandas"):
        bench.to_frame()


def test_what_is_not_there_is_refused_with_what_is(bench, tmp_path, unchecked_types) -> None:
    with pytest.raises(KitError, match="No method 'sea' in this result; it has sae, .*Did you mean 'sae'"):
        bench.best("sea")
    with pytest.raises(KitError, match="No method 'stearing'"):
        bench.compare("sae", "stearing")
    with pytest.raises(KitError, match="Measure 'reach' was not told; .*Did you mean 'reached'"):
        bench.kind_rows("reach")
    with pytest.raises(KitError, match="compare by 'kept': this result tells reached, target, to edited"):
        bench.compare("sae", "random", by="kept")
    for ask, words in {
        lambda: bench.compare("sae", None): "No method None", lambda: bench.compare(["sae"], "random"): "No method",
        lambda: bench.plot_kinds(5): "Measure 5 was not told", lambda: bench.compare("sae", "sae"): "both are 'sae'",
        lambda: bench.compare("sae", "random", kind=["a"]): "No items of kind",
        lambda: bench.plot_blocks(what=[]): "what is 'alone'",
        lambda: bench.block_agreement(None): "pass another RIEBench, not NoneType",
        lambda: bench.write_json(None): "name a file", lambda: bench.write_json("/proc/x.json"): "Choose another place",
    }.items():  # fmt: skip
        with pytest.raises(KitError, match=words):
            ask()
    pixels = made_up(tmp_path, grid("sae", "random"), unjudged(*MEASURES[:4], *MEASURES[5:]))
    with pytest.raises(KitError, match="Nothing here tells whether edits succeeded: pixel alone cannot"):
        pixels.best("sae")
    with pytest.raises(ArtifactError, match="No finished artifact"):
        RIEBench.open(tmp_path / "nowhere")

"""specialize: planted differences are found, shuffled ones are not, and each formula is checked by another."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_descriptors import FACTORS, plant
from reading_html import read_safely
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import mutual_info_score

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.probes import probe
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.questions import ROLES
from sdxl_sae_kit.studies import specialization
from sdxl_sae_kit.studies.block_ranking import rank_blocks
from sdxl_sae_kit.studies.causes import LOOKS, Causes
from sdxl_sae_kit.studies.claims import RANDOM, SAME_PROMPT, TRAINED
from sdxl_sae_kit.studies.contrasts import Pool, association, contrasts, information
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.specialization import compare_blocks, specialize
from sdxl_sae_kit.studies.specialized import Specialization

MEASURED = ("response", "space")
COLOUR = "responds to colour"
CHANGES = [f"changes {factor}" for factor in ROLES["style"]]
STYLE, CONTENT = ([f"responds to {factor}" for factor in ROLES[role]] for role in ("style", "content"))

# Formulas ------------------------------------------------------------------------------------------------------------


def test_information_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    block, cluster = rng.integers(0, 4, 200), rng.integers(0, 7, 200)
    assert information(block, cluster) == pytest.approx(mutual_info_score(block, cluster) / np.log(2))


def test_information_is_complete_when_clusters_are_blocks_and_p_is_as_small_as_it_can_be() -> None:
    block = np.repeat(np.arange(4), 25)
    found = association(block, 3 - block, permutations=99, seed=0)
    assert found["bits"] == pytest.approx(2) and found["share"] == pytest.approx(1)
    assert found["chance"] < 0.2
    assert found["p"] == 1 / 100


def test_p_values_of_unrelated_labels_are_uniform() -> None:
    rng = np.random.default_rng(1)
    block = np.repeat(np.arange(3), 30)
    p = np.array([association(block, rng.integers(0, 4, 90), permutations=19, seed=s)["p"] for s in range(200)])
    assert 0.44 < p.mean() < 0.59
    assert (p <= 0.05).mean() < 0.11


def test_contrasts_are_cohens_d_and_noise_is_not_called_a_discovery() -> None:
    pool = Pool.of([plant("a", {COLOUR: 2.0}), plant("b"), plant("c")])
    rows = {(row["descriptor"], row["block"]): row for row in contrasts(pool)}
    column = pool.values[:, pool.names.index(COLOUR)]
    own, others = column[pool.block == 0], column[pool.block != 0]
    deviation = np.sqrt((39 * own.var(ddof=1) + 79 * others.var(ddof=1)) / 118)
    planted = rows[COLOUR, "a"]
    assert planted["effect"] == pytest.approx((own.mean() - others.mean()) / deviation)
    assert planted["mean"] == pytest.approx(own.mean())
    low, high = planted["effect interval"]
    assert low < planted["effect"] < high and 0.6 < high - low < 1.6
    assert planted["q"] < 1e-6
    others_found = [row["q"] for (name, _), row in rows.items() if name != COLOUR]
    assert np.mean(np.array(others_found) < 0.05) < 0.03


def test_intervals_of_contrasts_cover_what_is_true_about_as_often_as_they_say() -> None:
    hits = []
    for seed in range(12):
        pool = Pool.of([plant(block, n=30, seed=seed) for block in ("a", "b")])
        hits += [r["effect interval"][0] <= 0 <= r["effect interval"][1] for r in contrasts(pool, seed)][::2]
    assert 0.88 < np.mean(hits) <= 0.99


# The study, on planted descriptors -----------------------------------------------------------------------------------


def described(shift: float, control: float = 0.0) -> dict:
    """Of three blocks two differ, and so do the controls' as far as is said."""

    def blocks(by: float, kinds: tuple = (), seed: int = 0) -> list:
        more = {"down.2.1": dict.fromkeys([*STYLE, "active area", *CHANGES], by)}
        more["up.0.1"] = dict.fromkeys([*CONTENT, *CHANGES], -by)
        return [plant(b, more.get(b, {}), seed=seed, kinds=kinds) for b in ("down.2.1", "up.0.0", "up.0.1")]

    return {
        TRAINED: blocks(shift), "untrained": blocks(control, MEASURED, 1), "channels": blocks(0, MEASURED, 2),
        SAME_PROMPT: blocks(shift, ("cause",)), RANDOM: blocks(0, ("cause",), 3),
    }  # fmt: skip


def study(store, given: dict, **settings) -> Specialization:
    """As `specialize` keeps and opens it, without pictures."""
    settings = {"clusters": 3, "embedding": "pca", "permutations": 199, "seed": 0} | settings
    tables, _ = compare_blocks(given, **settings)
    artifact = store.artifact(
        "studies", "planted", {"study": "block specialisation", "seed": 0, "given": repr(tables)[:500]}
    )
    return Specialization(artifact, **json.loads(json.dumps(tables), object_hook=_pairs))


def _pairs(told: dict) -> dict:
    return {key: tuple(value) if key.endswith("interval") and value else value for key, value in told.items()}


@pytest.fixture(scope="module")
def different(store):
    return study(store, described(6.0))


def test_planted_differences_are_found_beyond_controls(different) -> None:
    main, own, untrained, channels, same, random = different.information
    assert main["bits"] == pytest.approx(np.log2(3), abs=0.05) and main["p"] == 1 / 200
    assert own["of"] == TRAINED and own["descriptors"] == "those of controls"
    assert (same["of"], random["of"]) == (SAME_PROMPT, RANDOM)
    assert random["gap"] == pytest.approx(same["above"] - random["above"])
    assert untrained["gap interval"][0] > 0.5 and channels["gap interval"][0] > 0.5
    assert "so hookpoints differ" in different.sentence() and "more than that tells" in different.sentence()
    assert any(f"down.2.1 {name} (" in different.sentence() for name in [*STYLE, *CHANGES, "active area"])


def test_a_difference_that_controls_have_too_does_not_survive(store) -> None:
    alike = study(store, described(6.0, control=6.0))
    untrained = next(row for row in alike.information if row["of"] == "untrained")
    assert untrained["gap"] == pytest.approx(0, abs=0.1)
    assert "not told apart, so whether it is learnt stays open" in alike.sentence()
    more = study(store, described(2.0, control=6.0))
    assert "so much lies in the updates and need not be learnt" in more.sentence()


def test_of_blocks_alike_there_is_no_evidence(store) -> None:
    same = study(store, described(0.0))
    assert same.information[0]["p"] > 0.05
    assert "no evidence of a difference" in same.sentence()
    assert min(row["q"] for row in same.rows()) > 0.05


def test_the_number_of_clusters_is_found_and_said(store) -> None:
    found = study(store, described(12.0), clusters=None)
    assert found.stable_number == 3 == len(found.clusters)
    assert "3 clusters are as stable as the best" in found.sentence()
    nothing = study(store, described(0.0), clusters=None)
    assert nothing.stable_number == 1 and len(nothing.clusters) == 2
    assert "No number of clusters is more stable" in nothing.sentence()


def test_controls_stand_beside_every_effect_they_have(different) -> None:
    rows = {(row["descriptor"], row["block"]): row for row in different.rows()}
    assert abs(rows[COLOUR, "down.2.1"]["untrained effect"]) < 1 < rows[COLOUR, "down.2.1"]["effect"]
    assert "random direction effect" in rows["changes colour", "up.0.1"]
    assert "untrained effect" not in rows["changes colour", "up.0.1"]


def test_variations_agree_where_a_difference_is_clear(different) -> None:
    main, *varied = different.robustness
    assert main["adjusted Rand index"] == 1
    names = [row["variation"] for row in varied]
    assert {"2 clusters", "4 clusters", "5 clusters", "method ward", "seed 1", "without cause"} <= set(names)
    assert all(row["p"] == 1 / 200 for row in varied if row["variation"] not in ("without response", "without space"))
    assert next(row for row in varied if row["variation"] == "seed 1")["adjusted Rand index"] > 0.95


def test_agreement_with_probes_and_ablation_takes_what_they_share(different) -> None:
    means = {(row["block"], row["descriptor"]): row["mean"] for row in different.rows()}
    blocks = different.hookpoints
    probes = [
        {"hookpoint": b, "factor": f, "AUC": expit(means[b, f"responds to {f}"])} for b in blocks for f in FACTORS
    ]
    damage = [{"block": b} | {f: 1 - means[b, f"changes {f}"] for f in FACTORS} for b in blocks]
    rows = different.agreement(probes, [*damage, {"block": "up.1.0"} | dict.fromkeys(FACTORS, 0.5)])
    assert [row["ρ"] for row in rows[:2]] == [pytest.approx(1), pytest.approx(-1)]
    assert rows[2]["blocks"] == 3
    assert rows[1]["p"] > 0.9
    assert rows[0]["verdict"] == "too few blocks to tell"  # of three blocks there are six orders


def test_too_few_features_are_refused() -> None:
    with pytest.raises(KitError, match=r"1 of a, 40 of b; that is too few"):
        compare_blocks({TRAINED: [plant("a", n=1), plant("b")]})


def test_figures_tell_the_same_numbers(different) -> None:
    responses = different.plot()
    assert list(responses.data[0].x[:4]) == ["down.2.1", "up.0.0", "up.0.1", "untrained down.2.1"]
    rows = {(row["descriptor"], row["block"]): row for row in different.rows()}
    at = list(responses.data[0].y).index(COLOUR)
    assert float(responses.data[0].text[at][0]) == pytest.approx(rows[COLOUR, "down.2.1"]["mean"], rel=0.05)
    other = rows[COLOUR, "up.0.0"]["mean"] / rows[COLOUR, "down.2.1"]["mean"]  # colours are shares of the row's largest
    assert responses.data[0].z[at][1] / responses.data[0].z[at][0] == pytest.approx(other)
    causes = different.plot_causes()
    assert "random direction up.0.1" in causes.data[0].x
    assert all(made.layout.meta["alt"] for made in (responses, causes))


def test_a_control_with_too_few_features_is_named_and_the_largest_effect_beside_its_control(store) -> None:
    given = described(6.0)
    given["channels"] = [replace(each, latents=each.latents[:1], values=each.values[:1]) for each in given["channels"]]
    sentence = study(store, given).sentence()
    assert "Too few features to be compared: channels." in sentence
    assert f"; of {len(given[TRAINED][0].names)})" in sentence


def test_the_largest_effect_is_that_which_controls_do_not_have(store) -> None:
    given = described(6.0)
    for name, seed in ((TRAINED, 0), ("untrained", 1)):
        kinds = MEASURED if name == "untrained" else ()
        given[name][1] = plant("up.0.0", {COLOUR: 9.0, "same place": 4.0 * (name == TRAINED)}, seed=seed, kinds=kinds)
    assert "up.0.0 same place (" in study(store, given).sentence()


def test_what_is_not_told_goes_all_the_way(store) -> None:
    given = described(6.0)
    for name in (TRAINED, SAME_PROMPT, RANDOM):
        given[name][0].values[:5, [kind == "cause" for kind in given[name][0].kinds]] = np.nan
    found = study(store, given)
    same = next(row for row in found.information if row["of"] == SAME_PROMPT)
    assert same["features"] == 115
    assert "Where a number is not told (" in found.sentence()
    rows = {(row["descriptor"], row["block"]): row for row in found.rows()}
    assert rows["changes colour", "down.2.1"]["features"] == 35


def test_a_figure_of_what_was_not_measured_is_refused(different, store) -> None:
    with pytest.raises(KitError, match="plot_stability: the number of clusters was given"):
        different.plot_stability()
    given = {TRAINED: [each.only(*MEASURED) for each in described(6.0)[TRAINED]]}
    with pytest.raises(KitError, match="plot_causes: no causes were measured"):
        study(store, given).plot_causes()


# From pictures to the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timing(pipe, store):
    return collect(pipe, load_prompts("world", 12), ["down.2.1", "up.0.1"], num_inference_steps=2, store=store)


@pytest.fixture(scope="module")
def ask(pipe, small_saes, small_cache, timing):
    def asked(store) -> Specialization:
        return specialize(
            pipe, small_saes, small_cache, timing=timing, features_per_block=12, prompts_per_feature=1, clusters=2,
            embedding="pca", permutations=19, store=store,
        )  # fmt: skip

    return asked


@pytest.fixture(scope="module")
def real(ask, store):
    return ask(store)


def test_real_features_are_described_by_all_that_is_measured(real) -> None:
    kinds = {row["kind"] for row in real.rows()}
    assert kinds == {"response", "space", "look", "time", "cause"}
    f = real.features
    assert len(f["feature"]) == len(f["descriptors"]) == len(f["position"]) == 2 * 12
    assert [row["of"] for row in real.information][:4] == [TRAINED, TRAINED, "untrained", "channels"]
    assert {claim["block"]: claim["outcome"] for claim in real.claims}["mid.0"] == "not asked"


def test_what_random_directions_cause_stands_beside_causes_on_the_same_prompts() -> None:
    values, control = np.random.default_rng(0).uniform(0.1, 0.2, (2, 40, 1 + len(LOOKS)))
    told = Causes(
        Artifact(Path("nowhere")),
        "planted",
        "a",
        np.arange(40) * 2,
        ("colour", *LOOKS),
        values,
        control,
        np.ones(40, int),
    )
    pools = specialization._with_causes([plant("a", kinds=MEASURED)], [told])
    changes = {name: pool[0].values[:, pool[0].names.index("changes colour")] for name, pool in pools.items()}
    np.testing.assert_allclose(changes[TRAINED], np.sqrt(values[:, 0]))
    np.testing.assert_array_equal(changes[SAME_PROMPT], changes[TRAINED])
    np.testing.assert_allclose(changes[RANDOM], np.sqrt(control[:, 0]))
    assert set(pools[TRAINED][0].kinds) == {*MEASURED, "cause"} and set(pools[RANDOM][0].kinds) == {"cause"}


def test_interrupted_amid_causes_it_goes_on_and_ends_the_same(ask, real, store, tmp_path, monkeypatch) -> None:
    shutil.copytree(Path(store.root) / "features", tmp_path / "features")
    add, added = Lines.add, list[str]()

    def interrupted(self, unit, line):
        add(self, unit, line)
        added.append(unit)
        if len(added) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Lines, "add", interrupted)
        ask(tmp_path)
    again = ask(tmp_path)
    assert again.rows() == real.rows() and again.information == real.information
    assert again.artifact.digest == real.artifact.digest


def test_features_are_set_beside_real_probes_and_block_ablation(real, pipe, small_cache, store) -> None:
    ranking = rank_blocks(pipe, load_prompts("world", 6), blocks=list(real.hookpoints), store=store)
    rows = real.agreement(probe(small_cache), ranking.damage())
    assert len(rows) == 3 and all(row["blocks"] == 2 and row["factors"] > 3 for row in rows)


def test_shares_are_counted_with_wilsons_interval(real) -> None:
    rows, f = real.shares(), real.features
    mine = f["cluster"][f["hookpoint"] == 1]
    n, k = len(mine), int((mine == 0).sum())
    z = norm.ppf(0.975)
    centre, half = (k + z * z / 2) / (n + z * z), z * np.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    row = next(row for row in rows if row["hookpoint"] == "up.0.1" and row["cluster"] == real.clusters[0])
    assert row["share"] == k / n
    assert row["share interval"] == pytest.approx((centre - half, centre + half))
    flow = real.plot_flow().data[0].link
    assert sum(flow.value) == len(f["feature"])


def test_pointing_at_a_feature_shows_its_pictures(real) -> None:
    view, f = real.view_clusters(), real.features
    second = view.figure.data[1]
    view._show(np.flatnonzero(f["hookpoint"] == 1).tolist(), [4])
    latent = f["feature"][f["hookpoint"] == 1][4]
    assert f"up.0.1, feature {latent}" in view.told.value and "data:image/webp" in view.told.value
    assert len(second.x) == (f["hookpoint"] == 1).sum()
    twin = view._repr_mimebundle_()["text/html"]
    page = read_safely(twin)
    assert all(name in page.text for name in real.clusters)
    assert twin.count("<img") <= 2 * 2 * 2


def test_it_is_computed_once_and_opens_again(ask, real, store, monkeypatch) -> None:
    real.artifact.verify()
    assert Specialization.open(real.artifact.folder).rows() == real.rows()
    monkeypatch.delattr(specialization, "compare_blocks")
    assert ask(store).information == real.information


def test_names_are_shown_and_never_run(real) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    row = dict(real.effects[0], descriptor=nasty)
    page = read_safely(replace(real, effects=[row, *real.effects[1:]])._repr_html_())
    assert nasty in page.text


def test_what_does_not_fit_together_is_refused_before_anything_is_measured(
    pipe, small_saes, small_cache, store, monkeypatch, unchecked_types
) -> None:
    monkeypatch.delattr(specialization, "_Measurement")
    one = small_saes["up.0.1", "k8"]
    with pytest.raises(KitError, match="there is only up.0.1"):
        specialize(pipe, one, small_cache, store=store)
    with pytest.raises(KitError, match="2 of these 2 saes are of up.0.1"):
        specialize(pipe, [one, one], small_cache, store=store)
    with pytest.raises(KitError, match="clusters"):
        specialize(pipe, small_saes, small_cache, clusters=1, store=store)
    with pytest.raises(KitError, match="features_per_block must be an integer of at least 2, not 1"):
        specialize(pipe, small_saes, small_cache, features_per_block=1, store=store)
    with pytest.raises(KitError, match="holds one denoising step, which does not tell when"):
        specialize(pipe, small_saes, small_cache, timing=small_cache, store=store)
    with pytest.raises(KitError, match="embed is a judge such as WorldEmbed"):
        specialize(pipe, small_saes, small_cache, embed="clip", store=store)
    with pytest.raises(KitError, match="specialize takes a cache, such as collect gives as cache, not 'cache'"):
        specialize(pipe, small_saes, "cache", store=store)
    partial = collect(pipe, load_prompts("world", 2), ["up.0.1"], num_inference_steps=2, store=store)
    with pytest.raises(ArtifactError, match=r"has up\.0\.1\. Collect down\.2\.1 too"):
        specialize(pipe, small_saes, small_cache, timing=partial, store=store)
    other = load_pipeline("tiny-base", device="cpu", dtype="float32")
    with pytest.raises(ArtifactError, match="was trained on tiny-turbo"):
        specialize(other, small_saes, small_cache, store=store)

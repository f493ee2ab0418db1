"""Transfer: a planted edit is found and carries over, windows are the steps they say, and a break loses nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from breaking import Breaking
from scipy.stats import norm

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.judges import EmbeddingJudge, WorldJudge
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.plots import shares_by_group
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies.distances import draw
from sdxl_sae_kit.studies.labelled import gain
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.transfer import THIRDS, Change, draw_changes, transfer_edits, windows_of
from sdxl_sae_kit.studies.transferred import ALL, CONDITIONS, FILE, Transfer
from sdxl_sae_kit.tiny.world import FACTORS

SETTINGS = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def two_backgrounds(pipe, store) -> ActivationCache:
    """60 images of the world, every other one on white, with their updates where backgrounds are decided."""
    scenes = [(colour, shape) for colour in FACTORS["colour"] for shape in FACTORS["shape"][:5]]
    rows = [
        {"text": f"a large {colour} {shape} on a {background} background", "factors": {"background": background}}
        for colour, shape in scenes
        for background in ("white", "black")
    ]
    return collect(pipe, load_prompts(rows), ["up.1.1"], store=store)


@pytest.fixture(scope="module")
def planted(two_backgrounds) -> SAE:
    """Latent 0 fires on white backgrounds and writes what tells them from black ones; latent 1 does the reverse."""
    x = two_backgrounds.read("up.1.1", np.arange(two_backgrounds.n_images))[:, 0].float()  # (image, token, d_in)
    white = torch.tensor([factors["background"] == "white" for factors in two_backgrounds.prompts.factors])
    apart, spread = x[white].mean((0, 1)) - x[~white].mean((0, 1)), torch.cov(x.flatten(0, 1).T)
    reads = torch.linalg.solve(spread + 0.01 * spread.trace() / len(spread) * torch.eye(len(spread)), apart)
    sae = SAE(SAEConfig(k=2, expansion=1), x.shape[-1], two_backgrounds.site("up.1.1"), "planted").requires_grad_(False)
    for parameter, value in ((sae.W_enc, 0.0), (sae.b_enc, -1e3), (sae.b_dec, 0.0)):
        parameter.fill_(value)
    for latent, (sign, others) in enumerate(((1, ~white), (-1, white))):
        sae.W_enc[:, latent], sae.W_dec[latent] = sign * reads, sign * apart / apart.norm()
        sae.b_enc[latent], sae.mean_activation[latent] = -(x[others] @ (sign * reads)).max(), apart.norm()
    return sae.eval()


def test_planted_edits_are_found_and_their_success_is_1_here_and_there(pipe, two_backgrounds, planted, store) -> None:
    few = {"n": 2, "prompts": 2, "trials": 3}
    study = transfer_edits(pipe, planted, two_backgrounds, pipe, num_inference_steps=4, **few, store=store)
    assert {(edit.labelled.latent, edit.label) for edit in study.edits} == {
        (0, "background: white"),
        (1, "background: black"),
    }
    held_out = {two_backgrounds.prompts.texts[i] for i in two_backgrounds.images("held_out")}
    texts = [text for edit in study.edits for text in edit.texts]
    assert set(texts) <= held_out and len(set(texts)) == len(texts) == 4, "each prompt is of one edit alone"
    rows = {(row["place"], row["window"], row["condition"]): row for row in study.rows()}
    assert study.windows("source") == [ALL] and study.windows("target") == [ALL, "early", "middle", "late"]
    for place in ("source", "target"):
        assert rows[place, ALL, "feature"]["success"] == 1
        assert rows[place, ALL, "feature"]["log-odds"] > 2 * abs(rows[place, ALL, "random direction"]["log-odds"])
    assert Transfer.open(study.artifact.folder).rows() == study.rows()
    assert "tiny-turbo, 4 steps" in study.sentence() and study._repr_html_().count("<img") == 2


def test_source_and_target_are_each_told_by_their_own_pipeline(pipe, two_backgrounds, planted, store) -> None:
    base, few = load_pipeline("tiny-base", device="cpu", dtype="float32"), {"n": 1, "prompts": 2, "trials": 3}
    study = transfer_edits(pipe, planted, two_backgrounds, base, num_inference_steps=2, windows={}, **few, store=store)
    (edit,), prompts = study.edits, two_backgrounds.prompts
    given = prompts.take([prompts.texts.index(text) for text in edit.texts])
    for place, each in (("source", pipe), ("target", base)):
        recipe = study.artifact.recipe["found"]["source"] if place == "source" else study.artifact.recipe["target"]
        settings = {name: recipe[name] for name in SETTINGS}
        before = draw(each, given, settings)
        with warnings.catch_warnings(), steer(each, planted, **{edit.verb: {edit.labelled.latent: edit.dose}}):
            after = draw(each, given, settings)
        told = [WorldJudge().factors(pictures) for pictures in (before, after)]
        moved, _ = gain(edit.labelled, *told, up=edit.verb == "add")
        assert edit.outcomes[place][ALL]["feature"]["moved"] == pytest.approx(moved, abs=0.01)


def test_windows_are_those_that_hold_some_steps_but_not_all() -> None:
    thirds = [[name, *ends] for name, ends in THIRDS.items()]
    assert list(windows_of(thirds, 1)) == [ALL]
    assert list(windows_of(thirds, 2)) == [ALL, "early", "middle"]
    assert windows_of([["first", 0.0, 0.1]], 20) == {ALL: None, "first": (0.0, 0.1)}
    counted = {name: sum(a <= i / 20 < b for i in range(20)) for name, (a, b) in THIRDS.items()}
    assert sum(counted.values()) == 20


def test_each_change_is_what_steer_makes_alone_in_its_steps_and_the_first_is_untouched(pipe, small_saes) -> None:
    sae, prompts = small_saes["up.0.1", "k8"], load_prompts("world", 2)
    with torch.no_grad():
        latent = int(sae.mean_activation.argmax())
    random = np.random.default_rng(0).standard_normal((len(prompts), sae.d_in))
    changes = [Change(15.0), Change(15.0, (0.0, 1 / 3)), Change(15.0, (2 / 3, 1.0), random)]
    drawn = draw_changes(pipe, sae, "add", latent, changes, prompts, SETTINGS)
    for i in range(len(prompts)):
        for at, edit in enumerate([{}, {"steps": [0, 1]}, {"steps": [3], "along": {latent: random[i]}}], 1):
            with steer(pipe, sae, add={latent: 15.0}, **edit):
                assert np.allclose(drawn[i, at], draw(pipe, prompts[i : i + 1], SETTINGS)[0], atol=1e-3)
            assert np.abs(drawn[i, at] - drawn[i, 0]).max() > 0.02
    assert np.allclose(drawn[:, 0], draw(pipe, prompts, SETTINGS), atol=1e-3)


def test_what_a_break_leaves_is_gone_on_with_and_gives_the_same(pipe, two_backgrounds, planted, tmp_path) -> None:
    def study(place, calls=100_000, **settings):
        judge = Breaking(calls)
        few = {"n": 2, "prompts": 2, "trials": 2, "windows": {}, "num_inference_steps": 2} | settings
        found = transfer_edits(pipe, planted, two_backgrounds, pipe, judge=judge, store=tmp_path / place, **few)
        return found, calls - judge.left

    whole, calls = study("whole")
    for left in (8, calls - 9):  # while edits are found, and while the second is tried: the first break kept six calls
        with pytest.raises(KeyboardInterrupt):
            study("broken", left)
    resumed, again = study("broken")
    assert again < calls / 2
    for one, other in zip(whole.edits, resumed.edits, strict=True):
        assert replace(one, outcomes={}) == replace(other, outcomes={})
        for place, windows in one.outcomes.items():
            for window, conditions in windows.items():
                for condition, outcome in conditions.items():
                    same = other.outcomes[place][window][condition]
                    assert np.allclose(outcome["moved"], same["moved"], atol=1e-3)
    assert study("whole", num_inference_steps=3, n=1)[1] < calls / 2, "edits are found once for all targets"


def made_up(folder, moved: dict[str, list[list[float]]], at_source: dict[str, list[list[float]]]) -> Transfer:
    """A finished study of edits with these changes of log-odds, by condition, at the target and at the source."""
    place = {"model": "m", **SETTINGS}
    found = {"source": place | {"num_inference_steps": 1}, "saes": [["mid.0", "s", "d"]]}
    artifact = Store.at(folder).artifact("studies", "made_up", {"study": "transfer", "found": found, "target": place})
    with artifact.lock():
        lines = Lines(artifact, FILE)
        for at in range(len(moved["feature"])):
            outcomes = {
                place: {
                    ALL: {c: {"moved": m[at], "follows": [x > 2 for x in m[at]], "pixel": m[at]} for c, m in of.items()}
                }
                for place, of in (("source", at_source), ("target", moved))
            }
            label = {"place": 0, "latent": at, "factor": "colour", "value": "<red>", "area": 0.9}
            texts = [f"{at} <b>{i}</b>" for i in range(len(moved["feature"][at]))]
            lines.add(f"edit {at}", {"labelled": label, "verb": "add", "dose": 5.0, "texts": texts, **outcomes})
            artifact.file(f"edit-{at}.webp").write_bytes(b"")
        artifact.seal(facts={})
    return Transfer.open(artifact.folder)


def test_numbers_are_those_of_their_formulas(tmp_path) -> None:
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(20, 10))
    moved = {"feature": np.full((20, 10), 3.0), "random direction": signs, "other feature": np.full((20, 10), 0.009)}
    moved |= {"untrained SAE": np.full((20, 10), 4.0)}
    there = {condition: values.tolist() for condition, values in moved.items()}
    here = {condition: (values * (np.arange(20) % 2)[:, None]).tolist() for condition, values in moved.items()}
    study = made_up(tmp_path, there, here)
    rows = {row["condition"]: row for row in study.rows() if row["place"] == "target"}
    own, random, other, untrained = (rows[condition] for condition in CONDITIONS)
    z, n = norm.ppf(0.975), 200
    assert own["success"] == 1 and own["success interval"] == pytest.approx((1 / (1 + z**2 / n), 1))
    assert (
        random["success"] == (signs > 0).mean() and random["success interval"][0] < 0.5 < random["success interval"][1]
    )
    assert random["feature − it"] == pytest.approx(1 - random["success"])
    assert random["feature − it interval"][0] > 0.3
    assert random["log-odds, feature − it"] == pytest.approx(3 - signs.mean())
    assert other["success"] == 0, "a change of less than 0.01 is none"
    assert (own["log-odds"], own["answer follows"], random["answer follows"]) == (3, 1, 0)
    assert own["answer follows interval"] == own["success interval"]
    assert own["prompts"] == n and own["edits"] == 20 and np.isnan(own["feature − it"])
    assert own["source − it"] == -0.5 and -0.6 < own["source − it interval"][0] < own["source − it interval"][1] < -0.4
    source = next(row for row in study.rows() if row["place"] == "source")
    assert (source["success"], source["log-odds"]) == (0.5, 1.5) and np.isnan(source["source − it"])
    assert untrained["feature − it"] == 0 and untrained["log-odds, feature − it"] == -1
    assert "do better than random directions" in study.sentence()
    assert "source less target is -0.5" in study.sentence()
    alt = study.plot().layout.meta["alt"]
    assert "source: all steps feature 0.50" in alt and "target: all steps feature 1.00" in alt
    for at, row in enumerate(study.by_edit()):
        assert (row["source"], row["target"]) == (at % 2, 1), "every other edit does nothing at the source"
        assert (row["source, log-odds"], row["target, log-odds"]) == (3 * (at % 2), 3)
        assert row["target, random"] == (signs[at] > 0).mean()
        assert row["target, random, log-odds"] == pytest.approx(signs[at].mean())
        assert row["edit"] == f"mid.0 {at} + 5 × mean" and row["prompts"] == 10


def test_no_difference_is_called_none_and_a_lesser_success_worse(tmp_path) -> None:
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(4, 5, 10))
    signs[2] = 1.0
    moved = dict(zip(CONDITIONS, signs.tolist(), strict=True))
    said = made_up(tmp_path, moved, moved).sentence()
    assert "do not stand apart from random directions" in said and "do worse than other features (100.0%" in said


def test_the_plot_leaves_out_what_is_not_there() -> None:
    made = shares_by_group(["a", "b"], {"x": [(0.5, 0.4, 0.6), None], "y": [None, (1.0, 0.9, 1.0)]}, title="T", y="s")
    assert "a x 0.50 [0.40, 0.60]; b y 1.00 [0.90, 1.00]" in made.layout.meta["alt"]
    assert [len(trace.x) for trace in made.data] == [1, 1]


def test_another_model_is_the_question_and_no_warning(pipe, small_saes) -> None:
    base, sae = load_pipeline("tiny-base", device="cpu", dtype="float32"), small_saes["up.0.1", "k8"]
    settings = SETTINGS | {"num_inference_steps": 2, "guidance_scale": 3.0}
    prompts, latent = load_prompts("world", 1), int(sae.mean_activation.argmax())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = draw_changes(base, sae, "add", latent, [Change(15.0)], prompts, settings)
    with pytest.warns(UserWarning, match="may mean something else"), steer(base, sae, add={latent: 15.0}, cfg="both"):
        alone = generate(base, list(prompts.texts), list(prompts.seeds), **settings, output_type="np")
    assert np.allclose(drawn[:, 1], alone, atol=1e-3)


def test_what_cannot_be_tried_is_refused(pipe, small_cache, small_saes, store, unchecked_types, monkeypatch) -> None:
    sae = small_saes["up.0.1", "k8"]

    def tried(to=pipe, **settings):
        given = {"num_inference_steps": 2, "store": store} | settings
        return transfer_edits(pipe, given.pop("saes", sae), small_cache, to, **given)

    with pytest.raises(KitError, match="target is the source itself. Pass num_inference_steps="):
        tried(num_inference_steps=None)
    with pytest.raises(KitError, match="no judge that names factors, .* Pass judge="):
        tried(judge=None)
    with pytest.raises(KitError, match="does not name the world's factors"):
        tried(judge=EmbeddingJudge(WorldEmbed()))
    with pytest.raises(KitError, match="prompts must be an integer of at least 2"):
        tried(prompts=1)
    with pytest.raises(KitError, match="saes are one or more SAEs"):
        tried(saes=[])
    for windows in ({"back": (0.5, 0.1)}, {"odd": "ab"}, {"one": 0.5}):
        with pytest.raises(KitError, match="is two fractions"):
            tried(windows=windows)
    for windows in ([0.0, 0.5], {ALL: (0.0, 0.5)}):
        with pytest.raises(KitError, match="windows are named fractions|takes a mapping as windows"):
            tried(windows=windows)
    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="holds updates of m .* Pass a cache of"):
        patch.setitem(small_cache.recipe, "model", "m")
        tried()
    site = sae.site
    for error, other in ((ArtifactError, {"model": "m"}), (HookpointError, {"hookpoint": "up.0.7"})):
        sae.site = replace(site, **other)
        try:
            with pytest.raises(error):
                tried()
        finally:
            sae.site = site

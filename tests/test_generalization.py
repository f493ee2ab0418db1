"""Generalisation: every formula has an oracle, the same cache gives the same codes, and a kill costs nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from caches import made_up_recipe, made_up_updates
from made_saes import random_sae
from payloads import NASTY
from reading_html import read_safely

from sdxl_sae_kit import SAE, Site, evaluate, html, metrics
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.plots import step_lines
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.questions import Question
from sdxl_sae_kit.recovery import Choice
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.shards import ShardWriter
from sdxl_sae_kit.studies import carryover, fidelity, generalization
from sdxl_sae_kit.studies.densities import MIN_PROMPTS, lost
from sdxl_sae_kit.studies.fidelity import METRICS
from sdxl_sae_kit.studies.generalization import generalize
from sdxl_sae_kit.studies.generalized import Generalization
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.splicing import Splicing
from sdxl_sae_kit.studies.trajectories import Asked

D_IN, GRID = 6, [2, 3]
HOOKPOINTS = {"mid.0": [*GRID, D_IN], "up.0.1": [*GRID, D_IN]}


def cache_of(folder, prompts: Prompts, updates=None, seed=0, **settings) -> ActivationCache:
    """A cache of these prompts, with updates made up or given by hookpoint."""
    recipe = made_up_recipe(
        len(prompts), **{"hookpoints": HOOKPOINTS, "prompts": prompts.digest, "dtype": "float32", **settings}
    )
    updates = updates or made_up_updates(recipe, seed)
    writer = ShardWriter(Store.at(folder).artifact("activations", "made-up", recipe), prompts)
    with writer.artifact.lock():
        writer.prepare()
        layout = Layout.of(recipe)
        for shard in writer.missing():
            images = range(shard.first_image, shard.stop)
            kept = {h: layout.keep(h, images, each[images.start : images.stop]) for h, each in updates.items()}
            writer.write(shard, [(kept, ())])
        return ActivationCache(writer.finish({}))


def saes_at(model="m", revision="r", hookpoints=tuple(HOOKPOINTS), seed=0, steps=1, guidance=0.0):
    found = [random_sae(seed + at, D_IN).requires_grad_(False) for at in range(len(hookpoints))]
    for sae, hookpoint in zip(found, hookpoints, strict=True):
        sae.site = Site(model, revision, hookpoint, steps, guidance)
    return found


@pytest.fixture(scope="module")
def prompts():
    """World scenes of which one factor is known, one of them with two seeds."""
    made = load_prompts("world", 200)
    twice = np.flatnonzero(made.held_out)[-2:].tolist()
    order = [twice[0] if image == twice[1] else image for image in range(len(made))]
    same = told(made, "background").take(order)
    return Prompts(same.texts, made.seeds, same.factors)


def told(prompts: Prompts, *names: str) -> Prompts:
    """The same with these factors alone, which keeps the tests quick."""
    return Prompts(prompts.texts, prompts.seeds, tuple({n: f[n] for n in names} for f in prompts.factors))


@pytest.fixture(scope="module")
def source(tmp_path_factory, prompts):
    return cache_of(tmp_path_factory.mktemp("source"), prompts)


GUIDED = {"num_inference_steps": 3, "steps": [0, 1, 2], "guidance_scale": 3.0, "halves": ["uncond", "cond"]}


@pytest.fixture(scope="module")
def target(tmp_path_factory, prompts):
    """Another model's: 3 steps, guided, of the later two thirds of the prompts."""
    return cache_of(tmp_path_factory.mktemp("target"), prompts[60:], seed=1, model=f"other {NASTY}", **GUIDED)


@pytest.fixture(scope="module")
def saes():
    return saes_at()


@pytest.fixture(scope="module")
def own(target):
    return saes_at(target.recipe["model"], hookpoints=("mid.0",), seed=7, steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def result(saes, source, target, own, tmp_path_factory) -> Generalization:
    return generalize(saes, source, target, own=own, store=tmp_path_factory.mktemp("studies"))


def found(rows, **keys):
    """The only row that has these."""
    (row,) = (row for row in rows if all(row[name] == value for name, value in keys.items()))
    return row


def pca(tokens, k):
    mean = tokens.mean(0)
    axes = torch.linalg.svd(tokens - mean, full_matrices=False)[2][:k]
    return lambda x: (x - mean) @ axes.T @ axes + mean


@pytest.mark.parametrize("who", ["SAE", "trained here", "untrained", "PCA of the source", "PCA of the target"])
@pytest.mark.parametrize(("step", "half"), [(0, "cond"), (2, "uncond")])
def test_reconstruction_is_that_of_the_formulas(result, saes, own, source, target, who, step, half):
    training = [each.read("mid.0", each.images("train")).flatten(0, 2) for each in (source, target)]
    make = {
        "SAE": saes[0], "trained here": own[0], "untrained": saes[0].untrained(),
        "PCA of the source": pca(training[0], 3), "PCA of the target": pca(training[1], 3),
    }[who]  # fmt: skip
    x = target.read("mid.0", target.images("held_out"))[:, target.row(step, half)].flatten(0, 1)
    x_hat = make(x)
    row = found(result.rows(), **{"hookpoint": "mid.0", "updates of": "target", "step": step, "half": half, "who": who})
    expected = {
        "explained variance": metrics.explained_variance(x, x_hat),
        "explained variance per channel": metrics.explained_variance_per_channel(x, x_hat),
        "relative error": float(((x - x_hat).norm(dim=1) / x.norm(dim=1)).mean()),
        "relative norm": float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()),
    }
    if isinstance(make, SAE):
        z = make.encode(x)
        expected |= {"L0": float((z > FIRES).sum(1).float().mean())}
        assert row["dead share"] == pytest.approx(float((z <= FIRES).all(0).float().mean()))
    else:
        expected |= {"L0": 3.0}
        assert np.isnan(row["dead share"])
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=1e-5), name
        if "PCA" not in who or name != "L0":
            assert row[f"{name} interval"][0] <= row[name] <= row[f"{name} interval"][1]
    assert (row["tokens"], row["images"]) == (len(x), len(target.images("held_out")))
    assert row["prompts"] == len({target.prompts.texts[i] for i in target.images("held_out")})


def similarities(one, other):
    """Cosine and IoU of codes, token by token in plain Python."""
    pairs = []
    for z, w in zip(one.flatten(0, -2), other.flatten(0, -2), strict=True):
        a, b = (set(torch.nonzero(code > FIRES).flatten().tolist()) for code in (z, w))
        norms = float(z.norm() * w.norm())
        pairs.append((float(z @ w) / norms if norms else 0.0, len(a & b) / max(len(a | b), 1)))
    return np.mean(pairs, axis=0)


def test_codes_are_compared_token_by_token(result, saes, source, target):
    held_out = target.images("held_out")
    rows = [row for row in result.rows() if (row["hookpoint"], row["who"]) == ("mid.0", "SAE")]
    places = [source.prompts.seeds.index(target.prompts.seeds[i]) for i in held_out]
    before = saes[0].encode(source.read("mid.0", places)[:, 0])
    codes = {
        (s, half): saes[0].encode(target.read("mid.0", held_out)[:, target.row(s, half)])
        for s in range(3)
        for half in ("uncond", "cond")
    }
    for half in ("uncond", "cond"):
        row = found(rows, **{"updates of": "target", "step": 2, "half": half})
        told = [row["cosine of adjacent steps"], row["IoU of adjacent steps"]]
        np.testing.assert_allclose(told, similarities(codes[2, half], codes[1, half]), atol=1e-5)
        told = [row["cosine with the source"], row["IoU with the source"]]
        np.testing.assert_allclose(told, similarities(codes[2, half], before), atol=1e-5)
        told = [row["cosine with another image"], row["IoU with another image"]]
        np.testing.assert_allclose(told, similarities(codes[2, half], before.roll(-1, 0)), atol=1e-5)
    first = found(rows, **{"updates of": "target", "step": 0, "half": "cond"})
    assert np.isnan(first["cosine of adjacent steps"]) and np.isnan(first["cosine of adjacent steps interval"]).all()


def test_images_are_read_in_any_parts(saes, prompts, tmp_path, monkeypatch):
    """One at a time, where some are not in the source, gives what all together give."""
    some = cache_of(tmp_path, prompts[60:], seed=3)
    few = cache_of(tmp_path, prompts[:120], seed=4)
    images = some.images("held_out")
    places = generalization._places(few, some, images)
    assert (places < 0).any() and (places >= 0).any()
    beside = fidelity.Beside(few, 0, places)
    together = fidelity.measure({"SAE": saes[0]}, some, "mid.0", images, beside)["SAE"]
    monkeypatch.setattr(fidelity, "_BYTES", 1)
    alone = fidelity.measure({"SAE": saes[0]}, some, "mid.0", images, beside)["SAE"]
    np.testing.assert_allclose(alone.sums, together.sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(alone.fired, together.fired)


def test_the_same_cache_gives_the_same(saes, source, tmp_path):
    same = generalize(saes, source, source, store=tmp_path)
    for sae in saes:
        expected = evaluate(sae, source)
        for place in ("source", "target"):
            row = found(same.rows(), **{"hookpoint": sae.hookpoint, "updates of": place, "who": "SAE"})
            for name in ("explained variance", "explained variance per channel", "L0", "dead share", "relative norm"):
                assert row[name] == pytest.approx(expected[name.lower().replace(" ", "_")], rel=1e-5)
        interval = expected["explained_variance_interval"]  # of images, two of which have one prompt
        np.testing.assert_allclose(row["explained variance interval"], interval, rtol=0.03)
        assert row["cosine with the source"] == pytest.approx(1, abs=1e-5)
        assert row["IoU with the source"] == 1
        before, after = (
            found(
                same.labels(), **{"hookpoint": sae.hookpoint, "updates of": p, "group": "all", "step": 0, "who": "SAE"}
            )
            for p in ("source", "target")
        )
        assert (before["AUC"], before["AUC interval"]) == (after["AUC"], after["AUC interval"])
    assert same.vanished() == same.appeared() == []
    for row in same.turnover():
        assert row["vanished"] == row["appeared"] == 0 == row["vanished interval"][0]
        assert row["vanished interval"][1] == pytest.approx(
            3.84 / (row["live in the source"] + 3.84), rel=1e-3
        )  # Wilson


def test_the_summary_pairs_prompts(result, saes, target):
    x = target.read("mid.0", target.images("held_out"))
    row = found(result.summary(), hookpoint="mid.0", half="cond", who="untrained")
    error, total = {}, 0.0
    for who, sae in (("SAE", saes[0]), ("untrained", saes[0].untrained())):
        parts = [x[:, target.row(step, "cond")].flatten(0, 1) for step in range(3)]
        error[who] = sum(float((part - sae(part)).square().sum()) for part in parts)
        total = sum(float((part - part.mean(0)).square().sum()) for part in parts)
    assert row["explained variance"] == pytest.approx(1 - error["untrained"] / total, abs=1e-4)
    assert row["SAE − this"] == pytest.approx((error["untrained"] - error["SAE"]) / total, abs=1e-4)
    assert row["SAE − this interval"][0] < row["SAE − this"] < row["SAE − this interval"][1]
    assert found(result.summary(), hookpoint="mid.0", half="cond", who="SAE")["SAE − this interval"] == (0, 0)


def test_many_intervals_are_those_of_each():
    values = np.random.default_rng(3).gamma(2, size=(40, 3, 2))
    together = metrics.bootstrap_intervals(values, lambda m: m[..., 0] / m[..., 1])
    for at in range(3):
        alone = metrics.bootstrap_interval(values[:, at], lambda m: m[..., 0] / m[..., 1])
        np.testing.assert_allclose(together[:, at], alone, rtol=1e-9)
    assert np.isnan(metrics.bootstrap_intervals(values[:1])).all()


def test_a_number_known_of_few_rows_has_an_interval():
    """Samples that hold none of the two rows, one in eight, say nothing of it."""
    values = np.zeros((40, 2, 2))
    values[:2, 0], values[:, 1] = [[1, 1], [3, 1]], 1
    with np.errstate(invalid="ignore"):
        ends = metrics.bootstrap_intervals(values, lambda m: m[..., 0] / m[..., 1])
    np.testing.assert_allclose(ends, [[1, 1], [3, 1]])


# What chosen latents tell -------------------------------------------------------------------------------------------


def channel_sae(steps=1):
    """Latent i is channel i where that is positive."""
    sae = SAE(SAEConfig(k=D_IN, expansion=1), D_IN, Site("m", "r", "mid.0", steps, 0.0), "channels")
    sae.requires_grad_(False)
    sae.W_enc.copy_(torch.eye(D_IN))
    sae.W_dec.copy_(torch.eye(D_IN))
    return sae


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Channel 2 is on where an object is a circle, 4 where the background is black; in the target later, and faintly.

    Channel 5 fires in the source alone, channel 1 in the target alone. Returns prompts, source, target, result.
    """
    prompts = told(load_prompts("world", 320), "shape", "background")
    circle = np.array([f["shape"] == "circle" for f in prompts.factors])
    black = np.array([f["background"] == "black" for f in prompts.factors])
    rng = np.random.default_rng(0)
    shape = {"mid.0": [*GRID, D_IN]}

    def updates(rows):
        x = -rng.random((len(prompts), rows, 6, D_IN)).astype(np.float32) - 0.1
        for row in range(rows):
            x[:, row, 3, 2] = circle * (5 if rows == 1 else (0, 1, 2, 4)[row]) + rng.random(len(prompts)) * 0.01
            x[:, row, 1, 4] = black * (5 if rows == 1 else (4, 3, 2, 0)[row]) + rng.random(len(prompts)) * 0.01
        x[..., 0, 5 if rows == 1 else 1] = 3
        return {"mid.0": x}

    folder = tmp_path_factory.mktemp("planted")
    source = cache_of(folder, prompts, updates(1), hookpoints=shape)
    four = {"num_inference_steps": 4, "steps": [0, 1, 2, 3]}
    target = cache_of(folder, prompts, updates(4), hookpoints=shape, **four)
    return prompts, source, target, generalize(channel_sae(), source, target, own=channel_sae(steps=4), store=folder)


def test_labels_hold_where_the_planted_latent_fires(planted):
    prompts, _, _, study = planted
    chosen = found(study.chosen(), factor="background", value="black")
    assert (chosen["latent"], chosen["tells by"], chosen["AUC there"]) == (4, "firing", 1)
    assert found(study.chosen(), factor="shape", value="circle")["latent"] == 2
    told = {row["step"]: row for row in study.trajectories() if (row["role"], row["who"]) == ("content", "SAE")}
    assert told[0]["AUC"] < told[1]["AUC"] <= 1
    for row in study.labels():
        assert row["SAE − this interval"][0] <= row["SAE − this"] <= row["SAE − this interval"][1]
        assert row["AUC interval"][0] <= row["AUC"] <= row["AUC interval"][1]
        assert row["images"] == int(prompts.held_out.sum())
    assert {row["updates of"] for row in study.labels()} == {"source", "target"}


def test_labels_over_all_steps_are_compared_image_by_image(planted):
    """Each channel is a latent here, and one trained on the target may choose others; nothing else can be ahead."""
    *_, study = planted
    of = {"updates of": "target", "group": "all"}
    for who in ("SAE", "trained here", "untrained", "best channel", "best PCA axis of the source"):
        steps = [found(study.labels(), **of, step=step, who=who)["AUC"] for step in range(4)]
        row, first = (found(study.labels(), **of, step="all", who=each) for each in (who, "SAE"))
        assert row["AUC"] == pytest.approx(np.mean(steps))
        assert row["SAE − this"] == pytest.approx(first["AUC"] - row["AUC"])
    assert found(study.labels(), **of, step="all", who="SAE")["SAE − this interval"] == (0, 0)
    assert found(study.labels(), **of, step=1, who="untrained")["SAE − this"] > 0
    own = found(study.labels(), **of | {"group": "factor"}, name="shape", step=3, who="trained here")
    assert own["AUC"] > 0.6 and own["AUC interval"][0] > 0.5


def test_content_rises_after_what_is_there_from_the_start(planted):
    *_, study = planted
    rows = [row for row in study.trajectories() if row["who"] == "SAE"]
    content, style = ([row for row in rows if row["role"] == role] for role in ("content", "style"))
    assert content[0]["rises at"] == 1 == content[0]["rises at interval"][0]
    assert style[0]["rises at"] == 0
    assert max(row["strength"] for row in content) <= 1
    figure = study.plot_trajectories("mid.0")
    assert "content" in figure.layout.meta["alt"] and len(figure.data) == len({r["role"] for r in study.trajectories()})


def test_latents_that_fire_in_one_place_alone_vanish_or_appear(planted):
    *_, study = planted
    assert [row["latent"] for row in study.vanished()] == [5]
    assert [row["latent"] for row in study.appeared()] == [1]
    (row,) = study.vanished()
    assert row["density in the source"] == pytest.approx(1 / 6) and row["ratio"] == 0 == row["density in the target"]
    shares = found(study.turnover(), who="SAE")
    assert shares["vanished"] == 1 / shares["live in the source"]


def test_density_is_compared_at_the_densest_row():
    """What fires at one of many steps is not lost, and what hangs on a single prompt is not surely so."""
    here, there = np.full((8, 1, 3), 80), np.zeros((8, 5, 3), int)
    there[:, 3, 0] = 80
    here[:, 0, 1], here[0, 0, 1], there[1, 3, 1] = 1, 100, 10
    rows = lost(here, there, np.full(8, 200))
    assert [row["latent"] for row in rows] == [2]
    assert rows[0]["prompts"] == 8 and rows[0]["density here"] == pytest.approx(0.4)


def test_a_rare_latent_can_vanish():
    """One of the fewest prompts that make a latent live, of so many that some bootstrap samples hold none of them."""
    here, there = np.zeros((80, 1, 1), int), np.zeros((80, 2, 1), int)
    here[:MIN_PROMPTS] = 4
    (row,) = lost(here, there, np.full(80, 64))
    assert (row["latent"], row["ratio"], row["ratio interval"]) == (0, 0, (0, 0))


def asked_of(strengths, shows, texts):
    """One factor with one value, told by the strength of one candidate."""
    questions = [Question("shape", ["circle"], np.ones(len(shows), bool), shows[:, None])]
    choices = {"SAE": [[Choice(1.0, "mid.0", 0, True, np.zeros(0))]]}
    return Asked(questions, choices, {"SAE": strengths[:, :, None]}, texts)


def test_what_tells_nothing_rises_nowhere():
    rng, shows, texts = np.random.default_rng(0), np.arange(60) % 2 == 0, [str(i) for i in range(60)]
    signal = np.stack([0 * shows, shows, shows], axis=1) * 2 + rng.random((60, 3))
    (role,) = asked_of(signal, shows, texts).roles([0, 1, 2])
    assert (role["rises at"], role["rises at interval"]) == (1, [1, 1])
    for nothing in (rng.random((60, 3)), -signal):
        (role,) = asked_of(nothing, shows, texts).roles([0, 1, 2])
        assert role["rises at"] is None and role["rises at interval"] == [None, None]


def test_images_of_one_prompt_are_resampled_together():
    """Four seeds of each prompt that look the same tell as much as one, and the interval is as wide."""
    rng, shows = np.random.default_rng(0), np.arange(20) % 2 == 0
    strengths, texts = shows[:, None] * 0.5 + rng.random((20, 1)), [f"{i:02}" for i in range(20)]
    rows = [
        asked_of(np.repeat(strengths, n, 0), np.repeat(shows, n), np.repeat(texts, n).tolist()).rows([([0], {})])[0]
        for n in (1, 4)
    ]
    assert rows[0]["AUC interval"] == rows[1]["AUC interval"]
    assert [(row["images"], row["prompts"]) for row in rows] == [(20, 20), (80, 20)]


def test_a_trajectory_is_the_mean_of_z(planted):
    _, _, target, study = planted
    x = target.read("mid.0", target.images("held_out"))
    rows = study.trajectory("mid.0", [2, 4])
    for row in rows:
        z = x[:, row["step"], :, row["latent"]].relu()
        assert row["mean activation"] == pytest.approx(float(z.mean()), rel=1e-5)
        assert row["mean activation interval"][0] <= row["mean activation"] <= row["mean activation interval"][1]
    assert len(rows) == 8 and study.trajectory("mid.0", 4) == rows[4:]


# What it says, keeps and refuses ------------------------------------------------------------------------------------


def test_it_shows_what_it_found_and_escapes(result):
    read_safely(result._repr_html_())
    assert NASTY not in result._repr_html_()
    low, high = next(row for row in result.rows() if row["who"] == "SAE")["L0 interval"]
    assert f"[{html.short(low)}, {html.short(high)}]" in result._repr_html_()
    alt = result.plot().layout.meta["alt"]
    last = {"updates of": "target", "step": 2, "half": "cond", "who": "SAE"}
    row = found(result.rows(), hookpoint="mid.0", **last)
    assert f"{row['explained variance']:.3g}" in alt and "uncond" not in alt and "dashed" in alt
    np.testing.assert_equal(Generalization.open(result.artifact.folder).rows(), result.rows())
    with pytest.raises(ArtifactError, match="is a study of generalization, not of splicing"):
        Splicing.open(result.artifact.folder)


def rows_of(who, hookpoint="mid.0", **numbers):
    """A row with these numbers, (value, low, high) each."""
    row = {"hookpoint": hookpoint, "who": who, "half": "cond", "updates of": "target", "images": 9, "values": 7}
    for name, (value, *ends) in numbers.items():
        row |= {name.replace("_", " "): value, f"{name.replace('_', ' ')} interval": tuple(ends)}
    return row


def ahead(value, low, high, **more):
    return {"SAE − this": value, "SAE − this interval": (low, high), **more}


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [((0.2, 0.1, 0.3), "more"), ((-0.2, -0.3, -0.1), "less"), ((0.1, -0.1, 0.3), "not clearly either")],
)
def test_every_control_has_its_verdict(difference, verdict):
    told = f"paired by prompt (SAE − untrained): {verdict} at mid.0 {difference[0]:.3f} [{difference[1]:.3f}"
    rows = [rows_of("SAE", explained_variance=(0.75, 0.7, 0.8)) | ahead(0, 0, 0)]
    rows += [rows_of("untrained", explained_variance=(0.5, 0.4, 0.6)) | ahead(*difference)]
    text = carryover.reconstruction(rows, {"mid.0": {"explained variance": 0.9}})
    assert told in text and "mid.0 0.750 [0.700, 0.800] (in the source 0.900)" in text
    all_steps = {"group": "all", "step": "all"}
    rows = [rows_of("SAE", AUC=(0.65, 0.6, 0.7)) | ahead(0, 0, 0) | all_steps]
    rows += [rows_of("untrained", AUC=(0.6, 0.5, 0.7)) | ahead(*difference) | all_steps]
    at_best = rows_of("SAE", AUC=(0.99, 0.98, 1.0)) | ahead(0, 0, 0) | {"group": "all", "step": 3}
    text = carryover.labels([at_best, *rows])
    assert told in text and "of: mid.0 0.650 [0.600, 0.700]." in text and "0.990" not in text


def test_codes_are_told_beside_those_of_other_images_and_of_random_directions():
    names = ("cosine_with_the_source", "cosine_with_another_image", "cosine_of_adjacent_steps")
    rows = [
        rows_of(who, **dict(zip(names, [(mean, mean - 0.1, mean + 0.1) for mean in means], strict=True)))
        for who, means in (("SAE", (0.8, 0.3, np.nan)), ("SAE", (0.6, 0.2, 0.9)), ("untrained", (0.5, 0.4, 0.7)))
    ]
    told = "mid.0 0.800 [0.700, 0.900] to 0.600 [0.500, 0.700] (of another image 0.300 [0.200, 0.400] to 0.200"
    text = carryover.codes(rows)
    assert told in text and "untrained 0.500 [0.400, 0.600]), of adjacent steps 0.900 to 0.900" in text


def test_turnover_is_more_than_chance_only_where_intervals_say_so():
    live = {"live in the source": 40, "live in the target": 50}
    rows = [
        rows_of("SAE", vanished=(0.4, 0.3, 0.5), appeared=(0.1, 0.05, 0.2)) | live,
        rows_of("untrained", vanished=(0.1, 0.05, 0.2), appeared=(0.1, 0.05, 0.2)) | live,
    ]
    text = carryover.turnover(rows)
    assert "mid.0 40.0% [30.0%, 50.0%] of 40 vanish and 10.0% [5.0%, 20.0%] of 50 appear" in text
    assert text.endswith("only for: vanished at mid.0.")
    assert "nowhere clearly more" in carryover.turnover([rows[1] | {"who": "SAE"}, rows[1]])


def test_roles_that_rise_nowhere_are_said_to():
    rows = [rows_of("SAE", rises_at=(2, 1, 3)) | {"role": "content"}]
    rows += [rows_of("SAE", rises_at=(None, None, None)) | {"role": "detail"}]
    assert "mid.0 content 2 [1, 3], detail nowhere clearly above chance." in carryover.rises(rows)


def test_a_line_missing_in_the_first_panel_is_in_the_legend():
    line = [(0.0, 1.0, 0.5, 1.5)]
    made = step_lines(
        {"a": {("SAE", False): line}, "b": {("SAE", False): line, ("own", False): line}}, title="t", y="y"
    )
    assert [(each.name, each.showlegend) for each in made.data] == [("SAE", True), ("SAE", False), ("own", True)]


def test_what_was_killed_goes_on_and_ends_the_same(saes, source, target, own, result, tmp_path, monkeypatch):
    measure, add, calls = generalization._measure, Lines.add, []

    def measured(sae, *rest):
        calls.append(sae.hookpoint)
        return measure(sae, *rest)

    def dying(lines, unit, told):
        if calls == ["mid.0", "up.0.1"]:  # its arrays are written, its line is not
            raise KeyboardInterrupt
        add(lines, unit, told)

    monkeypatch.setattr(generalization, "_measure", measured)
    monkeypatch.setattr(Lines, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        generalize(saes, source, target, own=own, store=tmp_path)
    assert len(list(tmp_path.glob("studies/*/*.h5"))) == 2
    again = generalize(saes, source, target, own=own, store=tmp_path)
    assert calls == ["mid.0", "up.0.1", "up.0.1"]
    np.testing.assert_equal(again.rows(), result.rows())
    np.testing.assert_equal([again.labels(), again.trajectories()], [result.labels(), result.trajectories()])
    assert generalize(saes, source, target, own=own, store=tmp_path).rows() and len(calls) == 3


def test_prompts_that_are_not_shared_or_without_factors_are_left_out_with_a_sentence(saes, source, tmp_path):
    texts = load_prompts([f"prompt {i}" for i in range(30)])
    apart = generalize(saes, source, cache_of(tmp_path, texts, seed=2), store=tmp_path)
    assert apart.labels() == apart.trajectories() == apart.turnover() == apart.vanished() == []
    assert "at mid.0, up.0.1: the target has no image of the source's prompts and seeds." in apart.sentence()
    assert "Labels are left out" in apart.sentence()
    assert all(np.isnan(row["cosine with the source"]) for row in apart.rows())
    with pytest.raises(KitError, match="no labels to follow"):
        apart.plot_trajectories()
    read_safely(apart._repr_html_())


def test_another_grid_is_not_compared_token_by_token(saes, source, prompts, tmp_path):
    larger = {"mid.0": [4, 6, D_IN], "up.0.1": [4, 6, D_IN]}
    study = generalize(saes, source, cache_of(tmp_path, prompts, hookpoints=larger), store=tmp_path)
    assert "at mid.0, up.0.1: grids differ." in study.sentence()
    assert study.labels() and not study.turnover()


def test_a_source_of_sampled_tokens_is_enough(saes, source, target, prompts, tmp_path):
    """Training needs no whole grids, so neither does what needs no comparison token by token."""
    some = cache_of(tmp_path, prompts, tokens_per_image=3)
    study = generalize(saes[0], some, target, store=tmp_path)
    assert "at mid.0: of its grids the source keeps only some tokens." in study.sentence()
    assert study.labels() and not study.turnover()


def test_the_source_is_told_over_all_its_steps(saes, prompts, tmp_path):
    three = cache_of(tmp_path, prompts, seed=4, **GUIDED)
    study = generalize(saes_at(steps=3, guidance=3.0)[0], three, three, store=tmp_path)
    value = html.short(found(study.summary(), half="cond", who="SAE")["explained variance"])
    assert f"in the source {value}" in study.sentence() and f"in the source {value}" in study.plot().layout.meta["alt"]


@pytest.mark.usefixtures("unchecked_types")
def test_misfits_are_refused(saes, source, target, prompts, tmp_path):
    with pytest.raises(ArtifactError, match="saes= belong to the source cache, own= to the target"):
        generalize(saes_at("another"), source, target, store=tmp_path)
    with pytest.raises(ArtifactError, match="own= to the target"):
        generalize(saes, source, target, own=saes, store=tmp_path)
    with pytest.raises(ArtifactError, match="3 steps, guidance 3"):
        generalize(saes, source, cache_of(tmp_path, prompts, **GUIDED), own=saes, store=tmp_path)
    for wrong in ("tiny-base", None):
        with pytest.raises(KitError, match="generalize takes a cache, such as collect gives as target, not"):
            generalize(saes, source, wrong, store=tmp_path)
    with pytest.raises(HookpointError, match="has no updates of 'up.0.0'"):
        generalize(saes_at(hookpoints=("up.0.0",)), source, target, store=tmp_path)
    wide = cache_of(tmp_path, prompts, hookpoints={h: [*GRID, 8] for h in HOOKPOINTS})
    with pytest.raises(KitError, match="reads tokens of 6 numbers, but those of mid.0"):
        generalize(saes, source, wide, store=tmp_path)
    some = cache_of(tmp_path, prompts, tokens_per_image=2)
    with pytest.raises(KitError, match="keeps 2 tokens"):
        generalize(saes, source, some, store=tmp_path)
    trained = prompts.take(np.flatnonzero(~prompts.held_out).tolist())
    with pytest.raises(KitError, match="has no held-out images"):
        generalize(saes, source, cache_of(tmp_path, trained), store=tmp_path)
    with pytest.raises(KitError, match=r"own= has an SAE of up.0.1"):
        generalize(saes[0], source, source, own=saes, store=tmp_path)


@pytest.mark.usefixtures("unchecked_types")
def test_wrong_latents_and_hookpoints_are_refused(planted):
    *_, study = planted
    with pytest.raises(KitError, match="Did you mean 'mid.0'"):
        study.trajectory("mid.1", [0])
    with pytest.raises(KitError, match="latents 0 to 5, not 6"):
        study.trajectory("mid.0", [6])
    with pytest.raises(KitError, match="a latent"):
        study.trajectory("mid.0", None)


def test_a_real_model_at_more_steps(pipe, small_cache, small_saes, store):
    """tiny-turbo at 2 steps: the first step's codes are alike, and the metrics are all there."""
    from sdxl_sae_kit import collect

    held_out, train = (small_cache.images(split)[:n].tolist() for split, n in (("held_out", 12), ("train", 4)))
    two = collect(
        pipe, small_cache.prompts.take(held_out + train), small_cache.hookpoints, num_inference_steps=2, store=store
    )
    study = generalize({h: small_saes[h, "k8"] for h in small_cache.hookpoints}, small_cache, two, store=store)
    for hookpoint in small_cache.hookpoints:
        first, second = (
            found(study.rows(), **{"hookpoint": hookpoint, "updates of": "target", "step": step, "who": "SAE"})
            for step in (0, 1)
        )
        assert first["cosine with the source"] > 0.95 > second["cosine with the source"]
        assert all(np.isfinite(second[metric]) for metric in METRICS)

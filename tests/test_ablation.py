"""ablation: it measures what turning a feature off does, its controls are of the same size, a kill loses nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reading_html import read_safely

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hooks import Call, rewrite
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.judges import EmbeddingJudge, WorldJudge
from sdxl_sae_kit.pipelines import describe, generate, load_pipeline
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.search import most_energetic
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies import ablation, pairs, results
from sdxl_sae_kit.studies.ablation import ablate
from sdxl_sae_kit.studies.controls import CONDITIONS, CONTROLS, HARDEST, Change, changing, choose_other, draw_controls
from sdxl_sae_kit.studies.effects import FeatureEffects
from sdxl_sae_kit.studies.measures import MEASURES
from sdxl_sae_kit.studies.pairs import Order, Pairs, draw_pairs, fill_batches
from sdxl_sae_kit.studies.results import LINES, Ablation
from sdxl_sae_kit.training import train

HOOKPOINT = "up.0.0"
DOSES = (-1.0, 2.0, 4.0)
ALL_DOSES = [-1.0, 0.0, 1.0, 2.0, 4.0]


def prepare(name: str, n: int, store: Store, **settings: object) -> SimpleNamespace:
    """A tiny model, and an SAE trained for a few steps on a few images, with its statistics."""
    pipe = load_pipeline(name, device="cpu")
    cache = collect(pipe, load_prompts("world", n), [HOOKPOINT], store=store, **settings)
    config = SAEConfig(k=4, expansion=1, lr=1e-3)
    sae = train(cache, config, batch_size=256, device="cpu", store=store)[HOOKPOINT, "k4"]
    return SimpleNamespace(pipe=pipe, cache=cache, sae=sae, stats=FeatureStats.measure(sae, cache, store=store))


@pytest.fixture(scope="module")
def micro(store):
    return prepare("tiny-turbo", 48, store)


@pytest.fixture(scope="module")
def chosen(micro) -> list[int]:
    """Two features that fire on enough held-out images and yet not on all."""
    firing = (micro.stats.image_activations("max") > FIRES) & micro.stats.prompts.held_out[:, None]
    counts = firing.sum(axis=0)
    return np.flatnonzero((counts >= 4) & (counts < micro.stats.prompts.held_out.sum()))[:2].tolist()


@pytest.fixture(scope="module")
def result(micro, chosen, store) -> Ablation:
    return ablate(micro.pipe, micro.sae, micro.stats, chosen, prompts_per_feature=4, batch_size=16, store=store)


def place(result: Ablation, effects: FeatureEffects, micro, at: int) -> int:
    """Which image of the cache the at-th of a feature's images is."""
    texts, seeds = micro.stats.prompts.texts, micro.stats.prompts.seeds
    return list(zip(texts, seeds, strict=True)).index((effects.prompts[at], effects.seeds[at]))


# What is drawn --------------------------------------------------------------------------------------------------------


def test_a_batch_of_changes_is_what_steer_makes_of_each(micro, chosen) -> None:
    latent, other = chosen
    direction = np.random.default_rng(0).standard_normal(micro.sae.d_in).astype(np.float32)
    rows = micro.sae.directions.numpy()
    changes = [None, Change(latent, rows[latent]), Change(other, rows[other], 3.0), Change(latent, direction, -1.0)]
    edits = [{}, {"scale": {latent: 0.0}}, {"scale": {other: 3.0}},
             {"scale": {latent: -1.0}, "along": {latent: direction}}]  # fmt: skip
    strongest = micro.stats.image_activations("max").argmax(axis=0)
    prompts = micro.stats.prompts.take([0, *strongest[[latent, other, latent]].tolist()])
    texts, seeds = prompts.texts, prompts.seeds
    with rewrite(micro.pipe, {HOOKPOINT: changing(micro.sae, changes)}):
        made = generate(micro.pipe, texts, seeds, output_type="np")
    for row, edit in enumerate(edits):
        with steer(micro.pipe, micro.sae, **edit):
            alone = generate(micro.pipe, texts, seeds, output_type="np")[row]
        np.testing.assert_allclose(made[row], alone, atol=2e-5)
    assert np.abs(made[1:] - generate(micro.pipe, texts, seeds, output_type="np")[1:]).max(axis=(1, 2, 3)).min() > 1e-4


def test_in_half_precision_a_change_is_rounded_once_and_no_other_token_changes(micro, chosen) -> None:
    latent, sae = chosen[0], micro.sae
    direction = 9 * sae.directions.numpy()[latent]
    update = torch.randn(1, 16, 16, sae.d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
    z = sae.encode(update.float())[..., latent, None]
    made = changing(sae, [Change(latent, direction)])(update, Call(HOOKPOINT, 0, 1, False))
    fires = (z > 0).expand_as(made)
    assert fires.any() and not fires.all()
    assert torch.equal(made[~fires].view(torch.int16), update[~fires].view(torch.int16))
    once = (update.float() - z * torch.from_numpy(direction)).bfloat16()
    assert (made != once)[fires].float().mean() < 1e-3  # float32 sums in another order may round otherwise


def test_an_image_that_is_done_is_not_kept_waiting_for_batches_that_are_not_drawn(micro, chosen, monkeypatch) -> None:
    change, kept = Change(chosen[0], micro.sae.directions.numpy()[0]), []
    orders = [Order(i, "", 0, {(chosen[0], f"condition {c}"): change for c in range(5)}) for i in range(3)]
    picture = np.zeros((2, 2, 3), np.float32)

    def draw(_pipe, _sae, _stats, batch):
        for order, keys in batch:
            yield order, keys, np.zeros((1, 1, 1), np.float32), np.stack([picture] * (1 + len(keys)))

    monkeypatch.setattr(pairs, "_draw", draw)
    monkeypatch.setattr(pairs, "Pairs", lambda order, z: kept.append(order.image) or Pairs(order, z))
    drawn = draw_pairs(micro.pipe, micro.sae, micro.stats, orders, {0}, 5)  # the first batch is of image 0 alone
    assert [each.order.image for each in drawn] == [1, 2] and set(kept) == {1, 2}


def test_controls_change_the_same_tokens_by_the_same_amount_and_one_is_another_feature(micro, chosen) -> None:
    feature = chosen[0]
    other, changes = choose_other(micro.stats, feature), {}
    for condition, change in draw_controls(micro.sae, micro.stats, [feature], 0)[feature].items():
        seen = []
        spy = {HOOKPOINT: lambda update, call, seen=seen: seen.append(update.clone())}
        edit = {HOOKPOINT: changing(micro.sae, [change] * 6)}
        with rewrite(micro.pipe, spy), rewrite(micro.pipe, edit), rewrite(micro.pipe, spy):
            generate(micro.pipe, micro.stats.prompts.texts[:6], micro.stats.prompts.seeds[:6], output_type="latent")
        before, after = seen
        changes[condition] = after - before
        codes = micro.sae.encode(before)[..., other if condition == "other feature" else feature]
        torch.testing.assert_close(changes[condition].norm(dim=-1), codes, rtol=1e-3, atol=1e-4)
    assert list(changes) == list(CONDITIONS)
    assert changes["ablated"].norm(dim=-1).max() > 0.01
    for one, another in itertools.combinations(changes.values(), 2):
        assert not torch.allclose(one, another, atol=1e-3)
    gaps = np.abs(micro.stats.density[micro.stats.alive] - micro.stats.density[feature])
    assert other != feature
    assert abs(micro.stats.density[other] - micro.stats.density[feature]) <= np.sort(gaps)[1]


def test_the_image_as_it_is_was_collected_and_stays_bit_identical_where_the_feature_is_silent(micro, chosen) -> None:
    feature = chosen[0]
    peaks = micro.stats.image_activations("max")[:, feature]
    images = [int(peaks.argmin()), int(peaks.argmax())]
    assert peaks[images[0]] == 0
    prompts, conditions = micro.stats.prompts, draw_controls(micro.sae, micro.stats, [feature], 0)[feature]
    changes = {(feature, c): change for c, change in conditions.items() if c != "other feature"}
    orders = [Order(i, prompts.texts[i], prompts.seeds[i], changes) for i in images]
    silent, fires = draw_pairs(micro.pipe, micro.sae, micro.stats, orders, (), 10)
    collected = [Image.open(io.BytesIO(micro.cache.thumbnail(i))).convert("RGB") for i in range(48)]
    pixels = np.stack([np.asarray(image) for image in collected]) / 255
    for each in (silent, fires):
        distances = np.abs(pixels - each.clean).mean(axis=(1, 2, 3))
        assert distances.argmin() == each.order.image
        assert distances.min() < 0.02  # what WebP loses
    assert all((clean == edited).all() for clean, edited in silent.pictures.values())
    assert all((clean != edited).any() for clean, edited in fires.pictures.values())


@pytest.mark.parametrize("batch_size", [2, 3, 7, 64])
def test_batches_are_full_hold_each_change_once_and_pair_it_with_its_own_image(micro, chosen, batch_size) -> None:
    changes = {(chosen[0], f"condition {i}"): Change(chosen[0], micro.sae.directions.numpy()[0]) for i in range(5)}
    orders = [Order(i, "a red circle", i, changes) for i in range(3)]
    batches = fill_batches(orders, batch_size)
    sizes = [sum(1 + len(keys) for _, keys in batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert all(size >= batch_size - 1 for size in sizes[:-1])
    drawn = [(order.image, key) for batch in batches for order, keys in batch for key in keys]
    assert drawn == [(i, key) for i in range(3) for key in changes]


# What is measured -----------------------------------------------------------------------------------------------------


def test_effects_are_means_over_the_pixels_of_firing_and_other_tokens(micro, result) -> None:
    judge = WorldJudge()
    for effects in result.measured:
        row = micro.sae.directions.numpy()[effects.feature]
        mixed = draw_controls(micro.sae, micro.stats, [effects.feature], 0)[effects.feature][HARDEST].direction
        for at in range(len(effects.images)):
            fires = micro.stats.heat_map(effects.feature, place(result, effects, micro, at)) > FIRES
            region = np.kron(fires, np.ones((8, 8))) > 0
            arguments = ([effects.prompts[at]], [effects.seeds[at]])
            clean = generate(micro.pipe, *arguments, output_type="np")
            for name, dose, direction in [
                ("ablated", 0.0, row),
                ("ablated at dose 4", 4.0, row),
                (HARDEST, 0.0, mixed),
            ]:
                edit = {"scale": {effects.feature: dose}, "along": {effects.feature: direction}}
                with steer(micro.pipe, micro.sae, **edit):
                    edited = generate(micro.pipe, *arguments, output_type="np")
                seen = {
                    "pixel": np.abs(edited - clean).mean(axis=3)[0],
                    "perceptual": judge.perceptual(clean, edited)[0],
                }
                for measure, change in seen.items():
                    inside, outside = effects.values(name, measure)[at]
                    assert inside == pytest.approx(change[region].mean(), rel=2e-2, abs=2e-6)
                    assert (
                        np.isnan(outside)
                        if region.all()
                        else outside == pytest.approx(change[~region].mean(), rel=2e-2, abs=2e-6)
                    )
                semantic = effects.values(name, "semantic")[at, 0]
                assert semantic == pytest.approx(judge.semantic(clean, edited)[0], rel=2e-2, abs=1e-5)
                before, after = judge.factors(clean), judge.factors(edited)
                changed = {f for f in before if before[f].argmax() != after[f].argmax()}
                assert set(effects.lines[at]["effects"][name]["changed"]) == changed
            assert effects.area[at] == pytest.approx(fires.mean())


def test_images_are_held_out_firing_and_strongest_first(micro, result) -> None:
    for effects in result.measured:
        images = [place(result, effects, micro, at) for at in range(len(effects.images))]
        means = np.array([micro.stats.heat_map(effects.feature, i).mean() for i in range(48)])
        held_out = np.flatnonzero(micro.stats.prompts.held_out)
        assert images == sorted(held_out, key=lambda i: -means[i])[: len(images)]
        assert min(effects.area) > 0


def test_an_image_is_drawn_once_for_all_features(result) -> None:
    plan = json.loads(result.artifact.read_text("plan.json"))
    assert len({tuple(image) for image in plan["images"]}) == len(plan["images"])
    assert sum(map(len, plan["features"].values())) == 8
    assert len(result.artifact.file(LINES).read_text().splitlines()) == len(plan["images"])


def test_prompts_of_ones_own_are_measured_where_the_feature_fires(micro, chosen, store) -> None:
    ranked = np.argsort(-micro.stats.image_activations("mean")[:, chosen[0]])
    texts = [micro.stats.prompts.texts[i] for i in [*ranked[:5], *ranked[:2], *ranked[-2:]]]
    prompts = Prompts(tuple(texts), tuple(range(len(texts))), ({},) * len(texts))
    made = ablate(micro.pipe, micro.sae, micro.stats, chosen[0], prompts, doses=(), judge=None, store=store)
    codes = []
    for text, seed in zip(prompts.texts, prompts.seeds, strict=True):
        seen = []
        with rewrite(micro.pipe, {HOOKPOINT: lambda update, call, seen=seen: seen.append(update.clone())}):
            generate(micro.pipe, [text], [seed])
        codes.append(micro.sae.encode(seen[0])[0, ..., chosen[0]].numpy() > FIRES)
    fires = [i for i, code in enumerate(codes) if code.any()]
    assert len(fires) > 4
    (effects,) = made.features
    assert list(effects.seeds) == fires
    np.testing.assert_allclose(effects.area, [codes[i].mean() for i in fires])
    row = made.rows()[0]
    assert (row["images"], row["prompts"]) == (len(fires), len({texts[i] for i in fires}))
    assert "held-out" not in made.sentence() and made.measures == ["pixel"] and made.dose_rows()[0]["dose"] == 0


def test_several_seeds_of_a_prompt_are_one_cluster(result) -> None:
    effects = made_up(1, [1, 3, 5, 5, 5], [0] * 5)
    made = replace(result, features=(replace(effects, prompts=["same", "same", "a", "b", "c"]),))
    row = made.rows()[0]
    assert (row["images"], row["prompts"], row["ablated"]) == (5, 4, (2 + 5 + 5 + 5) / 4)
    assert row["p"] == 1 / 16  # of all 2⁴ flips of four prompts' signs only the one that flips nothing
    alone = replace(made, features=(replace(effects, prompts=["same"] * 5),))
    assert alone.rows() == [] and "fires on images of 1 prompts" in alone._repr_html_()


def test_without_a_judge_and_with_an_embedding_only_what_they_tell_is_measured(micro, chosen, store) -> None:
    settings = {"prompts_per_feature": 4, "doses": (), "store": store}
    for judge, measures in [(None, ["pixel"]), (EmbeddingJudge(WorldEmbed()), ["pixel", "semantic"])]:
        made = ablate(micro.pipe, micro.sae, micro.stats, chosen[:1], judge=judge, **settings)
        assert made.measures == measures and made.factor_rows() == [] and made.factors == []
        assert ("By the world judge" in made.sentence()) == (judge is not None)
        assert made.judge == (judge and judge.name)
        with pytest.raises(KitError, match="not 'perceptual'"):
            made.rows("perceptual")
        assert made._repr_html_() and "rho" not in made.overall()


def test_a_step_alone_is_what_steer_makes_of_it_with_guidance_too_and_one_step_is_refused(store, micro) -> None:
    base = prepare("tiny-base", 20, store, num_inference_steps=2)
    feature = int(np.argmax(base.stats.image_density))
    prompts = base.stats.prompts.take(np.argsort(-base.stats.image_activations("mean")[:, feature])[:4].tolist())
    made = ablate(base.pipe, base.sae, base.stats, feature, prompts, doses=(), by_step=True, judge=None, store=store)
    rows = made.step_rows()
    assert [row["step"] for row in rows] == [0, 1]
    (effects,) = made.features
    for at, step in itertools.product(range(2), range(2)):
        arguments, settings = ([effects.prompts[at]], [effects.seeds[at]]), {"num_inference_steps": 2}
        clean = generate(base.pipe, *arguments, **settings, output_type="np")
        with steer(base.pipe, base.sae, scale={feature: 0.0}, steps=[step]):
            edited = generate(base.pipe, *arguments, **settings, output_type="np")
        inside, outside = effects.values(f"ablated at step {step}", "pixel")[at]
        whole = inside * effects.area[at] + (0 if np.isnan(outside) else outside * (1 - effects.area[at]))
        assert whole == pytest.approx(np.abs(edited - clean).mean(), rel=2e-2, abs=2e-6)
    assert "step 1" in str(made.plot_steps().layout.xaxis.ticktext)
    with pytest.raises(KitError, match="made in one step, so by_step=True asks nothing"):
        ablate(micro.pipe, micro.sae, micro.stats, by_step=True, store=store)


# Resuming -------------------------------------------------------------------------------------------------------------


def test_killed_after_any_image_it_goes_on_and_ends_bit_identical(micro, chosen, result, tmp_path, monkeypatch) -> None:
    arguments = (micro.pipe, micro.sae, micro.stats, chosen)
    settings = {"prompts_per_feature": 4, "batch_size": 16, "store": tmp_path}
    child = os.fork()
    if not child:
        add, added = ablation.Lines.add, []

        def add_three(lines: object, unit: str, line: dict[str, object]) -> None:
            add(lines, unit, line)
            added.append(unit)
            if len(added) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(ablation.Lines, "add", add_three)
        ablate(*arguments, **settings)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (folder,) = (tmp_path / "studies").iterdir()
    assert len((folder / LINES).read_text().splitlines()) == 3
    with open(folder / LINES, "a") as file:
        file.write('["3", {"answ')  # as a power cut leaves it
    drawn = []
    measure = ablation.measure
    monkeypatch.setattr(
        ablation, "measure", lambda pairs, *rest: drawn.append(pairs.order.image) or measure(pairs, *rest)
    )
    again = ablate(*arguments, **settings)
    assert drawn == list(range(3, len(json.loads(again.artifact.read_text("plan.json"))["images"])))
    assert again.artifact.digest == result.artifact.digest  # covers every byte of every file
    again.artifact.verify()
    ablate(*arguments, labels={chosen[0]: "red"}, **settings)
    assert drawn[-1] == len(drawn) + 2  # labels draw nothing


def test_an_ablation_whose_doses_were_read_otherwise_is_another_study(result) -> None:
    assert result.artifact.recipe["readings"] == 2


def test_an_ablation_of_an_older_format_is_refused_by_its_version(result, tmp_path) -> None:
    folder = tmp_path / "studies" / result.artifact.name
    shutil.copytree(result.artifact.folder, folder)
    stamp = json.loads((folder / "stamp.json").read_text())
    stamp["recipe"]["version"] = 1
    (folder / "stamp.json").write_text(json.dumps(stamp))
    with pytest.raises(ArtifactError, match="not as it was written"):
        Ablation.open(folder)
    old = Store.at(tmp_path).artifact("studies", "old", {"study": "ablation"})
    old._recipe = {**old.recipe, "version": 1}
    with old.lock():
        old.seal()
    with pytest.raises(ArtifactError, match="studies version 1; this kit reads studies version 2"):
        Ablation.open(old.folder)


# What is refused ------------------------------------------------------------------------------------------------------


def test_default_features_are_the_local_ones_with_the_most_energy(micro) -> None:
    features = most_energetic(micro.stats)
    held_out = micro.stats.prompts.held_out
    counts = (micro.stats.image_activations("max")[held_out] > FIRES).sum(axis=0)
    codes = np.stack([micro.stats.heat_maps(i) for i in range(48)], axis=1)
    energy = np.square(codes, dtype=np.float64).sum(axis=(1, 2, 3))
    eligible = [f for f in range(micro.stats.d_sae) if counts[f] >= 4 and (codes[f] > FIRES).mean() <= 0.5]
    assert set(features) == set(sorted(eligible, key=lambda f: -energy[f])[:12])
    assert energy[features].tolist() == pytest.approx(sorted(energy[features], reverse=True), rel=1e-3)


def test_a_feature_on_images_of_too_few_prompts_is_skipped_and_said_so(micro, store) -> None:
    held_out = micro.stats.prompts.held_out
    counts = (micro.stats.image_activations("max")[held_out] > FIRES).sum(axis=0)
    rare = int(next(f for f in micro.stats.alive if counts[f] < 4))
    skipped = ablate(micro.pipe, micro.sae, micro.stats, [rare], store=store)
    assert skipped.rows() == [] and not skipped.measured
    assert f"fires on images of {counts[rare]} prompts, and 4 are the least" in skipped._repr_html_()
    for figure in (skipped.plot(), skipped.plot_doses(), skipped.plot_steps()):
        assert figure.layout.meta["alt"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"features": [9999]}, "there is no 9999"),
        ({"features": []}, "one latent or more"),
        ({"features": [-1]}, "no -1"),
        ({"features": [1.5]}, "no 1.5"),
        ({"features": [True]}, "no True"),
        ({"doses": (0, float("nan"))}, "doses must be finite numbers"),
        ({"doses": ("much",)}, "doses must be finite numbers"),
        ({"prompts": ["a red circle"] * 8}, "intervals are over prompts, and 4 are the least; it got 1"),
        ({"prompts_per_feature": 3}, "prompts_per_feature must be an integer of at least 4"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"labels": {9999: "red"}}, r"labels of \[9999\]"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    micro, tmp_path, capfd, unchecked_types, settings, words
) -> None:
    with pytest.raises(KitError, match=words):
        ablate(micro.pipe, micro.sae, micro.stats, **settings, store=tmp_path)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_an_sae_without_directions_is_refused_before_anything_is_announced(micro, tmp_path, capfd) -> None:
    config = replace(micro.sae.config, normalize="layer_norm")
    sae = type(micro.sae)(config, micro.sae.d_in, micro.sae.site, micro.sae.name)
    with pytest.raises(KitError, match="its latents have no direction"):
        ablate(micro.pipe, sae, micro.stats, store=tmp_path)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_a_dead_latent_is_refused(micro, store) -> None:
    dead = replace(micro.stats, density=np.zeros_like(micro.stats.density))
    with pytest.raises(KitError, match="latent 5 of .* is dead"):
        ablate(micro.pipe, micro.sae, dead, [5], store=store)
    only = np.zeros_like(micro.stats.density)
    only[5] = 0.1
    with pytest.raises(KitError, match="no alive feature but 5"):
        choose_other(replace(micro.stats, density=only), 5)


def test_statistics_of_another_sae_are_refused(micro, store) -> None:
    with pytest.raises(ArtifactError, match="the statistics are of another at mid.0"):
        ablate(micro.pipe, micro.sae, replace(micro.stats, sae="another", hookpoint="mid.0"), store=store)


def test_another_model_is_refused_by_both_names(micro, chosen, store) -> None:
    model = replace(describe(micro.pipe), name="someone/else", revision="abc")
    other = SimpleNamespace(unet=None, sdxl_sae_kit_model=model)
    with pytest.raises(ArtifactError, match=r"tiny-turbo \(revision .*someone/else \(revision abc"):
        ablate(other, micro.sae, micro.stats, chosen, store=store)


# What is told ---------------------------------------------------------------------------------------------------------


def made_up(
    feature: int,
    ablated: list[float],
    control: list[float],
    changed: tuple[str, ...] = (),
    outside: tuple[float | None, ...] | None = None,
) -> FeatureEffects:
    """Effects as given for every measure and dose; outside a quarter of that, and none for the first image."""
    n = len(ablated)
    lines = []
    for at, (own, other) in enumerate(zip(ablated, control, strict=True)):
        beyond = [None if at == 0 else value / 4 for value in (own, other)] if outside is None else [outside[at]] * 2
        effects = {
            c: {measure: [own if c == "ablated" else other, beyond[c != "ablated"]] for measure in MEASURES}
            | {"changed": list(changed) if c == "ablated" else []}
            for c in CONDITIONS
        }
        for condition, dose in itertools.product(("ablated", HARDEST), DOSES):
            effects[f"{condition} at dose {dose:g}"] = effects[condition]
        readings = {"ablated": ALL_DOSES, HARDEST: ALL_DOSES[::-1]}
        lines.append({"area": 0.5, "overlap": 0.25, "effects": effects, "readings": readings})
    texts, answers = [f"prompt {i}" for i in range(n)], [{"colour": 0, "shape": 1, "pattern": 0}] * n
    return FeatureEffects(feature, 0, range(n), texts, range(n), lines, answers)


def test_rows_and_overall_are_the_means_of_what_was_measured(result) -> None:
    one, other = made_up(1, [4, 4, 4, 4, 8], [1, 1, 1, 2, 2]), made_up(2, [2, 2, 2, 2], [1, 1, 1, 1])
    made = replace(result, features=(one, other))
    first, second = made.rows()
    assert (first["feature"], first["images"], first["ablated"], first["other feature"]) == (1, 5, 4.8, 1.4)
    assert first["ablated − untrained SAE"] == pytest.approx(3.4)
    # The first image has no outside, so what concerns the outside is over the others: 4 of one feature, 3 of the other.
    assert (first["with outside"], second["with outside"]) == (4, 0)
    assert first["ablated outside"] == pytest.approx((4 + 4 + 4 + 8) / 4 / 4)
    assert first["ablated locality"] == pytest.approx(4) and np.isnan(second["ablated locality"])
    assert second["ablated interval"] == (2, 2)
    # Of n pairs that all point one way, one flip of the 2ⁿ has as large a mean; of two tests the smaller counts double.
    assert [(row["p"], row["q"]) for row in (first, second)] == [(1 / 32, 1 / 16), (1 / 16, 1 / 16)]
    assert (first["monotone"], first["rho"], first[f"monotone, {HARDEST}"], first[f"rho, {HARDEST}"]) == (1, 1, 0, -1)
    whole = made.overall()
    assert (whole["features"], whole["images"], whole["passing"], whole["with outside"]) == (2, 9, 0, 1)
    assert whole["ablated"] == pytest.approx(3.4)  # each feature counts once
    assert whole["ablated locality"] == pytest.approx(first["ablated locality"])
    assert whole["ablated − random direction"] == pytest.approx(2.2)
    assert whole["ablated − random direction interval"] == pytest.approx((1, 3.4))
    assert whole["over"] == "2 features"
    alone = replace(made, features=(one,)).overall()  # of one feature the prompts are what there are several of
    assert alone["over"] == "5 prompts" and alone["ablated interval"] == first["ablated interval"]
    assert alone["ablated locality interval"] == first["ablated locality interval"]
    assert made.overall("semantic")["ablated"] == pytest.approx(3.4)


def test_features_count_as_above_every_control_only_after_correction(result) -> None:
    strong = [made_up(f, [2] * 6, [1] * 6) for f in range(3)]
    assert replace(result, features=tuple(strong)).overall()["passing"] == 3  # p = q = 1/64
    assert "could not" not in replace(result, features=tuple(strong)).sentence()
    weak = [made_up(f, [1, 2] * 3, [2, 1] * 3) for f in range(3, 13)]
    assert replace(result, features=(*strong, *weak)).overall()["passing"] == 0  # q = 13/3 · 1/64


def test_features_on_too_few_prompts_to_pass_are_counted(result) -> None:
    few, enough = [made_up(f, [9] * 4, [1] * 4) for f in (1, 2)], made_up(3, [9] * 5, [1] * 5)
    made = replace(result, features=(*few, enough))
    assert min(row["p"] for row in made.rows() if row["prompts"] == 4) == 1 / 16  # however far above
    assert replace(result, features=(enough,)).overall()["passing"] == 1
    assert made.overall()["on too few prompts"] == 2
    assert "Of these features 2 could not: of fewer than 5 prompts no p-value is below 0.05." in made.sentence()


def test_doses_factors_and_labels_are_tabled(result) -> None:
    features = (made_up(1, [2.0] * 4, [1.0] * 4, ("colour",)), made_up(2, [4.0] * 4, [1.0] * 4, ("shape", "colour")))
    labelled = {1: ("red", ("colour",)), 2: ("red, round", ("colour", "style")), 3: ("nothing", ())}
    made = replace(result, features=features, labelled=labelled)
    assert [(r["dose"], r["feature"], r[HARDEST]) for r in made.dose_rows()] == [
        (-1, 3, 1), (0, 3, 1), (1, 0, 0), (2, 3, 1), (4, 3, 1)
    ]  # fmt: skip
    assert [(r["factor"], r["ablated"], r[HARDEST]) for r in made.factor_rows()] == [
        ("colour", 1, 0), ("shape", 0.5, 0), ("pattern", 0, 0)
    ]  # fmt: skip
    assert [r["ablated"] for r in made.factor_rows(1)] == [1, 0, 0]
    with pytest.raises(KitError, match=r"Feature 7 was not measured; \[1, 2\] were"):
        made.factor_rows(7)
    rows = made.label_rows()
    assert [(r["names"], r["named, ablated"], r["others, ablated"], r[f"named, {HARDEST}"]) for r in rows] == [
        ("colour", 1, 0, 0), ("colour", 1, 1, 0)
    ]  # fmt: skip
    assert "most often for colour: in a share of 1.00" in made.sentence()
    alt = made.plot_doses().layout.meta["alt"]
    assert "3.00 [2.00, 4.00] at -1".replace(".00", "") in alt and "means over 2 features" in alt


def test_a_label_names_the_factors_whose_values_are_among_its_words(micro, chosen, result, store) -> None:
    settings = {"prompts_per_feature": 4, "batch_size": 16, "store": store}
    labels = {chosen[0]: "Red circles, upper edge", chosen[1]: "something reddish"}
    made = ablate(micro.pipe, micro.sae, micro.stats, chosen, labels=labels, **settings)
    assert made.artifact.digest == result.artifact.digest
    text, named = made.labelled[chosen[0]]
    assert text == labels[chosen[0]]
    assert {"shape", "colour"} <= set(named) <= {"shape", "colour", "shape2", "colour2"}  # few prompts have a second
    assert made.labelled[chosen[1]] == ("something reddish", ())
    assert [row["feature"] for row in made.label_rows()] == [chosen[0]]


def test_the_sentence_follows_the_numbers(result) -> None:
    def sentence(ablated: float, control: float) -> str:
        return replace(result, features=tuple(made_up(f, [ablated] * 4, [control] * 4) for f in (1, 2))).sentence()

    assert "larger than every control" in sentence(2, 1)
    assert f"not clearly larger than {' or '.join(CONTROLS)}" in sentence(1, 1)
    assert "not clearly larger" in sentence(1, 2)
    assert "2 features (8 held-out images). The other feature fires on 25% of the region" in sentence(1, 2)
    assert "By themselves 0 of 2 features" in sentence(2, 1)


def test_without_any_change_outside_there_is_no_locality_to_speak_of(result) -> None:
    for outside in (0.0, None):
        effects = made_up(1, [1] * 4, [1] * 4, outside=(outside,) * 4)
        made = replace(result, features=(effects, replace(effects, feature=2)))
        assert np.isnan(made.overall()["ablated locality"])
        assert "no outside to compare with" in made.sentence()
        assert "nan" not in made.sentence()


def test_prompts_and_labels_are_shown_and_never_run(result) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    features = [replace(e, prompts=[nasty, *list(e.prompts)[1:]]) for e in result.features]
    labelled = {features[0].feature: (nasty, ("colour",))}
    page = read_safely(replace(result, features=tuple(features), labelled=labelled)._repr_html_())
    assert page.text.count(nasty) == len(features) + 1
    assert any(nasty in alt for alt in page.values("alt"))
    assert page.tags.count("img") == results.SHOWN * len(features)


def test_what_it_says_of_itself_is_short(result) -> None:
    assert repr(result).startswith(f"Ablation of 2 features of {result.sae}: 8 images at doses -1, 0, 1, 2, 4")
    assert len(repr(result)) < 200
    assert len(repr(result.features[0])) < 80


def test_the_figure_says_in_words_what_it_shows(result) -> None:
    figure, overall = result.plot(), result.overall()
    assert [trace.name for trace in figure.data] == list(CONDITIONS)
    assert figure.data[0].y[-1] == overall["ablated"]
    assert f"ablated {overall['ablated']:.3g}" in figure.layout.meta["alt"]
    assert "perceptual" in result.plot("perceptual").layout.yaxis.title.text
    doses = result.plot_doses()
    assert [trace.name for trace in doses.data[-2:]] == ["feature", HARDEST]
    assert list(doses.data[-1].x) == ALL_DOSES

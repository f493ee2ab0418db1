"""Recovery: planted latents are found, chance is 0.5, and what is asked of an image is what it can show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from caches import made_up_recipe

from sdxl_sae_kit import activations
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import HookpointError, KitError
from sdxl_sae_kit.html import show_table
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.recovery import measure_confusion
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tiny.world import sample_scene
from sdxl_sae_kit.yardstick import measure_recovery

N, D_IN, TOKENS = 400, 8, 6
CONTROLS = ("untrained SAE", "channel", "PCA axis")


class InMemory(Activations):
    """Made-up updates of the prompts' images, (image, token, d_in), in one row, of one hookpoint or by hookpoint."""

    def __init__(self, prompts, updates):
        updates = updates if isinstance(updates, dict) else {"mid.0": updates}
        recipe = made_up_recipe(len(prompts), hookpoints=dict.fromkeys(updates, [2, 3, D_IN]))
        super().__init__("made up", recipe, Layout.of(recipe), prompts)
        self.updates, self.largest = {name: torch.as_tensor(of) for name, of in updates.items()}, 0

    digest = "none"

    def read(self, hookpoint, images):
        self.largest = max(self.largest, len(images))
        return self.updates[hookpoint][torch.as_tensor(images)][:, None]

    def _blocks(self, *_):
        raise AssertionError("recovery reads whole images, never shuffled batches")


def channel_sae(hookpoint="mid.0"):
    """Latent i is channel i where that is positive."""
    sae = SAE(SAEConfig(k=D_IN, expansion=1), D_IN, Site("m", "r", hookpoint, 1, 0.0), "channels")
    sae.requires_grad_(False)
    sae.W_enc.copy_(torch.eye(D_IN))
    sae.W_dec.copy_(torch.eye(D_IN))
    return sae


def planted(prompts, plants, seed=0):
    """Updates of one hookpoint: see `noise_with`."""
    return InMemory(prompts, noise_with(prompts, plants, seed))


def noise_with(prompts, plants, seed=0):
    """Noise, to which `plants`, channel → (image,), adds that much at one token of every image."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(len(prompts), TOKENS, D_IN)).astype(np.float32)
    at = rng.integers(TOKENS, size=len(prompts))
    for channel, strengths in plants.items():
        updates[np.arange(len(prompts)), at, channel] += strengths
    return updates


@pytest.fixture(scope="module")
def world():
    return load_prompts("world", N)


@pytest.fixture(scope="module")
def scenes():
    """The scenes of these prompts, as they were drawn."""
    rng = np.random.RandomState(0)
    return [sample_scene(rng) for _ in range(N)]


def by_value(rows):
    return {(row["factor"], row["value"]): row for row in rows}


def test_a_planted_latent_is_found_and_noise_is_at_chance(world, scenes):
    circle = np.array(["circle" in (scene.shape, scene.shape2) for scene in scenes])
    rows = by_value(measure_recovery(channel_sae(), planted(world, {3: 50.0 * circle})))
    found = rows["shape", "circle"]
    assert (found["latent"], found["AUC"], found["interval"]) == (3, 1, (1, 1))
    assert (found["precision"], found["recall"]) == (1, 1) and found["channel"] == 1
    # a background has nothing to do with shapes; of its five values the mean is near chance for every detector
    for column in ("AUC", *CONTROLS):
        assert rows["background", "mean"][column] == pytest.approx(0.5, abs=0.08), column
    for row in rows.values():
        assert row["interval"][0] <= row["AUC"] <= row["interval"][1]


def test_a_latent_may_tell_by_silence(world, scenes):
    """What fires for every style but neon: neon's images are those on which it is silent, and it is told as surely."""
    others = np.array([scene.style != "neon" for scene in scenes])
    row = by_value(measure_recovery(channel_sae(), planted(world, {6: 50.0 * others})))["style", "neon"]
    assert (row["latent"], row["tells by"]) == (6, "silence")
    assert (row["AUC"], row["precision"], row["recall"], row["channel"]) == (1, 1, 1, 1)


def test_a_channel_may_tell_by_its_minimum_and_a_latent_has_none(world, scenes):
    neon = np.array([scene.style == "neon" for scene in scenes])
    row = by_value(measure_recovery(channel_sae(), planted(world, {5: -50.0 * neon})))["style", "neon"]
    assert row["channel"] == 1 and row["PCA axis"] > 0.95
    assert row["AUC"] < 0.75


def test_what_is_chosen_on_training_images_is_measured_on_others(world, scenes):
    """Latent 1 tells red on training images only, latent 2 a little on all: 1 is chosen, and measured at chance."""
    red = np.array(["red" in (scene.colour, scene.colour2) for scene in scenes])
    row = by_value(measure_recovery(channel_sae(), planted(world, {1: 50.0 * (red & ~world.held_out), 2: 2.0 * red})))
    assert row["colour", "red"]["latent"] == 1
    assert row["colour", "red"]["AUC"] == pytest.approx(0.5, abs=0.15)


def test_what_is_asked_is_what_an_image_can_show(world, scenes):
    rows = by_value(measure_recovery(channel_sae(), planted(world, {})))
    held = [scene for scene, out in zip(scenes, world.held_out, strict=True) if out]
    one, two = ([scene for scene in held if scene.count == count] for count in ("one", "two"))

    def counts(factor, value):
        return rows[factor, value]["images"], rows[factor, value]["with it"]

    assert counts("shape", "star") == (len(held), sum("star" in (s.shape, s.shape2) for s in held))
    assert counts("colour", "blue") == (len(held), sum("blue" in (s.colour, s.colour2) for s in held))
    assert counts("size", "large") == (len(one), sum(s.size == "large" for s in one))
    assert counts("count", "two") == (len(held), len(two))
    assert counts("relation", "above") == (len(two), sum(s.relation in ("above", "below") for s in two))
    posed = [s for s in held if not (s.shape == "circle" and s.material == "plain")]
    assert counts("pose", "tilted") == (len(posed), sum(s.pose == "tilted" for s in posed))
    roomy = [s for s in held if not (s.style == "sketch" and s.size == "small")]
    assert counts("material", "striped") == (len(roomy), sum(s.material == "striped" for s in roomy))
    assert not {"shape2", "colour2"} & {factor for factor, _ in rows}
    assert ("relation", "below") not in rows and ("relation", "right of") not in rows


def test_rows_end_with_means_of_values_and_of_factors(world):
    rows = measure_recovery(channel_sae(), planted(world, {}))
    means = [row for row in rows if row["value"] == "mean"]
    for mean in means[:-1]:
        values = [row for row in rows if row["factor"] == mean["factor"] and row["value"] != "mean"]
        for column in ("AUC", *CONTROLS, "precision", "recall"):
            assert mean[column] == pytest.approx(np.mean([row[column] for row in values]))
    assert rows[-1]["factor"] == "mean"
    assert rows[-1]["AUC"] == pytest.approx(np.mean([row["AUC"] for row in rows if row["value"] != "mean"]))
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert "PCA axis</th>" in show_table(rows, "Recovery")._repr_html_()


def test_factors_of_other_prompts_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    calm = rng.random(120) < 0.5
    told = [{"text": f"a day {i}", "factors": {"mood": "calm" if c else "wild"}} for i, c in enumerate(calm)]
    rows = by_value(measure_recovery(channel_sae(), planted(load_prompts(told), {4: 50.0 * calm})))
    assert list(rows) == [("mood", "calm"), ("mood", "wild"), ("mood", "mean"), ("mean", "mean")]
    assert (rows["mood", "calm"]["latent"], rows["mood", "calm"]["AUC"]) == (4, 1)


def test_images_are_read_part_by_part(world, monkeypatch):
    whole = planted(world, {})
    expected = measure_recovery(channel_sae(), whole)
    monkeypatch.setattr(activations, "_PART_BYTES", 4 * TOKENS * D_IN * 25)
    parts = planted(world, {})
    assert measure_recovery(channel_sae(), parts) == expected
    assert parts.largest <= 25 < whole.largest


def test_what_cannot_be_asked_is_refused(world):
    plain = load_prompts([f"prompt {i}" for i in range(60)])
    with pytest.raises(KitError, match="tell no factors.*'world'"):
        measure_recovery(channel_sae(), planted(plain, {}))
    with pytest.raises(KitError, match="Collect more prompts"):
        measure_recovery(channel_sae(), planted(world[:12], {}))
    with pytest.raises(KitError, match="no step 3"):
        measure_recovery(channel_sae(), planted(world, {}), step=3)
    for none, said in (({}, "there are no saes"), ([channel_sae()] * 2, "2 of these 2 saes are of mid.0")):
        with pytest.raises(KitError, match=f"recovery: {said}"):
            measure_recovery(none, planted(world, {}))
    elsewhere = SAE(SAEConfig(k=2, expansion=1), D_IN, Site("m", "r", "up.0.1", 1, 0.0))
    with pytest.raises(HookpointError, match="no updates of 'up.0.1'"):
        measure_recovery(elsewhere, planted(world, {}))


def test_of_all_hookpoints_the_one_that_tells_best_on_training_images_is_taken(world, scenes):
    """`mid.0` tells red, a little; `up.0.1` tells neon, and red on training images only."""
    red = np.array(["red" in (scene.colour, scene.colour2) for scene in scenes])
    neon = np.array([scene.style == "neon" for scene in scenes])
    first = noise_with(world, {3: 2.0 * red})
    second = noise_with(world, {5: 50.0 * neon, 1: 50.0 * (red & ~world.held_out)}, seed=1)
    cache = InMemory(world, {"mid.0": first, "up.0.1": second})
    saes = {hookpoint: channel_sae(hookpoint) for hookpoint in cache.hookpoints}
    rows = measure_recovery(saes, cache)
    assert rows == measure_recovery(iter(saes.values()), cache)
    assert list(dict.fromkeys(row["hookpoint"] for row in rows)) == ["mid.0", "up.0.1", "all"]
    alone = measure_recovery(saes["mid.0"], cache)
    assert [row for row in rows if row["hookpoint"] == "mid.0"] == alone
    every = by_value(row for row in rows if row["hookpoint"] == "all")
    assert (every["style", "neon"]["from"], every["style", "neon"]["latent"]) == ("up.0.1", 5)
    assert every["style", "neon"]["AUC"] == every["style", "neon"]["channel"] == 1
    assert (every["colour", "red"]["from"], every["colour", "red"]["latent"]) == ("up.0.1", 1)
    assert every["colour", "red"]["AUC"] == pytest.approx(0.5, abs=0.15)  # although mid.0 has 0.8 on held-out images
    assert by_value(alone)["colour", "red"]["AUC"] > 0.7


def test_confusion_is_how_often_a_latent_tells_the_images_of_every_value(world, scenes):
    """Latent 3 fires for stars and hearts of images with one or two objects, latent 5 is silent for neon only."""
    both = np.array([bool({"star", "heart"} & {scene.shape, scene.shape2}) for scene in scenes])
    others = np.array([scene.style != "neon" for scene in scenes])
    updates = noise_with(world, {})
    updates[..., [3, 5]] = 0  # so that what is planted has one strength everywhere
    updates[:, 0, 3], updates[:, 0, 5] = 50 * both, 50 * others
    found = measure_confusion(channel_sae(), InMemory(world, updates))
    at = {value: place for place, value in enumerate(found.values)}
    star, neon, flat, grid = at["shape", "star"], at["style", "neon"], at["style", "flat"], at["pattern", "grid"]
    assert found.latents[star] == "mid.0 3" and found.latents[neon] == "not mid.0 5"
    shapes = [{scene.shape, scene.shape2} for scene in scenes]
    for column in ("star", "heart", "circle"):
        shown = [i for i, held in enumerate(world.held_out) if held and column in shapes[i]]
        assert found.images[at["shape", column]] == len(shown)
        assert found.shares[star, at["shape", column]] == pytest.approx(np.mean([both[i] for i in shown]))
    assert found.shares[neon, neon] == 1 and found.shares[neon, flat] == 0
    gridded = [i for i, held in enumerate(world.held_out) if held and scenes[i].pattern == "grid"]
    assert found.shares[neon, grid] == pytest.approx(1 - np.mean([others[i] for i in gridded]))


def test_the_confusion_map_shows_and_tells_the_shares(world, scenes):
    stars = np.array([scene.shape == "star" for scene in scenes])
    found = measure_confusion(channel_sae(), planted(world, {3: 50.0 * stars}))
    figure = found.plot()
    (heat,) = figure.data
    assert np.array_equal(heat.z, found.shares) and list(heat.x) == list(heat.y)
    assert list(heat.x) == [f"{factor}: {value}" for factor, value in found.values]
    assert f"{len(found.values)} latents" in figure.layout.meta["alt"]
    assert f"{np.diagonal(found.shares).mean():.0%}" in figure.layout.meta["alt"]
    assert len(figure.layout.shapes) == 2 * (len({factor for factor, _ in found.values}) - 1)


def test_it_reads_a_real_cache(small_saes, small_cache):
    rows = measure_recovery(small_saes["up.0.1", "k8"], small_cache)
    assert rows[-1]["images"] == small_cache.prompts.held_out.sum()
    assert all(0 <= row[column] <= 1 for row in rows for column in ("AUC", *CONTROLS, "precision", "recall"))

"""Feature statistics against a brute-force oracle that sees all codes at once."""

import copy
import io
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from launching import LAUNCHERS
from PIL import Image
from scipy.stats import sem, t
from test_firing import brute_force_moran

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.evaluation import controls
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.measurement import plan_measurement
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.training import train


@pytest.fixture(scope="module")
def codes(small_saes, small_cache):
    """(image, token, latent), in float64, from the dense formula."""
    sae = small_saes["up.0.1", "k8"]
    x = small_cache.read("up.0.1", range(120))[:, 0].double().numpy()
    W_enc, b_enc, b_dec = (p.double().numpy() for p in (sae.W_enc, sae.b_enc, sae.b_dec))
    h = (x - b_dec) @ W_enc + b_enc
    kth = np.sort(h, axis=2)[..., -sae.k, None]
    return np.where(h >= kth, np.maximum(h, 0), 0)


def test_statistics_are_those_of_all_codes_at_once(small_stats, codes):
    fires = codes > 1e-3
    count = fires.sum((0, 1))
    assert small_stats.n_tokens == fires.shape[0] * fires.shape[1] == 120 * 64
    assert np.allclose(small_stats.density, count / small_stats.n_tokens, atol=2e-4)
    assert np.allclose(small_stats.image_density, fires.any(1).mean(0), atol=2e-2)
    for latent in np.flatnonzero(count > 20):
        values = codes[..., latent][fires[..., latent]]
        assert small_stats.mean[latent] == pytest.approx(values.mean(), rel=2e-2)
        assert small_stats.std[latent] == pytest.approx(values.std(), rel=5e-2, abs=1e-3)
        assert small_stats.max[latent] == pytest.approx(values.max(), rel=1e-3)
    assert set(small_stats.alive) >= set(np.flatnonzero(count > 1))
    assert not small_stats.mean[small_stats.density == 0].any()


@pytest.mark.parametrize("by", ["max", "mean", "area"])
def test_top_examples_are_the_images_with_the_highest_scores(small_stats, codes, by):
    scores = {"max": codes.max(1), "mean": codes.mean(1), "area": (codes > FIRES).mean(1)}[by]
    for latent in small_stats.alive.tolist()[:: max(1, len(small_stats.alive) // 10)]:
        examples = small_stats.examples(latent, by)
        assert abs(len(examples) - min(12, (scores[:, latent] > 0).sum())) <= 1
        best = np.sort(scores[:, latent])[::-1][: len(examples)]
        assert [e.value for e in examples] == pytest.approx(best.tolist(), rel=1e-3, abs=1e-4)
        for example in examples:
            assert np.allclose(example.heat_map.ravel(), codes[example.image, :, latent], rtol=2e-3, atol=2e-3)
            assert np.allclose(small_stats.heat_map(latent, example.image), example.heat_map, rtol=2e-3, atol=2e-3)


def test_image_activations_are_maxima_and_means_over_the_image(small_stats, codes):
    assert np.allclose(small_stats.image_activations("max"), codes.max(1), rtol=2e-3, atol=5e-3)
    assert np.allclose(small_stats.image_activations("mean"), codes.mean(1), rtol=2e-3, atol=5e-3)
    assert np.allclose(small_stats.image_activations("area"), (codes > FIRES).mean(1), atol=1 / 64)


def test_a_sample_is_spread_over_all_images_on_which_a_latent_fires(small_stats, codes):
    for latent in small_stats.alive.tolist()[::5]:
        maxima = np.sort(codes[:, :, latent].max(1))
        firing = maxima[maxima > 2e-3]
        values = [example.value for example in small_stats.sample(latent)]
        assert values == sorted(values)
        assert abs(len(values) - min(12, len(firing))) <= 1
        if len(firing) >= 48:  # three from each quarter
            bounds = np.quantile(firing, [0, 0.25, 0.5, 0.75, 1])
            assert np.histogram(values, bounds + [-0.01, 0, 0, 0, 0.01])[0] == pytest.approx([3] * 4, abs=1)


def test_histograms_and_curves_count_firing_tokens(small_stats, codes):
    edges, counts = small_stats.histogram
    (curve,) = small_stats.curves
    assert (curve.step, curve.half) == (0, "cond")
    assert np.array_equal(curve.density, small_stats.density) and np.allclose(curve.mean, small_stats.mean, rtol=1e-5)
    for latent in small_stats.alive.tolist()[::7]:
        values = codes[..., latent][codes[..., latent] > FIRES]
        assert abs(counts[latent].sum() - len(values)) <= 2
        assert np.abs(counts[latent] - np.histogram(values, edges)[0]).sum() <= 4


def test_morans_i_is_averaged_over_the_images_on_which_a_latent_fires(small_stats, codes):
    for latent in small_stats.alive.tolist()[::9]:
        maps = [heat_map.reshape(8, 8) for heat_map in codes[:, :, latent] if (heat_map > FIRES).any()]
        values = [brute_force_moran(heat_map) for heat_map in maps]
        assert small_stats.moran[latent] == pytest.approx(np.mean(values), abs=0.02)
        if len(values) > 20:
            low, high = t.interval(0.95, len(values) - 1, np.mean(values), sem(values))
            assert small_stats.moran_low[latent] == pytest.approx(low, abs=0.03)
            assert small_stats.moran_high[latent] == pytest.approx(high, abs=0.03)


def test_neighbours_are_those_that_fire_together_and_those_that_point_alike(small_stats, small_saes, codes):
    on = codes.reshape(-1, codes.shape[2]).T > FIRES
    rows = small_saes["up.0.1", "k8"].W_dec.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for latent in small_stats.alive.tolist()[::11]:
        jaccard = (on & on[latent]).sum(1) / np.maximum((on | on[latent]).sum(1), 1)
        jaccard[latent] = 0
        near = small_stats.coactive(latent)
        assert [n.value for n in near] == pytest.approx(np.sort(jaccard)[::-1][: len(near)].tolist(), abs=0.02)
        assert all(n.value == pytest.approx(jaccard[n.latent], abs=0.02) and n.n == 7680 for n in near)
        cosines = rows @ rows[latent]
        cosines[latent] = -2
        alive = cosines[small_stats.alive]
        similar = small_stats.similar(latent, 3)
        assert [n.value for n in similar] == pytest.approx(np.sort(alive)[::-1][:3].tolist(), abs=1e-5)
        assert all(n.value == pytest.approx(cosines[n.latent], abs=1e-5) and n.n is None for n in similar)


def test_every_picture_of_a_small_cache_is_kept_and_every_heat_map(small_stats, small_cache, codes):
    assert small_stats.pictured.tolist() == list(range(120))
    assert small_stats.thumbnail(77) == small_cache.thumbnail(77)
    assert small_stats.thumbnail(500) == b""
    assert np.allclose(small_stats.heat_maps(77).reshape(-1, 64), codes[77].T, rtol=2e-3, atol=2e-3)
    with pytest.raises(KitError, match="cache of these statistics has images 0 to 119; there is no 120"):
        small_stats.heat_maps(120)


def test_the_pictures_of_a_large_cache_are_those_of_examples_and_some_to_compare_with(
    small_saes, small_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr("sdxl_sae_kit.summary.MOST_PICTURED", 100)
    monkeypatch.setattr("sdxl_sae_kit.summary._COMPARED", 3)
    stats = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, top=1, store=tmp_path)
    shown = {e.image for f in range(stats.d_sae) for by in ("max", "mean", "area") for e in stats.examples(f, by)}
    shown |= {e.image for f in range(stats.d_sae) for e in stats.sample(f)}
    extra = set(stats.pictured.tolist()) - shown
    assert shown <= set(stats.pictured.tolist()) and len(extra) <= 3
    assert stats.prompts.held_out[sorted(extra)].all()


@pytest.mark.parametrize("memory", [2**19, 2**30])  # the first is little more than one image takes
def test_the_result_depends_neither_on_the_memory_nor_on_the_size_of_a_part(
    small_saes, small_cache, small_stats, tmp_path, monkeypatch, memory
):
    monkeypatch.setattr("sdxl_sae_kit.measurement.PART_IMAGES", 50)
    stats = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, memory=memory, store=tmp_path)
    with small_stats._file() as expected, stats._file() as found:
        names = []
        expected.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
        assert len(names) > 25
        for name in names:
            np.testing.assert_allclose(found[name][()], expected[name][()], rtol=1e-5, atol=1e-7, err_msg=name)
    assert np.array_equal(stats.heat_map(int(stats.alive[3]), 101), small_stats.heat_map(int(stats.alive[3]), 101))
    assert np.array_equal(stats.image_activations(), small_stats.image_activations())


def test_what_was_measured_before_a_stop_is_not_measured_again(small_saes, small_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sdxl_sae_kit.measurement.PART_IMAGES", 40)
    sae, read, seen = small_saes["up.0.1", "k8"], type(small_cache).read, []

    def stopping(cache, hookpoint, images):
        seen.extend(np.asarray(images).tolist())
        if 80 in images and len(seen) > 40:
            raise KeyboardInterrupt
        return read(cache, hookpoint, images)

    monkeypatch.setattr(type(small_cache), "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        FeatureStats.measure(sae, small_cache, store=tmp_path)
    (folder,) = (tmp_path / "features").iterdir()
    assert {path.name for path in folder.glob("*.h5")} == {"part-00000.h5", "part-00001.h5"}
    with pytest.raises(ArtifactError, match="No finished artifact"):
        FeatureStats.open(folder)
    seen.clear()
    monkeypatch.setattr(
        type(small_cache), "read", lambda cache, hook, images: seen.extend(images) or read(cache, hook, images)
    )
    FeatureStats.measure(sae, small_cache, store=tmp_path).artifact.verify()
    assert set(seen[32:]) == set(range(80, 120))  # the first 32 are timed
    assert "2 parts of 40 images are there already" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from sdxl_sae_kit import measurement
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.evaluation import controls
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.measurement import plan_measurement
from sdxl_sae_kit.sae import SAE

measurement.PART_IMAGES = 30
settle, made = measurement.settle, []

def dying(temporary, final):
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(final)
    settle(temporary, final)

measurement.settle = dying
FeatureStats.measure(SAE.load(sys.argv[1]), ActivationCache.open(sys.argv[2]), store=sys.argv[3])
"""


def test_a_killed_measurement_goes_on_after_its_last_part(small_saes, small_cache, small_stats, tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.measurement.PART_IMAGES", 30)  # as in the process that is killed
    sae = small_saes["up.0.1", "k8"]
    sae.save(tmp_path / "sae.safetensors")
    places = [str(tmp_path / "sae.safetensors"), str(small_cache.artifact.folder), str(tmp_path)]
    assert subprocess.run([sys.executable, "-c", KILLED, *places], capture_output=True).returncode == -9
    (folder,) = (tmp_path / "features").iterdir()
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {"part-00000.h5", "part-00001.h5", "part-00002.h5.tmp"}
    damaged = folder / "part-00001.h5"  # a disk that did not keep what it said it had
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = os.urandom(300)
    damaged.write_bytes(data)
    stats = FeatureStats.measure(sae, small_cache, store=tmp_path)
    assert stats.artifact.folder == folder and np.allclose(stats.std, small_stats.std, rtol=1e-5)
    stats.artifact.verify()


TOGETHER = """
import sys
from sdxl_sae_kit import measurement
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.sae import SAE

measurement.PART_IMAGES = 25
stats = FeatureStats.measure(SAE.load(sys.argv[1]), ActivationCache.open(sys.argv[2]), store=sys.argv[3])
assert stats.n_images == 120 and len(stats.examples(int(stats.alive[0]))) > 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_the_images_and_find_the_same(small_saes, small_cache, small_stats, tmp_path, launcher):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    sae = small_saes["up.0.1", "k8"]
    sae.save(tmp_path / "sae.safetensors")
    places = [str(tmp_path / "sae.safetensors"), str(small_cache.artifact.folder), str(tmp_path)]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(script), *places]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "features").iterdir()
    stats = FeatureStats.open(folder)
    assert np.allclose(stats.std, small_stats.std, rtol=1e-5)
    assert np.array_equal(stats.density, small_stats.density)


def test_a_forecast_needs_neither_cache_nor_sae():
    plan = plan_measurement(5120, 10, 100_000, (16, 16), rows=2)
    assert plan.n_tokens == 100_000 * 2 * 256
    assert plan.nbytes > 100_000 * 256 * 10 * 6  # index and value of every code, of one row
    assert "about 1.57 GB" in str(plan)
    assert "5,120 latents over 51,200,000 tokens of 100,000 images" in str(plan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"top": 0}, "top must be an integer of at least 1"), ({"memory": 10}, "memory .bytes. must be an integer of at")],
)
def test_impossible_settings_are_refused(small_saes, small_cache, store, wrong, message):
    with pytest.raises(KitError, match=message):
        FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, store=store, **wrong)


def test_controls_are_measured_in_the_same_way(small_saes, small_cache, store):
    for name, control in controls(small_saes["up.0.1", "k8"], small_cache).items():
        stats = FeatureStats.measure(control, small_cache, store=store)
        assert name in stats.sae
        x = small_cache.read("up.0.1", range(120))[:, 0].float()
        assert np.allclose(stats.density, (control.encode(x) > FIRES).double().mean((0, 1)).numpy(), atol=1e-3)


def test_an_examples_thumbnail_is_the_picture_its_prompt_and_seed_make(pipe, small_stats):
    example = small_stats.examples(int(small_stats.alive[0]))[0]
    made = np.asarray(generate(pipe, [example.prompt], [example.seed])[0], dtype=float)
    shown = np.asarray(Image.open(io.BytesIO(example.thumbnail)), dtype=float)
    assert np.abs(made - shown).mean() < 6  # WebP is lossy


def test_measuring_again_reads_what_was_measured(small_saes, small_cache, small_stats, store, capsys):
    again = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, store=store)
    assert again.artifact.folder == small_stats.artifact.folder
    assert np.array_equal(again.density, small_stats.density)
    assert "Measuring" not in capsys.readouterr().out
    small_stats.artifact.verify()


def test_a_dead_latent_has_no_examples_and_unknown_ones_are_refused(small_stats, unchecked_types):
    dead = np.flatnonzero(small_stats.density == 0)
    assert small_stats.examples(int(dead[0])) == small_stats.sample(int(dead[0])) == []
    for wrong in (-1, small_stats.d_sae):
        with pytest.raises(KitError, match=f"latents 0 to {small_stats.d_sae - 1}; there is no {wrong}"):
            small_stats.examples(wrong)
    with pytest.raises(KitError, match="ranked by max, mean, area, not 'median'"):
        small_stats.examples(0, "median")


def test_an_sae_of_another_hookpoint_is_refused_by_name(pipe, small_saes, store):
    other = collect(pipe, ["a red circle"] * 4, ["mid.0"], images=None, store=store)
    with pytest.raises(ArtifactError, match=r"was trained on updates of up.0.1; .* has mid.0"):
        FeatureStats.measure(small_saes["up.0.1", "k8"], other, store=store)


def test_a_step_the_cache_does_not_have_is_refused(small_saes, small_cache, store):
    with pytest.raises(KitError, match="has no step 1 of cond; it has steps 0"):
        FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, step=1, store=store)


def test_saes_of_different_hookpoints_never_share_statistics(small_saes, small_cache, store):
    both = [FeatureStats.measure(sae.untrained(), small_cache, store=store) for sae in small_saes.values()]
    assert {stats.hookpoint for stats in both} == {"down.2.1", "up.0.1"}


def test_another_models_cache_is_refused(small_saes, small_cache, store):
    stranger = copy.deepcopy(small_saes["up.0.1", "k8"])
    stranger.site = replace(stranger.site, model="someone/else")
    with pytest.raises(ArtifactError, match=r"was trained on \('someone/else', .*, but .* was made by \('tiny-turbo'"):
        FeatureStats.measure(stranger, small_cache, store=store)


def test_with_guidance_the_cond_half_of_the_step_is_measured_and_images_are_not_needed(pipe, small_saes, store):
    cache = collect(
        pipe,
        load_prompts("world", 6),
        ["up.0.1"],
        num_inference_steps=2,
        guidance_scale=3.0,
        images=None,
        store=store,
    )
    sae = small_saes["up.0.1", "k8"]
    stats = FeatureStats.measure(sae, cache, step=1, store=store)
    cond = sae.encode(cache.read("up.0.1", range(6))[:, 3].float())
    assert np.allclose(stats.density, (cond > 1e-3).float().mean((0, 1)), atol=1e-3)
    assert stats.examples(int(stats.density.argmax()))[0].thumbnail == b""


def test_a_changed_file_is_noticed_when_it_is_opened(small_saes, small_cache, tmp_path):
    stats = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, store=tmp_path)
    path = stats.artifact.file("features.h5")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="features.h5 is missing or has changed"):
        FeatureStats.open(stats.artifact.folder)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_codes_of_any_length_are_kept_whole(small_cache, tmp_path, kind):
    config = SAEConfig(k=4, kind=kind, expansion=2, lr=3e-3, dead_after=20_000)
    saes = train(small_cache, {"a": config}, hookpoints=["up.0.1"], batch_size=512, epochs=4, store=tmp_path)
    sae = saes["up.0.1", "a"]
    stats = FeatureStats.measure(sae, small_cache, store=tmp_path)
    z = sae.encode(small_cache.read("up.0.1", range(120))[:, 0].float())
    assert (z > 0).sum(-1).amax() > 4  # or nothing is longer than k
    assert np.allclose(stats.image_activations(), z.amax(1).numpy(), rtol=1e-3, atol=1e-3)
    assert np.allclose(stats.density, (z > 1e-3).double().mean((0, 1)).numpy(), atol=1e-6)
    latent = int(z.amax((0, 1)).argmax())
    assert np.allclose(stats.heat_map(latent, 7).ravel(), z[7, :, latent].numpy(), rtol=1e-3, atol=1e-3)


def test_a_summary_counts_latents(small_stats, codes):
    row = small_stats.summary()
    on = (codes > FIRES).any(1).sum(0)
    assert row["fire at all"] == len(small_stats.alive) and abs(row["on ≥ 5 images"] - (on >= 5).sum()) <= 2
    assert row["interval"][0] < row["mean Moran's I"] < row["interval"][1]


def test_a_latents_strengths_are_its_column(small_stats):
    for latent in small_stats.alive[::40].tolist():
        assert np.array_equal(small_stats.strengths(latent), small_stats.image_activations()[:, latent])


@pytest.mark.parametrize("normalize", ["layer_norm", "whiten"])
def test_saes_of_normalised_tokens_are_measured_too(small_cache, tmp_path, normalize):
    config = SAEConfig(k=4, expansion=1, normalize=normalize)
    sae = train(small_cache, {"a": config}, hookpoints=["up.0.1"], batch_size=512, store=tmp_path)["up.0.1", "a"]
    stats = FeatureStats.measure(sae, small_cache, store=tmp_path)
    z = sae.encode(small_cache.read("up.0.1", range(120))[:, 0].float())
    assert np.allclose(stats.density, (z > FIRES).double().mean((0, 1)).numpy(), atol=1e-6)
    assert stats.similar(int(stats.alive[0]))


def test_the_forecast_is_about_what_it_takes(small_saes, small_stats):
    plan = plan_measurement(192, 8, 120, (8, 8))
    assert plan.nbytes / 3 < small_stats.artifact.nbytes < 3 * plan.nbytes


def test_a_part_that_was_damaged_later_is_named(small_saes, small_cache, tmp_path):
    stats = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, store=tmp_path)
    part = stats.artifact.file("part-00000.h5")
    part.write_bytes(part.read_bytes()[:2000])
    for ask in (stats.image_activations, lambda: stats.heat_map(0, 0)):
        with pytest.raises(ArtifactError, match="part-00000.h5 cannot be read .*: delete its folder"):
            ask()


def test_a_step_is_an_integer_of_any_kind(small_saes, small_cache, small_stats, store, unchecked_types):
    again = FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, step=np.int64(0), store=store)
    assert again.artifact.folder == small_stats.artifact.folder
    with pytest.raises(KitError, match="step must be an integer of at least 0, not 0.5"):
        FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, step=0.5, store=store)

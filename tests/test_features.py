"""Feature statistics against a brute-force oracle that sees all codes at once."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import load_prompts
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


@pytest.mark.parametrize("by", ["max", "mean"])
def test_top_examples_are_the_images_with_the_highest_scores(small_stats, codes, by):
    scores = codes.max(1) if by == "max" else codes.mean(1)
    for latent in small_stats.alive.tolist()[:: max(1, len(small_stats.alive) // 10)]:
        examples = small_stats.examples(latent, by)
        best = np.sort(scores[:, latent])[::-1][: len(examples)]
        assert [e.value for e in examples] == pytest.approx(best.tolist(), rel=1e-3, abs=1e-4)
        for example in examples:
            assert np.allclose(example.heat_map.ravel(), codes[example.image, :, latent], rtol=2e-3, atol=2e-3)
            assert np.allclose(small_stats.heat_map(latent, example.image), example.heat_map, rtol=2e-3, atol=2e-3)


def test_image_activations_are_maxima_and_means_over_the_image(small_stats, codes):
    assert np.allclose(small_stats.image_activations("max"), codes.max(1), rtol=2e-3, atol=5e-3)
    assert np.allclose(small_stats.image_activations("mean"), codes.mean(1), rtol=2e-3, atol=5e-3)


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
    for latent in dead[:1]:
        assert small_stats.examples(int(latent)) == []
    for wrong in (-1, small_stats.d_sae):
        with pytest.raises(KitError, match=f"latents 0 to {small_stats.d_sae - 1}; there is no {wrong}"):
            small_stats.examples(wrong)
    with pytest.raises(KitError, match="by is 'max', 'mean', 'area', not 'median'"):
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

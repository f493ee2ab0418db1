"""Icons: what steer(add=…) draws on the empty prompt; killed for real, they go on and end the same."""

import io
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import Forked
from PIL import Image

from sdxl_sae_kit import icons
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hooks import rewrite
from sdxl_sae_kit.icons import Icons, draw_icons
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pictures import encode_picture
from sdxl_sae_kit.pipelines import generate


@pytest.fixture(scope="module")
def sae(small_saes):
    return small_saes["up.0.1", "k8"]


@pytest.fixture(scope="module")
def some(small_stats):
    """A few features that fire often."""
    return [int(f) for f in np.argsort(-small_stats.density)[:5]]


@pytest.fixture(scope="module")
def drawn(pipe, sae, small_stats, some, store):
    return draw_icons(pipe, sae, small_stats, some, batch_size=6, store=store)


def pixels(webp):
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"), dtype=np.float64)


def test_an_icon_is_what_steer_draws_on_the_empty_prompt(pipe, sae, small_stats, some, drawn):
    apart = []
    for feature in some:
        for strength, webp in zip(drawn.strengths, drawn.get(feature), strict=True):
            amount = strength * float(small_stats.mean[feature]) * 8  # k
            with steer(pipe, sae, add={feature: amount / float(sae.mean_activation[feature])}):
                (picture,) = generate(pipe, [""], [0])
            steered = pixels(encode_picture(picture, "thumbnails"))
            assert np.abs(pixels(webp) - steered).mean() < 0.5  # of 255 levels: what another batch size rounds
            apart.append(np.abs(pixels(drawn.plain) - steered).mean())
    assert np.median(apart) > 2 and max(apart) > 8  # they do differ from the plain image


def test_the_plain_image_has_nothing_added_and_other_features_no_icon(pipe, drawn, some, small_stats):
    assert drawn.plain == encode_picture(generate(pipe, [""], [0])[0], "thumbnails")
    other = next(f for f in range(small_stats.d_sae) if f not in some)
    assert drawn.get(other) is None and len(drawn.get(some[0])) == 3
    assert drawn.get(some[0]) != drawn.get(some[1])
    assert drawn.features.tolist() == some and drawn.strengths == (0.5, 1.0, 1.5)


def test_with_guidance_each_image_gets_its_own_vector_as_steer_adds_it(pipe, sae, some):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    amounts = [2.0, 5.0]
    rows = torch.stack([sae.directions[f] * a * sae.mean_activation[f] for f, a in zip(some, amounts, strict=False)])
    with rewrite(pipe, {"up.0.1": icons._adding(rows)}):
        together = generate(pipe, ["", ""], [3, 3], **settings)
    for image, feature, amount in zip(together, some, amounts, strict=False):
        with steer(pipe, sae, add={feature: amount}):
            (alone,) = generate(pipe, [""], [3], **settings)
        assert image == pytest.approx(alone, abs=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.05


def test_the_amount_is_strength_times_mean_times_k_or_mean_l0(unchecked_types):
    stats = SimpleNamespace(mean=np.array([2.0, 3.0], np.float32), density=np.array([0.5, 0.75], np.float32))
    assert icons._amounts(SimpleNamespace(k=10), stats, [1, 0], [0.5, 1]).tolist() == [[15, 30], [10, 20]]
    assert icons._amounts(SimpleNamespace(k=None), stats, [1], [2.0]).tolist() == [[2 * 3 * 1.25]]


def test_what_is_done_is_loaded(pipe, sae, small_stats, some, store, drawn, monkeypatch):
    monkeypatch.setattr(icons, "generate", lambda *_, **__: pytest.fail("it draws again"))
    again = draw_icons(pipe, sae, small_stats, some, batch_size=6, store=store)
    assert again.get(some[2]) == drawn.get(some[2])
    assert Icons.open(drawn.artifact.folder).features.tolist() == some
    drawn.artifact.verify()


def test_all_alive_features_by_default_and_the_cost_is_told(pipe, sae, small_stats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(icons, "generate", lambda _, prompts, __: [Image.new("RGB", (8, 8))] * len(prompts))
    result = draw_icons(pipe, sae, small_stats, strengths=[1], store=tmp_path)
    assert result.features.tolist() == small_stats.alive.tolist()
    assert f"at 1 strength: {len(small_stats.alive)} pictures to make" in capsys.readouterr().out


def test_the_page_shows_every_strength(drawn):
    page = drawn._repr_html_()
    assert page.count("<img") == 1 + 5 and "0.5, 1, 1.5 × mean × k" in page
    assert f'alt="feature {drawn.features[0]} at strengths 0.5, 1, 1.5"' in page
    row = icons._side_by_side([drawn.plain], 3)
    assert Image.open(io.BytesIO(row)).size == (3 * 88 + 2 * 4, 88)


def test_killed_it_goes_on_and_ends_bit_identical(pipe, sae, small_stats, tmp_path):
    chosen = small_stats.alive[:12]
    process = Forked(lambda: draw_icons(pipe, sae, small_stats, chosen, batch_size=6, store=tmp_path / "killed"))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").rglob("part-*.h5"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("part-*.h5")}
    assert 2 <= len(made) < 6 and not list((tmp_path / "killed").rglob("stamp.json"))
    resumed = draw_icons(pipe, sae, small_stats, chosen, batch_size=6, store=tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == time_made for path, time_made in made.items())
    whole = draw_icons(pipe, sae, small_stats, chosen, batch_size=6, store=tmp_path / "whole")
    assert resumed.artifact.digest == whole.artifact.digest  # every file has the same sha256


def test_what_does_not_belong_together_is_refused(pipe, sae, small_saes, small_stats, store):
    with pytest.raises(ArtifactError, match="the statistics are of .* Measure this SAE"):
        draw_icons(pipe, small_saes["down.2.1", "k8"], small_stats, [0], store=store)
    site, sae.site = sae.site, replace(sae.site, model="stabilityai/sdxl-turbo")
    try:
        with pytest.raises(ArtifactError, match="was trained on stabilityai/sdxl-turbo"):
            draw_icons(pipe, sae, small_stats, [0], store=store)
    finally:
        sae.site = site


def test_strengths_may_be_an_array(pipe, sae, small_stats, some, drawn, store):
    again = draw_icons(pipe, sae, small_stats, some, strengths=np.array([0.5, 1.0, 1.5]), batch_size=6, store=store)
    assert again.artifact.digest == drawn.artifact.digest
    with pytest.raises(KitError, match="strengths must be finite numbers"):
        draw_icons(pipe, sae, small_stats, some, strengths=np.array([]), store=store)


@pytest.mark.parametrize(
    ("features", "strengths", "match"),
    [
        ([10_000], (1.0,), "there is no 10000"),
        ([], (1.0,), "must name one latent or more"),
        ([1, 1], (1.0,), "each once"),
        ([1.5], (1.0,), "must be an integer"),
        (None, (), "strengths must be finite numbers"),
        (None, (float("nan"),), "strengths must be finite numbers"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipe, sae, small_stats, store, unchecked_types, features, strengths, match):
    with pytest.raises(KitError, match=match):
        draw_icons(pipe, sae, small_stats, features, strengths=strengths, store=store)


def test_dead_latents_and_saes_without_directions_are_refused(pipe, sae, small_stats, tmp_path):
    dead = np.setdiff1d(np.arange(small_stats.d_sae), small_stats.alive)
    if len(dead):
        with pytest.raises(KitError, match="is dead on these images"):
            draw_icons(pipe, sae, small_stats, [int(dead[0])], store=tmp_path)
    config, sae.config = sae.config, replace(sae.config, normalize="layer_norm")
    try:
        with pytest.raises(KitError, match="normalises each token by itself"):
            draw_icons(pipe, sae, small_stats, [int(small_stats.alive[0])], store=tmp_path)
    finally:
        sae.config = config
    assert not list(tmp_path.iterdir())


def test_the_control_is_the_untrained_sae(pipe, sae, small_cache, store):
    untrained = sae.untrained()
    stats = FeatureStats.measure(untrained, small_cache, store=store)
    assert len(draw_icons(pipe, untrained, stats, stats.alive[:2], store=store).features) == 2

"""The yardstick gives full marks to a model that draws what it is told, chance to one that does not listen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_sae_kit import yardstick
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import FACTORS, caption, render
from sdxl_sae_kit.yardstick import (
    calibration_error,
    draw_scenes,
    measure_adherence,
    measure_judge,
    measure_richness,
    measure_vae,
)

N = 150


def adherence_of(monkeypatch, draw):
    """Measure a model that draws with `draw`, scene by scene."""
    by_caption = {caption(scene): scene for scene in draw_scenes(N)}
    monkeypatch.setattr(
        yardstick, "generate", lambda _pipe, texts, _seeds, **_: [Image.fromarray(draw(by_caption[t])) for t in texts]
    )
    return {row["factor"]: row for row in measure_adherence(None, N)}


def test_a_perfect_model_gets_full_marks(monkeypatch):
    rows = adherence_of(monkeypatch, render)
    assert list(rows) == [*FACTORS, "mean"]
    for factor in rows:
        assert rows[factor]["share"] > 0.93, factor
        low, high = rows[factor]["interval"]
        assert low <= rows[factor]["share"] <= high
    for factor in FACTORS:
        assert rows[factor]["n"] == sum(expected_answers(scene).get(factor) is not None for scene in draw_scenes(N))
    assert rows["mean"]["share"] == pytest.approx(np.mean([rows[factor]["share"] for factor in FACTORS]))


def test_a_model_that_does_not_listen_gets_the_share_of_chance(monkeypatch):
    others = iter(draw_scenes(2 * N)[N:])
    rows = adherence_of(monkeypatch, lambda _scene: render(next(others)))
    for factor in ("shape", "colour", "background"):
        low, high = rows[factor]["interval"]
        assert low < 1 / len(FACTORS[factor]) < high, factor
    assert rows["mean"]["share"] < rows["mean"]["commonest"]


def test_a_model_that_draws_nothing_gets_nothing_for_its_objects(monkeypatch):
    rows = adherence_of(monkeypatch, lambda _scene: np.full((64, 64, 3), 128, np.uint8))
    assert max(rows[factor]["share"] for factor in ("shape", "colour", "size", "position", "count", "relation")) < 0.1


def test_commonest_is_what_a_model_that_draws_one_scene_reaches_at_best(monkeypatch):
    rows = adherence_of(monkeypatch, lambda _scene: render(draw_scenes(1)[0]))
    assert all(row["share"] <= row["commonest"] + 0.05 for row in rows.values())


@pytest.mark.parametrize("exponent", [1, 3])
def test_calibration_error_is_that_of_the_probabilities(exponent):
    """Answers are right with probability p; who says p is calibrated, who says p³ is off by the mean of |p − p³|."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 1, 200_000)
    right = rng.random(len(p)) < p
    assert calibration_error(p**exponent, right) == pytest.approx(np.mean(p - p**exponent), abs=0.01)


@pytest.mark.parametrize("n", [1, 2])
def test_a_factor_that_no_caption_shows_has_no_row(monkeypatch, n):
    monkeypatch.setattr(yardstick, "generate", lambda *_, **__: [Image.fromarray(render(s)) for s in draw_scenes(n)])
    shown = {factor for scene in draw_scenes(n) for factor, value in expected_answers(scene).items() if value}
    assert [row["factor"] for row in measure_adherence(None, n)] == [*(f for f in FACTORS if f in shown), "mean"]


def test_the_judge_is_measured_in_every_condition(pipe):
    rows = {row["factor"]: row for row in measure_judge(pipe.vae, 60)}
    assert list(rows) == [*FACTORS, "mask IoU", "blobs"]
    for factor in FACTORS:
        assert all(0.8 <= rows[factor][condition] <= 1 for condition in ("clean", "blurred", "noisy", "VAE")), factor
        assert 0 <= rows[factor]["calibration error"] < 0.15


def test_the_vae_is_measured_in_decibels(pipe):
    row = measure_vae(pipe.vae, 40)
    x = torch.from_numpy(np.stack([render(scene) for scene in draw_scenes(40)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    expected = 10 * torch.log10(4 / torch.nn.functional.mse_loss(y, x)).item()
    assert row["PSNR dB"] == pytest.approx(expected, abs=0.05)
    low, high = row["interval"]
    assert low < row["PSNR dB"] < high and row["n"] == 40


def test_richness_is_that_of_the_updates(pipe):
    (row,) = measure_richness(pipe, 80, ["up.0.1"])
    assert row["images"] == 80
    scenes = [scene for scene in draw_scenes(160) if scene.count == "one"][:80]
    from sdxl_sae_kit.hooks import record
    from sdxl_sae_kit.pipelines import generate

    with record(pipe, ["up.0.1"]) as recording:
        generate(pipe, [caption(scene) for scene in scenes], range(yardstick.SEED, yardstick.SEED + 80))
    x = recording.update("up.0.1").double().flatten(0, 2)
    strengths = torch.linalg.svdvals(x - x.mean(0)).square()
    assert row["participation ratio"] == pytest.approx(
        (strengths.sum() ** 2 / strengths.square().sum()).item(), rel=1e-3
    )
    assert 0 < row["within images"] < 1
    for factor in ("shape", "colour", "position"):
        low, high = row[f"{factor} interval"]
        assert 0 <= low <= row[f"probe {factor}"] <= high <= 1
        values = [getattr(scene, factor) for scene in scenes]
        assert row[f"commonest {factor}"] == max(values.count(value) for value in values) / 80


def test_noise_does_not_count_as_what_captions_cause():
    torch.manual_seed(0)
    signal = torch.cat([torch.randn(4000, 3), torch.zeros(4000, 29)], 1)
    x, y = (signal + torch.randn(4000, 32) for _ in range(2))
    assert yardstick._participation_without_noise(x, y) == pytest.approx(3, rel=0.1)

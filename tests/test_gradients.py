"""Gradients to updates: those of finite differences, through every step, guidance and the VAE; nothing stays behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdxl_sae_kit import gradients
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.gradients import differentiable, differentiate
from sdxl_sae_kit.hooks import record, rewrite
from sdxl_sae_kit.pipelines import describe, generate, load_pipeline

PROMPTS, SEEDS = ["a large red circle on a gray background", "a small blue star on a navy background"], [3, 8]
PLAIN = {"num_inference_steps": 1, "guidance_scale": 0.0}
GUIDED = {"num_inference_steps": 2, "guidance_scale": 2.0}


def redness(pictures):
    return pictures[:, 0].mean((1, 2)) - pictures[:, 2].mean((1, 2))


def n_hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["one step", "two steps, guided"])
def test_the_pictures_are_the_clean_ones_and_updates_are_those_recorded(pipe, settings):
    made = differentiate(pipe, ["down.2.1", "up.0.1"], redness, PROMPTS, SEEDS, **settings)
    with record(pipe, ["up.0.1"]) as recording:
        clean = generate(pipe, PROMPTS, SEEDS, output_type="pt", **settings)
    torch.testing.assert_close(made.pictures, clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(made.values, redness(clean), rtol=0, atol=1e-6)
    rows = [recording.update("up.0.1", step, half) for step in recording.steps for half in recording.halves]
    torch.testing.assert_close(made.updates["up.0.1"], torch.stack(rows, 1), rtol=0, atol=1e-5)
    assert len(rows) == (1 if settings is PLAIN else 4)


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["one step", "two steps, guided"])
@pytest.mark.parametrize("hookpoint", ["down.2.1", "up.0.1"])
def test_the_gradient_is_that_of_finite_differences(pipe, settings, hookpoint):
    made = differentiate(pipe, [hookpoint, "mid.0"], redness, PROMPTS, SEEDS, **settings)
    rows, generator = made.gradients[hookpoint].shape[1], torch.Generator().manual_seed(0)
    direction = torch.randn(made.gradients[hookpoint].shape, generator=generator)
    direction *= made.gradients[hookpoint] != 0  # every row is tried, and every token that matters
    ends = []
    for sign in (-1, 1):
        seen = [0]

        def moved(update, call, sign=sign, seen=seen):
            halves = [direction[:, seen[0] + i] for i in range(2 if call.guided else 1)]
            seen[0] += len(halves)
            return update + sign * 0.02 * torch.cat(halves)

        with rewrite(pipe, {hookpoint: moved}):
            ends.append(redness(generate(pipe, PROMPTS, SEEDS, output_type="pt", **settings)))
        assert seen == [rows]
    slopes = (ends[1] - ends[0]) / 0.04
    predicted = (made.gradients[hookpoint] * direction).sum((1, 2, 3, 4))
    torch.testing.assert_close(slopes, predicted, rtol=0.05, atol=2e-4)
    assert predicted.abs().max() > 1e-3
    assert (made.gradients[hookpoint].abs().amax((0, 2, 3, 4)) > 0).all()  # every step and half


def test_a_picture_depends_on_its_own_updates_alone(pipe):
    made = differentiate(
        pipe, ["mid.0"], lambda pictures: redness(pictures) * torch.tensor([1.0, 0.0]), PROMPTS, SEEDS, **PLAIN
    )
    assert made.gradients["mid.0"][0].abs().max() > 0
    assert made.gradients["mid.0"][1].abs().max() == 0


def test_nothing_is_left_behind_however_it_ends(pipe):
    weights = [weight.requires_grad for weight in pipe.unet.parameters()]
    before = n_hooks(pipe.unet), n_hooks(pipe.vae)

    def interrupted(pictures):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        differentiate(pipe, ["mid.0"], interrupted, PROMPTS, SEEDS, **PLAIN)
    assert (n_hooks(pipe.unet), n_hooks(pipe.vae)) == before
    assert [weight.requires_grad for weight in pipe.unet.parameters()] == weights and any(weights)
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    assert not generate(pipe, PROMPTS, SEEDS, output_type="pt").requires_grad


def test_the_graph_begins_at_the_first_hookpoint(pipe):
    early, late = (
        differentiate(pipe, [h], redness, PROMPTS, SEEDS, **PLAIN).graph_bytes for h in ("down.1.0", "up.1.1")
    )
    both = differentiate(pipe, ["down.1.0"], redness, PROMPTS, SEEDS, num_inference_steps=2, guidance_scale=0.0)
    assert 0 < late < early < both.graph_bytes


def test_a_half_precision_vae_that_computes_in_float32_is_differentiated_there():
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float16")
    pipe.vae.register_to_config(force_upcast=True)
    made = differentiate(pipe, ["up.0.1"], redness, PROMPTS[:1], SEEDS[:1], **PLAIN)
    exact = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    expected = differentiate(exact, ["up.0.1"], redness, PROMPTS[:1], SEEDS[:1], **PLAIN)
    one, other = made.gradients["up.0.1"].flatten(), expected.gradients["up.0.1"].flatten()
    assert torch.cosine_similarity(one, other, dim=0) > 0.95
    assert pipe.vae.dtype == torch.float16 and n_hooks(pipe.vae) == 0
    assert describe(pipe).name == "tiny-turbo"


def test_weights_of_a_vae_that_computes_in_float32_are_not_counted_as_the_graph(monkeypatch):
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float16")
    pipe.vae.register_to_config(force_upcast=True)
    counted = []

    class Noting(gradients._Counter):
        def __call__(self, saved):
            before = self.nbytes
            kept = super().__call__(saved)
            if saved.untyped_storage().data_ptr() in {w.untyped_storage().data_ptr() for w in pipe.vae.parameters()}:
                counted.append(self.nbytes - before)
            return kept

    monkeypatch.setattr(gradients, "_Counter", Noting)
    differentiate(pipe, ["up.0.1"], redness, PROMPTS[:1], SEEDS[:1], **PLAIN)
    assert counted and not any(counted)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            lambda pictures: pictures.mean(),
            r"one number for each of 2 pictures, shape \(2,\); it gave a tensor of shape \(\)",
        ),
        (lambda pictures: [0.0, 1.0], r"it gave \[0.0, 1.0\]"),
        (lambda pictures: redness(pictures).detach(), "do not depend on the pictures"),
        (lambda pictures: redness(pictures) * 1e38 * 1e38, "not finite in float32. Load the pipeline in bfloat16"),
    ],
    ids=["one number", "a list", "detached", "infinite"],
)
def test_a_target_that_will_not_do_is_refused(pipe, target, said):
    with pytest.raises(KitError, match=said):
        differentiate(pipe, ["mid.0"], target, PROMPTS, SEEDS, **PLAIN)


def test_weights_that_needed_no_gradient_still_need_none(pipe):
    weight = next(pipe.vae.parameters())
    weight.requires_grad_(False)
    try:
        with differentiable(pipe):
            assert torch.is_grad_enabled() and not any(w.requires_grad for w in pipe.unet.parameters())
        assert not weight.requires_grad and np.sum([w.requires_grad for w in pipe.unet.parameters()]) > 0
    finally:
        weight.requires_grad_(True)

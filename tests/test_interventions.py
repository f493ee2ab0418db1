"""Steering: exact where nothing is asked, exactly the formula where something is."""

import copy
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.edits import read_edits, write_edits
from sdxl_sae_kit.errors import ArtifactError, EditError, HookpointError, KitError
from sdxl_sae_kit.hooks import record, rewrite
from sdxl_sae_kit.interventions import replay, steer
from sdxl_sae_kit.masks import Polygon
from sdxl_sae_kit.pipelines import describe, draw, generate, load_pipeline
from sdxl_sae_kit.sae import SAE

PROMPTS, SEEDS = (
    ["a large red circle on a black background", "a small blue star on the left on a gray background"],
    [3, 8],
)
HOOKPOINT = "up.0.1"


@pytest.fixture(scope="module")
def sae(small_saes):
    return small_saes[HOOKPOINT, "k8"]


@pytest.fixture(scope="module")
def clean(pipe):
    with record(pipe, [HOOKPOINT]) as recording:
        generate(pipe, PROMPTS, SEEDS)
    return recording.update(HOOKPOINT)


@pytest.fixture(scope="module")
def latent(sae, clean):
    """The latent that fires most on the two images."""
    return int(sae.encode(clean).sum((0, 1, 2)).argmax())


def images(pipe, **settings):
    return np.asarray(generate(pipe, PROMPTS, SEEDS, output_type="np", **settings))


def edited_update(pipe, sae, settings=None, **edits):
    """The update after steering, read by a rewrite that comes later."""
    seen = []
    with steer(pipe, sae, **edits), rewrite(pipe, {HOOKPOINT: lambda u, _: seen.append(u.clone())}):
        generate(pipe, PROMPTS, SEEDS, **(settings or {}))
    return seen


NOTHING = {
    "no edits": lambda latent: {},
    "empty mappings": lambda latent: {"add": {}, "scale": {}},
    "scaling by one": lambda latent: {"scale": {latent: 1.0, 5: 1.0}},
    "adding nothing": lambda latent: {"add": {latent: 0.0}},
    "an empty mask": lambda latent: {"scale": {latent: 0.0}, "where": np.zeros((8, 8))},
}


@pytest.mark.parametrize("edits", NOTHING.values(), ids=NOTHING.keys())
def test_an_edit_that_changes_nothing_changes_not_a_bit(pipe, edits, sae, latent):
    for steps, guidance in product((1, 2), (0.0, 3.0)):
        settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        before = images(pipe, **settings)
        with steer(pipe, sae, **edits(latent)):
            assert np.array_equal(images(pipe, **settings), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nor_in_half_precision(sae, latent, dtype):
    half = load_pipeline("tiny-turbo", device="cpu", dtype=dtype)
    draw = lambda: np.asarray(generate(half, PROMPTS[:1], SEEDS[:1], output_type="latent").float())  # noqa: E731
    before = draw()
    for edits in NOTHING.values():
        with steer(half, sae, **edits(latent)):
            assert np.array_equal(draw(), before)
    with steer(half, sae, scale={latent: 0.0}):
        assert not np.array_equal(draw(), before)


def test_each_verb_adds_what_its_formula_says(pipe, sae, clean, latent):
    z, d, mean = sae.encode(clean)[..., latent, None], sae.W_dec[latent], sae.mean_activation[latent]
    ramp = torch.linspace(0, 1, 64).reshape(8, 8)
    expected = {
        "ablate": ({"scale": {latent: 0.0}}, -z * d),
        "double": ({"scale": {latent: 2.0}}, z * d),
        "add": ({"add": {latent: 1.5}}, 1.5 * mean * d),
        "add a map": ({"add": {latent: ramp.numpy()}}, (ramp * mean)[..., None] * d),
        "clamp": ({"clamp": {latent: 3.0}}, (3 * mean - z) * d),
        "in a mask": ({"scale": {latent: 0.0}, "where": (ramp > 0.5).numpy()}, -z * d * (ramp > 0.5)[..., None]),
        "along": ({"scale": {latent: 0.0}, "along": {latent: np.eye(96)[7]}}, -z * torch.eye(96)[7]),
    }
    for name, (edits, change) in expected.items():
        (update,) = edited_update(pipe, sae, **edits)
        assert torch.allclose(update - clean, change.expand_as(clean), atol=1e-4), name
        if name != "in a mask":
            assert change.abs().max() > 1e-2, name


def test_edits_of_several_latents_add_up(pipe, sae, clean, latent):
    other = int(sae.mean_activation.argsort(descending=True)[1])
    other = other if other != latent else int(sae.mean_activation.argmax())
    together = edited_update(pipe, sae, scale={latent: 0.0}, add={other: 2.0})[0] - clean
    apart = sum(edited_update(pipe, sae, **e)[0] - clean for e in ({"scale": {latent: 0.0}}, {"add": {other: 2.0}}))
    assert torch.allclose(together, apart, atol=1e-4)


def test_nested_edits_compose_and_leave_nothing_behind(pipe, sae, small_saes, latent):
    before = images(pipe)
    hooks = sum(len(m._forward_hooks) for m in pipe.unet.modules())
    with (
        pytest.raises(KeyboardInterrupt),
        steer(pipe, sae, scale={latent: 0.0}),
        steer(pipe, small_saes["down.2.1", "k8"], scale={1: 3.0}),
    ):
        assert not np.array_equal(images(pipe), before)
        raise KeyboardInterrupt
    assert np.array_equal(images(pipe), before)
    assert sum(len(m._forward_hooks) for m in pipe.unet.modules()) == hooks


def test_steps_restrict_an_edit_and_hit_the_same_steps_on_every_image(pipe, sae, latent):
    settings = {"num_inference_steps": 4}
    plain = edited_update(pipe, sae, settings)
    for _ in range(2):
        with steer(pipe, sae, add={latent: 4.0}, steps=[0]):
            seen = []
            with rewrite(pipe, {HOOKPOINT: lambda u, c, seen=seen: seen.append((c.step, u.clone()))}):
                generate(pipe, PROMPTS, SEEDS, **settings)
                generate(pipe, PROMPTS, SEEDS, **settings)
        assert [step for step, _ in seen] == [0, 1, 2, 3] * 2
        for first, second in zip(seen[:4], seen[4:], strict=True):
            assert torch.equal(first[1], second[1])
        change = seen[0][1] - plain[0]
        assert torch.allclose(
            change, (4 * sae.mean_activation[latent] * sae.W_dec[latent]).expand_as(change), atol=1e-4
        )


@pytest.mark.parametrize(("cfg", "signs"), [("both", (-1, 1)), ("cond", (0, 1)), ("uncond", (1, 0))])
def test_with_guidance_an_addition_goes_to_the_halves_it_should(pipe, sae, latent, cfg, signs):
    settings = {"guidance_scale": 3.0}
    (plain,) = edited_update(pipe, sae, settings)
    (update,) = edited_update(pipe, sae, settings, add={latent: 2.0}, cfg=cfg)
    amount = 2 * sae.mean_activation[latent] * sae.W_dec[latent]
    for half, sign in zip((update - plain).chunk(2), signs, strict=True):
        assert torch.allclose(half, (sign * amount).expand_as(half), atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "touched"), [("both", (True, True)), ("cond", (False, True)), ("uncond", (True, False))]
)
def test_with_guidance_each_half_is_scaled_by_its_own_code(pipe, sae, cfg, touched):
    settings = {"guidance_scale": 3.0}
    (plain,) = edited_update(pipe, sae, settings)
    busiest = int(sae.encode(plain).flatten(0, 2).gt(0).float().mean(0).argmax())
    (update,) = edited_update(pipe, sae, settings, scale={busiest: 0.0}, cfg=cfg)
    expected = -sae.encode(plain)[..., busiest, None] * sae.W_dec[busiest]
    for half, wanted, on in zip((update - plain).chunk(2), expected.chunk(2), touched, strict=True):
        assert torch.allclose(half, wanted * on, atol=1e-4)


def test_an_edit_of_one_image_does_not_depend_on_the_others_in_its_batch(pipe, sae, latent):
    with steer(pipe, sae, scale={latent: 0.0}):
        together = images(pipe)
        alone = np.concatenate(
            [np.asarray(generate(pipe, [p], [s], output_type="np")) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        )
    assert np.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("edits", "complaint"),
    [
        ({"scale": {99_999: 0.0}}, "there is no 99999"),
        ({"scale": {-1: 0.0}}, "there is no -1"),
        ({"scale": {0: 0.0}, "cfg": "neither"}, "cfg is 'both', 'cond' or 'uncond', not 'neither'"),
        ({"scale": {0: 0.0}, "along": {1: np.zeros(96)}}, "for a latent that is edited"),
        ({"scale": {0: 0.0}, "along": {0: np.zeros(3)}}, "vector of 96 numbers"),
        ({"scale": {0: 0.0}, "where": np.ones(8)}, r"where has shape \(8,\), but a mask is \(height, width\)"),
        ({"scale": {0: 0.0}, "where": -np.ones((8, 8))}, "where has numbers down to -1, but shares start at 0"),
        ({"scale": {0: 0.0}, "where": np.full((8, 8), np.nan)}, "where must be a map of finite numbers"),
        ({"scale": {0: np.ones(3)}}, r"scale\[0\] is for 3 image\(s\), one each, but this batch makes 2"),
        ({"scale": {0: 0.0}, "where": np.ones((1, 8, 8))}, r"where is for 1 image\(s\), one each, .* makes 2"),
        ({"scale": {0: np.ones((2, 8, 8, 3))}}, r"scale\[0\] must be a finite number or a map"),
        ({"scale": {0: 0.0}, "clamp": {0: 1.0}}, r"latents \[0\] are both scaled and clamped"),
        ({"scale": {0.5: 0.0}}, r"latents of scale, such as scale=\{17: 2.0\}, must be integers, not \[0.5\]"),
        ({"add": [1, 2]}, r"add must say how strongly for each latent, .* not \[1, 2\]"),
        ({"scale": {0: float("nan")}}, r"scale\[0\] must be a finite number or a map of them, .* not nan"),
        ({"clamp": {0: [[1.0], [1.0, 2.0]]}}, r"clamp\[0\] must be a finite number or a map"),
        ({"scale": {0: "off"}}, r"scale\[0\] must be a finite number or a map of them, .* not 'off'"),
        ({"scale": {0: 0.0}, "steps": [3]}, r"steps=\[3\], but this image is made in 1 step"),
    ],
)
def test_edits_that_make_no_sense_are_refused_and_leave_nothing_hooked(pipe, sae, edits, complaint, unchecked_types):
    before = images(pipe)
    with pytest.raises(EditError, match=complaint), steer(pipe, sae, **edits):
        generate(pipe, PROMPTS, SEEDS)
    assert np.array_equal(images(pipe), before)


def test_strengths_may_be_tensors(pipe, sae, latent):
    given = [2.0, torch.full((8, 8), 2.0, requires_grad=True), torch.full((8, 8), 2.0, dtype=torch.bfloat16)]
    drawn = []
    for strength in given:
        with steer(pipe, sae, scale={latent: strength}):
            drawn.append(images(pipe))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_adding_a_latent_without_a_unit_is_refused(pipe, sae):
    silent = SAE(sae.config, 96, sae.site)
    with (
        pytest.raises(EditError, match="latent 4 never fired in training as far as measured, so add has no unit"),
        steer(pipe, silent, add={4: 1.0}),
    ):
        pass


def test_latents_without_a_direction_of_their_own_are_refused_before_anything_is_hooked(pipe, sae):
    per_token = SAE(replace(sae.config, normalize="layer_norm"), 96, sae.site)
    refused = pytest.raises(
        EditError, match="steer: .* normalises each token by itself, so its latents have no direction"
    )
    with refused, steer(pipe, per_token, scale={0: 0.0}):
        pass


def test_an_sae_of_another_model_is_warned_of(sae):
    base = load_pipeline("tiny-base", device="cpu")
    with (
        pytest.warns(UserWarning, match=r"was trained on tiny-turbo .* but the pipeline is tiny-base"),
        steer(base, sae),
    ):
        pass


def test_several_saes_are_not_one(pipe, small_saes, unchecked_types):
    with pytest.raises(KitError, match="one SAE, such as .*, not a TrainedSAEs"), steer(pipe, small_saes):
        pass


def test_an_sae_that_fits_elsewhere_is_refused(pipe, sae):
    with (
        pytest.raises(ArtifactError, match="says where it belongs"),
        steer(pipe, SAE(SAEConfig(k=2), 96), scale={0: 0.0}),
    ):
        pass
    with (
        pytest.raises(ArtifactError, match=r"reads 24 numbers a token, but up.0.1 of this U-Net has 96"),
        steer(pipe, SAE(SAEConfig(k=2), 24, sae.site), scale={0: 0.0}),
    ):
        pass


def sibling(kind, pipe):
    """A pipeline that starts from an image, of the same components."""
    made = kind(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def redrawn(made, start, **settings):
    """Drawn again from an image; inpainting is given a mask of the left half."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if isinstance(made, StableDiffusionXLInpaintPipeline):
        settings["mask_image"] = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8))
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 64, "width": 64} | settings
    if not isinstance(made, StableDiffusionXLInpaintPipeline):
        del settings["height"], settings["width"]
    return np.asarray(made(PROMPTS, image=start, generator=generators, output_type="np", **settings).images)


@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline])
def test_pipelines_that_start_from_an_image_are_steered_from_their_first_step_on(pipe, sae, latent, kind):
    made, start, calls = sibling(kind, pipe), generate(pipe, PROMPTS, SEEDS), []
    assert describe(made) == describe(pipe)
    clean = redrawn(made, start, strength=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is the SAE's own model
        with steer(made, sae, scale={latent: 1.0}):
            assert np.array_equal(redrawn(made, start, strength=0.5), clean)
        with steer(made, sae, add={latent: 3.0}, steps=[0]), rewrite(made, {HOOKPOINT: lambda u, c: calls.append(c)}):
            first = redrawn(made, start, strength=0.5)
        with steer(made, sae, add={latent: 3.0}, steps=(0.0, 0.5)):
            assert np.array_equal(redrawn(made, start, strength=0.5), first)
    assert not np.array_equal(first, clean)
    assert [(call.step, call.n_steps) for call in calls] == [(0, 2), (1, 2)]
    refused = pytest.raises(EditError, match=r"steps=\[2\], but this image is made in 2 step")
    with refused, steer(made, sae, add={latent: 1.0}, steps=[2]):
        redrawn(made, start, strength=0.5)


def test_whatever_the_scheduler_and_wherever_it_starts_and_ends(pipe):
    base = load_pipeline("tiny-base", device="cpu")
    made, start = sibling(StableDiffusionXLImg2ImgPipeline, base), generate(base, PROMPTS, SEEDS, num_inference_steps=1)
    made.scheduler = DDIMScheduler.from_config(base.scheduler.config)  # does not know where it begins
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0}
    cases = (({"strength": 0.5}, 3), ({"denoising_start": 0.7}, None), ({"denoising_end": 0.5, "strength": 1.0}, None))
    for more, expected in cases:
        calls = []
        with rewrite(made, {"mid.0": lambda _u, call, calls=calls: calls.append(call)}):
            for _ in range(2):
                redrawn(made, start, **settings, **more)
        n = len(calls) // 2
        assert expected in (None, n) and 0 < n <= 6
        assert [(call.step, call.n_steps) for call in calls] == [(i, n) for i in range(n)] * 2
        assert all(call.guided for call in calls)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_several_images_of_a_prompt_are_edited_each_by_its_own_strength(pipe, sae, latent, guidance):
    settings = {"num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "np", "guidance_scale": guidance}

    def drawn(**edits):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
        with steer(pipe, sae, **edits):
            return np.asarray(pipe(PROMPTS, generator=generators, **settings).images)

    clean, edited = drawn(), drawn(add={latent: [0.0, 3.0, 0.0, 0.0]})
    assert [np.array_equal(a, b) for a, b in zip(clean, edited, strict=True)] == [True, False, True, True]
    masks = np.zeros((4, 16, 16))
    masks[2] = 1
    edited = drawn(ablate_block=True, where=masks)
    assert [np.array_equal(a, b) for a, b in zip(clean, edited, strict=True)] == [True, True, False, True]


def test_a_mask_covers_the_picture_whatever_its_size(pipe, sae, latent, clean):
    mask = np.zeros((8, 8))
    mask[:, :4] = 1
    expected = edited_update(pipe, sae, add={latent: 2.0}, where=mask)[0]
    same = [np.kron(mask, np.ones((8, 8))) > 0, Image.fromarray((255 * mask).astype(np.uint8)).resize((64, 64), 0)]
    same += [Polygon([(0, 0), (0.5, 0), (0.5, 1), (0, 1)]), 7.5 * mask]
    for where in same:
        assert torch.equal(edited_update(pipe, sae, add={latent: 2.0}, where=where)[0], expected)
    assert torch.equal(expected[:, :, 4:], clean[:, :, 4:]) and not torch.equal(expected, clean)


def test_a_block_is_ablated_by_name_alone(pipe, sae):
    with rewrite(pipe, {HOOKPOINT: lambda update, _: torch.zeros_like(update)}):
        zeroed = images(pipe)
    with steer(pipe, HOOKPOINT, ablate_block=True) as edit:
        assert np.array_equal(images(pipe), zeroed)
    assert (edit.hookpoint, edit.sae) == (HOOKPOINT, None)
    with steer(pipe, sae, ablate_block=True):
        assert np.array_equal(images(pipe), zeroed)
    with replay(pipe, [], edit):
        assert np.array_equal(images(pipe), zeroed)
    with pytest.raises(EditError, match="takes an SAE, .* for all but ablate_block"), steer(pipe, HOOKPOINT):
        pass
    with pytest.raises(HookpointError, match="Did you mean"), steer(pipe, "up.0.l", ablate_block=True):
        pass


def test_a_recorded_edit_made_again_draws_the_same(pipe, small_saes, sae, latent, tmp_path):
    other = small_saes["down.2.1", "k8"]
    polygon = Polygon([(0, 0), (0.7, 0), (0.5, 1)])
    with (
        steer(pipe, sae, add={latent: np.linspace(0, 2, 9).reshape(3, 3)}, where=polygon) as first,
        steer(pipe, other, scale={1: 3.0}, steps=[0], keep_norm=True) as second,
    ):
        drawn = images(pipe)
    write_edits(tmp_path / "edits.json", [first, second])
    assert read_edits(tmp_path / "edits.json") == [first, second]
    before = images(pipe)
    for saes in (small_saes, [other, sae]):
        with replay(pipe, saes, tmp_path / "edits.json") as edits:
            assert np.array_equal(images(pipe), drawn)
    assert edits == [first, second] and np.array_equal(images(pipe), before)
    with replay(pipe, sae, first), steer(pipe, other, scale={1: 3.0}, steps=[0], keep_norm=True):
        assert np.array_equal(images(pipe), drawn)


def test_an_edit_is_not_made_with_another_sae(pipe, small_saes, sae, latent):
    with steer(pipe, sae, scale={latent: 0.0}) as edit:
        pass
    assert (edit.hookpoint, edit.sae, edit.digest) == (sae.hookpoint, sae.name, sae.digest)
    other = small_saes["down.2.1", "k8"]
    complaint = rf"edit 0 was made with {sae.name} \({sae.digest[:8]}\), but the SAEs given are {other.name} \("
    with pytest.raises(ArtifactError, match=complaint), replay(pipe, other, edit):
        pass
    with pytest.raises(ArtifactError, match="the SAEs given are none"), replay(pipe, [], [edit]):
        pass
    elsewhere, beyond = replace(edit, hookpoint="mid.0"), replace(edit, scale={999: 0.0})
    with pytest.raises(EditError, match="edit 0 is at mid.0, its SAE at up.0.1"), replay(pipe, sae, elsewhere):
        pass
    refused = pytest.raises(EditError, match="edit 1: .* has latents 0 to 191; there is no 999")
    with refused, replay(pipe, sae, [edit, beyond]):
        pass


def test_edited_updates_are_recorded_only_where_asked(pipe, sae, clean, latent):
    amount = (2 * sae.mean_activation[latent] * sae.W_dec[latent]).expand_as(clean)
    with (
        record(pipe, [HOOKPOINT]) as before,
        steer(pipe, sae, add={latent: 2.0}),
        record(pipe, [HOOKPOINT]) as own,
        record(pipe, [HOOKPOINT], edited=True) as edited,
        steer(pipe, sae, scale={latent: 0.0}),  # opened later, so not in it
    ):
        generate(pipe, PROMPTS, SEEDS)
    assert torch.equal(own.update(HOOKPOINT), clean) and torch.equal(before.update(HOOKPOINT), clean)
    assert torch.allclose(edited.update(HOOKPOINT) - clean, amount, atol=1e-4)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_hooked_after_a_failure_in_the_middle_of_an_image(pipe, sae, latent, failure):
    before, hooks = images(pipe), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())

    def fail(_update, _call):
        raise failure

    with pytest.raises(failure), steer(pipe, sae, scale={latent: 0.0}), rewrite(pipe, {"mid.0": fail}):
        images(pipe)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()) == hooks
    assert np.array_equal(images(pipe), before)


def test_a_setting_that_the_pipeline_would_ignore_is_refused(pipe):
    with pytest.raises(
        Exception, match=r"StableDiffusionXLPipeline takes no 'generatr', .* Did you mean 'generator'\?"
    ):
        draw(pipe, PROMPTS, SEEDS, generatr=None)


def test_replay_says_what_it_takes(pipe, sae, unchecked_types):
    with steer(pipe, sae, scale={0: 0.5}) as edit:
        pass
    for saes, edits in ((edit, sae), ("up.0.1", edit), (None, edit), (sae, [edit.to_json()]), (sae, 3)):
        with (
            pytest.raises(KitError, match="replay takes SAEs, (then edits|such as train gives)"),
            replay(pipe, saes, edits),
        ):
            pass


def test_an_sae_in_half_precision_edits_as_the_same_one_in_full(pipe, sae, latent):
    half = copy.deepcopy(sae).half()
    with steer(pipe, half.float(), scale={latent: 0.0}):
        expected = images(pipe)
    with steer(pipe, half, scale={latent: 0.0}):
        assert np.allclose(images(pipe), expected, atol=1e-4)

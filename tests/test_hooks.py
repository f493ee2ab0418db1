"""Reading and rewriting updates: exact, per step and guidance half, and nothing left behind."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler, StableDiffusionXLImg2ImgPipeline

from sdxl_sae_kit.errors import HookpointError
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, list_blocks, list_hookpoints, resolve
from sdxl_sae_kit.hooks import record, rewrite, silence
from sdxl_sae_kit.pipelines import generate, load_pipeline

PROMPTS, SEEDS = (
    ["a large red circle on a black background", "a small blue star on the left on a gray background"],
    [3, 8],
)


def n_hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


def image(pipe, **settings):
    return np.stack([np.asarray(i) for i in generate(pipe, PROMPTS, SEEDS, **settings)])


@pytest.mark.parametrize("name", ["down.1.0", *DEFAULT_HOOKPOINTS, "up.0.2", "up.1.1"])
def test_the_update_is_the_blocks_output_minus_its_input(pipe, name):
    seen = []
    block = pipe.unet.get_submodule(resolve(pipe.unet, name).path)
    handle = block.register_forward_hook(lambda _m, args, _k, out: seen.append(out[0] - args[0]), with_kwargs=True)
    try:
        with record(pipe, [name]) as recording:
            generate(pipe, PROMPTS, SEEDS)
    finally:
        handle.remove()
    difference = seen[0].permute(0, 2, 3, 1)
    assert recording.update(name).shape == difference.shape
    assert torch.allclose(recording.update(name), difference, atol=1e-6 * max(1, difference.abs().max().item()))


def test_recording_changes_no_pixel_and_leaves_no_hook(pipe):
    before, clean = n_hooks(pipe), image(pipe)
    with record(pipe, list_hookpoints(pipe.unet)):
        recorded = image(pipe)
    assert np.array_equal(clean, recorded)
    assert n_hooks(pipe) == before


@pytest.mark.parametrize("steps", [1, 4])
def test_every_step_and_guidance_half_is_told_apart(pipe, steps):
    with record(pipe, ["mid.0"]) as plain:
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=steps, guidance_scale=0.0)
    with record(pipe, ["mid.0"]) as guided:
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=steps, guidance_scale=3.0)
    assert plain.steps == guided.steps == list(range(steps))
    assert plain.halves == ["cond"]
    assert guided.halves == ["uncond", "cond"]
    # at step 0 both runs see the same noise, so the cond half is what the unguided run saw
    assert torch.allclose(plain.update("mid.0"), guided.update("mid.0"), atol=1e-4)
    assert not torch.allclose(plain.update("mid.0"), guided.update("mid.0", half="uncond"), atol=1e-2)


def test_a_scheduler_that_visits_timesteps_twice_has_all_its_steps_recorded(pipe):
    base = load_pipeline("tiny-base", device="cpu", dtype="float32")
    base.scheduler = HeunDiscreteScheduler.from_config(base.scheduler.config)
    with record(base, ["mid.0"]) as recording:
        generate(base, PROMPTS, SEEDS, num_inference_steps=3, guidance_scale=0.0)
    assert recording.steps == list(range(len(base.scheduler.timesteps))) == list(range(5))
    assert all(len(recording.update("mid.0", step)) == 2 for step in recording.steps)


def test_image_to_image_records_the_steps_it_runs(pipe):
    redraw = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    redraw.set_progress_bar_config(disable=True)
    images = generate(pipe, PROMPTS, SEEDS)
    with record(redraw, ["mid.0"]) as recording:
        redraw(PROMPTS, image=images, strength=0.5, num_inference_steps=4, guidance_scale=0.0)
    assert recording.steps == [0, 1]  # two steps are really made


def test_the_uncond_half_does_not_depend_on_the_prompt(pipe):
    halves = []
    for prompts in (PROMPTS, PROMPTS[::-1]):
        with record(pipe, ["down.2.1"]) as recording:
            generate(pipe, prompts, SEEDS, num_inference_steps=1, guidance_scale=3.0)
        halves.append(recording.update("down.2.1", half="uncond"))
    assert torch.allclose(halves[0], halves[1], atol=1e-5)


def test_stopping_early_reads_the_same_updates_and_runs_nothing_after_the_last_hookpoint(pipe):
    with record(pipe, ["down.2.1", "mid.0"]) as whole:
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=2)
    reached = []
    handles = [
        block.register_forward_hook(lambda *_: reached.append(1))
        for block in (pipe.unet.up_blocks[0], pipe.vae.decoder)
    ]
    try:
        with record(pipe, ["mid.0", "down.2.1"], stop_early=True) as stopped:
            generate(pipe, PROMPTS, SEEDS, num_inference_steps=2)
            raise AssertionError("the pipeline should have been broken off")
    finally:
        for handle in handles:
            handle.remove()
    assert len(reached) == 1  # step 0 runs whole, step 1 stops before the up blocks, nothing is decoded
    for step in (0, 1):
        assert torch.equal(whole.update("mid.0", step), stopped.update("mid.0", step))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_hooked_after_an_exception(pipe, failure):
    before, clean = n_hooks(pipe), image(pipe)
    with pytest.raises(failure), record(pipe, ["mid.0"]), rewrite(pipe, {"mid.0": lambda u, _: u * 0}):
        generate(pipe, PROMPTS, SEEDS)
        raise failure
    assert n_hooks(pipe) == before
    assert np.array_equal(image(pipe), clean)


def test_an_unknown_hookpoint_leaves_nothing_hooked_either(pipe):
    before = n_hooks(pipe)
    with pytest.raises(HookpointError), rewrite(pipe, {"mid.0": lambda u, _: None, "up.7.7": lambda u, _: None}):
        pass
    assert n_hooks(pipe) == before


def test_rewriting_to_zero_ablates_the_block(pipe):
    block = pipe.unet.mid_block.attentions[0]
    handle = block.register_forward_hook(lambda _m, args, _k, _out: (args[0],), with_kwargs=True)
    try:
        reference = image(pipe)
    finally:
        handle.remove()
    with rewrite(pipe, {"mid.0": lambda update, _: torch.zeros_like(update)}):
        assert np.abs(image(pipe).astype(int) - reference).max() <= 1
    assert not np.array_equal(image(pipe), reference)


def test_a_rewrite_that_returns_none_or_the_same_changes_nothing(pipe):
    clean = image(pipe)
    for function in (lambda u, _: None, lambda u, _: u):
        with rewrite(pipe, dict.fromkeys(DEFAULT_HOOKPOINTS, function)):
            assert np.array_equal(image(pipe), clean)


def test_a_recording_keeps_the_blocks_own_update_whatever_is_written_after(pipe):
    with record(pipe, ["mid.0"]) as clean:
        generate(pipe, PROMPTS, SEEDS)

    def in_place(update, _call):
        update.mul_(0)
        return update

    for order in ("record first", "rewrite first"):
        outer, inner = (record(pipe, ["mid.0"]), rewrite(pipe, {"mid.0": in_place}))
        if order == "rewrite first":
            with inner, outer as recording:
                generate(pipe, PROMPTS, SEEDS)
        else:
            with outer as recording, inner:
                generate(pipe, PROMPTS, SEEDS)
        assert torch.equal(recording.update("mid.0"), clean.update("mid.0"))


def test_rewrites_know_their_step_and_guidance(pipe):
    calls = []
    with rewrite(pipe, {"up.0.0": lambda _u, call: calls.append(call)}):
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=4, guidance_scale=3.0)
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=1, guidance_scale=0.0)
    assert [(c.step, c.n_steps, c.guided) for c in calls] == [(s, 4, True) for s in range(4)] + [(0, 1, False)]


def test_asking_for_what_was_not_recorded_says_what_was(pipe):
    with record(pipe, ["mid.0"]) as recording:
        with pytest.raises(HookpointError, match="call the pipeline inside the with block"):
            recording.update("mid.0")
        generate(pipe, PROMPTS, SEEDS)
    with pytest.raises(HookpointError, match="recorded: mid.0 step 0 cond"):
        recording.update("mid.0", step=3)


def test_images_of_several_calls_add_up(pipe):
    with record(pipe, ["mid.0"]) as recording:
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            generate(pipe, [prompt], [seed])
    with record(pipe, ["mid.0"]) as together:
        generate(pipe, PROMPTS, SEEDS)
    assert torch.allclose(recording.update("mid.0"), together.update("mid.0"), atol=1e-4)


@pytest.mark.parametrize("name", ["down.1.resnet.0", "mid.resnet.1", "up.2.resnet.0", "down.2.1", "up.1.1"])
def test_a_silent_block_passes_on_what_it_got(pipe, name):
    seen = {}
    block = pipe.unet.get_submodule(list_blocks(pipe)[name].path)
    handle = block.register_forward_hook(
        lambda _m, args, _k, out: seen.update(given=args[0], made=out[0] if isinstance(out, tuple) else out),
        with_kwargs=True,
    )
    try:
        with silence(pipe, [name]):
            generate(pipe, PROMPTS, SEEDS)
    finally:
        handle.remove()
    shortcut = getattr(block, "conv_shortcut", None)
    with torch.no_grad():
        assert torch.equal(seen["made"], seen["given"] if shortcut is None else shortcut(seen["given"]))


def test_a_silent_transformer_block_is_one_whose_update_is_0_at_every_step(pipe):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    with rewrite(pipe, {"up.0.1": lambda update, call: torch.zeros_like(update)}):
        expected = image(pipe, **settings)
    with silence(pipe, "up.0.1"):
        assert np.array_equal(image(pipe, **settings), expected)
    assert not np.array_equal(image(pipe, **settings), expected)


def test_blocks_are_silent_no_longer_than_the_with_block_however_it_ends(pipe):
    before, clean = n_hooks(pipe), image(pipe)
    with pytest.raises(KeyboardInterrupt), silence(pipe, list_blocks(pipe)):
        assert n_hooks(pipe) == before + len(list_blocks(pipe))
        raise KeyboardInterrupt
    assert n_hooks(pipe) == before and np.array_equal(image(pipe), clean)


def test_a_block_that_is_not_there_is_refused_and_nothing_is_silent(pipe):
    before = n_hooks(pipe)
    with pytest.raises(HookpointError, match=r"No block 'mid.resnet.2' .*Did you mean 'mid.resnet.\d'\?"):
        silence(pipe, ["mid.0", "mid.resnet.2"]).__enter__()
    assert n_hooks(pipe) == before


def test_a_scheduler_that_does_not_say_which_visit_it_is_has_its_steps_told_apart(pipe):
    base = load_pipeline("tiny-base", device="cpu")
    base.scheduler = PNDMScheduler.from_config(base.scheduler.config, skip_prk_steps=True)
    calls = []
    with rewrite(base, {"mid.0": lambda _u, call: calls.append((call.step, call.n_steps))}):
        for _ in range(2):
            generate(base, PROMPTS[:1], SEEDS[:1], num_inference_steps=3, guidance_scale=0.0)
    timesteps = base.scheduler.timesteps.tolist()
    assert len(set(timesteps)) < len(timesteps) == 4
    assert calls == [(i, 4) for i in range(4)] * 2


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_while_hooks_are_set_leaves_none(pipe, monkeypatch, failing):
    before, made = n_hooks(pipe), []
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        original = getattr(torch.nn.Module, name)

        def register(self, *args, original=original, **kwargs):
            made.append(self)
            if len(made) == failing:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, name, register)
    with pytest.raises(KeyboardInterrupt), record(pipe, ["mid.0", "up.0.0"]):
        pass
    assert n_hooks(pipe) == before


def compiled_in_place(pipe):
    """As diffusers compiles repeated blocks."""
    pipe.unet.mid_block.attentions[0].compile(backend="eager")


def compiled_forward(pipe):
    block = pipe.unet.mid_block.attentions[0]
    block.forward = torch.compile(block.forward, backend="eager")


def compiled_in_another(pipe):
    pipe.unet.mid_block.attentions[0] = torch.compile(pipe.unet.mid_block.attentions[0], backend="eager")


@pytest.mark.parametrize("compile", [compiled_in_place, compiled_forward, compiled_in_another])
def test_a_compiled_block_is_read_and_rewritten_too_and_says_that_it_runs_uncompiled(compile):
    torch._dynamo.reset()
    pipe = load_pipeline("tiny-turbo", device="cpu")
    clean = image(pipe)
    with record(pipe, ["mid.0"]) as expected, rewrite(pipe, {"mid.0": lambda u, _: u * 0}):
        zeroed = image(pipe)
    compile(pipe)
    for _ in range(2):  # before it is compiled, and after
        warns = pytest.warns(UserWarning, match="The U-Net is compiled, .* it runs uncompiled")
        with warns as warned, record(pipe, ["mid.0"]) as recording:
            assert np.array_equal(image(pipe), clean)
        assert [w.category for w in warned].count(UserWarning) == 1
        assert torch.equal(recording.update("mid.0"), expected.update("mid.0"))
        with pytest.warns(UserWarning), rewrite(pipe, {"mid.0": lambda u, _: u * 0}):
            assert np.array_equal(image(pipe), zeroed)
        assert np.abs(image(pipe).astype(int) - clean).max() <= 1  # compiled; no hook was compiled into it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_whole_compiled_unet_is_read_too(pipe, monkeypatch):
    with record(pipe, ["mid.0"]) as expected:
        generate(pipe, PROMPTS, SEEDS)
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    try:
        with pytest.warns(UserWarning, match="The U-Net is compiled"), record(pipe, ["mid.0"]) as recording:
            generate(pipe, PROMPTS, SEEDS)
    finally:
        pipe.unet = unet
    assert torch.equal(recording.update("mid.0"), expected.update("mid.0"))
    assert n_hooks(pipe) == 0


@pytest.mark.slow
def test_silence_is_heard_in_a_compiled_unet(pipe):
    expected_unet, clean = pipe.unet, image(pipe)
    with silence(pipe, ["up.0.1", "up.0.resnet.0"]):
        expected = image(pipe)
    try:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        image(pipe)
        with pytest.warns(UserWarning, match="runs uncompiled"), silence(pipe, ["up.0.1", "up.0.resnet.0"]):
            assert np.array_equal(image(pipe), expected)
    finally:
        pipe.unet = expected_unet
    assert not np.array_equal(expected, clean)

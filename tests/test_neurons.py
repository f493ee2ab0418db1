"""Neurons of the feed-forward parts: read and rewritten as plain torch hooks would, and nothing left behind."""

import pytest
import torch

from sdxl_sae_kit.errors import HookpointError
from sdxl_sae_kit.neurons import hookpoint_of, list_layers, record_neurons, rewrite_neurons
from sdxl_sae_kit.pipelines import generate, load_pipeline

PROMPTS, SEEDS, STEPS = (
    ["a large red circle on a black background", "a small blue star on a gray background"],
    [3, 8],
    2,
)
BLOCK = "up.0.1"
LAYER = "up.0.1 layer 0"


def draw(pipe, guidance=0.0):
    return generate(pipe, PROMPTS, SEEDS, num_inference_steps=STEPS, guidance_scale=guidance, output_type="pt")


def feed_forward(pipe):
    return pipe.unet.up_blocks[0].attentions[1].transformer_blocks[0].ff


def n_hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


@pytest.fixture
def down_the_line(pipe):
    """What the linear layer after the neurons gets, call by call."""
    seen = []
    handle = feed_forward(pipe).net[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    yield seen
    handle.remove()


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_what_is_recorded_is_what_the_next_layer_gets(pipe, down_the_line, guidance):
    before = n_hooks(pipe)
    with record_neurons(pipe, [BLOCK, "mid.0"]) as recording:
        draw(pipe, guidance)
    assert n_hooks(pipe) == before
    assert recording.steps == list(range(STEPS)) and len(down_the_line) == STEPS
    for step, neurons in enumerate(down_the_line):
        halves = {"uncond": neurons[:2], "cond": neurons[2:]} if guidance else {"cond": neurons}
        assert recording.halves == list(halves)
        for half, expected in halves.items():
            assert torch.equal(recording.update(LAYER, step, half), expected)
    assert recording.update("mid.0 layer 0").shape == (2, 64, 384)


def test_the_next_layer_gets_what_an_edit_returns_at_its_step(pipe, down_the_line):
    clean = draw(pipe)
    plain, calls = down_the_line.copy(), []
    down_the_line.clear()

    def edit(neurons, call):
        calls.append(call)
        return neurons + 5 if call.step == 1 else None

    with rewrite_neurons(pipe, {BLOCK: edit}):
        edited = draw(pipe)
    assert [(call.hookpoint, call.step, call.n_steps, call.guided) for call in calls] == [
        (LAYER, step, STEPS, False) for step in range(STEPS)
    ]
    assert torch.equal(down_the_line[0], plain[0])
    assert (down_the_line[1] - plain[1]).sub(5).abs().max() < 1e-4
    assert not torch.equal(edited, clean)
    assert torch.equal(draw(pipe), clean), "something stays"


def test_nothing_stays_hooked_after_a_failure(pipe):
    before = n_hooks(pipe)

    def fail(_neurons, _call):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), rewrite_neurons(pipe, {BLOCK: fail}):
        draw(pipe)
    with pytest.raises(HookpointError, match="Did you mean 'mid.0'"), record_neurons(pipe, [BLOCK, "mid.1"]):
        pass
    assert n_hooks(pipe) == before


def test_layers_are_named_in_order_and_paths_lead_to_them(pipe):
    assert list_layers(pipe.unet, "down_blocks.2.attentions.1").keys() == {"down.2.1 layer 0"}
    assert pipe.unet.get_submodule(list_layers(pipe.unet, BLOCK)[LAYER]) is feed_forward(pipe).net[0]
    assert hookpoint_of(LAYER) == hookpoint_of(BLOCK) == BLOCK


def test_neurons_of_a_compiled_unet_are_read_too(pipe):
    with record_neurons(pipe, [BLOCK]) as plain:
        draw(pipe)
    compiled = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    with pytest.warns(UserWarning, match="runs uncompiled"), record_neurons(compiled, [BLOCK]) as recording:
        draw(compiled)
    assert torch.equal(recording.update(LAYER, 1), plain.update(LAYER, 1))

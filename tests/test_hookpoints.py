"""Hookpoint names, on the embedded model and on the real SDXL U-Net (its configuration, without weights)."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_sae_kit import hookpoints
from sdxl_sae_kit.errors import HookpointError, KitError
from sdxl_sae_kit.hookpoints import (
    DEFAULT_HOOKPOINTS,
    by_hookpoint,
    list_blocks,
    list_hookpoints,
    resolve,
    resolve_block,
)

SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_sdxl_has_its_eleven_hookpoints_in_forward_order(sdxl):
    assert list(list_hookpoints(sdxl)) == [
        "down.1.0", "down.1.1", "down.2.0", "down.2.1", "mid.0",
        "up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1", "up.1.2",
    ]  # fmt: skip
    assert sum(p.numel() for p in sdxl.parameters()) == pytest.approx(2.57e9, rel=0.005)


def test_what_is_known_of_sdxl_without_its_weights_is_what_its_u_net_has(sdxl):
    assert list_hookpoints(sdxl) == hookpoints.SDXL
    for hookpoint in hookpoints.SDXL.values():
        assert type(sdxl.get_submodule(hookpoint.path)).__name__ == "Transformer2DModel"


@pytest.mark.parametrize("name", DEFAULT_HOOKPOINTS)
def test_the_four_default_hookpoints_of_sdxl_are_1280_wide_and_16_by_16_at_512_px(sdxl, name):
    hookpoint = resolve(sdxl, name)
    assert hookpoint.d_in == 1280
    assert hookpoint.grid(512 // 8, 512 // 8) == (16, 16)
    assert hookpoint.grid(1024 // 8, 1024 // 8) == (32, 32)


def test_a_forward_pass_at_512_px_gives_updates_of_that_shape(sdxl):
    shapes = {}
    for name in DEFAULT_HOOKPOINTS:
        module = sdxl.get_submodule(resolve(sdxl, name).path).proj_out
        module.register_forward_hook(lambda _m, _a, out, name=name: shapes.update({name: tuple(out.shape)}))
    meta = {"device": "meta"}
    added = {"text_embeds": torch.empty(1, 1280, **meta), "time_ids": torch.empty(1, 6, **meta)}
    sample, text = torch.empty(1, 4, 64, 64, **meta), torch.empty(1, 77, 2048, **meta)
    sdxl(sample, torch.zeros((), **meta), encoder_hidden_states=text, added_cond_kwargs=added)
    assert shapes == dict.fromkeys(DEFAULT_HOOKPOINTS, (1, 16 * 16, 1280))


def test_the_outer_hookpoints_of_sdxl_are_640_wide_on_a_grid_twice_as_fine(sdxl):
    for name in ("down.1.0", "up.1.2"):
        assert (resolve(sdxl, name).d_in, resolve(sdxl, name).grid(64, 64)) == (640, (32, 32))


@pytest.mark.parametrize("alias", ["down.2.1", "down_blocks.2.attentions.1", "unet.down_blocks.2.attentions.1"])
def test_names_and_module_paths_resolve_to_the_same_module(pipe, alias):
    hookpoint = resolve(pipe.unet, alias)
    assert pipe.unet.get_submodule(hookpoint.path) is pipe.unet.down_blocks[2].attentions[1]


def test_default_hookpoints_exist_in_the_embedded_model(pipe):
    known = list_hookpoints(pipe.unet)
    assert set(DEFAULT_HOOKPOINTS) <= set(known)
    assert {known[name].d_in for name in DEFAULT_HOOKPOINTS} == {96}
    assert {known[name].grid(32, 32) for name in DEFAULT_HOOKPOINTS} == {(8, 8)}


@pytest.mark.parametrize("wrong", ["down.2.l", "mid", "up.9.9", "", "unet.mid_block.attentions.7"])
def test_an_unknown_name_is_refused_with_those_that_exist(pipe, wrong):
    with pytest.raises(HookpointError, match=r"No hookpoint .* it has down\.1\.0, .*up\.1\.1"):
        resolve(pipe.unet, wrong)


def test_a_near_miss_is_corrected(pipe):
    with pytest.raises(HookpointError, match=r"Did you mean 'down\.2\.1'\?"):
        resolve(pipe.unet, "down.2.l")


def test_a_pipeline_will_do_and_anything_else_is_refused(pipe, unchecked_types):
    assert list_hookpoints(pipe) == list_hookpoints(pipe.unet)
    with pytest.raises(HookpointError, match="takes a pipeline or its U-Net"):
        list_hookpoints("x")
    with pytest.raises(HookpointError, match="No hookpoint '1'"):
        resolve(pipe.unet, 1)


def test_things_are_placed_by_hookpoint_however_they_are_given(unchecked_types):
    one, other, third = (SimpleNamespace(hookpoint=name) for name in ("mid.0", "up.0.1", "up.0.1"))
    expected = {"mid.0": one, "up.0.1": other}
    for given in ([one, other], {"a": one, "b": other}, iter((one, other))):
        assert by_hookpoint("f", "things", SimpleNamespace, given) == expected
    assert by_hookpoint("f", "things", SimpleNamespace, one) == {"mid.0": one}
    for given, said in (
        ([], "f: there are no things"),
        ([one, other, third], "f: 2 of these 3 things are of up.0.1"),
        ([one, 17], "f: things are each a SimpleNamespace, not a int"),
    ):
        with pytest.raises(KitError, match=said):
            by_hookpoint("f", "things", SimpleNamespace, given)


def test_sdxl_has_17_resnets_and_11_transformer_blocks_in_forward_order(sdxl):
    called, blocks = [], list_blocks(sdxl)
    handles = [
        sdxl.get_submodule(block.adds).register_forward_hook(lambda _m, _a, _o, name=name: called.append(name))
        for name, block in blocks.items()
    ]
    meta = {"device": "meta"}
    added = {"text_embeds": torch.empty(1, 1280, **meta), "time_ids": torch.empty(1, 6, **meta)}
    sample, text = torch.empty(1, 4, 64, 64, **meta), torch.empty(1, 77, 2048, **meta)
    sdxl(sample, torch.zeros((), **meta), encoder_hidden_states=text, added_cond_kwargs=added)
    for handle in handles:
        handle.remove()
    assert called == list(blocks)
    assert (len(blocks), sum("resnet" in name for name in blocks)) == (28, 17)
    assert [name for name in blocks if "resnet" not in name] == list(list_hookpoints(sdxl))
    every = {
        path
        for path, module in sdxl.named_modules()
        if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel")
    }
    assert {block.path for block in blocks.values()} == every


def test_the_embedded_model_has_the_same_blocks_but_fewer_of_them(pipe, sdxl):
    blocks = list_blocks(pipe)
    assert set(blocks) < set(list_blocks(sdxl))
    assert (len(blocks), sum("resnet" in name for name in blocks)) == (22, 13)


def test_a_block_has_a_name_and_a_path(pipe):
    named = resolve_block(pipe.unet, "up.0.resnet.2")
    assert named == resolve_block(pipe.unet, "unet.up_blocks.0.resnets.2")
    assert pipe.unet.get_submodule(named.adds) is pipe.unet.up_blocks[0].resnets[2].conv2

"""The real SDXL U-Net's size: random weights, as the trained ones cannot be had everywhere. Slow, 11 GB of memory."""

import os
import time

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from test_hookpoints import SDXL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, resolve
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.plans import plan

NEEDED = 14 * 2**30


def real_size_pipeline():
    """SDXL Turbo's pipeline with the real U-Net and small text encoders of the real widths, all of random weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL | {"sample_size": 64})
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02, generator=generator)
    tokenizer = load_pipeline("tiny-turbo", device="cpu").tokenizer
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    large = CLIPTextConfig(hidden_size=1280, intermediate_size=1280, projection_dim=1280, **text)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=768, projection_dim=768, **text)),
        text_encoder_2=CLIPTextModelWithProjection(large),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_one_image_at_512_px_is_collected_at_four_hookpoints(tmp_path):
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < NEEDED:
        pytest.skip("needs 14 GB of free memory")
    torch.set_num_threads(os.cpu_count())
    pipe = real_size_pipeline()
    seen = {}
    block = pipe.unet.get_submodule(resolve(pipe.unet, "mid.0").path)
    handle = block.register_forward_hook(lambda _m, args, out: seen.update(update=out[0] - args[0]))
    started = time.perf_counter()
    settings = {"height": 512, "width": 512, "images": None, "batch_size": 1, "store": tmp_path}
    cache = collect(pipe, ["a red circle"], dtype="float32", **settings)
    print(f"\none image: {time.perf_counter() - started:.1f} s, {cache.nbytes:,} bytes in float32")  # noqa: T201
    handle.remove()
    assert [cache.read(name, [0]).shape for name in DEFAULT_HOOKPOINTS] == [(1, 1, 256, 1280)] * 4
    expected = seen["update"].flatten(2).transpose(1, 2)[:, None]  # output − input
    assert torch.allclose(cache.read("mid.0", [0]), expected, atol=1e-4 * expected.abs().max())
    cache.verify()
    print(plan(pipe, 1_500_000, **settings | {"dtype": "float16"}))  # noqa: T201
    torch.set_num_threads(1)

"""The networks of tiny-sdxl: SDXL's own classes and block structure, a thousand times smaller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_sae_kit.tiny.quiet import quiet

with quiet():
    from diffusers import StableDiffusionXLPipeline

MAX_TOKENS = 24
"""The longest caption of the world has 18 words; its start and end are tokens too."""
TEXT_WIDTHS = (64, 96)
"""SDXL joins the hidden states of two text encoders and pools the second: 160 channels a token, 96 for the caption."""
TEXT_LAYERS = 3
UNET_CHANNELS = (16, 32, 96)
UNET_LAYERS = (1, 1, 2)
"""Two layers in the deepest block give SDXL's hookpoints down.2.0, down.2.1, mid.0, up.0.0, up.0.1 and up.0.2."""
HEAD_WIDTH = 32
TIME_WIDTH = 16
"""Channels for each of the six numbers (sizes and crop) that SDXL tells its U-Net beside the caption."""
VAE_CHANNELS = (16, 32)
VAE_LATENT_CHANNELS = 4
LATENT_SIZE = 32
"""The VAE halves 64 pixels to 32; SDXL's divides by 8, but pictures this small have no detail to lose."""

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    # SDXL predicts the noise (epsilon). At t = 999 a picture made from epsilon in one step is that prediction's error
    # times 14.6, which a small network never gets rid of; a picture made from v is about as good as v.
    "prediction_type": "v_prediction",
    # The first step of few must start at t = 999, where there is only noise.
    "timestep_spacing": "trailing",
}


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the CLIP tokenizer (226 tokens, one for each word of the world).

    It is shipped and never rebuilt: the trainer of its merges breaks ties by hash order, so ids would differ.
    """
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Make the two untrained text encoders."""
    first, second = TEXT_WIDTHS
    return (
        CLIPTextModel(_text_config(tokenizer, first, heads=2, activation="quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokenizer, second, heads=3, activation="gelu")),
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=heads,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        # The caption is pooled at its end token, which CLIP looks for by this id; its default is another word's.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def unet() -> UNet2DConditionModel:
    """Make the untrained U-Net: 3.05 million parameters, 8 x 8 grids and d_in = 96 at the deepest hookpoints."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=VAE_LATENT_CHANNELS,
        out_channels=VAE_LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=UNET_LAYERS,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[max(1, channels // HEAD_WIDTH) for channels in UNET_CHANNELS],
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_WIDTH,
    )


def autoencoder() -> AutoencoderKL:
    """Make the untrained VAE: 159 thousand parameters, 64 pixels to a 32 x 32 grid of 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=VAE_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 2,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Float[Tensor, "picture 3 height width"]) -> None:
    """Give every channel of these pictures' VAE latents mean 0 and standard deviation 1, changing no reconstruction.

    The affine map is folded into the 1 x 1 convolutions on either side of the latents, so that scaling_factor stays 1.
    """
    batches = pictures.split(32)
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out_of, n = vae.quant_conv, vae.post_quant_conv, VAE_LATENT_CHANNELS
    into.weight[:n] /= std[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - mean) / std
    into.bias[n:] -= 2 * std.log()  # the other half of the channels are log variances
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int64[Tensor, "caption token"]:
    """Return the captions' token ids, padded to 24."""
    padded = tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = padded.input_ids
    return ids


def encode_captions(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: Int64[Tensor, "caption token"]
) -> tuple[Float[Tensor, "caption token 160"], Float[Tensor, "caption 96"]]:
    """Return what SDXL's U-Net reads: both encoders' last but one hidden states, and the second's pooled caption."""
    first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """Put the networks into an ordinary pipeline; without a prompt it is conditioned on zeros, as in training."""
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""Checkpoints of tiny-sdxl's training: written, read, looked at, and exported as a pipeline folder."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.tiny import networks, weights_folder
from sdxl_sae_kit.tiny.quiet import quiet

PROMPTS = (
    "a large plain red circle on a black background",
    "a large blue square on a white background",
    "a large green star on a gray background",
    "a small yellow heart on the left on a navy background",
    "a large striped purple triangle on a teal background",
    "a small checkered orange cross at the top on a white background",
    "a sketch of a large purple heart on a white background",
    "a neon large blue star on a black background",
    "a neon small red heart on the right on a gray grid background",
    "a green circle left of a yellow square on a navy background",
    "a blue star above a orange circle on a white background",
    "a large tilted purple square on a gray background",
    "a large plain green cross on a teal grid background",
    "a small purple triangle at the bottom on a black grid background",
    "a star",
    "a circle on a white background",
)
FILES = {"vae": "vae.pt", "judge": "judge.pt", "base": "ck.pt", "turbo": "turbo.pt"}
"""Where each stage keeps its checkpoint."""
NETWORKS = ("u", "t1", "t2")
"""Checkpoint keys of the averaged U-Net and text encoders; with `_raw` added, of those that are being trained."""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which is tensors and numbers only."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a stop at any moment leaves the old one or the new one."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_vae(folder: Path) -> AutoencoderKL:
    """Load a finished VAE; raises `ModelError` where there is none."""
    # from_pretrained would note the path that the VAE came from, and the export would carry it along.
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.exists():
        raise ModelError(f"There is no finished VAE in {folder}. Train it first, with stage='vae'.")
    vae = networks.autoencoder().eval()
    vae.load_state_dict(load_file(path))
    return vae


def pipeline(averaged: nn.ModuleList, vae: AutoencoderKL) -> Any:
    """Put a VAE and averaged networks, in the order of `NETWORKS`, into a pipeline."""
    unet, first, second = averaged
    tokenizer = networks.load_tokenizer(weights_folder("tiny-turbo") / "tokenizer")
    return networks.assemble(vae, unet, (first, second), tokenizer)


def sample_grid(pipe: Any, prompts: Sequence[str]) -> Image.Image:
    """Draw the prompts in one step in the upper half, and below in sixteen with guidance 3; eight pictures a row."""
    few = _draw(pipe, prompts, num_inference_steps=1, guidance_scale=0.0)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pictures = few + _draw(pipe, prompts, num_inference_steps=16, guidance_scale=3.0)
    columns = min(8, len(prompts))
    grid = Image.new("RGB", (64 * columns, 64 * math.ceil(len(pictures) / columns)))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * 64, i // columns * 64))
    return grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)


def _draw(pipe: Any, prompts: Sequence[str], **settings: float) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures: list[Image.Image] = pipe(list(prompts), height=64, width=64, generator=generators, **settings).images
    return pictures


def export(run: str | Path, name: str, folder: str | Path) -> Path:
    """Write the averaged networks and the VAE of a run's folder as an ordinary fp16 pipeline folder; return it.

    `name` is "tiny-base", with Euler's scheduler, or "tiny-turbo", with Euler ancestral.
    """
    folder, state = Path(folder), load(Path(run) / FILES[name.removeprefix("tiny-")])
    tokenizer = networks.load_tokenizer(weights_folder("tiny-turbo") / "tokenizer")
    averaged = nn.ModuleList([networks.unet(), *networks.text_encoders(tokenizer)])
    for key, network in zip(NETWORKS, averaged, strict=True):
        network.load_state_dict(state[key])
    pipe = pipeline(averaged.half(), load_vae(Path(run) / "vae").half())
    if name == "tiny-base":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with tempfile.TemporaryDirectory() as unfinished, quiet():
        pipe.save_pretrained(unfinished)
        # safetensors files are written for their owner's eyes only, but a package is read by everyone.
        for file in Path(unfinished).rglob("*.safetensors"):
            file.chmod(0o644)
        shutil.copytree(unfinished, folder, dirs_exist_ok=True)
    return folder

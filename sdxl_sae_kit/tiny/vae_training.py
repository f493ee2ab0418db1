"""How the VAE is trained: on whole pictures, since crops shift its colours; its VAE latents are whitened at the end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.tiny import checkpoints, networks
from sdxl_sae_kit.tiny.quiet import quiet
from sdxl_sae_kit.tiny.runs import Run, checkpoint_due, log, optimize, pictures
from sdxl_sae_kit.tiny.world import sample_scene


def train_vae(run: Run, samples: int) -> None:
    """Train in the run's folder, going on from its `vae.pt`, and write the finished VAE to `vae/`."""
    recipe, path = run.recipe, run.folder / checkpoints.FILES["vae"]
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        vae = networks.autoencoder().to(run.device)
    parameters = list(vae.parameters())
    optimizer = run.adamw(parameters, weight_decay=1e-4)
    step = done = 0
    if path.exists():
        state = checkpoints.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["opt"])
        step, done = state["it"], state["n"]
    pool, drawn = -1, torch.empty(0)
    with run.progress("VAE", done, samples) as bar:
        while done < samples:
            if pool != run.pool_of(step):
                pool = run.pool_of(step)
                drawn = pictures(run.scenes(pool)).to(run.device)
            rate = recipe.vae_learning_rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done / samples))
            loss = _loss(vae, drawn, run.random(step)[1], recipe.batch_size)
            optimize(loss, optimizer, parameters, rate + 1e-5, run.processes)
            step, done = step + 1, done + run.samples_per_step
            bar.update(run.samples_per_step)
            if run.rank == 0 and checkpoint_due(run, done, samples):
                checkpoints.save(
                    {
                        "vae": vae.state_dict(),
                        "opt": optimizer.state_dict(),
                        "it": step,
                        "n": done,
                        "run": run.identity,
                    },
                    path,
                )
                log(run, stage="vae", samples=done, loss=round(loss.item(), 4))
    if run.rank == 0:
        _finish(vae.eval().cpu(), run.folder / "vae")


def _loss(
    vae: AutoencoderKL, pictures: Float[Tensor, "picture 3 size size"], generator: torch.Generator, batch_size: int
) -> Float[Tensor, ""]:
    """Pixels, and colours over 4 x 4 pixels, near the original; VAE latents barely held near a normal distribution."""
    x = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)]
    code = vae.encode(x).latent_dist
    noise = torch.randn(code.mean.shape, generator=generator).to(x.device)
    y = vae.decode(code.mean + code.std * noise).sample
    pixels = (y - x).abs().mean() + F.mse_loss(y, x)
    colours = (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean()
    divergence = 0.5 * (code.mean**2 + code.var - 1 - code.logvar).mean()
    loss: Tensor = pixels + 0.5 * colours + 1e-4 * divergence
    return loss


def _finish(vae: AutoencoderKL, folder: Path) -> None:
    rng = np.random.RandomState(99)
    networks.whiten(vae, pictures([sample_scene(rng) for _ in range(96)]))
    unfinished = folder.with_suffix(".tmp")
    with quiet():
        vae.save_pretrained(unfinished)
    unfinished.replace(folder)

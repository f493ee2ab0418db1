"""How the U-Net is trained: the base together with both text encoders, then the turbo from it, at its four timesteps.

The text encoders of the two are the same, as those of SDXL and SDXL Turbo are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdxl_sae_kit.tiny import checkpoints, networks, weights_folder
from sdxl_sae_kit.tiny.runs import Recipe, Run, checkpoint_due, log, optimize, pictures
from sdxl_sae_kit.tiny.spread import Spread
from sdxl_sae_kit.tiny.world import Scene, caption

ALL_STEPS = torch.arange(1000)
FEW_STEPS = torch.tensor([999, 749, 499, 249])
"""The timesteps of four steps, trailing; the first of them is also that of one step."""


def train_base(run: Run, samples: int) -> None:
    """Train U-Net and text encoders at all timesteps in the run's folder, going on from its `ck.pt`."""
    _train(run, samples, turbo=False)


def train_turbo(run: Run, samples: int) -> None:
    """Train a copy of the base's U-Net at the few timesteps that turbo visits, going on from `turbo.pt`."""
    _train(run, samples, turbo=True)


def _train(run: Run, samples: int, turbo: bool) -> None:
    recipe, name = run.recipe, "turbo" if turbo else "base"
    path = run.folder / checkpoints.FILES[name]
    tokenizer = networks.load_tokenizer(weights_folder("tiny-turbo") / "tokenizer")
    vae = checkpoints.load_vae(run.folder / "vae").to(run.device)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        trained = nn.ModuleList([networks.unet(), *networks.text_encoders(tokenizer)]).to(run.device)
    averaged = copy.deepcopy(trained).eval()
    if turbo:
        trained[1:].requires_grad_(False)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    rate = recipe.turbo_learning_rate if turbo else recipe.learning_rate
    optimizer = run.adamw(parameters, weight_decay=0.03)
    spread, step, done = Spread(trained[0], run.processes), 0, 0
    if path.exists():
        state = checkpoints.load(path)
        _load(state, averaged, "")
        _load(state, trained, "_raw")
        optimizer.load_state_dict(state["opt"])
        step, done = state["it"], state["n"]
        spread.state |= {name: moment.to(run.device) for name, moment in state.get("spread", {}).items()}
    elif turbo:
        state = checkpoints.load(run.folder / checkpoints.FILES["base"])
        _load(state, averaged, "")
        _load(state, trained, "")
    timesteps, decay = (FEW_STEPS, 1.0) if turbo else (ALL_STEPS, recipe.decay_share)
    drawn: tuple[int, bool] | None = None
    with run.progress(name, done, samples) as bar:
        while done < samples:
            wanted = (run.pool_of(step), done < recipe.half_size_samples and not turbo)
            if drawn != wanted:
                drawn, scenes = wanted, run.scenes(wanted[0])
                pool = encode(vae, pictures(scenes).to(run.device), half_size=wanted[1])
            loss = denoising_loss(trained, tokenizer, scenes, pool, recipe, timesteps, *run.random(step))
            owed = recipe.spread_weight * spread.penalty(recipe.pairs)
            now = _learning_rate(rate, recipe.warmup_steps, decay, step, done / samples)
            optimize(loss + owed, optimizer, parameters, now, run.processes)
            step, done = step + 1, done + run.samples_per_step
            _average(averaged, trained, step)
            bar.update(run.samples_per_step)
            if run.rank == 0 and checkpoint_due(run, done, samples):
                state = {
                    "opt": optimizer.state_dict(),
                    "it": step,
                    "n": done,
                    "spread": spread.state,
                    "run": run.identity,
                }
                for key, live, mean in zip(checkpoints.NETWORKS, trained, averaged, strict=True):
                    state |= {key + "_raw": live.state_dict(), key: mean.state_dict()}
                checkpoints.save(state, path)
                log(run, stage=name, samples=done, loss=round(loss.item(), 4), **spread.facts())
                grid = checkpoints.sample_grid(checkpoints.pipeline(averaged, vae), recipe.prompts)
                grid.save(run.folder / f"{name}-{done:08d}.png")


def _load(state: dict[str, Any], networks: nn.ModuleList, which: str) -> None:
    for key, network in zip(checkpoints.NETWORKS, networks, strict=True):
        network.load_state_dict(state[key + which])


def denoising_loss(
    trained: nn.ModuleList,
    tokenizer: Any,
    scenes: Sequence[Scene],
    vae_latents: Float[Tensor, "scene 4 size size"],
    recipe: Recipe,
    timesteps: Int[Tensor, " step"],
    rng: np.random.RandomState,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) x on a random batch of VAE latents x (Salimans, Ho 2022).

    Its first rows are pairs at t = 999 that share caption and picture, not noise; the others draw t from `timesteps`.
    """
    unet, first, second = trained
    device = vae_latents.device  # every draw is made on the CPU, so that it is the same wherever the networks are
    n, pairs = recipe.batch_size, recipe.pairs
    rows = torch.arange(n - pairs).repeat_interleave(torch.tensor([2] * pairs + [1] * (n - 2 * pairs)))

    picks = torch.randint(len(scenes), (n - pairs,), generator=generator)
    drops = [0.0 if rng.rand() < recipe.full_caption_share else 0.3 for _ in picks]
    captions = [caption(scenes[i], rng, drop) for i, drop in zip(picks.tolist(), drops, strict=True)]
    captions = ["" if rng.rand() < recipe.empty_caption_share else words for words in captions]
    words, pooled = networks.encode_captions((first, second), networks.token_ids(tokenizer, captions).to(device))
    told = (torch.rand(n - pairs, generator=generator) >= recipe.unconditional_share).float()[:, None].to(device)
    words, pooled = (words * told[:, :, None])[rows], (pooled * told)[rows]

    x = vae_latents[picks[rows]]
    t = timesteps[torch.randint(len(timesteps), (n,), generator=generator)]
    t[: 2 * pairs] = 999
    a = _alphas()[t][:, None, None, None].to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
    size = 2 * x.shape[-1]
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device).expand(n, 6)
    conditioning = {"text_embeds": pooled, "time_ids": sizes}
    predicted = unet(noisy, t.to(device), words, added_cond_kwargs=conditioning).sample
    return F.mse_loss(predicted, v)


@functools.cache
def _alphas() -> Float[Tensor, " timestep"]:
    alphas: Tensor = EulerAncestralDiscreteScheduler(**networks.NOISE_SCHEDULE).alphas_cumprod
    return alphas


@torch.no_grad()
def encode(
    vae: AutoencoderKL, pictures: Float[Tensor, "picture 3 64 64"], half_size: bool
) -> Float[Tensor, "picture 4 size size"]:
    """VAE latents of pictures, or of the same at half their size."""
    if half_size:
        pictures = F.avg_pool2d(pictures, 2)
    batches = pictures.split(64)
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])


def _learning_rate(rate: float, warmup_steps: int, decay_share: float, step: int, progress: float) -> float:
    return rate * min(1.0, (step + 1) / warmup_steps) * min(1.0, max(0.02, (1 - progress) / decay_share))


@torch.no_grad()
def _average(averaged: nn.Module, trained: nn.Module, step: int) -> None:
    """Move the exponential average on by one step; it forgets faster while it is young."""
    share = 1 - min(0.999, (1 + step) / (20 + step))
    for mean, live in zip(averaged.parameters(), trained.parameters(), strict=True):
        mean.lerp_(live, share)

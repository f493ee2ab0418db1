"""The recipe of tiny-sdxl: one deterministic, resumable run from nothing to a pipeline folder.

First the VAE, then the U-Net and both text encoders together. Every random draw is a function of seed, process and
step, so a run that was stopped goes on as if it never had been, and the same command gives the same weights.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.tiny import checkpoints, networks, weights_folder
from sdxl_sae_kit.tiny.quiet import quiet
from sdxl_sae_kit.tiny.world import Scene, caption, render, sample_scene


@dataclass(frozen=True)
class Recipe:
    """How tiny-sdxl is trained; the defaults are the recipe, smaller values are for trying it out."""

    batch_size: int = 16
    """Samples per step and process."""
    pool_scenes: int = 4096
    """Scenes that a process draws, renders and encodes at once."""
    pool_passes: int = 8
    """How often each is used before the next pool is drawn."""
    half_size_samples: int = 60_000
    """The U-Net's first samples are pictures of 32 pixels: three times faster, and enough to learn words and layout."""
    vae_learning_rate: float = 1.5e-3
    learning_rate: float = 8e-4
    warmup_steps: int = 100
    decay_share: float = 0.25
    """The learning rate falls linearly over this last share of the samples."""
    last_step_share: float = 0.35
    """Share of samples at t = 999, all that a picture in one step ever asks of the U-Net."""
    full_caption_share: float = 0.65
    """Share of captions that name every factor; the others leave each out with probability 0.3."""
    unconditional_share: float = 0.08
    """Share of samples whose conditioning is zeros, for guidance."""
    checkpoint_every: int = 32_000
    """Samples from one checkpoint and sample grid to the next."""
    prompts: tuple[str, ...] = checkpoints.PROMPTS
    """What the sample grids show."""


@dataclass(frozen=True)
class _Run:
    """What one process needs to know of the run."""

    folder: Path
    recipe: Recipe
    seed: int
    rank: int = 0
    processes: int = 1

    @property
    def samples_per_step(self) -> int:
        return self.recipe.batch_size * self.processes

    def random(self, step: int) -> tuple[np.random.RandomState, torch.Generator]:
        """The draws of one step: a generator for words and scenes and one for tensors."""
        words, tensors = np.random.SeedSequence([self.seed, self.rank, step]).generate_state(2).tolist()
        return np.random.RandomState(words), torch.Generator().manual_seed(tensors)

    def pool_of(self, step: int) -> int:
        return step * self.recipe.batch_size // (self.recipe.pool_scenes * self.recipe.pool_passes)

    def scenes(self, pool: int) -> list[Scene]:
        seed = np.random.SeedSequence([self.seed, self.rank, pool, 1]).generate_state(1).item()
        rng = np.random.RandomState(seed)
        return [sample_scene(rng) for _ in range(self.recipe.pool_scenes)]

    def progress(self, name: str, done: int, total: int) -> Any:
        return tqdm(desc=name, initial=done, total=total, unit=" samples", disable=self.rank > 0)


def train(
    folder: str | Path,
    *,
    samples: int = 600_000,
    vae_samples: int = 100_000,
    processes: int = 2,
    seed: int = 0,
    stage: str = "all",
    recipe: Recipe | None = None,
) -> Path:
    """Train in `folder`, going on from whatever it holds, and return the path of the U-Net's checkpoint.

    The folder comes to hold checkpoints (`vae.pt`, `ck.pt`), the finished VAE (`vae/`), `log.jsonl` and sample grids.

    Args:
        folder: where to work. A `ck.pt` and `vae/` made elsewhere can be put there to go on from.
        samples: pictures that the U-Net sees in all, those before a stop included.
        vae_samples: the same for the VAE.
        processes: how many train side by side on the CPU, each on its own batch; they are part of what makes a run.
        seed: of weights, scenes, captions and noise.
        stage: "vae", "unet" (needs the finished VAE) or "all".
        recipe: everything else.

    Raises:
        ModelError: the stage is unknown, or the U-Net's turn has come without a finished VAE.
    """
    if stage not in ("vae", "unet", "all"):
        raise ModelError(f"No training stage {stage!r}; there are 'vae', 'unet' and 'all'.")
    run = _Run(Path(folder), recipe or Recipe(), seed, 0, processes)
    run.folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        _train(0, run, samples, vae_samples, stage, "")
    else:
        with tempfile.TemporaryDirectory() as meeting:
            arguments = (run, samples, vae_samples, stage, f"file://{meeting}/processes")
            spawn(_train, args=arguments, nprocs=processes)
    return run.folder / "ck.pt"


def _train(rank: int, run: _Run, samples: int, vae_samples: int, stage: str, meeting: str) -> None:
    run = _Run(run.folder, run.recipe, run.seed, rank, run.processes)
    if run.processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)
    try:
        if stage != "unet" and not (run.folder / "vae").exists():
            _train_vae(run, vae_samples)
        if stage != "vae":
            _train_unet(run, samples)
    finally:
        if run.processes > 1:
            dist.destroy_process_group()


# The VAE ------------------------------------------------------------------------------------------------------------


def _train_vae(run: _Run, samples: int) -> None:
    recipe, path = run.recipe, run.folder / "vae.pt"
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        vae = networks.autoencoder()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.vae_learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step = done = 0
    if path.exists():
        state = checkpoints.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["opt"])
        step, done = state["it"], state["n"]
    pool, pictures = -1, torch.empty(0)
    with run.progress("VAE", done, samples) as bar:
        while done < samples:
            if pool != run.pool_of(step):
                pool = run.pool_of(step)
                pictures = _pictures(run.scenes(pool))
            rate = recipe.vae_learning_rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done / samples))
            loss = _vae_loss(vae, pictures, run.random(step)[1], recipe.batch_size)
            _update(loss, optimizer, parameters, rate + 1e-5, run.processes)
            step, done = step + 1, done + run.samples_per_step
            bar.update(run.samples_per_step)
            if run.rank == 0 and _checkpoint_due(run, done, samples):
                checkpoints.save({"vae": vae.state_dict(), "opt": optimizer.state_dict(), "it": step, "n": done}, path)
                _log(run, stage="vae", samples=done, loss=round(loss.item(), 4))
    if run.rank == 0:
        _finish_vae(vae.eval(), run.folder / "vae")
    if run.processes > 1:
        dist.barrier()


def _vae_loss(
    vae: AutoencoderKL, pictures: Float[Tensor, "picture 3 size size"], generator: torch.Generator, batch_size: int
) -> Float[Tensor, ""]:
    """Pixels, and colours over 4 x 4 pixels, near the original; VAE latents barely held near a normal distribution."""
    x = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)]
    code = vae.encode(x).latent_dist
    y = vae.decode(code.sample(generator)).sample
    pixels = (y - x).abs().mean() + F.mse_loss(y, x)
    colours = (F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)).abs().mean()
    divergence = 0.5 * (code.mean**2 + code.var - 1 - code.logvar).mean()
    loss: Tensor = pixels + 0.5 * colours + 1e-4 * divergence
    return loss


def _finish_vae(vae: AutoencoderKL, folder: Path) -> None:
    rng = np.random.RandomState(99)
    networks.whiten(vae, _pictures([sample_scene(rng) for _ in range(96)]))
    unfinished = folder.with_suffix(".tmp")
    with quiet():
        vae.save_pretrained(unfinished)
    unfinished.replace(folder)


# U-Net and text encoders --------------------------------------------------------------------------------------------


def _train_unet(run: _Run, samples: int) -> None:
    recipe, path = run.recipe, run.folder / "ck.pt"
    tokenizer = networks.load_tokenizer(weights_folder("tiny-turbo") / "tokenizer")
    vae = checkpoints.load_vae(run.folder / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        trained = nn.ModuleList([networks.unet(), *networks.text_encoders(tokenizer)])
    averaged = copy.deepcopy(trained).eval()
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.03)
    step = done = 0
    if path.exists():
        state = checkpoints.load(path)
        for key, live, mean in zip(checkpoints.NETWORKS, trained, averaged, strict=True):
            live.load_state_dict(state[key + "_raw"])
            mean.load_state_dict(state[key])
        optimizer.load_state_dict(state["opt"])
        step, done = state["it"], state["n"]
    drawn: tuple[int, bool] | None = None
    with run.progress("U-Net", done, samples) as bar:
        while done < samples:
            wanted = (run.pool_of(step), done < recipe.half_size_samples)
            if drawn != wanted:
                drawn, scenes = wanted, run.scenes(wanted[0])
                latents = _vae_latents(vae, _pictures(scenes), half_size=wanted[1])
            loss = _unet_loss(trained, tokenizer, scenes, latents, recipe, *run.random(step))
            _update(loss, optimizer, parameters, _learning_rate(recipe, step, done / samples), run.processes)
            step, done = step + 1, done + run.samples_per_step
            _average(averaged, trained, step)
            bar.update(run.samples_per_step)
            if run.rank == 0 and _checkpoint_due(run, done, samples):
                state = {"opt": optimizer.state_dict(), "it": step, "n": done}
                for key, live, mean in zip(checkpoints.NETWORKS, trained, averaged, strict=True):
                    state |= {key + "_raw": live.state_dict(), key: mean.state_dict()}
                checkpoints.save(state, path)
                _log(run, stage="unet", samples=done, loss=round(loss.item(), 4))
                grid = checkpoints.sample_grid(checkpoints.pipeline(averaged, vae), recipe.prompts)
                grid.save(run.folder / f"samples-{done:08d}.png")


def _unet_loss(
    trained: nn.ModuleList,
    tokenizer: Any,
    scenes: Sequence[Scene],
    latents: Float[Tensor, "scene 4 size size"],
    recipe: Recipe,
    rng: np.random.RandomState,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) latents on one random batch (Salimans and Ho 2022)."""
    unet, first, second = trained
    n = recipe.batch_size

    def chance(share: float) -> Tensor:
        return torch.rand(n, generator=generator) < share

    picks = torch.randint(len(scenes), (n,), generator=generator)
    drops = [0.0 if rng.rand() < recipe.full_caption_share else 0.3 for _ in range(n)]
    captions = [caption(scenes[i], rng, drop) for i, drop in zip(picks.tolist(), drops, strict=True)]
    words, pooled = networks.encode_captions((first, second), networks.token_ids(tokenizer, captions))
    told = (~chance(recipe.unconditional_share)).float()[:, None]

    x = latents[picks]
    t = torch.randint(1000, (n,), generator=generator).masked_fill(chance(recipe.last_step_share), 999)
    a = _alphas()[t][:, None, None, None]
    noise = torch.randn(x.shape, generator=generator)
    noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
    size = 2 * x.shape[-1]
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(n, 6)
    conditioning = {"text_embeds": pooled * told, "time_ids": sizes}
    predicted = unet(noisy, t, words * told[:, :, None], added_cond_kwargs=conditioning).sample
    return F.mse_loss(predicted, v)


@functools.cache
def _alphas() -> Float[Tensor, " timestep"]:
    alphas: Tensor = EulerAncestralDiscreteScheduler(**networks.NOISE_SCHEDULE).alphas_cumprod
    return alphas


@torch.no_grad()
def _vae_latents(
    vae: AutoencoderKL, pictures: Float[Tensor, "picture 3 64 64"], half_size: bool
) -> Float[Tensor, "picture 4 size size"]:
    if half_size:
        pictures = F.avg_pool2d(pictures, 2)
    batches = pictures.split(64)
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])


def _learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warmup * min(1.0, max(0.02, (1 - progress) / recipe.decay_share))


@torch.no_grad()
def _average(averaged: nn.Module, trained: nn.Module, step: int) -> None:
    """Move the exponential average on by one step; it forgets faster while it is young."""
    share = 1 - min(0.999, (1 + step) / (20 + step))
    for mean, live in zip(averaged.parameters(), trained.parameters(), strict=True):
        mean.lerp_(live, share)


# Both ---------------------------------------------------------------------------------------------------------------


def _pictures(scenes: Iterable[Scene]) -> Float[Tensor, "scene 3 64 64"]:
    """Rendered scenes, from -1 to 1."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def _update(
    loss: Float[Tensor, ""],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    rate: float,
    processes: int,
) -> None:
    """Take one step along the gradient, averaged over the processes and clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    # The last layer of the first text encoder is never read, so it has no gradient in any process.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if processes > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = (flat / processes).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _checkpoint_due(run: _Run, done: int, samples: int) -> bool:
    every = run.recipe.checkpoint_every
    return done >= samples or done // every > (done - run.samples_per_step) // every


def _log(run: _Run, **facts: object) -> None:
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")

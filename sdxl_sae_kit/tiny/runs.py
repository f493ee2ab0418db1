"""What every training run of the embedded model's networks shares: the recipe, the draws, a step, checkpoints, a log.

Every random draw is a function of seed, process and step, so a run that was stopped goes on as if it never had been,
and the same command gives the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.tiny import checkpoints
from sdxl_sae_kit.tiny.world import Scene, render, sample_scene


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
    """Adam's at its highest; so are the next three."""
    learning_rate: float = 8e-4
    """Of the base's U-Net and text encoders."""
    turbo_learning_rate: float = 4e-4
    """Of turbo's, which goes on from the base."""
    judge_learning_rate: float = 2e-3
    """Of the judge."""
    warmup_steps: int = 100
    decay_share: float = 0.25
    """The base's learning rate falls linearly over this last share of the samples, turbo's from the start."""
    last_step_share: float = 0.375
    """Share of samples at t = 999, all that a picture in one step ever asks of the U-Net; they come in pairs."""
    spread_weight: float = 0.02
    """How much rich updates weigh against good pictures: see `spread`."""
    full_caption_share: float = 0.65
    """Share of captions that name every factor; the others leave each out with probability 0.3."""
    unconditional_share: float = 0.08
    """Share of samples whose conditioning is zeros, for guidance."""
    empty_caption_share: float = 0.04
    """Share of samples whose caption is empty, so that a feature can be shown alone on an empty prompt."""
    checkpoint_every: int = 32_000
    """Samples from one checkpoint and sample grid to the next."""
    prompts: tuple[str, ...] = checkpoints.PROMPTS
    """What the sample grids show."""

    def __post_init__(self) -> None:
        whole_number("Recipe: batch_size", self.batch_size, least=2)

    @property
    def pairs(self) -> int:
        """Pairs of samples at t = 999 in a batch; the two share caption and picture, not noise."""
        return min(self.batch_size // 2, max(1, round(self.last_step_share * self.batch_size / 2)))


@dataclass(frozen=True)
class Run:
    """What one process needs to know of the run."""

    folder: Path
    recipe: Recipe
    seed: int
    processes: int = 1
    device: str = "cpu"
    rank: int = 0
    stage: int = 0

    @property
    def identity(self) -> dict[str, int]:
        """What a checkpoint must agree in to be gone on from."""
        return {"seed": self.seed, "processes": self.processes, "batch_size": self.recipe.batch_size}

    def adamw(self, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
        """The optimizer of all networks; `optimize` sets its learning rate at every step."""
        fused = self.device.startswith("cuda")
        return torch.optim.AdamW(parameters, 0.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)

    @property
    def samples_per_step(self) -> int:
        """Samples that all processes see together in one step."""
        return self.recipe.batch_size * self.processes

    def random(self, step: int) -> tuple[np.random.RandomState, torch.Generator]:
        """The draws of one step: a generator for words and scenes and one for tensors."""
        words, tensors = np.random.SeedSequence([self.seed, self.rank, step, self.stage]).generate_state(2).tolist()
        return np.random.RandomState(words), torch.Generator().manual_seed(tensors)

    def pool_of(self, step: int) -> int:
        """Number of the pool of scenes that a step draws from."""
        return step * self.recipe.batch_size // (self.recipe.pool_scenes * self.recipe.pool_passes)

    def scenes(self, pool: int) -> list[Scene]:
        """The scenes of a pool."""
        seed = np.random.SeedSequence([self.seed, self.rank, pool, self.stage, 1]).generate_state(1).item()
        rng = np.random.RandomState(seed)
        return [sample_scene(rng) for _ in range(self.recipe.pool_scenes)]

    def progress(self, name: str, done: int, total: int) -> Any:
        """A progress bar under a line that says what is to come; only the first process shows them."""
        if self.rank == 0:
            tqdm.write(f"Training {name} on {self.device}: {total - done:,} samples, {self.samples_per_step} a step.")
        return tqdm(desc=name, initial=done, total=total, unit=" samples", disable=self.rank > 0)


def pictures(scenes: Iterable[Scene]) -> Float[Tensor, "scene 3 64 64"]:
    """Rendered scenes, from -1 to 1."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def optimize(
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


def checkpoint_due(run: Run, done: int, samples: int) -> bool:
    """Whether a step that made `done` of all samples ends with a checkpoint."""
    every = run.recipe.checkpoint_every
    return done >= samples or done // every > (done - run.samples_per_step) // every


def log(run: Run, **facts: object) -> None:
    """Append a line to the run's log."""
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")

"""How the judge is trained: on pictures of the world, damaged as drawn pictures are, and on what is no object of it.

Four pictures in five are scenes. The others teach it to abstain: blobs and mixtures of two shapes have no shape, empty
backgrounds no object, and noise has nothing. What cannot be seen, such as the pose of a plain circle, is not asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from sdxl_sae_kit.tiny import checkpoints
from sdxl_sae_kit.tiny.judge import FILE, Judge, expected_answers
from sdxl_sae_kit.tiny.runs import Run, checkpoint_due, log, optimize
from sdxl_sae_kit.tiny.world import (
    COLOURS,
    FACTORS,
    SHAPES,
    SIZE,
    backdrop,
    object_mask,
    render,
    sample_scene,
)

NOT_ASKED = -100
_MASK_WEIGHT = 2.0
_CALIBRATION = 2048
"""Damaged pictures, never trained on, that temperatures are fitted to."""


@dataclass(frozen=True)
class Question:
    """A picture and the right answers: None where there is none; factors that are left out are not asked."""

    picture: NDArray[np.uint8]
    answers: dict[str, str | None]
    mask: NDArray[np.bool_]


def ask(rng: np.random.RandomState, kind: str) -> Question:
    """A random question: about a "scene", a "blob", a "mixture" of two shapes, an "empty" background or "noise"."""
    scene = sample_scene(rng)
    known = expected_answers(scene, shape=kind != "mixture")
    if kind == "scene":
        return Question(render(scene), known, object_mask(scene))
    if kind == "mixture":
        other = replace(scene, shape=rng.choice([shape for shape in SHAPES if shape != scene.shape]))
        mixed = (render(scene) / 2 + render(other) / 2).astype(np.uint8)
        return Question(mixed, known, object_mask(scene) | object_mask(other))
    if kind == "noise":
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, *[rng.choice([4, 8, 16, 64])] * 2)))
        picture = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear")[0].permute(1, 2, 0).numpy()
        return Question(picture.astype(np.uint8), dict.fromkeys(FACTORS), np.zeros((SIZE, SIZE), bool))
    seen = {"background": scene.background, "pattern": scene.pattern}
    if kind == "empty":
        picture = np.rint(backdrop(scene)).astype(np.uint8)
        return Question(picture, dict.fromkeys(FACTORS) | seen, np.zeros((SIZE, SIZE), bool))
    opaque = _blob(rng)
    picture = backdrop(scene) * (1 - opaque[..., None]) + np.array(COLOURS[scene.colour]) * opaque[..., None]
    alone = dict.fromkeys(("shape", "material", "pose", "relation", "shape2", "colour2"))
    answers = seen | alone | {"colour": scene.colour}
    return Question(picture.astype(np.uint8), answers, opaque > 0.5)


def _blob(rng: np.random.RandomState) -> Float[np.ndarray, "64 64"]:
    """Opacity of a patch that is no shape of the world: its outline wanders by a quarter of its radius or more."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] - SIZE / 2 + rng.uniform(-14, 14, 2)[:, None, None]
    angle, radius = np.arctan2(y, x), rng.uniform(7, 18)
    wander = sum(rng.normal() * np.cos(n * angle + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 4, 5, 7))
    outline = radius * (1 + rng.uniform(0.25, 0.5) * wander / np.abs(wander).max())
    return np.asarray(np.clip((outline - np.hypot(x, y)) / rng.uniform(1, 6) + 0.5, 0, 1))


def ask_many(
    rng: np.random.RandomState, n: int
) -> tuple[Float[Tensor, "picture 3 64 64"], Int[Tensor, "picture factor"], Float[Tensor, "picture 64 64"]]:
    """Pictures from −1 to 1, the index of every factor's answer, none being the last, and masks."""
    kinds = rng.choice(["scene", "blob", "mixture", "empty", "noise"], n, p=[0.8, 0.09, 0.05, 0.04, 0.02])
    questions = [ask(rng, str(kind)) for kind in kinds]
    pictures = torch.from_numpy(np.stack([question.picture for question in questions]))
    masks = torch.from_numpy(np.stack([question.mask for question in questions])).float()
    targets = torch.tensor([[_target(q.answers, factor) for factor in FACTORS] for q in questions])
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, targets, masks


def _target(answers: dict[str, str | None], factor: str) -> int:
    if factor not in answers:
        return NOT_ASKED
    value = answers[factor]
    return len(FACTORS[factor]) if value is None else FACTORS[factor].index(value)


@torch.no_grad()
def damage(
    pictures: Float[Tensor, "picture 3 64 64"], vae: AutoencoderKL, generator: torch.Generator
) -> Float[Tensor, "picture 3 64 64"]:
    """Pictures as they come from a model: some through the VAE, warped by a pixel, blurred, off in colour, noisy."""
    n = len(pictures)

    def some(share: float, most: float) -> Float[Tensor, "picture 1 1 1"]:
        """For this share of the pictures a strength up to `most`, 0 for the others."""
        drawn = torch.rand(2, n, 1, 1, 1, generator=generator)
        return (drawn[0] < share) * drawn[1] * most

    through = max(1, n // 5)
    drawn = vae.decode(vae.encode(pictures[:through]).latent_dist.mean).sample
    pictures = torch.cat([drawn, pictures[through:]])
    shift = torch.randn(n, 2, 8, 8, generator=generator) * some(0.4, 2 * 1.5 / SIZE)
    shift = F.interpolate(shift, (SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, SIZE, SIZE], align_corners=False)
    pictures = F.grid_sample(pictures, straight + shift, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), "replicate"), 3, 1)
    pictures = pictures.lerp(F.avg_pool2d(blurred, 3, 1), some(0.4, 1.0))
    tint = torch.randn(n, 3, 1, 1, generator=generator) * some(0.5, 0.12)
    return (pictures + tint + torch.randn(pictures.shape, generator=generator) * some(0.5, 0.3)).clamp(-1, 1)


def train_judge(run: Run, samples: int) -> None:
    """Train in the run's folder, going on from its `judge.pt`, and write the finished judge to `judge/`."""
    recipe, path = run.recipe, run.folder / checkpoints.FILES["judge"]
    vae = checkpoints.load_vae(run.folder / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        judge = Judge().to(run.device)
    parameters = list(judge.parameters())
    optimizer = run.adamw(parameters, weight_decay=0.01)
    step = done = 0
    if path.exists():
        state = checkpoints.load(path)
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["opt"])
        step, done = state["it"], state["n"]
    with run.progress("judge", done, samples) as bar:
        while done < samples:
            rng, generator = run.random(step)
            pictures, targets, masks = ask_many(rng, recipe.batch_size)
            damaged = damage(pictures, vae, generator)
            loss = _loss(judge, *(each.to(run.device) for each in (damaged, targets, masks)))
            rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done / samples))
            optimize(loss, optimizer, parameters, recipe.judge_learning_rate * rate, run.processes)
            step, done = step + 1, done + run.samples_per_step
            bar.update(run.samples_per_step)
            if run.rank == 0 and checkpoint_due(run, done, samples):
                state = {
                    "judge": judge.state_dict(),
                    "opt": optimizer.state_dict(),
                    "it": step,
                    "n": done,
                    "run": run.identity,
                }
                checkpoints.save(state, path)
                log(run, stage="judge", samples=done, loss=round(loss.item(), 4))
    if run.rank == 0:
        calibrate(judge.eval().cpu(), vae, run.seed)
        unfinished, finished = run.folder / "judge.tmp", run.folder / "judge"
        unfinished.mkdir(exist_ok=True)
        tensors = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
        save_file(tensors, unfinished / FILE)
        (unfinished / FILE).chmod(0o644)  # safetensors lets nobody but the owner read it
        unfinished.replace(finished)


def _loss(
    judge: Judge,
    pictures: Float[Tensor, "picture 3 64 64"],
    targets: Int[Tensor, "picture factor"],
    masks: Float[Tensor, "picture 64 64"],
) -> Float[Tensor, ""]:
    """Cross entropy of the answers, summed over factors, and of the mask's pixels."""
    logits, mask = judge(pictures)
    told = sum(
        F.cross_entropy(of, targets[:, i], ignore_index=NOT_ASKED, reduction="sum") for i, of in enumerate(logits)
    )
    return told / len(pictures) + _MASK_WEIGHT * F.binary_cross_entropy_with_logits(mask, masks)


@torch.no_grad()
def calibrate(judge: Judge, vae: AutoencoderKL, seed: int, n: int = _CALIBRATION) -> None:
    """Fit each factor's temperature, which makes its confidences probabilities (Guo et al. 2017)."""
    rng, generator = np.random.RandomState([seed, 1]), torch.Generator().manual_seed(seed + 1)
    answered: list[tuple[list[Tensor], Tensor]] = []
    for _ in range(-(-n // 64)):
        pictures, targets, _masks = ask_many(rng, 64)
        answered.append((judge(damage(pictures, vae, generator))[0], targets))
    targets = torch.cat([asked for _, asked in answered])
    temperatures = torch.logspace(-1, 1, 101, base=4)
    for i in range(len(FACTORS)):
        logits = torch.cat([given[i] for given, _ in answered])
        losses = [F.cross_entropy(logits / t, targets[:, i], ignore_index=NOT_ASKED).item() for t in temperatures]
        judge.temperature[i] = temperatures[int(np.argmin(losses))]

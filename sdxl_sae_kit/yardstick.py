"""The yardstick: how true the embedded model, its judge, its updates and their SAEs are to a world of known factors.

Nothing here needs trust in another network than the judge, and the judge is itself measured on renders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.metrics import bootstrap_interval, constant_share, participation_ratio
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.recovery import measure_confusion as measure_confusion
from sdxl_sae_kit.recovery import measure_recovery as measure_recovery
from sdxl_sae_kit.tiny.judge import Judge, expected_answers, load_judge
from sdxl_sae_kit.tiny.judge_training import ask
from sdxl_sae_kit.tiny.world import FACTORS, Scene, caption, object_mask, render, sample_scene

Row = dict[str, Any]
SEED = 90_000
"""Scenes and noise start from it here, and nowhere in training."""
_BATCH = 50


def measure_adherence(
    pipe: Any,
    n: int = 1000,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    judge: Judge | None = None,
) -> list[Row]:
    """How often a model of the world draws what the caption says, factor by factor, as the judge sees it.

    One row per factor: the share of pictures in which the judge names the caption's value (abstaining counts as wrong),
    its 95 % bootstrap interval over pictures, the share of the commonest value, which is what a model that reads no
    captions could reach, and the number of pictures; then the means over factors. What cannot be seen (the pose of a
    plain circle, the material of a small sketch) is not asked. Pairs are compared from the left or upper object on,
    however the caption tells them.

    Args:
        pipe: "tiny-turbo", "tiny-base" or another model of the world.
        n: captions, each naming every factor of a scene, and as many seeds.
        num_inference_steps, guidance_scale: by default the model's preset.
        judge: by default the one in the package.
    """
    judge, scenes = judge or load_judge(), draw_scenes(whole_number("measure_adherence: n", n))
    expected = [_shown(scene) for scene in scenes]
    told: list[dict[str, str | None]] = []
    for start in tqdm(range(0, n, _BATCH), desc="adherence", unit="batch"):
        batch = scenes[start : start + _BATCH]
        texts, seeds = [caption(scene) for scene in batch], range(SEED + start, SEED + start + len(batch))
        drawn = generate(pipe, texts, seeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        told += judge.read(drawn).told()
    right = _right(told, expected)
    shown = ~np.isnan(right)
    rows: list[Row] = []
    for factor, column in zip(FACTORS, right.T, strict=True):
        hits = column[~np.isnan(column)]
        if not len(hits):  # so few captions that none shows this factor
            continue
        values = [known[factor] for known in expected if factor in known]
        commonest = max(map(values.count, values)) / len(values)
        interval = bootstrap_interval(hits)
        rows.append(
            {
                "factor": factor,
                "share": float(hits.mean()),
                "interval": interval,
                "commonest": commonest,
                "n": len(hits),
            }
        )
    both, f = np.hstack([np.nan_to_num(right), shown]), len(FACTORS)
    interval = bootstrap_interval(both, lambda m: np.nanmean(_share(m[..., :f], m[..., f:]), axis=-1))
    mean = float(np.mean([row["share"] for row in rows]))
    blind = float(np.mean([row["commonest"] for row in rows]))
    return [*rows, {"factor": "mean", "share": mean, "interval": interval, "commonest": blind, "n": n}]


def measure_judge(vae: Any, n: int = 1000, judge: Judge | None = None) -> list[Row]:
    """How often the judge is right on renders it never saw: clean, blurred (σ 0.7 px), noisy (σ 0.05), through the VAE.

    One row per factor with the share of right answers in each condition, and the calibration error: the mean of
    |confidence − share right| over ten bins of confidence, weighted by their pictures, over all four conditions, none
    being a right answer where a scene lacks the factor (ECE, Naeini et al. 2015). The last
    rows give the mean IoU of the masks, and the share of blobs whose shape the judge does not claim to know.
    """
    judge, scenes = judge or load_judge(), draw_scenes(n)
    renders = [render(scene) for scene in scenes]
    conditions: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        "clean": lambda picture: picture,
        "blurred": lambda picture: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))),
        "noisy": _noisy(np.random.default_rng(SEED)),
        "VAE": lambda picture: _through(vae, picture),
    }
    verdicts = {name: judge.read(np.stack([change(r) for r in renders])) for name, change in conditions.items()}
    answers, expected = [expected_answers(scene) for scene in scenes], [_shown(scene) for scene in scenes]
    right = {name: _right(verdict.told(), expected) for name, verdict in verdicts.items()}
    rows: list[Row] = []
    for i, factor in enumerate(FACTORS):
        row = {"factor": factor, "n": int((~np.isnan(right["clean"][:, i])).sum())}
        row |= {name: float(np.nanmean(hits[:, i])) for name, hits in right.items()}
        asked = [at for at, known in enumerate(answers) if factor in known]
        confidence = np.concatenate([verdict.confidence[factor][asked] for verdict in verdicts.values()])
        hits = [v.likeliest[factor][at] == answers[at][factor] for v in verdicts.values() for at in asked]
        row["calibration error"] = calibration_error(confidence, np.array(hits))
        rows.append(row)
    masks = np.stack([object_mask(scene) for scene in scenes])
    overlap = {name: _iou(verdict.mask, masks) for name, verdict in verdicts.items()}
    rng = np.random.RandomState(SEED)
    blobs = judge.read(np.stack([ask(rng, "blob").picture for _ in range(n)])).values["shape"]
    abstained = {"clean": float(np.mean([shape is None for shape in blobs]))}
    blank = dict.fromkeys([*conditions, "calibration error"], "–")
    return [*rows, {"factor": "mask IoU", "n": n} | blank | overlap, {"factor": "blobs", "n": n} | blank | abstained]


def measure_vae(vae: Any, n: int = 1000) -> Row:
    """Fidelity of the VAE on renders it never saw: −10 log10 of the mean squared error, colours 0 to 1, in dB.

    With its 95 % bootstrap interval over pictures.
    """
    renders = [render(scene) for scene in draw_scenes(n)]
    errors = np.array([np.square((_through(vae, each) - each.astype(float)) / 255).mean() for each in renders])
    interval = bootstrap_interval(errors[:, None], lambda mean: -10 * np.log10(mean[..., 0]))
    return {"PSNR dB": float(-10 * np.log10(errors.mean())), "interval": interval, "n": n}


def measure_richness(pipe: Any, n: int = 1000, hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS) -> list[Row]:
    """How much the updates of one-object scenes have to say, at one step.

    One row per hookpoint: participation ratio, the same of what captions alone cause (the noise cancelled between two
    seeds for each), share of variance within images (see `metrics`), and for shape, colour and position the accuracy of
    a linear probe on a held-out quarter of the images, with its 95 % bootstrap interval, beside the share of the
    commonest value (logistic regression on the update averaged over its four quadrants).
    """
    scenes = [scene for scene in draw_scenes(2 * n) if scene.count == "one"][:n]
    first, second = (_updates(pipe, scenes, hookpoints, SEED + offset) for offset in (0, n))
    return [_rich(hookpoint, first[hookpoint], second[hookpoint], scenes) for hookpoint in hookpoints]


def _updates(pipe: Any, scenes: Sequence[Scene], hookpoints: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """The update of every scene at one step, by hookpoint: (image, height, width, d_in)."""
    with record(pipe, hookpoints) as recording:
        for start in tqdm(range(0, len(scenes), _BATCH), desc="richness", unit="batch"):
            texts = [caption(scene) for scene in scenes[start : start + _BATCH]]
            seeds = range(seed + start, seed + start + len(texts))
            generate(pipe, texts, seeds, num_inference_steps=1, guidance_scale=0.0, output_type="latent")
    return {hookpoint: recording.update(hookpoint).float() for hookpoint in hookpoints}


def draw_scenes(n: int) -> list[Scene]:
    """Random scenes that no training drew."""
    rng = np.random.RandomState(SEED)
    return [sample_scene(rng) for _ in range(n)]


def _right(
    told: Sequence[Mapping[str, str | None]], expected: Sequence[Mapping[str, str | None]]
) -> Float[np.ndarray, "picture factor"]:
    """1 where a factor's value is the expected one, 0 where it is not, NaN where none is expected."""
    pairs = zip(told, expected, strict=True)
    return np.array([[values[f] == known[f] if f in known else np.nan for f in FACTORS] for values, known in pairs])


def _shown(scene: Scene) -> dict[str, str]:
    """The factors that a picture of the scene shows, as the judge tells them."""
    return {factor: value for factor, value in expected_answers(scene).items() if value is not None}


def _share(hits: NDArray[np.float64], shown: NDArray[np.float64]) -> NDArray[np.float64]:
    """hits / shown, NaN where nothing is shown."""
    return np.divide(hits, shown, out=np.full_like(hits, np.nan), where=shown > 0)


def calibration_error(confidence: Float[np.ndarray, " answer"], right: Bool[np.ndarray, " answer"]) -> float:
    """Expected calibration error of answers over ten bins of equal width: 0 when confidences are probabilities."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    chosen = [bins == b for b in set(bins.tolist())]
    return float(sum(abs(confidence[here].mean() - right[here].mean()) * here.mean() for here in chosen))


def _iou(found: Bool[np.ndarray, "picture 64 64"], true: Bool[np.ndarray, "picture 64 64"]) -> float:
    return float(((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean())


def _noisy(rng: np.random.Generator) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    return lambda picture: np.clip(picture + rng.normal(0, 0.05 * 255, picture.shape), 0, 255).astype(np.uint8)


@torch.no_grad()
def _through(vae: Any, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
    drawn = vae.decode(vae.encode(x).latent_dist.mean).sample[0].float().permute(1, 2, 0)
    pixels: NDArray[np.uint8] = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return pixels


def _rich(
    hookpoint: str,
    updates: Float[torch.Tensor, "image height width d_in"],
    other_noise: Float[torch.Tensor, "image height width d_in"],
    scenes: Sequence[Scene],
) -> Row:
    tokens = updates.flatten(1, 2)
    row: Row = {
        "hookpoint": hookpoint,
        "images": len(scenes),
        "participation ratio": participation_ratio(tokens.flatten(0, 1)),
        "by captions": _participation_without_noise(updates.flatten(0, 2), other_noise.flatten(0, 2)),
        "within images": 1 - constant_share(tokens),
    }
    quadrants = torch.nn.functional.adaptive_avg_pool2d(updates.permute(0, 3, 1, 2), 2).flatten(1).numpy()
    training = len(scenes) * 3 // 4
    for factor in ("shape", "colour", "position"):
        values = np.array([getattr(scene, factor) for scene in scenes])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        probe.fit(quadrants[:training], values[:training])
        right = (probe.predict(quadrants[training:]) == values[training:]).astype(float)
        row |= {f"probe {factor}": float(right.mean()), f"{factor} interval": bootstrap_interval(right)}
        row[f"commonest {factor}"] = float(max((values == value).mean() for value in set(values)))
    return row


def _participation_without_noise(x: Float[torch.Tensor, "token d_in"], y: Float[torch.Tensor, "token d_in"]) -> float:
    """Participation ratio of what two sets of tokens that differ in noise only have in common (see `tiny.spread`)."""
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    product = a.T @ b
    shared = (product + product.T) / 2
    return float(shared.trace() ** 2 / shared.square().sum())

"""The judge: a small network that reads factors and object mask off a picture of the world, or says that it cannot.

On the embedded model it plays the part that CLIP, LPIPS and a segmenter play on real images. It was trained on renders
(also blurred, noisy, warped and passed through the VAE) and on things that are no object of the world (blobs, mixtures
of two shapes, empty backgrounds), for which the right answer is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.tiny import WEIGHTS
from sdxl_sae_kit.tiny.world import FACTORS, SIZE, Scene, factors, visible_factors

FILE = "judge.safetensors"
LEAST_CONFIDENCE = 0.5
"""Below it an answer is none: the judge would rather abstain than guess."""
_BATCH = 64
_OPPOSITE = {"right of": "left of", "below": "above"}
_OTHER = {"shape": "shape2", "shape2": "shape", "colour": "colour2", "colour2": "colour"}
_WIDTHS, _NECK, _PLACES = (32, 64, 96), 192, 12


@dataclass(frozen=True)
class Verdicts:
    """What the judge sees in n pictures.

    Of a pair the left or upper object counts as the first: that it is "left of" the other says the same picture as that
    the other is "right of" it. Material and pose are those of whichever object has them.
    """

    likeliest: Mapping[str, Sequence[str | None]]
    """Factor → the likeliest answer for every picture; None: it is not there, or not of this world."""
    confidence: Mapping[str, Float[np.ndarray, " picture"]]
    """Factor → the calibrated probability of that answer."""
    mask: Bool[np.ndarray, "picture 64 64"]
    """Pixels of the objects."""

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def values(self) -> dict[str, list[str | None]]:
        """Factor → its value in every picture; None also where the judge is less than half sure: it abstains."""
        return {
            factor: [value if sure >= LEAST_CONFIDENCE else None for value, sure in zip(named, sures, strict=True)]
            for (factor, named), sures in zip(self.likeliest.items(), self.confidence.values(), strict=True)
        }

    def told(self) -> list[dict[str, str | None]]:
        """The values of each picture by factor."""
        values = self.values
        return [dict(zip(values, named, strict=True)) for named in zip(*values.values(), strict=True)]


class Judge(nn.Module):
    """The network and how to ask it; 0.6 million parameters. `load_judge` makes the trained one."""

    def __init__(self) -> None:
        super().__init__()
        narrow, middle, wide = _WIDTHS
        self.at_32 = nn.Sequential(nn.PixelUnshuffle(2), _convolution(12, narrow), _Residual(narrow))
        self.at_16 = nn.Sequential(_convolution(narrow, middle, stride=2), _Residual(middle))
        self.at_8 = nn.Sequential(_convolution(middle, wide, stride=2), _Residual(wide))
        self.places = nn.Conv2d(wide, _PLACES, 1)
        self.neck = nn.Sequential(nn.Linear(2 * wide + _PLACES * 64, _NECK), nn.SiLU())
        self.heads = nn.Linear(_NECK, sum(answers()))
        self.up_16 = _convolution(wide + middle, narrow)
        self.up_32 = nn.Sequential(_convolution(2 * narrow, 16), nn.Conv2d(16, 1, 1))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(len(FACTORS)))

    def forward(
        self, pictures: Float[Tensor, "picture 3 64 64"]
    ) -> tuple[list[Float[Tensor, "picture _"]], Float[Tensor, "picture 64 64"]]:
        """Logits of every factor's values, none being the last, and of the mask; pictures are −1 to 1."""
        at_32 = self.at_32(pictures)
        at_16 = self.at_16(at_32)
        at_8 = self.at_8(at_16)
        logits = self._logits(at_8)
        mask = self.up_16(torch.cat([F.interpolate(at_8, scale_factor=2.0), at_16], 1))
        mask = self.up_32(torch.cat([F.interpolate(mask, scale_factor=2.0), at_32], 1))
        mask = F.interpolate(mask, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return logits, mask[:, 0]

    def _logits(self, at_8: Float[Tensor, "picture wide 8 8"]) -> list[Float[Tensor, "picture _"]]:
        pooled = [at_8.mean((2, 3)), at_8.amax((2, 3)), self.places(at_8).flatten(1)]
        return list(self.heads(self.neck(torch.cat(pooled, 1))).split(answers(), 1))

    @torch.no_grad()
    def probabilities(
        self, pictures: Sequence[Image.Image] | UInt8[np.ndarray, "picture 64 64 3"]
    ) -> dict[str, Float[np.ndarray, "picture _"]]:
        """Factor → the calibrated probability of each of its values and, last, of none; for pictures of 64 × 64 pixels.

        Raises:
            KitError: there are none, or they have another size.
        """
        batches = [batch.to(self.temperature.device) for batch in _as_tensor(pictures).split(_BATCH)]
        seen = [self._logits(self.at_8(self.at_16(self.at_32(batch)))) for batch in batches]
        logits = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        told = ((each / t).softmax(1).cpu().numpy() for each, t in zip(logits, self.temperature, strict=True))
        return dict(zip(FACTORS, told, strict=True))

    def logits(self, pictures: Float[Tensor, "picture 3 64 64"]) -> dict[str, Float[Tensor, "picture _"]]:
        """Factor → what `probabilities` is the softmax of, with gradients, of pictures whose colours are 0 to 1."""
        told = self._logits(self.at_8(self.at_16(self.at_32(pictures * 2 - 1))))
        return {factor: each / t for factor, each, t in zip(FACTORS, told, self.temperature, strict=True)}

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image] | UInt8[np.ndarray, "picture 64 64 3"]) -> Verdicts:
        """Factors, confidences and masks of pictures of 64 × 64 pixels.

        Raises:
            KitError: there are none, or they have another size.
        """
        batches = _as_tensor(pictures).split(_BATCH)
        seen = [self(batch.to(self.temperature.device)) for batch in batches]
        likeliest, confidence = {}, {}
        for i, (factor, known) in enumerate(FACTORS.items()):
            logits = torch.cat([each[i] for each, _ in seen])
            best = (logits / self.temperature[i]).softmax(1).max(1)
            confidence[factor] = best.values.cpu().numpy()
            likeliest[factor] = [known[j] if j < len(known) else None for j in best.indices.tolist()]
        return Verdicts(likeliest, confidence, torch.cat([mask for _, mask in seen]).cpu().numpy() > 0)


def expected_answers(scene: Scene, *, shape: bool = True) -> dict[str, str | None]:
    """What the judge should say of a scene: None for factors that it lacks; what cannot be seen is left out.

    Without `shape` the first object has none, as in a mixture of two.
    """
    visible, known = visible_factors(scene), factors(scene)
    answers = {factor: visible.get(factor) for factor in FACTORS if factor in visible or factor not in known}
    if not shape:
        answers["shape"] = None
    if scene.relation in ("right of", "below"):
        swapped = {one: answers[other] for one, other in _OTHER.items()}
        answers |= swapped | {"relation": _OPPOSITE[scene.relation]}
    return answers


def load_judge(folder: Path | None = None) -> Judge:
    """The trained judge, from the package or from the folder `judge` that `sdxl-sae-kit tiny train` made.

    Raises:
        ModelError: the folder holds none.

    >>> load_judge().read(pipe("a red star").images).values["shape"]      # doctest: +SKIP
    ['star']
    """
    judge = Judge().eval().requires_grad_(False)
    path = (folder or WEIGHTS / "judge") / FILE
    if not path.exists():
        raise ModelError(f"There is no finished judge in {path.parent}. Train it first, with stage='judge'.")
    judge.load_state_dict(load_file(path))
    return judge


def answers() -> list[int]:
    """How many answers each factor has: its values, and none."""
    return [len(known) + 1 for known in FACTORS.values()]


def _as_tensor(
    pictures: Sequence[Image.Image] | UInt8[np.ndarray, "picture 64 64 3"],
) -> Float[Tensor, "picture 3 64 64"]:
    found = {picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1] for picture in pictures}
    if found != {(SIZE, SIZE)}:
        sizes = ", ".join(f"{width}×{height}" for width, height in sorted(found)) or "none at all"
        raise KitError(f"The judge reads pictures of the tiny world, which have {SIZE}×{SIZE} pixels; it got {sizes}.")
    arrays = [np.asarray(p.convert("RGB") if isinstance(p, Image.Image) else p) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(channels, channels), nn.Conv2d(channels, channels, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.inner(x)
        return changed

"""Judges of what an edit changed in a picture: how different it looks, and what it shows that it did not.

`WorldJudge` reads pictures of the embedded model. For real images `EmbeddingJudge` takes any embedding, such as a CLIP;
how different they look is then told by a measure such as LPIPS or, without one, in pixels only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch.nn import functional as F

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import hash_file
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.tiny import NAMES, WEIGHTS
from sdxl_sae_kit.tiny.judge import FILE, load_judge

if TYPE_CHECKING:
    from sdxl_sae_kit.similarity import Embed

Pictures = Float[np.ndarray, "image y x 3"]
"""Colours 0 to 1."""
Before = Float[np.ndarray, "#image y x 3"]
"""As many, or one for all."""
_BATCHES = 4
"""Batches of which the embedded judge remembers what it saw: before, the prompt's, after, and one more."""


@runtime_checkable
class PictureJudge(Protocol):
    """Tells pictures of an edit from those without it, pair by pair; what it cannot tell is None."""

    @property
    def name(self) -> str:
        """Which judge this is, weights included: what results are kept under."""

    def perceptual(self, before: Before, after: Pictures) -> Float[np.ndarray, "image y x"] | None:
        """How different each place looks: 0 where it looks the same."""

    def semantic(self, before: Before, after: Pictures) -> Float[np.ndarray, " image"] | None:
        """How different what they show is: 0 for the same."""

    def factors(self, pictures: Pictures) -> dict[str, Float[np.ndarray, "image answer"]] | None:
        """The probability of every value of every factor and, last, of none."""


@runtime_checkable
class TextJudge(Protocol):
    """A judge that reads texts too, as `EmbeddingJudge` does where its embedding has `texts`."""

    def textual(self, pictures: Pictures, texts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """How well each picture fits its text, −1 to 1: the cosine of the two embeddings."""


@runtime_checkable
class Perceptual(Protocol):
    """A measure of how different pictures look, such as `Lpips`."""

    @property
    def name(self) -> str:
        """Which measure this is, weights included."""

    def __call__(self, before: Before, after: Pictures) -> Float[np.ndarray, "image y x"]:
        """How different each place looks: 0 where it looks the same."""


class WorldJudge:
    """The embedded judge, for pictures of 64 × 64 pixels.

    `perceptual` is the squared distance of its features at three scales, each token's made of length 1, averaged over
    the scales (as LPIPS does it, without learnt weights): 0 to 4. `semantic` is 1 − the mean over factors of Σ √(p q),
    where p and q are the probabilities of the factor's values in either picture (Bhattacharyya): 0 to 1.
    """

    def __init__(self) -> None:
        self._judge = load_judge()
        self.name = f"world judge {hash_file(WEIGHTS / 'judge' / FILE)[:8]}"
        self._probabilities, self._features = map(_remembering, (self._judge.probabilities, self._see))

    def factors(self, pictures: Pictures) -> dict[str, Float[np.ndarray, "image answer"]]:
        """The calibrated probability of every value of every factor of `FACTORS` and, last, of none."""
        return dict(self._probabilities(pictures))

    def semantic(self, before: Before, after: Pictures) -> Float[np.ndarray, " image"]:
        """1 − the mean over factors of Bhattacharyya's coefficient."""
        pairs = zip(self.factors(before).values(), self.factors(after).values(), strict=True)
        alike = np.mean([np.sqrt(p * q).sum(axis=1) for p, q in pairs], axis=0)
        return np.asarray(np.maximum(1 - alike, 0))

    @torch.no_grad()
    def perceptual(self, before: Before, after: Pictures) -> Float[np.ndarray, "image y x"]:
        """Squared distance of the judge's features, averaged over its three scales."""
        size = before.shape[1:3]
        maps = [
            F.interpolate((one - other).square().sum(1, keepdim=True), size=size, mode="bilinear", align_corners=False)
            for one, other in zip(self._features(before), self._features(after), strict=True)
        ]
        seen: Float[np.ndarray, "image y x"] = torch.stack(maps).mean(0)[:, 0].cpu().numpy()
        return seen

    def _see(self, pixels: UInt8[np.ndarray, "image y x 3"]) -> list[Float[torch.Tensor, "image channel row column"]]:
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        at_32 = self._judge.at_32(x.to(self._judge.temperature.device))
        at_16 = self._judge.at_16(at_32)
        return [F.normalize(each, dim=1) for each in (at_32, at_16, self._judge.at_8(at_16))]


class EmbeddingJudge:
    """What an embedding tells, such as `ClipEmbed`: `semantic` is 1 − the cosine, 0 to 2; it knows no factors.

    Where the embedding reads texts this is a `TextJudge`: it has `textual`.

    Args:
        embed: the embedding.
        perceptual: tells how different places look, such as `Lpips()`; an embedding knows no places.

    >>> judge = EmbeddingJudge(ClipEmbed("openai/clip-vit-large-patch14"), Lpips())                   # doctest: +SKIP
    """

    def __init__(self, embed: Embed, perceptual: Perceptual | None = None) -> None:
        self._embed, self._perceptual = embed, perceptual
        self.name = embed.name if perceptual is None else f"{embed.name} + {perceptual.name}"
        if hasattr(embed, "texts"):  # else there is no such method, and this is no TextJudge
            self.textual = self._textual

    def perceptual(self, before: Before, after: Pictures) -> Float[np.ndarray, "image y x"] | None:
        """What the measure tells, or None where there is none."""
        return None if self._perceptual is None else self._perceptual(before, after)

    def factors(self, pictures: Pictures) -> None:
        """None: an embedding names nothing."""

    def semantic(self, before: Before, after: Pictures) -> Float[np.ndarray, " image"]:
        """1 − the cosine of the two embeddings: 0 for the same, at most 2."""
        one, other = (self._rows(pictures) for pictures in (before, after))
        return np.asarray(1 - (one * other).sum(axis=1), dtype=np.float32)

    def _textual(self, pictures: Pictures, texts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """The cosine of each picture's embedding and its text's."""
        read = self._embed.texts(texts)  # type: ignore[attr-defined]
        return np.asarray((self._rows(pictures) * read).sum(axis=1), dtype=np.float32)

    def _rows(self, pictures: Before) -> Float[np.ndarray, "image d"]:
        return self._embed([Image.fromarray(picture) for picture in _as_bytes(pictures)])


def _remembering(read: Callable[[Any], Any]) -> Callable[[Pictures], Any]:
    """What `read` says of pictures, kept for the last batches: studies ask about the same ones with every change."""

    @lru_cache(maxsize=_BATCHES)
    def read_bytes(pixels: bytes, shape: tuple[int, ...]) -> Any:
        return read(np.frombuffer(pixels, np.uint8).reshape(shape).copy())

    def read_pictures(pictures: Pictures) -> Any:
        pixels = _as_bytes(pictures)
        return read_bytes(pixels.tobytes(), pixels.shape)

    return read_pictures


def chosen_judge(asked: str, pipe: Any, judge: PictureJudge | EllipsisType | None) -> PictureJudge | None:
    """The judge given, or the model's own where it was left out (`...`); None tells pixels only.

    Raises:
        KitError: it is no judge.
    """
    if isinstance(judge, EllipsisType):
        return judge_of(pipe)
    if judge is not None and (isinstance(judge, type) or not isinstance(judge, PictureJudge)):
        raise KitError(f"{asked}: judge is one such as WorldJudge() or EmbeddingJudge(embed), or None, not {judge!r}.")
    return judge


def judge_of(pipe: Any) -> PictureJudge | None:
    """The judge that comes with a model: the embedded one's; others have none."""
    return WorldJudge() if describe(pipe).name in NAMES else None


def _as_bytes(pictures: Pictures) -> Any:
    return (np.clip(pictures, 0, 1) * 255).round().astype(np.uint8)

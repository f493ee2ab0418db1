"""Masks of anything that words name, on real images: Grounding DINO draws boxes, SAM 2 fills them.

Both come from transformers and need no torchvision and no CUDA: pictures are prepared here as their own processors do
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdxl_sae_kit.devices import choose_device
from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.files import canonical_json
from sdxl_sae_kit.tiny.quiet import hushed, quiet

if TYPE_CHECKING:
    from sdxl_sae_kit.segmenters import Shot

DINO, SAM = "IDEA-Research/grounding-dino-base", "facebook/sam2.1-hiera-large"
BOX_THRESHOLD = 0.35
"""A box counts whose probability for at least one token of the words lies above it, as in Grounding DINO's own demo."""

_KNOWN = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "pad_size": False}
"""Of an image processor's settings those that decide how pictures are prepared, and which is done here; `do_pad` adds
nothing to a picture by itself unless a size is given."""
_SIZES = {"height", "width"}, {"shortest_edge", "longest_edge"}

Boxes = Float[Tensor, "box 4"]
"""Left, upper, right and lower edge, as fractions of the picture's width and height."""


class GroundedSegmenter:
    """Grounding DINO finds boxes for the words, SAM 2 the thing in each; the mask is all of them.

    Both compute in float32. Where there is no box the mask is empty. The mask prompt "background" asks for
    "foreground", as every segmenter is asked: that is a vague thing to look for, so say what is to be left out where
    you can ("~ dog").

    Args:
        dino: a Grounding DINO of transformers: folder or hub id.
        sam: a SAM 2 of transformers: folder or hub id.
        device: as in `load_pipeline`.

    Raises:
        ModelError: one cannot be loaded, or the device cannot be had.

    Source: Liu et al. 2023, Grounding DINO (arXiv 2303.05499); Ravi et al. 2024, SAM 2 (arXiv 2408.00714).

    >>> GroundedSegmenter()([shot], ["dog"])[0].shape                                                 # doctest: +SKIP
    (512, 512)
    """

    def __init__(self, dino: str | Path = DINO, sam: str | Path = SAM, *, device: str | None = None) -> None:
        self._device = choose_device(device)
        with quiet():
            from transformers import AutoTokenizer, GroundingDinoForObjectDetection, Sam2Model
        self._dino, self._dino_input, dino_digest = _loaded("Grounding DINO", GroundingDinoForObjectDetection, dino)
        self._sam, self._sam_input, sam_digest = _loaded("SAM 2", Sam2Model, sam)
        self._dino.to(self._device)
        self._sam.to(self._device)
        try:
            with quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(str(dino))
        except Exception as cause:  # transformers raises whatever it trips over
            raise ModelError(f"{dino} has no tokenizer ({cause}). Save Grounding DINO's beside it.") from None
        self.name = (
            f"Grounding DINO {Path(dino).name} {dino_digest} from {BOX_THRESHOLD:g} on + "
            f"SAM 2 {Path(sam).name} {sam_digest}"
        )

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Bool[np.ndarray, "_y _x"]]:
        """One mask of the picture's size for every shot, each found by itself.

        Raises:
            KitError: no words are asked for.
        """
        return [self._found(shot.picture, words) for shot, words in zip(shots, asked, strict=True)]

    def _found(self, picture: Float[np.ndarray, "y x 3"], words: str) -> Bool[np.ndarray, "y x"]:
        image = Image.fromarray(np.clip(picture * 255, 0, 255).round().astype(np.uint8))
        boxes = self._boxes(image, words)
        return self._filled(image, boxes) if len(boxes) else np.zeros(picture.shape[:2], dtype=bool)

    @torch.no_grad()
    def _boxes(self, image: Image.Image, words: str) -> Boxes:
        text = words.strip().lower().rstrip(".")
        if not text:
            raise KitError("GroundedSegmenter: there are no words to look for. Give every item its mask prompts.")
        tokens = self._tokenizer([f"{text}."], return_tensors="pt").to(self._device)
        pixels = self._dino_input(image).to(self._device)
        everywhere = torch.ones_like(pixels[:, 0], dtype=torch.long)  # nothing is padded
        seen = self._dino(
            pixel_values=pixels, pixel_mask=everywhere, input_ids=tokens.input_ids,
            token_type_ids=tokens.token_type_ids, attention_mask=tokens.attention_mask,
        )  # fmt: skip
        likely = seen.logits[0].sigmoid().amax(-1) > BOX_THRESHOLD  # (query,)
        centre, size = seen.pred_boxes[0, likely].split(2, -1)
        return torch.cat([centre - size / 2, centre + size / 2], -1)

    @torch.no_grad()
    def _filled(self, image: Image.Image, boxes: Boxes) -> Bool[np.ndarray, "y x"]:
        pixels = self._sam_input(image).to(self._device)
        height, width = pixels.shape[-2:]
        corners = boxes * torch.tensor([width, height, width, height], device=boxes.device)
        seen = self._sam(pixel_values=pixels, input_boxes=corners[None], multimask_output=False)
        masks = F.interpolate(seen.pred_masks[0], image.size[::-1], mode="bilinear", align_corners=False)  # (box, 1, …)
        return np.asarray((masks > 0).any(0)[0].cpu().numpy())


@dataclass(frozen=True)
class _Input:
    """What a model reads of a picture, as its image processor's settings say."""

    size: dict[str, int]
    """"height" and "width", or "shortest_edge" and "longest_edge"; pixels."""
    mean: Float[np.ndarray, "3"]
    std: Float[np.ndarray, "3"]
    resample: int
    """A filter of Pillow's."""
    factor: float
    """What colours from 0 to 255 are multiplied with at first."""

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> _Input:
        """From a preprocessor_config.json; what is left out is as transformers has it.

        Raises:
            ValueError: pictures would be prepared in a way that is not known here.
        """
        said = {name: value for name, value in settings.items() if value is not None}
        for name, known in _KNOWN.items():
            if bool(said.get(name, known)) != known:
                raise ValueError(f"its pictures are prepared with {name} {said[name]!r}, which is not known here")
        size = dict(said["size"])
        if set(size) not in _SIZES:
            raise ValueError(f"its pictures' size is {size}, not height and width or shortest_edge and longest_edge")
        mean, std = (np.array(said[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        resample = Image.Resampling(said.get("resample", Image.Resampling.BILINEAR))
        return cls(size, mean, std, resample, said.get("rescale_factor", 1 / 255))

    def __call__(self, image: Image.Image) -> Float[Tensor, "1 3 _row _column"]:
        scaled = np.asarray(image.resize(self.fitted(*image.size), self.resample), dtype=np.float32)
        pixels = (scaled * np.float32(self.factor) - self.mean) / self.std
        return torch.from_numpy(pixels).permute(2, 0, 1)[None]

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """The width and height to bring a picture to."""
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        short, long = sorted((width, height))
        edge = min(self.size["shortest_edge"], self.size["longest_edge"] * short / long)
        fitted = round(edge), int(edge * long / short)
        return fitted if width <= height else fitted[::-1]


def _loaded(kind: str, model: Any, source: str | Path) -> tuple[Any, _Input, str]:
    """A model, with weights for all of it, what it reads of a picture, and what tells it from others."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        with quiet(), hushed():
            loaded, told = model.from_pretrained(
                str(source), use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"it has no weights for {missing[0]} and {len(missing) - 1} more")
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(source))
        reads = _Input.read(settings)
    except Exception as cause:  # transformers raises whatever it trips over
        raise ModelError(
            f"{source} cannot be loaded as a {kind} ({type(cause).__name__}: {cause}). Pass a folder with safetensors "
            f"weights and preprocessor_config.json, or a hub id such as {DINO!r} or {SAM!r}; the hub needs the network."
        ) from None
    return loaded.eval().requires_grad_(False), reads, _digest(loaded.state_dict(), settings)


def _digest(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """The beginning of the sha256 of all weights and of how pictures are prepared; 1 to 2 s for 1 GB."""
    digest = hashlib.sha256(canonical_json(settings).encode())
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:8]

"""How different real pictures look: LPIPS, from torchmetrics (extra `riebench`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.devices import choose_device
from sdxl_sae_kit.errors import ModelError, did_you_mean
from sdxl_sae_kit.files import sha256

NETS = ("alex", "vgg", "squeeze")
_BATCH = 8


class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): distances of a network's features, weighted as people see them.

    Pass it to `EmbeddingJudge`. The mean of a map is a picture's LPIPS, as near as the features' grids fit into the
    picture.

    Args:
        net: "alex", as published figures mostly use it, "vgg" or "squeeze". Its ImageNet weights come from torchvision,
            which downloads them once.
        device: as in `load_pipeline`.

    Raises:
        ModelError: the extra is not installed, the weights or the device cannot be had, or there is no such net.

    >>> judge = EmbeddingJudge(ClipEmbed("openai/clip-vit-large-patch14"), Lpips())                   # doctest: +SKIP
    """

    def __init__(self, net: str = "alex", *, device: str | None = None) -> None:
        if net not in NETS:
            raise ModelError(f"Lpips: net is one of {', '.join(NETS)}, not {net!r}.{did_you_mean(str(net), NETS)}")
        self._device = choose_device(device)
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            with _no_code_in_weights():
                self._lpips = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", normalize=True)
        except ImportError as cause:
            raise ModelError(f"LPIPS needs an extra ({cause}): pip install 'sdxl-sae-kit[riebench]'.") from None
        except Exception as cause:  # torchvision raises whatever downloading or its compiled part trips over
            raise ModelError(
                f"LPIPS cannot be loaded ({type(cause).__name__}: {cause}). torchvision must fit torch's version and "
                f"build, and downloads the weights of {net!r} the first time: that needs the network."
            ) from None
        self._lpips.to(self._device)
        self._lpips.net.spatial = True  # each place's distance, not their mean
        weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in self._lpips.net.state_dict().values())
        self.name = f"LPIPS {net} {sha256(weights)[:8]}"

    def __call__(
        self, before: Float[np.ndarray, "#image y x 3"], after: Float[np.ndarray, "image y x 3"]
    ) -> Float[np.ndarray, "image y x"]:
        """How different each place looks, from 0 for the same; colours are 0 to 1."""
        if not len(after):
            return np.empty(after.shape[:3], dtype=np.float32)
        pairs = zip(
            *(_tensor(each).expand(len(after), -1, -1, -1).split(_BATCH) for each in (before, after)), strict=True
        )
        return np.concatenate([self._compare(one, other) for one, other in pairs])

    @torch.no_grad()
    def _compare(
        self, before: Float[Tensor, "image 3 y x"], after: Float[Tensor, "image 3 y x"]
    ) -> Float[np.ndarray, "image y x"]:
        told = self._lpips(before.to(self._device), after.to(self._device))
        self._lpips.reset()  # or it would keep every map
        count, _, height, width = after.shape
        return np.asarray(told.reshape(count, height, width).float().cpu().numpy())


@contextmanager
def _no_code_in_weights() -> Iterator[None]:
    """Let torch read .pth files as weights only: torchvision would run what one brings."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _tensor(pictures: Float[np.ndarray, "image y x 3"]) -> Float[Tensor, "image 3 y x"]:
    return torch.from_numpy(np.clip(pictures, 0, 1).astype(np.float32)).permute(0, 3, 1, 2)

"""Names of the transformer blocks of an SDXL-shaped U-Net, and where they stand in it.

A hookpoint is one `Transformer2DModel`: `down.2.1` is the second attention block of the third down block. SDXL has
eleven of them; four are read by default (paper §2; names and roles as in the paper's figures).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdxl_sae_kit.errors import HookpointError, did_you_mean

DEFAULT_HOOKPOINTS = ("down.2.1", "mid.0", "up.0.0", "up.0.1")

_PATH = re.compile(r"(?P<block>down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.(?P<index>\d+)")


@dataclass(frozen=True)
class Hookpoint:
    """One transformer block: short name, module path below the U-Net, width `d_in`, how much smaller its grid is."""

    name: str
    path: str
    d_in: int
    reduction: int
    """The grid is the VAE latents' height and width divided by this, rounded up."""

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Height and width of an update here, for VAE latents of this size (64×64 for SDXL at 512 px gives 16×16)."""
        return -(-latent_height // self.reduction), -(-latent_width // self.reduction)


def list_hookpoints(unet: nn.Module) -> dict[str, Hookpoint]:
    """All hookpoints of a U-Net by short name, in the order in which the forward pass reaches them."""
    found = [_describe(unet, path) for path, _ in unet.named_modules() if _PATH.fullmatch(path)]
    stages = ("down", "mid", "up")
    found.sort(key=lambda hookpoint: (stages.index(hookpoint.name.split(".")[0]), hookpoint.name))
    return {hookpoint.name: hookpoint for hookpoint in found}


def resolve(unet: nn.Module, name: str) -> Hookpoint:
    """The hookpoint with this short name (`down.2.1`) or module path (`unet.down_blocks.2.attentions.1`).

    Raises:
        HookpointError: the U-Net has no such block; the message lists those it has.
    """
    known = list_hookpoints(unet)
    path = _PATH.fullmatch(name.removeprefix("unet."))
    short = _short_name(path) if path else name
    if short not in known:
        raise HookpointError(
            f"No hookpoint {name!r} in this U-Net; it has {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return known[short]


def _short_name(path: re.Match[str]) -> str:
    stage, _, number = path["block"].partition("_block")
    return ".".join([stage, *filter(None, [number.removeprefix("s.")]), path["index"]])


def _describe(unet: Any, path: str) -> Hookpoint:
    match = _PATH.fullmatch(path)
    assert match is not None
    name = _short_name(match)
    levels = len(unet.config.block_out_channels)
    stage, *numbers = name.split(".")
    level = {"down": int(numbers[0]), "mid": levels - 1, "up": levels - 1 - int(numbers[0])}[stage]
    d_in = unet.get_submodule(path).proj_out.out_features
    return Hookpoint(name=name, path=path, d_in=d_in, reduction=2**level)

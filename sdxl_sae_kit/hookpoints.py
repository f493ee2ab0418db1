"""Names of the transformer blocks of an SDXL-shaped U-Net, and where they stand in it.

A hookpoint is one `Transformer2DModel`: `down.2.1` is the second attention block of the third down block. SDXL has
eleven of them; four are read by default (paper §2; names and roles as in the paper's figures).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import HookpointError, KitError, did_you_mean

DEFAULT_HOOKPOINTS = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
"""The four hookpoints that are read where none are named: those the paper trained SAEs at (arXiv 2410.22366)."""


@dataclass(frozen=True)
class Hookpoint:
    """One transformer block: short name, module path below the U-Net, width `d_in`, how much smaller its grid is."""

    name: str
    path: str
    d_in: int
    reduction: int
    """The grid's height and width are those of the VAE latents divided by this, rounded up."""

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Height and width of an update here, for VAE latents of this size (64×64 for SDXL at 512 px gives 16×16)."""
        return -(-latent_height // self.reduction), -(-latent_width // self.reduction)


@checked
def list_hookpoints(unet: Any) -> dict[str, Hookpoint]:
    """All hookpoints of a U-Net, or of a pipeline's, by short name, in the order of the forward pass.

    Raises:
        HookpointError: it is no U-Net of SDXL's shape.

    >>> list_hookpoints(pipe)["up.0.1"].d_in                                # doctest: +SKIP
    1280
    """
    found = [
        Hookpoint(f"{name}.{i}", f"{path}.attentions.{i}", attention.proj_out.out_features, 2**level)
        for name, path, stage, level in _stages(unet)
        for i, attention in enumerate(getattr(stage, "attentions", ()))
    ]
    return {hookpoint.name: hookpoint for hookpoint in found}


def _stages(unet: Any) -> list[tuple[str, str, Any, int]]:
    """Name, path and module of what the U-Net goes through one after the other, and how often its grid was halved."""
    unet = getattr(unet, "unet", unet)
    if not hasattr(unet, "down_blocks"):
        raise HookpointError(f"This takes a pipeline or its U-Net, such as load_pipeline('tiny-turbo'), not {unet!r}.")
    lowest = len(unet.config.block_out_channels) - 1
    return [
        *((f"down.{i}", f"down_blocks.{i}", stage, i) for i, stage in enumerate(unet.down_blocks)),
        ("mid", "mid_block", unet.mid_block, lowest),
        *((f"up.{i}", f"up_blocks.{i}", stage, lowest - i) for i, stage in enumerate(unet.up_blocks)),
    ]


def resolve(unet: Any, name: str) -> Hookpoint:
    """The hookpoint with this short name (`down.2.1`) or module path (`unet.down_blocks.2.attentions.1`).

    Raises:
        HookpointError: the U-Net has no such block; the message lists those it has.
    """
    known, name = list_hookpoints(unet), str(name)
    paths = {hookpoint.path: hookpoint for hookpoint in known.values()}
    found = known.get(name) or paths.get(name.removeprefix("unet."))
    if found is None:
        raise HookpointError(
            f"No hookpoint {name!r} in this U-Net; it has {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return found


@dataclass(frozen=True)
class Block:
    """One block that adds something to what it gets: a transformer block, which is a hookpoint, or a resnet."""

    name: str
    """`down.2.1` for a hookpoint, `down.2.resnet.1` for a resnet."""
    path: str
    adds: str
    """Path of the layer whose output is added to the block's input, or to a resnet's shortcut."""


def list_blocks(unet: Any) -> dict[str, Block]:
    """All blocks of a U-Net, or of a pipeline's, by name, in the order of the forward pass: SDXL has 17 + 11 = 28.

    Raises:
        HookpointError: it is no U-Net of SDXL's shape.
    """
    found = []
    for name, path, stage, _ in _stages(unet):
        for i in range(len(stage.resnets)):
            resnet, attention = f"{path}.resnets.{i}", f"{path}.attentions.{i}"
            found.append(Block(f"{name}.resnet.{i}", resnet, f"{resnet}.conv2"))
            if i < len(getattr(stage, "attentions", ())):
                found.append(Block(f"{name}.{i}", attention, f"{attention}.proj_out"))
    return {block.name: block for block in found}


def resolve_block(unet: Any, name: str) -> Block:
    """The block with this name or module path.

    Raises:
        HookpointError: the U-Net has no such block; the message lists those it has.
    """
    known, name = list_blocks(unet), str(name)
    paths = {block.path: block for block in known.values()}
    found = known.get(name) or paths.get(name.removeprefix("unet."))
    if found is None:
        raise HookpointError(f"No block {name!r} in this U-Net; it has {', '.join(known)}.{did_you_mean(name, known)}")
    return found


SDXL = {
    name: Hookpoint(name, f"{block}.attentions.{i}", d_in, reduction)
    for prefix, block, n, d_in, reduction in (
        ("down.1", "down_blocks.1", 2, 640, 2),
        ("down.2", "down_blocks.2", 2, 1280, 4),
        ("mid", "mid_block", 1, 1280, 4),
        ("up.0", "up_blocks.0", 3, 1280, 4),
        ("up.1", "up_blocks.1", 3, 640, 2),
    )
    for i, name in enumerate(f"{prefix}.{i}" for i in range(n))
}
"""The hookpoints of the real SDXL and SDXL Turbo, known without their weights."""


Placed = TypeVar("Placed")
"""What has a hookpoint: SAEs, feature statistics."""


def by_hookpoint(asked: str, name: str, kind: type[Placed], given: Any) -> dict[str, Placed]:
    """One for each hookpoint, from one alone, several, or a mapping, of which the values are taken.

    Args:
        asked: the function that was called, for the message.
        name: what it calls them.
        kind: what each must be.
        given: what it got.

    Raises:
        KitError: there are none, several of one hookpoint, or things of another kind.
    """
    several = given.values() if isinstance(given, Mapping) else given
    items: list[Any] = list(several) if isinstance(several, Iterable) else [several]
    for item in items:
        if not isinstance(item, kind):
            raise KitError(
                f"{asked}: {name} are each a {kind.__name__}, not a {type(item).__name__}. Pass nothing else."
            )
    if not items:
        raise KitError(f"{asked}: there are no {name}. Pass one for each hookpoint, such as saes['up.0.1', 'k10'].")
    ((most, count),) = Counter(item.hookpoint for item in items).most_common(1)
    if count > 1:
        raise KitError(f"{asked}: {count} of these {len(items)} {name} are of {most}. Pass one for each hookpoint.")
    return {item.hookpoint: item for item in items}

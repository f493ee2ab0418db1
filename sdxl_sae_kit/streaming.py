"""Updates made while they are learned from, with nothing on disk: for when a cache would not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.buffers import Tokens
from sdxl_sae_kit.configs import Split
from sdxl_sae_kit.files import canonical_json, sha256
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.observation import as_prompts, check_settings, make_recipe, observing
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.stamps import name_hash


class ActivationStream(Activations):
    """Updates that are made when they are asked for, each time anew; made by `stream`."""

    sample_images = 512

    def __init__(self, pipe: Any, prompts: Prompts, recipe: Mapping[str, Any]) -> None:
        super().__init__(f"stream-{name_hash(recipe)}", recipe, Layout.of(recipe), prompts)
        self.pipe = pipe

    @property
    def digest(self) -> str:
        """What the recipes of SAEs name as their input: the recipe, as there is no data to hash."""
        return sha256(canonical_json(self.recipe).encode())

    def read(
        self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]
    ) -> Float[Tensor, "image row token d_in"]:
        """Updates of some images, which are made for it."""
        self.grid(hookpoint)
        return torch.cat([made[hookpoint] for made in self._observe([hookpoint], np.asarray(images))])

    def _blocks(
        self, hookpoints: Sequence[str], split: Split, rng: np.random.Generator, block: int
    ) -> Iterator[Tokens]:
        for made in self._observe(hookpoints, rng.permutation(self.images(split))):
            yield {hookpoint: updates.flatten(0, 2) for hookpoint, updates in made.items()}

    def _observe(
        self, hookpoints: Sequence[str], images: NDArray[np.integer]
    ) -> Iterator[dict[str, Float[Tensor, "image row token d_in"]]]:
        """The updates of these images, a batch of them at a time."""
        recipe = {**self.recipe, "hookpoints": {h: self.recipe["hookpoints"][h] for h in hookpoints}}
        for start in range(0, len(images), recipe["batch_size"]):
            part = images[start : start + recipe["batch_size"]].tolist()
            with observing(self.pipe, self.prompts, recipe) as observe:  # no hooks while the caller does other things
                updates, _ = observe(part)
            yield {hookpoint: self.layout.tensor(updates[hookpoint]) for hookpoint in hookpoints}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{h} {height}×{width}×{d}" for h, (height, width, d) in self.layout.hookpoints.items())
        return (
            f"ActivationStream {self.name}: {self.n_images:,} images of {self.recipe['model']}, made when they are "
            f"needed\n  updates: {shapes} ({self.layout.dtype})"
        )


@checked
def stream(
    pipe: Any, prompts: Prompts | Iterable[str], hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS, **settings: Any
) -> ActivationStream:
    """Updates for training that are made on the way and kept nowhere: give it to `train` in place of a cache.

    Each pass makes every image anew, so this costs a run of the U-Net where a cache costs a reading of the disk. Use it
    when `plan` says that a cache does not fit. Tokens mix in a buffer of bounded memory (`batches(memory=…)`), as they
    do from a cache; one batch of images lies in memory beside it.

    Args:
        pipe, prompts, hookpoints: as `collect` takes them.
        settings: those of `collect`, but for `images` (no picture is made) and `store`.

    Raises:
        HookpointError, PromptError, KitError: what `collect` would refuse.

    >>> batches = stream(pipe, prompts).batches(["mid.0"], 4096)            # doctest: +SKIP
    >>> next(batches)["mid.0"].shape                                        # doctest: +SKIP
    torch.Size([4096, 96])
    """
    check_settings(settings, but=["images"])
    prompts = as_prompts(prompts)
    return ActivationStream(pipe, prompts, make_recipe(pipe, prompts, hookpoints, **settings, images=None))

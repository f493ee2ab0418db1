"""Updates of many images, wherever they come from: what training and evaluation read (`ActivationCache`, `stream`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.buffers import Tokens, mix
from sdxl_sae_kit.configs import Site, Split
from sdxl_sae_kit.errors import HookpointError, KitError, did_you_mean
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.prompts import Prompts

MEMORY = 512 * 2**20
"""Bytes that shuffling may take unless told otherwise."""

_PART_BYTES = 64 * 2**20


class Activations(ABC):
    """Updates of n images at some hookpoints.

    A row is one image at one denoising step in one guidance half; it holds one update: `height × width` tokens of
    `d_in` numbers, or some of them where tokens were sampled.
    """

    sample_images: int | None = None
    """Of how many images `sample` takes tokens; None takes as many as there are tokens wanted."""

    def __init__(self, name: str, recipe: Mapping[str, Any], layout: Layout, prompts: Prompts) -> None:
        self.name, self.recipe, self.layout, self.prompts = name, recipe, layout, prompts

    @property
    @abstractmethod
    def digest(self) -> str:
        """What the recipes of SAEs name as their input."""

    @abstractmethod
    def read(
        self, hookpoint: str, images: Sequence[int] | NDArray[np.integer]
    ) -> Float[Tensor, "image row token d_in"]:
        """Updates of some images, by index; rows go step by step, uncond before cond."""

    @abstractmethod
    def _blocks(
        self, hookpoints: Sequence[str], split: Split, rng: np.random.Generator, block: int
    ) -> Iterator[Tokens]:
        """Every token of a split once, in blocks of about so many tokens from places all over."""

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Names of the hookpoints it holds."""
        return tuple(self.layout.hookpoints)

    def grid(self, hookpoint: str) -> tuple[int, int]:
        """Height and width of an update, in tokens."""
        height, width, _ = self._shape(hookpoint)
        return height, width

    def d_in(self, hookpoint: str) -> int:
        """How many numbers a token has."""
        return self._shape(hookpoint)[2]

    def _shape(self, hookpoint: str) -> tuple[int, int, int]:
        shapes = self.layout.hookpoints
        if hookpoint not in shapes:
            raise HookpointError(
                f"{self.name} has no updates of {hookpoint!r}; it has {', '.join(shapes)}. Collect it too, or take one "
                f"of these.{did_you_mean(str(hookpoint), shapes)}"
            )
        return shapes[hookpoint]

    @property
    def n_images(self) -> int:
        """How many images."""
        return len(self.prompts)

    @property
    def rows_per_image(self) -> int:
        """Denoising steps × guidance halves."""
        return self.layout.rows_per_image

    def row(self, step: int, half: str = "cond") -> int:
        """Which of an image's rows is this denoising step in this guidance half.

        Raises:
            KitError: it was not collected.
        """
        layout = self.layout
        if step not in layout.steps or half not in layout.halves:
            raise KitError(
                f"{self.name} has no step {step!r} of {half}; it has steps {', '.join(map(str, layout.steps))} of "
                f"{' and '.join(layout.halves)}. Take one of these, or collect again."
            )
        return layout.steps.index(step) * len(layout.halves) + layout.halves.index(half)

    def site(self, hookpoint: str) -> Site:
        """Where the updates of a hookpoint come from."""
        r = self.recipe
        return Site(r["model"], r["revision"], hookpoint, r["num_inference_steps"], r["guidance_scale"])

    def tokens_per_row(self, hookpoint: str) -> int:
        """Tokens of each update that are there: the whole grid, or as many as were sampled."""
        self._shape(hookpoint)
        return self.layout.n_tokens(hookpoint)

    def n_tokens(self, hookpoint: str, split: Split = "all") -> int:
        """How many tokens of a hookpoint a split holds."""
        return len(self.images(split)) * self.rows_per_image * self.tokens_per_row(hookpoint)

    def steps(self, hookpoint: str, batch_size: int) -> int:
        """Batches of training tokens in one epoch."""
        return -(-self.n_tokens(hookpoint, "train") // batch_size)

    def images(self, split: Split = "all") -> Int[np.ndarray, "image"]:
        """Indices of the images of a split; the split goes by prompt, so no text is on both sides.

        Raises:
            KitError: no such split.
        """
        held_out = self.prompts.held_out
        chosen = {"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}
        if split not in chosen:
            raise KitError(f"No split {split!r}; there are {', '.join(chosen)}.{did_you_mean(str(split), chosen)}")
        return np.flatnonzero(chosen[split])

    def parts(self, hookpoint: str, images: NDArray[np.integer]) -> list[NDArray[np.integer]]:
        """These images in parts whose updates take about 64 MB in float32, to be read one after the other."""
        per_image = 4 * self.rows_per_image * self.tokens_per_row(hookpoint) * self.d_in(hookpoint)
        n_parts = -(-len(images) * per_image // _PART_BYTES)
        return np.array_split(images, max(1, min(n_parts, len(images))))

    def by_image(self, hookpoint: str, split: Split, max_images: int) -> Iterator[Float[Tensor, "image token d_in"]]:
        """Updates of at most so many images of a split, spread over all of it, in parts of about 64 MB in float32.

        Raises:
            KitError: no such split, or none of the images is in it.
        """
        images = self.images(split)
        if not len(images):
            raise KitError(f"{self.name} has no images in the split {split!r}. Ask another, or collect more prompts.")
        if len(images) > max_images:
            images = images[np.linspace(0, len(images) - 1, max_images).astype(int)]
        for part in self.parts(hookpoint, images):
            yield self.read(hookpoint, part).flatten(1, 2).float()

    def batches(
        self,
        hookpoints: Sequence[str],
        batch_size: int,
        *,
        split: Split = "train",
        seed: int = 0,
        epoch: int = 0,
        memory: int = MEMORY,
    ) -> Iterator[dict[str, Float[Tensor, "token d_in"]]]:
        """Shuffled tokens in float32, the same places for every hookpoint; the last batch is what remains.

        The hookpoints must share a grid. Tokens pass through a buffer of `memory` bytes in which those of many images
        mix; nothing is dropped or repeated, and the order depends only on the other arguments.

        Raises:
            HookpointError: hookpoints of different grids.
            KitError: no such split, or a batch size or seed that is none.
        """
        hookpoints = [hookpoints] if isinstance(hookpoints, str) else hookpoints
        batch_size, seed = whole_number("batch_size", batch_size), whole_number("seed", seed, least=0)
        if len({self.grid(hookpoint) for hookpoint in hookpoints}) != 1:
            grids = ", ".join(f"{h} {self.grid(h)[0]}×{self.grid(h)[1]}" for h in hookpoints) or "none"
            raise HookpointError(f"batches needs hookpoints of one grid, not {grids}. Call it for each grid.")
        # as if all hookpoints of the grid were asked for: what each gets must not depend on the others
        grid = self.grid(hookpoints[0])
        width = sum(self.d_in(h) for h in self.hookpoints if self.grid(h) == grid) * self.layout.stored_dtype.itemsize
        capacity = min(memory // width, self.n_tokens(hookpoints[0], split))
        rng = np.random.default_rng([seed, epoch])
        block = min(batch_size, max(1, capacity))
        return mix(self._blocks(hookpoints, split, rng, block), batch_size, capacity, rng)

    def sample(self, hookpoint: str, n: int, *, seed: int = 0) -> Float[Tensor, "token d_in"]:
        """About n training tokens (at most all of them) drawn from images all over, in float32.

        Raises:
            KitError: there are no training images.
        """
        rng = np.random.default_rng(seed)
        images = self.images("train")
        if not len(images):
            raise KitError(f"{self.name} has no training images to sample from. Collect more prompts.")
        images = np.sort(rng.permutation(images)[: max(1, min(len(images), n, self.sample_images or n))])
        per_image = -(-n // len(images))
        chosen = []
        for part in self.parts(hookpoint, images):
            tokens = self.read(hookpoint, part).flatten(1, 2)
            picks = torch.from_numpy(rng.random(tokens.shape[:2])).argsort(1)[:, :per_image]
            chosen.append(tokens.gather(1, picks[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1).float())
        return torch.cat(chosen)[:n]

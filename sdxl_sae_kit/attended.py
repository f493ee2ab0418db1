"""Masks from cross-attention: where an image attends to a word of its prompt while it is made.

A transformer block's `attn2` lets every token ask the words of the prompt, so softmax(q kᵀ / √d) tells how much each
word is used where. No other model is needed, but it tells only of words that are in the prompt, and coarsely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, Hookpoint, resolve
from sdxl_sae_kit.pipelines import chosen, chosen_guidance, describe, generate

if TYPE_CHECKING:
    from sdxl_sae_kit.segmenters import Shot


class AttentionSegmenter:
    """The model's own attention to the words asked for, while the picture is made once more.

    The attention of a hookpoint's transformer layers is averaged over heads, layers, steps and the tokens of the words,
    and brought to the picture's size and to the range 0 to 1; the mask is where it reaches the threshold. The words
    must be in the prompt. "foreground" is, where the prompt does not say it, what does not attend to "background".

    Args:
        pipe: what the pictures are drawn with.
        hookpoints: the transformer blocks to read.
        threshold: share of the attention's range, 0 to 1.
        num_inference_steps: as the pictures were drawn.
        guidance_scale: as the pictures were drawn; with guidance only the half of the prompt is read.

    Raises:
        HookpointError: the U-Net has no such block.
        KitError: impossible threshold, steps or guidance.

    Source: Hertz et al. 2022, Prompt-to-Prompt (arXiv 2208.01626), the averages of cross-attention maps.

    >>> AttentionSegmenter(pipe)([shot], ["dog"])[0].shape                                            # doctest: +SKIP
    (512, 512)
    """

    def __init__(
        self,
        pipe: Any,
        hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS,
        *,
        threshold: float = 0.5,
        num_inference_steps: int = 4,
        guidance_scale: float = 0.0,
    ) -> None:
        if not 0 < threshold <= 1:
            raise KitError(f"AttentionSegmenter: threshold is a share of the range, above 0 to 1, not {threshold!r}.")
        model = describe(pipe)
        self._pipe, self._threshold = pipe, threshold
        self._hookpoints = [resolve(pipe.unet, name) for name in hookpoints]
        self._settings: dict[str, Any] = {
            "num_inference_steps": chosen("num_inference_steps", num_inference_steps, 4),
            "guidance_scale": chosen_guidance(guidance_scale, 0.0),
        }
        read = ", ".join(hookpoint.name for hookpoint in self._hookpoints)
        self.name = (
            f"attention of {model.name} {model.revision} at {read} from {threshold:g} on, {num_inference_steps} steps, "
            f"guidance {guidance_scale:g}"
        )

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Bool[np.ndarray, "_y _x"]]:
        """One mask of the picture's size for every shot; nowhere, where attention is the same everywhere.

        Raises:
            KitError: words are not in the prompt, or the pictures have different sizes.
        """
        maps = self.maps(shots, asked)
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        attended = (maps - low >= self._threshold * (high - low)) & (high > low)
        swapped = [self._tokens(shot.prompt, words)[1] for shot, words in zip(shots, asked, strict=True)]
        return [~mask if swap else mask for mask, swap in zip(attended, swapped, strict=True)]

    def maps(self, shots: Sequence[Shot], asked: Sequence[str]) -> Float[np.ndarray, "shot y x"]:
        """The mean probability with which each place of the picture attends to a token of the words, 0 to 1.

        Raises:
            KitError: words are not in the prompt, or the pictures have different sizes.
        """
        tokens = [self._tokens(shot.prompt, words)[0] for shot, words in zip(shots, asked, strict=True)]
        sizes = {shot.picture.shape[:2] for shot in shots}
        if len(sizes) != 1:
            raise KitError(f"AttentionSegmenter draws pictures of one size at a time, not of {len(sizes)} sizes.")
        ((height, width),) = sizes
        scale = self._pipe.vae_scale_factor
        readings = [_Reading(each, each.grid(height // scale, width // scale), tokens) for each in self._hookpoints]
        with _hooked(self._pipe, readings):
            prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
            generate(self._pipe, prompts, seeds, height=height, width=width, output_type="latent", **self._settings)
        total = torch.stack([each.resized(height, width) for each in readings]).sum(0)
        return np.asarray((total / sum(each.calls for each in readings)).numpy())

    def _tokens(self, prompt: str, words: str) -> tuple[list[int], bool]:
        """Which tokens of the prompt to read, and whether the mask is what does not attend to them."""
        for sought in (words, "background") if words == "foreground" else (words,):
            if found := _occurrences(self._pipe.tokenizer, prompt, sought):
                return found, sought != words
        raise KitError(
            f"AttentionSegmenter knows words of the prompt only, and {words!r} is not in what the model reads of "
            f"{prompt!r}. Ask for words that are there, or take another segmenter."
        )


def _occurrences(tokenizer: Any, prompt: str, words: str) -> list[int]:
    """Where among the prompt's tokens, which are cut where the model stops reading, those of the words are."""
    read = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    sought = tokenizer(words, add_special_tokens=False).input_ids
    starts = [i for i in range(len(read)) if sought and read[i : i + len(sought)] == sought]
    return sorted({start + i for start in starts for i in range(len(sought))})


@dataclass
class _Reading:
    """Adds up what the layers of one hookpoint attend to."""

    hookpoint: Hookpoint
    grid: tuple[int, int]
    tokens: Sequence[Sequence[int]]
    """Of every shot's prompt those whose probabilities are averaged."""
    total: Float[Tensor, "shot height width"] = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(len(self.tokens), *self.grid)

    @torch.no_grad()
    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n = len(self.tokens)  # with guidance the batch is [uncond ; cond]
        q, k = (
            layer(states[-n:]).unflatten(2, (attention.heads, -1)).transpose(1, 2).float()
            for layer, states in ((attention.to_q, args[0]), (attention.to_k, kwargs["encoder_hidden_states"]))
        )  # (shot, head, token, channel) and (shot, head, word, channel)
        probabilities = (q @ k.mT * attention.scale).softmax(-1).mean(1).cpu()  # (shot, token, word)
        self.total += torch.stack(
            [each[:, list(tokens)].mean(1) for each, tokens in zip(probabilities, self.tokens, strict=True)]
        ).unflatten(1, self.grid)
        self.calls += 1

    def resized(self, height: int, width: int) -> Float[Tensor, "shot y x"]:
        return F.interpolate(self.total[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


@contextmanager
def _hooked(pipe: Any, readings: Sequence[_Reading]) -> Iterator[None]:
    """Let each read the cross-attention of its hookpoint's layers; compiled code calls no hooks, so none is."""
    unet: nn.Module = getattr(pipe.unet, "_orig_mod", pipe.unet)
    handles: list[Any] = []
    try:
        with torch.compiler.set_stance("force_eager"):
            for reading in readings:
                for layer in unet.get_submodule(reading.hookpoint.path).transformer_blocks:  # type: ignore[union-attr]
                    handles.append(layer.attn2.register_forward_pre_hook(reading, with_kwargs=True))
            yield
    finally:
        for handle in handles:
            handle.remove()

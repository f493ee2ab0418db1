"""Masks from cross-attention: where an image attends to a word of its prompt while it is made.

A transformer block's `attn2` lets every token ask the words of the prompt, so softmax(q kᵀ / √d) tells how much each
word is used where. No other model is needed, but it tells only of words that are in the prompt, and coarsely.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, Hookpoint, resolve
from sdxl_sae_kit.pipelines import chosen, chosen_guidance, describe, generate

if TYPE_CHECKING:
    from sdxl_sae_kit.segmenters import Shot

FOREGROUND = "foreground"
SAME = 2 / 255
"""Mean difference of colours from which on a picture that is drawn again is another one."""
_PREPOSITIONS = {
    "above", "across", "against", "along", "amid", "among", "around", "at", "before", "behind", "below", "beneath",
    "beside", "between", "beyond", "by", "during", "from", "in", "inside", "into", "left", "near", "next", "off",
    "on", "onto", "outside", "over", "right", "through", "to", "toward", "towards", "under", "underneath", "upon",
    "with", "without",
}  # fmt: skip
"""Also "left" and "right", which begin "left of" and "right of"; "of" is none, as in "a cup of tea"."""
_EMPTY = {
    "a", "an", "and", "his", "her", "its", "of", "the", "their", "photo", "photograph", "picture", "portrait",
}  # fmt: skip
"""Words that name no thing of the picture."""


class AttentionSegmenter:
    """The model's own attention to the words asked for, while the picture is made once more.

    The attention of a hookpoint's transformer layers is averaged over heads, layers, steps and the tokens of the words,
    and brought to the picture's size and to the range 0 to 1; the mask is where it reaches the threshold.

    Words that the prompt does not say as they are asked for are looked for in part: the longest run of them that it
    says counts, the last such first ("laptop screen": "screen", then "laptop"). "foreground" is the prompt's subject:
    all its words before the first preposition such as "on", save articles, "of" and the like.

    Args:
        pipe: what the pictures are drawn with.
        hookpoints: the transformer blocks to read.
        threshold: share of the attention's range, above 0 and at most 1.
        num_inference_steps: as the pictures were drawn; by default as `riebench` draws them.
        guidance_scale: likewise; with guidance only the half of the prompt is read.
        batch_size: pictures drawn at once.

    Raises:
        HookpointError: the U-Net has no such block.
        KitError: no hookpoints, impossible threshold, steps, guidance or batch size.

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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 20,
    ) -> None:
        _check_share(threshold)
        model = describe(pipe)
        self._pipe, self._threshold = pipe, threshold
        self._batch_size = whole_number("AttentionSegmenter: batch_size", batch_size)
        names = [hookpoints] if isinstance(hookpoints, str) else hookpoints
        self._hookpoints = [resolve(pipe.unet, name) for name in names]
        if not self._hookpoints:
            raise KitError("AttentionSegmenter reads one hookpoint or more, such as ['up.0.1'], not none.")
        self._settings = few_steps(pipe, num_inference_steps, guidance_scale)
        read = ", ".join(hookpoint.name for hookpoint in self._hookpoints)
        self.name = (
            f"attention of {model.name} {model.revision} at {read} from {threshold:g} on, "
            f"{self._settings['num_inference_steps']} steps, guidance {self._settings['guidance_scale']:g}"
        )

    def __call__(self, shots: Sequence[Shot], asked: Sequence[str]) -> list[Bool[np.ndarray, "_y _x"]]:
        """One mask of the picture's size for every shot; nowhere, where attention is the same everywhere.

        Raises:
            KitError: no words asked for are in a prompt, or the pictures have different sizes.
            ModelError: a picture was not drawn with this model and these settings.
        """
        maps = self.maps(shots, asked)
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        return list((maps - low >= self._threshold * (high - low)) & (high > low))

    def maps(self, shots: Sequence[Shot], asked: Sequence[str]) -> Float[np.ndarray, "shot y x"]:
        """The mean probability with which each place of the picture attends to a token of the words, 0 to 1.

        A prompt and seed that come more than once are drawn once. Words and sizes are looked at before.

        Raises:
            KitError: no words asked for are in a prompt, or the pictures have different sizes.
            ModelError: a picture was not drawn with this model and these settings.
        """
        tokens = [tokens_of(self._pipe.tokenizer, shot.prompt, words) for shot, words in zip(shots, asked, strict=True)]
        sizes = {shot.picture.shape[:2] for shot in shots}
        if len(sizes) != 1:
            raise KitError(f"AttentionSegmenter draws pictures of one size at a time, not of {len(sizes)} sizes.")
        made = list(dict.fromkeys(map(_made, shots)))
        found = np.empty((len(shots), *sizes.pop()), dtype=np.float32)
        for start in range(0, len(made), self._batch_size):
            batch = {each: at for at, each in enumerate(made[start : start + self._batch_size])}
            there = [at for at, shot in enumerate(shots) if _made(shot) in batch]
            found[there] = self._read(batch, [shots[at] for at in there], [tokens[at] for at in there])
        return found

    def _read(
        self, batch: Mapping[tuple[str, int], int], shots: Sequence[Shot], tokens: Sequence[Sequence[int]]
    ) -> Float[np.ndarray, "shot y x"]:
        """Draws the prompts and seeds of a batch, of which each shot shows one."""
        height, width = shots[0].picture.shape[:2]
        scale, places = self._pipe.vae_scale_factor, [batch[_made(shot)] for shot in shots]
        readings = [
            _Reading(each, each.grid(height // scale, width // scale), len(batch), places, tokens)
            for each in self._hookpoints
        ]
        with _hooked(self._pipe, readings):
            prompts, seeds = zip(*batch, strict=True)
            drawn = generate(self._pipe, prompts, seeds, height=height, width=width, output_type="np", **self._settings)
        for shot, at in zip(shots, places, strict=True):
            self._check_same(shot, drawn[at])
        total = torch.stack([each.resized(height, width) for each in readings]).sum(0)
        return np.asarray((total / sum(each.calls for each in readings)).numpy())

    def _check_same(self, shot: Shot, drawn: Float[np.ndarray, "y x 3"]) -> None:
        """Attention tells of a picture only if it is the one that was drawn with it."""
        apart = float(np.abs(shot.picture - drawn).mean())
        if not apart < SAME:
            raise ModelError(
                f"AttentionSegmenter draws item {shot.item!r} ({shot.side}) otherwise than it was: colours differ by "
                f"{apart * 255:.1f} of 255 on average. It was made by another model or with other steps or guidance: "
                f"pass num_inference_steps= and guidance_scale= as the pictures had; it draws with "
                f"{self._settings['num_inference_steps']} steps and guidance {self._settings['guidance_scale']:g}."
            )


def _check_share(threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 < float(threshold) <= 1:
        raise KitError(f"AttentionSegmenter: threshold is a share of the range, above 0 to 1, not {threshold!r}.")


def few_steps(pipe: Any, num_inference_steps: int | None = None, guidance_scale: float | None = None) -> dict[str, Any]:
    """How a benchmark of edits draws unless told otherwise: in 4 steps without guidance.

    A model that is meant to be guided draws nothing good so; its pictures have its own steps and guidance.

    Raises:
        KitError: impossible steps or guidance.
    """
    meant = describe(pipe)
    steps, guidance = (meant.num_inference_steps, meant.guidance_scale) if meant.guidance_scale > 1 else (4, 0.0)
    return {
        "num_inference_steps": chosen("num_inference_steps", num_inference_steps, steps),
        "guidance_scale": chosen_guidance(guidance_scale, guidance),
    }


def _made(shot: Shot) -> tuple[str, int]:
    """What tells how to draw it."""
    return shot.prompt, shot.seed


# Words of a prompt --------------------------------------------------------------------------------------------------


def tokens_of(tokenizer: Any, prompt: str, words: str) -> list[int]:
    """Which of the tokens that the model reads of a prompt are asked for, by the rules of `AttentionSegmenter`.

    Args:
        tokenizer: a CLIP's.
        prompt: what the picture is drawn for.
        words: those asked for, or "foreground".

    Raises:
        KitError: there are none.
    """
    if words == FOREGROUND:
        subject = _subject(prompt)
        found = {at for word in _content(subject) for at in _occurrences(tokenizer, subject, word)}
        missing = "no subject: no words before its first preposition"
    else:
        found = next(filter(None, (_occurrences(tokenizer, prompt, run) for run in _runs(words))), set())
        missing = "none of these words, as far as the model reads"
    if not found:
        raise KitError(
            f"AttentionSegmenter knows words of the prompt only; it was asked for {words!r}, and {prompt!r} has "
            f"{missing}. Ask for words that are there, or take another segmenter."
        )
    return sorted(found)


def _subject(prompt: str) -> str:
    """The prompt up to its first preposition."""
    ends = (word.start() for word in re.finditer(r"[^\W_]+", prompt) if word[0].lower() in _PREPOSITIONS)
    return prompt[: next(ends, len(prompt))]


def _content(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+", text) if word.lower() not in _EMPTY | _PREPOSITIONS]


def _runs(words: str) -> list[str]:
    """The words as they are, then shorter and shorter runs that begin and end with content, the last first."""
    said = words.split()
    lengths = range(len(said), 0, -1)
    runs = [said[start : start + n] for n in lengths for start in range(len(said) - n, -1, -1)]
    return [words, *(" ".join(run) for run in runs if _content(run[0]) and _content(run[-1]))]


def _occurrences(tokenizer: Any, prompt: str, words: str) -> set[int]:
    """Where among the prompt's tokens, which are cut where the model stops reading, those of the words are."""
    read = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    sought = tokenizer(words, add_special_tokens=False).input_ids
    after = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(read)]  # "ant" is not in "giant"
    starts = [i for i in range(1, len(read)) if (i == 1 or after[i - 1]) and read[i : i + len(sought)] == sought]
    return {start + i for start in starts for i in range(len(sought))}


# Attention ----------------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """Adds up what the layers of one hookpoint attend to."""

    hookpoint: Hookpoint
    grid: tuple[int, int]
    n: int
    """Pictures that are drawn."""
    places: Sequence[int]
    """Which of them each shot shows."""
    tokens: Sequence[Sequence[int]]
    """Of every shot's prompt those whose probabilities are averaged."""
    total: Float[Tensor, "shot height width"] = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(len(self.tokens), *self.grid)

    @torch.no_grad()
    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q, k = (  # with guidance the batch is [uncond ; cond]
            layer(states[-self.n :]).unflatten(2, (attention.heads, -1)).transpose(1, 2).float()
            for layer, states in ((attention.to_q, args[0]), (attention.to_k, kwargs["encoder_hidden_states"]))
        )  # (picture, head, token, channel) and (picture, head, word, channel)
        probabilities = (q @ k.mT * attention.scale).softmax(-1).mean(1).cpu()  # (picture, token, word)
        self.total += torch.stack(
            [probabilities[at][:, list(tokens)].mean(1) for at, tokens in zip(self.places, self.tokens, strict=True)]
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

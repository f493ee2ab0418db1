"""Transport of features: what an edited prompt's picture has is added to the original's, what it has not is removed.

Both prompts are drawn from the same seed, and the original once more, with a change made to its updates at every step.
With F(t, p, f) the features of either at step t and token p, d_f what one unit of feature f adds, m_e and m_o the
tokens of the edited and of the original picture that count, and a_e, a_o the means of |F| · ‖d_f‖ over these at the
first step (d_f has length 1 unless the SAE normalises its input),

    score = a_e / Σ a_e − a_o / Σ a_o             over the features of all blocks of a setting together
    delta = strength · (Σ F_e · d_f · m_e         over the k features of highest score, as far as it is above 0
                      − Σ F_o · d_f · m_o)        over the k features of lowest score, as far as it is below 0

A feature of score 0, such as one that is active in neither picture, would do nothing that favours the edit. Ties go to
the feature that comes first. Where not spatial, each F is replaced by its mean over its picture's tokens that count.

    sae           features are those of the blocks' SAEs
    sae_adaptive  the same; what is removed is what they are in the picture being made
    steering      all channels of the updates themselves: delta = strength · (u_e · m_e − u_o · m_o)
    neurons       features are the outputs of the gated layers in the blocks, which are changed there
    random        as many features added and removed as `sae` would, but others, and none on both sides: any that are
                  active in the edited or in the original picture at the first step; fewer where there are too few

With guidance the cond half is read and changed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.files import sha256
from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.hooks import Call, Recording, record, rewrite
from sdxl_sae_kit.interventions import check_fit
from sdxl_sae_kit.masks import covered
from sdxl_sae_kit.neurons import hookpoint_of, list_layers, record_neurons, rewrite_neurons
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.choices import Choice, Pair, draw_alike, rank
from sdxl_sae_kit.studies.distances import Pictures
from sdxl_sae_kit.studies.traces import Encoder, Mask, Trace, Values, Written, mean_under

METHODS = ("sae", "sae_adaptive", "steering", "neurons", "random")
"""What transports something."""
ENDS = ("none", "prompt")
"""The floor, the original prompt's own picture, and the ceiling, the edited one's: nothing is transported."""


@dataclass(frozen=True)
class Setting:
    """One way to edit.

    Args:
        method: one of `METHODS`, or of `ENDS`.
        k: at most how many features are added, and how many removed, over all blocks together; None where none are
            chosen.
        strength: what the change is multiplied by, from 0.
        blocks: the hookpoints at which the original's updates are changed.

    Raises:
        KitError: an unknown method, or what it cannot have.

    >>> Setting("sae", 24, 1.0, ("down.2.1", "mid.0")).key
    'sae, k 24, strength 1, down.2.1+mid.0'
    """

    method: str
    k: int | None
    strength: float
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        known = (*METHODS, *ENDS)
        if self.method not in known:
            raise KitError(
                f"There is no method {self.method!r}; there are {', '.join(known)}.{did_you_mean(self.method, known)}"
            )
        if self.method in ("steering", *ENDS):
            if self.k is not None:
                raise KitError(f"{self.method} chooses no features, so its k is None, not {self.k!r}.")
        else:
            whole_number(f"k of {self.method}", self.k)
        if not (isfinite(self.strength) and self.strength >= 0):
            raise KitError(f"The strength of {self.method} is a finite number from 0 on, not {self.strength!r}.")
        if self.method in METHODS and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise KitError(f"{self.method} needs one hookpoint or more, each once, not {self.blocks!r}.")

    @property
    def key(self) -> str:
        """Text that no other setting has."""
        k = "" if self.k is None else f", k {self.k}"
        strength = np.format_float_positional(self.strength, trim="-")
        return self.method if self.method in ENDS else f"{self.method}{k}, strength {strength}, {'+'.join(self.blocks)}"


@runtime_checkable
class TwoPrompts(Protocol):
    """Of an item, what is needed here: two prompts and the seed of both pictures."""

    @property
    def original(self) -> str:
        """The prompt as it is."""

    @property
    def edited(self) -> str:
        """The prompt as it is to be."""

    @property
    def seed(self) -> int:
        """Of both pictures."""


# What two prompts did -------------------------------------------------------------------------------------------------


Means = Float[np.ndarray, "item feature"]


@dataclass
class _Side:
    """What one of the two prompts of every item did."""

    pictures: Pictures
    updates: Recording
    neurons: Recording | None

    def keep(self, items: list[int]) -> None:
        self.pictures = self.pictures[items]
        for recording in (self.updates, self.neurons):
            if recording is not None:
                recording.keep(items)


class Source:
    """What two prompts of a batch of items did, at all steps.

    Attributes:
        blocks: (height, width) of the grid by hookpoint.
        n_steps: denoising steps.
    """

    def __init__(
        self, pipe: Any, seeds: Sequence[int], encoders: Mapping[str, Encoder], sides: Sequence[_Side]
    ) -> None:
        self.pipe, self.seeds, self.device, self._sides = pipe, tuple(seeds), _device(pipe), tuple(sides)
        self.n_steps, first = len(sides[0].updates.steps), sides[0].updates
        self.blocks = {block: (first.update(block).shape[1], first.update(block).shape[2]) for block in encoders}
        self._encoders = encoders
        self._traces: dict[tuple[str, str], tuple[Trace, Trace]] = {}

    @classmethod
    def run(
        cls,
        pipe: Any,
        items: Sequence[TwoPrompts],
        saes: Mapping[str, SAE],
        settings: Mapping[str, Any],
        neurons: bool = False,
    ) -> Source:
        """Draw both prompts of every item, in one batch each, and keep what the blocks do at every step.

        Kept are the updates in the model's dtype on the CPU: 21 MB for each item of real SDXL at 512 pixels, four
        hookpoints and four steps. With neurons it is 840 MB more, so leave them out where no setting needs them.

        Args:
            pipe: the SDXL pipeline of diffusers.
            items: what has two prompts and a seed.
            saes: by hookpoint.
            settings: of `generate`, such as num_inference_steps; the original is to be drawn again with the same.
            neurons: whether to keep the neurons of these hookpoints too.

        Raises:
            KitError: no SAE, or one whose features have no direction that is the same for all tokens.
            ArtifactError: an SAE of another hookpoint or width.
        """
        if not saes:
            raise KitError("Transport needs an SAE for each hookpoint that it may edit, and got none.")
        for block, sae in saes.items():
            sae.check_site(block)
            check_fit(pipe, sae)
        encoders = {block: Encoder(sae, _device(pipe)) for block, sae in saes.items()}
        seeds = [item.seed for item in items]
        texts = [item.original for item in items], [item.edited for item in items]
        return cls(pipe, seeds, encoders, [_watch(pipe, each, seeds, list(saes), settings, neurons) for each in texts])

    @property
    def original(self) -> Pictures:
        """Pictures of the original prompts, colours 0 to 1."""
        return self._sides[0].pictures

    @property
    def edited(self) -> Pictures:
        """Pictures of the edited prompts."""
        return self._sides[1].pictures

    def keep(self, items: Sequence[int]) -> None:
        """Forget what all but some of the items did, by their places."""
        kept = list(items)
        self.seeds = tuple(self.seeds[at] for at in kept)
        self._traces.clear()
        for side in self._sides:
            side.keep(kept)

    def masked(
        self,
        masks: Sequence[tuple[Bool[np.ndarray, "_y _x"], Bool[np.ndarray, "_y2 _x2"]]],
        *,
        spatial: bool = True,
        seed: int = 0,
    ) -> Transport:
        """What counts in each item's original and edited picture: masks of any size that cover the whole picture.

        Args:
            masks: for each item; see `masks.covered`.
            spatial: whether every token gets its own features rather than their mean over the mask.
            seed: of the choice of random features, beside the item's own.

        Raises:
            KitError: not as many as items.
        """
        if len(masks) != len(self.seeds):
            raise KitError(f"There are {len(masks)} pairs of masks for {len(self.seeds)} items. Pass one for each.")
        fitted = {
            block: tuple(
                torch.from_numpy(np.stack([covered(pair[side], grid).reshape(-1, 1) for pair in masks]))
                .to(self.device)
                .float()
                for side in (0, 1)
            )
            for block, grid in self.blocks.items()
        }
        return Transport(self, fitted, spatial, seed)

    def places(self, method: str, block: str) -> list[str]:
        """Where a method changes something at a hookpoint: there itself, or in each of its layers."""
        return list(list_layers(self.pipe.unet, block)) if method == "neurons" else [block]

    def traces(self, method: str, place: str) -> tuple[Trace, Trace]:
        """The features that a method transports at a place, of the original and of the edited prompt.

        Raises:
            KitError: neurons were not kept.
        """
        kind = method if method in ("steering", "neurons") else "sae"
        if (kind, place) not in self._traces:
            original, edited = (self._read(kind, place, side) for side in self._sides)
            self._traces[kind, place] = original, edited
        return self._traces[kind, place]

    def _read(self, kind: str, place: str, side: _Side) -> Trace:
        if kind == "neurons":
            if side.neurons is None:
                raise KitError("These prompts were drawn without keeping neurons. Run the source with neurons=True.")
            return Values([side.neurons.update(place, step) for step in range(self.n_steps)], self.device)
        updates = [side.updates.update(place, step).flatten(1, 2) for step in range(self.n_steps)]
        return Values(updates, self.device) if kind == "steering" else self._encoders[place].read(updates)

    def live(self, block: str, update: Float[Tensor, "item token d_in"]) -> Trace:
        """The features of an update as it is being made: a trace of one step."""
        return self._encoders[block].read([update])


def _watch(
    pipe: Any, texts: list[str], seeds: list[int], blocks: list[str], settings: Mapping[str, Any], neurons: bool
) -> _Side:
    with record(pipe, blocks) as updates, record_neurons(pipe, blocks) if neurons else nullcontext() as kept:
        drawn = generate(pipe, texts, seeds, **settings, output_type="np")
    return _Side(np.asarray(drawn, dtype=np.float32), updates, kept)


def _device(pipe: Any) -> torch.device:
    """Where the pipeline computes: not where weights wait that are offloaded."""
    found: torch.device = getattr(pipe, "_execution_device", pipe.unet.device)
    return found


# What is changed ------------------------------------------------------------------------------------------------------


class Transport:
    """Edits of one batch of items, of which it is known what counts in their pictures.

    Example:
        >>> source = Source.run(pipe, items, saes, {"num_inference_steps": 4})                    # doctest: +SKIP
        >>> with source.masked(masks).edited(Setting("sae", 24, 1.0, ("mid.0",))) as chosen:      # doctest: +SKIP
        ...     pictures = generate(pipe, texts, seeds, num_inference_steps=4)
    """

    def __init__(self, source: Source, masks: Mapping[str, tuple[Mask, ...]], spatial: bool, seed: int) -> None:
        self.source, self.masks, self.spatial, self.seed = source, masks, spatial, seed
        self._means: dict[str, tuple[Means, Means]] = {}
        self._ranked: dict[Any, list[Pair]] = {}
        self._choices: dict[Any, Choice] = {}

    @contextmanager
    def edited(self, setting: Setting) -> Iterator[list[dict[str, tuple[int, int]]]]:
        """Edit what is drawn inside the with block: the originals of exactly these items, in their order.

        Yields how many features of each block were added and removed, for each item; nothing of a method that chooses
        none. What is chosen once is kept, so that other strengths cost nothing more.

        Raises:
            HookpointError: the U-Net has no such block.
            KitError: a block without an SAE, a method that transports nothing, or neurons that were not kept.
        """
        self._check(setting)
        choice = self._choose(setting)
        rewriting = rewrite_neurons if setting.method == "neurons" else rewrite
        with rewriting(self.source.pipe, dict.fromkeys(setting.blocks, partial(self._edit, setting, choice))):
            yield choice.counts

    def _check(self, setting: Setting) -> None:
        if setting.method not in METHODS:
            raise KitError(f"{setting.method} transports nothing; its picture is one that the source has drawn.")
        for block in setting.blocks:
            if block not in self.source.blocks:
                name = resolve(self.source.pipe.unet, block).name
                raise KitError(
                    f"{setting.method} is to edit {name}, but there are SAEs for {', '.join(self.source.blocks)} only. "
                    "Pass one for it too, or leave it out."
                )

    def _edit(
        self, setting: Setting, choice: Choice, update: Float[Tensor, "row *token width"], call: Call
    ) -> Tensor | None:
        """The original's update or neurons with the change: summed up in float32 and rounded once.

        None where nothing changes, as in a layer of which no neuron was chosen.
        """
        *uncond, cond = update.chunk(2) if call.guided else [update]
        n = len(self.source.seeds)
        if len(cond) != n or call.n_steps != self.source.n_steps:
            raise KitError(
                f"These edits are for {n} items in {self.source.n_steps} steps, but {len(cond)} are being drawn in "
                f"{call.n_steps}. Draw the originals of exactly these items, with the source's settings."
            )
        if call.hookpoint not in choice.chosen:
            return None
        x = cond.float().flatten(1, -2)
        moved = x + setting.strength * self._delta(setting, choice, x, call).to(x.device)
        return torch.cat([*uncond, moved.to(update.dtype).view_as(cond)])

    def _delta(self, setting: Setting, choice: Choice, x: Written, call: Call) -> Written:
        place, step = call.hookpoint, call.step
        original, edited = self.source.traces(setting.method, place)
        removed, added = choice.chosen[place]
        adaptive = setting.method == "sae_adaptive"
        taken = self.source.live(place, x).written(0, removed) if adaptive else original.written(step, removed)
        mask_o, mask_e = self.masks[hookpoint_of(place)]
        return self._under(edited.written(step, added), mask_e) - self._under(taken, mask_o)

    def _under(self, written: Written, mask: Mask) -> Written:
        return mask * (written if self.spatial else mean_under(written, mask))

    def _choose(self, setting: Setting) -> Choice:
        key = setting.method.removesuffix("_adaptive"), setting.k, setting.blocks
        if key not in self._choices:
            self._choices[key] = self._choose_anew(setting)
        return self._choices[key]

    def _choose_anew(self, setting: Setting) -> Choice:
        places = [place for block in setting.blocks for place in self.source.places(setting.method, block)]
        widths = {place: self.source.traces(setting.method, place)[0].n_features for place in places}
        if setting.k is None:
            return Choice.everything(widths, len(self.source.seeds), self.source.device)
        means = zip(*(self._means_at(setting.method, place) for place in places), strict=True)
        sides = [np.concatenate(each, axis=1) for each in means]
        pairs = [[each[: setting.k] for each in ranked] for ranked in self._rank(setting, sides)]
        if setting.method == "random":
            texts = [f"{self.seed} {seed} {setting.k} {setting.blocks}" for seed in self.source.seeds]
            seeds = [int(sha256(text.encode())[:16], 16) for text in texts]
            pairs = [draw_alike(pair, [side[i] for side in sides], seeds[i]) for i, pair in enumerate(pairs)]
        return Choice.of(widths, pairs, self.source.device)

    def _rank(self, setting: Setting, sides: Sequence[Means]) -> list[Pair]:
        """For each item what to remove and what to add, for any k."""
        key = setting.method == "neurons", setting.blocks
        if key not in self._ranked:
            self._ranked[key] = [rank(original, edited) for original, edited in zip(*sides, strict=True)]
        return self._ranked[key]

    def _means_at(self, method: str, place: str) -> tuple[Means, Means]:
        """Of the original's and of the edited picture's features there, in float64."""
        if place not in self._means:
            traces = zip(self.source.traces(method, place), self.masks[hookpoint_of(place)], strict=True)
            original, edited = (trace.means(mask).cpu().double().numpy() for trace, mask in traces)
            self._means[place] = original, edited
        return self._means[place]

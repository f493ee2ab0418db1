"""What an SAE is and how it is trained (`SAEConfig`), and where its tokens come from (`Site`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.errors import KitError, did_you_mean

Split = Literal["train", "held_out", "all"]
Normalize = Literal["none", "scale", "channels", "whiten", "layer_norm", "constant_norm"]


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and how it is trained; defaults are the paper's (arXiv 2410.22366).

    Raises:
        KitError: a number out of its range, an unknown kind or normalisation, or settings that exclude each other.

    >>> SAEConfig(k=20, expansion=8)
    SAEConfig(k=20, kind='topk', expansion=8.0, ...
    """

    k: int | None = 10
    """Active latents per token, from 1: at most (topk), or on average (batchtopk; jumprelu aims at it). None is for a
    jumprelu that is held back by `sparsity_coef` alone."""
    kind: str = "topk"
    """How latents become active, "topk", "batchtopk" or "jumprelu": see the equations of `SAE`; or the name of a
    `SAEKind` of your own."""
    expansion: float = 4
    """d_sae / d_in, above 0."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: shares of d_sae, ascending and below 1; the latents up to each must reconstruct on their own too."""
    normalize: Normalize = "none"
    """What is done to tokens first. scale: divided by one number so that ‖x′‖² is d_in on average; channels: mean 0 and
    standard deviation 1 in each; whiten: about so in every direction, so that the loss minds those in which updates
    vary little as much as the others; layer_norm: mean 0 and standard deviation 1 within each token; constant_norm:
    every token's norm √d_in. Latents of the last two have no direction that is the same for all tokens, so `steer` and
    `ablate` refuse them."""
    subtract_b_dec: bool = True
    """Whether b_pre is b_dec, or 0."""
    auxk: int = 256
    """At most so many dead latents try to explain each token's SAE error; from 1."""
    auxk_coef: float = 1 / 32
    """Weight of that attempt in the loss, from 0, which leaves it out."""
    dead_after: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""
    resample_every: int | None = None
    """Tokens after which latents that are dead (see dead_after) start anew on badly explained tokens; None: never."""
    sparsity_coef: float = 1.0
    """jumprelu: weight, above 0, of (L0 / k − 1)² in the loss, or of L0 / d_in where k is None."""
    lr: float = 1e-4
    """Adam's learning rate, above 0."""
    warmup_steps: int = 0
    """Steps over which lr rises from 0."""
    decay_steps: int = 0
    """Last steps, over which lr falls to 0."""
    k_start: int | None = None
    """k of the first step, from which it falls to k; None: k from the start. Not for jumprelu."""
    anneal_steps: int = 0
    """Steps over which it falls; 0 without `k_start`."""
    seed: int = 0
    """Start of the weights, the sample that b_dec starts from, and what resampling draws; not the order of the data."""

    def __post_init__(self) -> None:
        _normalised(self)
        from sdxl_sae_kit.kinds import UnknownKindError, find_kind  # they wait for torch, and help does not

        try:
            kind = find_kind(self.kind)
        except UnknownKindError as cause:
            raise UnknownKindError(f"SAEConfig: {cause}") from None
        if (normalize := self.normalize) not in get_args(Normalize):
            raise KitError(
                f"SAEConfig: normalize is one of {', '.join(get_args(Normalize))}, not {normalize!r}."
                f"{did_you_mean(normalize, get_args(Normalize))}"
            )
        if self.k is None and kind.needs_k:
            raise KitError(f"SAEConfig: a {kind.name} SAE needs its k, such as k=10; jumprelu can do without.")
        if not kind.needs_k and (self.prefixes or self.k_start):
            raise KitError(
                f"SAEConfig: prefixes and k_start are for topk and batchtopk; leave them out for {kind.name}."
            )
        if (self.k_start is None) != (self.anneal_steps == 0) or (self.k_start or math.inf) < (self.k or 0):
            raise KitError(
                f"SAEConfig: k falls from k_start={self.k_start} to k={self.k} over anneal_steps={self.anneal_steps}; "
                "give both, or neither, and a k_start of at least k."
            )
        if list(self.prefixes) != sorted(set(self.prefixes)) or not all(0 < share < 1 for share in self.prefixes):
            raise KitError(
                f"SAEConfig: prefixes are ascending shares of d_sae between 0 and 1, such as (0.125, 0.5), "
                f"not {self.prefixes!r}."
            )


def _normalised(config: SAEConfig) -> None:
    """Check numbers and make them plain ones (a NumPy integer could not be written to a recipe)."""
    least = {"seed": 0, "warmup_steps": 0, "decay_steps": 0, "anneal_steps": 0}
    optional = {"k", "resample_every", "k_start"}
    values: dict[str, Any] = {}
    for name in ("k", "auxk", "dead_after", "resample_every", "warmup_steps", "decay_steps", "k_start", "anneal_steps",
                 "seed"):  # fmt: skip
        value = getattr(config, name)
        if not (value is None and name in optional):
            values[name] = whole_number(f"SAEConfig: {name}", value, least=least.get(name, 1))
    for name in ("expansion", "lr", "auxk_coef", "sparsity_coef"):
        value, zero = getattr(config, name), name == "auxk_coef"
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise KitError(f"SAEConfig: {name} must be a finite positive number, not {value!r}.")
        if not (value or zero):
            raise KitError(f"SAEConfig: {name} must be a finite positive number, not {value!r}.")
        values[name] = float(value)
    if not isinstance(config.subtract_b_dec, bool):
        raise KitError(f"SAEConfig: subtract_b_dec must be True or False, not {config.subtract_b_dec!r}.")
    try:
        values["prefixes"] = tuple(map(float, config.prefixes))
    except (TypeError, ValueError):
        raise KitError(f"SAEConfig: prefixes are shares such as (0.125, 0.5), not {config.prefixes!r}.") from None
    for name, value in values.items():
        object.__setattr__(config, name, value)  # how a frozen dataclass is normalised


@dataclass(frozen=True)
class Site:
    """Where the tokens an SAE was trained on come from; an SAE is only meaningful there.

    >>> Site("stabilityai/sdxl-turbo", "", "mid.0", 1, 0.0).kind
    'update'
    """

    model: str
    """Name as `load_pipeline` takes it."""
    revision: str
    """Which weights of it: the hub's commit, or the beginning of a sha256; "unknown" or empty where it is not known."""
    hookpoint: str
    """Short name, such as "mid.0"."""
    num_inference_steps: int
    """Denoising steps of each image."""
    guidance_scale: float
    """From 0; up to 1 there is no guidance."""
    kind: str = "update"
    """Updates, or "output": nothing here works on outputs of blocks."""

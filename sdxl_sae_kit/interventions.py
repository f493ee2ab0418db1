"""Steering: turn features up, down and off while an image is being made (paper §4).

An edit adds (z′ − z)_f · d_f to the update for each touched latent f, where d_f is its decoder row. The SAE's own error
stays in the update untouched, so an edit that changes nothing changes not a single bit.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sdxl_sae_kit.errors import ArtifactError, EditError
from sdxl_sae_kit.hookpoints import Hookpoint, resolve
from sdxl_sae_kit.hooks import Call, rewrite
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.sae import SAE

if TYPE_CHECKING:
    from sdxl_sae_kit.features import FeatureStats

Cfg = Literal["both", "cond", "uncond"]
Strengths = Mapping[int, float | ArrayLike]
"""Latent → a number, or a (height, width) map of numbers at the hookpoint's grid."""


@contextmanager
def steer(
    pipe: Any,
    sae: SAE,
    *,
    add: Strengths | None = None,
    scale: Strengths | None = None,
    clamp: Strengths | None = None,
    where: ArrayLike | None = None,
    steps: Sequence[int] | None = None,
    cfg: Cfg = "both",
    along: Mapping[int, ArrayLike] | None = None,
) -> Iterator[None]:
    """Edit features of one SAE in every image made inside the with block; blocks nest, also for several hookpoints.

    Args:
        pipe: an SDXL pipeline of diffusers.
        sae: gives the hookpoint, the codes and the directions.
        add: add this much of a latent, in multiples of its mean activation (`sae.mean_activation`).
        scale: multiply a latent's activation: 0 turns it off, 2 doubles it.
        clamp: set a latent's activation to this, in multiples of its mean activation.
        where: (height, width) mask at the hookpoint's grid; edits happen where it is nonzero, in proportion.
        steps: denoising steps, from 0; by default all.
        cfg: with guidance, `add` is added to the cond half and subtracted from the uncond half (`both`), or touches
            one half only. `scale` and `clamp` act on each half's own code.
        along: latent → (d_in,) vector to write along instead of its decoder row; how controls are made.

    Raises:
        EditError: no such latent, step or half, a wrongly shaped map, or `add`/`clamp` of a latent that never fired.
        ArtifactError: the SAE does not fit this U-Net.

    Warns where the SAE was trained on another model than the pipeline holds.

    Example:
        >>> with steer(pipe, sae, scale={17: 0.0}):                                    # doctest: +SKIP
        ...     image = pipe("a red circle", num_inference_steps=1, guidance_scale=0.0).images[0]
    """
    if not isinstance(sae, SAE):
        raise EditError(f"steer takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
    hookpoint = check_fit(pipe, sae)
    if cfg not in ("both", "cond", "uncond"):
        raise EditError(f"steer: cfg is 'both', 'cond' or 'uncond', not {cfg!r}.")
    if where is not None and not _is_finite(where):
        raise EditError(f"steer: where must be a map of finite numbers, not {where!r}.")
    strengths = {verb: _read(verb, edits) for verb, edits in (("add", add), ("scale", scale), ("clamp", clamp))}
    steps = None if steps is None else _integers("steps, such as steps=[0],", steps)
    latents = list(dict.fromkeys(latent for edits in strengths.values() for latent in edits))
    if not latents:
        yield
        return
    _check_latents(sae, strengths, latents, along or {})
    edit = _Edit(sae, strengths, latents, where, steps, cfg, _directions(sae, latents, along or {}))
    with rewrite(pipe, {hookpoint.name: edit}):
        yield


def check_fit(pipe: Any, sae: SAE) -> Hookpoint:
    """Where an SAE belongs in this U-Net; warns where it was trained on another model than the pipeline holds.

    Raises:
        HookpointError: the U-Net does not have that hookpoint.
        ArtifactError: the SAE says not where it belongs, or reads tokens of another width.
    """
    hookpoint = resolve(pipe.unet, sae.hookpoint)
    if differs := _other_model(pipe, sae):
        warnings.warn(f"{differs}: its features may mean something else here.", stacklevel=4)
    if hookpoint.d_in != sae.d_in:
        raise ArtifactError(
            f"{sae.name} reads {sae.d_in} numbers a token, but {hookpoint.name} of this U-Net has {hookpoint.d_in}. "
            f"Take one that was trained here."
        )
    return hookpoint


def check_model(asked: str, pipe: Any, sae: SAE) -> None:
    """Refuse a pipeline of another model than the SAE was trained on, where what is measured would be of neither.

    Raises:
        ArtifactError: it is another, or the SAE says not where it belongs.
    """
    if differs := _other_model(pipe, sae):
        raise ArtifactError(f"{asked}: {differs}. Load the model it was trained on, or train an SAE on this one.")


def check_measured(asked: str, pipe: Any, sae: SAE, stats: FeatureStats) -> None:
    """Refuse statistics of another SAE, and a pipeline of another model than the SAE was trained on.

    Raises:
        ArtifactError: they do not belong together, or the SAE says not where it belongs.
    """
    if not isinstance(sae, SAE):
        raise ArtifactError(f"{asked} takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
    if (stats.sae, stats.hookpoint) != (sae.name, sae.hookpoint):
        raise ArtifactError(
            f"{asked}: the statistics are of {stats.sae} at {stats.hookpoint}, but the SAE is {sae.name} at "
            f"{sae.hookpoint}. Measure this SAE with FeatureStats.measure."
        )
    check_model(asked, pipe, sae)


def _other_model(pipe: Any, sae: SAE) -> str | None:
    """How the pipeline's model differs from the one that the SAE was trained on."""
    _ = sae.hookpoint  # refuses an SAE that says not where it belongs
    model, site = describe(pipe), sae.site
    assert site is not None
    if (model.name, model.revision) == (site.model, site.revision):
        return None
    return (
        f"{sae.name} was trained on {site.model} (revision {site.revision}), but the pipeline is {model.name} "
        f"(revision {model.revision})"
    )


@dataclass(frozen=True)
class _Edit:
    """What `rewrite` calls with each update."""

    sae: SAE
    strengths: Mapping[str, Strengths]
    latents: list[int]
    where: ArrayLike | None
    steps: Sequence[int] | None
    cfg: Cfg
    directions: Float[Tensor, "edited d_in"]
    placed: dict[torch.device, SAE] = field(default_factory=dict)
    """Copies of the SAE by device."""

    def __call__(self, update: Float[Tensor, "batch height width d_in"], call: Call) -> Tensor | None:
        if self.steps is not None:
            if outside := [step for step in self.steps if not 0 <= step < call.n_steps]:
                raise EditError(
                    f"steer: steps={outside}, but this image is made in {call.n_steps} step(s), numbered from 0."
                )
            if call.step not in self.steps:
                return None
        grid = (update.shape[1], update.shape[2])
        change = self._added(grid, call, len(update), update.device) + self._rescaled(update, call, grid)
        if self.where is not None:
            change = change * _as_map(self.where, grid, call.hookpoint, "where", update.device)[..., None]
        directions = self.directions.to(update.device)
        return update + (change @ directions).to(update.dtype)

    def _added(
        self, grid: tuple[int, int], call: Call, batch: int, device: torch.device
    ) -> Float[Tensor, "batch height width edited"]:
        """Change of each latent by `add`, with each guidance half's sign."""
        change = torch.zeros(batch, *grid, len(self.latents), device=device)
        for latent, strength in self.strengths["add"].items():
            amount = _as_map(strength, grid, call.hookpoint, f"add[{latent}]", device) * self.sae.mean_activation[
                latent
            ].to(device)
            change[..., self.latents.index(latent)] = amount
        if call.guided:
            change[: batch // 2] *= {"both": -1, "cond": 0, "uncond": 1}[self.cfg]
            change[batch // 2 :] *= {"both": 1, "cond": 1, "uncond": 0}[self.cfg]
        return change

    def _rescaled(
        self, update: Tensor, call: Call, grid: tuple[int, int]
    ) -> Float[Tensor, "batch height width edited"]:
        """Change of each latent by `scale` and `clamp`, from its live activation."""
        change = torch.zeros(*update.shape[:3], len(self.latents), device=update.device)
        if not (self.strengths["scale"] or self.strengths["clamp"]):
            return change  # adding needs no encoding
        z = self._live(update)
        for latent, factor in self.strengths["scale"].items():
            at = self.latents.index(latent)
            change[..., at] += (_as_map(factor, grid, call.hookpoint, f"scale[{latent}]", update.device) - 1) * z[
                ..., at
            ]
        for latent, target in self.strengths["clamp"].items():
            at = self.latents.index(latent)
            level = _as_map(target, grid, call.hookpoint, f"clamp[{latent}]", update.device) * self.sae.mean_activation[
                latent
            ].to(update.device)
            change[..., at] += level - z[..., at]
        if call.guided and self.cfg != "both":
            half = slice(0, len(update) // 2) if self.cfg == "cond" else slice(len(update) // 2, None)
            change[half] = 0
        return change

    def _live(self, update: Tensor) -> Float[Tensor, "batch height width edited"]:
        """Activations of the edited latents, without writing out the others'."""
        if update.device not in self.placed:  # a copy: the caller's SAE stays where it is
            self.placed[update.device] = copy.deepcopy(self.sae).to(update.device)
        indices, values = self.placed[update.device].encode_sparse(update.float())
        edited = torch.tensor(self.latents, device=update.device)
        return torch.einsum("...k,...ke->...e", values, (indices[..., None] == edited).float())


def _read(verb: str, edits: Any) -> dict[int, float | ArrayLike]:
    """Edits of one verb, with latents as plain integers."""
    edits, example = {} if edits is None else edits, f"such as {verb}={{17: 2.0}},"
    if not isinstance(edits, Mapping):
        raise EditError(f"steer: {verb} must say how strongly for each latent, {example} not {edits!r}.")
    for latent, strength in edits.items():
        if not _is_finite(strength):
            raise EditError(
                f"steer: {verb}[{latent!r}] must be a finite number or a map of them, {example} not {strength!r}."
            )
    return dict(zip(_integers(f"latents of {verb}, {example}", edits), edits.values(), strict=True))


def _integers(name: str, values: Any) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        found = list(values) if isinstance(values, Mapping) else values
        raise EditError(f"steer: {name} must be integers, not {found!r}.") from None


def _is_finite(strength: Any) -> bool:
    try:
        array = _as_array(strength)
    except (TypeError, ValueError):  # a ragged list
        return False
    return array.dtype.kind in "biuf" and bool(np.isfinite(array).all())


def _as_array(value: Any) -> NDArray[Any]:
    """A number, list, array or tensor of any device and dtype as an array."""
    return np.asarray(value.detach().float().cpu() if isinstance(value, Tensor) else value)


def _directions(sae: SAE, latents: list[int], along: Mapping[int, ArrayLike]) -> Float[Tensor, "edited d_in"]:
    rows = sae.directions.detach()[latents].clone()
    for latent, vector in along.items():
        rows[latents.index(latent)] = torch.as_tensor(vector, dtype=rows.dtype, device=rows.device)
    return rows


def _check_latents(
    sae: SAE, strengths: Mapping[str, Strengths], latents: list[int], along: Mapping[int, ArrayLike]
) -> None:
    for latent in [*latents, *along]:
        if not 0 <= latent < sae.d_sae:
            raise EditError(f"steer: {sae.name} has latents 0 to {sae.d_sae - 1}; there is no {latent}.")
    for latent, vector in along.items():
        if latent not in latents or tuple(torch.as_tensor(vector).shape) != (sae.d_in,):
            raise EditError(
                f"steer: along[{latent}] must be a vector of {sae.d_in} numbers for a latent that is edited; "
                f"edited are {latents}."
            )
    if both := sorted(set(strengths["scale"]) & set(strengths["clamp"])):
        raise EditError(f"steer: latents {both} are both scaled and clamped. Choose one for each.")
    for verb in ("add", "clamp"):
        for latent in strengths[verb]:
            if sae.mean_activation[latent] == 0:
                raise EditError(
                    f"steer: latent {latent} never fired in training as far as measured, so {verb} has no unit for it. "
                    "Choose one that is alive."
                )


def _as_map(value: float | ArrayLike, grid: tuple[int, int], hookpoint: str, name: str, device: torch.device) -> Tensor:
    array = torch.as_tensor(_as_array(value).astype(np.float32), device=device)
    if array.ndim and tuple(array.shape) != grid:
        raise EditError(
            f"steer: {name} has shape {tuple(array.shape)}, but {hookpoint} is {grid[0]}×{grid[1]} for this image. "
            f"Resize it to {grid}."
        )
    return array.expand(grid)

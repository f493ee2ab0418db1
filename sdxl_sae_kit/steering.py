"""The arithmetic of an edit: what becomes of an update (paper §4).

With x an update, z its live code, d_f the direction of latent f and v its strength, each latent changes by

    add      v · mean_f                         and the update becomes x + Σ change_f · d_f,
    scale    (v − 1) · z_f                      so that the SAE error stays in it untouched
    clamp    v · mean_f − z_f

while three leave the update behind: `replace` (it becomes Σ v · mean_f · d_f), `reconstruct` (x̂ + Σ change_f · d_f)
and `ablate_block` (0). Mask, schedule and guidance half weigh how far it goes from x. A token at which nothing changes
keeps its every bit, in any precision; sums are made in float32 and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdxl_sae_kit.edits import Edit, explained
from sdxl_sae_kit.errors import EditError
from sdxl_sae_kit.hooks import Call
from sdxl_sae_kit.masks import as_map, as_mask
from sdxl_sae_kit.sae import SAE

_Code = tuple[Tensor, Tensor]
"""Indices and values of each token's active latents."""


@dataclass(frozen=True)
class _Plan:
    """What an edit adds to the codes of one batch, apart from what depends on them; axes of length 1 stand for all."""

    weight: Float[Tensor, "row height width 1"]
    """How far the update goes from what it was."""
    fixed: Float[Tensor, "_row _height _width edited"]
    """Change of each latent that does not depend on its activation."""
    slope: Float[Tensor, "_row _height _width edited"]
    """Change of each latent by its activation."""


@dataclass(frozen=True)
class Hook:
    """What `rewrite` calls with each update."""

    edit: Edit
    sae: SAE | None
    directions: Float[Tensor, "edited d_in"] | None
    """What one unit of each edited latent adds; None where no latent is edited."""
    units: Float[Tensor, "edited"]
    """Mean activation of each edited latent."""
    plans: dict[Any, tuple[_Plan, Tensor | None]] = field(default_factory=dict)
    """What is the same for every step and image, on its device."""

    @classmethod
    def of(cls, edit: Edit, sae: SAE | None) -> Hook:
        """Check an edit against its SAE.

        Raises:
            KitError: they do not fit.
        """
        if sae is None or not edit.latents:
            return cls(edit, sae, None, torch.zeros(0))
        _check_latents(edit, sae)
        directions = sae.directions.detach()[edit.latents].float().cpu()
        for latent, vector in edit.along.items():
            directions[edit.latents.index(latent)] = torch.tensor(vector)
        return cls(edit, sae, directions, sae.mean_activation.detach()[edit.latents].float().cpu())

    def __call__(self, update: Float[Tensor, "row height width d_in"], call: Call) -> Tensor | None:
        """The new update, or None where this step is not edited."""
        with explained(f"steer at {call.hookpoint}"):
            factor = self.edit.factor(call.step, call.n_steps)
            plan, directions = self._planned(update, call)
        if factor == 0:
            return None
        x, weight, change = update.float(), factor * plan.weight, plan.fixed
        needed = self.sae is not None and (self.edit.needs_code or self.edit.reconstruct)
        code = _placed(self.sae, x.device).encode_sparse(x) if self.sae and needed else None
        if code is not None and self.edit.latents:
            z = self._live(*code)
            open_ = self._open(z)
            change = (change + plan.slope * z) * open_
            if self.edit.replace:
                weight = weight * open_.any(dim=-1, keepdim=True)
        if self.edit.overwrites:
            moved = (1 - weight) * x + weight * self._target(x, code, change, directions)
            touched = weight != 0
        else:
            assert directions is not None
            moved = x + (change * weight) @ directions
            touched = (change * weight != 0).any(dim=-1, keepdim=True)
        if self.edit.keep_norm:
            moved = moved * (x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return torch.where(touched, moved.to(update.dtype), update)

    def _target(self, x: Tensor, code: _Code | None, change: Tensor, directions: Tensor | None) -> Tensor:
        """What stands in for the update."""
        target = torch.zeros_like(x)
        if self.edit.reconstruct and self.sae and code:
            target = _placed(self.sae, x.device).decode_sparse(*code, x)
        return target if directions is None else target + change @ directions

    def _live(self, indices: Tensor, values: Tensor) -> Float[Tensor, "row height width edited"]:
        """Activations of the edited latents, without writing out the others'."""
        edited = torch.tensor(self.edit.latents, device=indices.device)
        return torch.einsum("...k,...ke->...e", values, (indices[..., None] == edited).float())

    def _open(self, z: Float[Tensor, "row height width edited"]) -> Bool[Tensor, "row height width edited"]:
        """At which tokens each latent is edited."""
        if self.edit.gate is None:
            return torch.ones_like(z, dtype=torch.bool)
        return (z > 0) == (self.edit.gate == "active")

    def _planned(self, update: Tensor, call: Call) -> tuple[_Plan, Tensor | None]:
        key = (update.device, update.shape, call.guided)
        if key not in self.plans:
            plan = _plan(self.edit, self.units, update.shape[:3], call.guided)
            moved = _Plan(*(each.to(update.device) for each in (plan.weight, plan.fixed, plan.slope)))
            self.plans[key] = moved, None if self.directions is None else self.directions.to(update.device)
        return self.plans[key]


def _plan(edit: Edit, units: Float[Tensor, "edited"], shape: Sequence[int], guided: bool) -> _Plan:
    rows, *sides = shape
    n_images, grid = rows // 2 if guided else rows, (sides[0], sides[1])
    if edit.cfg == "uncond" and not guided:
        raise EditError("cfg='uncond', but this image is made without guidance, so there is no uncond half.")

    def by_row(name: str, maps: Tensor, one_each: bool) -> Tensor:
        if not one_each:
            return maps
        if len(maps) != n_images:
            raise EditError(f"{name} is for {len(maps)} image(s), one each, but this batch makes {n_images}.")
        return torch.cat([maps, maps]) if guided else maps

    def of_verb(verb: str, otherwise: float) -> Tensor:
        strengths: Any = getattr(edit, verb)
        maps = [
            by_row(f"{verb}[{latent}]", as_map(value, grid), _depth(value) in (1, 3))
            for latent in edit.latents
            for value in (strengths.get(latent, otherwise),)
        ]
        return torch.stack(torch.broadcast_tensors(*maps), dim=-1) if maps else torch.zeros(1, 1, 1, 0)

    def by_half(uncond: float, cond: float) -> Tensor:
        pair = torch.tensor([float(uncond), float(cond)] if guided else [float(cond)])
        return pair.repeat_interleave(n_images).reshape(-1, 1, 1, 1)

    sign = by_half(-1, 1) if edit.cfg == "both" else torch.ones(1, 1, 1, 1)
    weight = by_half(edit.cfg != "cond", edit.cfg != "uncond")
    if edit.where is not None:
        weight = weight * by_row("where", as_mask(edit.where, grid), _depth(edit.where) == 3)[..., None]
    held = torch.tensor([float(latent in edit.clamp) for latent in edit.latents])
    fixed = (sign * of_verb("add", 0.0) + of_verb("clamp", 0.0) + of_verb("replace", 0.0)) * units
    return _Plan(weight, fixed, of_verb("scale", 1.0) - 1 - held)


def _depth(plain: Any) -> int:
    """How many axes nested tuples have: an odd number where a strength has one entry for each image."""
    return 1 + _depth(plain[0]) if isinstance(plain, tuple) else 0


def _check_latents(edit: Edit, sae: SAE) -> None:
    for latent in edit.latents:
        if latent >= sae.d_sae:
            raise EditError(f"{sae.name} has latents 0 to {sae.d_sae - 1}; there is no {latent}.")
    for latent, vector in edit.along.items():
        if len(vector) != sae.d_in:  # type: ignore[arg-type]  # plain by now
            raise EditError(f"along[{latent}] must be a vector of {sae.d_in} numbers for a latent that is edited.")
    for verb in ("add", "clamp", "replace"):
        for latent in getattr(edit, verb):
            if sae.mean_activation[latent] == 0:
                raise EditError(
                    f"latent {latent} never fired in training as far as measured, so {verb} has no unit for it. "
                    "Choose one that is alive."
                )


# What is made of an SAE once and for all ------------------------------------------------------------------------------


@dataclass
class _Kept:
    """Digest and copies by device of an SAE as it is now."""

    state: object
    digest: str
    copies: dict[torch.device, SAE] = field(default_factory=dict)


_KEPT: WeakKeyDictionary[SAE, _Kept] = WeakKeyDictionary()


def digest_of(sae: SAE) -> str:
    """`sae.digest`, which takes long for a large one, computed once."""
    return _kept(sae).digest


def _placed(sae: SAE, device: torch.device) -> SAE:
    """The SAE itself if it is on this device in float32, else a copy that is: the caller's stays as it is."""
    if (sae.W_enc.device, sae.W_enc.dtype) == (device, torch.float32):
        return sae
    copies = _kept(sae).copies
    if device not in copies:
        copies[device] = copy.deepcopy(sae).to(device, torch.float32)
    return copies[device]


def _kept(sae: SAE) -> _Kept:
    versions = [(tensor.data_ptr(), tensor._version) for tensor in sae.state_dict().values()]
    state = (versions, sae.config, sae.site)
    if sae not in _KEPT or _KEPT[sae].state != state:
        _KEPT[sae] = _Kept(state, sae.digest)
    return _KEPT[sae]

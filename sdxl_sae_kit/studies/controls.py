"""What a feature's activation is multiplied by and written along: the feature itself, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.hooks import Call
from sdxl_sae_kit.sae import SAE

HARDEST = "mixed features"
"""The control that is drawn at every dose and step: a direction in which the updates vary as they do of themselves."""
CONTROLS = ("random direction", "other feature", "untrained SAE", HARDEST)
CONDITIONS = ("ablated", *CONTROLS)
"""The conditions in which something is turned off at all steps."""


@dataclass(frozen=True)
class Change:
    """The update gets (dose − 1) · z of this latent, written along `direction`, at every step or at one."""

    latent: int
    direction: Float[np.ndarray, " d_in"]
    dose: float = 0.0
    step: int | None = None

    def factor(self, step: int) -> float:
        """What the activation is multiplied by on its way into the update at this step."""
        return self.dose - 1 if self.step in (None, step) else 0.0


def at_dose(condition: str, dose: float) -> str:
    """Name of the condition in which another dose than 0 is given."""
    return f"{condition} at dose {dose:g}"


def at_step(condition: str, step: int) -> str:
    """Name of the condition in which one step alone is changed."""
    return f"{condition} at step {step}"


def choose_other(stats: FeatureStats, feature: int) -> int:
    """The other alive feature of the nearest density.

    Raises:
        KitError: there is none.
    """
    others = stats.alive[stats.alive != feature]
    if not len(others):
        raise KitError(f"{stats.sae} has no alive feature but {feature}, so nothing to compare it with.")
    return int(others[np.abs(stats.density[others] - stats.density[feature]).argmin()])


def draw_controls(sae: SAE, stats: FeatureStats, features: Sequence[int], seed: int) -> dict[int, dict[str, Change]]:
    """Each feature turned off, and its controls; those along another direction have that of the feature's length."""
    decoder, untrained = (each.directions.detach().cpu().numpy() for each in (sae, sae.untrained()))
    spread = _spread(stats)
    drawn = {}
    for feature in features:
        rng, row, other = np.random.default_rng([seed, feature]), decoder[feature], choose_other(stats, feature)
        random = rng.standard_normal(sae.d_in)
        mixed = (rng.standard_normal(stats.d_sae) * spread) @ decoder
        along = [as_long(row, vector) for vector in (random, untrained[feature], mixed)]
        changes = [Change(feature, row), Change(feature, along[0]), Change(other, decoder[other])]
        changes += [Change(feature, vector) for vector in along[1:]]
        drawn[feature] = dict(zip(CONDITIONS, changes, strict=True))
    return drawn


def as_long(row: Float[np.ndarray, " d_in"], vector: Float[np.ndarray, " d_in"]) -> Float[np.ndarray, " d_in"]:
    """The vector, as long as the row."""
    return np.asarray(vector * (np.linalg.norm(row) / np.linalg.norm(vector)), dtype=np.float32)


def _spread(stats: FeatureStats) -> Float[np.ndarray, " latent"]:
    """Standard deviation of every latent's activation over all tokens, those on which it does not fire included."""
    squares = stats.density * (stats.mean**2 + stats.std**2)
    return np.asarray(np.sqrt(np.maximum(squares - (stats.density * stats.mean) ** 2, 0)))


def changing(sae: SAE, changes: Sequence[Change | None]) -> Callable[[Tensor, Call], Tensor]:
    """What `rewrite` calls to give every image of a batch a change of its own, or none.

    Each row is what `steer(pipe, sae, scale={latent: dose}, along={latent: direction})` makes of it; together they
    cost one call of the pipeline. Of a guided batch both halves are changed, each by its own activation. The SAE must
    be on the pipeline's device.
    """
    device = sae.W_enc.device
    still = Change(0, np.zeros(sae.d_in, np.float32), dose=1.0)
    rows = [change or still for change in changes]
    latents = torch.tensor([row.latent for row in rows], device=device)
    directions = torch.from_numpy(np.stack([row.direction for row in rows])).to(device)

    def edit(update: Float[Tensor, "batch height width d_in"], call: Call) -> Tensor:
        halves = len(update) // len(rows)  # 2 with guidance
        factors = torch.tensor([row.factor(call.step) for row in rows], device=device).repeat(halves)
        indices, values = sae.encode_sparse(update.float())
        mine = indices == latents.repeat(halves)[:, None, None, None]
        amounts = (factors[:, None, None] * (values * mine).sum(dim=-1))[..., None]  # (batch, height, width, 1)
        changed = update.float() + amounts * directions.repeat(halves, 1)[:, None, None]
        return torch.where(amounts != 0, changed.to(update.dtype), update)  # rounded once; bit-identical elsewhere

    return edit

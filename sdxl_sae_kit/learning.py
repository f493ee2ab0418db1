"""How one SAE learns: its start, its loss, and a step that keeps decoder rows at unit norm (paper §3 and its appendix).

loss = s · MSE(x̂, x) + auxk_coef · AuxK    s = 1 / mean((x − mean x)²), so the first term is the unexplained share
AuxK = MSE(ê, e) / mean((e − mean e)²)      e = x − x̂ held fixed, ê = what dead latents alone make of it
AuxK is 0 while no latent is dead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.sparse import decode_sparse, top_k

_MEDIAN_TOKENS = 32_768


def geometric_median(
    x: Float[Tensor, "token d_in"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "d_in"]:
    """The point with the least summed distance to all tokens (Weiszfeld, from the mean): where b_dec starts."""
    median = x.mean(dim=0)
    for _ in range(iterations):
        weights: Tensor = 1 / (x - median).norm(dim=1).clamp_min(tolerance)
        moved = (weights[:, None] * x).sum(dim=0) / weights.sum()
        if (moved - median).norm() <= tolerance * moved.norm().clamp_min(tolerance):
            return moved
        median = moved
    return median


def auxk_loss(
    sae: SAE, x: Float[Tensor, "token d_in"], error: Float[Tensor, "token d_in"], dead: Int[Tensor, "latent"]
) -> Float[Tensor, ""]:
    """How badly the `auxk` strongest dead latents explain the SAE error, relative to its variance.

    Gradients reach the dead latents' encoder columns and decoder rows, and nothing else: neither b_dec nor, through the
    error, the living.
    """
    if not len(dead):
        return x.new_zeros(())
    error = error.detach()
    h = torch.addmm(sae.b_enc[dead], x - sae.b_dec.detach(), sae.W_enc[:, dead])
    indices, values = top_k(h, min(sae.config.auxk, len(dead)))
    error_hat = decode_sparse(indices, values, sae.W_dec[dead])
    return (error_hat - error).square().mean() / (error - error.mean(dim=0)).square().mean().clamp_min(1e-30)


@dataclass
class StepLog:
    """What one step saw: unexplained share of the variance, AuxK, mean active latents, share of dead latents."""

    unexplained: float
    auxk: float
    l0: float
    dead_share: float


class Learner:
    """One SAE in training: the SAE, Adam, and how many tokens ago each latent last fired.

    Args:
        sae: freshly made.
        sample: tokens from all over the training data; gives b_dec its start and the loss its scale.
    """

    def __init__(self, sae: SAE, sample: Float[Tensor, "token d_in"]) -> None:
        self.sae, self.step_number = sae, 0
        device = sae.W_enc.device
        with torch.no_grad():
            sae.b_dec.copy_(geometric_median(sample[:_MEDIAN_TOKENS]))
        self.scale = 1 / (sample - sample.mean(dim=0)).square().mean().to(device)
        self.silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.adam = torch.optim.Adam(sae.parameters(), lr=sae.config.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)

    def step(self, x: Float[Tensor, "token d_in"]) -> StepLog:
        """Learn from one batch.

        Raises:
            KitError: the loss is not finite; the message says at which step.
        """
        sae = self.sae
        dead = (self.silent >= sae.config.dead_after).nonzero().flatten()
        indices, values = sae.encode_sparse(x)
        x_hat = sae.decode_sparse(indices, values)
        unexplained = self.scale * (x_hat - x).square().mean()
        auxk = auxk_loss(sae, x, x - x_hat, dead)
        loss = unexplained + sae.config.auxk_coef * auxk
        if not loss.isfinite():
            raise KitError(
                f"{sae.name}: the loss is {loss.item()} at step {self.step_number}. "
                "Lower lr, or look for tokens that are not finite."
            )
        self.adam.zero_grad()
        loss.backward()
        self._project()
        self.adam.step()
        self._normalise()
        self._count(indices, values)
        self.step_number += 1
        l0 = float((values > FIRES).sum()) / len(x)
        return StepLog(unexplained.item(), auxk.item(), l0, len(dead) / sae.d_sae)

    @torch.no_grad()
    def _project(self) -> None:
        """Remove from the decoder's gradient what would only change the length of its rows."""
        rows, gradient = self.sae.W_dec, self.sae.W_dec.grad
        assert gradient is not None
        gradient -= (gradient * rows).sum(dim=1, keepdim=True) * rows

    @torch.no_grad()
    def _normalise(self) -> None:
        """Bring decoder rows back to unit norm, after the step, so that what is saved is exactly unit norm."""
        self.sae.W_dec /= self.sae.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def _count(self, indices: Int[Tensor, "token k"], values: Float[Tensor, "token k"]) -> None:
        self.silent += len(indices)
        self.silent[indices[values > FIRES]] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""
        moments = {
            f"adam.{i}.{key}": value
            for i, state in self.adam.state_dict()["state"].items()
            for key, value in state.items()
        }
        weights = {f"sae.{key}": value for key, value in self.sae.state_dict().items()}
        return weights | moments | {"silent": self.silent, "step": torch.tensor(self.step_number)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.sae.load_state_dict(
            {key.removeprefix("sae."): value for key, value in state.items() if key.startswith("sae.")}
        )
        adam = self.adam.state_dict()
        adam["state"] = {
            i: {key: state[f"adam.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")} for i in range(4)
        }
        self.adam.load_state_dict(adam)
        self.silent = state["silent"].to(self.silent.device)
        self.step_number = int(state["step"])

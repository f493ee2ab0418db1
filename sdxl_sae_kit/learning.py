"""How one SAE learns: its start, its loss, its schedules, and a step that keeps decoder rows at unit norm.

loss = s · MSE(x̂, x) + auxk_coef · AuxK + sparsity_coef · S       s = 1 / mean((x − mean x)²): the unexplained share
AuxK = MSE(ê, e) / mean((e − mean e)²)      e = x − x̂ held fixed, ê = what dead latents alone make of it; 0 if none is
S    = (L0 / k − 1)²                        jumprelu only; L0 / d_in where it has no k

(paper §3 and its appendix; S: Rajamanoharan et al. 2024, eq. 9, with a target). With Matryoshka prefixes the first term
is its mean over the reconstructions from the latents up to each prefix and from all of them (Bussmann et al. 2025).

A step costs one dense product, the encoder's; all else walks the active entries (see `sparse`). Only the
pre-activations are as large as (token, d_sae); no gradient needs them, and their memory is used again by the next step.
Nothing here names a device. On a GPU the encoder's product may run in bfloat16 (`precision`), everything else stays
float32; Adam is fused there as on the CPU; the sparse products turn dense where that is faster, and then make matrices
of that size too. A step waits for the device where something is counted: dead latents, entries above a threshold, and
the loss.

Where several processes share a batch, each has some of its tokens; sums over tokens go over all of them, so that the
gradients are those of the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sdxl_sae_kit.buffers import thinned
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.processes import Processes
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.sparse import Active, above, active, combine, jump_relu, pre_activation, top_k
from sdxl_sae_kit.starts import SAMPLE_TOKENS, set_threshold, start

_BANDWIDTH = 0.2  # of the box through which a threshold learns, as a share of where thresholds start
_ROWS = 1024  # of the decoder at a time, which stay in the cache between two operations
_EXPLODED = 100  # times the unexplained share of the first step


class LossError(KitError):
    """The loss stopped being a number, or grew beyond all bounds; the SAE is as it was before that step."""

    def __init__(self, message: str, *, exploded: bool) -> None:
        super().__init__(message)
        self.exploded = exploded


def auxk_error(
    sae: SAE,
    centred: Float[Tensor, "token d_in"],
    h: Float[Tensor, "token d_sae"],
    error: Float[Tensor, "token d_in"],
    dead: Int[Tensor, "latent"],
) -> Float[Tensor, ""]:
    """Σ‖ê − e‖²: what the `auxk` largest pre-activations among dead latents leave of the SAE error `error`.

    Gradients reach the dead latents' encoder columns, biases and decoder rows, and nothing else: neither b_dec nor,
    through the error, the living.
    """
    of_dead = h[:, dead]
    strongest = dead[top_k(of_dead, min(sae.config.auxk, len(dead)))]
    entries = active(strongest, sae.d_sae)
    entries = entries.where(entries.of(h) > 0)
    values = pre_activation(entries, h, centred, sae.W_enc, sae.b_enc, sae.b_pre.detach())
    return (combine(entries, values, sae.W_dec) - error.detach()).square().sum()


def schedule(config: SAEConfig, step: int, n_steps: int | None) -> tuple[float, int | None]:
    """lr and k of a step, counted from 0, of so many."""
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay_steps and n_steps:
        factor *= min(1.0, max(0, n_steps - step) / config.decay_steps)
    if config.k is None or config.k_start is None:
        return config.lr * factor, config.k
    progress = min(1.0, step / config.anneal_steps)
    return config.lr * factor, round(config.k_start + (config.k - config.k_start) * progress)


@dataclass
class StepLog:
    """What one step saw and did."""

    tokens: int
    """Seen so far, this step included."""
    unexplained: float
    """Share of the batch's variance, from 0."""
    auxk: float
    """AuxK, the dead latents' term of the loss before its weight."""
    l0: float
    """Mean active latents per token."""
    dead_share: float
    """Of the latents, before the step."""
    lr: float
    """Of the step."""
    k: int | None
    """Active latents per token that the step aimed at."""
    resampled: int
    """Latents that started anew after the step."""


class Learner:
    """One SAE in training: the SAE, Adam, and how many tokens ago each latent last fired.

    Args:
        sae: freshly made.
        sample: tokens from all over the training data; gives b_dec, thresholds and input statistics their start and the
            loss its scale.
        n_steps: how many there will be, for lr to fall at their end.
        processes: those that share each batch.
        precision: "bfloat16" computes the encoder's product in it; weights, codes and gradients stay float32.
        compile: whether torch.compile takes the forward pass.
    """

    def __init__(
        self,
        sae: SAE,
        sample: Float[Tensor, "token d_in"],
        *,
        n_steps: int | None = None,
        processes: Processes | None = None,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        self.sae, self.n_steps, self.processes = sae, n_steps, processes or Processes()
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.step_number, self.tokens, self.first_loss = 0, 0, 0.0
        self._h = torch.empty(0, dtype=self.dtype, device=sae.W_enc.device)
        self.generator = torch.Generator().manual_seed(sae.config.seed)
        device = sae.W_enc.device
        sample = sample.to(device)
        start(sae, sample)
        x = sae.normalised(sample)
        variance = (x - x.mean(dim=0)).square().mean()
        if not variance > 0:
            raise KitError(f"The first tokens that {sae.name} is to start from do not vary: there is nothing to learn.")
        self.scale = 1 / variance
        needed = sae.config.resample_every or sae.kind.threshold == "calibrated"
        self.sample = thinned(sample, SAMPLE_TOKENS if needed else 0)
        level = self._threshold_level(sample)
        self.bandwidth = _BANDWIDTH * level
        self.silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        # the same memory, latent by latent: fused Adam copies what does not lie in the order of its axes
        self._encoder = nn.Parameter(sae.W_enc.detach().T)
        # a threshold is as large as activations are; it moves by the share of itself that encoder columns move by
        groups = [
            {"params": [self._encoder, sae.b_enc, sae.W_dec, sae.b_dec], "pace": 1.0},
            {"params": [sae.threshold], "pace": level * sae.d_in**0.5},
        ]
        self.adam = torch.optim.Adam(groups, lr=sae.config.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self._forward = self._losses
        if compile:  # what has gradients of its own runs as it is: compiled on a GPU, dense products lost theirs
            for name in ("_values", "_reconstructions", "_auxk"):
                setattr(self, name, torch.compiler.disable(getattr(self, name)))
            self._forward = torch.compile(self._losses)

    @torch.no_grad()
    def _threshold_level(self, sample: Float[Tensor, "token d_in"]) -> float:
        """How large thresholds are: where they start, or where that is near 0, as pre-activations vary."""
        sae = self.sae
        if sae.kind.threshold != "learnt":
            return 0.0
        return max(sae.threshold.mean().item(), sae.pre_activations(thinned(sample, 1024)).std().item())

    def step(self, x: Float[Tensor, "token d_in"], n: int | None = None) -> StepLog:
        """Learn from one batch; or from this process's part of one that has n tokens.

        Raises:
            LossError: the loss is not finite or has exploded; nothing was learnt from this batch then.
        """
        sae, config = self.sae, self.sae.config
        lr, k = schedule(config, self.step_number, self.n_steps)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["pace"]
        dead = (self.silent >= config.dead_after).nonzero().flatten()
        n = len(x) if n is None else n
        loss, told, fired = self._forward(sae.normalised(x), dead, k, n)
        unexplained, auxk, l0 = self.processes.sum(told).tolist()
        self._check(unexplained + auxk)
        sae.zero_grad()
        loss.backward()
        for parameter in sae.parameters():
            if parameter.grad is not None:
                self.processes.sum(parameter.grad)
        self._project()
        assert sae.W_enc.grad is not None
        self._encoder.grad = sae.W_enc.grad.T
        self.adam.step()
        self._constrain()
        self._count(self.processes.any(fired), n)
        self.step_number += 1
        resampled = self._resample(n)
        return StepLog(self.tokens, unexplained, auxk, l0, len(dead) / sae.d_sae, lr, k, resampled)

    def _losses(
        self, x: Float[Tensor, "token d_in"], dead: Int[Tensor, "latent"], k: int | None, n: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "3"], Bool[Tensor, "d_sae"]]:
        """This process's share of the loss; of unexplained share, AuxK and L0; and which latents fired."""
        sae, config = self.sae, self.sae.config
        with torch.no_grad():
            centred = x - sae.b_pre
            h = self._pre_activations(centred)
            entries = self._select(h, k, n)
        values = self._values(entries, h, centred)
        if sae.kind.threshold == "learnt":
            z, counted = jump_relu(values, sae.threshold[entries.latents], self.bandwidth)
            penalty = self._sparsity(counted.sum() / n)
        else:
            z = values.relu()
            penalty = sae.kind.penalty(z, n)
        x_hats = self._reconstructions(entries, z)
        unexplained = [self.scale / (n * sae.d_in) * F.mse_loss(x_hat, x, reduction="sum") for x_hat in x_hats]
        auxk = self._auxk(centred, h, x, x_hats[-1].detach(), dead, n)
        loss = sum(unexplained) / len(unexplained) + config.auxk_coef * auxk + config.sparsity_coef * penalty
        fires = z > FIRES
        fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
        fired[entries.latents[fires]] = True
        told = torch.stack([unexplained[-1], auxk, fires.sum() / n]).detach()
        return loss, told, fired

    def _pre_activations(self, centred: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """h, in memory that one step leaves to the next: to get it anew takes a tenth of the product's time."""
        sae = self.sae
        if self._h.shape != (len(centred), sae.d_sae):
            self._h = torch.empty(len(centred), sae.d_sae, dtype=self.dtype, device=centred.device)
        bias, tokens, weights = (tensor.to(self.dtype) for tensor in (sae.b_enc, centred, sae.W_enc))
        return torch.addmm(bias, tokens, weights, out=self._h)

    def _select(self, h: Float[Tensor, "token d_sae"], k: int | None, n: int) -> Active:
        """Entries that may be active in training."""
        kind, threshold = self.sae.kind, self.sae.threshold
        if kind.threshold == "learnt":
            return above(h, threshold - self.bandwidth / 2)  # those below their threshold may move it
        return kind.active_in_training(h, k, threshold, n, self.processes)

    def _values(
        self, entries: Active, h: Float[Tensor, "token d_sae"], centred: Float[Tensor, "token d_in"]
    ) -> Float[Tensor, "entry"]:
        """Pre-activations of entries, with gradients."""
        return pre_activation(entries, h, centred, self.sae.W_enc, self.sae.b_enc, self.sae.b_pre)

    def _reconstructions(self, entries: Active, z: Float[Tensor, "entry"]) -> list[Float[Tensor, "token d_in"]]:
        """x̂′ of each prefix, the last from all latents."""
        sae = self.sae
        if not sae.config.prefixes:
            return [combine(entries, z, sae.W_dec, sae.b_dec)]
        ends, x_hats = [*sae.prefix_ends, sae.d_sae], []
        x_hat: Tensor = sae.b_dec
        for first, end in zip([0, *ends], ends, strict=False):
            within = (entries.latents >= first) & (entries.latents < end)
            x_hat = x_hat + combine(entries.where(within), z[within], sae.W_dec)
            x_hats.append(x_hat)
        return x_hats

    def _auxk(
        self,
        centred: Float[Tensor, "token d_in"],
        h: Float[Tensor, "token d_sae"],
        x: Float[Tensor, "token d_in"],
        x_hat: Float[Tensor, "token d_in"],
        dead: Int[Tensor, "latent"],
        n: int,
    ) -> Float[Tensor, ""]:
        if not len(dead) or not self.sae.config.auxk_coef:
            return x.new_zeros(())
        error = x - x_hat
        mean = self.processes.sum(error.sum(dim=0)) / n
        varying = error - mean
        variance, total = self.processes.sum(torch.stack([varying.square().sum(), error.square().sum()]))
        if variance <= 1e-6 * total:  # one token, or equal ones
            return x.new_zeros(())
        auxk: Tensor = auxk_error(self.sae, centred, h, error, dead) / variance
        return auxk

    def _sparsity(self, l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A quantity whose gradients, summed over processes, are those of S."""
        if self.sae.config.k is None:
            return l0 / self.sae.d_in
        k, total = self.sae.config.k, self.processes.sum(l0.detach().clone())
        return 2 * (total / k - 1) * l0 / k

    def _check(self, loss: float) -> None:
        self.first_loss = self.first_loss or loss
        exploded = loss > _EXPLODED * max(1.0, self.first_loss)
        if exploded and math.isfinite(loss):
            reason = f"has grown from {self.first_loss:.3g} to {loss:.3g}. Lower lr, or raise warmup_steps"
        elif not math.isfinite(loss):
            reason = f"is {loss}. Lower lr, or look for tokens that are not finite"
        else:
            return
        raise LossError(f"{self.sae.name}: at step {self.step_number} the loss {reason}.", exploded=exploded)

    @torch.no_grad()
    def _project(self) -> None:
        """Remove from the decoder's gradient what would only change the length of its rows."""
        assert self.sae.W_dec.grad is not None
        for rows, gradient in zip(self.sae.W_dec.split(_ROWS), self.sae.W_dec.grad.split(_ROWS), strict=True):
            gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1)

    @torch.no_grad()
    def _constrain(self) -> None:
        """Bring decoder rows back to unit norm, after the step, so that what is saved is exactly unit norm."""
        for rows in self.sae.W_dec.split(_ROWS):
            rows /= rows.norm(dim=1, keepdim=True)
        if self.sae.kind.threshold == "learnt":
            self.sae.threshold.clamp_min_(0)

    @torch.no_grad()
    def _count(self, fired: Bool[Tensor, "d_sae"], n: int) -> None:
        self.silent += n
        self.silent[fired] = 0
        self.tokens += n

    @torch.no_grad()
    def _resample(self, n: int) -> int:
        """Start dead latents anew when it is time, each towards a token drawn in proportion to its squared error.

        (Bricken et al. 2023.) Their encoder columns get a fifth of the mean norm of the living ones, and Adam forgets
        them.
        """
        sae, every = self.sae, self.sae.config.resample_every
        if not every or self.tokens // every == (self.tokens - n) // every:
            return 0
        dead = (self.silent >= sae.config.dead_after).nonzero().flatten()
        alive = (self.silent < sae.config.dead_after).nonzero().flatten()
        if not len(dead) or not len(alive):
            return 0
        x = sae.normalised(self.sample)
        centred = x - sae.b_pre
        badly = self._squared_errors(x, centred) * (centred.norm(dim=1) > 0).cpu()  # a zero has no direction
        drawn = torch.multinomial(badly, len(dead), replacement=True, generator=self.generator)
        directions = F.normalize(centred[drawn.to(dead.device)])
        sae.W_dec[dead] = directions
        sae.W_enc[:, dead] = 0.2 * sae.W_enc[:, alive].norm(dim=0).mean() * directions.T
        sae.b_enc[dead] = 0
        sae.threshold[dead] = sae.threshold[alive].mean()
        for name in ("exp_avg", "exp_avg_sq"):
            self.adam.state[sae.W_dec][name][dead] = 0
            self.adam.state[self._encoder][name][dead] = 0
            self.adam.state[sae.b_enc][name][dead] = 0
            if sae.threshold in self.adam.state:
                self.adam.state[sae.threshold][name][dead] = 0
        self.silent[dead] = 0
        return len(dead)

    def _squared_errors(
        self, x: Float[Tensor, "token d_in"], centred: Float[Tensor, "token d_in"]
    ) -> Float[Tensor, "token"]:
        """‖x′ − x̂′‖² of some tokens, on the CPU."""
        sae = self.sae
        h = torch.addmm(sae.b_enc, centred, sae.W_enc)
        entries = sae.kind.active_in_training(h, sae.config.k, sae.threshold, len(h), Processes())
        x_hat = combine(entries, entries.of(h).relu(), sae.W_dec) + sae.b_dec
        return (x - x_hat).square().sum(dim=1).cpu()

    def calibrate(self) -> None:
        """Set the threshold that kinds such as batchtopk need to be used; their training does not look at it."""
        if self.sae.kind.threshold == "calibrated":
            set_threshold(self.sae, self.sample, self.sae.config.k or 1)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the SAE itself."""
        moments = {
            f"adam.{i}.{key}": value
            for i, state in self.adam.state_dict()["state"].items()
            for key, value in state.items()
        }
        counts = torch.tensor([self.step_number, self.tokens])
        first = torch.tensor(self.first_loss, dtype=torch.float64)
        random = self.generator.get_state()
        return moments | {"silent": self.silent, "counts": counts, "first_loss": first, "generator": random}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; the SAE is to be that of the same moment."""
        adam = self.adam.state_dict()
        trained = sorted({int(key.split(".")[1]) for key in state if key.startswith("adam.")})
        adam["state"] = {
            i: {key: state[f"adam.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")} for i in trained
        }
        self.adam.load_state_dict(adam)
        self.silent = state["silent"].to(self.silent.device)
        self.step_number, self.tokens = state["counts"].tolist()
        self.first_loss = state["first_loss"].item()
        self.generator.set_state(state["generator"].cpu())

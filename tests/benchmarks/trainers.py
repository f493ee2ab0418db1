"""The trainers that training.py compares: each makes, from the same start, a step on a batch.

Each runs its own model and optimiser code as its own trainer does in a step; nothing of a step is stubbed. What is
theirs and what is left out is said in training.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.learning import Learner
from sdxl_sae_kit.metrics import geometric_median
from sdxl_sae_kit.sae import SAE

AUXK, AUXK_COEF, EPS, LONG_AGO = 256, 1 / 32, 6.25e-10, 10**9


@dataclass
class Task:
    """What everybody starts from: weights (d_in, d_sae) and (d_sae, d_in), biases, and how to train."""

    k: int
    lr: float
    condition: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    sample: Tensor
    dead: Tensor
    dead_after: int = 10_000_000

    def __post_init__(self) -> None:
        self.d_in, self.d_sae = self.W_enc.shape
        self.b_dec = geometric_median(self.sample)
        self.scale = float(1 / (self.sample - self.sample.mean(0)).square().mean())


class Trainer(NamedTuple):
    """Something that learns: a step on a batch, which may return its loss, and what it makes of tokens."""

    step: Callable[[Tensor], object]
    reconstruct: Callable[[Tensor], Tensor]


def kit(task: Task) -> Trainer:
    """This kit's: the only place here that knows how its trainer is used."""
    config = SAEConfig(k=task.k, expansion=task.d_sae // task.d_in, auxk=AUXK, lr=task.lr, dead_after=task.dead_after)
    sae = SAE(config, task.d_in, Site("made up", "", "up.0.1", 1, 0.0), "benchmark")
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(sae, name).copy_(getattr(task, name))
    learner = Learner(sae, task.sample)
    learner.silent[task.dead] = LONG_AGO

    def step(x: Tensor) -> float:
        log = learner.step(x)
        return log.unexplained + config.auxk_coef * log.auxk

    return Trainer(step, lambda x: learner.sae(x))


class Released:
    """The released trainer's step, written anew from what it computes; it does the work of five dense products.

    The code is a sparse COO matrix, and the gradient of its product is made densely and then masked; so is that of
    AuxK, whose 256 entries per token are worked through even while nothing is dead; the gradient of b_dec comes from a
    dense gradient of the centred tokens; AuxK has b_dec on both sides; each step measures the variance per channel.
    One difference: it normalises the decoder before Adam's step, here it is done after, as the method has it.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.encoder, self.b_enc, self.decoder, self.b_dec = (
            nn.Parameter(w.clone(memory_format=torch.contiguous_format))
            for w in (task.W_enc.T, task.b_enc, task.W_dec, task.b_dec)
        )
        parameters = [self.encoder, self.b_enc, self.decoder, self.b_dec]
        self.adam = torch.optim.Adam(parameters, lr=task.lr, eps=EPS, fused=True)
        self.silent = torch.zeros(task.d_sae, dtype=torch.int64)
        self.silent[task.dead] = LONG_AGO

    def _decode(self, indices: Tensor, values: Tensor) -> Tensor:
        rows = torch.arange(len(indices)).repeat_interleave(indices.shape[1])
        where = torch.stack([rows, indices.flatten()])
        code = torch.sparse_coo_tensor(where, values.flatten(), (len(indices), self.task.d_sae), check_invariants=False)
        return torch.sparse.mm(code, self.decoder) + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x - self.b_dec, self.encoder) + self.b_enc
        values, indices = h.topk(self.task.k, sorted=False)
        return self._decode(indices, values.relu())

    def step(self, x: Tensor) -> float:
        h = nn.functional.linear(x - self.b_dec, self.encoder) + self.b_enc
        values, indices = h.topk(self.task.k, sorted=False)
        values = values.relu()
        x_hat = self._decode(indices, values)
        loss = self.task.scale * (x_hat - x).square().mean()
        with torch.no_grad():
            (1 - (x - x_hat).var(0) / x.var(0)).mean().item()
            self.silent += len(x)
            self.silent[indices[values > 1e-3]] = 0
        if self.task.condition != "off":
            h.data.mul_(self.silent >= self.task.dead_after)
            values, indices = h.topk(min(AUXK, self.task.d_sae), sorted=False)
            target = (x - x_hat + self.b_dec).detach()
            error = (self._decode(indices, values.relu()) - target).square().mean()
            loss = loss + AUXK_COEF * error / (target - target.mean(0)).square().mean()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient, rows = self.decoder.grad, self.decoder
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            self.adam.step()
            rows /= rows.norm(dim=1, keepdim=True)
        return loss.item()


def released(task: Task) -> Trainer:
    trainer = Released(task)
    return Trainer(trainer.step, trainer.reconstruct)


def dictionary_learning(task: Task) -> Trainer:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**9, activation_dim=task.d_in, dict_size=task.d_sae, k=task.k, layer=0, lm_name="none", lr=task.lr,
        auxk_alpha=0 if task.condition == "off" else AUXK_COEF, warmup_steps=0, device="cpu",
    )  # fmt: skip
    trainer.top_k_aux = AUXK
    trainer.num_tokens_since_fired[task.dead] = LONG_AGO
    copy(trainer.ae.encoder.weight, task.W_enc.T)
    copy(trainer.ae.encoder.bias, task.b_enc)
    copy(trainer.ae.decoder.weight, task.W_dec.T)
    copy(trainer.ae.b_dec, task.b_dec)
    set_eps(trainer.optimizer)
    return Trainer(partial(trainer.update, 1), trainer.ae)  # step 0 would set b_dec anew


def saelens(task: Task) -> Trainer:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=task.d_in, d_sae=task.d_sae, k=task.k, aux_loss_coefficient=AUXK_COEF)
    )
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        copy(getattr(sae, name), getattr(task, name))
    config = SAETrainerConfig(total_training_samples=10**12, train_batch_size_samples=4096, lr=task.lr, lr_end=task.lr)
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    trainer.n_forward_passes_since_fired[task.dead] = LONG_AGO
    set_eps(trainer.optimizer)
    return Trainer(trainer.step, sae)


def overcomplete(task: Task) -> Trainer:
    for name in ("models", "visualization"):  # image models and plots, whose own imports often fail
        sys.modules.setdefault(f"overcomplete.{name}", MagicMock())
    from overcomplete.sae import TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss

    def mean_square(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    sae = TopKSAE(task.d_in, task.d_sae, top_k=task.k)
    copy(sae.encoder.final_block[0].weight, task.W_enc.T)
    copy(sae.encoder.final_block[0].bias, task.b_enc)
    copy(sae.dictionary._weights, task.W_dec)
    criterion = mean_square if task.condition == "off" else partial(top_k_auxiliary_loss, penalty=AUXK_COEF)
    adam = torch.optim.Adam(sae.parameters(), lr=task.lr, eps=EPS)

    def step(x: Tensor) -> None:
        train_sae(sae, [x - task.b_dec], criterion, adam, nb_epochs=1, monitoring=0)

    return Trainer(step, lambda x: sae(x - task.b_dec)[2] + task.b_dec)


def sparsify(task: Task) -> Trainer:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    sae = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), dtype=torch.float32)
    copy(sae.encoder.weight, task.W_enc.T)
    copy(sae.encoder.bias, task.b_enc)
    copy(sae.W_dec, task.W_dec)
    copy(sae.b_dec, task.b_dec)
    auxk_alpha = 0 if task.condition == "off" else AUXK_COEF
    adam = torch.optim.Adam(sae.parameters(), lr=task.lr, eps=EPS)
    silent, fired = torch.zeros(task.d_sae, dtype=torch.long), torch.zeros(task.d_sae, dtype=torch.bool)
    silent[task.dead] = LONG_AGO

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        dead = silent > task.dead_after if auxk_alpha else None
        out = sae(x=x, y=x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        silent.add_(len(x))
        silent[fired] = 0
        fired.zero_()

    return Trainer(step, lambda x: sae(x).sae_out)


def limit(task: Task) -> Trainer:
    """The least: h = x W_enc into memory that is there already, and Adam over both matrices, fused."""
    weights = [nn.Parameter(task.W_enc.clone()), nn.Parameter(task.W_dec.clone())]
    for w in weights:
        w.grad = torch.zeros_like(w)
    adam = torch.optim.Adam(weights, lr=task.lr, eps=EPS, fused=True)
    h = torch.empty(0)

    @torch.no_grad()
    def step(x: Tensor) -> None:
        torch.mm(x, weights[0], out=h.resize_(len(x), task.d_sae))
        adam.step()

    return Trainer(step, lambda x: x)


def dense(task: Task) -> Trainer:
    """The method's loss in plain dense autograd, to compare results with, not times."""
    W_enc, b_enc, W_dec, b_dec = (w.clone().requires_grad_() for w in (task.W_enc, task.b_enc, task.W_dec, task.b_dec))
    adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=task.lr, eps=EPS)
    silent = torch.zeros(task.d_sae, dtype=torch.long)
    silent[task.dead] = LONG_AGO

    def code(h: Tensor, k: int) -> Tensor:
        values, indices = h.topk(k)
        return torch.zeros_like(h).scatter(1, indices, values.relu())

    def step(x: Tensor) -> float:
        z = code((x - b_dec) @ W_enc + b_enc, task.k)
        error = x - (z @ W_dec + b_dec)
        loss, error = task.scale * error.square().mean(), error.detach()
        dead = (silent >= task.dead_after).nonzero().flatten()
        if len(dead):
            z_dead = code((x - b_dec.detach()) @ W_enc[:, dead] + b_enc[dead], min(AUXK, len(dead)))
            aux = (z_dead @ W_dec[dead] - error).square().mean() / (error - error.mean(0)).square().mean()
            loss = loss + AUXK_COEF * aux
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            silent.add_(len(x))
            silent[(z > 1e-3).any(0)] = 0
        return loss.item()

    return Trainer(step, lambda x: code((x - b_dec) @ W_enc + b_enc, task.k) @ W_dec + b_dec)


def copy(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def set_eps(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        group["eps"] = EPS


MAKERS = {
    "limit": limit, "kit": kit, "released": released, "dictionary_learning": dictionary_learning, "SAELens": saelens,
    "overcomplete": overcomplete, "sparsify": sparsify,
}  # fmt: skip


def everybody(task: Task) -> dict[str, Trainer]:
    """All that can be imported."""
    trainers = {}
    for name, make in MAKERS.items():
        try:
            trainers[name] = make(task)
        except (ImportError, RuntimeError) as cause:  # RuntimeError: a torchvision of another torch
            print(f"{name} is left out: {str(cause).splitlines()[0]}")
    return trainers

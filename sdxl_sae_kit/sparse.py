"""Sparse codes of many tokens, and the three products a training step needs of them.

A code is the list of its active entries: which latent is active on which token, and how strongly. Per entry, decoding
and its gradients read one decoder row instead of all of them:

    combine     out[token]  = Σ value · table[latent]     the reconstruction
    accumulate  out[latent] = Σ value · rows[token]       gradients of W_dec and of W_enc
    correlate   out[entry]  = ⟨rows[token], table[latent]⟩  gradients of the values

On a CPU these are `embedding_bag` and `sampled_addmm`, gathers and sums with nothing in between; where codes are long,
over a quarter of the columns at a time, so that the rows which one token or latent needs stay in the second-level
cache. On a GPU dense products win where codes are long: on an H200, with 4,096 tokens and
d_sae = 5120, a training step takes 8.1 ms sparse and 8.7 ms dense at k = 160, 11.0 and 9.3 ms at k = 256; where torch
may multiply in TF32, 4.7 and 4.8 ms at k = 64, 7.7 and 4.7 ms at k = 160. `_DENSE_FROM` is that switch, in proportion
to d_sae; tests set it to run so on a CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_GROUPS = 8
_COLUMNS, _LONG = 320, 16  # of a block, and the entries of a token or latent from which blocks pay
_DENSE_FROM = {"cuda": 180 / 5120, "cuda tf32": 64 / 5120}
"""Share of latents active per token from which dense products win, by device; absent: never."""


@dataclass(frozen=True)
class Active:
    """Where codes (n_tokens, d_sae) are active: entry e is latent `latents[e]` of token `tokens[e]`, by token."""

    tokens: Int[Tensor, "entry"]
    latents: Int[Tensor, "entry"]
    n_tokens: int
    d_sae: int
    width: int | None = None
    """Entries of every token, where all have as many."""

    @property
    def dense(self) -> bool:
        """Whether this device multiplies dense matrices faster than it walks these entries."""
        device = self.latents.device.type
        tf32 = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
        share = _DENSE_FROM.get("cuda tf32" if tf32 else device)
        return share is not None and len(self.latents) >= share * self.n_tokens * self.d_sae

    @cached_property
    def by_token(self) -> Int[Tensor, "token"]:
        """Where the entries of each token begin."""
        return _starts(self.tokens, self.n_tokens)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry"], Int[Tensor, "latent"]]:
        """The order that sorts entries by latent, their tokens in it, and where those of each latent begin."""
        order = self.latents.to(torch.int32).argsort(stable=True)  # half the bytes to sort
        return order, self.tokens.index_select(0, order), _starts(self.latents.index_select(0, order), self.d_sae)

    def where(self, chosen: Tensor) -> Active:
        """Only these entries."""
        return Active(self.tokens[chosen], self.latents[chosen], self.n_tokens, self.d_sae)

    def of(self, h: Float[Tensor, "token d_sae"]) -> Float[Tensor, "entry"]:
        """The numbers of a dense matrix at these entries."""
        return h.flatten().index_select(0, self.tokens * self.d_sae + self.latents)

    def matrix(self, values: Float[Tensor, "entry"]) -> Float[Tensor, "token d_sae"]:
        """The code with its zeros written out."""
        zeros = values.new_zeros(self.n_tokens, self.d_sae)
        dense: Tensor = zeros.index_put(
            (self.tokens, self.latents), values, accumulate=True
        )  # padding may be among them
        return dense

    def padded(self, values: Float[Tensor, "entry"]) -> tuple[Int[Tensor, "token width"], Float[Tensor, "token width"]]:
        """The code as (latents, values), as wide as its longest token; latent 0 with value 0 fills the rest."""
        if self.width is not None:
            return self.latents.view(-1, self.width), values.view(-1, self.width)
        place = torch.arange(len(values), device=values.device) - self.by_token[self.tokens]
        width = int(place.max()) + 1 if len(values) else 1
        latents = self.latents.new_zeros(self.n_tokens, width)
        return (
            latents.index_put((self.tokens, place), self.latents),
            values.new_zeros(self.n_tokens, width).index_put((self.tokens, place), values),
        )


def top_k(h: Float[Tensor, "token d_sae"], k: int) -> Int[Tensor, "token k"]:
    """Latents of each token's k largest pre-activations, in no order.

    Exact in two stages: the k largest lie in those k groups whose maxima are largest.
    """
    d_sae = h.shape[1]
    per_group = d_sae // _GROUPS
    if d_sae % _GROUPS or per_group < k:
        indices: Tensor = h.topk(k, dim=1, sorted=False).indices
        return indices
    grouped = h.unflatten(1, (_GROUPS, per_group))  # a group is every per_group-th latent, so its maximum vectorises
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, _GROUPS, -1)).flatten(1)
    best = candidates.topk(k, dim=1, sorted=False).indices
    latents: Tensor = best // k * per_group + groups.gather(1, best % k)
    return latents


def active(latents: Int[Tensor, "token k"], d_sae: int) -> Active:
    """Entries of a code that is k latents for every token."""
    n, k = latents.shape
    tokens = torch.arange(n, device=latents.device).repeat_interleave(k)
    return Active(tokens, latents.flatten(), n, d_sae, width=k)


def above(h: Float[Tensor, "token d_sae"], threshold: Float[Tensor, "*d_sae"]) -> Active:
    """Entries whose pre-activation is above its threshold."""
    tokens, latents = (h > threshold).nonzero(as_tuple=True)
    return Active(tokens, latents, *h.shape)


def largest(h: Float[Tensor, "token d_sae"], n: int) -> Float[Tensor, "n"]:
    """The n largest pre-activations of all tokens together, descending; −∞ where there are fewer.

    Exact without sorting them all: a thin sample gives a bound that a few more than n exceed; only those are sorted.
    """
    if h.numel() < n:
        return F.pad(h.flatten().sort(descending=True).values, (0, n - h.numel()), value=-torch.inf)
    sample = h[:: max(1, len(h) // 256)].flatten()
    guess = min(len(sample), int(1.2 * n * len(sample) / h.numel()) + 16)
    candidates = h[h >= sample.topk(guess).values[-1]]
    return (candidates if len(candidates) >= n else h.flatten()).topk(n).values


def pre_activation(
    active: Active,
    h: Float[Tensor, "token d_sae"],
    x: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    b_pre: Float[Tensor, "d_in"],
) -> Float[Tensor, "entry"]:
    """h = (x − b_pre) W_enc + b_enc at the active entries, taken from `h`; gradients reach W_enc, b_enc and b_pre.

    `x` is centred already, and gets no gradient: that of b_pre is −W_enc · (gradient of b_enc), so no dense product is
    needed for it.
    """
    values: Tensor = _PreActivation.apply(active, h, x, W_enc, b_enc, b_pre)  # type: ignore[no-untyped-call]
    return values


def combine(
    active: Active,
    values: Float[Tensor, "entry"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, "d_in"] | None = None,
) -> Float[Tensor, "token d_in"]:
    """Σ value · W_dec[latent] + b_dec of every token; gradients reach the values, W_dec and b_dec."""
    combined: Tensor = _Combine.apply(active, values, W_dec, b_dec)  # type: ignore[no-untyped-call]
    return combined


def jump_relu(
    h: Float[Tensor, "entry"], threshold: Float[Tensor, "entry"], bandwidth: float
) -> tuple[Float[Tensor, "entry"], Float[Tensor, "entry"]]:
    """z = h and 1 where h > θ, else 0 and 0: the values, and a count of them whose gradient reaches θ alone.

    Neither depends smoothly on θ. Their gradients are those of the expectation over h, whose density at θ is estimated
    by a box of width `bandwidth` around it: −θ/ε and −1/ε where |h − θ| < ε/2 (Rajamanoharan et al. 2024, eq. 11-12).
    """
    values, counted = _JumpReLU.apply(h, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return values, counted


class _PreActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Active, h: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(x, W_enc)
        return active.of(h).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), active = gradients, ctx.active
        x, W_enc = ctx.saved_tensors
        by_latent = gradient.new_zeros(active.d_sae).index_add(0, active.latents, gradient)
        b_pre = -(W_enc @ by_latent) if ctx.needs_input_grad[5] else None
        return None, None, None, _accumulate(active, gradient, _columns(active, x)).T, by_latent, b_pre


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Active, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.active, ctx.table = active, _columns(active, W_dec)
        ctx.save_for_backward(values)
        x_hat = _combine(active, values, ctx.table)
        return x_hat if b_dec is None else x_hat.add_(b_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), active, (values,) = gradients, ctx.active, ctx.saved_tensors
        b_dec, rows = gradient.sum(dim=0) if ctx.needs_input_grad[3] else None, _columns(active, gradient)
        return None, _correlate(active, rows, ctx.table), _accumulate(active, values, rows), b_dec


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        fires = (h > threshold).to(h.dtype)
        return h * fires, fires

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (values, counted), (h, threshold) = gradients, ctx.saved_tensors
        density = ((h - threshold).abs() < ctx.bandwidth / 2).to(h.dtype) / ctx.bandwidth
        return values * (h > threshold), -density * (threshold * values + counted), None


def _columns(active: Active, table: Float[Tensor, "row column"]) -> list[Float[Tensor, "row _column"]]:
    """A table as the products below want it: in blocks of columns, or whole where that is better."""
    short = len(active.latents) < _LONG * max(active.n_tokens, active.d_sae)
    if active.dense or short or table.device.type != "cpu":
        return [table]
    return [some.contiguous() for some in table.split(_COLUMNS, dim=1)]


def _combine(active: Active, values: Tensor, table: list[Tensor]) -> Tensor:
    if active.dense:
        return active.matrix(values) @ table[0]
    return _bags(active.latents, table, active.by_token, values)


def _accumulate(active: Active, values: Tensor, rows: list[Tensor]) -> Tensor:
    if active.dense:
        return active.matrix(values).T @ rows[0]
    order, tokens, starts = active.by_latent
    return _bags(tokens, rows, starts, values.index_select(0, order))


def _correlate(active: Active, rows: list[Tensor], table: list[Tensor]) -> Tensor:
    if active.dense:
        return active.of(rows[0] @ table[0].T)
    ends = torch.cat([active.by_token, active.tokens.new_tensor([len(active.tokens)])])
    shape, product = (active.n_tokens, active.d_sae), rows[0].new_zeros(len(active.tokens))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(ends, active.latents, product, shape, check_invariants=False)
    for some_rows, some_table in zip(rows, table, strict=True):
        product = product + torch.sparse.sampled_addmm(pattern, some_rows, some_table.T, beta=0).values()
    return product


def _bags(ids: Int[Tensor, "entry"], table: list[Tensor], starts: Int[Tensor, "bag"], weights: Tensor) -> Tensor:
    """Weighted sums of the rows of each bag; a bag is what lies between two starts."""
    sums = [F.embedding_bag(ids, some, starts, per_sample_weights=weights, mode="sum") for some in table]
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]


def _starts(sorted_ids: Int[Tensor, "entry"], n: int) -> Int[Tensor, "n"]:
    """Where each of the ids 0 … n − 1 begins in a sorted list of them."""
    return torch.searchsorted(sorted_ids, torch.arange(n, device=sorted_ids.device))

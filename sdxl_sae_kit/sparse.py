"""Top-k selection and decoding of sparse codes, with gradients that stay sparse.

A code of k active latents out of d_sae is kept as (indices, values), each (token, k). Decoding touches k decoder rows
per token instead of all of them: `embedding_bag` is a gather, multiply and sum in one pass, with exact gradients for
both the values and the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def top_k(h: Float[Tensor, "*token d_sae"], k: int) -> tuple[Int[Tensor, "*token k"], Float[Tensor, "*token k"]]:
    """Indices and rectified values of each token's k largest pre-activations (method: top-k on signed h, then relu)."""
    values, indices = h.topk(k, dim=-1, sorted=False)
    return indices, values.relu()


def decode_sparse(
    indices: Int[Tensor, "*token k"], values: Float[Tensor, "*token k"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "*token d_in"]:
    """Σ_j values_j · decoder[indices_j] for every token; gradients reach `values` and the decoder rows in use."""
    flat_indices, flat_values = indices.flatten(0, -2), values.flatten(0, -2)
    flat = F.embedding_bag(flat_indices, decoder, per_sample_weights=flat_values, mode="sum")
    decoded: Tensor = flat.unflatten(0, indices.shape[:-1])
    return decoded


def to_dense(
    indices: Int[Tensor, "*token k"], values: Float[Tensor, "*token k"], d_sae: int
) -> Float[Tensor, "*token d_sae"]:
    """The same code with its zeros written out."""
    zeros = torch.zeros(*values.shape[:-1], d_sae, dtype=values.dtype, device=values.device)
    return zeros.scatter(-1, indices, values)

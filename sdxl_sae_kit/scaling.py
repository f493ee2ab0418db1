"""Scaling of tokens by one number, a number for each channel or token, or a matrix that whitens them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_RIDGE = 1e-4  # of the mean eigenvalue, so that directions in which tokens hardly vary are not blown up without bound


def whitening_scale(x: Float[Tensor, "token d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The symmetric root of the tokens' covariance C: S = (C + 1e-4 · tr(C) / d_in · I)^½.

    (x − mean) S⁻¹ has about the same variance, 1, in every direction, and is as near to x as such tokens can be (ZCA).
    """
    eigenvalues, axes = torch.linalg.eigh(torch.cov(x.double().T, correction=0).reshape(x.shape[1], x.shape[1]))
    root = (eigenvalues.clamp_min(0) + _RIDGE * eigenvalues.mean()).sqrt().clamp_min(1e-6)
    scale: Tensor = ((axes * root) @ axes.T).to(x.dtype)
    return scale


def times(x: Float[Tensor, "*token d_in"], scale: Tensor) -> Float[Tensor, "*token d_in"]:
    """x · scale; a matrix is known by being one, as numbers of tokens have a last axis of length 1."""
    product: Tensor = x @ scale if _is_matrix(scale) else x * scale
    return product


def divided(x: Float[Tensor, "*token d_in"], scale: Tensor) -> Float[Tensor, "*token d_in"]:
    """What `times` the scale is x."""
    if not _is_matrix(scale):
        return x / scale
    solved: Tensor = torch.linalg.solve(scale, x.reshape(-1, x.shape[-1]), left=False)
    return solved.view_as(x)


def _is_matrix(scale: Tensor) -> bool:
    return scale.ndim == 2 and scale.shape[1] > 1

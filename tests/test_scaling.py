"""Scaling: what is divided comes back when multiplied, and whitened tokens vary alike in every direction."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.scaling import divided, times, whitening_scale


def correlated(n=2000, d_in=5, seed=0):
    """Tokens whose variance differs 10,000-fold between directions that are no channels."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(d_in, d_in)))
    return torch.tensor(rng.normal(size=(n, d_in)) * np.geomspace(0.1, 10, d_in) @ turn + 3, dtype=torch.float32)


def test_whitened_tokens_have_variance_one_in_every_direction_but_those_in_which_they_hardly_vary():
    x = correlated()
    white = divided(x - x.mean(0), whitening_scale(x)).double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))
    expected = eigenvalues / (eigenvalues + 1e-4 * eigenvalues.mean())  # what the ridge leaves of 1
    assert np.linalg.eigvalsh(np.cov(white.T, bias=True)) == pytest.approx(np.sort(expected), rel=1e-3)


def test_the_scale_is_symmetric_and_takes_channels_that_never_vary():
    x = correlated()
    x[:, 2] = 7.0
    scale = whitening_scale(x)
    assert torch.allclose(scale, scale.T) and scale.isfinite().all()
    assert divided(x - x.mean(0), scale).isfinite().all()


@given(st.integers(0, 2**31))
def test_what_is_divided_comes_back_by_a_number_per_channel_per_token_and_by_a_matrix(seed):
    x = correlated(6, seed=seed).reshape(2, 3, 5)
    scales = torch.rand(5) + 0.5, torch.rand(2, 3, 1) + 0.5, whitening_scale(correlated(seed=seed))
    for scale in scales:
        assert torch.allclose(times(divided(x, scale), scale), x, rtol=1e-3, atol=1e-3)
    assert torch.allclose(times(x, scales[2])[1, 2], scales[2].T @ x[1, 2], rtol=1e-4, atol=1e-4)

"""Sparse codes: the selections are exact, and the three products have the values and gradients of dense ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit import sparse
from sdxl_sae_kit.sparse import above, active, combine, jump_relu, largest, pre_activation, top_k

seeds = st.integers(0, 2**31)
N_TOKENS, D_IN, D_SAE = 12, 7, 40


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["sparse", "dense", "columns"])
def way(request, monkeypatch):
    """Each product the way of a CPU, the way of a GPU with many active latents, and cut into blocks of columns."""
    if request.param == "dense":
        monkeypatch.setitem(sparse._DENSE_FROM, "cpu", 0.0)
    if request.param == "columns":
        monkeypatch.setattr(sparse, "_COLUMNS", 3)
        monkeypatch.setattr(sparse, "_LONG", 0)
    return request.param


@given(seeds, st.integers(1, 40), st.sampled_from([8, 37, 40, 64]))
def test_top_k_in_two_stages_finds_what_sorting_finds(seed, k, d_sae):
    h = random(9, d_sae, seed=seed)
    k = min(k, d_sae)
    found = h.gather(1, top_k(h, k)).sort(dim=1, descending=True).values
    assert torch.equal(found, h.sort(dim=1, descending=True).values[:, :k])
    assert all(len(set(row)) == k for row in top_k(h, k).tolist())


def test_top_k_with_ties_gives_k_different_latents():
    indices = top_k(torch.zeros(5, 64), 6)
    assert all(len(set(row)) == 6 for row in indices.tolist())


@given(seeds, st.integers(1, 400), st.booleans())
def test_the_largest_of_all_tokens_are_those_of_sorting(seed, n, skewed):
    h = random(600, 8, seed=seed)
    if skewed:  # nearly all large values in one token, so that a sample of tokens misleads
        h[3] += 100
    assert torch.equal(largest(h, n), h.flatten().sort(descending=True).values[:n])


def test_the_largest_of_few_are_all_of_them():
    h = random(2, 3)
    assert torch.equal(largest(h, 6), h.flatten().sort(descending=True).values)


@given(seeds)
def test_above_lists_every_entry_over_its_threshold_in_order(seed):
    h, threshold = random(N_TOKENS, D_SAE, seed=seed), random(D_SAE, seed=seed + 1)
    entries = above(h, threshold)
    dense = torch.zeros(N_TOKENS, D_SAE, dtype=torch.bool)
    dense[entries.tokens, entries.latents] = True
    assert torch.equal(dense, h > threshold)
    assert torch.equal(entries.tokens, entries.tokens.sort().values)
    assert torch.equal(entries.of(h), h[h > threshold])


@given(seeds, st.floats(-1, 3))
def test_padded_codes_hold_every_entry_once(seed, threshold):
    h = random(N_TOKENS, D_SAE, seed=seed)
    entries = above(h, torch.tensor(threshold, dtype=torch.float64))
    latents, values = entries.padded(entries.of(h))
    dense = torch.zeros(N_TOKENS, D_SAE, dtype=torch.float64).scatter_add(1, latents, values)
    assert torch.equal(dense, torch.where(h > threshold, h, 0))
    assert torch.equal(dense, entries.matrix(entries.of(h)))
    assert latents.shape[1] == max(1, int((h > threshold).sum(1).max()))


@pytest.mark.parametrize("threshold", [-10.0, 0.5, 10.0])  # all active, some, none
def test_products_have_the_values_and_gradients_of_dense_ones(way, threshold):
    """The whole chain of a training step, in float64, against autograd on dense matrices."""
    x, target = random(N_TOKENS, D_IN, seed=1), random(N_TOKENS, D_IN, seed=2)
    start = [random(D_IN, D_SAE, seed=3), random(D_SAE, seed=4), random(D_SAE, D_IN, seed=5), random(D_IN, seed=6)]
    results = []
    for sparsely in (True, False):
        W_enc, b_enc, W_dec, b_dec = (tensor.clone().requires_grad_() for tensor in start)
        if sparsely:
            with torch.no_grad():
                centred = x - b_dec
                h = centred @ W_enc + b_enc
                entries = above(h, torch.tensor(threshold))
            values = pre_activation(entries, h, centred, W_enc, b_enc, b_dec)
            x_hat = combine(entries, values.relu(), W_dec, b_dec)
        else:
            h = (x - b_dec) @ W_enc + b_enc
            x_hat = torch.where(h > threshold, h, 0).relu() @ W_dec + b_dec
        loss = (x_hat - target).square().sum()
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in (W_enc, b_enc, W_dec, b_dec))])
    for sparsely, densely in zip(*results, strict=True):
        assert torch.allclose(sparsely, densely, rtol=1e-9, atol=1e-9)


def test_gradients_in_single_precision_are_those_of_double_to_1e_5():
    x, W_enc, W_dec = (random(*shape, seed=i) for i, shape in enumerate([(256, 64), (64, 512), (512, 64)]))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        encoder, decoder = W_enc.to(dtype).requires_grad_(), W_dec.to(dtype).requires_grad_()
        h = x.to(dtype) @ encoder.detach()
        entries = active(top_k(x @ W_enc, 16), 512)
        values = pre_activation(entries, h, x.to(dtype), encoder, torch.zeros(512, dtype=dtype), torch.zeros(64))
        (combine(entries, values.relu(), decoder) - x.to(dtype)).square().mean().backward()
        gradients.append((encoder.grad.double(), decoder.grad.double()))
    for single, double in zip(*gradients, strict=True):
        assert (single - double).abs().max() <= 1e-5 * double.abs().max()


def test_padding_changes_no_reconstruction(way):
    h, W_dec = random(N_TOKENS, D_SAE), random(D_SAE, D_IN, seed=1)
    entries = above(h, torch.tensor(0.8))
    latents, values = entries.padded(entries.of(h))
    assert torch.allclose(
        combine(active(latents, D_SAE), values.flatten(), W_dec), combine(entries, entries.of(h), W_dec)
    )


@pytest.mark.parametrize("threshold", [0.3, 1.1])
def test_the_gradient_of_a_threshold_is_a_finite_difference_over_its_bandwidth(threshold):
    """A loss over a fine grid of h is smooth enough to be differenced; the box estimate is that difference."""
    h = torch.linspace(-1, 3, 400_001, dtype=torch.float64)
    bandwidth, weight = 0.1, 1.7  # weight: what one more active latent costs

    def loss(theta):
        fires = h > theta
        return ((h * fires).sum() + weight * fires.sum()) / len(h)

    theta = torch.full_like(h, threshold, requires_grad=True)
    values, counted = jump_relu(h, theta, bandwidth)
    ((values.sum() + weight * counted.sum()) / len(h)).backward()
    difference = (loss(threshold + bandwidth / 2) - loss(threshold - bandwidth / 2)) / bandwidth
    assert theta.grad.sum().item() == pytest.approx(difference.item(), rel=1e-3)


def test_the_gradient_of_what_fires_is_that_of_a_finite_difference():
    h = torch.tensor([-0.4, 0.2, 0.9, 2.0], dtype=torch.float64, requires_grad=True)
    theta = torch.full_like(h, 0.5)
    values, counted = jump_relu(h, theta, 1e-3)
    (values.square().sum() + counted.sum()).backward()
    assert values.tolist() == [0, 0, 0.9, 2.0]
    assert counted.tolist() == [0, 0, 1, 1]
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        moved = [jump_relu(h.detach() + sign * step, theta, 1e-3)[0].square().sum() for sign in (1, -1)]
        assert h.grad[i].item() == pytest.approx(((moved[0] - moved[1]) / 2e-6).item(), abs=1e-6)

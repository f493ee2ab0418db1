"""The SAE: its code, its file, and what learning must and must not touch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.learning import Learner, auxk_loss, geometric_median
from sdxl_sae_kit.sae import FORMAT_KEY, SAE
from sdxl_sae_kit.sparse import decode_sparse, to_dense, top_k

SITE = Site("tiny-turbo", "abc", "mid.0", 1, 0.0)
CONFIG = SAEConfig(k=3, expansion=4, auxk=5, dead_after=100, lr=1e-2)
seeds = st.integers(0, 2**31)


def random_sae(seed=0, d_in=6, config=CONFIG):
    """Every weight random, so that no misplaced bias goes unnoticed; decoder rows of unit norm."""
    sae = SAE(replace(config, seed=seed), d_in, SITE, "test-00000000")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def tokens(n=64, d_in=6, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@given(seeds)
def test_the_code_is_that_of_a_plain_numpy_top_k(seed):
    sae, x = random_sae(seed), tokens(16, seed=seed)
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    h = (x.double().numpy() - b_dec) @ W_enc + b_enc
    z = np.zeros_like(h)
    for i, row in enumerate(h):
        best = np.argsort(-row)[:3]
        z[i, best] = np.maximum(row[best], 0)
    assert np.allclose(sae.encode(x).detach(), z, atol=1e-4)
    assert np.allclose(sae(x).detach(), z @ W_dec + b_dec, atol=1e-4)


@given(seeds)
def test_codes_are_non_negative_and_have_at_most_k_active_latents(seed):
    z = random_sae(seed).encode(tokens(32, seed=seed))
    assert (z >= 0).all()
    assert ((z > 0).sum(dim=-1) <= 3).all()


def test_shapes_of_any_number_of_axes_go_through():
    sae, x = random_sae(), tokens(24).reshape(2, 3, 4, 6)
    assert sae.encode(x).shape == (2, 3, 4, 24)
    assert torch.allclose(sae(x).reshape(-1, 6), sae(x.reshape(-1, 6)))
    assert torch.allclose(sae.decode(sae.encode(x)), sae(x), atol=1e-5)


@given(seeds)
def test_sparse_decoding_has_the_gradients_of_dense_decoding(seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    decoder = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    gradients = []
    for decode in (decode_sparse, lambda i, v, w: to_dense(i, v, 24) @ w):
        a, w = h.clone().requires_grad_(), decoder.clone().requires_grad_()
        (decode(*top_k(a, 3), w) - target).square().sum().backward()
        gradients.append((a.grad, w.grad))
    for sparse, dense in zip(*gradients, strict=True):
        assert torch.allclose(sparse, dense, rtol=1e-9, atol=1e-9)


def test_the_start_is_the_papers():
    sae = SAE(CONFIG, 6)
    assert sae.W_enc.abs().max() <= 6**-0.5
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-6)
    assert torch.allclose(sae.W_dec / sae.W_dec[:, :1], sae.W_enc.T / sae.W_enc.T[:, :1], rtol=1e-4)
    assert not sae.b_enc.any()


# The file -----------------------------------------------------------------------------------------------------------


def test_a_saved_sae_reads_back_exactly(tmp_path):
    sae, x = random_sae(), tokens()
    sae.mean_activation.copy_(torch.rand(24))
    sae.metrics = {"explained_variance": 0.5, "explained_variance_interval": [0.4, 0.6]}
    sae.save(tmp_path / "sae.safetensors")
    again = SAE.load(tmp_path / "sae.safetensors")
    assert (again.config, again.site, again.name, again.metrics) == (sae.config, sae.site, sae.name, sae.metrics)
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.mean_activation, sae.mean_activation)
    assert again.digest == sae.digest
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda t, h: t.pop("W_dec"), "tensor W_dec is missing"),
        (lambda t, h: t.update(W_dec=t["W_dec"].T.contiguous()), "tensor W_dec is missing, unknown, misshapen"),
        (lambda t, h: t["b_enc"].fill_(float("nan")), "b_enc .* not finite"),
        (lambda t, h: t.update({"../../x": torch.zeros(1)}), r"tensor \.\./\.\./x is missing, unknown"),
        (lambda t, h: h.update(version=9), "in format version 1: it has version 9"),
        (lambda t, h: h.clear(), "it has no such header"),
        (lambda t, h: h.pop("site"), "the header lacks site"),
        (
            lambda t, h: h["site"].update(kind="output"),
            "was trained on outputs of mid.0; this kit",
        ),
        (lambda t, h: h["config"].update(expansion=10**9), r"W_enc has shape \(6, 24\), not \(d_in, 1000000000·d_in\)"),
        (lambda t, h: h.update(config={"k": 3, "activation": "gelu"}), "SAEConfig has settings .*activation"),
    ],
)
def test_a_harmed_file_is_refused_with_the_reason(tmp_path, harm, complaint):
    path = tmp_path / "sae.safetensors"
    random_sae().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT_KEY])
    tensors = load_file(path)
    harm(tensors, header)
    save_file(tensors, path, {FORMAT_KEY: json.dumps(header)})
    with pytest.raises(ArtifactError, match=complaint):
        SAE.load(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not a file of tensors")
    for path in (tmp_path / "x", tmp_path / "missing"):
        with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
            SAE.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0}, {"k": "10"}, {"k": 2.5}, {"k": True}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")},
        {"lr": "fast"}, {"expansion": 0}, {"seed": -1}, {"auxk_coef": 0.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(wrong, unchecked_types):
    (name,) = wrong
    with pytest.raises(KitError, match=rf"SAEConfig: {name} must be"):
        SAEConfig(**wrong)
    with pytest.raises(KitError, match="k=100 is more than the 24 latents"):
        SAE(SAEConfig(k=100, expansion=4), 6)


def test_whole_numbers_of_other_kinds_become_plain_ones(unchecked_types):
    assert type(SAEConfig(k=np.int64(7)).k) is int  # or the recipe could not be written


# Learning -----------------------------------------------------------------------------------------------------------


def test_auxk_gives_b_dec_no_gradient_but_gives_dead_latents_one_and_no_others():
    sae, x, dead = random_sae(), tokens(), torch.tensor([2, 7, 11])
    error = (x - sae(x)).clone()  # carries a graph on purpose: auxk_loss must cut it
    auxk_loss(sae, x, error, dead).backward()
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()
    alive = [i for i in range(24) if i not in dead]
    assert sae.W_enc.grad[:, dead].any(dim=0).all()
    assert not sae.W_enc.grad[:, alive].any()
    assert sae.W_dec.grad[dead].any(dim=1).all()
    assert not sae.W_dec.grad[alive].any()


def test_auxk_is_zero_when_nothing_is_dead_and_about_the_formula_otherwise():
    sae, x = random_sae(), tokens()
    error = (x - sae(x)).detach()
    assert auxk_loss(sae, x, error, torch.tensor([], dtype=torch.long)) == 0
    dead = torch.tensor([1, 4, 9, 20])
    h = (x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead]  # auxk=5 > 4 dead: all of them, rectified
    error_hat = h.relu() @ sae.W_dec[dead]
    expected = ((error_hat - error) ** 2).mean() / error.var(dim=0, unbiased=False).mean()
    assert auxk_loss(sae, x, error, dead).item() == pytest.approx(expected.item(), rel=1e-5)


def test_auxk_falls_as_dead_latents_learn_the_error():
    sae, x, dead = random_sae(), tokens(), torch.arange(24)
    error = (x - sae(x)).detach()
    adam = torch.optim.Adam(sae.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        loss = auxk_loss(sae, x, error, dead)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_geometric_median_minimises_the_summed_distance_and_shrugs_off_outliers():
    x = torch.cat([tokens(200), torch.full((20, 6), 500.0)])
    median = geometric_median(x)
    cost = lambda p: (x - p).norm(dim=1).sum()  # noqa: E731
    for step in torch.eye(6) * 1e-2:
        assert cost(median) <= min(cost(median + step), cost(median - step)) + 1e-3
    assert (median - tokens(200).mean(0)).norm() < 1 < (x.mean(0) - tokens(200).mean(0)).norm()


def test_the_median_of_identical_tokens_is_that_token():
    assert torch.allclose(geometric_median(torch.ones(10, 6)), torch.ones(6))


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_after_every_step_rows_are_unit_and_the_loss_of_a_repeated_batch_falls(seed):
    x = tokens(256, seed=seed)
    learner = Learner(SAE(replace(CONFIG, seed=seed), 6, SITE), x)
    logs = [learner.step(x) for _ in range(60)]
    assert torch.allclose(learner.sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-6)
    assert logs[-1].unexplained < logs[0].unexplained
    assert all(0 <= log.l0 <= 3 for log in logs)


def test_the_first_loss_is_the_unexplained_share_of_variance():
    x = tokens(512)
    learner = Learner(SAE(CONFIG, 6, SITE), x)
    x_hat = learner.sae(x)
    expected = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert learner.step(x).unexplained == pytest.approx(expected.item(), rel=1e-5)


def test_a_latent_is_dead_after_so_many_tokens_of_silence_and_lives_again_when_it_fires():
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc[5] = -100.0  # cannot fire
    learner = Learner(sae, tokens())
    for _ in range(3):
        learner._count(*sae.encode_sparse(tokens(40)))
    assert learner.silent[5] == 120 >= sae.config.dead_after
    assert (learner.silent == 0).any()
    with torch.no_grad():
        sae.b_enc[5] = 100.0
    learner._count(*sae.encode_sparse(tokens(40)))
    assert learner.silent[5] == 0


def test_a_loss_that_is_not_finite_stops_with_the_step():
    learner = Learner(random_sae(), tokens())
    with pytest.raises(KitError, match="loss is nan at step 0"):
        learner.step(torch.full((4, 6), float("nan")))


def test_a_learner_resumed_from_its_state_goes_on_bit_for_bit():
    batches = [tokens(64, seed=s) for s in range(20)]
    straight = Learner(SAE(CONFIG, 6, SITE), tokens())
    for x in batches:
        straight.step(x)
    first = Learner(SAE(CONFIG, 6, SITE), tokens())
    for x in batches[:10]:
        first.step(x)
    second = Learner(SAE(replace(CONFIG, seed=99), 6, SITE), tokens())
    second.load_state({key: value.clone() for key, value in first.state().items()})
    for x in batches[10:]:
        second.step(x)
    for one, other in zip(straight.state().values(), second.state().values(), strict=True):
        assert torch.equal(one, other)

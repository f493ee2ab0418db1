"""Learning: the loss and its gradients, what AuxK must and must not touch, schedules, and resuming bit for bit."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_saes import CONFIG, SITE, random_sae, tokens

from sdxl_sae_kit import sparse
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.learning import Learner, LossError, auxk_error, schedule
from sdxl_sae_kit.metrics import geometric_median
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.starts import set_threshold

seeds = st.integers(0, 2**31)
KINDS = ["topk", "batchtopk", "jumprelu"]


def learner(config=CONFIG, x=None, **how):
    return Learner(SAE(config, 6, SITE), tokens() if x is None else x, **how)


def dead_of(sae, x, dead):
    """AuxK's error with its arguments: the pre-activations, and an SAE error that carries a graph on purpose."""
    centred = (x - sae.b_pre).detach()
    return auxk_error(sae, centred, sae.pre_activations(x).detach(), (x - sae(x)).clone(), torch.tensor(dead))


# The loss -----------------------------------------------------------------------------------------------------------


def dense_loss(sae, x, dead, scale, prefixes, auxk, coefficient, bandwidth):
    """The loss by its formula, on dense matrices in double precision, differentiated by autograd."""
    W_enc, b_enc, W_dec, b_dec, threshold = (
        getattr(sae, name).detach().double().requires_grad_()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    x, n = x.double(), len(x)
    h = (x - b_dec) @ W_enc + b_enc
    mask = torch.zeros_like(h, dtype=torch.bool)
    if sae.config.kind == "topk":
        mask.scatter_(1, h.topk(sae.config.k).indices, True)
    elif sae.config.kind == "batchtopk":
        mask.view(-1)[h.flatten().topk(sae.config.k * n).indices] = True
    else:
        mask = h > threshold
    z = torch.where(mask, h, 0).relu()
    if sae.config.kind == "jumprelu":  # the box estimate, written as a term with that gradient and no value
        box = (((h - threshold).abs() < bandwidth / 2) / bandwidth).detach()
        z = z - (threshold - threshold.detach()) * (threshold * box).detach()
    parts = []
    for end in [*(round(share * sae.d_sae) for share in prefixes), sae.d_sae]:
        parts.append(((z[:, :end] @ W_dec[:end] + b_dec - x) ** 2).mean() * scale)
    loss, error = sum(parts) / len(parts), (x - (z @ W_dec + b_dec)).detach()
    if len(dead):
        aux = (x - b_dec.detach()) @ W_enc[:, dead] + b_enc[dead]
        best = torch.zeros_like(aux, dtype=torch.bool).scatter(1, aux.topk(min(auxk, len(dead))).indices, True)
        e_hat = torch.where(best, aux, 0).relu() @ W_dec[dead]
        loss = loss + coefficient * ((e_hat - error) ** 2).mean() / ((error - error.mean(0)) ** 2).mean()
    if sae.config.kind == "jumprelu":
        l0 = mask.double().sum(1).mean()
        moving = -((threshold - threshold.detach()) * box).sum(1).mean()
        loss = loss + 2 * (l0 / sae.config.k - 1) / sae.config.k * moving
    loss.backward()
    return [p.grad for p in (W_enc, b_enc, W_dec, b_dec, threshold)]


@pytest.mark.parametrize("dead", [[], [2, 7, 11, 30, 31, 39]])
@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [("topk", ()), ("topk", (0.25, 0.5)), ("batchtopk", ()), ("batchtopk", (0.25, 0.5)), ("jumprelu", ())],
)
def test_gradients_of_every_kind_are_those_of_dense_autograd_to_1e_5(kind, prefixes, dead):
    config = SAEConfig(k=4, kind=kind, expansion=40 / 6, prefixes=prefixes, auxk=3)
    for seed in range(3):
        sae, x = random_sae(seed, config=config), tokens(48, seed=seed)
        one = Learner(sae, x)
        with torch.no_grad():
            sae.b_dec.copy_(torch.randn(6, generator=torch.Generator().manual_seed(seed)))
            sae.b_enc[dead] -= 1.0  # so that some of what AuxK takes is not positive
        loss, _, _ = one._forward(x, torch.tensor(dead, dtype=torch.int64), 4, len(x))
        loss.backward()
        wanted = dense_loss(sae, x, dead, one.scale.item(), prefixes, 3, config.auxk_coef, one.bandwidth)
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        for name, gradient in zip(names, wanted, strict=True):
            if (found := getattr(sae, name).grad) is None:
                assert gradient is None, name
                continue
            assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp_min(1e-3), name


def test_the_dense_way_of_a_gpu_learns_the_same(monkeypatch):
    sparsely, densely = learner(), learner()
    for seed in range(5):
        sparsely.step(tokens(seed=seed))
        with monkeypatch.context() as patch:
            patch.setitem(sparse._DENSE_FROM, "cpu", 0.0)
            densely.step(tokens(seed=seed))
    for one, other in zip(sparsely.sae.parameters(), densely.sae.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_first_loss_is_the_unexplained_share_of_variance():
    x = tokens(512)
    one = learner(x=x)
    x_hat = one.sae(x)
    expected = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert one.step(x).unexplained == pytest.approx(expected.item(), rel=1e-5)


def test_batchtopk_trains_with_k_active_latents_on_average_and_not_per_token():
    x = torch.cat([tokens(32) * 0.1, tokens(32) * 10])
    one = learner(replace(CONFIG, kind="batchtopk"), x)
    entries = one._select(one.sae.pre_activations(x).detach(), 3, 64)
    assert len(entries.latents) == 3 * 64
    assert entries.tokens.bincount(minlength=64).unique().numel() > 1


@pytest.mark.parametrize("l0", [0.5, 3, 24])
def test_one_threshold_leaves_so_many_active_on_average(l0):
    sae, x = random_sae(config=replace(CONFIG, kind="batchtopk", k=5)), tokens(1000)
    set_threshold(sae, x, l0)
    positive = (sae.pre_activations(x) > 0).sum() / 1000
    assert (sae.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(min(l0, positive.item()), abs=2e-3)


def test_a_jumprelu_reaches_the_l0_it_aims_at():
    x = tokens(512)
    one = learner(replace(CONFIG, kind="jumprelu", k=2, lr=3e-3), x)
    logs = [one.step(x) for _ in range(400)]
    assert logs[-1].l0 == pytest.approx(2, rel=0.15)
    assert logs[-1].unexplained < logs[0].unexplained
    freely = learner(replace(CONFIG, kind="jumprelu", k=None, lr=3e-3, sparsity_coef=3.0), x)
    l0 = [freely.step(x).l0 for _ in range(400)]
    assert l0[-1] < 0.8 * l0[0]


def test_matryoshka_prefixes_explain_on_their_own():
    x = tokens(512)
    nested, plain = (learner(replace(CONFIG, prefixes=prefixes), x) for prefixes in ((0.25,), ()))
    for _ in range(200):
        nested.step(x)
        plain.step(x)
    left = [((x - one.sae.decode(one.sae.encode(x) * (torch.arange(24) < 6))) ** 2).mean() for one in (nested, plain)]
    assert left[0] < 0.7 * left[1]


# AuxK ---------------------------------------------------------------------------------------------------------------


def test_auxk_gives_b_dec_no_gradient_but_gives_dead_latents_one_and_no_others():
    sae, x, dead = random_sae(), tokens(), [2, 7, 11]
    dead_of(sae, x, dead).backward()
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()
    alive = [i for i in range(24) if i not in dead]
    assert sae.W_enc.grad[:, dead].any(dim=0).all()
    assert not sae.W_enc.grad[:, alive].any()
    assert sae.W_dec.grad[dead].any(dim=1).all()
    assert not sae.W_dec.grad[alive].any()


def test_auxk_is_about_the_formula():
    sae, x, dead = random_sae(), tokens(), [1, 4, 9, 20]
    h = (x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead]  # auxk=5 > 4 dead: all of them, rectified
    expected = ((h.relu() @ sae.W_dec[dead] - (x - sae(x))) ** 2).sum()
    assert dead_of(sae, x, dead).item() == pytest.approx(expected.item(), rel=1e-5)


def test_auxk_falls_as_dead_latents_learn_the_error():
    sae, x = random_sae(), tokens()
    error, centred = (x - sae(x)).detach(), (x - sae.b_dec).detach()
    adam, losses = torch.optim.Adam(sae.parameters(), 1e-2), []
    for _ in range(100):
        loss = auxk_error(sae, centred, sae.pre_activations(x).detach(), error, torch.arange(24))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_auxk_is_zero_while_nothing_is_dead_and_told_when_something_is():
    one = learner()
    assert one.step(tokens()).auxk == 0
    one.silent[3:9] = 1000
    assert one.step(tokens()).auxk > 0
    without = learner(replace(CONFIG, auxk_coef=0.0))
    without.silent[3:9] = 1000
    assert without.step(tokens()).auxk == 0


def test_a_latent_is_dead_after_so_many_tokens_of_silence_and_lives_again_when_it_fires():
    one = learner()
    with torch.no_grad():
        one.sae.b_enc[5] = -100.0  # cannot fire
    for _ in range(3):
        one.step(tokens(40))
    assert one.silent[5] == 120 >= CONFIG.dead_after
    assert (one.silent == 0).any()
    with torch.no_grad():
        one.sae.b_enc[5] = 5.0
    assert one.step(tokens(40)).dead_share > 0
    assert one.silent[5] == 0


# Schedules ----------------------------------------------------------------------------------------------------------


def test_lr_rises_stays_and_falls_as_the_log_tells():
    one = learner(replace(CONFIG, warmup_steps=4, decay_steps=5), n_steps=12)
    told = [one.step(tokens()).lr / CONFIG.lr for _ in range(12)]
    assert told == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert one.adam.param_groups[0]["lr"] == pytest.approx(0.2 * CONFIG.lr)


def test_k_falls_as_the_log_tells_and_so_do_active_latents():
    config = replace(CONFIG, k=2, k_start=12, anneal_steps=5)
    one = learner(config, tokens(256))
    logs = [one.step(tokens(256)) for _ in range(8)]
    assert [log.k for log in logs] == [12, 10, 8, 6, 4, 2, 2, 2]
    assert all(log.l0 <= log.k for log in logs) and logs[0].l0 > logs[-1].l0
    assert schedule(config, 5, None) == (config.lr, 2)


def test_dead_latents_start_anew_on_badly_explained_tokens_when_it_is_time():
    one = learner(replace(CONFIG, resample_every=256, dead_after=100, auxk_coef=0.0), tokens(512))
    with torch.no_grad():
        one.sae.b_enc[:10] = -100.0
    logs = [one.step(tokens(64, seed=i)) for i in range(8)]
    assert [log.resampled > 0 for log in logs[:7]] == [False, False, False, True, False, False, False]
    assert logs[3].resampled >= 10
    assert not one.adam.state[one.sae.W_dec]["exp_avg"].isnan().any()
    assert (one.silent[:10] < 100 + 64 * 4).all()
    assert (one.sae.b_enc[:10] > -1).all()


def test_resampled_latents_point_at_tokens_of_the_sample():
    x = tokens(300)
    one = learner(replace(CONFIG, resample_every=64, dead_after=1, auxk_coef=0.0), x)
    with torch.no_grad():
        one.sae.b_enc[:10] = -100.0
    one.step(tokens(64))
    directions = torch.nn.functional.normalize(x - one.sae.b_dec.detach())
    assert torch.allclose((one.sae.W_dec[:10] @ directions.T).amax(1), torch.ones(10), atol=1e-5)


# Steps --------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from(KINDS))
def test_after_every_step_rows_are_unit_and_the_loss_of_a_repeated_batch_falls(seed, kind):
    x = tokens(256, seed=seed)
    one = Learner(SAE(replace(CONFIG, seed=seed, kind=kind), 6, SITE), x)
    logs = [one.step(x) for _ in range(60)]
    assert torch.allclose(one.sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-6)
    assert logs[-1].unexplained < logs[0].unexplained
    assert (one.sae.threshold >= 0).all()
    assert [log.tokens for log in logs] == list(range(256, 256 * 61, 256))


@pytest.mark.parametrize("normalize", ["scale", "channels", "whiten", "layer_norm", "constant_norm"])
def test_training_sees_normalised_tokens(normalize):
    x = tokens(512) * 100 + torch.arange(6) * 50
    x[:, 1] += x[:, 0]  # channels are no axes
    one = learner(replace(CONFIG, normalize=normalize), x)
    x_normal = one.sae.normalised(x)
    if normalize == "whiten":
        assert torch.allclose(torch.cov(x_normal.T, correction=0), torch.eye(6), atol=1e-3)
    if normalize in ("channels", "whiten"):
        assert torch.allclose(x_normal.mean(0), torch.zeros(6), atol=1e-4)
        assert torch.allclose(x_normal.std(0, correction=0), torch.ones(6), atol=1e-3)
    else:
        assert x_normal.square().mean().item() == pytest.approx(1, rel=0.2)
    logs = [one.step(x) for _ in range(100)]
    assert logs[-1].unexplained < 0.5 * logs[0].unexplained


def test_fused_adam_on_weights_that_lie_latent_by_latent_is_plain_adam():
    fused, x = learner(), tokens()
    plain = learner()
    plain.adam = torch.optim.Adam(plain.adam.param_groups, betas=(0.9, 0.999), eps=6.25e-10, fused=False, foreach=False)
    for _ in range(10):
        fused.step(x)
        plain.step(x)
    for one, other in zip(fused.sae.parameters(), plain.sae.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_learns_about_the_same_in_the_sparse_way_and_the_dense(kind, dense, monkeypatch):
    if dense:
        monkeypatch.setitem(sparse._DENSE_FROM, "cpu", 0.0)
    x, config = tokens(256), replace(CONFIG, kind=kind)
    plain, other = learner(config, x), learner(config, x, precision="bfloat16")
    for _ in range(40):
        expected, found = plain.step(x).unexplained, other.step(x).unexplained
    assert found == pytest.approx(expected, rel=0.1)
    assert {parameter.dtype for parameter in other.sae.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_a_compiled_step_learns_the_same(monkeypatch, unchecked_types, dense):
    if dense:
        monkeypatch.setitem(sparse._DENSE_FROM, "cpu", 0.0)
    compile = torch.compile  # without a compiler, which not every machine has
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    x = tokens(256)
    plain, other = learner(x=x), learner(x=x, compile=True)
    for _ in range(5):
        assert other.step(x).unexplained == pytest.approx(plain.step(x).unexplained, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_changes_nothing():
    one = learner()
    one.step(tokens())
    before = {name: tensor.clone() for name, tensor in one.sae.state_dict().items()}
    with pytest.raises(LossError, match=r"at step 1 the loss is nan. Lower lr, or look for tokens that are not finite"):
        one.step(torch.full((4, 6), float("nan")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.sae.state_dict().items())


def test_a_loss_that_explodes_stops_with_the_step():
    one = learner()
    one.step(tokens())
    with pytest.raises(
        LossError, match=r"at step 1 the loss has grown from .* Lower lr, or raise warmup_steps"
    ) as info:
        one.step(tokens() * 1000)
    assert info.value.exploded


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_resumed_from_its_state_goes_on_bit_for_bit(kind):
    config = replace(CONFIG, kind=kind, resample_every=500, warmup_steps=3, decay_steps=4)
    batches = [tokens(64, seed=s) for s in range(20)]
    straight = learner(config, n_steps=20)
    for x in batches:
        straight.step(x)
    first = learner(config, n_steps=20)
    for x in batches[:10]:
        first.step(x)
    second = learner(config, n_steps=20)
    for parameter in second.sae.parameters():
        parameter.data.add_(1)  # what it starts from must not matter
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_state({key: value.contiguous().clone() for key, value in first.state().items()})
    for x in batches[10:]:
        second.step(x)
    states = [one.state() | one.sae.state_dict() for one in (straight, second)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# The start ----------------------------------------------------------------------------------------------------------


def test_the_geometric_median_minimises_the_summed_distance_and_shrugs_off_outliers():
    x = torch.cat([tokens(200), torch.full((20, 6), 500.0)])
    median = geometric_median(x)
    cost = lambda p: (x - p).norm(dim=1).sum()  # noqa: E731
    for step in torch.eye(6) * 1e-2:
        assert cost(median) <= min(cost(median + step), cost(median - step)) + 1e-3
    assert (median - tokens(200).mean(0)).norm() < 1 < (x.mean(0) - tokens(200).mean(0)).norm()


def test_the_median_of_identical_tokens_is_that_token():
    assert torch.allclose(geometric_median(torch.ones(10, 6)), torch.ones(6))


def test_a_jumprelu_starts_at_the_l0_it_aims_at():
    x = tokens(2000)
    one = learner(replace(CONFIG, kind="jumprelu", k=4), x)
    assert (one.sae.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(4, abs=0.01)
    assert one.bandwidth >= 0.2 * one.sae.threshold[0].item() > 0


def test_nothing_but_the_pre_activations_is_as_large_as_every_latent_of_every_token():
    """Between the forward pass and the backward one, when memory is fullest."""
    config = SAEConfig(k=4, expansion=200 / 6, auxk=8, prefixes=(0.5,))
    x = tokens(300)
    one = Learner(SAE(config, 6, SITE), x)

    def large():
        gc.collect()
        return {t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() >= 300 * 200}

    before = large()  # of other tests, perhaps
    _loss, *_ = one._forward(x, torch.arange(20), 4, 300)
    assert large() - before == {one._h.data_ptr()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        one._forward(x, torch.arange(20), 4, 300)
    assert max(saved) < 300 * 200


# Edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [tokens(1), tokens(1).repeat(50, 1), tokens(2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_batch_of_one_token_or_of_equal_ones_is_no_explosion(kind, x):
    one = learner(replace(CONFIG, kind=kind))
    one.silent[:12] = 1000
    for _ in range(3):
        assert one.step(x).auxk < 10


def test_lr_never_falls_below_nothing():
    one = learner(replace(CONFIG, decay_steps=3), n_steps=4)
    assert [one.step(tokens()).lr >= 0 for _ in range(8)] == [True] * 8


@pytest.mark.parametrize("k", [12, 20, 24])
def test_a_jumprelu_that_aims_at_more_than_half_of_its_latents_still_learns(k):
    x = tokens(256)
    one = learner(replace(CONFIG, kind="jumprelu", k=k, lr=1e-3), x)
    logs = [one.step(x) for _ in range(50)]
    assert one.bandwidth > 0 and one.sae.threshold.isfinite().all()
    assert logs[-1].unexplained < logs[0].unexplained and logs[-1].l0 > 5


@pytest.mark.parametrize("kind", KINDS)
def test_all_latents_may_be_active(kind):
    one = learner(replace(CONFIG, kind=kind, k=24))
    assert one.step(tokens(5)).l0 <= 24


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
def test_a_token_of_zeros_is_no_trouble(normalize):
    x = torch.cat([tokens(63), torch.zeros(1, 6)])
    assert learner(replace(CONFIG, normalize=normalize), x).step(x).unexplained > 0


def test_latents_do_not_start_anew_on_tokens_of_zeros():
    x = torch.cat([tokens(60), torch.zeros(140, 6)])
    one = learner(replace(CONFIG, resample_every=64, dead_after=1, auxk_coef=0.0, subtract_b_dec=False), x)
    with torch.no_grad():
        one.sae.b_enc[:20] = -100.0
    one.step(tokens(64))
    assert torch.allclose(one.sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-5)

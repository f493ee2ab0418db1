"""Stability: planted agreement is found, chance is told from it, and what cannot be compared is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.evaluation import controls, evaluate, stability
from sdxl_sae_kit.html import show_table
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tokens import Tokens

D_IN, D_SAE = 32, 64
SITE = Site("a model", "a revision", "mid.0", 1, 0.0)


def an_sae(seed, rows=None, alive=None, site=SITE, d_in=D_IN, **settings):
    """An SAE with these decoder rows, of which these latents are alive."""
    sae = SAE(SAEConfig(k=4, expansion=2, seed=seed, **settings), d_in, site, f"seed {seed}").requires_grad_(False)
    if rows is not None:
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.mean_activation[:] = 1 if alive is None else torch.as_tensor(alive).float()
    return sae


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(*saes):
    """Rows by condition, of two SAEs."""
    return {row["condition"]: row for row in stability(saes)}


def test_a_split_that_is_not_there_is_refused(small_cache, small_saes, monkeypatch, unchecked_types):
    sae = small_saes["up.0.1", "k8"]
    tokens = Tokens([noise(seed, 3000, D_IN) for seed in range(4)], SITE)
    for data, split, told in (
        (small_cache, "heldout", "No split 'heldout'.* Did you mean 'held_out'"),
        (tokens, "heldout", "Tokens have no split 'heldout', but held_out and train. Did you mean 'held_out'"),
        (tokens, "all", "Tokens have no split 'all'"),
    ):
        with pytest.raises(KitError, match=told):
            evaluate(sae if data is small_cache else an_sae(0), data, split)
    monkeypatch.setitem(vars(small_cache.prompts), "held_out", np.zeros(small_cache.n_images, dtype=bool))
    with pytest.raises(KitError, match="has no images in the split 'held_out'"):
        evaluate(sae, small_cache)


def test_a_reordered_noisy_copy_agrees_far_above_both_controls():
    rows = noise(0, D_SAE, D_IN)
    copy = (rows + 0.3 * noise(1, D_SAE, D_IN))[torch.randperm(D_SAE)]  # cosine about 1 / √(1 + 0.3²) = 0.958
    found = measured(an_sae(0, rows), an_sae(1, copy))
    assert list(found) == ["trained", "shuffled", "untrained"]
    assert found["trained"]["mean cosine"] == pytest.approx(1 / np.sqrt(1.09), abs=0.01)
    assert found["trained"]["above 0.9"] > 0.95 and found["trained"]["above 0.7"] == 1
    for control in ("shuffled", "untrained"):
        assert found[control]["mean cosine"] < 0.5 and found[control]["above 0.9"] == 0
    for row in found.values():
        assert row["interval"][0] <= row["mean cosine"] <= row["interval"][1]
        assert (row["latents"], row["left over"]) == (D_SAE, 0)


def test_independent_dictionaries_agree_no_more_than_the_controls():
    found = measured(an_sae(0, noise(0, D_SAE, D_IN)), an_sae(1, noise(1, D_SAE, D_IN)))
    for control in ("shuffled", "untrained"):
        assert found["trained"]["mean cosine"] == pytest.approx(found[control]["mean cosine"], abs=0.02)


def test_sharing_a_few_strong_axes_is_not_sharing_latents():
    """Independent rows along the same strong axes, round the same mean: no more alike than shuffled ones are."""
    strong = 0.9 ** torch.arange(D_IN) * 3
    turn = torch.linalg.qr(noise(9, D_IN, D_IN))[0]
    one, other = ((noise(seed, D_SAE, D_IN) * strong + strong / 2) @ turn for seed in (0, 1))
    found = measured(an_sae(0, one), an_sae(1, other))
    assert found["trained"]["mean cosine"] == pytest.approx(found["shuffled"]["mean cosine"], abs=0.02)
    assert found["trained"]["mean cosine"] > found["untrained"]["mean cosine"] + 0.1


def test_dead_latents_are_left_out():
    rows, alive = noise(0, D_SAE, D_IN), torch.arange(D_SAE) < 40
    other = torch.where(alive[:, None], rows, -rows)  # the dead ones would not match
    found = measured(an_sae(0, rows, alive), an_sae(1, other, torch.arange(D_SAE) < 50))
    assert (found["trained"]["latents"], found["trained"]["left over"]) == (40, 10)
    assert found["trained"]["mean cosine"] == pytest.approx(1)
    assert found["untrained"]["latents"] == 40


def test_every_pair_has_its_rows_and_they_make_a_table():
    saes = {("mid.0", f"s{seed}"): an_sae(seed, noise(seed, D_SAE, D_IN)) for seed in range(3)}
    rows = stability(saes)
    assert [row["seeds"] for row in rows[::3]] == ["0 and 1", "0 and 2", "1 and 2"]
    assert rows == stability(list(saes.values()))
    assert "0 and 2" in show_table(rows, "Stability")._repr_html_()


@pytest.mark.parametrize(
    ("saes", "told"),
    [
        (lambda: [an_sae(0)], "got 1"),
        (lambda: [an_sae(0), an_sae(1, site=replace(SITE, hookpoint="up.0.1"))], "site"),
        (lambda: [an_sae(0), an_sae(1, site=replace(SITE, model="another"))], "site"),
        (lambda: [an_sae(0), an_sae(1, d_in=16)], "shape"),
        (lambda: [an_sae(0), an_sae(1, lr=1e-3)], "config"),
        (lambda: [an_sae(0), an_sae(1), an_sae(0)], "0, 1, 0"),
        (lambda: [an_sae(0), an_sae(1, alive=[0] * D_SAE)], "no alive latent"),
    ],
)
def test_what_cannot_be_compared_is_refused(saes, told):
    with pytest.raises(KitError, match=told):
        stability(saes())


def test_controls_are_the_best_of_as_many_axes(small_saes, small_cache):
    sae = small_saes["up.0.1", "k8"]
    found = controls(sae, small_cache)
    assert list(found) == ["untrained", "channels", "PCA"]
    x = small_cache.read("up.0.1", range(20)).flatten(0, 2).float()
    tokens = small_cache.sample("up.0.1", 40_960).double()
    mean = tokens.mean(0)
    eigenvectors = torch.linalg.svd(tokens - mean, full_matrices=False)[2]
    for name, basis in (("channels", torch.eye(96).double()), ("PCA", eigenvectors)):
        control = found[name]
        coordinates = (x.double() - mean) @ basis.T
        kept = coordinates.abs().argsort(dim=1, descending=True)[:, :8]
        best = torch.zeros_like(coordinates).scatter(1, kept, coordinates.gather(1, kept))
        assert torch.allclose(control.decode(control.encode(x)).double(), best @ basis + mean, atol=2e-3)
        assert control.site == sae.site and control.d_sae == 192 and sae.name in control.name
    assert found["untrained"].d_sae == sae.d_sae

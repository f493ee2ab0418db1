"""The arithmetic of an edit, on made-up updates, against dense formulas in float64."""

import numpy as np
import pytest
import torch
from made_saes import CONFIG, random_sae

from sdxl_sae_kit import steering
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.edits import Edit
from sdxl_sae_kit.errors import EditError, KitError
from sdxl_sae_kit.hooks import Call
from sdxl_sae_kit.masks import Polygon
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.steering import Hook, digest_of

H, W, D, IMAGES = 4, 5, 6, 2
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
DTYPES = pytest.mark.parametrize("dtype", list(BITS), ids=["fp32", "fp16", "bf16"])
GUIDED = pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
RAMP = np.linspace(-1, 2, H * W).reshape(H, W)
HALF = np.linspace(0, 1, IMAGES * H * W).reshape(IMAGES, H, W).round(2)


@pytest.fixture
def sae():
    return random_sae(3).eval().requires_grad_(False)


def updates(guided, dtype=torch.float32, images=IMAGES):
    rows = images * (2 if guided else 1)
    x = torch.randn(rows, H, W, D, generator=torch.Generator().manual_seed(7)) * 2 + 1
    x[0, 0, 0] = -0.0
    return x.to(dtype)


def steered(sae, x, guided, step=0, n_steps=1, **settings):
    hook = Hook.of(Edit("mid.0", sae.name if sae else None, **settings), sae)
    changed = hook(x, Call("mid.0", step, n_steps, guided))
    return x if changed is None else changed


def by_formula(sae, x, guided, factor=1.0, *, add=(), scale=(), clamp=(), replace=(), reconstruct=False,
               ablate_block=False, where=None, cfg="both", gate=None, keep_norm=False, along=()):  # fmt: skip
    """The definition, one token and one latent at a time."""
    rows, images = len(x), len(x) // 2 if guided else len(x)
    z_all, x_hat = sae.encode(x.float()).double().numpy(), sae(x.float()).double().numpy()
    directions, mean = sae.directions.double().numpy().copy(), sae.mean_activation.double().numpy()
    for latent, vector in dict(along).items():
        directions[latent] = vector
    verbs = {"add": dict(add), "scale": dict(scale), "clamp": dict(clamp), "replace": dict(replace)}
    out = x.double().numpy().copy()
    for row, i, j in np.ndindex(rows, H, W):

        def at(value, image=row % images, i=i, j=j):
            value = np.asarray(value, dtype=float)
            index = {0: (), 1: (image,), 2: (i, j), 3: (image, i, j)}[value.ndim]
            return value[index]

        cond = not guided or row >= images
        weight = factor * (1.0 if where is None else at(where)) * (cfg == "both" or (cfg == "cond") == cond)
        token, z, total, opened = out[row, i, j].copy(), z_all[row, i, j], np.zeros(D), False
        for verb, strengths in verbs.items():
            for latent, value in strengths.items():
                v = at(value)
                change = {
                    "add": v * mean[latent] * (-1 if cfg == "both" and not cond else 1),
                    "scale": (v - 1) * z[latent],
                    "clamp": v * mean[latent] - z[latent],
                    "replace": v * mean[latent],
                }[verb]
                passes = gate is None or (z[latent] > 0) == (gate == "active")
                total, opened = total + passes * change * directions[latent], opened or passes
        if replace and not opened:
            weight = 0
        if replace or reconstruct or ablate_block:
            new = (1 - weight) * token + weight * (total + (x_hat[row, i, j] if reconstruct else 0))
        else:
            new = token + weight * total
        if keep_norm and weight:
            new = new * np.linalg.norm(token) / max(np.linalg.norm(new), 1e-12)
        out[row, i, j] = new
    return out


EDITS = {
    "add": {"add": {1: 2.0, 4: -1.0}},
    "add maps": {"add": {1: RAMP, 2: 0.5, 3: [1.0, -2.0], 5: np.stack([RAMP, -RAMP])}},
    "scale": {"scale": {i: i / 4 for i in range(24)}},
    "scale by image": {"scale": {i: [0.0, 3.0] for i in range(12)}},
    "clamp": {"clamp": {2: 3.0, 3: RAMP}},
    "three verbs": {"add": {1: 1.0, 2: 1.0}, "scale": {2: 0.0, 3: 2.0}, "clamp": {4: 1.0}},
    "masked": {"scale": dict.fromkeys(range(24), 0.0), "add": {0: 1.0}, "where": HALF[0]},
    "masked by image": {"clamp": {7: 2.0}, "where": HALF},
    "cond only": {"add": {1: 2.0}, "scale": {2: 0.0}, "cfg": "cond"},
    "active only": {"add": dict.fromkeys(range(24), 1.0), "gate": "active"},
    "inactive only": {"add": {1: 1.0}, "clamp": {2: 1.0}, "gate": "inactive"},
    "replace": {"replace": {1: 2.0, 9: RAMP}},
    "replace in a mask": {"replace": {1: 2.0}, "where": HALF[1], "cfg": "cond"},
    "replace where active": {"replace": {1: 2.0, 2: 1.0}, "gate": "active"},
    "reconstruct": {"reconstruct": True},
    "reconstruct edited": {"reconstruct": True, "scale": {3: 0.0}, "add": {4: 1.0}, "where": HALF},
    "ablate block": {"ablate_block": True},
    "ablate block in a mask": {"ablate_block": True, "where": HALF[0]},
    "keep norm": {"add": {1: 4.0}, "keep_norm": True},
    "keep norm in a mask": {"add": {1: 4.0}, "keep_norm": True, "where": HALF[0]},
    "along": {"add": {1: 1.0}, "scale": {2: 0.0}, "along": {1: np.arange(6.0), 2: np.eye(6)[3]}},
}


@GUIDED
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
def test_an_edit_does_what_its_formula_says(sae, edits, guided):
    x = updates(guided)
    expected = by_formula(sae, x, guided, **edits)
    np.testing.assert_allclose(steered(sae, x, guided, **edits).numpy(), expected, atol=2e-5)
    assert np.abs(expected - x.numpy()).max() > 0.1, "the edit does nothing, so the test says nothing"


@pytest.mark.parametrize("normalize", ["scale", "channels", "whiten"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_whatever_the_kind_and_normalisation_of_the_sae(kind, normalize):
    sae = random_sae(5, config=SAEConfig(k=3, kind=kind, normalize=normalize)).requires_grad_(False)
    x = updates(False)
    for edits in (EDITS["three verbs"], EDITS["reconstruct edited"], EDITS["active only"]):
        np.testing.assert_allclose(
            steered(sae, x, False, **edits).numpy(), by_formula(sae, x, False, **edits), atol=2e-4
        )


@GUIDED
def test_only_one_half_is_touched_where_asked(sae, guided):
    x = updates(True)
    for verb in ({"add": {1: 2.0}}, {"replace": {1: 2.0}}, {"ablate_block": True}, {"reconstruct": True}):
        changed = steered(sae, x, True, cfg="uncond", **verb)
        assert torch.equal(changed[IMAGES:], x[IMAGES:]) and not torch.equal(changed[:IMAGES], x[:IMAGES])
        np.testing.assert_allclose(changed.numpy(), by_formula(sae, x, True, cfg="uncond", **verb), atol=2e-5)


def test_there_is_no_uncond_half_without_guidance(sae):
    with pytest.raises(EditError, match="cfg='uncond', but this image is made without guidance"):
        steered(sae, updates(False), False, add={1: 1.0}, cfg="uncond")


NOTHING = {
    "scaling by one": {"scale": dict.fromkeys(range(24), 1.0)},
    "adding nothing": {"add": {3: 0.0}},
    "an empty mask": {"scale": {3: 0.0}, "where": np.zeros((9, 2))},
    "an empty mask over all": {"ablate_block": True, "where": np.zeros((1, 1))},
    "a polygon elsewhere": {"reconstruct": True, "where": Polygon([(0, 0), (0.001, 0), (0, 0.001)])},
    "a schedule of zeros": {"replace": {3: 1.0}, "schedule": [0.0]},
    "another step": {"ablate_block": True, "steps": [1]},
    "nothing that keeps its norm": {"add": {3: 0.0}, "keep_norm": True},
}


@DTYPES
@pytest.mark.parametrize("edits", NOTHING.values(), ids=NOTHING.keys())
def test_what_is_not_edited_keeps_its_every_bit(sae, edits, dtype):
    x = updates(True, dtype)
    changed = steered(sae, x, True, n_steps=2, **edits)
    assert changed.dtype == dtype
    assert torch.equal(changed.view(BITS[dtype]), x.view(BITS[dtype]))  # the sign of a zero, too


@DTYPES
def test_tokens_outside_a_mask_keep_their_every_bit_and_the_others_are_rounded_once(sae, dtype):
    mask = np.zeros((H, W))
    mask[1:3, 2:] = 1
    x, inside = updates(False, dtype), torch.from_numpy(mask > 0)
    changed = steered(sae, x, False, add={3: 2.0}, scale={4: 0.0}, where=mask)
    assert torch.equal(changed[:, ~inside].view(BITS[dtype]), x[:, ~inside].view(BITS[dtype]))
    exact = torch.from_numpy(by_formula(sae, x, False, add={3: 2.0}, scale={4: 0.0}, where=mask))
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((changed.double() - exact).abs() <= 0.51 * step + 1e-5)[:, inside].all()


def test_edited_tokens_keep_their_norm_where_asked(sae):
    x = updates(False)
    changed = steered(sae, x, False, add={1: 5.0}, keep_norm=True)
    assert torch.allclose(changed.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(changed, x, atol=0.1)


@pytest.mark.parametrize("fine", [(H, W), (3 * H, 2 * W), (2, 3), (50, 41)])
def test_a_mask_of_any_size_weighs_tokens_by_area(sae, fine):
    mask = np.random.default_rng(0).random(fine)
    repeated = np.kron(mask, np.ones((H, W)))  # every token covers a whole number of these cells
    shares = repeated.reshape(H, fine[0], W, fine[1]).mean((1, 3))
    x = updates(False)
    expected = by_formula(sae, x, False, add={1: 3.0}, where=shares)
    np.testing.assert_allclose(steered(sae, x, False, add={1: 3.0}, where=mask).numpy(), expected, atol=2e-5)
    maps = steered(sae, x, False, add={1: mask})
    np.testing.assert_allclose(maps.numpy(), by_formula(sae, x, False, add={1: shares}), atol=2e-5)


@pytest.mark.parametrize(
    ("schedule", "n_steps", "factors"),
    [([0.5], 3, [0.5, 0.5, 0.5]), ([1, 0], 5, [1, 0.75, 0.5, 0.25, 0]), ([0, 1, 0], 4, [0, 2 / 3, 2 / 3, 0]),
     ([1, 0], 1, [1]), ([0, 1, 3], 2, [0, 3])],
)  # fmt: skip
def test_a_schedule_is_spread_over_the_steps(sae, schedule, n_steps, factors):
    x = updates(False)
    for step, factor in enumerate(factors):
        for edits in (EDITS["three verbs"], EDITS["reconstruct"]):
            changed = steered(sae, x, False, step, n_steps, schedule=schedule, **edits)
            np.testing.assert_allclose(changed.numpy(), by_formula(sae, x, False, factor, **edits), atol=5e-5)


@pytest.mark.parametrize(
    ("steps", "n_steps", "edited"),
    [(None, 4, [0, 1, 2, 3]), ([0, 2], 4, [0, 2]), ((0.0, 0.5), 4, [0, 1]), ((0.5, 1.0), 5, [3, 4]),
     ((0.0, 1.0), 3, [0, 1, 2]), ((0, 0.3), 10, [0, 1, 2]), ((np.float64(0.25), 0.5), 4, [1]), ((0.0, 0.1), 1, [0])],
)  # fmt: skip
def test_steps_are_counted_from_zero_or_given_as_shares_of_all(sae, steps, n_steps, edited):
    x = updates(False)
    changed = [
        not torch.equal(steered(sae, x, False, i, n_steps, add={1: 1.0}, steps=steps), x) for i in range(n_steps)
    ]
    assert [i for i, c in enumerate(changed) if c] == edited


def test_steps_that_are_never_made_are_refused(sae):
    with pytest.raises(EditError, match=r"steps=\[5\], but this image is made in 4 step"):
        steered(sae, updates(False), False, 0, 4, add={1: 1.0}, steps=[0, 5])
    with pytest.raises(
        EditError, match=r"steps=\(0.1, 0.2\) is none of this image's 4 step.* no i with 0.1 ≤ i / 4 < 0.2"
    ):
        steered(sae, updates(False), False, 0, 4, add={1: 1.0}, steps=(0.1, 0.2))


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
def test_latents_without_a_direction_of_their_own_are_refused_but_not_their_reconstruction(normalize):
    sae = random_sae(config=SAEConfig(k=3, normalize=normalize)).requires_grad_(False)
    x = updates(False)
    for edits in ({"add": {1: 1.0}}, {"scale": {1: 0.0}}, {"reconstruct": True, "scale": {1: 0.0}}):
        with pytest.raises(KitError, match="normalises each token by itself, so its latents have no direction"):
            steered(sae, x, False, **edits)
    assert torch.allclose(steered(sae, x, False, reconstruct=True), sae(x), atol=1e-5)


def test_adding_encodes_nothing_and_no_edit_writes_out_all_latents(sae, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a dense product")

    for name in ("encode", "decode", "forward"):
        monkeypatch.setattr(SAE, name, refuse)
    x = updates(False)
    for edits in EDITS.values():
        steered(sae, x, False, **edits)
    monkeypatch.setattr(SAE, "encode_sparse", refuse)
    for name in ("add", "add maps", "replace", "ablate block", "keep norm"):
        steered(sae, x, False, **EDITS[name])
    with pytest.raises(AssertionError):
        steered(sae, x, False, **EDITS["scale"])


def test_maps_are_resized_and_moved_once_for_all_images(sae, monkeypatch):
    read, as_map = [], steering.as_map
    monkeypatch.setattr(steering, "as_map", lambda *args: read.append(args) or as_map(*args))
    hook = Hook.of(Edit("mid.0", "k3", add={1: RAMP}), sae)
    for step in range(4):
        hook(updates(False), Call("mid.0", step, 4, False))
    first = len(read)
    hook(updates(True), Call("mid.0", 0, 1, True))
    assert first > 0 and len(read) == 2 * first  # another shape of batch is another plan


def test_an_sae_is_copied_to_a_device_once_and_its_digest_computed_once(sae):
    meta = torch.device("meta")
    placed = steering._placed(sae, meta)
    assert placed is steering._placed(sae, meta) and placed.W_dec.device == meta
    assert steering._placed(sae, torch.device("cpu")) is sae and sae.W_dec.device.type == "cpu"
    known = digest_of(sae)
    assert known == sae.digest and steering._KEPT[sae] is steering._kept(sae)
    with torch.no_grad():
        sae.mean_activation.mul_(2)
    assert digest_of(sae) == sae.digest != known
    assert steering._placed(sae, meta) is not placed


def test_what_is_kept_of_an_sae_goes_with_it():
    import gc

    gc.collect()
    before = len(steering._KEPT)
    sae = random_sae(9)
    digest_of(sae)
    assert len(steering._KEPT) == before + 1
    del sae
    gc.collect()
    assert len(steering._KEPT) == before


def test_gradients_pass_through_an_edit(sae):
    x = updates(False).requires_grad_()
    steered(sae, x, False, add={1: 1.0}, scale={2: 0.0}).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_the_configuration_of_these_tests_is_sparse():
    assert CONFIG.k is not None and CONFIG.k < 24

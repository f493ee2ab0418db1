"""The SAE: its code in each kind, its normalisation, and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_saes import CONFIG, SITE, random_sae, tokens
from safetensors.torch import load_file, save_file

from sdxl_sae_kit import weights
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.sae import SAE

seeds = st.integers(0, 2**31)
KINDS = ["topk", "batchtopk", "jumprelu"]
NORMALIZE = ["none", "scale", "channels", "whiten", "layer_norm", "constant_norm"]


def oracle(sae, x):
    """Code and reconstruction by the equations, in NumPy and double precision, one token after the other."""
    W_enc, b_enc, W_dec, b_dec, threshold, mean, scale = (
        getattr(sae, name).detach().double().numpy()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "input_mean", "input_scale")
    )
    codes, x_hats = [], []
    for token in x.double().numpy():
        m, s = {
            "none": (0, 1),
            "scale": (mean, scale),
            "channels": (mean, scale),
            "whiten": (mean, scale),
            "layer_norm": (token.mean(), token.std(ddof=1) + 1e-5),
            "constant_norm": (0, np.sqrt((token**2).sum() / len(token))),
        }[sae.config.normalize]
        matrix = s if sae.config.normalize == "whiten" else np.eye(len(token)) * s
        h = ((token - m) @ np.linalg.inv(matrix) - (b_dec if sae.config.subtract_b_dec else 0)) @ W_enc + b_enc
        if sae.config.kind == "topk":
            z = np.zeros_like(h)
            best = np.argsort(-h)[: sae.config.k]
            z[best] = np.maximum(h[best], 0)
        else:
            z = np.where(h > threshold, h, 0)
        codes.append(z)
        x_hats.append((z @ W_dec + b_dec) @ matrix + m)
    return np.stack(codes), np.stack(x_hats)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_are_those_of_the_equations(kind, normalize, subtract):
    for seed in range(5):
        sae = random_sae(seed, config=replace(CONFIG, kind=kind, normalize=normalize, subtract_b_dec=subtract))
        x = tokens(16, seed=seed)
        z, x_hat = oracle(sae, x)
        assert np.allclose(sae.encode(x).detach(), z, atol=1e-4)
        assert np.allclose(sae(x).detach(), x_hat, atol=1e-4)
        assert np.allclose(sae.decode(sae.encode(x), x).detach(), x_hat, atol=1e-4)
        assert np.allclose(sae.decode_sparse(*sae.encode_sparse(x), x).detach(), x_hat, atol=1e-4)


@given(seeds)
def test_top_k_codes_are_non_negative_and_have_at_most_k_active_latents(seed):
    z = random_sae(seed).encode(tokens(32, seed=seed))
    assert (z >= 0).all()
    assert ((z > 0).sum(dim=-1) <= 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_any_number_of_axes_go_through(kind):
    sae, x = random_sae(config=replace(CONFIG, kind=kind)), tokens(24).reshape(2, 3, 4, 6)
    indices, values = sae.encode_sparse(x)
    assert indices.shape == values.shape == (2, 3, 4, values.shape[-1])
    assert sae.encode(x).shape == (2, 3, 4, 24)
    assert torch.allclose(sae(x).reshape(-1, 6), sae(x.reshape(-1, 6)))
    assert torch.allclose(sae.decode(sae.encode(x)), sae(x), atol=1e-5)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("normalize", ["scale", "channels", "whiten"])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_folded_is_unfolded(kind, normalize, subtract, seed):
    sae = random_sae(seed, config=replace(CONFIG, kind=kind, normalize=normalize, subtract_b_dec=subtract))
    folded, x = sae.folded(), tokens(32, seed=seed)
    assert folded.config.normalize == "none"
    assert torch.equal(folded.input_scale, torch.ones(6))
    assert torch.allclose(folded.pre_activations(x), sae.pre_activations(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(folded.decode(sae.encode(x)), sae(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(folded.directions, sae.directions)
    one = torch.zeros(1, 24)
    one[0, seed % 24] = 1.0  # a direction is what one unit of a latent adds
    added = sae.decode(one) - sae.decode(torch.zeros(1, 24))
    assert torch.allclose(added[0], sae.directions[seed % 24], rtol=1e-4, atol=1e-4)


def test_what_each_token_normalises_by_cannot_be_folded_or_decoded_without_it():
    sae = random_sae(config=replace(CONFIG, normalize="layer_norm"))
    for attempt in (sae.folded, lambda: sae.decode(torch.zeros(2, 24))):
        with pytest.raises(KitError, match="normalises each token by itself, so decoding needs the token"):
            attempt()
    with pytest.raises(KitError, match="its latents have no direction that is the same"):
        _ = sae.directions


def test_an_sae_refuses_other_places_by_name():
    sae = random_sae()
    assert sae.hookpoint == "mid.0"
    with pytest.raises(ArtifactError, match="was trained on updates of mid.0, not updates of up.0.1. Use one that"):
        sae.check_site("up.0.1")
    with pytest.raises(ArtifactError, match="not outputs of mid.0"):
        sae.check_site("mid.0", "output")
    sae.site = replace(SITE, kind="output")
    with pytest.raises(ArtifactError, match="was trained on outputs of mid.0, not updates of mid.0"):
        _ = sae.hookpoint
    sae.site = None
    with pytest.raises(ArtifactError, match="has no hookpoint: nothing says where it belongs"):
        _ = sae.hookpoint


@pytest.mark.parametrize("kind", KINDS)
def test_the_untrained_control_has_the_same_place_centre_and_number_of_active_latents(kind):
    sae, x = random_sae(config=replace(CONFIG, kind=kind)), tokens(200)
    sae.metrics = {"l0": (sae.encode(x) > 0).sum(1).double().mean().item()}
    control = sae.untrained()
    assert control.site == sae.site and torch.equal(control.b_dec, sae.b_dec)
    assert not torch.allclose(control.W_dec, sae.W_dec)
    assert control.config.kind == "topk"
    assert control.config.k == (3 if kind == "topk" else round(sae.metrics["l0"]))


def test_the_start_is_the_papers():
    sae = SAE(CONFIG, 6)
    assert sae.W_enc.abs().max() <= 6**-0.5
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-6)
    assert torch.allclose(sae.W_dec / sae.W_dec[:, :1], sae.W_enc.T / sae.W_enc.T[:, :1], rtol=1e-4)
    assert not sae.b_enc.any()


# The file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_saved_sae_reads_back_exactly(tmp_path, kind, normalize):
    prefixes = () if kind == "jumprelu" else (0.25, 0.5)
    sae, x = random_sae(config=replace(CONFIG, kind=kind, normalize=normalize, prefixes=prefixes)), tokens()
    sae.mean_activation.copy_(torch.rand(24))
    sae.metrics = {"explained_variance": 0.5, "explained_variance_interval": [0.4, 0.6]}
    sae.data = "0123"
    sae.save(tmp_path / "sae.safetensors")
    again = SAE.load(tmp_path / "sae.safetensors")
    assert (again.config, again.site, again.name, again.metrics) == (sae.config, sae.site, sae.name, sae.metrics)
    assert again.data == "0123"
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
        (lambda t, h: h.update(version=9), "in format version 2: it has version 9"),
        (lambda t, h: h.clear(), "it has no such header"),
        (lambda t, h: h.pop("site"), "the header lacks site"),
        (lambda t, h: h["config"].update(k=None), "its SAEConfig is impossible .*needs its k"),
        (lambda t, h: h["config"].update(kind="gelu"), "its SAEConfig is impossible"),
        (lambda t, h: h["config"].update(prefixes=["a"]), "its SAEConfig is impossible"),
        (lambda t, h: h["config"].update(k=1000), "k=1000 is more than the 24 latents"),
        (lambda t, h: h["config"].update(expansion=1e308), "W_enc has shape"),
        (lambda t, h: h.update(config=[]), "its SAEConfig is no JSON object"),
        (lambda t, h: h.update(site=5), "its Site is no JSON object"),
        (lambda t, h: h.update(metrics="good"), "name, data, metrics or origin are not what they should be"),
        (lambda t, h: t.update(b_enc=t["b_enc"].double()), "b_enc is .* not float32"),
        (lambda t, h: h["config"].update(expansion=10**9), r"W_enc has shape \(6, 24\), not \(d_in, 1e\+09 · d_in\)"),
        (lambda t, h: h.update(config={"k": 3, "activation": "gelu"}), "SAEConfig has settings .*activation"),
    ],
)
def test_a_harmed_file_is_refused_with_the_reason(tmp_path, harm, complaint):
    path = tmp_path / "sae.safetensors"
    random_sae().save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[weights.KEY])
    tensors = load_file(path)
    harm(tensors, header)
    save_file(tensors, path, {weights.KEY: json.dumps(header)})
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
        {"lr": "fast"}, {"expansion": 0}, {"seed": -1}, {"auxk_coef": -0.5}, {"resample_every": 0},
        {"warmup_steps": -1},
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


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"kind": "topK"}, "kind is one of topk, batchtopk, jumprelu.*, not 'topK'. Did you mean 'topk'"),
        ({"normalize": "channel"}, "normalize is one of .* Did you mean 'channels'"),
        ({"k": None}, "a topk SAE needs its k"),
        ({"kind": "jumprelu", "prefixes": (0.5,)}, "are for topk and batchtopk; leave them out"),
        ({"k_start": 20}, "give both, or neither"),
        ({"anneal_steps": 20}, "give both, or neither"),
        ({"k_start": 5, "anneal_steps": 20}, "a k_start of at least k"),
        ({"prefixes": (0.5, 0.25)}, "ascending shares of d_sae"),
        ({"prefixes": (0.5, 1.0)}, "ascending shares of d_sae"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, complaint, unchecked_types):
    with pytest.raises(KitError, match=complaint):
        SAEConfig(**wrong)


# Other tools' files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["sdxl-unbox", "saelens", "dictionary_learning", "sparsify"])
@pytest.mark.parametrize("normalize", ["none", "channels", "whiten"])
def test_an_exported_sae_loads_as_the_same_function(tmp_path, format, normalize):
    sae, x = random_sae(config=replace(CONFIG, normalize=normalize)), tokens()
    sae.export(tmp_path / "out", format)
    again = SAE.load(tmp_path / "out", site=SITE)
    assert again.hookpoint == "mid.0" and again.origin["format"] == format
    assert torch.allclose(again.encode(x), sae.encode(x), atol=1e-4)
    assert torch.allclose(again(x), sae(x), atol=1e-4)
    again.save(tmp_path / "mine.safetensors")
    mine = SAE.load(tmp_path / "mine.safetensors")
    assert torch.equal(mine(x), again(x)) and mine.origin == again.origin


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_thresholds_survive_an_export(tmp_path, kind):
    sae, x = random_sae(config=replace(CONFIG, kind=kind)), tokens()
    sae.export(tmp_path / "out", "saelens")
    assert torch.allclose(SAE.load(tmp_path / "out")(x), sae(x), atol=1e-4)


def test_the_released_files_say_where_they_belong(tmp_path):
    folder = tmp_path / "unet.down_blocks.2.attentions.1_k3_hidden24_auxk5_bs4096_lr0.0001" / "final"
    random_sae().export(folder, "sdxl-unbox")
    assert SAE.load(folder).site == Site("stabilityai/sdxl-turbo", "", "down.2.1", 1, 0.0)


def test_an_sae_from_elsewhere_belongs_nowhere_until_told(tmp_path):
    random_sae().export(tmp_path / "out", "saelens")
    with pytest.raises(ArtifactError, match="nothing says where it belongs. Give train or SAE.load its site"):
        _ = SAE.load(tmp_path / "out").hookpoint
    random_sae().save(tmp_path / "own.safetensors")
    with pytest.raises(ArtifactError, match="says where it belongs: .*mid.0.* Leave site= out"):
        SAE.load(tmp_path / "own.safetensors", site=SITE)


@pytest.mark.parametrize("prefixes", [(0.01, 0.5), (0.5, 0.501), (0.5, 0.999)])
def test_prefixes_without_a_latent_of_their_own_are_refused(prefixes):
    with pytest.raises(KitError, match="of 24 latents end at .* each must have a latent that the one before has not"):
        SAE(SAEConfig(k=3, prefixes=prefixes), 6)

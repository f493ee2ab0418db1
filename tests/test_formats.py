"""Other tools' SAEs: each file is written here by hand, and its tool's formula is written here a second time.

The dense formulas below are in float64 and share nothing with the package. Every way to read a file wrongly that would
still give plausible numbers is made on purpose, and must be seen.
"""

import json
import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.formats import FORMATS, Checkpoint, read, recognise, write

D, N, K = 24, 96, 6


def weights(seed=0):
    """An SAE with every number random, so that nothing misplaced goes unnoticed; decoder rows of many lengths."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return {
        "W_enc": normal(D, N) / D**0.5,
        "b_enc": 0.3 * normal(N),
        "W_dec": normal(N, D) / D**0.5 * torch.exp(0.7 * normal(N, 1)),
        "b_dec": 0.8 * normal(D),
        "threshold": 0.5 + torch.rand(N, generator=g),
        "b_gate": 0.5 * normal(N) - 1,
        "r_mag": 0.5 * normal(N),
    }


def tokens(n=200, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (1.2 * torch.randn(n, D, generator=g) + 0.7 * torch.randn(D, generator=g)).double().numpy()


X = tokens()


# The formulas, in float64 --------------------------------------------------------------------------------------------


def relu(h):
    return np.maximum(h, 0)


def top(h, k):
    """relu of the k largest of each row."""
    z = np.zeros_like(h)
    best = np.argsort(-h, axis=1)[:, :k]
    np.put_along_axis(z, best, relu(np.take_along_axis(h, best, axis=1)), axis=1)
    return z


def doubles(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def run(c: Checkpoint, x=X):
    """Codes and reconstructions by the canonical form."""
    if c.normalize == "layer_norm":
        shift, scale = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        x = (x - shift) / (scale + 1e-5)
    elif c.normalize == "constant_norm":
        shift, scale = 0, np.linalg.norm(x, axis=1, keepdims=True) / D**0.5
        x = x / scale
    else:
        shift, scale = 0, 1
    t = doubles({name: getattr(c, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")})
    h = (x - (t["b_dec"] if c.subtract_b_dec else 0)) @ t["W_enc"] + t["b_enc"]
    z = top(h, c.k) if c.kind == "topk" else np.where(h > t["threshold"], h, 0)
    return z, (z @ t["W_dec"] + t["b_dec"]) * scale + shift


def off(ours, theirs):
    """Relative error."""
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# Every tool's files, by hand, with what its own code computes from them ----------------------------------------------


def put(folder: Path, config, tensors, config_name, weights_name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_name).write_text(json.dumps(config))
    if weights_name.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights_name)
    else:
        torch.save(tensors, folder / weights_name)
    return folder


def unbox(folder, **changed):
    w = weights()
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T,  # column-major
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "stats_last_nonzero": torch.arange(N),
    }
    config = {"n_dirs_local": N, "d_model": D, "k": K, "auxk": 32, "dead_steps_threshold": 2441} | changed
    put(folder, config, {"state_dict": tensors}, "config.json", "state_dict.pth")
    w = doubles(w)
    z = top((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)
    return z, z @ w["W_dec"] + w["b_dec"]


def saelens(folder, architecture, **changed):
    config = {
        "architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.12.1", "hook_name": "blocks.0.hook_resid_pre"},
    }  # fmt: skip
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    config |= changed
    names = ["W_enc", "W_dec", "b_dec"]
    names += ["b_gate", "b_mag", "r_mag"] if architecture == "gated" else ["b_enc"]
    names += ["threshold"] if architecture == "jumprelu" else []
    w = weights()
    w["b_mag"] = w["b_enc"]
    put(folder, config, {name: w[name] for name in names}, "cfg.json", "sae_weights.safetensors")
    save_file({"sparsity": torch.rand(N)}, folder / "sparsity.safetensors")
    w, x = doubles(w), X
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    factor = D**0.5 / np.sqrt((x**2).sum(1, keepdims=True))
    if config["normalize_activations"] == "layer_norm":
        x = (x - mean) / (std + 1e-5)
    if config["normalize_activations"] == "constant_norm_rescale":
        x = x * factor
    lin = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
    length = np.sqrt((w["W_dec"] ** 2).sum(1)) if config.get("rescale_acts_by_decoder_norm") else np.ones(N)
    if architecture == "gated":
        z = (lin + w["b_gate"] > 0) * relu(lin * np.exp(w["r_mag"]) + w["b_mag"])
    elif architecture == "topk":
        z = top((lin + w["b_enc"]) * length, K)
    else:
        h = lin + w["b_enc"]
        z = relu(h) * (h > w["threshold"] if architecture == "jumprelu" else 1)
    x_hat = (z / length) @ w["W_dec"] + w["b_dec"]
    if config["normalize_activations"] == "layer_norm":
        x_hat = x_hat * std + mean
    if config["normalize_activations"] == "constant_norm_rescale":
        x_hat = x_hat / factor
    return z, x_hat


def dictionary(folder, name, backup=None, state=None, **changed):
    w = weights()
    tensors, at_inference = {
        "AutoEncoder": ({"bias": w["b_dec"]}, relu),
        "AutoEncoderNew": ({"decoder.bias": w["b_dec"]}, relu),
        "AutoEncoderTopK": (
            {"b_dec": w["b_dec"], "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.9)},
            lambda h: top(relu(h), K),
        ),
        "BatchTopKSAE": (
            {"b_dec": w["b_dec"], "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.9)},
            lambda h: relu(h) * (relu(h) > np.float32(0.9)),
        ),
        "MatryoshkaBatchTopKSAE": (
            {
                "W_enc": w["W_enc"], "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"],
                "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.9),
                "group_sizes": torch.tensor([N // 4, N - N // 4]),
            },
            lambda h: relu(h) * (relu(h) > np.float32(0.9)),
        ),
        "JumpReluAutoEncoder": (
            {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
            lambda h: relu(h * (h > weights()["threshold"].numpy())),
        ),
        "GatedAutoEncoder": (
            {"r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_enc"], "decoder_bias": w["b_dec"]},
            None,
        ),
    }[name]  # fmt: skip
    if "W_enc" not in tensors:
        tensors |= {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
        tensors |= {} if name == "GatedAutoEncoder" else {"encoder.bias": w["b_enc"]}
    tensors |= state or {}
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "lr": 1e-3, "layer": 3, "lm_name": "x"}
    trainer |= {"k": K} if "TopK" in name else {}
    config = {"trainer": trainer | changed, "buffer": {"d_submodule": D, "io": "out"}}
    put(folder, config, tensors if backup is None else {"ae": tensors, **backup}, "config.json", "ae.pt")
    w = doubles(w)
    lin = (X - (0 if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else w["b_dec"])) @ w["W_enc"]
    if name == "GatedAutoEncoder":
        z = (lin + w["b_gate"] > 0) * relu(np.exp(w["r_mag"]) * lin + w["b_enc"])
    else:
        z = at_inference(lin + w["b_enc"])
    return z, z @ w["W_dec"] + w["b_dec"]


def sparsify(folder, **changed):
    w = weights()
    config = {
        "activation": "topk", "expansion_factor": N // D, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    } | changed  # fmt: skip
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    put(folder, config, tensors, "cfg.json", "sae.safetensors")
    w, x = doubles(w), X
    mean, std = X.mean(1, keepdims=True), X.std(1, keepdims=True, ddof=1)
    if config.get("input_unit_norm"):
        x = (x - mean) / (std + 1e-5)
    z = top(relu((x - (0 if config["transcode"] else w["b_dec"])) @ w["W_enc"] + w["b_enc"]), K)
    x_hat = z @ w["W_dec"] + w["b_dec"]
    return z, x_hat * std + mean if config.get("input_unit_norm") else x_hat


def without(name):
    return lambda c: replace(c, **{name: torch.zeros_like(getattr(c, name))})


def as_(**changed):
    return lambda c: replace(c, **changed)


def raw(*names):
    """The file's own weights, as if nothing had to be scaled."""
    return lambda c: replace(c, **{name: weights()[name] for name in names})


FILES = {
    # case: (its files, the wrong ways to read them)
    "unbox": (unbox, [as_(subtract_b_dec=False), without("b_enc")]),
    "steerers": (lambda f: unbox(f, auxk_coef=1 / 32), [as_(subtract_b_dec=False)]),
    "saelens standard": (lambda f: saelens(f, "standard"), [as_(subtract_b_dec=False), as_(kind="topk", k=K)]),
    "saelens topk": (lambda f: saelens(f, "topk"), [as_(subtract_b_dec=False), as_(kind="jumprelu")]),
    "saelens topk, b_dec not subtracted": (
        lambda f: saelens(f, "topk", apply_b_dec_to_input=False),
        [as_(subtract_b_dec=True)],
    ),
    "saelens topk, rescaled": (
        lambda f: saelens(f, "topk", rescale_acts_by_decoder_norm=True),
        [raw("W_enc", "b_enc", "W_dec")],
    ),
    "saelens jumprelu": (lambda f: saelens(f, "jumprelu"), [without("threshold"), as_(kind="topk", k=K)]),
    "saelens gated": (lambda f: saelens(f, "gated"), [without("threshold"), raw("W_enc")]),
    "saelens layer_norm": (
        lambda f: saelens(f, "topk", normalize_activations="layer_norm"),
        [as_(normalize="none"), as_(normalize="constant_norm")],
    ),
    "saelens constant_norm": (
        lambda f: saelens(f, "jumprelu", normalize_activations="constant_norm_rescale"),
        [as_(normalize="none"), as_(normalize="layer_norm")],
    ),
    "AutoEncoder": (lambda f: dictionary(f, "AutoEncoder"), [as_(subtract_b_dec=False)]),
    "AutoEncoderNew": (lambda f: dictionary(f, "AutoEncoderNew"), [as_(subtract_b_dec=True)]),
    "AutoEncoderTopK": (
        lambda f: dictionary(f, "AutoEncoderTopK"),
        [as_(subtract_b_dec=False), as_(kind="jumprelu", threshold=torch.full((N,), 0.9))],
    ),
    "BatchTopKSAE": (lambda f: dictionary(f, "BatchTopKSAE"), [as_(kind="topk"), without("threshold")]),
    "MatryoshkaBatchTopKSAE": (
        lambda f: dictionary(f, "MatryoshkaBatchTopKSAE"),
        [as_(kind="topk"), without("threshold")],
    ),
    "JumpReluAutoEncoder": (
        lambda f: dictionary(f, "JumpReluAutoEncoder"),
        [as_(subtract_b_dec=True), without("threshold")],
    ),
    "GatedAutoEncoder": (
        lambda f: dictionary(f, "GatedAutoEncoder"),
        [as_(subtract_b_dec=False), without("threshold"), raw("W_enc")],
    ),
    "backup of a training": (
        lambda f: dictionary(f, "BatchTopKSAE", {"step": 7, "optimizer": {"state": {}}, "norm_factor": None}),
        [as_(kind="topk")],
    ),
    "sparsify": (sparsify, [as_(subtract_b_dec=False)]),
    "sparsify transcoder": (lambda f: sparsify(f, transcode=True), [as_(subtract_b_dec=True)]),
    "sparsify, latents counted": (lambda f: sparsify(f, num_latents=N, expansion_factor=32), [without("b_enc")]),
    "SAeUron": (
        lambda f: sparsify(f, batch_topk=True, sample_topk=False, input_unit_norm=True),
        [as_(normalize="none")],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_gives_the_codes_and_reconstructions_of_its_tool_and_no_misreading_does(tmp_path, case):
    make, misreadings = FILES[case]
    z, x_hat = make(tmp_path / "sae")
    checkpoint = read(tmp_path / "sae")
    ours = run(checkpoint)
    assert off(ours[0], z) < 1e-5 and off(ours[1], x_hat) < 1e-5
    assert np.array_equal(ours[0] > 0, z > 0)
    for misread in misreadings:
        assert off(run(misread(checkpoint))[1], x_hat) > 0.1


@pytest.mark.parametrize("case", FILES)
def test_what_is_read_is_float32_of_its_own_and_says_where_it_came_from(tmp_path, case):
    FILES[case][0](tmp_path / "sae")
    checkpoint = read(tmp_path / "sae")
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    for name, shape in shapes.items():
        tensor = getattr(checkpoint, name)
        assert (tensor.dtype, tensor.shape) == (torch.float32, shape)
        assert tensor.is_contiguous() and not tensor.requires_grad
    origin = json.loads(json.dumps(checkpoint.origin))
    assert origin["format"] == recognise(tmp_path / "sae") and origin["path"] == str(tmp_path / "sae")
    config = next((tmp_path / "sae").glob("*.json"))
    assert origin["config"] == json.loads(config.read_text()) and len(origin["sha256"]) == 64
    assert (checkpoint.threshold >= 0).all() and (checkpoint.kind == "jumprelu" or not checkpoint.threshold.any())
    by_file = read(next(path for path in (tmp_path / "sae").iterdir() if "sae" in path.name or "state" in path.name
                        or path.name == "ae.pt"))  # fmt: skip
    assert torch.equal(by_file.W_enc, checkpoint.W_enc)


def test_decoder_rows_keep_their_lengths(tmp_path):
    unbox(tmp_path)
    assert torch.equal(read(tmp_path).W_dec, weights()["W_dec"])


@pytest.mark.parametrize(
    ("folder", "hookpoint"),
    [
        ("unet.down_blocks.2.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001/final", "down.2.1"),
        ("unet.mid_block.attentions.0_k160_hidden5120_auxk256_bs4096_lr0.0001/final", "mid.0"),
        ("up_blocks.0.attentions.2", "up.0.2"),
        ("transformer_blocks.18_k10/final", None),
    ],
)
def test_the_hookpoint_is_in_the_folders_name(tmp_path, monkeypatch, folder, hookpoint):
    unbox(tmp_path / folder)
    assert read(tmp_path / folder).hookpoint == hookpoint
    monkeypatch.chdir(tmp_path / folder)
    assert read(".").hookpoint == hookpoint
    assert read("state_dict.pth").hookpoint == hookpoint


def test_feature_means_are_read_and_a_latent_that_never_fired_has_zero(tmp_path):
    unbox(tmp_path)
    assert read(tmp_path).mean_activation is None
    mean = torch.rand(N)
    mean[3] = float("nan")
    torch.save(mean, tmp_path / "mean.pt")
    found = read(tmp_path).mean_activation
    assert found[3] == 0 and torch.equal(found[4:], mean[4:])
    for wrong in (torch.rand(N + 1), torch.full((N,), float("inf")), {"mean": mean}):
        torch.save(wrong, tmp_path / "mean.pt")
        with pytest.raises(ArtifactError, match=r"mean\.pt is not what"):
            read(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch, legacy):
    unbox(tmp_path)
    state = torch.load(tmp_path / "state_dict.pth", weights_only=True)
    mean = torch.rand(N)
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    torch.save(mean, tmp_path / "mean.pt", _use_new_zipfile_serialization=not legacy)
    torch.save(state, tmp_path / "state_dict.pth", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    assert b"cuda:0" in (tmp_path / "mean.pt").read_bytes()
    found = read(tmp_path)
    assert torch.equal(found.mean_activation, mean) and torch.equal(found.W_dec, weights()["W_dec"])


def test_a_threshold_below_zero_is_a_relu(tmp_path):
    dictionary(tmp_path, "BatchTopKSAE", state={"threshold": torch.tensor(-1.0)})  # as it is before it is first set
    assert not read(tmp_path).threshold.any()


def test_a_decoder_row_of_zeros_stays_out_when_norms_are_folded(tmp_path):
    saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["W_dec"][5] = 0
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    found = read(tmp_path)
    assert not (found.W_enc[:, 5].any() or found.b_enc[5] or found.W_dec[5].any())


def test_half_precision_is_widened(tmp_path):
    sparsify(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    assert torch.equal(read(tmp_path).W_dec, weights()["W_dec"].bfloat16().float())


def test_a_k_that_training_aimed_at_is_kept(tmp_path):
    dictionary(tmp_path / "a", "BatchTopKSAE")
    dictionary(tmp_path / "b", "JumpReluAutoEncoder", target_l0=20)
    told = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 12.0}}
    saelens(tmp_path / "c", "jumprelu", metadata=told)
    saelens(tmp_path / "d", "jumprelu", metadata={"training_architecture_details": {"k": 12.5}})
    dictionary(tmp_path / "e", "GatedAutoEncoder")
    assert [read(tmp_path / name).k for name in "abcde"] == [K, 20, 12, None, None]


# There and back ------------------------------------------------------------------------------------------------------


def checkpoint(kind="topk", k=K, subtract_b_dec=True, normalize="none", threshold="own", seed=0, **more):
    w = weights(seed)
    level = {"own": w["threshold"], "same": torch.full((N,), 0.9), "none": torch.zeros(N)}
    five = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    five["threshold"] = level["none" if kind == "topk" else threshold]
    return Checkpoint(kind, k, **five, subtract_b_dec=subtract_b_dec, normalize=normalize, **more)


def holds(format, c):
    if format == "sdxl-unbox":
        return c.kind == "topk" and c.subtract_b_dec and c.normalize == "none"
    if format == "sparsify":
        return c.kind == "topk" and c.normalize == "none"
    if format == "dictionary_learning":
        return c.normalize == "none" and (c.kind == "jumprelu" or c.subtract_b_dec)
    return True


checkpoints = st.builds(
    checkpoint,
    kind=st.sampled_from(["topk", "jumprelu"]),
    k=st.sampled_from([1, K, N]),
    subtract_b_dec=st.booleans(),
    normalize=st.sampled_from(["none", "layer_norm", "constant_norm"]),
    threshold=st.sampled_from(["own", "same", "none"]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(c=checkpoints, without_k=st.booleans())
def test_what_a_format_holds_comes_back_and_the_rest_is_refused_by_name(tmp_path_factory, format, c, without_k):
    if without_k and c.kind == "jumprelu":
        c = replace(c, k=None)
    folder = tmp_path_factory.mktemp("sae") / "new"
    if not holds(format, c):
        with pytest.raises(ArtifactError, match=f"{format} cannot hold an SAE with (kind|subtract_b_dec|normalize)="):
            write(c, folder, format)
        assert not folder.exists()
        return
    write(c, folder, format)
    again = read(folder)
    assert recognise(folder) == again.origin["format"] == format
    assert (again.kind, again.subtract_b_dec, again.normalize) == (c.kind, c.subtract_b_dec, c.normalize)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(c, name))
    assert torch.allclose(again.threshold, c.threshold, atol=1e-6)
    assert off(run(again)[1], run(c)[1]) < 1e-5
    if format != "dictionary_learning":
        assert again.k == c.k


def test_a_written_sdxl_unbox_folder_is_like_the_papers(tmp_path):
    unbox(tmp_path / "a")
    torch.save(torch.rand(N), tmp_path / "a/mean.pt")
    before = read(tmp_path / "a")
    write(before, tmp_path / "unet.mid_block.attentions.0_k6/final", "sdxl-unbox")
    again = read(tmp_path / "unet.mid_block.attentions.0_k6/final")
    assert again.origin["config"] == before.origin["config"] and again.hookpoint == "mid.0"
    assert torch.equal(again.mean_activation, before.mean_activation)
    state = torch.load(tmp_path / "unet.mid_block.attentions.0_k6/final/state_dict.pth", weights_only=True)[
        "state_dict"
    ]
    assert state["decoder.weight"].stride() == (1, D)  # column-major
    assert state["stats_last_nonzero"].dtype == torch.int64


def test_a_part_of_a_larger_tensor_is_written_alone(tmp_path):
    big = torch.randn(1000, N, D)
    write(replace(checkpoint(), W_dec=big[7]), tmp_path / "a", "sdxl-unbox")
    assert (tmp_path / "a/state_dict.pth").stat().st_size < 10 * N * D * 4


def test_views_are_written_as_what_they_show(tmp_path):
    c = checkpoint()
    views = replace(c, W_enc=c.W_enc.T.contiguous().T, threshold=torch.zeros(()).expand(N))
    for format in FORMATS:
        write(views, tmp_path / format, format)
        assert torch.equal(read(tmp_path / format).W_enc, c.W_enc)


def test_nothing_is_overwritten_and_no_other_format_is_written(tmp_path):
    write(checkpoint(), tmp_path / "a", "saelens")
    for format in ("saelens", "sparsify"):
        with pytest.raises(ArtifactError, match=r"has cfg\.json.* already. Give a new folder"):
            write(checkpoint(), tmp_path / "a", format)
    with pytest.raises(ArtifactError, match="No format 'sae_lens'.* Did you mean 'saelens'"):
        write(checkpoint(), tmp_path / "b", "sae_lens")


@pytest.mark.parametrize("k", [None, 0, N + 1])
def test_a_top_k_sae_has_a_fitting_k(k):
    with pytest.raises(ArtifactError, match=f"k={k} does not fit a top-k SAE of 96 latents"):
        checkpoint(k=k)


# What is refused -----------------------------------------------------------------------------------------------------

UNBOX = {"n_dirs_local": N, "d_model": D, "k": K, "auxk": None, "dead_steps_threshold": 1}
REFUSED = {
    "an unknown setting of sdxl-unbox": (lambda f: unbox(f, normalize=True), "not known: normalize"),
    "an unknown setting of saelens": (lambda f: saelens(f, "topk", finetuning=1), "not known: finetuning"),
    "k for what has none": (lambda f: saelens(f, "jumprelu", k=3), "not known: k"),
    "an unknown setting of a trainer": (
        lambda f: dictionary(f, "AutoEncoder", norm_factor=2.0),
        "not known: norm_factor",
    ),
    "an unknown setting of sparsify": (lambda f: sparsify(f, signed=True), "not known: signed"),
    "another architecture": (
        lambda f: saelens(f, "transcoder"),
        "architecture is 'transcoder', and this kit reads 'standard'",
    ),
    "the scale that training keeps": (
        lambda f: saelens(f, "topk", normalize_activations="expected_average_only_in"),
        "normalize_activations is 'expected_average_only_in'",
    ),
    "a whitening": (
        lambda f: saelens(f, "topk", normalize_activations="covariance_whitening"),
        "normalize_activations is 'covariance_whitening'",
    ),
    "heads": (lambda f: saelens(f, "topk", reshape_activations="hook_z"), "reshape_activations is 'hook_z'"),
    "a flag that is none": (lambda f: saelens(f, "topk", apply_b_dec_to_input=1), "apply_b_dec_to_input is 1,"),
    "another dictionary": (
        lambda f: dictionary(f, "AutoEncoder", dict_class="CrossCoder"),
        "dict_class is 'CrossCoder'",
    ),
    "a list for a name": (lambda f: dictionary(f, "AutoEncoder", dict_class=["AutoEncoder"]), r"dict_class is \['Auto"),
    "another k in the tensors": (lambda f: dictionary(f, "BatchTopKSAE", k=5), "k is .*5"),
    "biases in unknown units": (
        lambda f: dictionary(f, "BatchTopKSAE", {"optimizer": {}, "norm_factor": 3.5}),
        "norm_factor",
    ),
    "groupmax": (lambda f: sparsify(f, activation="groupmax"), "activation is 'groupmax'"),
    "a skip connection": (lambda f: sparsify(f, skip_connection=True), "skip_connection is True"),
    "k of an image": (lambda f: sparsify(f, sample_topk=True), "sample_topk is True"),
    "a missing k": (lambda f: unbox(f, k=None), "k must be an integer of at least 1, not None"),
    "a k in words": (lambda f: unbox(f, k="10"), "k must be an integer of at least 1, not '10'"),
    "a k of more than all": (lambda f: unbox(f, k=97), "k=97 does not fit"),
    "another width": (lambda f: unbox(f, d_model=25), r"encoder.weight is not .* shape \(96, 25\)"),
    "a huge width": (lambda f: unbox(f, d_model=10**12), "encoder.weight is not"),
    "another tensor": (
        lambda f: dictionary(f, "AutoEncoder", state={"W_skip": torch.zeros(D, D)}),
        "tensors are missing or not known: W_skip",
    ),
    "a dictionary under another's name": (
        lambda f: dictionary(f, "AutoEncoderNew", dict_class="AutoEncoder"),
        "not known: bias, decoder.bias",
    ),
    "an infinity": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.full((D,), float("inf"))}),
        "bias is not .* finite numbers",
    ),
    "a number too large for float32": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.full((D,), 1e300, dtype=torch.float64)}),
        "bias is not .* finite numbers",
    ),
    "a gate that overflows": (
        lambda f: dictionary(f, "GatedAutoEncoder", state={"r_mag": torch.full((N,), 100.0)}),
        "W_enc, scaled, is not .* finite",
    ),
    "whole numbers": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.ones(D, dtype=torch.int8)}),
        "bias is not",
    ),
    "a sparse tensor": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.ones(D).to_sparse()}),
        "bias is not",
    ),
    "one number that claims to be many": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.ones(1).expand(D)}),
        "bias is not",
    ),
    "a tensor of no memory": (
        lambda f: dictionary(f, "AutoEncoder", state={"bias": torch.ones(D, device="meta")}),
        "bias is not",
    ),
    "no tensors at all": (
        lambda f: put(f, UNBOX, [1, 2], "config.json", "state_dict.pth"),
        "not known: decoder.weight",
    ),
    "text for a tensor": (lambda f: dictionary(f, "AutoEncoder", state={"bias": "x"}), "bias is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_exactly_is_refused_by_name(tmp_path, case):
    make, complaint = REFUSED[case]
    make(tmp_path / "sae")
    with pytest.raises(ArtifactError, match=complaint) as refusal:
        read(tmp_path / "sae")
    assert len(str(refusal.value)) > 40


@pytest.mark.parametrize("case", ["unbox", "saelens topk", "AutoEncoder", "sparsify"])
def test_a_setting_or_a_tensor_that_is_lost_is_named(tmp_path, case):
    FILES[case][0](tmp_path)
    config = next(tmp_path.glob("*.json"))
    content = json.loads(config.read_text())
    inner = content["trainer"] if case == "AutoEncoder" else content
    for name in {"d_model", "d_in", "activation_dim", "dict_class", "architecture"} & inner.keys():
        lacking = {key: value for key, value in inner.items() if key != name}
        config.write_text(json.dumps({"trainer": lacking} if case == "AutoEncoder" else lacking))
        with pytest.raises(ArtifactError, match=rf"\b{name}\b"):
            read(tmp_path)
    config.write_text(json.dumps(content))
    weights_file = next(path for path in tmp_path.iterdir() if path.suffix != ".json" and "sparsity" not in path.name)
    if weights_file.suffix == ".safetensors":
        tensors = load_file(weights_file)
        del tensors["b_dec"]
        save_file(tensors, weights_file)
        lost = "b_dec"
    else:
        tensors = torch.load(weights_file, weights_only=True)
        lost = "pre_bias" if case == "unbox" else "bias"
        del (tensors["state_dict"] if case == "unbox" else tensors)[lost]
        torch.save(tensors, weights_file)
    with pytest.raises(ArtifactError, match=f"missing or not known: {lost}"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "NaN", '{"k": NaN}', "[" * 100_000, ""])
@pytest.mark.parametrize("case", ["unbox", "sparsify"])
def test_a_configuration_that_is_none_is_refused(tmp_path, case, text):
    FILES[case][0](tmp_path)
    next(tmp_path.glob("*.json")).write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read as plain|settings are missing"):
        read(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused_wherever_it_stands(tmp_path, number):
    saelens(tmp_path, "topk", metadata={"sae_lens_version": "6.12.1", "l0": number})
    with pytest.raises(ArtifactError, match="cannot be read as plain"):
        read(tmp_path)  # or its origin could be written nowhere


@pytest.mark.parametrize("case", ["unbox", "AutoEncoder", "sparsify"])
def test_weights_that_are_none_are_refused(tmp_path, case):
    FILES[case][0](tmp_path)
    weights_file = next(path for path in tmp_path.iterdir() if path.suffix != ".json")
    whole = weights_file.read_bytes()
    for content in (b"", b"not tensors", whole[: len(whole) // 2]):
        weights_file.write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be read as plain"):
            read(tmp_path)


class Hostile:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", ["unbox", "AutoEncoder", "mean.pt"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, case, legacy):
    FILES["unbox" if case == "mean.pt" else case][0](tmp_path)
    name = {"unbox": "state_dict.pth", "AutoEncoder": "ae.pt"}.get(case, case)
    mark = str(tmp_path / "ran")
    torch.save({"state_dict": Hostile(mark)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ArtifactError, match="would run code that came with it. Nothing of it was run"):
        read(tmp_path)
    assert not os.path.exists(mark)
    torch.load(tmp_path / name, weights_only=False)  # the file does what it is here for
    assert os.path.exists(mark)


def test_only_folders_with_the_files_of_one_tool_are_recognised(tmp_path):
    makers = (unbox, lambda f: saelens(f, "topk"), lambda f: dictionary(f, "AutoEncoder"), sparsify)
    for format, make in zip(FORMATS, makers, strict=True):
        make(tmp_path / format)
        assert recognise(tmp_path / format) == format
        assert recognise(str(next((tmp_path / format).glob("*.json")))) == format
    (tmp_path / "saelens/notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "saelens/notes.txt", "hf:owner/name"):
        assert recognise(path) is None
    sparsify(tmp_path / "saelens")  # now there are two SAEs and one cfg.json
    assert recognise(tmp_path / "saelens") is None
    for path in (tmp_path / "saelens", tmp_path / "missing"):
        with pytest.raises(
            ArtifactError, match="is no SAE this kit reads. Give a folder with the files of just one of"
        ):
            read(path)


# The hub -------------------------------------------------------------------------------------------------------------


def test_of_a_hub_repository_only_the_folder_and_its_files_are_fetched(tmp_path, monkeypatch):
    inner = "unet.down_blocks.2.attentions.1_k10/final"
    root = tmp_path / "models--owner--name/snapshots/0123456789abcdef0123456789abcdef01234567"
    unbox(root / inner)
    asked = []

    def snapshot_download(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = read(f"hf:owner/name/{inner}")
    ((repository, patterns),) = asked
    assert repository == "owner/name" and f"{inner}/state_dict.pth" in patterns
    assert all(re.fullmatch(re.escape(inner) + r"/[a-z_]+\.[a-z]+", pattern) for pattern in patterns)
    assert checkpoint.hookpoint == "down.2.1"
    blob = (root / inner / "state_dict.pth").rename(tmp_path / "blob")  # as the hub's cache keeps its files
    (root / inner / "state_dict.pth").symlink_to(blob)
    assert read(root / inner / "state_dict.pth").hookpoint == "down.2.1"
    assert checkpoint.origin["path"] == f"hf:owner/name/{inner}" and checkpoint.origin["revision"] == root.name


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:owner/name/../other", "hf:/name", "hf:owner//sub"])
def test_what_names_no_folder_of_the_hub_is_refused(name):
    with pytest.raises(ArtifactError, match="names no folder on the hub"):
        read(name)


def test_a_hub_that_cannot_be_reached_is_named():
    with pytest.raises(ArtifactError, match="'hf:owner/nothing-here/sub' is not on this computer"):
        read("hf:owner/nothing-here/sub")  # HF_HUB_OFFLINE is set
    with pytest.raises(ArtifactError, match="HFValidationError"):
        read("hf:owner/not..valid")


# The tools themselves, where they are installed ----------------------------------------------------------------------


def tensor_tokens():
    return torch.from_numpy(X).float()


def agree(z, x_hat, c):
    ours = run(c)
    assert off(ours[0], z.detach().double().numpy()) < 1e-5 and off(ours[1], x_hat.detach().double().numpy()) < 1e-5


def randomise(module):
    """Give every floating-point parameter of a tool's fresh SAE random values."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1 / D**0.5 if parameter.ndim == 2 else 0.4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
            if name == "threshold":
                parameter.abs_()


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_saelens_reads_what_is_written(tmp_path, kind, subtract_b_dec, normalize):
    sae_lens = pytest.importorskip("sae_lens")
    c = checkpoint(kind, subtract_b_dec=subtract_b_dec, normalize=normalize)
    write(c, tmp_path / "a", "saelens")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "a")
    z = sae.encode(tensor_tokens())
    agree(z, sae.decode(z), c)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        *product(["standard", "topk", "jumprelu", "gated"], [{}, {"apply_b_dec_to_input": False}]),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_what_saelens_writes_is_read(tmp_path, architecture, more, normalize):
    sae_lens = pytest.importorskip("sae_lens")
    more = more | ({"k": K} if architecture == "topk" else {})
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "normalize_activations": normalize, **more}
    sae = sae_lens.SAE.from_dict(config)
    randomise(sae)
    sae.save_model(tmp_path)
    z = sae.encode(tensor_tokens())
    agree(z, sae.decode(z), read(tmp_path))


def test_a_trained_batchtopk_of_saelens_is_read_with_its_k(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, normalize_activations="none")
    sae = sae_lens.BatchTopKTrainingSAE(config)
    randomise(sae)
    sae.topk_threshold.fill_(0.7)
    sae.save_inference_model(tmp_path)
    c = read(tmp_path)
    assert (c.kind, c.k) == ("jumprelu", K) and torch.allclose(c.threshold, torch.tensor(0.7))
    saved = sae_lens.SAE.load_from_disk(tmp_path)
    z = saved.encode(tensor_tokens())
    agree(z, saved.decode(z), c)


def dictionary_classes():
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary as basic
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {
        "AutoEncoder": (lambda: basic.AutoEncoder(D, N), {"normalize_decoder": False}),
        "AutoEncoderNew": (lambda: basic.AutoEncoderNew(D, N), {}),
        "GatedAutoEncoder": (lambda: basic.GatedAutoEncoder(D, N), {}),
        "JumpReluAutoEncoder": (lambda: basic.JumpReluAutoEncoder(D, N), {}),
        "AutoEncoderTopK": (lambda: top_k.AutoEncoderTopK(D, N, K), {"k": K}),
        "BatchTopKSAE": (lambda: batch_top_k.BatchTopKSAE(D, N, K), {"k": K}),
        "MatryoshkaBatchTopKSAE": (
            lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, N, K, [N // 4, N - N // 4]),
            {"k": K},
        ),
    }


@pytest.mark.parametrize("name", [case for case in FILES if case.endswith(("SAE", "Encoder", "New", "EncoderTopK"))])
def test_what_dictionary_learning_writes_is_read(tmp_path, name):
    make, settings = dictionary_classes()[name]
    sae = make()
    randomise(sae)
    if "Batch" in name:
        sae.threshold.fill_(0.6)
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N} | ({"k": K} if "k" in settings else {})
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    z = sae.encode(tensor_tokens())
    agree(z, sae.decode(z), read(tmp_path))


@pytest.mark.parametrize(
    "c",
    [
        checkpoint(),
        checkpoint("jumprelu", threshold="same"),
        checkpoint("jumprelu", k=None),
        checkpoint("jumprelu", k=None, threshold="none"),
        checkpoint("jumprelu", subtract_b_dec=False),
    ],
    ids=["topk", "batchtopk", "gated", "relu", "untied"],
)
def test_dictionary_learning_reads_what_is_written(tmp_path, c):
    classes = dictionary_classes()
    write(c, tmp_path / "a", "dictionary_learning")
    name = json.loads((tmp_path / "a/config.json").read_text())["trainer"]["dict_class"]
    make, settings = classes[name]
    sae = type(make()).from_pretrained(str(tmp_path / "a/ae.pt"), **settings)
    z = sae.encode(tensor_tokens())
    agree(z, sae.decode(z), c)


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_sparsify_and_this_kit_read_each_other(tmp_path, subtract_b_dec):
    package = pytest.importorskip("sparsify")
    c = checkpoint(subtract_b_dec=subtract_b_dec)
    write(c, tmp_path / "a", "sparsify")
    sae = package.SparseCoder.load_from_disk(tmp_path / "a")
    for expected in (c, None):
        if expected is None:
            randomise(sae)
            sae.save_to_disk(tmp_path / "b")
            expected = read(tmp_path / "b")
        values, indices, _ = sae.encode(tensor_tokens())
        z = torch.zeros(len(X), N).scatter(1, indices, values)
        agree(z, sae.decode(values, indices), expected)

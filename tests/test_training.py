"""Training: several SAEs in one pass, resumed bit for bit after a kill, measured on what it never saw."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from sdxl_sae_kit import training
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.training import train

CONFIG = SAEConfig(k=4, expansion=2, lr=3e-3, dead_after=3000, auxk=16)


def test_an_sae_trained_with_others_is_the_one_trained_alone(small_cache, tmp_path):
    configs = {"k4": CONFIG, "k9": SAEConfig(k=9, expansion=1, lr=1e-3)}
    together = train(small_cache, configs, batch_size=512, store=tmp_path / "together")
    alone = train(small_cache, {"k4": CONFIG}, hookpoints=["up.0.1"], batch_size=512, store=tmp_path / "alone")
    assert set(together) == {(h, c) for h in ("down.2.1", "up.0.1") for c in ("k4", "k9")}
    one, other = together["up.0.1", "k4"], alone["up.0.1", "k4"]
    assert one.name == other.name
    assert one.digest == other.digest


def test_training_explains_held_out_tokens_far_better_than_an_untrained_sae(small_saes, small_cache):
    from sdxl_sae_kit.evaluation import evaluate

    for sae in small_saes.values():
        untrained = evaluate(SAE(sae.config, 96, sae.site), small_cache)["explained_variance"]
        assert sae.metrics["explained_variance"] > 0.8 > 0.5 > untrained
        low, high = sae.metrics["explained_variance_interval"]
        assert low <= sae.metrics["explained_variance"] <= high


def test_metrics_are_those_of_the_held_out_images_only(small_saes, small_cache):
    sae = small_saes["up.0.1", "k8"]
    images = [i for i, text in enumerate(small_cache.prompts.texts) if small_cache.prompts.held_out[i]]
    x = small_cache.read("up.0.1", images).flatten(0, 2).double()
    x_hat, z = sae(x.float()).double(), sae.encode(x.float())
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert sae.metrics["explained_variance"] == pytest.approx(expected.item(), abs=1e-6)
    assert sae.metrics["n_tokens"] == len(x)
    assert sae.metrics["l0"] == pytest.approx((z > 1e-3).double().sum(1).mean().item())
    assert sae.metrics["dead_share"] == pytest.approx(1 - (z > 1e-3).any(0).double().mean().item())


def test_the_unit_of_strength_is_the_mean_over_firing_training_tokens(small_saes, small_cache):
    sae = small_saes["down.2.1", "k8"]
    z = sae.encode(small_cache.read("down.2.1", small_cache.images("train")).flatten(0, 2).float()).double().numpy()
    for latent in range(0, sae.d_sae, 17):
        firing = z[:, latent][z[:, latent] > 1e-3]
        assert sae.mean_activation[latent].item() == pytest.approx(firing.mean() if len(firing) else 0, rel=1e-4)


def test_rows_in_the_saved_file_are_unit_and_the_header_says_where_it_belongs(small_saes, small_cache):
    for (hookpoint, _), sae in small_saes.items():
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-6)
        expected = {
            "model": "tiny-turbo",
            "hookpoint": hookpoint,
            "num_inference_steps": 1,
            "guidance_scale": 0.0,
            "kind": "update",
        }
        assert expected.items() <= asdict(sae.site).items()
        assert sae.site.revision == small_cache.recipe["revision"]


def test_the_log_tells_a_falling_loss(small_saes):
    for log in small_saes.logs.values():
        assert [line["step"] for line in log] == sorted({line["step"] for line in log})
        assert log[-1]["unexplained"] < 0.5 * log[0]["unexplained"]
    assert "2 lines of unexplained share over step" in small_saes.plot().layout.meta["alt"]
    assert len(small_saes.rows()) == 2


def test_a_second_call_loads_instead_of_training(small_saes, small_cache, store, monkeypatch):
    monkeypatch.setattr(training, "Learner", None)
    config = next(iter(small_saes.values())).config
    again = train(small_cache, {"k8": config}, batch_size=512, epochs=6, store=store)
    assert {key: sae.digest for key, sae in again.items()} == {key: sae.digest for key, sae in small_saes.items()}


TRAINER = """
    import sys, torch
    torch.set_num_threads(1)
    from sdxl_sae_kit import training, SAEConfig, ActivationCache
    training._CHECKPOINT_STEPS = 10
    print("ready", flush=True)
    config = SAEConfig(k=4, expansion=2, lr=3e-3, dead_after=3000, auxk=16)
    configs = {"a": config, "b": SAEConfig(k=8)}
    training.train(ActivationCache.open(sys.argv[1]), configs, batch_size=256, epochs=6, store=sys.argv[2])
"""


def run_trainer(cache, store):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), str(cache.artifact.folder), str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_killed_while_training_it_resumes_bit_for_bit(small_cache, tmp_path):
    whole = run_trainer(small_cache, tmp_path / "whole")
    assert whole.wait(timeout=200) == 0
    killed = run_trainer(small_cache, tmp_path / "killed")
    deadline = time.monotonic() + 100
    while not list((tmp_path / "killed").rglob("checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    assert not list((tmp_path / "killed").rglob("stamp.json"))
    assert run_trainer(small_cache, tmp_path / "killed").wait(timeout=200) == 0
    made = [p for p in (tmp_path / "whole").rglob("*") if p.name in ("sae.safetensors", "training.jsonl")]
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_auxk_brings_dead_latents_back(small_cache, tmp_path):
    common = SAEConfig(k=8, expansion=2, lr=3e-3, dead_after=10_000, auxk=64)
    configs = {
        f"{name}-{seed}": replace(common, auxk_coef=coefficient, seed=seed)
        for name, coefficient in {"with": 1 / 32, "without": 1e-30}.items()
        for seed in range(3)
    }
    saes = train(small_cache, configs, hookpoints=["up.0.1"], batch_size=512, epochs=24, store=tmp_path)
    dead = {key: sae.metrics["dead_share"] for (_, key), sae in saes.items()}
    with_auxk, without = (np.mean([dead[f"{name}-{seed}"] for seed in range(3)]) for name in ("with", "without"))
    assert with_auxk < 0.8 * without, dead


def test_mistakes_are_refused(pipe, small_cache, tmp_path):
    with pytest.raises(HookpointError, match="Did you mean 'up.0.1'"):
        train(small_cache, CONFIG, hookpoints=["up.O.1"], store=tmp_path)
    few = collect(pipe, ["one prompt"], ["mid.0"], images=None, store=tmp_path)
    with pytest.raises(KitError, match="too few to keep some for testing. Collect more prompts"):
        train(few, CONFIG, store=tmp_path)


def test_what_is_not_there_is_named_with_what_is(small_saes, unchecked_types):
    with pytest.raises(KitError, match=r"No SAE \('up.0.1', 'k9'\) here; there are .*\('up.0.1', 'k8'\)"):
        small_saes["up.0.1", "k9"]
    assert "up.0.1 k8: explained variance 0." in repr(small_saes)


@pytest.mark.parametrize("configs", [{"a": 5}, {"": SAEConfig(k=2)}, {"a/b": SAEConfig(k=2)}, {"<b>": SAEConfig(k=2)}])
def test_configurations_that_make_no_sense_are_refused(small_cache, tmp_path, configs, unchecked_types):
    with pytest.raises(KitError, match="must be an SAEConfig|cannot name an SAE"):
        train(small_cache, configs, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_sae_is_not_loaded(small_cache, tmp_path):
    config = SAEConfig(k=2, expansion=1)
    saes = train(small_cache, config, hookpoints="up.0.1", store=tmp_path)
    (path,) = tmp_path.glob("saes/*/sae.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="sae.safetensors is missing or has changed. Delete its folder"):
        train(small_cache, config, hookpoints="up.0.1", store=tmp_path)
    assert saes

"""tiny-sdxl's recipe at the size of a few pictures: it resumes bit for bit, and exports what it trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.tiny import checkpoints, judge_training, networks, runs, spread, unet_training, weights_folder
from sdxl_sae_kit.tiny.runs import Recipe, Run
from sdxl_sae_kit.tiny.train import train
from sdxl_sae_kit.tiny.world import WORDS, sample_scene

WEIGHTS = weights_folder("tiny-turbo")
# Two passes through pools of four, so that pools change; half size turns to full size between two checkpoints.
MICRO = Recipe(
    batch_size=4,
    pool_scenes=8,
    pool_passes=1,
    half_size_samples=4,
    warmup_steps=2,
    checkpoint_every=8,
    prompts=("a star",),
)
SAMPLES = 16
BASE, TURBO = (checkpoints.FILES[stage] for stage in ("base", "turbo"))


class Stop(Exception):
    """The power went out."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def short_memory():
    """Let the penalty on the spread of updates speak from the second step on."""
    before, spread._MEMORY = spread._MEMORY, 2
    yield
    spread._MEMORY = before


@pytest.fixture
def folder(tmp_path):
    """A working folder with a finished VAE."""
    shutil.copytree(WEIGHTS / "vae", tmp_path / "work" / "vae")
    return tmp_path / "work"


def run(folder, stage, **settings):
    amounts = dict.fromkeys(("samples", "turbo_samples", "vae_samples", "judge_samples"), SAMPLES)
    return train(folder, **amounts, processes=1, stage=stage, recipe=MICRO, **settings)


def run_interrupted(folder, stage, monkeypatch):
    """Stop right after the first checkpoint, then give the same command again."""
    real = checkpoints.save

    def save_and_stop(state, path):
        real(state, path)
        raise Stop

    monkeypatch.setattr(checkpoints, "sample_grid", lambda pipe, prompts: Image.new("RGB", (1, 1)))  # to save time
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(checkpoints, "save", save_and_stop)
        run(folder, stage)
    return run(folder, stage)


def tensors(state):
    """Every tensor of a checkpoint by its path."""
    if isinstance(state, dict):
        return {f"{key}.{path}": tensor for key, value in state.items() for path, tensor in tensors(value).items()}
    return {"": state} if isinstance(state, torch.Tensor) else {}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run of base and turbo that nothing stopped, with its VAE."""
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(WEIGHTS / "vae", folder / "vae")
    torch.set_num_threads(1)
    run(folder, "base")
    return run(folder, "turbo")


@pytest.mark.parametrize(("stage", "file"), [pytest.param("base", BASE, marks=pytest.mark.slow), ("turbo", TURBO)])
def test_unet_resumes_bit_for_bit(unbroken, folder, monkeypatch, stage, file):
    if stage == "turbo":
        shutil.copy(unbroken / BASE, folder)
    resumed = run_interrupted(folder, stage, monkeypatch)
    expected, found = checkpoints.load(unbroken / file), checkpoints.load(resumed / file)
    assert (found["it"], found["n"]) == (expected["it"], expected["n"]) == (4, SAMPLES)
    expected, found = tensors(expected), tensors(found)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_turbo_is_the_base_with_another_unet(unbroken):
    base, turbo = (checkpoints.load(unbroken / file) for file in (BASE, TURBO))
    for encoder in ("t1", "t2"):
        assert all(torch.equal(turbo[encoder][name], tensor) for name, tensor in base[encoder].items())
    moved = {name: (turbo["u_raw"][name] - tensor).norm() / tensor.norm() for name, tensor in base["u"].items()}
    assert max(moved.values()) > 0 and np.median(list(moved.values())) < 0.1


def test_turbo_sees_only_the_timesteps_of_four_steps_and_mostly_the_first(monkeypatch):
    pipe = load_pipeline("tiny-turbo", device="cpu")
    pipe.scheduler.set_timesteps(4)
    assert unet_training.FEW_STEPS.tolist() == pipe.scheduler.timesteps.tolist()
    seen = []
    monkeypatch.setattr(
        pipe.unet, "forward", lambda noisy, t, *_, **__: seen.append(t) or type("Out", (), {"sample": noisy * 0})
    )
    networks_ = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    scenes = [sample_scene(np.random.RandomState(0))] * 4
    draws = np.random.RandomState(1), torch.Generator().manual_seed(1)
    recipe = Recipe()
    latents = torch.zeros(4, 4, 32, 32)
    unet_training.denoising_loss(networks_, pipe.tokenizer, scenes, latents, recipe, unet_training.FEW_STEPS, *draws)
    (timesteps,) = seen
    assert set(timesteps.tolist()) <= set(unet_training.FEW_STEPS.tolist())
    assert (timesteps[: 2 * recipe.pairs] == 999).all() and recipe.pairs == 3


@pytest.mark.slow
def test_judge_resumes_bit_for_bit(tmp_path, monkeypatch):
    for name in ("unbroken", "stopped"):
        shutil.copytree(WEIGHTS / "vae", tmp_path / name / "vae")
    monkeypatch.setattr(judge_training, "_CALIBRATION", 64)
    run(tmp_path / "unbroken", "judge")
    run_interrupted(tmp_path / "stopped", "judge", monkeypatch)
    file = "judge/judge.safetensors"
    assert (tmp_path / "unbroken" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_vae_resumes_bit_for_bit(tmp_path, monkeypatch):
    run(tmp_path / "unbroken", "vae")
    run_interrupted(tmp_path / "stopped", "vae", monkeypatch)
    file = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "unbroken" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_draws_depend_on_seed_process_and_step_only(tmp_path):
    def draws(seed, rank, step):
        rng, generator = Run(tmp_path, MICRO, seed, 2, rank=rank).random(step)
        return rng.rand(), torch.rand(1, generator=generator).item()

    places = [(seed, rank, step) for seed in (0, 1) for rank in (0, 1) for step in (0, 1)]
    assert len({value for place in places for value in draws(*place)}) == 2 * len(places)
    assert all(draws(*place) == draws(*place) for place in places)
    scenes = [Run(tmp_path, MICRO, seed, 2, rank=rank).scenes(pool) for seed, rank, pool in places]
    assert all(a != b for i, a in enumerate(scenes) for b in scenes[:i])


def test_processes_step_along_their_mean_gradient(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(runs.dist, "all_reduce", lambda gradient: gradient.add_(0.1))  # what the other process found
    runs.optimize((0.3 * weight).sum(), torch.optim.SGD([weight], 1.0), [weight], rate=0.5, processes=2)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5 * (0.3 + 0.1) / 2]))


def test_checkpoint_goes_on_from_earlier_runs_and_holds_the_same(unbroken):
    expected = {"u", "u_raw", "t1", "t1_raw", "t2", "t2_raw", "opt", "it", "n", "spread", "run"}
    assert checkpoints.load(unbroken / BASE).keys() == expected
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    stages = [(line["stage"], line["samples"]) for line in lines]
    assert stages == [("base", 8), ("base", 16), ("turbo", 8), ("turbo", 16)]
    assert (unbroken / "base-00000016.png").exists() and (unbroken / "turbo-00000016.png").exists()


def test_a_stop_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ck.pt"
    checkpoints.save({"n": 1, "w": torch.ones(3)}, path)

    def fail(descriptor):
        raise Stop

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Stop):
        checkpoints.save({"n": 2, "w": torch.zeros(3)}, path)
    assert checkpoints.load(path)["n"] == 1


@pytest.mark.parametrize(("name", "file"), [("tiny-base", BASE), ("tiny-turbo", TURBO)])
def test_export_is_a_pipeline_of_the_averaged_weights_and_tells_no_paths(unbroken, name, file):
    folder, averaged = unbroken / name, checkpoints.load(unbroken / file)["u"]
    for key, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, averaged[key].half()), key
    pipe = load_pipeline(folder, device="cpu")
    assert pipe.unet.dtype == torch.float32
    assert type(pipe.scheduler) is type(load_pipeline(name, device="cpu").scheduler)
    assert all(str(unbroken.parent) not in path.read_text() for path in folder.rglob("*.json"))
    shipped = {path.relative_to(weights_folder(name)) for path in weights_folder(name).rglob("*") if path.is_file()}
    assert shipped == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_whitening_changes_the_latents_scale_and_no_picture():
    torch.manual_seed(0)
    vae = networks.autoencoder().eval()
    rng = np.random.RandomState(0)
    pictures = runs.pictures([sample_scene(rng) for _ in range(8)])
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        drawn = vae.decode(before.mean).sample
        networks.whiten(vae, pictures)
        after = vae.encode(pictures).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, drawn, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # Relative to the latents' spread, the noise that the encoder asks for is what it was.
    ratio = (before.std / before.mean.std((0, 2, 3), keepdim=True)) / after.std
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)


def test_shipped_weights_predict_v():
    """A U-Net that knows nothing has a loss of about 1, as v has variance 1; one that predicts noise has more."""
    pipe = load_pipeline("tiny-turbo", device="cpu")
    rng = np.random.RandomState(0)
    scenes = [sample_scene(rng) for _ in range(16)]
    latents = unet_training.encode(pipe.vae, runs.pictures(scenes), half_size=False)
    shipped = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    with torch.no_grad():
        draws = np.random.RandomState(1), torch.Generator().manual_seed(1)
        loss = unet_training.denoising_loss(
            shipped, pipe.tokenizer, scenes, latents, Recipe(), unet_training.FEW_STEPS, *draws
        )
    assert loss < 0.35


def test_every_word_is_one_token():
    tokenizer = networks.load_tokenizer(WEIGHTS / "tokenizer")
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(each) == 3 for each in ids)
    assert len({each[1] for each in ids} - {tokenizer.unk_token_id}) == len(WORDS)


def test_text_encoders_pool_at_the_end_of_the_caption():
    """What follows the end token is padding and must not matter; what comes before it must."""
    tokenizer = networks.load_tokenizer(WEIGHTS / "tokenizer")
    encoder = networks.text_encoders(tokenizer)[1].eval()
    ids = networks.token_ids(tokenizer, ["a red star"])
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    padding, words = ids.clone(), ids.clone()
    padding[0, end + 1 :] = tokenizer("blue").input_ids[1]
    words[0, end - 1] = tokenizer("blue").input_ids[1]
    with torch.no_grad():
        pooled, same, other = (encoder(each).text_embeds for each in (ids, padding, words))
    torch.testing.assert_close(pooled, same)
    assert not torch.allclose(pooled, other)


def test_unknown_stage_and_missing_vae_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="'vae', 'judge', 'base', 'turbo' and 'all'. Did you mean 'turbo'"):
        run(tmp_path, "turob")
    for stage in ("judge", "base"):
        with pytest.raises(ModelError, match="There is no finished VAE in .* Train it first"):
            run(tmp_path, stage)
    for processes in (1, 2):
        with pytest.raises(ModelError, match="There is no base in .* Train it first: stage='base'"):
            shutil.copytree(WEIGHTS / "vae", tmp_path / "vae", dirs_exist_ok=True)
            train(tmp_path, stage="turbo", processes=processes)


def test_what_cannot_begin_is_refused(tmp_path, unchecked_types):
    for settings, complaint in (
        ({"processes": 0}, "processes must be an integer of at least 1, not 0"),
        ({"device": "gpu"}, "Device 'gpu' cannot be used .* Leave device out"),
    ):
        with pytest.raises(KitError, match=complaint):
            train(tmp_path, stage="vae", **settings)
    with pytest.raises(KitError, match="Recipe: batch_size must be an integer of at least 2, not 1"):
        Recipe(batch_size=1)


def test_a_folder_goes_on_only_as_it_began(unbroken, folder):
    shutil.copy(unbroken / BASE, folder)
    with pytest.raises(ModelError, match=r"is of a run with .*'seed': 0.*, not .*'seed': 1.*Give the same, or another"):
        run(folder, "base", seed=1)


@pytest.mark.slow
def test_two_processes_train_one_model(folder, tmp_path):
    """Together they see what one would with both their batches: the gradients' mean, and the same spread of updates."""
    train(folder, samples=SAMPLES, turbo_samples=SAMPLES, processes=2, stage="base", recipe=MICRO)
    train(folder, samples=SAMPLES, turbo_samples=SAMPLES, processes=2, stage="turbo", recipe=MICRO)
    for file in (BASE, TURBO):
        together = checkpoints.load(folder / file)
        assert (together["it"], together["n"]) == (2, SAMPLES)
        assert all(tensor.isfinite().all() for tensor in tensors(together).values())
    assert together["spread"]["seen"] == 2


def running(session):
    """Processes of a session that are no zombies."""
    done = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True)
    return [state for state in done.stdout.split() if not state.startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_the_processes_along(folder, stop):
    process = subprocess.Popen(
        [sys.executable, "-m", "sdxl_sae_kit", "tiny", "train", str(folder), "--stage", "base"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(running(process.pid)) < 3:  # itself and two that train
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(5)
        process.send_signal(stop)
        _, said = process.communicate(timeout=30)
        time.sleep(2)
        assert process.returncode == 130 and "Interrupted; what was finished is kept" in said
        assert not running(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

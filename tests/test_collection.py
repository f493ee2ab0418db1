"""Collection: the right numbers, once each, whatever interrupts it. A real process is killed for real."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sdxl_sae_kit import collection
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.collection import collect, plan_collection
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.shards import read_manifest

PROMPTS = load_prompts("world", 20, seed=5)


def test_rows_are_the_updates_of_each_prompt_with_its_own_seed(pipe, tmp_path):
    cache = collect(pipe, PROMPTS, ["mid.0", "up.0.0"], batch_size=6, dtype="float32", store=tmp_path)
    for i in (0, 5, 6, 19):
        with record(pipe, cache.hookpoints) as recording:
            generate(pipe, [PROMPTS.texts[i]], [PROMPTS.seeds[i]])
        for hookpoint in cache.hookpoints:
            alone = recording.update(hookpoint).flatten(1, 2)
            assert torch.allclose(cache.read(hookpoint, [i])[:, 0], alone, atol=1e-4)
    assert cache.prompts == PROMPTS
    cache.artifact.verify()


def test_steps_and_guidance_halves_become_rows_in_order(pipe, tmp_path):
    cache = collect(
        pipe, PROMPTS[:3], ["mid.0"], num_inference_steps=2, guidance_scale=3.0, dtype="float32", store=tmp_path
    )
    assert cache.rows_per_image == 4
    with record(pipe, ["mid.0"]) as recording:
        generate(pipe, PROMPTS[:3].texts, PROMPTS[:3].seeds, num_inference_steps=2, guidance_scale=3.0)
    for row, (step, half) in enumerate([(0, "uncond"), (0, "cond"), (1, "uncond"), (1, "cond")]):
        assert torch.equal(cache.read("mid.0", range(3))[:, row], recording.update("mid.0", step, half).flatten(1, 2))


def test_stopping_the_u_net_early_collects_the_same(pipe, tmp_path, monkeypatch):
    whole = collect(pipe, PROMPTS, ["down.2.1", "mid.0"], store=tmp_path)
    decoded = []
    monkeypatch.setattr(pipe.vae, "decode", lambda *a, **k: decoded.append(1))
    early = collect(pipe, PROMPTS, ["down.2.1", "mid.0"], thumbnails=False, store=tmp_path)
    assert not decoded
    for hookpoint in whole.hookpoints:
        assert torch.equal(whole.read(hookpoint, range(20)), early.read(hookpoint, range(20)))
    assert early.nbytes < whole.nbytes


def test_a_second_call_returns_what_is_there_without_running_the_model(pipe, tmp_path, monkeypatch):
    first = collect(pipe, PROMPTS, ["mid.0"], store=tmp_path)
    monkeypatch.setattr(collection, "generate", None)
    assert collect(pipe, PROMPTS, ["mid.0"], store=tmp_path).artifact.digest == first.artifact.digest
    with pytest.raises(TypeError):
        collect(pipe, PROMPTS, ["mid.0"], batch_size=5, store=tmp_path)  # another recipe


def test_another_scheduler_is_another_cache(tmp_path):
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    settings = {"num_inference_steps": 2, "dtype": "float32", "thumbnails": False, "store": tmp_path}
    one = collect(pipe, PROMPTS[:2], ["mid.0"], **settings)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = collect(pipe, PROMPTS[:2], ["mid.0"], **settings)
    assert one.name != other.name
    assert not torch.allclose(one.read("mid.0", [0])[:, 1], other.read("mid.0", [0])[:, 1], atol=0.1)


def test_one_that_another_process_finished_meanwhile_is_left_alone(pipe, tmp_path, monkeypatch):
    first = collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)
    stamp = (first.artifact.folder / "stamp.json").read_bytes()
    looks = iter([False])  # the first look comes too early, the one under the lock does not
    monkeypatch.setattr(Artifact, "finished", property(lambda self: next(looks, True)))
    collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)
    assert (first.artifact.folder / "stamp.json").read_bytes() == stamp


def test_an_exception_at_one_image_loses_nothing_and_the_resumed_cache_is_bit_identical(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "_SHARD_IMAGES", 4)
    whole = collect(pipe, PROMPTS, ["mid.0"], batch_size=4, store=tmp_path / "whole")
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory at image 12")
        return generate(*args, **kwargs)

    monkeypatch.setattr(collection, "generate", failing)
    with pytest.raises(RuntimeError, match="image 12"):
        collect(pipe, PROMPTS, ["mid.0"], batch_size=4, store=tmp_path / "broken")
    resumed = collect(pipe, PROMPTS, ["mid.0"], batch_size=4, store=tmp_path / "broken")
    assert len(calls) == 4 + 2  # only what was missing
    assert resumed.artifact.digest == whole.artifact.digest


COLLECTOR = """
    import sys, torch
    torch.set_num_threads(1)
    from sdxl_sae_kit import collection, load_pipeline, load_prompts
    collection._SHARD_IMAGES = 4
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    print("ready", flush=True)
    collection.collect(pipe, load_prompts("world", 48, seed=5), ["mid.0", "up.0.1"], batch_size=4, store=sys.argv[1])
    print("done", flush=True)
"""


def start_collector(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COLLECTOR), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def committed_images(folder):
    return sum(shard["images"] for cache in folder.glob("activations/*") for shard in read_manifest(cache))


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_still_ends_bit_identical(tmp_path, kills):
    assert start_collector(tmp_path / "whole").wait(timeout=120) == 0
    rng = random.Random(0)
    committed = 0
    for number in range(kills):
        process = start_collector(tmp_path / "killed")
        while process.poll() is None and committed_images(tmp_path / "killed") <= 48 * number // kills:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))  # into the midst of whatever comes next
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        now = committed_images(tmp_path / "killed")
        assert now >= committed  # what was entered stays entered
        assert number or 0 < now < 48
        committed = now
    assert start_collector(tmp_path / "killed").wait(timeout=120) == 0
    whole, killed = (next((tmp_path / name / "activations").glob("*")) for name in ("whole", "killed"))
    assert {p.name for p in whole.iterdir()} == {p.name for p in killed.iterdir()}
    for path in whole.glob("*.h5"):
        assert path.read_bytes() == (killed / path.name).read_bytes()


def test_two_collectors_of_the_same_cache_are_one_too_many(pipe, tmp_path):
    first = collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)
    (first.artifact.folder / "stamp.json").unlink()
    with first.artifact.lock(), pytest.raises(ArtifactError, match=f"is being written by process {os.getpid()}"):
        collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)


def test_the_forecast_is_what_gets_written(pipe, tmp_path):
    cache = collect(pipe, PROMPTS, num_inference_steps=2, thumbnails=False, store=tmp_path)
    plan = plan_collection(dict(cache.recipe), 20)
    assert plan.n_tokens == 20 * 2 * 4 * 64
    assert plan.nbytes == 20 * 2 * 4 * 64 * 96 * 2
    assert plan.nbytes == pytest.approx(cache.nbytes, rel=0.05)


def test_the_papers_scale_is_forecast_without_its_model():
    recipe = {
        "num_inference_steps": 1,
        "halves": ["cond"],
        "dtype": "float16",
        "hookpoints": {str(i): [16, 16, 1280] for i in range(4)},
    }
    plan = plan_collection(recipe, 1_500_000)
    assert plan.n_tokens == 4 * 384_000_000
    assert plan.nbytes == pytest.approx(3.9e12, rel=0.01)


def test_mistakes_are_refused_before_anything_is_made(pipe, tmp_path, unchecked_types):
    with pytest.raises(HookpointError, match="Did you mean 'mid.0'"):
        collect(pipe, PROMPTS, ["mid.O"], store=tmp_path)
    with pytest.raises(KitError, match="No dtype 'float61'; .* Did you mean 'float16'"):
        collect(pipe, PROMPTS, ["mid.0"], dtype="float61", store=tmp_path)
    for settings, complaint in [
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, not 0"),
        ({"num_inference_steps": "1"}, "num_inference_steps must be an integer of at least 1, not '1'"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, not 2.5"),
        ({"guidance_scale": "high"}, "guidance_scale must be a finite number from 0 on, not 'high'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number from 0 on, not nan"),
        ({"height": 63}, "height must be a multiple of 8 of at least 8, not 63"),
        ({"hookpoints": []}, "collect needs at least one hookpoint, such as 'down.2.1'"),
    ]:
        with pytest.raises(KitError, match=complaint):
            collect(pipe, PROMPTS, **{"hookpoints": ["mid.0"], **settings}, store=tmp_path)
    assert not list(tmp_path.rglob("*.h5"))


def test_one_hookpoint_may_be_named_without_a_list(pipe, tmp_path):
    one, listed = (collect(pipe, PROMPTS[:2], given, store=tmp_path) for given in ("mid.0", ["mid.0"]))
    assert one.name == listed.name and one.hookpoints == ("mid.0",)


def test_numbers_too_large_for_float16_stop_it_with_advice(pipe, tmp_path, monkeypatch):
    projection = pipe.unet.mid_block.attentions[0].proj_out
    monkeypatch.setattr(
        projection, "forward", lambda x: torch.nn.functional.linear(x, projection.weight, projection.bias) * 1e9
    )
    with pytest.raises(KitError, match="not finite in float16. Collect with dtype='bfloat16'"):
        collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)
    assert collect(pipe, PROMPTS[:2], ["mid.0"], dtype="bfloat16", store=tmp_path).read("mid.0", [0]).isfinite().all()

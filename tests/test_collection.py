"""Collection: the right numbers, once each, whatever interrupts it. A real process is killed for real."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from launching import LAUNCHERS

from sdxl_sae_kit import collection, observation, plans
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.collection import collect, repair
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.hookpoints import list_hookpoints
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.pipelines import draw, generate, load_pipeline
from sdxl_sae_kit.processes import Processes
from sdxl_sae_kit.prompts import load_prompts

PROMPTS = load_prompts("world", 20, seed=5)
MANY = load_prompts("world", 24, seed=5)
HOOKPOINTS = ["mid.0", "up.0.1"]


def test_rows_are_the_updates_of_each_prompt_with_its_own_seed(pipe, tmp_path):
    cache = collect(pipe, PROMPTS, ["mid.0", "up.0.0"], batch_size=6, dtype="float32", store=tmp_path)
    for i in (0, 5, 6, 19):
        with record(pipe, cache.hookpoints) as recording:
            generate(pipe, [PROMPTS.texts[i]], [PROMPTS.seeds[i]])
        for hookpoint in cache.hookpoints:
            alone = recording.update(hookpoint).flatten(1, 2)
            assert torch.allclose(cache.read(hookpoint, [i])[:, 0], alone, atol=1e-3)  # of numbers of about 10
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
    early = collect(pipe, PROMPTS, ["down.2.1", "mid.0"], images=None, store=tmp_path)
    assert not decoded
    for hookpoint in whole.hookpoints:
        assert torch.equal(whole.read(hookpoint, range(20)), early.read(hookpoint, range(20)))
    assert early.nbytes < whole.nbytes


def test_a_second_call_returns_what_is_there_without_running_the_model(pipe, tmp_path, monkeypatch):
    first = collect(pipe, PROMPTS, ["mid.0"], store=tmp_path)
    monkeypatch.setattr(observation, "draw", None)
    assert collect(pipe, PROMPTS, ["mid.0"], store=tmp_path).artifact.digest == first.artifact.digest
    with pytest.raises(TypeError):
        collect(pipe, PROMPTS, ["mid.0"], batch_size=5, store=tmp_path)  # another recipe


def test_another_scheduler_is_another_cache(tmp_path):
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    settings = {"num_inference_steps": 2, "dtype": "float32", "images": None, "store": tmp_path}
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


def refusal_of(store):
    """Where a collector says why it stopped: not in the store, whose disk may be full."""
    return store.with_name(f"{store.name}.refusal")


class Collector:
    """A process of its own that collects and may be harmed: forked, so that it starts in milliseconds."""

    def __init__(self, pipe, folder, prompts, **settings):
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
                    collect(pipe, prompts, HOOKPOINTS, batch_size=4, store=folder, **settings)
                code = 0
            except KeyboardInterrupt:
                code = 130
            except ArtifactError as error:
                refusal_of(folder).write_text(str(error))
                code = 3
            finally:
                os._exit(code)

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """The exit code; minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of four images, so that there are many moments at which something can go wrong."""
    monkeypatch.setattr(observation, "_SHARD_IMAGES", 4)


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """What must come out, whatever happens on the way: six shards of four images."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(observation, "_SHARD_IMAGES", 4)
        return collect(pipe, MANY, HOOKPOINTS, batch_size=4, store=tmp_path_factory.mktemp("whole"))


def folder_of(store):
    (folder,) = (store / "activations").glob("*")
    return folder


def entered(store):
    """The images that are entered, as a reader sees them while others may be writing."""
    try:
        return ActivationCache.open(folder_of(store), unfinished=True).present.tolist()
    except (ArtifactError, ValueError):  # not even the recipe is there yet
        return []


def committed(store):
    """Every row of the images that are entered."""
    if not (present := entered(store)):
        return {}
    cache = ActivationCache.open(folder_of(store), unfinished=True)
    return {(hookpoint, image): cache.read(hookpoint, [image]) for hookpoint in cache.hookpoints for image in present}


def same_files(one, other):
    names = {path.name for path in one.iterdir()} - {".lock", "stamp.json"}
    assert names == {path.name for path in other.iterdir()} - {".lock", "stamp.json"}
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return Artifact(one).digest == Artifact(other).digest


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_loses_nothing_and_ends_bit_identical(pipe, tmp_path, small_shards, whole, kills):
    rng = random.Random(0)
    expected = {(h, i): whole.read(h, [i]) for h in whole.hookpoints for i in range(len(MANY))}
    started = time.perf_counter()
    assert Collector(pipe, tmp_path / "timed", MANY).wait() == 0
    takes, killed, number = time.perf_counter() - started, 0, 0
    while killed < kills:
        store, seen = tmp_path / str(number), {}
        store.mkdir()
        for _ in range(rng.randint(1, 5)):  # so often, then it may finish
            process = Collector(pipe, store, MANY)
            time.sleep(rng.uniform(0, takes))
            process.signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            now = committed(store)
            assert now.keys() >= seen.keys()  # what was entered stays entered
            assert all(torch.equal(rows, expected[key]) for key, rows in now.items())
            seen = now
        assert Collector(pipe, store, MANY).wait() == 0
        assert same_files(folder_of(store), whole.artifact.folder)
        number += 1


def test_interrupted_it_keeps_what_is_whole_and_goes_on(pipe, tmp_path, small_shards, whole):
    (tmp_path / "stopped").mkdir()
    process = Collector(pipe, tmp_path / "stopped", MANY)
    while len(entered(tmp_path / "stopped")) < 8:
        time.sleep(0.01)
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert 8 <= len(entered(tmp_path / "stopped")) < len(MANY)
    assert Collector(pipe, tmp_path / "stopped", MANY).wait() == 0
    assert same_files(folder_of(tmp_path / "stopped"), whole.artifact.folder)


def test_an_exception_at_image_537_loses_at_most_its_shard_and_is_made_good(pipe, tmp_path, monkeypatch, capsys):
    prompts = load_prompts("world", 600)
    settings = {"hookpoints": ["down.1.0"], "batch_size": 32, "images": None}  # the first, after which the U-Net stops
    whole = collect(pipe, prompts, store=tmp_path / "whole", **settings)
    drawn = []

    def failing(pipe, texts, seeds, **more):
        drawn.extend(seeds)
        if prompts.seeds[537] in seeds and len(drawn) <= 600:
            raise RuntimeError("out of memory at image 537")
        return draw(pipe, texts, seeds, **more)

    monkeypatch.setattr(observation, "draw", failing)
    with pytest.raises(RuntimeError, match="image 537"):
        collect(pipe, prompts, store=tmp_path / "broken", **settings)
    assert "Stopped; 512 of 600 images are kept, and the same call goes on there." in capsys.readouterr().out
    reader = ActivationCache.open(folder_of(tmp_path / "broken"), unfinished=True)
    assert reader.present.tolist() == list(range(512))  # four shards of 128
    before = len(drawn)
    drawn += [0] * 600
    resumed = collect(pipe, prompts, store=tmp_path / "broken", **settings)
    assert len(drawn) - 600 - before == 600 - 512  # only what was missing
    assert same_files(resumed.artifact.folder, whole.artifact.folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_beforehand(pipe, small_disk):
    with pytest.raises(ArtifactError, match=r"MB are to be written.\sIt does not fit: .* MB are free"):
        collect(pipe, load_prompts("world", 300), ["mid.0", "up.0.1"], store=small_disk)
    assert not list(small_disk.rglob("*.h5"))


def test_a_disk_that_fills_up_on_the_way_loses_nothing(pipe, small_disk, small_shards, whole):
    process = Collector(pipe, small_disk, MANY)
    while len(entered(small_disk)) < 8:
        time.sleep(0.01)
    with open(small_disk / "filler", "wb", buffering=0) as filler, suppress(OSError):  # another program fills the disk
        while True:
            filler.write(bytes(4096))
    assert process.wait() == 3
    assert "There is no space left for" in refusal_of(small_disk).read_text()
    assert 8 <= len(entered(small_disk)) < len(MANY)
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    with pytest.raises(ArtifactError, match="There is no space left for .* make room, and the same call goes on"):
        _fill_and_collect(pipe, MANY, small_disk)
    collect(pipe, MANY, HOOKPOINTS, batch_size=4, store=small_disk)  # in the same process that failed
    assert same_files(folder_of(small_disk), whole.artifact.folder)


def _fill_and_collect(pipe, prompts, disk):
    """Collect with hardly any space left, and give it back afterwards."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 60_000))
    try:
        with patch.object(plans.CollectionPlan, "check_space"):
            collect(pipe, prompts, HOOKPOINTS, batch_size=4, store=disk)
    finally:
        filler.unlink()


def test_a_second_collector_is_refused_at_once_by_the_name_of_the_first(pipe, tmp_path, small_shards):
    prompts = load_prompts("world", 200, seed=5)
    first = Collector(pipe, tmp_path, prompts)
    while not entered(tmp_path):
        time.sleep(0.01)
    second = Collector(pipe, tmp_path, prompts)
    assert second.wait() == 3  # while the first goes on: it is refused, and does not wait
    assert os.waitpid(first.pid, os.WNOHANG) == (0, 0)
    assert f"is being written by process {first.pid} on {os.uname().nodename}" in refusal_of(tmp_path).read_text()
    first.signal(signal.SIGKILL)
    first.wait()


def test_two_collectors_of_the_same_cache_are_one_too_many(pipe, tmp_path):
    first = collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)
    (first.artifact.folder / "stamp.json").unlink()
    with first.artifact.lock(), pytest.raises(ArtifactError, match=f"is being written by process {os.getpid()}"):
        collect(pipe, PROMPTS[:2], ["mid.0"], store=tmp_path)


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
        ({"hookpoints": []}, "At least one hookpoint is needed, such as 'down.2.1'"),
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


def test_hookpoints_of_several_grids_and_widths_come_in_one_pass(pipe, tmp_path):
    names = list(list_hookpoints(pipe.unet))
    cache = collect(pipe, PROMPTS[:5], names, dtype="float32", images=None, store=tmp_path)
    assert list(cache.hookpoints) == names
    with record(pipe, names) as recording:
        generate(pipe, PROMPTS[:5].texts, PROMPTS[:5].seeds)
    for name in names:
        assert torch.equal(cache.read(name, range(5))[:, 0], recording.update(name).flatten(1, 2))
    assert {cache.grid(name) for name in names} == {(8, 8), (16, 16)}


def test_steps_halves_and_tokens_can_be_chosen(pipe, tmp_path):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "dtype": "float32", "images": None, "store": tmp_path}
    whole = collect(pipe, PROMPTS[:6], ["mid.0", "up.0.1"], batch_size=4, **settings)
    chosen = {"steps": [2, 0], "half": "uncond", "tokens_per_image": 7}
    some = collect(pipe, PROMPTS[:6], ["mid.0", "up.0.1"], batch_size=4, **chosen, **settings)
    rows = [whole.row(step, "uncond") for step in (0, 2)]
    assert some.rows_per_image == 2
    for hookpoint in some.hookpoints:
        kept = torch.from_numpy(some.positions(hookpoint, range(6))).long()
        expected = whole.read(hookpoint, range(6))[:, rows].gather(2, kept[:, None, :, None].expand(-1, 2, -1, 96))
        assert torch.equal(some.read(hookpoint, range(6)), expected)


def test_nothing_is_drawn_after_the_last_step_that_is_kept(pipe, tmp_path):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        collect(pipe, PROMPTS[:2], ["mid.0"], num_inference_steps=4, steps=[0, 1], images=None, store=tmp_path)
    finally:
        handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (72, 64)])
def test_sizes_need_not_be_square(pipe, tmp_path, height, width):
    cache = collect(pipe, PROMPTS[:3], ["mid.0"], height=height, width=width, images="png", store=tmp_path)
    assert cache.grid("mid.0") == (-(-height // 8), -(-width // 8))
    assert cache.image(1).size == (width, height)
    assert cache.read("mid.0", [0]).shape[2] == cache.grid("mid.0")[0] * cache.grid("mid.0")[1]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_may_be_of_any_size(pipe, tmp_path, batch_size):
    cache = collect(pipe, PROMPTS, ["mid.0"], batch_size=batch_size, dtype="float32", images=None, store=tmp_path)
    whole = collect(pipe, PROMPTS, ["mid.0"], batch_size=20, dtype="float32", images=None, store=tmp_path)
    assert torch.allclose(cache.read("mid.0", range(20)), whole.read("mid.0", range(20)), atol=2e-3)


def test_whole_pictures_are_those_that_were_drawn(pipe, tmp_path):
    cache = collect(pipe, PROMPTS[:3], ["mid.0"], images="png", store=tmp_path)
    drawn = generate(pipe, PROMPTS[:3].texts, PROMPTS[:3].seeds)
    assert all(np.array_equal(np.array(cache.image(i)), np.array(picture)) for i, picture in enumerate(drawn))


def test_long_and_repeated_prompts_are_counted_and_told(pipe, tmp_path, capsys, recwarn):
    prompts = ["a red circle", "a red circle", "a red circle " * 60, "ein grüner Kreis ✓ 圆", "a red circle"]
    cache = collect(pipe, prompts, ["mid.0"], batch_size=2, store=tmp_path)
    told = capsys.readouterr().out
    assert "1 of 5 prompts is longer than the" in told and "cut there" in told
    assert "2 of 5 prompts repeat an earlier one" in told
    assert cache.artifact.stamp["facts"] == {"images": 5, "prompts cut": 1, "prompts repeated": 2}
    assert not [warning for warning in recwarn if "longer than" in str(warning.message)]
    assert cache.prompts.texts == tuple(prompts)


def test_repair_collects_again_what_is_lost_and_nothing_else(pipe, tmp_path, monkeypatch, small_shards):
    cache = collect(pipe, PROMPTS, ["mid.0"], batch_size=4, store=tmp_path)
    folder, digest = cache.artifact.folder, cache.digest
    data = bytearray((folder / "shard-00002.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "shard-00002.h5").write_bytes(data)
    (folder / "shard-00004.h5").unlink()
    (folder / "manifest.jsonl").write_text("")
    drawn = []

    def counting(pipe, texts, seeds, **settings):
        drawn.extend(seeds)
        return draw(pipe, texts, seeds, **settings)

    monkeypatch.setattr(observation, "draw", counting)
    assert repair(pipe, folder).digest == digest
    assert drawn == [PROMPTS.seeds[i] for i in (8, 9, 10, 11, 16, 17, 18, 19)]
    assert repair(pipe, cache).digest == digest  # nothing left to do
    assert len(drawn) == 8


def test_repair_needs_the_same_model_and_only_what_is_lost(pipe, tmp_path):
    cache = collect(pipe, PROMPTS[:4], ["mid.0"], store=tmp_path)
    folder = cache.artifact.folder
    shard, prompts = folder / "shard-00000.h5", folder / "prompts.jsonl"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(KitError, match="collected with model tiny-turbo, not tiny-base; .* Load that pipeline"):
        repair(load_pipeline("tiny-base", device="cpu"), folder)
    prompts.write_text("")
    with pytest.raises(ArtifactError, match="prompts of .* are damaged. Pass those it was collected from"):
        repair(pipe, folder)
    with pytest.raises(ArtifactError, match="from other prompts than these. Pass the same"):
        repair(pipe, folder, prompts=PROMPTS[:3])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds notes.txt, which is not of this cache. Move it elsewhere"):
        repair(pipe, folder, prompts=PROMPTS[:4])
    (folder / "notes.txt").unlink()
    (folder / "stamp.json").write_text("{}")
    assert repair(pipe, folder, prompts=PROMPTS[:4]).digest == cache.digest
    renamed = folder.rename(folder.with_name("another-name"))
    shard = renamed / "shard-00000.h5"
    shard.write_bytes(b"")
    with pytest.raises(ArtifactError, match="not the one that named the folder. Give it back its name, which ends"):
        repair(pipe, renamed)


TOGETHER = """
    import sys
    import torch
    torch.set_num_threads(1)
    import sdxl_sae_kit as kit
    from sdxl_sae_kit import observation
    observation._SHARD_IMAGES = 4
    pipe = kit.load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    prompts = kit.load_prompts("world", 24, seed=5)
    cache = kit.collect(pipe, prompts, ["mid.0", "up.0.1"], batch_size=4, store=sys.argv[1])
    sys.stdout.write(f"digest {cache.digest}\\n")  # at once: two processes write here
"""
PIDS = """
    import os, pathlib, sys
    pathlib.Path(sys.argv[1] + f".{os.getpid()}.pid").touch()
"""


@pytest.mark.parametrize(
    ("begins", "ends"),
    [("torchrun", "accelerate"), pytest.param("accelerate", "torchrun", marks=pytest.mark.slow)],
)
def test_two_processes_make_the_same_cache_and_finish_what_dead_ones_left(tmp_path, small_shards, whole, begins, ends):
    script = tmp_path / "together.py"
    script.write_text(textwrap.dedent(PIDS) + textwrap.dedent(TOGETHER))
    beginning, ending = (
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script), str(tmp_path / "shared")]
        for launcher in (begins, ends)
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(beginning, env=environment)
    while process.poll() is None and not committed_by_two(tmp_path / "shared"):
        time.sleep(0.02)
    workers = [int(path.name.split(".")[1]) for path in tmp_path.glob("shared.*.pid")]
    assert len(workers) == 2
    for pid in (process.pid, *workers):  # the launcher gives each a session of its own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(entered(tmp_path / "shared")) < len(MANY)
    done = subprocess.run(ending, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.count(f"digest {whole.digest}") == 2, done.stderr
    assert same_files(folder_of(tmp_path / "shared"), whole.artifact.folder)


def test_a_process_takes_the_shards_of_its_numbers_whatever_others_have_entered(
    pipe, tmp_path, small_shards, monkeypatch
):
    class Second(Processes):
        def wait(self):
            """The first is elsewhere, and was quicker."""

    drawn = []

    def stopping(pipe, texts, seeds, **more):
        drawn.append(seeds)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(pipe, texts, seeds, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(observation, "draw", stopping)
        collect(pipe, MANY, ["mid.0"], batch_size=4, images=None, store=tmp_path)
    assert entered(tmp_path) == [0, 1, 2, 3]
    taken = []
    monkeypatch.setattr(collection, "find_processes", lambda: Second(1, 2))
    monkeypatch.setattr(collection, "_write", lambda pipe, writer, shards, *_: taken.extend(shards))
    with pytest.raises(ArtifactError):  # it is not whole: the first was not there to finish it
        collect(pipe, MANY, ["mid.0"], batch_size=4, images=None, store=tmp_path).artifact.present()
    assert [shard.file for shard in taken] == [f"shard-{number:05d}.h5" for number in (1, 3, 5)]


def committed_by_two(store):
    """Whether both processes have entered a shard: those of one have even numbers, those of the other odd ones."""
    return {image // 4 % 2 for image in entered(store)} == {0, 1}


def test_repair_is_refused_while_a_collector_works_and_finishes_what_is_unfinished(pipe, tmp_path, small_shards):
    first = Collector(pipe, tmp_path, MANY)
    while not entered(tmp_path):
        time.sleep(0.01)
    first.signal(signal.SIGSTOP)  # so that it is not done before it is looked at
    with pytest.raises(ArtifactError, match=f"is being written by process {first.pid}"):
        repair(pipe, folder_of(tmp_path))
    first.signal(signal.SIGKILL)
    first.wait()
    kept = committed(tmp_path)
    assert 0 < len(kept) < 2 * len(MANY)
    cache = repair(pipe, folder_of(tmp_path))
    assert cache.n_images == len(MANY)
    assert all(torch.equal(cache.read(hookpoint, [image]), rows) for (hookpoint, image), rows in kept.items())


def test_repair_of_a_cache_that_is_open_sees_what_happened_to_its_files(pipe, tmp_path):
    cache = collect(pipe, PROMPTS[:4], ["mid.0"], store=tmp_path)
    digest = cache.digest
    (cache.artifact.folder / "stamp.json").write_text("{}")
    assert repair(pipe, cache).digest == digest
    with pytest.raises(ArtifactError, match="There is no folder"):
        repair(pipe, tmp_path / "nowhere")


def test_large_batches_are_told_of(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.collection._MUCH_MEMORY", 10_000)
    collect(pipe, PROMPTS[:4], ["mid.0"], images=None, store=tmp_path)
    assert "of memory are needed, for 4 images at once; a smaller batch_size needs less" in capsys.readouterr().out

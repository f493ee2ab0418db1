"""The activation cache: what goes in comes out, whatever the shape, and nothing damaged goes unnoticed."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, HookpointError
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.shards import ShardWriter, read_manifest

SHAPES = {"down.2.1": [2, 3, 4], "mid.0": [1, 2, 5]}


def recipe(n_steps=1, halves=("cond",), dtype="float16", thumbnails=False, **more):
    return {
        "model": "m", "revision": "r", "num_inference_steps": n_steps, "guidance_scale": 0.0, "halves": list(halves),
        "hookpoints": SHAPES, "dtype": dtype, "thumbnails": thumbnails, **more,
    }  # fmt: skip


def write(folder, batches, images_per_shard=4, pictures=None, stop_after=None, **settings):
    """Write a cache of these batches, each {hookpoint: (image, row, token, d_in)}, or only the first few of them."""
    n = sum(len(batch["mid.0"]) for batch in batches)
    artifact = Store.at(folder).artifact("activations", "test", recipe(**settings))
    with artifact.lock():
        writer = ShardWriter(artifact, load_prompts([f"prompt {i}" for i in range(n)]), images_per_shard)
        done = 0
        for batch in batches[:stop_after]:
            if done >= writer.next_image:
                writer.append(batch, pictures[done : done + len(batch["mid.0"])] if pictures else [])
            done += len(batch["mid.0"])
        return ActivationCache(writer.finish()) if stop_after is None else artifact


def random_batches(sizes, rows=1, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    shape = {h: (rows, height * width, d) for h, (height, width, d) in SHAPES.items()}
    return [{h: rng.normal(size=(n, *s)).astype(dtype) for h, s in shape.items()} for n in sizes]


def join(batches, hookpoint):
    return np.concatenate([batch[hookpoint] for batch in batches])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    steps=st.integers(1, 2),
    guided=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    per_shard=st.integers(1, 7),
    data=st.data(),
)
def test_what_is_written_is_read_back_in_any_order(tmp_path_factory, sizes, steps, guided, dtype, per_shard, data):
    halves = ["uncond", "cond"] if guided else ["cond"]
    stored = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32}[dtype]
    batches = random_batches(sizes, steps * len(halves), stored)
    if dtype == "bfloat16":
        batches = [
            {h: torch.from_numpy(a).bfloat16().view(torch.uint16).numpy() for h, a in batch.items()}
            for batch in batches
        ]
    cache = write(tmp_path_factory.mktemp("cache"), batches, per_shard, n_steps=steps, halves=halves, dtype=dtype)
    order = data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=10))
    for hookpoint in SHAPES:
        read = cache.read(hookpoint, order)
        assert read.dtype == getattr(torch, dtype)
        raw = read.view(torch.uint16) if dtype == "bfloat16" else read
        assert np.array_equal(raw.numpy(), join(batches, hookpoint)[order])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(10, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_training_token_once_in_an_order_of_its_own(
    tmp_path_factory, size, batch_size, seed, epoch
):
    batches = random_batches([size])
    grid = np.arange(size * 6).reshape(size, 1, 6, 1)
    batches[0]["down.2.1"] = np.broadcast_to(grid, (size, 1, 6, 4)).astype(np.float32)
    cache = write(
        tmp_path_factory.mktemp("cache"), [{h: a.astype(np.float32) for h, a in batches[0].items()}], dtype="float32"
    )

    def read(e):
        batches = cache.batches(["down.2.1"], batch_size, seed=seed, epoch=e)
        return [batch["down.2.1"][:, 0].int().tolist() for batch in batches]

    parts = read(epoch)
    expected = sorted(int(t) for image in cache.images("train") for t in grid[image, 0, :, 0])
    assert sorted(sum(parts, [])) == expected
    assert all(len(part) == batch_size for part in parts[:-1])
    assert parts == read(epoch)
    if len(expected) > 30:
        assert sum(parts, []) != expected
        assert parts != read(epoch + 1)


def test_batches_of_several_hookpoints_are_the_same_tokens(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(30, 1, 6, 4)).astype(np.float32)
    artifact = Store.at(tmp_path).artifact(
        "activations", "t", recipe(dtype="float32") | {"hookpoints": {"a": [2, 3, 4], "b": [2, 3, 4]}}
    )
    with artifact.lock():
        writer = ShardWriter(artifact, load_prompts([f"p{i}" for i in range(30)]), 7)
        writer.append({"a": base, "b": base * 2}, [])
        cache = ActivationCache(writer.finish())
    for batch in cache.batches(["a", "b"], 16):
        assert torch.equal(batch["a"] * 2, batch["b"])


def test_a_sample_is_distinct_training_tokens_from_all_over(tmp_path):
    grid = np.arange(60 * 6, dtype=np.float32).reshape(60, 1, 6, 1)
    batch = random_batches([60], dtype=np.float32)[0] | {
        "down.2.1": np.broadcast_to(grid, (60, 1, 6, 4)).astype(np.float32)
    }
    cache = write(tmp_path, [batch], 9, dtype="float32")
    train = len(cache.images("train"))
    for n in (5, train, 3 * train, 10_000):
        tokens = cache.sample("down.2.1", n)[:, 0].int().numpy()
        assert len(np.unique(tokens)) == len(tokens) == min(n, train * 6)
        assert set(tokens // 6) <= set(cache.images("train").tolist())
    assert len(np.unique(cache.sample("down.2.1", train)[:, 0].int().numpy() // 6)) == train


def test_half_made_shards_and_torn_lines_are_forgotten_and_the_rest_ends_bit_identical(tmp_path):
    batches = random_batches([4, 4, 4])
    whole = write(tmp_path / "whole", batches)
    artifact = write(tmp_path / "broken", batches, stop_after=2)
    (artifact.folder / "shard-00002.h5.tmp").write_bytes(b"half")
    (artifact.folder / "shard-00002.h5").write_bytes(b"never entered")
    with open(artifact.folder / "manifest.jsonl", "ab") as manifest:
        manifest.write(b'{"file":"shard-00002.h5","first_im')
    resumed = write(tmp_path / "broken", batches)
    assert resumed.artifact.digest == whole.artifact.digest
    assert {p.name for p in resumed.artifact.folder.iterdir()} == {p.name for p in whole.artifact.folder.iterdir()}


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:1] + lines[2:],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: [lines[0].replace('"images":4', '"images":5'), *lines[1:]],
        lambda lines: [lines[0].replace("shard-00000.h5", "../shard-00000.h5"), *lines[1:]],
        lambda lines: ["[]", *lines[1:]],
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    cache = write(tmp_path, random_batches([4, 4, 4]))
    manifest = cache.artifact.folder / "manifest.jsonl"
    manifest.write_text("\n".join(edit(manifest.read_text().splitlines())) + "\n")
    with pytest.raises(ArtifactError, match=r"Line \d of .* was changed"):
        read_manifest(cache.artifact.folder)
    with pytest.raises(ArtifactError, match=r"Line \d of .* was changed|manifest.jsonl is missing or has changed"):
        ActivationCache.open(cache.artifact.folder)


def test_verify_finds_a_flipped_bit_and_so_does_reading(tmp_path):
    cache = write(tmp_path, random_batches([4, 4]))
    path = cache.artifact.folder / "shard-00001.h5"
    with h5py.File(path) as file:
        at = file["updates/mid.0"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="shard-00001.h5 has changed"):
        ActivationCache.open(cache.artifact.folder).artifact.verify()
    with pytest.raises(ArtifactError, match="shard-00001.h5 of .* cannot be read .*collect again"):
        ActivationCache.open(cache.artifact.folder).read("mid.0", [4])


def test_a_lost_shard_is_missed_by_name_and_many_shards_need_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.cache._OPEN_FILES", 2)
    batches = random_batches([1] * 7)
    cache = write(tmp_path, batches, images_per_shard=1)
    assert np.array_equal(cache.read("mid.0", range(7)).numpy(), join(batches, "mid.0"))
    assert len(cache._open) == 2
    (cache.artifact.folder / "shard-00003.h5").unlink()
    with pytest.raises(ArtifactError, match="shard-00003.h5 of .* cannot be read .*collect again"):
        cache.read("mid.0", [3])


def test_plain_h5py_reads_all_shards_as_one_from_anywhere(tmp_path):
    batches = random_batches([4, 4, 3], rows=2)
    cache = write(tmp_path, batches, n_steps=2)
    code = (
        "import h5py, sys, numpy as np\n"
        "f = h5py.File(sys.argv[1])\n"
        "np.save(sys.argv[2], f['updates/mid.0'][:])\n"
        "print(f['rows/image'][:].tolist(), f['rows/step'][:].tolist(), f['rows/half'][:].tolist())\n"
    )
    arguments = [str(cache.artifact.folder / "all.h5"), str(tmp_path / "out.npy")]
    printed = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert np.array_equal(np.load(tmp_path / "out.npy"), join(batches, "mid.0").reshape(22, 2, 5))
    assert printed.strip() == f"{[i for i in range(11) for _ in range(2)]} {[0, 1] * 11} {[0] * 22}"


def test_thumbnails_come_back_as_pictures_of_the_right_image(tmp_path):
    pictures = [Image.new("RGB", (64, 32), (20 * i, 0, 0)) for i in range(11)]
    cache = write(tmp_path, random_batches([4, 4, 3]), pictures=pictures, thumbnails=True)
    import io

    for i in (0, 3, 4, 10):
        picture = Image.open(io.BytesIO(cache.thumbnail(i)))
        assert picture.size == (64, 32)
        assert abs(picture.getpixel((5, 5))[0] - 20 * i) < 6
    with pytest.raises(ArtifactError, match="without images"):
        write(tmp_path / "bare", random_batches([2])).thumbnail(0)


def test_a_forked_child_reads_with_handles_of_its_own(tmp_path):
    batches = random_batches([4, 4])
    cache = write(tmp_path, batches)
    cache.read("mid.0", [0])
    child = os.fork()
    if child == 0:
        good = np.array_equal(cache.read("mid.0", range(8)).numpy(), join(batches, "mid.0"))
        os._exit(0 if good else 1)
    assert np.array_equal(cache.read("mid.0", range(8)).numpy(), join(batches, "mid.0"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_hookpoint_it_lacks_and_a_folder_without_cache_are_refused(tmp_path):
    cache = write(tmp_path, random_batches([2]))
    with pytest.raises(
        HookpointError, match=r"has no updates of 'mid.1'; it has down.2.1, mid.0. .* Did you mean 'mid.0'"
    ):
        cache.grid("mid.1")
    with pytest.raises(ArtifactError, match="No finished artifact"):
        ActivationCache.open(tmp_path / "nowhere")


def test_the_manifest_says_which_images_are_in_which_shard(tmp_path):
    cache = write(tmp_path, random_batches([4, 4, 3]))
    entries = read_manifest(cache.artifact.folder)
    assert [(e["file"], e["first_image"], e["images"]) for e in entries] == [
        ("shard-00000.h5", 0, 4), ("shard-00001.h5", 4, 4), ("shard-00002.h5", 8, 3),
    ]  # fmt: skip
    assert json.loads((cache.artifact.folder / "stamp.json").read_text())["facts"] == {"images": 11}

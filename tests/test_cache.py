"""The activation cache: what goes in comes out, whatever the shape and whoever reads."""

import io
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from caches import SHAPES, a_cache, made_up_recipe, made_up_updates, write_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.shards import read_manifest

fresh_folders = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fresh_folders
@given(
    n=st.integers(1, 15),
    steps=st.sampled_from([[0], [1], [0, 3]]),
    halves=st.sampled_from([["cond"], ["uncond"], ["uncond", "cond"]]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    per_shard=st.integers(1, 7),
    sampled=st.sampled_from([None, 1, 2, 50]),
    data=st.data(),
)
def test_what_is_written_is_read_back_in_any_order(tmp_path_factory, n, steps, halves, dtype, per_shard, sampled, data):
    cache, updates = a_cache(
        tmp_path_factory.mktemp("cache"), n, steps=steps, halves=halves, dtype=dtype, images_per_shard=per_shard,
        tokens_per_image=sampled,
    )  # fmt: skip
    order = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=10))
    for hookpoint in SHAPES:
        read = cache.read(hookpoint, order)
        assert read.dtype == getattr(torch, dtype)
        raw = (read.view(torch.uint16) if dtype == "bfloat16" else read).numpy()
        places = cache.positions(hookpoint, order)
        assert raw.shape[2] == places.shape[1] == min(sampled or 99, updates[hookpoint].shape[2])
        for got, image, tokens in zip(raw, order, places, strict=True):
            assert len(set(tokens.tolist())) == len(tokens)
            assert np.array_equal(got, updates[hookpoint][image][:, tokens])


def test_sampled_tokens_are_others_for_every_image_and_the_same_for_hookpoints_of_one_grid(tmp_path):
    shapes = {"a": [8, 8, 3], "b": [8, 8, 5], "c": [4, 4, 3]}
    cache, _ = a_cache(tmp_path, 40, hookpoints=shapes, tokens_per_image=16)
    places = cache.positions("a", range(40))
    assert np.array_equal(places, cache.positions("b", range(40)))
    assert len({tuple(row) for row in places.tolist()}) == 40
    counts = np.bincount(places.ravel(), minlength=64)
    assert counts.max() < 25 and counts.min() > 0  # each of 64 tokens 10 times on average
    assert np.array_equal(cache.positions("c", [7]), [range(16)])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(10, 30), batch_size=st.integers(5, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3),
    memory=st.sampled_from([0, 300, 2**20]), width=st.sampled_from([3, 9, 17]),
)  # fmt: skip
def test_an_epoch_holds_every_training_token_once_in_an_order_of_its_own(
    tmp_path_factory, n, batch_size, seed, epoch, memory, width, monkeypatch
):
    recipe = made_up_recipe(n, dtype="float32", hookpoints={"a": [2, width, 4], "b": [2, width, 3]})
    grid = np.arange(n * 2 * width, dtype=np.float32).reshape(n, 1, 2 * width, 1)
    updates = {"a": np.broadcast_to(grid, (*grid.shape[:3], 4)), "b": np.broadcast_to(-grid, (*grid.shape[:3], 3))}
    cache = ActivationCache(write_cache(tmp_path_factory.mktemp("cache"), recipe, updates))

    def read(e):
        batches = list(cache.batches(["a", "b"], batch_size, seed=seed, epoch=e, memory=memory))
        for batch in batches:
            assert torch.equal(batch["a"][:, :3], -batch["b"])  # the same places for both
        return [batch["a"][:, 0].int().tolist() for batch in batches]

    parts = read(epoch)
    expected = sorted(int(t) for image in cache.images("train") for t in grid[image, 0, :, 0])
    assert sorted(sum(parts, [])) == expected
    assert all(len(part) == batch_size for part in parts[:-1])
    assert parts == read(epoch)
    if len(expected) > 100:
        assert sum(parts, []) != expected
        assert parts != read(epoch + 1)


def test_a_batch_mixes_many_images_as_independent_draws_would(tmp_path):
    n, tokens = 300, 64
    recipe = made_up_recipe(n, dtype="float32", hookpoints={"a": [8, 8, 1]}, images_per_shard=16)
    images = np.random.default_rng(0).normal(size=(n, 1, 1, 1)).astype(np.float32)
    cache = ActivationCache(write_cache(tmp_path, recipe, {"a": np.broadcast_to(images, (n, 1, tokens, 1))}))

    def design_effect(memory):
        batches = [batch["a"] for batch in cache.batches(["a"], 256, memory=memory)][:-1]
        total, values = cache.n_tokens("a", "train"), torch.from_numpy(images[cache.images("train"), 0, 0, 0])
        independent = values.var() / 256 * (1 - 256 / total)
        return float(torch.stack([batch.mean() for batch in batches]).var() / independent)

    assert design_effect(2**30) < 1.6  # the whole epoch in the buffer; 60 batches, so it scatters by 18 %
    assert design_effect(0) > 2  # no buffer but the batch: strips show


def test_batches_of_two_grids_are_refused(tmp_path):
    cache, _ = a_cache(tmp_path)
    with pytest.raises(HookpointError, match="one grid, not down.2.1 2×3, mid.0 1×2. Call it for each"):
        next(cache.batches(cache.hookpoints, 4))


def test_a_sample_is_distinct_training_tokens_from_all_over(tmp_path):
    recipe = made_up_recipe(60, dtype="float32", images_per_shard=9, hookpoints={"a": [2, 3, 4]})
    grid = np.arange(60 * 6, dtype=np.float32).reshape(60, 1, 6, 1)
    cache = ActivationCache(write_cache(tmp_path, recipe, {"a": np.broadcast_to(grid, (60, 1, 6, 4))}))
    train = len(cache.images("train"))
    for n in (5, train, 3 * train, 10_000):
        tokens = cache.sample("a", n)[:, 0].int().numpy()
        assert len(np.unique(tokens)) == len(tokens) == min(n, train * 6)
        assert set(tokens // 6) <= set(cache.images("train").tolist())
    assert len(np.unique(cache.sample("a", train)[:, 0].int().numpy() // 6)) == train


def test_it_is_sliced_like_a_dataset_of_h5py(tmp_path):
    cache, updates = a_cache(tmp_path, steps=[0, 1])
    a, view = updates["mid.0"], cache["mid.0"]
    assert (view.shape, view.dtype, len(view)) == ((12, 2, 2, 5), torch.float16, 12)
    for key in (3, -1, slice(2, 9, 3), [5, 1], ..., (4, 1), (slice(3), 0), (..., 2), (slice(None), 1, slice(1, 2))):
        assert np.array_equal(view[key].numpy(), a[key])
    assert np.array_equal(torch.stack(list(view)).numpy(), a)
    assert repr(view).startswith("Updates of mid.0, (12, 2, 2, 5) of float16, in test-")
    assert list(cache) == ["down.2.1", "mid.0"] and "mid.0" in cache and "mid.1" not in cache
    with pytest.raises(IndexError):
        view[12]
    with pytest.raises(HookpointError, match="Did you mean 'mid.0'"):
        cache["mid.1"]


def test_settings_that_cannot_be_are_refused_at_once(tmp_path, unchecked_types):
    cache, _ = a_cache(tmp_path)
    assert torch.equal(next(cache.batches("mid.0", 4))["mid.0"], next(cache.batches(["mid.0"], 4))["mid.0"])
    for wrong in ({"batch_size": 0}, {"batch_size": 2.5}, {"batch_size": 4, "seed": -5}):
        with pytest.raises(KitError, match="must be an integer of at least"):
            cache.batches(["mid.0"], **wrong)
    assert cache.positions("mid.0", []).shape == (0, 2)
    with pytest.raises(HookpointError, match="has no updates of 'mid.1'"):
        cache.positions("mid.1", [0])
    with pytest.raises(ArtifactError, match="has no image 999; it has 12 of 12, counted"):
        cache.positions("mid.0", [999])
    unfinished = write_cache(tmp_path / "none", made_up_recipe(4), made_up_updates(made_up_recipe(4)), stop_after=0)
    with pytest.raises(KitError, match="has no training images to sample from"):
        ActivationCache.open(unfinished.folder, unfinished=True).sample("mid.0", 5)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_read_correct_rows(tmp_path, context):
    cache, updates = a_cache(tmp_path, 13)
    cache.read("mid.0", [0])  # this process already holds a file open
    loader = DataLoader(
        cache["mid.0"], batch_size=3, num_workers=2, multiprocessing_context=multiprocessing.get_context(context)
    )
    assert np.array_equal(torch.cat(list(loader)).numpy(), updates["mid.0"])
    assert np.array_equal(cache["mid.0"][:].numpy(), updates["mid.0"])


def test_a_forked_child_reads_with_handles_of_its_own(tmp_path):
    cache, updates = a_cache(tmp_path)
    cache.read("mid.0", [0])
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(cache.read("mid.0", range(12)).numpy(), updates["mid.0"]) else 1)
    assert np.array_equal(cache.read("mid.0", range(12)).numpy(), updates["mid.0"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.cache._OPEN_FILES", 2)
    cache, updates = a_cache(tmp_path, 7, images_per_shard=1)
    assert np.array_equal(cache.read("mid.0", range(7)).numpy(), updates["mid.0"])
    assert len(cache._open) == 2
    assert sum(len(batch["mid.0"]) for batch in cache.batches(["mid.0"], 3)) == cache.n_tokens("mid.0", "train")
    assert len(cache._open) == 2


def test_plain_h5py_reads_all_shards_as_one_from_anywhere(tmp_path):
    cache, updates = a_cache(tmp_path, 11, steps=[0, 2], tokens_per_image=1)
    code = (
        "import h5py, sys, numpy as np\n"
        "f = h5py.File(sys.argv[1])\n"
        "np.save(sys.argv[2], f['updates/down.2.1'][:])\n"
        "np.save(sys.argv[3], f['tokens/2x3'][:])\n"
        "print(f['rows/image'][:].tolist(), f['rows/step'][:].tolist(), f['rows/half'][:].tolist())\n"
    )
    arguments = [str(cache.artifact.folder / "all.h5"), str(tmp_path / "updates.npy"), str(tmp_path / "tokens.npy")]
    printed = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    tokens = np.load(tmp_path / "tokens.npy")
    assert np.array_equal(tokens, cache.positions("down.2.1", range(11)))
    expected = np.take_along_axis(updates["down.2.1"], tokens[:, None, :, None], axis=2)
    assert np.array_equal(np.load(tmp_path / "updates.npy"), expected.reshape(22, 1, 4))
    assert printed.strip() == f"{[i for i in range(11) for _ in range(2)]} {[0, 2] * 11} {[0] * 22}"


@pytest.mark.parametrize(
    ("kind", "size", "off"), [("thumbnails", (160, 80), 6), ("webp", (200, 100), 6), ("png", (200, 100), 0)]
)
def test_pictures_come_back_as_those_of_the_right_image(tmp_path, kind, size, off):
    pictures = [Image.new("RGB", (200, 100), (20 * i, 0, 0)) for i in range(11)]
    recipe = made_up_recipe(11, images=kind)
    cache = ActivationCache(write_cache(tmp_path, recipe, made_up_updates(recipe), pictures))
    for i in (0, 3, 4, 10):
        assert cache.image(i).size == size
        assert abs(cache.image(i).getpixel((5, 5))[0] - 20 * i) <= off
        thumbnail = Image.open(io.BytesIO(cache.thumbnail(i)))
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (160, 80))
        assert abs(thumbnail.getpixel((5, 5))[0] - 20 * i) <= 6
    with pytest.raises(ArtifactError, match="without images. Collect again with images='thumbnails'"):
        a_cache(tmp_path / "bare", 2)[0].thumbnail(0)


def test_a_reader_of_an_unfinished_cache_sees_what_is_entered_and_no_more(tmp_path):
    recipe = made_up_recipe(12)
    updates = made_up_updates(recipe)
    artifact = write_cache(tmp_path, recipe, updates, stop_after=2)
    with pytest.raises(ArtifactError, match="No finished artifact"):
        ActivationCache.open(artifact.folder)
    reader = ActivationCache.open(artifact.folder, unfinished=True)
    assert "unfinished, 8 images so far" in repr(reader)
    write_cache(tmp_path, recipe, updates)  # while it is open
    assert reader.present.tolist() == reader.images().tolist() == list(range(8))
    assert np.array_equal(reader.read("mid.0", range(8)).numpy(), updates["mid.0"][:8])
    with pytest.raises(ArtifactError, match="has no image 8; it has 8 of 12, counted from 0. Take one"):
        reader.read("mid.0", [8])
    assert ActivationCache.open(artifact.folder, unfinished=True).present.tolist() == list(range(12))


def test_steps_and_halves_have_rows_and_others_are_refused(tmp_path):
    cache, _ = a_cache(tmp_path, steps=[1, 3], halves=["uncond", "cond"])
    assert [cache.row(step, half) for step in (1, 3) for half in ("uncond", "cond")] == [0, 1, 2, 3]
    with pytest.raises(KitError, match="no step 0 of cond; it has steps 1, 3 of uncond and cond"):
        cache.row(0)


def test_it_tells_of_itself_in_text_and_html(tmp_path):
    cache, _ = a_cache(tmp_path, 12, steps=[0, 2], num_inference_steps=4, tokens_per_image=2)
    for text in (repr(cache), cache._repr_html_()):
        for fact in (
            "12 of m",
            "24, of denoising step 0, 2 in 4",
            "down.2.1 2×3×4",
            "float16",
            "2 tokens of each kept",
            "finished",
        ):
            assert fact in text
    assert "<script" not in cache._repr_html_() and "prompt 4" in cache._repr_html_()
    assert (
        "&lt;b&gt;"
        in ActivationCache(
            write_cache(tmp_path, made_up_recipe(2, model="<b>"), made_up_updates(made_up_recipe(2)))
        )._repr_html_()
    )


def test_the_worlds_prompts_are_shown_with_their_factors(small_cache):
    assert small_cache.prompts.factors[0]["background"] in small_cache._repr_html_()


def test_a_hookpoint_it_lacks_and_a_folder_without_cache_are_refused(tmp_path):
    cache, _ = a_cache(tmp_path, 2)
    with pytest.raises(
        HookpointError, match=r"has no updates of 'mid.1'; it has down.2.1, mid.0. .* Did you mean 'mid.0'"
    ):
        cache.grid("mid.1")
    for unfinished in (False, True):
        with pytest.raises(ArtifactError, match="No finished artifact|holds no recipe|cannot be read"):
            ActivationCache.open(tmp_path / "nowhere", unfinished=unfinished)


def test_the_manifest_says_which_images_are_in_which_shard(tmp_path):
    cache, _ = a_cache(tmp_path, 11)
    assert [(s.file, s.first_image, s.images) for s in read_manifest(cache.artifact.folder, cache.layout)] == [
        ("shard-00000.h5", 0, 4), ("shard-00001.h5", 4, 4), ("shard-00002.h5", 8, 3),
    ]  # fmt: skip
    assert cache.artifact.stamp["facts"] == {"images": 11}

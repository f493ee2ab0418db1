"""Shards: what is damaged is found, named and mended; what is hostile is refused; the rest is bit-identical."""

import json
import random
import shutil
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from caches import a_batch, a_cache, made_up_prompts, made_up_recipe, made_up_updates, rewrite_stamp, write_cache
from PIL import Image

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.cache import ActivationCache, verify
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import sha256
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.shards import ShardWriter, examine, keep_only, read_manifest


def content(folder):
    """Every file of a cache but for the stamp's time."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    stamp = json.loads(files.pop("stamp.json"))
    return files | {"digest": stamp["digest"]}


def test_half_made_shards_and_torn_lines_are_forgotten_and_the_rest_ends_bit_identical(tmp_path):
    recipe = made_up_recipe(12)
    updates = made_up_updates(recipe)
    whole = write_cache(tmp_path / "whole", recipe, updates)
    artifact = write_cache(tmp_path / "broken", recipe, updates, stop_after=2)
    (artifact.folder / "shard-00002.h5.tmp").write_bytes(b"half")
    (artifact.folder / "shard-00002.h5").write_bytes(b"never entered")
    with open(artifact.folder / "manifest.jsonl", "ab") as manifest:
        manifest.write(b'{"file":"shard-00002.h5","first_im')
    resumed = write_cache(tmp_path / "broken", recipe, updates)
    assert content(resumed.folder) == content(whole.folder)


@pytest.mark.parametrize("torn", [b"", b'{"file":"shard-00001.h5","first_im'])
def test_a_line_that_a_dead_neighbour_left_torn_does_not_spoil_the_next(tmp_path, torn):
    recipe = made_up_recipe(12)
    updates = made_up_updates(recipe)
    artifact = write_cache(tmp_path, recipe, updates, stop_after=0)
    writer = ShardWriter(artifact, made_up_prompts(12))
    first, second, third = writer.missing()
    for shard in (third, first):  # in any order
        writer.write(shard, [a_batch(recipe, updates, range(shard.first_image, shard.stop))])
        with open(artifact.folder / "manifest.jsonl", "ab") as manifest:
            manifest.write(torn)
    assert [shard.file for shard in writer.shards()] == [first.file, third.file]
    assert writer.missing() == [second]


def test_shards_written_by_several_processes_at_once_are_all_entered(tmp_path):
    code = """
        import sys
        from caches import a_batch, made_up_prompts, made_up_recipe, made_up_updates
        from sdxl_sae_kit.artifacts import Store
        from sdxl_sae_kit.shards import ShardWriter
        recipe = made_up_recipe(60, images_per_shard=1)
        updates = made_up_updates(recipe)
        writer = ShardWriter(Store.at(sys.argv[1]).artifact("activations", "test", recipe), made_up_prompts(60))
        for shard in [s for s in writer.missing() if s.first_image % 3 == int(sys.argv[2])]:
            writer.write(shard, [a_batch(recipe, updates, range(shard.first_image, shard.stop))])
    """
    recipe = made_up_recipe(60, images_per_shard=1)
    updates = made_up_updates(recipe)
    artifact = write_cache(tmp_path / "shared", recipe, updates, stop_after=0)
    run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "shared")]
    writers = [subprocess.Popen([*run, str(i)], cwd="tests") for i in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert len(read_manifest(artifact.folder, Layout.of(recipe))) == 60
    finished = write_cache(tmp_path / "shared", recipe, updates)
    assert content(finished.folder) == content(write_cache(tmp_path / "alone", recipe, updates).folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [lines[0], lines[0], *lines[1:]],
        lambda lines: [lines[0].replace('"images":4', '"images":5'), *lines[1:]],
        lambda lines: [lines[0].replace("shard-00000.h5", "../shard-00000.h5"), *lines[1:]],
        lambda lines: [lines[0].replace("shard-00000.h5", "/etc/passwd"), *lines[1:]],
        lambda lines: ["[]", *lines[1:]],
        lambda lines: ["[" * 10_000, *lines[1:]],
        lambda lines: [lines[0].replace('"first_image":0', '"first_image":1e9'), *lines[1:]],
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    cache, _ = a_cache(tmp_path)
    manifest = cache.artifact.folder / "manifest.jsonl"
    manifest.write_text("\n".join(edit(manifest.read_text().splitlines())) + "\n")
    with pytest.raises(ArtifactError, match=r"Line \d of .* was changed .* Mend it with repair"):
        read_manifest(cache.artifact.folder, cache.layout)
    with pytest.raises(ArtifactError, match=r"Line \d of .* was changed|manifest.jsonl is missing or has changed"):
        ActivationCache.open(cache.artifact.folder)


def flip(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def swap(one, other):
    kept = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(kept)


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "shard-00001.h5"), {"shard-00001.h5 has changed": range(4, 8)}),
    "a cut shard": (
        lambda f: (f / "shard-00002.h5").write_bytes((f / "shard-00002.h5").read_bytes()[:-7]),
        {"shard-00002.h5 has changed": range(8, 12)},
    ),
    "a lost shard": (lambda f: (f / "shard-00000.h5").unlink(), {"shard-00000.h5 is missing": range(0, 4)}),
    "swapped shards": (
        lambda f: swap(f / "shard-00000.h5", f / "shard-00001.h5"),
        {"shard-00000.h5 has changed": range(0, 4), "shard-00001.h5 has changed": range(4, 8)},
    ),
    "a torn manifest": (
        lambda f: (f / "manifest.jsonl").write_bytes((f / "manifest.jsonl").read_bytes()[:-9]),
        {"manifest.jsonl has changed": range(0)},
    ),
    "an edited manifest": (lambda f: flip(f / "manifest.jsonl"), {"manifest.jsonl has changed": range(0)}),
    "a lost manifest": (lambda f: (f / "manifest.jsonl").unlink(), {"manifest.jsonl is missing": range(0)}),
    "other prompts": (lambda f: flip(f / "prompts.jsonl"), {"prompts.jsonl has changed": range(12)}),
    "a damaged stamp": (lambda f: flip(f / "stamp.json"), {"stamp.json is not as it was written": range(0)}),
    "a damaged recipe": (lambda f: flip(f / "recipe.json"), {"recipe.json has changed": range(0)}),
    "a damaged all.h5": (lambda f: flip(f / "all.h5"), {"all.h5 has changed": range(0)}),
    "a stranger": (
        lambda f: (f / "notes.txt").write_text("x"),
        {"notes.txt does not belong to it: move": range(0)},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_is_found_with_the_images_it_affects_and_what_is_good_is_kept(tmp_path, damage):
    cache, updates = a_cache(tmp_path)
    folder = cache.artifact.folder
    before = content(folder)
    do, expected = DAMAGE[damage]
    do(folder)
    found = examine(Artifact(folder))
    assert {
        fault.what[: len(what)]: fault.images for fault, what in zip(found.faults, expected, strict=True)
    } == expected
    with pytest.raises(ArtifactError, match="Mend it with repair") as error:
        cache.verify()
    for images in expected.values():
        assert (f"images {images[0]} to {images[-1]}" if images else "no image is lost") in str(error.value)
    if damage != "a stranger":
        bad = {image for fault in found.faults for image in fault.images if "shard" in fault.what}
        assert {i for shard in found.good for i in range(shard.first_image, shard.stop)} == set(range(12)) - bad
        artifact = Artifact(folder, found.recipe)
        with artifact.lock():
            keep_only(artifact, found.good)
        write_cache(tmp_path, made_up_recipe(12), updates)
        assert content(folder) == before


def test_swapped_shards_are_not_taken_for_each_other(tmp_path):
    cache, _ = a_cache(tmp_path)
    swap(cache.artifact.folder / "shard-00000.h5", cache.artifact.folder / "shard-00001.h5")
    with pytest.raises(ArtifactError, match="shard-00000.h5 is not what collect writes .* are those of other images"):
        ActivationCache.open(cache.artifact.folder).read("mid.0", [0])


def test_a_chunk_that_was_lost_whole_is_noticed_although_its_checksum_is_right(tmp_path):
    cache, _ = a_cache(tmp_path)
    path = cache.artifact.folder / "shard-00000.h5"
    with h5py.File(path) as file:
        chunk = file["updates/mid.0"].id.get_chunk_info(2)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)  # as a file system leaves it
    path.write_bytes(data)
    for read in (lambda c: c.read("mid.0", [2]), lambda c: list(c.batches(["mid.0"], 4, split="all"))):
        with pytest.raises(ArtifactError, match="shard-00000.h5 of .* has changed since it was written"):
            read(ActivationCache.open(cache.artifact.folder))


def test_a_lost_chunk_is_noticed_even_where_its_strips_are_cut_for_another_hookpoint(tmp_path):
    shapes = {"a": [8, 8, 640], "b": [8, 8, 2560]}  # chunks of 64 and of 16 tokens
    cache, _ = a_cache(tmp_path, 4, hookpoints=shapes)
    assert (cache.layout.strip("a"), cache.layout.strip("b")) == (64, 16)
    path = cache.artifact.folder / "shard-00000.h5"
    with h5py.File(path) as file:
        chunk = file["updates/b"].id.get_chunk_info(1)  # not the first of its row
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        list(ActivationCache.open(cache.artifact.folder).batches(["a", "b"], 64, split="all"))


def test_zeros_that_were_measured_are_read(tmp_path):
    recipe = made_up_recipe(12)
    updates = {h: np.zeros_like(a) for h, a in made_up_updates(recipe).items()}
    cache = ActivationCache(write_cache(tmp_path, recipe, updates))
    assert not cache.read("mid.0", range(12)).any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda stamp: stamp.update(digest="0" * 64), "stamp.json is not as it was written|digest"),
        (lambda stamp: stamp["files"].pop("all.h5"), "the stamp lists other files than such a cache has"),
        (lambda stamp: stamp["recipe"].update(guidance_scale=9.0), "the recipe is not the one that named the folder"),
    ],
)
def test_an_edited_stamp_that_checks_out_is_found(tmp_path, change, complaint):
    cache, _ = a_cache(tmp_path)
    rewrite_stamp(cache.artifact.folder, change, digest="digest" not in complaint)
    with pytest.raises(ArtifactError, match=complaint):
        cache.verify()


def test_links_in_a_folder_are_not_written_through(tmp_path):
    recipe = made_up_recipe(12)
    artifact = write_cache(tmp_path, recipe, made_up_updates(recipe), stop_after=1)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("manifest.jsonl.tmp", ".lock", "shard-00001.h5"):
        (artifact.folder / name).unlink(missing_ok=True)
        (artifact.folder / name).symlink_to(victim)
        with pytest.raises(ArtifactError, match=rf"holds links \({name}\). Remove them"):
            write_cache(tmp_path, recipe, made_up_updates(recipe))
        (artifact.folder / name).unlink()
    assert victim.read_text() == "mine"


def test_what_others_leave_in_the_folder_is_no_part_of_it(tmp_path):
    recipe = made_up_recipe(12)
    updates = made_up_updates(recipe)
    whole = write_cache(tmp_path / "whole", recipe, updates)
    artifact = write_cache(tmp_path / "other", recipe, updates, stop_after=1)
    (artifact.folder / ".ipynb_checkpoints").mkdir()
    (artifact.folder / ".DS_Store").write_text("x")
    (artifact.folder / "shard-notes.txt").write_text("mine")
    finished = write_cache(tmp_path / "other", recipe, updates)
    assert finished.digest == whole.digest
    assert (artifact.folder / "shard-notes.txt").read_text() == "mine"


def test_a_recipe_that_is_not_the_folders_is_found(tmp_path):
    cache, _ = a_cache(tmp_path)
    folder = cache.artifact.folder
    rewrite_stamp(folder, lambda stamp: stamp["recipe"].update(model="another"))
    with pytest.raises(ArtifactError, match="recipe"):
        ActivationCache.open(folder).read("mid.0", [0])  # the shards say that they belong to another
    with pytest.raises(ArtifactError, match=r"the recipe is not the one that named the folder \(images 0 to 11\)"):
        cache.verify()


# Hostile files ------------------------------------------------------------------------------------------------------


def edit_shard(folder, change):
    """Change the first shard with h5py, and have manifest and stamp agree with it, as a stranger would."""
    path = folder / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file, folder)
    agree(folder, path)


def agree(folder, path):
    digest = sha256(path.read_bytes())
    layout = Layout.of(json.loads((folder / "stamp.json").read_text())["recipe"])
    shards = read_manifest(folder, layout)
    lines = [
        type(s)(s.file, s.first_image, s.images, digest if s.file == path.name else s.sha256).line() for s in shards
    ]
    (folder / "manifest.jsonl").write_bytes(b"".join(lines))

    def change(stamp):
        for file in (path, folder / "manifest.jsonl"):
            stamp["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes())}

    rewrite_stamp(folder, change)


def replaced(make):
    """Replace the updates of one hookpoint with what `make` creates in their place."""

    def change(file, folder):
        old = file["updates/mid.0"]
        shape, dtype, data = old.shape, old.dtype, old[()]
        del file["updates/mid.0"]
        make(file, folder, shape, dtype, data)

    return change


def external_storage(file, folder, shape, dtype, _data):
    outside = folder.parent / "secret.bin"
    outside.write_bytes(b"s" * 1000)
    file.create_dataset("updates/mid.0", shape, dtype, external=[(str(outside), 0, 80)])


def virtual_source(file, folder, shape, dtype, data):
    with h5py.File(folder.parent / "secret.h5", "w") as secret:
        secret["x"] = data
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(str(folder.parent / "secret.h5"), "x", shape)
    file.create_virtual_dataset("updates/mid.0", layout)


def claims_terabytes(file, _folder, _shape, dtype, _data):
    file.create_dataset("updates/mid.0", (2**30, 2, 5), dtype, chunks=(1, 2, 5), fletcher32=True)


def never_written(file, _folder, shape, dtype, _data):
    file.create_dataset("updates/mid.0", shape, dtype, chunks=(1, 2, 5), fletcher32=True)


HOSTILE = {
    "external link, absolute": replaced(
        lambda file, folder, *_: file.__setitem__(
            "updates/mid.0", h5py.ExternalLink(str(folder / "all.h5"), "/updates/mid.0")
        )
    ),
    "external link, above": replaced(
        lambda file, *_: file.__setitem__("updates/mid.0", h5py.ExternalLink("../secret.h5", "/x"))
    ),
    "soft link": replaced(lambda file, *_: file.__setitem__("updates/mid.0", h5py.SoftLink("/updates/down.2.1"))),
    "soft link to nothing": replaced(lambda file, *_: file.__setitem__("updates/mid.0", h5py.SoftLink("/nothing"))),
    "virtual source outside": replaced(virtual_source),
    "external storage": replaced(external_storage),
    "objects": replaced(
        lambda file, _folder, shape, *_: file.create_dataset("updates/mid.0", shape, h5py.string_dtype())
    ),
    "object references": replaced(
        lambda file, _folder, shape, *_: file.create_dataset("updates/mid.0", shape, h5py.ref_dtype)
    ),
    "terabytes": replaced(claims_terabytes),
    "nothing behind a shape": replaced(never_written),
    "another dtype": replaced(
        lambda file, _f, shape, _d, data: file.create_dataset(
            "updates/mid.0", data=data.astype("f8"), chunks=(1, 2, 5), fletcher32=True
        )
    ),
    "another filter": replaced(
        lambda file, _f, shape, _d, data: file.create_dataset(
            "updates/mid.0", data=data, chunks=(1, 2, 5), compression="gzip"
        )
    ),
    "no checksums": replaced(lambda file, _f, _s, _d, data: file.create_dataset("updates/mid.0", data=data)),
    "a group in its place": replaced(lambda file, *_: file.create_group("updates/mid.0/x")),
    "a group that holds itself": lambda file, _folder: file["updates"].__setitem__("again", file["updates"]),
    "something more": lambda file, _folder: file.__setitem__("extra", [1, 2]),
    "of another cache": lambda file, _folder: file.attrs.__setitem__("recipe", "0" * 64),
    "without a recipe": lambda file, _folder: file.attrs.__delitem__("recipe"),
}  # fmt: skip


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_shard_is_refused_before_anything_is_read(tmp_path, trick, monkeypatch):
    cache, _ = a_cache(tmp_path)
    edit_shard(cache.artifact.folder, HOSTILE[trick])
    stranger = ActivationCache.open(cache.artifact.folder)  # everything about it agrees
    monkeypatch.setattr(h5py.Dataset, "read_direct", None)
    with pytest.raises(ArtifactError, match="shard-00000.h5 is not what collect writes .* Nothing was read from it"):
        stranger.read("down.2.1", [0])


@pytest.mark.parametrize("read", ["read", "batches", "sample"])
def test_six_kilobytes_that_claim_terabytes_are_refused_before_memory_is_taken(tmp_path, read):
    cache, _ = a_cache(tmp_path, 4)
    folder = cache.artifact.folder
    rewrite_stamp(folder, lambda stamp: stamp["recipe"].update(hookpoints={"mid.0": [10**6, 10**6, 1280]}))
    layout = Layout.of(json.loads((folder / "stamp.json").read_text())["recipe"])
    path = folder / "shard-00000.h5"
    with h5py.File(path, "w", libver=("v108", "v110")) as file:
        file.attrs["recipe"] = layout.recipe_hash
        for name, field in layout.fields(4).items():
            file.create_dataset(name, field.shape, field.dtype, chunks=field.chunks, fletcher32=True)
    assert path.stat().st_size < 20_000
    agree(folder, path)
    stranger = ActivationCache.open(folder)
    calls = {
        "read": lambda: stranger.read("mid.0", [0]),
        "batches": lambda: next(stranger.batches(["mid.0"], 4)),
        "sample": lambda: stranger.sample("mid.0", 4),
    }
    with pytest.raises(ArtifactError, match="shard-00000.h5 .* claims .* chunks, .* bytes, and has 0 chunks"):
        calls[read]()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(hookpoints={"../x": [1, 2, 3]}),
        lambda r: r.update(hookpoints={"x": [1, 2, "3"]}),
        lambda r: r.update(hookpoints=[1]),
        lambda r: r.update(steps=[1, 0]),
        lambda r: r.update(halves=["both"]),
        lambda r: r.update(dtype="object"),
        lambda r: r.update(n_images=-1),
        lambda r: r.update(revision=None),
        lambda r: r.pop("guidance_scale"),
        lambda r: r.update(images_per_shard=True),
        lambda r: r.pop("tokens_per_image"),
        lambda r: r.update(images="gif"),
        lambda r: r.pop("prompts"),
    ],
)
def test_a_recipe_that_collect_cannot_have_written_is_refused(tmp_path, change):
    cache, _ = a_cache(tmp_path)
    rewrite_stamp(cache.artifact.folder, lambda stamp: change(stamp["recipe"]))
    with pytest.raises(ArtifactError, match="no recipe of an activation cache: .* cannot be as"):
        ActivationCache.open(cache.artifact.folder)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "x" * 300, "a\0b"])
def test_names_that_lead_elsewhere_in_a_stamp_are_refused(tmp_path, name):
    cache, _ = a_cache(tmp_path)
    (tmp_path / "secret").write_text("x")
    rewrite_stamp(
        cache.artifact.folder, lambda stamp: stamp["files"].update({name: {"bytes": 1, "sha256": sha256(b"x")}})
    )
    with pytest.raises(ArtifactError, match="is missing or has changed"):
        ActivationCache.open(cache.artifact.folder)
    with pytest.raises(ArtifactError, match="is missing .no image is lost"):
        cache.verify()


def test_a_claim_of_endlessly_many_images_is_refused(tmp_path):
    cache, _ = a_cache(tmp_path)
    rewrite_stamp(cache.artifact.folder, lambda stamp: stamp["recipe"].update(n_images=10**15))
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        ActivationCache.open(cache.artifact.folder)
    (cache.artifact.folder / "recipe.json").unlink()
    with pytest.raises(ArtifactError, match="claims 1,000,000,000,000,000 images"):
        cache.verify()


# Fuzzing ------------------------------------------------------------------------------------------------------------


def mutate(rng, folder):
    """Harm one file in one of many ways; returns its name."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != ".lock"))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "overwrite", "cut", "grow", "zeros", "splice", "delete", "other", "swap"])
    at = rng.randrange(len(data))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        data[at : at + 16] = rng.randbytes(16)
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += rng.randbytes(rng.choice([1, 100, 5000]))
    elif kind == "zeros":
        data[at : at + 512] = bytes(min(512, len(data) - at))
    elif kind == "splice":
        data[at:at] = data[: rng.randrange(len(data))]
    elif kind == "other":
        data = rng.choice(sorted(p for p in folder.iterdir() if p.name != ".lock")).read_bytes()
    if kind == "swap":
        swap(*rng.sample(sorted(folder.glob("shard-*")), 2))
        return "shard-00000.h5"
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    return path.name


@pytest.mark.parametrize("pictured", [True, False])
def test_500_fuzzed_caches_give_a_typed_error_or_correct_data(tmp_path, pictured):
    recipe = made_up_recipe(12, images="thumbnails" if pictured else None, tokens_per_image=2 if pictured else None)
    updates = made_up_updates(recipe)
    pictures = [Image.new("RGB", (64, 64), (20 * i, 0, 0)) for i in range(12)]
    original = ActivationCache(write_cache(tmp_path, recipe, updates, pictures))
    folder = original.artifact.folder
    expected = {h: original.read(h, range(12)).numpy() for h in original.hookpoints}
    tokens = {h: np.sort(np.concatenate([b[h] for b in original.batches([h], 5)]), axis=0) for h in original.hookpoints}
    thumbnails = [original.thumbnail(i) for i in range(12)] if pictured else []
    before = content(folder)
    rng, refused, served = random.Random(pictured), 0, 0
    for number in range(250):
        copy = tmp_path / str(number) / "activations" / folder.name
        shutil.copytree(folder, copy)
        harmed = mutate(rng, copy)
        same = all(
            path.name in ("stamp.json", ".lock") or path.read_bytes() == before[path.name] for path in copy.iterdir()
        )
        same &= len(list(copy.iterdir())) == len(list(folder.iterdir()))
        try:
            cache = ActivationCache.open(copy)
            assert cache.prompts == original.prompts and cache.recipe == original.recipe
            for hookpoint in cache.hookpoints:
                assert np.array_equal(cache.read(hookpoint, range(12)).numpy(), expected[hookpoint]), number
                batches = np.concatenate([batch[hookpoint] for batch in cache.batches([hookpoint], 5)])
                assert np.array_equal(np.sort(batches, axis=0), tokens[hookpoint]), number
            assert [cache.thumbnail(i) for i in range(12 if pictured else 0)] == thumbnails
            served += 1
        except KitError:
            refused += 1
        try:
            verify(Artifact(copy))
            assert same or harmed == "stamp.json", number
        except KitError:
            pass
        shutil.rmtree(tmp_path / str(number))
    assert refused > 150 and served > 10  # unused bytes, and what the kit does not read, may be harmed


def test_a_layout_forecasts_its_bytes(tmp_path):
    for settings in ({}, {"tokens_per_image": 32}, {"dtype": "float32", "steps": [0, 1]}):
        recipe = made_up_recipe(320, hookpoints={"a": [16, 16, 96], "b": [8, 8, 96]}, images_per_shard=64, **settings)
        artifact = write_cache(tmp_path, recipe, made_up_updates(recipe))
        assert Layout.of(recipe).nbytes(64) * 5 == pytest.approx(artifact.nbytes, rel=0.05)

"""Collect updates: run a pipeline over prompts and keep what chosen hookpoints add, resumably."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sdxl_sae_kit.amounts import human_bytes
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.observation import as_prompts, make_recipe, observing
from sdxl_sae_kit.pipelines import count_long, describe, scheduler
from sdxl_sae_kit.plans import plan_recipe
from sdxl_sae_kit.processes import Processes, find_processes
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.shards import Shard, ShardWriter, examine, keep_only, read_prompts, read_recipe
from sdxl_sae_kit.stamps import name_hash

_MUCH_MEMORY = 2**30


@checked
def collect(
    pipe: Any,
    prompts: Prompts | Iterable[str],
    hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: Sequence[int] | int | None = None,
    half: str | None = None,
    tokens_per_image: int | None = None,
    batch_size: int = 32,
    images: str | None = "thumbnails",
    dtype: torch.dtype | str = "float16",
    store: Store | Path | str | None = None,
) -> ActivationCache:
    """Make an image of every prompt and cache the updates of `hookpoints`; returns at once what was collected before.

    Killed at any moment, it goes on where it was when called again, and ends bit-identical. Under `accelerate launch`
    or `torchrun` the processes, each of which must call it, share the images; what comes out does not depend on how
    many there are.

    Args:
        pipe: from `load_pipeline`, or any SDXL pipeline of diffusers.
        prompts: from `load_prompts`, or texts (the i-th gets seed i).
        hookpoints: short names or module paths, or one of them.
        num_inference_steps, guidance_scale: by default the model's preset; guidance of at most 1 is none.
        height, width: of the images in pixels, multiples of 8; by default the model's preset.
        steps: which denoising steps to keep, from 0, or one of them; by default all.
        half: with guidance, "cond" or "uncond"; by default both.
        tokens_per_image: keep so many tokens of every grid, drawn at random for each image; by default all. Enough for
            training at a fraction of the bytes, but heat maps need whole grids.
        batch_size: images at once. What is computed depends on it in the last digits, so that another one makes
            another cache. Files hold at most 128 images, or one batch; what is lost when it is interrupted is the one
            in the making and, if it is killed, the one being written.
        images: keep "thumbnails" (small WebP) for galleries, whole pictures as "webp" or "png", or None: then the
            U-Net stops after the last hookpoint and no image is decoded, which is faster.
        dtype: how numbers are stored: float16, bfloat16 or float32.
        store: folder of artifacts.

    Raises:
        HookpointError: unknown hookpoint.
        PromptError: no prompts, or some that cannot be read.
        ArtifactError: another process is collecting the same, or the disk is too small.
        KitError: an impossible setting, or an update that does not fit into `dtype`.

    >>> cache = collect(pipe, load_prompts("world", 500), ["up.0.1"])               # doctest: +SKIP
    >>> cache["up.0.1"].shape                                                       # doctest: +SKIP
    (500, 1, 64, 96)
    """
    prompts = as_prompts(prompts)
    recipe = make_recipe(
        pipe,
        prompts,
        hookpoints,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        steps=steps,
        half=half,
        tokens_per_image=tokens_per_image,
        batch_size=batch_size,
        images=images,
        dtype=dtype,
    )
    readable = f"{Path(recipe['model']).name}_{recipe['num_inference_steps']}step_{len(prompts)}images"
    artifact = Store.at(store).artifact("activations", readable, recipe)
    processes = find_processes()
    if processes.count > 1 or not artifact.finished:
        writer = ShardWriter(artifact, prompts)
        _complete(pipe, artifact.folder, processes, lambda: None if artifact.finished else writer.prepare())
    return ActivationCache(artifact)


@checked
def repair(
    pipe: Any, cache: ActivationCache | Path | str, *, prompts: Prompts | Iterable[str] | None = None
) -> ActivationCache:
    """Collect again what is damaged in a cache (whole shards) or missing, and keep all that is good.

    Args:
        pipe: the pipeline it was collected with.
        cache: the cache or its folder.
        prompts: those it was collected from; needed only if they are damaged too.

    Raises:
        ArtifactError: there is no such folder, its recipe or prompts are lost, other prompts are given, or files lie in
            it that do not belong there.
        KitError: the pipeline is another one.

    >>> repair(pipe, "artifacts/activations/tiny-turbo_1step_500images-1a2b3c4d")   # doctest: +SKIP
    """
    folder = cache.artifact.folder if isinstance(cache, ActivationCache) else Path(cache).expanduser().resolve()
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}. Pass a cache, or the path of its folder.")
    _complete(pipe, folder, find_processes(), lambda: _keep_good(pipe, folder, prompts))
    return ActivationCache.open(folder)


def _keep_good(pipe: Any, folder: Path, prompts: Prompts | Iterable[str] | None) -> None:
    """Make a damaged cache an unfinished one that holds what is good; hold its lock."""
    found = examine(Artifact(folder))
    artifact = Artifact(folder, found.recipe)
    _check_same(pipe, found.recipe, artifact)
    if not found.faults:
        return
    if found.foreign:
        raise ArtifactError(
            f"{folder} holds {', '.join(found.foreign)}, which is not of this cache. Move it elsewhere first."
        )
    try:
        given = read_prompts(artifact, Layout.of(found.recipe)) if prompts is None else as_prompts(prompts)
    except ArtifactError:
        raise ArtifactError(
            f"The prompts of {artifact.name} are damaged. Pass those it was collected from: repair(…, prompts=…)."
        ) from None
    if given.digest != found.recipe["prompts"]:
        raise ArtifactError(f"{artifact.name} was collected from other prompts than these. Pass the same.")
    for fault in found.faults:
        tqdm.write(f"Repairing {artifact.name}: {fault}")
    keep_only(artifact, found.good)
    ShardWriter(artifact, given).prepare()


def _check_same(pipe: Any, recipe: Mapping[str, Any], artifact: Artifact) -> None:
    """Refuse to mix what two models, or two settings of one, make."""
    if not artifact.name.endswith(name_hash(recipe)):
        raise ArtifactError(
            f"The recipe in {artifact.folder} is not the one that named the folder. Give it back its name, which ends "
            f"in -{name_hash(recipe)}, or collect again."
        )
    model = describe(pipe)
    here = {"model": model.name, "revision": model.revision, "scheduler": scheduler(pipe)}
    here["compute_dtype"] = str(pipe.unet.dtype).removeprefix("torch.")
    if other := [f"{key} {recipe[key]}, not {value}" for key, value in here.items() if recipe[key] != value]:
        raise KitError(f"{artifact.name} was collected with {'; '.join(other)}. Load that pipeline to repair it.")


def _complete(pipe: Any, folder: Path, processes: Processes, prepare: Callable[[], None]) -> None:
    """Write the shards that are missing once the first process has prepared the folder, each process its share."""
    with processes.hold(Artifact(folder), prepare):
        if Artifact(folder).finished:  # by others, while this one waited; or nothing was wrong with it
            return
        artifact = Artifact(folder, read_recipe(Artifact(folder)))
        writer = ShardWriter(artifact, read_prompts(artifact, Layout.of(artifact.recipe)))
        missing = writer.missing()
        n_done = len(writer.prompts) - sum(shard.images for shard in missing)
        facts = _announce(pipe, writer, n_done, processes) if processes.first else {}
        size, at, count = writer.layout.images_per_shard, processes.index, processes.count
        # by number, not by place in the list: others' shards may be entered while this one lists
        mine = [shard for shard in missing if shard.first_image // size % count == at]
        try:
            _write(pipe, writer, mine, processes, n_done)
        except BaseException:
            kept = sum(shard.images for shard in writer.shards())
            tqdm.write(
                f"Stopped; {kept:,} of {len(writer.prompts):,} images are kept, and the same call goes on there."
            )
            raise
        processes.wait()
        if processes.first:
            writer.finish(facts)
        processes.wait()


def _write(pipe: Any, writer: ShardWriter, shards: Sequence[Shard], processes: Processes, n_done: int) -> None:
    """Make the images of these shards; while one is made, the one before is written."""
    recipe, n_images = writer.artifact.recipe, sum(shard.images for shard in shards)
    bar = tqdm(total=n_done + n_images, initial=n_done, desc="collect", unit="image", disable=not processes.first)
    with bar, ThreadPoolExecutor(1) as background, observing(pipe, writer.prompts, recipe) as observe:
        writing: Future[None] | None = None
        for shard in shards:
            batches = []
            for start in range(shard.first_image, shard.stop, recipe["batch_size"]):
                images = range(start, min(start + recipe["batch_size"], shard.stop))
                batches.append(observe(images))
                bar.update(len(images))
            if writing is not None:
                writing.result()
            writing = background.submit(writer.write, shard, batches)
        if writing is not None:
            writing.result()


def _announce(pipe: Any, writer: ShardWriter, n_done: int, processes: Processes) -> dict[str, int]:
    """Say what it will cost before it starts, and refuse what does not fit; returns what is worth noting of prompts."""
    prompts, artifact = writer.prompts, writer.artifact
    n, recipe = len(prompts), artifact.recipe
    plan = plan_recipe(recipe, n, artifact.folder)
    plan.check_space(1 - n_done / n)
    there = f" {n_done:,} of the images are there already." if n_done else ""
    together = f" {processes.count} processes share it." if processes.count > 1 else ""
    tqdm.write(f"Collecting {plan}, as {artifact.name}.{there}{together}")
    held = min(n, recipe["images_per_shard"]) * plan.nbytes / n
    if held > _MUCH_MEMORY:
        tqdm.write(
            f"About {human_bytes(3 * held)} of memory are needed, for {min(n, recipe['images_per_shard'])} images at "
            "once; a smaller batch_size needs less."
        )
    facts = {"prompts cut": count_long(pipe, prompts.texts), "prompts repeated": prompts.n_repeated}
    if long := facts["prompts cut"]:
        most = pipe.tokenizer.model_max_length
        longer = "is longer" if long == 1 else "are longer"
        tqdm.write(f"{long:,} of {n:,} prompts {longer} than the {most} tokens this model reads: cut there.")
    if repeated := facts["prompts repeated"]:
        tqdm.write(f"{repeated:,} of {n:,} prompts repeat an earlier one, each with its own seed.")
    return facts

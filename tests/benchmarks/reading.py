"""What reading shuffled training batches costs, and how well they are mixed.

python tests/benchmarks/reading.py               # SDXL-shaped data, one thread, about 3 GB of disk, a few minutes

Measured on made-up updates of SDXL's shape in float16, whose tokens within an image correlate by 0.2:

* CPU time per batch, beside a loader of tensor files in a tar archive (output and update of each image in float32,
  channels first, as released collectors write them; a buffer of whole images that is permuted as a whole whenever half
  of it is used), and beside a step of the trainer on such a batch;
* design effect: variance of a batch's mean along random directions, over that of independent draws (1 is perfect);
* correlation of neighbours in a batch, beside that in the order of the file.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.learning import Learner
from sdxl_sae_kit.metrics import neighbour_correlation
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.shards import ShardWriter

SIDE, D_IN, BATCH = 16, 1280, 4096
HOOKPOINT = "up.0.1"


def updates(images: range) -> np.ndarray:
    """Made-up updates (image, 1, token, d_in), each image with something of its own in all its tokens."""
    rng = np.random.default_rng(images.start)
    noise = rng.standard_normal((len(images), 1, SIDE * SIDE, D_IN), np.float32)
    return (noise + 0.5 * rng.standard_normal((len(images), 1, 1, D_IN), np.float32)).astype(np.float16)


def write_cache(folder: Path, n: int) -> ActivationCache:
    """The kit's cache of n images."""
    prompts = load_prompts([f"prompt {i}" for i in range(n)])
    recipe = {
        "model": "made up", "revision": "", "scheduler": "", "compute_dtype": "", "prompts": prompts.digest,
        "n_images": n, "num_inference_steps": 1, "guidance_scale": 0.0, "steps": [0], "halves": ["cond"],
        "height": 512, "width": 512, "batch_size": 64,
        "hookpoints": {HOOKPOINT: [SIDE, SIDE, D_IN]}, "tokens_per_image": None, "dtype": "float16", "images": None,
        "images_per_shard": 64,
    }  # fmt: skip
    artifact = Store.at(folder).artifact("activations", "made-up", recipe)
    writer = ShardWriter(artifact, prompts)
    with artifact.lock():
        writer.prepare()
        for shard in writer.missing():
            writer.write(shard, [({HOOKPOINT: updates(range(shard.first_image, shard.stop))}, [])])
        return ActivationCache(writer.finish({}))


def write_tar(path: Path, images: np.ndarray) -> None:
    """The training images as released collectors keep them: output and update, channels first."""
    with tarfile.open(path, "w") as archive:
        for number in images.tolist():
            update = torch.from_numpy(updates(range(number - number % 64, number - number % 64 + 64))[number % 64, 0])
            for kind in ("output", "diff"):
                buffer = io.BytesIO()
                torch.save(update.T.reshape(D_IN, SIDE, SIDE).float().clone(), buffer)
                entry = tarfile.TarInfo(f"{number}.{kind}.pth")
                entry.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(entry, buffer)


def read_tar(path: Path, buffer_images: int) -> Iterator[torch.Tensor]:
    """Batches from the tar archive: half of the buffer is filled anew and all of it permuted; the rest is dropped."""
    buffer, images = torch.empty(0, D_IN), []
    with tarfile.open(path) as archive:
        for entry in archive:
            file = archive.extractfile(entry)
            assert file is not None
            tensor = torch.load(io.BytesIO(file.read()), weights_only=True)
            if "diff" in entry.name:
                images.append(tensor)
            if (len(buffer) + len(images) * SIDE * SIDE) >= buffer_images * SIDE * SIDE:
                new = torch.stack(images).permute(0, 2, 3, 1).reshape(-1, D_IN)
                buffer, images = torch.cat([buffer, new]), []
                buffer = buffer[torch.randperm(len(buffer))]
                used = len(buffer) // 2 // BATCH * BATCH
                yield from buffer[:used].split(BATCH)
                buffer = buffer[used:]


def cpu_per_batch(batches: Iterator[object]) -> tuple[float, int, float]:
    """Milliseconds of CPU a batch, batches, seconds of wall clock."""
    started, wall, n = time.process_time(), time.perf_counter(), 0
    for _ in batches:
        n += 1
    return 1000 * (time.process_time() - started) / max(n, 1), n, time.perf_counter() - wall


def design_effect(cache: ActivationCache, memory: int) -> tuple[float, float, int]:
    """Design effect over 256 random directions, correlation of neighbours, and how many batches they come from."""
    directions = torch.randn(D_IN, 256, generator=torch.Generator().manual_seed(0))
    means, neighbours, variance = [], [], torch.zeros(256)
    for batch in cache.batches([HOOKPOINT], BATCH, memory=memory):
        x = batch[HOOKPOINT]
        if len(x) == BATCH:
            along = x @ directions
            means.append(along.mean(0))
            variance += along.var(0)
            neighbours.append(neighbour_correlation(x))
    n, total = len(means), cache.n_tokens(HOOKPOINT, "train")
    independent = variance / n / BATCH * (1 - BATCH / total)  # without replacement
    return float((torch.stack(means).var(0) / independent).mean()), statistics.fmean(neighbours), n


def step_milliseconds(cache: ActivationCache) -> float:
    """CPU of one training step of an SAE with expansion 4 and k = 10 on such a batch: the least of three."""
    site = Site("made up", "", HOOKPOINT, 1, 0.0)
    x = next(cache.batches([HOOKPOINT], BATCH))[HOOKPOINT]
    learner = Learner(SAE(SAEConfig(k=10), D_IN, site, "benchmark"), x)
    times = []
    for _ in range(3):
        started = time.process_time()
        learner.step(x)
        times.append(1000 * (time.process_time() - started))
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        cache = write_cache(folder, options.images)
        images = cache.images("train")
        write_tar(folder / "released.tar", images)
        ours, tars = [], []
        for epoch in range(options.rounds + 1):  # the first warms up
            one, n, wall = cpu_per_batch(cache.batches([HOOKPOINT], BATCH, epoch=epoch))
            other, _, _ = cpu_per_batch(read_tar(folder / "released.tar", len(images) // 2))
            if epoch:
                ours.append(one)
                tars.append(other)
                print(f"cache {one:.1f} ms of CPU a batch, {n * BATCH / wall:,.0f} tokens/s; tar {other:.1f} ms")
        ratios = [t / o for t, o in zip(tars, ours, strict=True)]
        print(f"tar / cache: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        step = step_milliseconds(cache)
        print(f"training step {step:.0f} ms of CPU; reading takes {statistics.median(ours) / step:.2%} of it")
        in_file = cache.read(HOOKPOINT, images[:64]).flatten(0, 2).float()
        print(f"correlation of neighbours in the order of the file {neighbour_correlation(in_file):.3f}")
        for memory in (2**26, 2**27, 2**28, 2**29):
            effect, neighbours, n = design_effect(cache, memory)
            held = memory // (2 * D_IN * SIDE * SIDE)
            print(
                f"{memory >> 20} MB ({held} images): design effect {effect:.2f}, neighbours {neighbours:+.4f}, n = {n}"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""What collecting costs: beside the bare truncated forward, and beside how released collectors do it.

python tests/benchmarks/collecting.py            # tiny-turbo, two threads, a few minutes

Three ways take turns on the same batches, so that noise falls on all alike.

* bare: the same pipeline calls, broken off after the last hookpoint, nothing read or written;
* collect: what the kit does, from the first image to the sealed cache;
* released: the whole pipeline with the VAE, of every hookpoint output and update (output − input) in float32, one
  tensor file each in a tar archive, and the raw image.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sdxl_sae_kit as kit
from sdxl_sae_kit import hooks
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, resolve
from sdxl_sae_kit.pipelines import draw
from sdxl_sae_kit.prompts import Prompts

BATCH = 32
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 0.0}


class _Enough(Exception):
    pass


def bare(pipe: Any, prompts: Prompts, _folder: Path) -> None:
    """Run up to the last hookpoint and no further."""

    def stop(_update: torch.Tensor, _call: hooks.Call) -> None:
        raise _Enough

    with hooks.rewrite(pipe, {DEFAULT_HOOKPOINTS[-1]: stop}):
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            with suppress(_Enough):
                draw(pipe, batch.texts, batch.seeds, **SETTINGS)


def collect(pipe: Any, prompts: Prompts, folder: Path) -> None:
    """Cache the updates without pictures."""
    with redirect_stdout(io.StringIO()):  # what it says beforehand
        kit.collect(pipe, prompts, batch_size=BATCH, images=None, store=folder)


def released(pipe: Any, prompts: Prompts, folder: Path) -> None:
    """Keep output and update in float32 and the raw image, in a tar archive."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0].float().cpu(), (output[0] - args[0]).float().cpu()

        return hook

    blocks = {name: pipe.unet.get_submodule(resolve(pipe.unet, name).path) for name in DEFAULT_HOOKPOINTS}
    handles = [block.register_forward_hook(remember(name)) for name, block in blocks.items()]
    try:
        with tarfile.open(folder / "released.tar", "w") as archive:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                pictures = draw(pipe, batch.texts, batch.seeds, **SETTINGS)
                for i, picture in enumerate(pictures):
                    number = start + i
                    for name, tensors in seen.items():
                        for kind, tensor in zip(("output", "diff"), tensors, strict=True):
                            _add(archive, f"{number}.{name}.{kind}.pth", tensor[i].clone())
                    _add(archive, f"{number}.image.pth", torch.from_numpy(np.array(picture)))
    finally:
        for handle in handles:
            handle.remove()


def _add(archive: tarfile.TarFile, name: str, tensor: torch.Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    entry = tarfile.TarInfo(name)
    entry.size = buffer.tell()
    buffer.seek(0)
    archive.addfile(entry, buffer)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="in each round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, prompts = kit.load_pipeline("tiny-turbo", device="cpu"), kit.load_prompts("world", options.images)
    ways = {"bare": bare, "collect": collect, "released": released}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    nbytes: dict[str, int] = {}
    order = np.random.default_rng(0)
    for number in range(options.rounds + 1):  # the first warms up
        for name in order.permutation(list(ways)).tolist():
            folder = Path(tempfile.mkdtemp())
            os.sync()  # so that none pays for what another wrote
            started = time.perf_counter(), time.process_time()
            ways[name](pipe, prompts, folder)
            if number:
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
            nbytes[name] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
    print(f"{options.images} images, {options.rounds} rounds, {options.threads} threads")
    for name in ways:
        least, size = 1000 * min(wall[name]) / options.images, nbytes[name] / options.images
        print(f"{name:9} {least:.2f} ms, {size:,.0f} B an image")
    for name, other in (("collect", "bare"), ("released", "collect")):
        print(f"{name} / {other}: wall clock {_ratios(wall[name], wall[other])}, CPU {_ratios(cpu[name], cpu[other])}")
    print(f"collect keeps {nbytes['collect'] / nbytes['released']:.3f} of the bytes")


def _ratios(times: list[float], others: list[float]) -> str:
    """Least over least, which noise hardly touches; then the median over rounds and its range."""
    ratios = [time / other for time, other in zip(times, others, strict=True)]
    spread = f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    return f"{min(times) / min(others):.3f} (rounds {spread})"


if __name__ == "__main__":
    main()

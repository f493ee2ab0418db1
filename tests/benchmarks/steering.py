"""What steering costs: beside the same forward without it, and beside encoding and decoding everything.

python tests/benchmarks/steering.py              # SDXL's real U-Net with random weights: 14 GB of memory, minutes

Four ways take turns in one process, so that noise falls on all alike; each draws one image at 512 px in one step.

* off: nothing is hooked;
* add: ten latents of an SAE with 5,120 are added;
* scale: ten latents that may be active are turned off, which needs the code;
* dense: the same by encoding every latent and decoding the whole code twice, before the change and after it.

Then the edits alone, on the update that the U-Net gave, as a share of its forward.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_real_size import real_size_pipeline

from sdxl_sae_kit import record, rewrite, steer
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.edits import Edit
from sdxl_sae_kit.hooks import Call
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.steering import Hook

HOOKPOINT = "up.0.1"


def random_sae(pipe: Any) -> SAE:
    """Of the paper's size, with every latent alive."""
    model = describe(pipe)
    sae = SAE(SAEConfig(k=10), 1280, Site(model.name, model.revision, HOOKPOINT, 1, 0.0))
    sae.mean_activation.fill_(1)
    return sae.eval().requires_grad_(False)


def dense(sae: SAE, latents: list[int]) -> Callable[[torch.Tensor, Call], torch.Tensor]:
    """Turn latents off by decoding the whole code twice."""

    def edit(update: torch.Tensor, _call: Call) -> torch.Tensor:
        z = sae.encode(update)
        before = sae.decode(z)
        z[..., latents] = 0
        return update + (sae.decode(z) - before)

    return edit


@contextmanager
def timed(unet: torch.nn.Module) -> Iterator[tuple[list[float], list[float]]]:
    """Wall clock and CPU seconds of each forward inside the with block."""
    wall: list[float] = []
    cpu: list[float] = []
    started = [0.0, 0.0]

    def start(*_: Any) -> None:
        started[:] = time.perf_counter(), time.process_time()

    def stop(*_: Any) -> None:
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])

    handles = [unet.register_forward_pre_hook(start, prepend=True), unet.register_forward_hook(stop)]
    try:
        yield wall, cpu
    finally:
        for handle in handles:
            handle.remove()


def alone(hook: Callable[[torch.Tensor, Call], Any], update: torch.Tensor, repeats: int) -> float:
    """Median seconds of an edit by itself, after one that warms up."""
    call, seconds = Call(HOOKPOINT, 0, 1, False), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        hook(update, call)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50, help="of each edit alone")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = real_size_pipeline()
    sae = random_sae(pipe)

    def draw() -> None:
        generator = torch.Generator().manual_seed(0)
        pipe("a red circle", num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="latent")

    with record(pipe, [HOOKPOINT], stop_early=True) as recording:
        draw()
    update = recording.update(HOOKPOINT)
    latents = sae.encode(update).gt(0).sum((0, 1, 2)).topk(10).indices.tolist()  # the busiest
    added, off = dict.fromkeys(latents, 1.0), dict.fromkeys(latents, 0.0)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "off": nullcontext,
        "add": lambda: steer(pipe, sae, add=added),
        "scale": lambda: steer(pipe, sae, scale=off),
        "dense": lambda: rewrite(pipe, {HOOKPOINT: dense(sae, latents)}),
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    order = np.random.default_rng(0)
    for number in range(options.rounds + 1):  # the first warms up
        for name in order.permutation(list(ways)).tolist():
            with ways[name](), timed(pipe.unet) as measured:
                draw()
            if number:
                for all_of_them, (one,) in zip(times[name], measured, strict=True):
                    all_of_them.append(one)
    print(f"SDXL's U-Net at 512 px, {options.rounds} rounds, {options.threads} threads")
    for name, (wall, cpu) in times.items():
        print(f"{name:6} least {min(wall):.3f} s, median {statistics.median(wall):.3f} s; CPU {min(cpu):.3f} s")
    for name in ("add", "scale", "dense"):
        print(f"{name} / off: wall clock {_ratios(0, name, times)}; CPU {_ratios(1, name, times)}")
    hooks = {name: Hook.of(Edit(HOOKPOINT, **{name: each}), sae) for name, each in (("add", added), ("scale", off))}
    forward = min(times["off"][0])
    for name, hook in (hooks | {"dense": dense(sae, latents)}).items():
        seconds = alone(hook, update, options.repeats)
        print(f"{name} alone: {1000 * seconds:.2f} ms, {100 * seconds / forward:.3f} % of the least forward")


def _ratios(clock: int, name: str, times: dict[str, tuple[list[float], list[float]]]) -> str:
    """Least over least, which noise hardly touches; then the median over rounds and its range."""
    ratios = [a / b for a, b in zip(times[name][clock], times["off"][clock], strict=True)]
    spread = f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    return f"{min(times[name][clock]) / min(times['off'][clock]):.3f} (rounds {spread})"


if __name__ == "__main__":
    main()

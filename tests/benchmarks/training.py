"""What a training step costs: beside its limit, the released trainer's step, and the trainers of other packages.

pip install torch eai-sparsify sae-lens dictionary-learning overcomplete       # beside the kit, in one environment
python tests/benchmarks/training.py                                            # 4096 tokens, 5120 latents: 10 minutes
python tests/benchmarks/training.py --shapes 1024,20480,32 --condition off dead30 --repeats 3
python tests/benchmarks/training.py --check                                    # do all learn the same?
python tests/benchmarks/training.py --dense-reference                          # is the step the method's, over seeds?
python tests/benchmarks/training.py --threads 2                                # what a second thread is worth
python tests/benchmarks/training.py --several 4                                # what several SAEs in one pass cost

A package that is not installed, or does not import, is left out with a line saying so. Where torchvision was built for
another torch, uninstall it: nothing here needs it.

All take turns in one process, from the same weights, on the same made-up batch; printed are medians of CPU time (so
that other processes matter little, though they still share caches and memory). Only ratios are worth quoting.

* limit: the encoder's matrix product and one fused Adam pass over both weight matrices, the least a step can do;
* kit: what `train` runs, `Learner.step`;
* released: the step of the paper's released trainer, written anew (see `Released` in trainers.py, like all the others);
* dictionary_learning: its TopKTrainer.update, with 256 AuxK latents;
* SAELens: its SAETrainer.step on a TopKTrainingSAE with its defaults (dense activations);
* overcomplete: one pass of its train_sae over the batch, without monitoring, with its AuxK loss (under `off`: the mean
  square). Its TopKSAE has no decoder bias, so its tokens are centred first;
* sparsify: its SparseCoder on its CPU path with Adam; its Trainer wants a language model around it, so what the
  Trainer does in a step is spelled out.

Same k, latents, lr, and eps of Adam in all. Their AuxK is their own: sparsify and SAELens let d_in / 2 dead latents
take part, overcomplete half of all latents, whether dead or not; only it and the released step pay for AuxK while
nothing is dead. SAELens has no switch for AuxK: it is the same under `off` and `dead0`. Not counted: making or reading
batches, logging, checkpoints, evaluations, schedules of thresholds that start late. lr is tiny while times are taken,
so that repeated steps on one batch leave every trainer in the condition it was put in.

Conditions: `off` no AuxK; `dead0` AuxK and nothing dead, the usual one; `dead30` 30 % of the latents are dead, their
biases just low enough to stay below the top k on every token.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from trainers import AUXK, Task, Trainer, dense, everybody, kit, released

from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.training import train

D_IN = 1280

# What the kit must reach: peer / kit, and limit / kit, by (tokens, latents, k) and condition.
COLUMNS = ("released", "dictionary_learning", "SAELens", "overcomplete", "sparsify", "limit")
BAR = {
    ((4096, 5120, 10), "dead0"): (5.2, 5.5, 5.5, 8, 1.3, 0.85),
    ((4096, 5120, 32), "dead0"): (5.0, 5.2, 5.3, 8, 1.9, 0.76),
    ((4096, 5120, 10), "off"): (3.6, 5.5, 5.5, 4.7, 1.4, 0.83),
    ((4096, 5120, 32), "off"): (3.5, 5.3, 5.5, 4.5, 1.95, 0.76),
    ((4096, 5120, 160), "off"): (2.9, 3.7, 3.9, 3.3, 3.7, 0.54),
    ((4096, 5120, 10), "dead30"): (2.8, 4.2, 4.5, 4.3, 1.9, 0.40),
    ((4096, 5120, 32), "dead30"): (3.8, 5.6, 6.0, 6.0, 3.0, 0.56),
    ((1024, 5120, 10), "off"): (3.1, 5.5, 4.8, 4.0, 1.3, 0.76),
    ((1024, 5120, 32), "off"): (2.9, 4.7, 4.4, 3.5, 1.6, 0.65),
    ((1024, 5120, 160), "off"): (2.8, 3.8, 3.4, 2.8, 3.4, 0.52),
    ((1024, 20480, 10), "off"): (3.7, 6.5, 6.2, 4.9, 1.7, 0.78),
    ((1024, 20480, 32), "off"): (3.6, 6.6, 6.3, 5.2, 1.95, 0.77),
    ((1024, 20480, 160), "off"): (3.6, 6.0, 5.4, 4.6, 3.1, 0.70),
    ((1024, 20480, 10), "dead30"): (4.2, 7.5, 7.5, 7.3, 2.5, 0.62),
    ((1024, 20480, 32), "dead30"): (4.2, 7.5, 7.5, 7.3, 2.6, 0.62),
    ((1024, 20480, 160), "dead30"): (4.5, 7.5, 7.5, 7.3, 3.9, 0.62),
}
FLOOR = (2.8, 1.3, 1.3, 1.3, 1.3, math.nan)  # on any other shape


@dataclass
class World:
    """Made-up activations: sparse sums of directions with heavy-tailed coefficients, a mean other than 0, noise.

    n directions, some common and most rare; about 20 are in a token (fewer where d_in is small).
    """

    d_in: int
    n: int

    def __post_init__(self) -> None:
        rng, n = torch.Generator().manual_seed(0), self.n
        self.directions = nn.functional.normalize(torch.randn(n, self.d_in, generator=rng))
        popularity = 1 / (torch.arange(n) + 10)
        self.probability = (popularity / popularity.sum() * min(20, self.d_in / 8)).clamp(max=0.9)
        self.level = 13 + 25 * torch.rand(n, generator=rng)  # mean of a coefficient
        self.spread = 0.27 + 0.48 * torch.rand(n, generator=rng)  # its standard deviation, relative to that
        self.mean = 2 * torch.randn(self.d_in, generator=rng)

    def tokens(self, n: int, seed: int) -> Tensor:
        """Draw n tokens (n, d_in)."""
        rng = torch.Generator().manual_seed(seed)
        parts = []
        for start in range(0, n, 4096):
            shape = min(4096, n - start), len(self.directions)
            sigma = (1 + self.spread.square()).log().sqrt()
            coefficients = self.level * torch.exp(sigma * torch.randn(shape, generator=rng) - sigma.square() / 2)
            coefficients *= torch.rand(shape, generator=rng) < self.probability
            noise = 1.2 * torch.randn(shape[0], self.d_in, generator=rng)
            parts.append(coefficients @ self.directions + self.mean + noise)
        return torch.cat(parts)


def trained(world: World, x: Tensor, k: int, condition: str) -> tuple[Task, float]:
    """As after training: each latent is near one of the directions. Also how many AuxK latents are above 0 per token.

    Under dead30 the dead are further from them, with biases just low enough to stay below the top k on every token.
    """
    rng = torch.Generator().manual_seed(1)
    off = torch.randn(world.directions.shape, generator=rng) / world.d_in**0.5
    W_dec = nn.functional.normalize(world.directions + 0.5 * off)
    dead = torch.randperm(world.n, generator=rng)[: int(0.3 * world.n) if condition == "dead30" else 0]
    W_dec[dead] = nn.functional.normalize(0.5 * world.directions[dead] + off[dead])
    sample = world.tokens(4096, seed=2)
    task = Task(k, 1e-7, condition, W_dec.T.contiguous(), torch.zeros(world.n), W_dec, sample, dead)
    if not len(dead):
        return task, 0
    h = (x - task.b_dec) @ task.W_enc
    h_dead, h[:, dead] = h[:, dead], -torch.inf
    least = h.topk(k).values[:, -1:].clamp_min(0)
    task.b_enc[dead] -= (h_dead - least).amax(0).clamp_min(0) + 0.01
    best = (h_dead + task.b_enc[dead]).topk(min(AUXK, len(dead))).values
    return task, float((best > 0).sum()) / len(x)


def measure(
    trainers: dict[str, Trainer], x: Tensor, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each step, all taking turns; a first round that is not counted warms up."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for round_ in range(repeats + 1):
        for name, trainer in trainers.items():
            started = clock()
            trainer.step(x)
            if round_:
                times[name].append(1000 * (clock() - started))
    return times


def table(shape: tuple[int, int, int], d_in: int, condition: str, repeats: int) -> None:
    """Time everybody on one shape."""
    tokens, d_sae, k = shape
    world = World(d_in, d_sae)
    x = world.tokens(tokens, seed=3)
    task, positive = trained(world, x, k, condition)
    print(f"\n{tokens} tokens, {d_in} → {d_sae} latents, k = {k}, {condition}", end="")
    print(f" ({positive:.0f} AuxK latents above 0 per token)" if condition == "dead30" else "")
    times = measure(everybody(task), x, repeats, time.process_time)
    bars = dict(zip(COLUMNS, BAR.get((shape, condition), FLOOR) if d_in == D_IN else FLOOR, strict=True))
    ours = statistics.median(times["kit"])
    print(f"{'':20} {'CPU ms':>7} {'least to most':>15} {'/ kit':>6} {'bar':>5}")
    for name, ms in times.items():
        median, bar = statistics.median(ms), bars.get(name, math.nan)
        verdict = "" if math.isnan(bar) else f"{bar:5.2f}" + (" missed" if median / ours < bar else "")
        print(f"{name:20} {median:7.0f} {min(ms):7.0f} {max(ms):7.0f} {median / ours:6.2f} {verdict}")


@torch.no_grad()
def explained(trainer: Trainer, x: Tensor) -> float:
    """Explained variance of tokens."""
    return 1 - float((x - trainer.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())


def small(world: World, seed: int, condition: str) -> Task:
    """A small SAE as the kit starts it."""
    sae = SAE(SAEConfig(k=8, seed=seed), world.d_in)
    weights = (w.detach() for w in (sae.W_enc, sae.b_enc, sae.W_dec))
    return Task(8, 1e-3, condition, *weights, world.tokens(4096, seed=100 + seed), torch.empty(0, dtype=torch.long))


def check(steps: int) -> None:
    """From the same start on the same batches: losses of the released step and ours, and what all explain."""
    world = World(64, 100)
    held_out = world.tokens(8192, seed=99)
    pair = [make(small(world, 0, "off")) for make in (kit, released)]
    gap = 0.0
    for i in range(10):
        x = world.tokens(512, seed=1000 + i)
        ours, theirs = (float(trainer.step(x)) for trainer in pair)
        gap = max(gap, abs(ours - theirs))
    print(f"loss, kit against released, AuxK off, 10 steps: largest difference {gap:.1e} (at most 1e-5)")
    trainers = everybody(small(world, 0, "dead0"))
    del trainers["limit"]
    print(f"explained variance of held-out tokens, 64 → 256 latents, k = 8, before and after {steps} steps of 512")
    for name, trainer in trainers.items():
        before = explained(trainer, held_out)
        for i in range(steps):
            trainer.step(world.tokens(512, seed=1000 + i))
        print(f"{name:20} {before:6.3f} {explained(trainer, held_out):6.3f}")
    if gap > 1e-5:
        raise SystemExit("The losses differ.")


def dense_reference(steps: int) -> None:
    """Over three seeds, what the kit and plain autograd explain; a quarter of the latents starts too low to fire."""
    world, results = World(64, 100), []
    held_out = world.tokens(8192, seed=99)
    print(f"explained variance of held-out tokens after {steps} steps of 512: kit, dense autograd, difference")
    for seed in range(3):
        task = small(world, seed, "dead0")
        task.dead, task.dead_after = torch.arange(64), 5000
        task.b_enc[task.dead] = -torch.linspace(5, 25, 64)
        pair = kit(task), dense(task)
        for i in range(steps):
            x = world.tokens(512, seed=1000 * (seed + 1) + i)
            for trainer in pair:
                trainer.step(x)
        ours, theirs = (explained(trainer, held_out) for trainer in pair)
        results.append((ours, theirs, ours - theirs))
        print(f"seed {seed}: {ours:.5f} {theirs:.5f} {ours - theirs:+.1e}")
    columns = list(zip(*results, strict=True))
    print("mean ± spread: " + ", ".join(f"{statistics.fmean(c):.5f} ± {statistics.stdev(c):.5f}" for c in columns))


def scaling(shape: tuple[int, int, int], d_in: int, repeats: int, threads: int) -> None:
    """Wall clock of the kit with one thread and with more."""
    world, walls = World(d_in, shape[1]), {}
    x = world.tokens(shape[0], seed=3)
    trainer = kit(trained(world, x, shape[2], "dead0")[0])
    for n in (1, threads):
        torch.set_num_threads(n)
        walls[n] = statistics.median(measure({"kit": trainer}, x, repeats, time.perf_counter)["kit"])
    print(f"{shape}: 1 thread {walls[1]:.0f} ms, {threads} threads {walls[threads]:.0f} ms of wall clock: ", end="")
    print(f"x{walls[1] / walls[threads]:.2f}")


def several(shape: tuple[int, int, int], d_in: int, count: int) -> None:
    """CPU time of one `train` of several SAEs, beside those of as many calls for one each; metrics and all."""
    tokens, d_sae, k = shape
    world = World(d_in, d_sae)
    batches = [world.tokens(tokens, seed=i) for i in range(12)]
    configs = {f"k{k * 2**i}": SAEConfig(k=k * 2**i, expansion=d_sae / d_in) for i in range(count)}

    def cost(chosen: dict[str, SAEConfig]) -> float:
        with tempfile.TemporaryDirectory() as store:
            start = time.process_time()
            train(batches, chosen, store=store)
            return time.process_time() - start

    together, alone = cost(configs), [cost({name: config}) for name, config in configs.items()]
    print(f"{shape}: {count} SAEs together {together:.1f} s, the sum of each alone {sum(alone):.1f} s: ", end="")
    print(f"x{together / sum(alone):.2f} (at most 1.1)")


def shape_of(text: str) -> tuple[int, int, int]:
    tokens, d_sae, k = (int(part) for part in text.split(","))
    return tokens, d_sae, k


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [(4096, 5120, 10), (4096, 5120, 32), (4096, 5120, 160)]
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=default, metavar="TOKENS,LATENTS,K")
    parser.add_argument("--condition", nargs="+", choices=["off", "dead0", "dead30"], default=["dead0"])
    parser.add_argument("--d-in", type=int, default=D_IN)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more than 1: only the kit's speed with so many")
    parser.add_argument("--several", type=int, default=0, metavar="N", help="only: N SAEs in one pass, beside one each")
    parser.add_argument("--check", action="store_true", help="that all learn alike")
    parser.add_argument("--dense-reference", action="store_true", help="that the kit learns what the method says")
    parser.add_argument("--steps", type=int, default=100, help="of the two checks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        check(options.steps)
    if options.dense_reference:
        dense_reference(options.steps)
    if options.check or options.dense_reference:
        return
    if options.threads > 1:
        print("This is wall clock: it means something only while nothing else runs.")
    for shape in options.shapes:
        if options.several:
            several(shape, options.d_in, options.several)
        elif options.threads > 1:
            scaling(shape, options.d_in, options.repeats, options.threads)
        else:
            for condition in options.condition:
                table(shape, options.d_in, condition, options.repeats)


if __name__ == "__main__":
    main()

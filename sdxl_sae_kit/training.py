"""Train several SAEs at several hookpoints in one pass over their tokens, resumably, in one process or several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.amounts import counted, human_bytes, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Store, slug
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.devices import choose_device
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.plots import LiveFigure, training_curves
from sdxl_sae_kit.processes import find_processes
from sdxl_sae_kit.runs import SAE_FILE, Precision, Run, Setting
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tokens import Tokens
from sdxl_sae_kit.trained import TrainedSAEs


@checked
def train(
    data: Activations | Iterable[Any],
    configs: Mapping[str, SAEConfig] | SAEConfig,
    *,
    hookpoints: Sequence[str] | None = None,
    batch_size: int = 4096,
    epochs: int = 1,
    site: Site | None = None,
    precision: Precision = "float32",
    compile: bool = False,
    device: str | None = None,
    store: Store | Path | str | None = None,
) -> TrainedSAEs:
    """Train every configuration at every hookpoint in one pass over the data; finished ones are loaded instead.

    Killed at any moment, it goes on from the last checkpoint when called again. Held-out prompts are never trained on;
    metrics are measured on them. An SAE whose loss stops being finite, or explodes, stops with a checkpoint of its last
    good step and does not stop the others. Under `accelerate launch` or `torchrun` the processes share every
    batch: each must make this call with the same data in the same order, and gets its part dealt out. What comes out is
    what one process would make, up to rounding.

    Args:
        data: from `collect` or `stream`; or any iterable of batches of tokens (n, d_in), or of mappings of hookpoints
            to such batches. The first of those (4,096 tokens or more) are put aside to measure on. An SAE trained on an
            iterable is known by how that begins (some 45,000 tokens), by its length if it has one, and by `site`; a
            training that was interrupted must be called with the same batches to go on.
        configs: name → configuration, or a single one (then named by its k).
        hookpoints: short names, or one of them; by default all of the data.
        batch_size: tokens per step, in all processes together; batches of an iterable come in sizes of their own.
        epochs: passes over the training tokens.
        site: where an iterable's tokens come from; without it, its SAEs belong nowhere, and `steer` refuses them.
        precision: "bfloat16" computes the encoder's product in it, which only GPUs do faster. All else stays float32.
        compile: whether torch.compile takes what has no gradients of its own in the forward pass; on an H200 it gains
            nothing (4.1 ms a step, 4.0 ms without, at k = 10).
        device: by default CUDA if there is one, else the CPU.
        store: folder of artifacts.

    Raises:
        HookpointError: the data have no such hookpoint.
        ArtifactError: another process is training one of them.
        KitError: an impossible setting, or none of the SAEs could be trained to its end.

    Example:
        >>> saes = train(cache, {"k10": SAEConfig(k=10), "k20": SAEConfig(k=20)})      # doctest: +SKIP
        >>> saes["down.2.1", "k10"].metrics["explained_variance"]                      # doctest: +SKIP
    """
    batch_size, epochs = whole_number("batch_size", batch_size), whole_number("epochs", epochs)
    named = _named(configs)
    _check_settings(data, named, hookpoints, site, precision)
    tokens = data if isinstance(data, Activations) else Tokens(data, site, epochs)
    hookpoints = [hookpoints] if isinstance(hookpoints, str) else hookpoints or tokens.hookpoints
    device = choose_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting(tokens, batch_size, epochs, precision, compile, device, find_processes())
    runs = [
        Run(setting, (hookpoint, name), config, Store.at(store))
        for hookpoint in dict.fromkeys(hookpoints)
        for name, config in named.items()
    ]
    for run in runs:
        run.tell_if_known()
    grids = dict.fromkeys(tokens.grid(run.hookpoint) for run in runs)
    for grid in grids:  # hookpoints of one grid share their batches
        _train(setting, [run for run in runs if tokens.grid(run.hookpoint) == grid and not run.artifact.finished])
    return _trained(runs)


def _named(configs: Any) -> dict[str, SAEConfig]:
    if isinstance(configs, SAEConfig):
        return {f"k{configs.k}" if configs.k else configs.kind: configs}
    if not isinstance(configs, Mapping):
        raise KitError(f"train takes an SAEConfig, or a mapping such as {{'k10': SAEConfig(k=10)}}, not {configs!r}.")
    return dict(configs)


def _check_settings(
    data: Any, named: Mapping[str, SAEConfig], hookpoints: Sequence[str] | None, site: Site | None, precision: str
) -> None:
    if isinstance(data, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(data, Activations | Iterable):
        raise KitError(
            f"train takes what collect or stream gives, or an iterable of batches (n, d_in), such as x.split(4096), "
            f"not {type(data).__name__}."
        )
    if site and isinstance(data, Activations):
        raise KitError(f"train: {data.name} says itself where its updates come from. Leave site= out.")
    if site is not None and not isinstance(site, Site):
        raise KitError(f"train: site must be a Site, such as kit.Site('a model', '', 'mid.0', 1, 0.0), not {site!r}.")
    if site and site.kind != "update":
        raise KitError(f"train: site says {site.kind!r}, but this kit works on updates only. Give it those.")
    if not named or (hookpoints is not None and not len(hookpoints)):
        raise KitError(
            "train needs at least one configuration and one hookpoint, such as {'k10': SAEConfig(k=10)} and 'mid.0'; "
            f"it got {len(named)} configurations and hookpoints={hookpoints!r}."
        )
    for name, config in named.items():
        if not isinstance(config, SAEConfig):
            raise KitError(f"train: {name!r} must be an SAEConfig, such as SAEConfig(k=10), not {config!r}.")
        if not isinstance(name, str) or not name or name != slug(name):
            raise KitError(f"train: {name!r} cannot name an SAE. Use letters, digits, '.', '_' and '-', such as 'k10'.")
    if precision not in get_args(Precision):
        raise KitError(f"train: precision is {' or '.join(map(repr, get_args(Precision)))}, not {precision!r}.")


def _trained(runs: Sequence[Run]) -> TrainedSAEs:
    for run in runs:
        if not (run.failure or run.artifact.finished):
            run.failure = f"{run.artifact.name} could not be finished by the first process; what it printed says why."
    failures = {run.key: run.failure for run in runs if run.failure}
    if len(failures) == len(runs):
        raise KitError(f"None of the SAEs could be trained to its end. {' '.join(failures.values())}")
    finished = [run for run in runs if not run.failure]
    saes = TrainedSAEs(
        {run.key: SAE.load(run.artifact.check(SAE_FILE)) for run in finished},
        {run.key: run.read_log() for run in runs},
        failures,
    )
    for key, explained in saes.explained().items():
        if explained is not None and not explained > 0:
            tqdm.write(
                f"{' '.join(key)} explains less than the mean does ({explained:.3g}): lower lr, or train longer."
            )
    return saes


def _train(setting: Setting, runs: Sequence[Run]) -> None:
    """Train SAEs whose hookpoints share their batches."""
    if not runs:
        return
    _announce(setting, runs)
    with ExitStack() as stack:
        if setting.processes.first:  # it holds them for all
            for run in runs:
                stack.enter_context(run.artifact.lock())
        setting.processes.wait()
        _agree(setting, runs)
        runs = [run for run in runs if not run.artifact.finished]  # another process may just have been faster
        for run in runs:
            run.attempt(run.start)
        _steps(setting, [run for run in runs if not run.failure], stack)
        for run in runs:
            run.attempt(run.finish)
        setting.processes.wait()


def _agree(setting: Setting, runs: Sequence[Run]) -> None:
    """Refuse to share batches with processes that were given other ones."""
    mine = int(hashlib.sha256(" ".join(run.artifact.name for run in runs).encode()).hexdigest()[:15], 16)
    if len(setting.processes.gather(torch.tensor([mine], device=setting.device)).unique()) > 1:
        raise KitError(
            "The processes were given different tokens or settings. Give each of them the same batches in the same "
            "order (no shuffling of their own); train deals out each batch itself."
        )


def _announce(setting: Setting, runs: Sequence[Run]) -> None:
    hookpoints, n_steps = ", ".join(dict.fromkeys(run.hookpoint for run in runs)), runs[0].n_steps
    if isinstance(setting.tokens, Activations):
        tokens = setting.tokens.n_tokens(runs[0].hookpoint, "train")
        if not tokens or not len(setting.tokens.images("held_out")):
            raise KitError(
                f"{setting.tokens.name} has {setting.tokens.n_images} images, too few to keep some for testing. "
                "Collect more prompts."
            )
        data = f"{tokens:,} tokens × {setting.epochs} passes, {n_steps:,} steps of {setting.batch_size:,}"
    else:
        data = f"{n_steps:,} batches" if n_steps is not None else "as many batches as come"
    widths = [setting.tokens.d_in(run.hookpoint) for run in runs]
    size = sum(2 * round(width * run.config.expansion) * width for width, run in zip(widths, runs, strict=True))
    together = f" {setting.processes.count} processes share them." if setting.processes.count > 1 else ""
    if setting.processes.first:
        tqdm.write(
            f"Training {counted(len(runs), 'SAEs')} at {hookpoints}: {data}; weights, gradients and Adam take "
            f"{human_bytes(16 * size)}.{together}"
        )


def _steps(setting: Setting, runs: Sequence[Run], stack: ExitStack) -> None:
    if not runs:
        return
    hookpoints = list(dict.fromkeys(run.hookpoint for run in runs))
    first, n_steps = min(run.learner.step_number for run in runs), runs[0].n_steps
    # an iterable's length may be wrong, and it must be passed over anyway
    per_epoch = n_steps // setting.epochs if n_steps and isinstance(setting.tokens, Activations) else None
    start = first // per_epoch if per_epoch else 0
    number = start * (per_epoch or 0)
    live = stack.enter_context(LiveFigure())
    bar = stack.enter_context(
        tqdm(total=n_steps, initial=first, desc="train", unit="step", disable=not setting.processes.first)
    )
    for epoch in range(start, setting.epochs):
        for batch in setting.tokens.batches(hookpoints, setting.batch_size, epoch=epoch):
            for run in runs:
                run.attempt(partial(run.step, number, batch[run.hookpoint]))
            bar.update(number >= first)
            number += 1
            if all(run.failure for run in runs):
                return
            if setting.processes.first:
                live.show(lambda: training_curves({" ".join(run.key): run.log for run in runs}))

"""Train several SAEs at several hookpoints in one pass over a cache, resumably."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.artifacts import Store, slug, whole_number
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.evaluation import evaluate, mean_activation
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.learning import Learner
from sdxl_sae_kit.pipelines import choose_device
from sdxl_sae_kit.plots import LiveFigure, training_curves
from sdxl_sae_kit.sae import SAE, SAEConfig, Site

Key = tuple[str, str]
"""(hookpoint, name of the configuration)."""

_SAMPLE = 40_960  # tokens that set b_dec's start and the loss's scale
_CHECKPOINT_STEPS, _LOG_STEPS = 500, 20
_SAE, _LOG, _CHECKPOINT = "sae.safetensors", "training.jsonl", "checkpoint.safetensors"


class TrainedSAEs(dict[Key, SAE]):
    """SAEs by (hookpoint, name of the configuration), with their held-out metrics and training curves."""

    def __init__(self, saes: Mapping[Key, SAE], logs: Mapping[Key, list[dict[str, float]]]) -> None:
        super().__init__(saes)
        self.logs = dict(logs)

    def __missing__(self, key: object) -> SAE:
        known = ", ".join(map(repr, self))
        raise KitError(f"No SAE {key!r} here; there are {known}.{did_you_mean(str(key), map(str, self))}")

    def __repr__(self) -> str:
        lines = [f"{h} {name}: explained variance {m:.4f}" for (h, name), m in self._explained().items()]
        return "\n".join([f"{len(self)} trained SAEs (measured on held-out prompts)", *lines])

    def _explained(self) -> dict[Key, float]:
        return {key: sae.metrics["explained_variance"] for key, sae in self.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Held-out metrics, one row per SAE."""
        return [
            {"hookpoint": h, "config": name, "k": sae.k, "d_sae": sae.d_sae, **sae.metrics}
            for (h, name), sae in self.items()
        ]

    def _repr_html_(self) -> str:
        shown = {
            "explained variance": "explained_variance",
            "L0": "l0",
            "dead share": "dead_share",
            "tokens": "n_tokens",
        }
        rows = [
            {key: row[key] for key in ("hookpoint", "config", "k", "d_sae")}
            | {title: row[name] for title, name in shown.items()}
            | {"95 % interval": "[{:.4f}, {:.4f}]".format(*row["explained_variance_interval"])}
            for row in self.rows()
        ]
        caption = (
            "Measured on held-out prompts. Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², its interval a "
            "bootstrap over images; L0 the mean number of active latents per token; dead share that of latents which "
            "never fired."
        )
        return html.fragment(html.table(rows, caption))

    def plot(self) -> Any:
        """Training curves (plotly): unexplained share of each batch's variance over tokens seen."""
        return training_curves({f"{hookpoint} {name}": log for (hookpoint, name), log in self.logs.items()})


def train(
    cache: Activations,
    configs: Mapping[str, SAEConfig] | SAEConfig,
    *,
    hookpoints: Sequence[str] | None = None,
    batch_size: int = 4096,
    epochs: int = 1,
    device: str | None = None,
    store: Store | Path | str | None = None,
) -> TrainedSAEs:
    """Train every configuration at every hookpoint, reading the cache once for all; finished ones are loaded instead.

    Killed at any moment, it goes on from the last checkpoint when called again. Held-out prompts are never trained on;
    metrics are measured on them.

    Args:
        cache: from `collect`, or from `stream`.
        configs: name → configuration, or a single one (then named by its k).
        hookpoints: short names, or one of them; by default all of the cache.
        batch_size: tokens per step.
        epochs: passes over the training tokens.
        device: by default CUDA if there is one, else the CPU.
        store: folder of artifacts.

    Raises:
        HookpointError: the cache has no such hookpoint.
        ArtifactError: another process is training one of them.
        KitError: an impossible setting, or a loss that is not finite.

    Example:
        >>> saes = train(cache, {"k10": SAEConfig(k=10), "k20": SAEConfig(k=20)})      # doctest: +SKIP
        >>> saes["down.2.1", "k10"].metrics["explained_variance"]                      # doctest: +SKIP
    """
    if not isinstance(cache, Activations):
        raise KitError(f"train takes what collect or stream gives, not {cache!r}.")
    named = {f"k{configs.k}": configs} if isinstance(configs, SAEConfig) else dict(configs)
    hookpoints = [hookpoints] if isinstance(hookpoints, str) else cache.hookpoints if hookpoints is None else hookpoints
    if not named or not hookpoints:
        raise KitError(
            f"train needs at least one configuration and one hookpoint, such as {{'k10': SAEConfig(k=10)}} and "
            f"{cache.hookpoints[0]!r}; it got {len(named)} and {len(hookpoints)}."
        )
    for name, config in named.items():
        if not isinstance(config, SAEConfig):
            raise KitError(f"train: {name!r} must be an SAEConfig, such as SAEConfig(k=10), not {config!r}.")
        if not name or name != slug(name):
            raise KitError(f"train: {name!r} cannot name an SAE. Use letters, digits, '.', '_' and '-', such as 'k10'.")
    batch_size, epochs = whole_number("batch_size", batch_size), whole_number("epochs", epochs)
    device = choose_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    runs = [
        _Run(cache, (hookpoint, name), config, batch_size, epochs, Store.at(store))
        for hookpoint in dict.fromkeys(hookpoints)
        for name, config in named.items()
    ]
    missing = [run for run in runs if not run.artifact.finished]
    grids = dict.fromkeys(cache.grid(run.hookpoint) for run in missing)
    for grid in grids:  # hookpoints of one grid share their batches
        _train([run for run in missing if cache.grid(run.hookpoint) == grid], cache, batch_size, epochs, device)
    saes = TrainedSAEs(
        {run.key: SAE.load(run.artifact.check(_SAE)) for run in runs}, {run.key: run.read_log() for run in runs}
    )
    for key, explained in saes._explained().items():
        if not explained > 0:
            tqdm.write(
                f"{' '.join(key)} explains less than the mean does ({explained:.3g}): lower lr, or train longer."
            )
    return saes


class _Run:
    """One SAE on its way from a configuration to a finished artifact."""

    def __init__(
        self, cache: Activations, key: Key, config: SAEConfig, batch_size: int, epochs: int, store: Store
    ) -> None:
        self.key, self.config = key, config
        self.hookpoint, name = key
        cache.grid(self.hookpoint)  # refuses a hookpoint that the cache does not have
        recipe = {
            "cache": cache.digest,
            "hookpoint": self.hookpoint,
            "config": asdict(config),
            "batch_size": batch_size,
            "epochs": epochs,
        }
        self.artifact = store.artifact("saes", f"{Path(cache.recipe['model']).name}_{self.hookpoint}_{name}", recipe)
        self.log: list[dict[str, float]] = []

    def start(self, cache: Activations, device: str) -> None:
        """Make the SAE, or take it up from its checkpoint."""
        r = cache.recipe
        site = Site(r["model"], r["revision"], self.hookpoint, r["num_inference_steps"], r["guidance_scale"])
        sae = SAE(self.config, cache.d_in(self.hookpoint), site, self.artifact.name).to(device)
        self.learner = Learner(sae, cache.sample(self.hookpoint, _SAMPLE, seed=self.config.seed).to(device))
        checkpoint = self.artifact.file(_CHECKPOINT)
        if checkpoint.exists():
            self.learner.load_state(load_file(checkpoint, device=device))
            self.log = [line for line in self.read_log() if line["step"] <= self.learner.step_number]

    def step(self, x: torch.Tensor) -> None:
        """One step, logged now and then, with a checkpoint now and then."""
        seen = self.learner.step(x)
        if (number := self.learner.step_number) % _LOG_STEPS == 0 or number == 1:
            self.log.append({"step": number, **asdict(seen)})
        if number % _CHECKPOINT_STEPS == 0:
            self._write_log()
            state = {key: value.contiguous() for key, value in self.learner.state().items()}
            write_atomically(self.artifact.file(_CHECKPOINT), save(state))

    def finish(self, cache: Activations) -> None:
        """Measure, save, seal."""
        sae = self.learner.sae.eval().requires_grad_(False)
        sae.mean_activation.copy_(mean_activation(sae, cache))
        sae.metrics = evaluate(sae, cache)
        sae.save(self.artifact.file(_SAE))
        self._write_log()
        self.artifact.file(_CHECKPOINT).unlink(missing_ok=True)
        self.artifact.seal(facts={"metrics": sae.metrics})

    def read_log(self) -> list[dict[str, float]]:
        """The training log: step, unexplained, auxk, l0, dead_share."""
        return [json.loads(line) for line in self.artifact.read_text(_LOG).splitlines()]

    def _write_log(self) -> None:
        write_atomically(self.artifact.file(_LOG), "".join(json.dumps(line) + "\n" for line in self.log).encode())


def _train(runs: Sequence[_Run], cache: Activations, batch_size: int, epochs: int, device: str) -> None:
    hookpoints = list(dict.fromkeys(run.hookpoint for run in runs))
    tokens = cache.n_tokens(hookpoints[0], "train")
    if not tokens or not len(cache.images("held_out")):
        raise KitError(
            f"{cache.name} has {cache.n_images} images, too few to keep some for testing. Collect more prompts."
        )
    steps_per_epoch = -(-tokens // batch_size)
    tqdm.write(
        f"Training {len(runs)} SAEs at {', '.join(hookpoints)}: {tokens:,} tokens × {epochs} passes, "
        f"{steps_per_epoch * epochs:,} steps of {batch_size:,}."
    )
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.artifact.lock())
        runs = [run for run in runs if not run.artifact.finished]  # another process may just have been faster
        for run in runs:
            run.start(cache, device)
        live = stack.enter_context(LiveFigure())
        first = min((run.learner.step_number for run in runs), default=steps_per_epoch * epochs)
        bar = stack.enter_context(tqdm(total=steps_per_epoch * epochs, initial=first, desc="train", unit="step"))
        for epoch in range(first // steps_per_epoch, epochs):
            for number, batch in enumerate(cache.batches(hookpoints, batch_size, epoch=epoch), epoch * steps_per_epoch):
                on_device = {hookpoint: x.to(device) for hookpoint, x in batch.items()}
                for run in runs:
                    if run.learner.step_number == number:  # one resumed from a later checkpoint waits for the others
                        run.step(on_device[run.hookpoint])
                bar.update(number >= first)
                live.show(lambda: training_curves({" ".join(run.key): run.log for run in runs}))
        for run in runs:
            run.finish(cache)

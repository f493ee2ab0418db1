"""Train several SAEs at several hookpoints in one pass over their tokens, resumably, in one process or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import weights
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.artifacts import Store, human_bytes, slug, whole_number
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.evaluation import evaluate, mean_activation
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.learning import Learner, LossError
from sdxl_sae_kit.pipelines import choose_device
from sdxl_sae_kit.plots import LiveFigure, training_curves
from sdxl_sae_kit.processes import Processes, find_processes
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tokens import Tokens
from sdxl_sae_kit.trained import Key, TrainedSAEs

Precision = Literal["float32", "bfloat16"]

_SAMPLE = 40_960  # tokens that set b_dec's start and the loss's scale
_CHECKPOINT_STEPS, _LOG_STEPS = 500, 20
_SAE, _LOG, _CHECKPOINT = "sae.safetensors", "training.jsonl", "checkpoint.safetensors"


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
    good step and does not stop the others. Under `accelerate launch` or `torchrun` the processes, each of which must
    call it, share every batch; what comes out is what one process would make, up to rounding.

    Args:
        data: from `collect` or `stream`; or any iterable of batches of tokens (n, d_in), or of mappings of hookpoints
            to such batches. The first of those are put aside to measure on; where it is killed, it must be called with
            the same batches to go on.
        configs: name → configuration, or a single one (then named by its k).
        hookpoints: short names, or one of them; by default all of the data.
        batch_size: tokens per step, in all processes together; batches of an iterable come in sizes of their own.
        epochs: passes over the training tokens.
        site: where an iterable's tokens come from; without it, its SAEs belong nowhere, and `steer` refuses them.
        precision: "bfloat16" computes the encoder's product in it, which only GPUs do faster.
        compile: whether torch.compile takes the forward pass, which only pays on GPUs.
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
    training = _Training(tokens, batch_size, epochs, precision, compile, device, find_processes())
    runs = [
        _Run(training, (hookpoint, name), config, Store.at(store))
        for hookpoint in dict.fromkeys(hookpoints)
        for name, config in named.items()
    ]
    grids = dict.fromkeys(tokens.grid(run.hookpoint) for run in runs)
    for grid in grids:  # hookpoints of one grid share their batches
        training.train([run for run in runs if tokens.grid(run.hookpoint) == grid and not run.artifact.finished])
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
    if isinstance(data, str | bytes | Mapping | Tensor) or not isinstance(data, Activations | Iterable):
        raise KitError(
            f"train takes what collect or stream gives, or an iterable of batches (n, d_in), not {type(data).__name__}."
        )
    if site and isinstance(data, Activations):
        raise KitError(f"train: {data.name} says itself where its updates come from. Leave site= out.")
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


def _trained(runs: Sequence[_Run]) -> TrainedSAEs:
    for run in runs:
        if not (run.failure or run.artifact.finished):
            run.failure = f"{run.artifact.name} could not be finished by the first process; what it printed says why."
    failures = {run.key: run.failure for run in runs if run.failure}
    if len(failures) == len(runs):
        raise KitError(f"None of the SAEs could be trained to its end. {' '.join(failures.values())}")
    finished = [run for run in runs if not run.failure]
    saes = TrainedSAEs(
        {run.key: SAE.load(run.artifact.check(_SAE)) for run in finished},
        {run.key: run.read_log() for run in runs},
        failures,
    )
    for key, explained in saes.explained().items():
        if explained is not None and not explained > 0:
            tqdm.write(
                f"{' '.join(key)} explains less than the mean does ({explained:.3g}): lower lr, or train longer."
            )
    return saes


class _Run:
    """One SAE on its way from a configuration to a finished artifact."""

    def __init__(self, training: _Training, key: Key, config: SAEConfig, store: Store) -> None:
        self.training, self.key, self.config = training, key, config
        self.hookpoint, name = key
        tokens = training.tokens
        SAE(config, tokens.d_in(self.hookpoint))  # refuses a hookpoint that is not there, and a k above d_sae
        self.n_steps = training.n_steps(self.hookpoint)
        if config.decay_steps and self.n_steps is None:
            raise KitError(
                f"train: decay_steps={config.decay_steps} needs to know how many batches there are. Give a list of "
                "them, or an object with a length, or leave decay_steps out."
            )
        recipe = {
            "cache": tokens.digest,
            "hookpoint": self.hookpoint,
            "config": asdict(config),
            "batch_size": training.batch_size if isinstance(tokens, Activations) else None,
            "epochs": training.epochs,
            "precision": training.precision,
        }
        site = tokens.site(self.hookpoint)
        if isinstance(tokens, Tokens):  # whose digest tells only how they begin
            recipe |= {"steps": self.n_steps, "site": asdict(site) if site else None}
        model = Path(site.model).name if site else "tokens"
        self.artifact = store.artifact("saes", f"{model}_{self.hookpoint}_{name}", recipe)
        self.log: list[dict[str, float]] = []
        self.failure = ""
        self.seen: tuple[int, str] = (-1, "")  # number and hash of the last batch before a checkpoint

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something that must not stop the other SAEs if it fails; processes that work together stop together."""
        if self.failure:
            return
        try:
            action()
        except (KitError, torch.OutOfMemoryError) as cause:
            if self.training.processes.count > 1 and not isinstance(cause, LossError):
                raise
            self._fail(cause)

    def start(self) -> None:
        """Make the SAE, or take it up from its checkpoint."""
        tokens, device = self.training.tokens, self.training.device
        sample = tokens.sample(self.hookpoint, _SAMPLE, seed=self.config.seed)
        sae = SAE(self.config, tokens.d_in(self.hookpoint), tokens.site(self.hookpoint), self.artifact.name)
        sae.data = tokens.digest
        self.learner = Learner(
            sae.to(device),
            sample,
            n_steps=self.n_steps,
            processes=self.training.processes,
            precision=self.training.precision,
            compile=self.training.compile,
        )
        if self.artifact.file(_CHECKPOINT).exists():
            self._resume()

    def _resume(self) -> None:
        path = self.artifact.file(_CHECKPOINT)
        try:
            self.learner.sae.load_state_dict(SAE.load(path).state_dict())
            _, state = weights.read(path, training=True)
            self.seen = json.loads(bytes(state.pop("seen").tolist()))
            self.learner.load_state(state)
        except (ArtifactError, KeyError, ValueError, RuntimeError) as cause:
            raise ArtifactError(
                f"{path} is damaged ({cause}). Delete it and call train again: it begins anew."
            ) from None
        self.log = [line for line in self.read_log() if line["step"] <= self.learner.step_number]

    def step(self, number: int, x: Tensor) -> None:
        """Learn from the batch of this number, unless that was done before; log and keep the state now and then."""
        if number == self.seen[0]:
            self._check_seen(x)
        if number < self.learner.step_number:
            return
        share = x[self.training.processes.index :: self.training.processes.count]
        step = self.learner.step(share.to(self.training.device), len(x))
        if (number + 1) % _LOG_STEPS == 0 or number == 0 or step.resampled:
            self.log.append({"step": number + 1, **asdict(step)})
        if (number + 1) % _CHECKPOINT_STEPS == 0:
            self.seen = (number, _hash(x))
            self._keep()

    def _check_seen(self, x: Tensor) -> None:
        """Refuse to go on with other batches than those it was trained on so far."""
        if _hash(x) != self.seen[1]:
            raise KitError(
                f"{self.artifact.name} was trained on other batches so far: number {self.seen[0]} has changed. "
                f"Call train with the same batches in the same order, or delete {self.artifact.folder}."
            )

    def _fail(self, cause: Exception) -> None:
        """Stop, keep what was good, and let go of the memory."""
        if isinstance(cause, LossError) and not cause.exploded and self._finite():
            self._keep()
        self.__dict__.pop("learner", None)
        checkpoint = self.artifact.file(_CHECKPOINT)
        kept = f"Its last good checkpoint is {checkpoint}." if checkpoint.exists() else "It has no checkpoint yet."
        self.failure = f"{cause} {kept}"
        if self.training.processes.first:
            tqdm.write(self.failure)

    def _finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.learner.sae.state_dict().values())

    def _keep(self) -> None:
        """Write everything that the next step depends on.

        Raises:
            LossError: that is not finite, and what was written before stays.
        """
        if not self._finite():
            reason = f"weights are not finite after step {self.learner.step_number - 1}. Lower lr"
            raise LossError(f"{self.artifact.name}: {reason}.", exploded=True)
        if self.training.processes.first:
            self.learner.calibrate()
            self._write_log()
            seen = torch.tensor(list(json.dumps(self.seen).encode()), dtype=torch.uint8)
            self.learner.sae.save(self.artifact.file(_CHECKPOINT), self.learner.state() | {"seen": seen})

    def finish(self) -> None:
        """Measure, save, seal."""
        self._keep()
        if not self.training.processes.first:
            return
        tokens, sae = self.training.tokens, self.learner.sae.eval().requires_grad_(False)
        sae.mean_activation.copy_(mean_activation(sae, tokens, self.hookpoint))
        sae.metrics = evaluate(sae, tokens, hookpoint=self.hookpoint)
        sae.save(self.artifact.file(_SAE))
        self.artifact.seal(facts={"metrics": sae.metrics}, names=[_SAE, _LOG])
        self.artifact.file(_CHECKPOINT).unlink(missing_ok=True)

    def read_log(self) -> list[dict[str, float]]:
        """The training log, line by line."""
        if not self.artifact.file(_LOG).exists():  # stopped before its first checkpoint
            return self.log
        return [json.loads(line) for line in self.artifact.read_text(_LOG).splitlines()]

    def _write_log(self) -> None:
        write_atomically(self.artifact.file(_LOG), "".join(json.dumps(line) + "\n" for line in self.log).encode())


def _hash(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Training:
    """One pass, or several, over tokens for several SAEs, and how it is done."""

    tokens: Activations | Tokens
    batch_size: int
    epochs: int
    precision: Precision
    compile: bool
    device: str
    processes: Processes

    def n_steps(self, hookpoint: str) -> int | None:
        """Steps in all epochs, where their number is known."""
        steps = self.tokens.steps(hookpoint, self.batch_size)
        return steps if steps is None else steps * self.epochs

    def train(self, runs: Sequence[_Run]) -> None:
        """Train SAEs whose hookpoints share their batches."""
        if not runs:
            return
        self._announce(runs)
        with ExitStack() as stack:
            if self.processes.first:  # it holds them for all
                for run in runs:
                    stack.enter_context(run.artifact.lock())
            self.processes.wait()
            self._agree(runs)
            runs = [run for run in runs if not run.artifact.finished]  # another process may just have been faster
            for run in runs:
                run.attempt(run.start)
            self._steps([run for run in runs if not run.failure], stack)
            for run in runs:
                run.attempt(run.finish)
            self.processes.wait()

    def _agree(self, runs: Sequence[_Run]) -> None:
        """Refuse to share batches with processes that were given other ones."""
        mine = int(hashlib.sha256(" ".join(run.artifact.name for run in runs).encode()).hexdigest()[:15], 16)
        if len(self.processes.gather(torch.tensor([mine], device=self.device)).unique()) > 1:
            raise KitError(
                "The processes were given different tokens or settings. Give each of them the same batches in the same "
                "order (no shuffling of their own); train deals out each batch itself."
            )

    def _announce(self, runs: Sequence[_Run]) -> None:
        hookpoints, n_steps = ", ".join(dict.fromkeys(run.hookpoint for run in runs)), runs[0].n_steps
        if isinstance(self.tokens, Activations):
            tokens = self.tokens.n_tokens(runs[0].hookpoint, "train")
            if not tokens or not len(self.tokens.images("held_out")):
                raise KitError(
                    f"{self.tokens.name} has {self.tokens.n_images} images, too few to keep some for testing. "
                    "Collect more prompts."
                )
            data = f"{tokens:,} tokens × {self.epochs} passes, {n_steps:,} steps of {self.batch_size:,}"
        else:
            data = f"{n_steps:,} batches" if n_steps is not None else "as many batches as come"
        widths = [self.tokens.d_in(run.hookpoint) for run in runs]
        size = sum(2 * round(width * run.config.expansion) * width for width, run in zip(widths, runs, strict=True))
        together = f" {self.processes.count} processes share them." if self.processes.count > 1 else ""
        if self.processes.first:
            tqdm.write(
                f"Training {len(runs)} SAEs at {hookpoints}: {data}; weights, gradients and Adam take "
                f"{human_bytes(16 * size)}.{together}"
            )

    def _steps(self, runs: Sequence[_Run], stack: ExitStack) -> None:
        if not runs:
            return
        hookpoints = list(dict.fromkeys(run.hookpoint for run in runs))
        first, n_steps = min(run.learner.step_number for run in runs), runs[0].n_steps
        # an iterable's length may be wrong, and it must be passed over anyway
        per_epoch = n_steps // self.epochs if n_steps and isinstance(self.tokens, Activations) else None
        start = first // per_epoch if per_epoch else 0
        number = start * (per_epoch or 0)
        live = stack.enter_context(LiveFigure())
        bar = stack.enter_context(
            tqdm(total=n_steps, initial=first, desc="train", unit="step", disable=not self.processes.first)
        )
        for epoch in range(start, self.epochs):
            for batch in self.tokens.batches(hookpoints, self.batch_size, epoch=epoch):
                for run in runs:
                    run.attempt(partial(run.step, number, batch[run.hookpoint]))
                bar.update(number >= first)
                number += 1
                if all(run.failure for run in runs):
                    return
                if self.processes.first:
                    live.show(lambda: training_curves({" ".join(run.key): run.log for run in runs}))

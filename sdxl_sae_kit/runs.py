"""One SAE on its way from a configuration to a finished artifact: steps, log, checkpoints, and what may stop it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sdxl_sae_kit import weights
from sdxl_sae_kit.activations import Activations
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.evaluation import evaluate, mean_activation
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.learning import Learner, LossError
from sdxl_sae_kit.processes import Processes
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.tokens import Tokens
from sdxl_sae_kit.trained import Key

Precision = Literal["float32", "bfloat16"]

SAE_FILE = "sae.safetensors"

_SAMPLE = 40_960  # tokens that set b_dec's start and the loss's scale
_CHECKPOINT_STEPS, _LOG_STEPS = 500, 20
_LOG, _CHECKPOINT = "training.jsonl", "checkpoint.safetensors"


@dataclass(frozen=True)
class Setting:
    """Tokens that several SAEs are trained on, and how."""

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


class Run:
    """One SAE on its way from a configuration to a finished artifact."""

    def __init__(self, setting: Setting, key: Key, config: SAEConfig, store: Store) -> None:
        self.setting, self.key, self.config = setting, key, config
        self.hookpoint, name = key
        tokens = setting.tokens
        SAE(config, tokens.d_in(self.hookpoint))  # refuses a hookpoint that is not there, and a k above d_sae
        self.n_steps = setting.n_steps(self.hookpoint)
        if config.decay_steps and self.n_steps is None:
            raise KitError(
                f"train: decay_steps={config.decay_steps} needs to know how many batches there are. Give a list of "
                "them, or an object with a length, or leave decay_steps out."
            )
        if self.n_steps and self.n_steps < max(config.warmup_steps + config.decay_steps, config.anneal_steps):
            raise KitError(
                f"train: {name!r} has schedules of {config.warmup_steps} + {config.decay_steps} steps for lr and "
                f"{config.anneal_steps} for k, but there are only {self.n_steps} steps. Shorten them, or train longer."
            )
        recipe = {
            "cache": tokens.digest,
            "hookpoint": self.hookpoint,
            "config": asdict(config),
            "batch_size": setting.batch_size if isinstance(tokens, Activations) else None,
            "epochs": setting.epochs,
            "precision": setting.precision,
        }
        site = tokens.site(self.hookpoint)
        if isinstance(tokens, Tokens):  # whose digest tells only how they begin
            recipe |= {"steps": self.n_steps, "site": asdict(site) if site else None}
        model = Path(site.model).name if site else "tokens"
        self.artifact = store.artifact("saes", f"{model}_{self.hookpoint}_{name}", recipe)
        self.log: list[dict[str, float]] = []
        self.failure = ""
        self.seen: tuple[int, str] = (-1, "")  # number and hash of the last batch before a checkpoint

    def tell_if_known(self) -> None:
        """Say so where it is an iterator's beginning alone by which a finished SAE was found."""
        if self.artifact.finished and isinstance(self.setting.tokens, Tokens) and self.n_steps is None:
            steps = self.read_log()[-1]["step"]
            tqdm.write(
                f"{self.artifact.name} is loaded: it was trained before on batches that begin as these do (at least "
                f"{steps} of them). To train on these instead, delete {self.artifact.folder}."
            )

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something that must not stop the other SAEs if it fails; processes that work together stop together."""
        if self.failure:
            return
        try:
            action()
        except (KitError, torch.OutOfMemoryError) as cause:
            if self.setting.processes.count > 1 and not isinstance(cause, LossError):
                raise
            self._fail(cause)

    def start(self) -> None:
        """Make the SAE, or take it up from its checkpoint."""
        tokens, device = self.setting.tokens, self.setting.device
        sample = tokens.sample(self.hookpoint, _SAMPLE, seed=self.config.seed)
        sae = SAE(self.config, tokens.d_in(self.hookpoint), tokens.site(self.hookpoint), self.artifact.name)
        sae.data = tokens.digest
        self.learner = Learner(
            sae.to(device),
            sample,
            n_steps=self.n_steps,
            processes=self.setting.processes,
            precision=self.setting.precision,
            compile=self.setting.compile,
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
        share = x[self.setting.processes.index :: self.setting.processes.count]
        step = self.learner.step(share.to(self.setting.device), len(x))
        if (number + 1) % _LOG_STEPS == 0 or number == 0 or step.resampled:
            self.log.append({"step": number + 1, **asdict(step)})
        if (number + 1) % _CHECKPOINT_STEPS == 0:
            self.seen = (number, _hash(x))
            self._keep()

    def _check_seen(self, x: Tensor) -> None:
        """Refuse to go on with other batches than those it was trained on so far."""
        if _hash(x) != self.seen[1]:
            raise KitError(
                f"{self.artifact.name} was trained on other batches so far: training batch {self.seen[0]} (from 0) has "
                f"changed. Call train with the same batches in the same order, or delete {self.artifact.folder}."
            )

    def _fail(self, cause: Exception) -> None:
        """Stop, keep what was good, and let go of the memory."""
        if isinstance(cause, LossError) and not cause.exploded and self._finite():
            self._keep()
        self.__dict__.pop("learner", None)
        checkpoint = self.artifact.file(_CHECKPOINT)
        kept = f"Its last good checkpoint is {checkpoint}." if checkpoint.exists() else "It has no checkpoint yet."
        self.failure = f"{cause} {kept}"
        if self.setting.processes.first:
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
        if self.setting.processes.first:
            self.learner.calibrate()
            self._write_log()
            seen = torch.tensor(list(json.dumps(self.seen).encode()), dtype=torch.uint8)
            self.learner.sae.save(self.artifact.file(_CHECKPOINT), self.learner.state() | {"seen": seen})

    def finish(self) -> None:
        """Measure, save, seal."""
        self._keep()
        if not self.setting.processes.first:
            return
        tokens, sae = self.setting.tokens, self.learner.sae.eval().requires_grad_(False)
        sae.mean_activation.copy_(mean_activation(sae, tokens, self.hookpoint))
        sae.metrics = evaluate(sae, tokens, hookpoint=self.hookpoint)
        sae.save(self.artifact.file(SAE_FILE))
        self.artifact.seal(facts={"metrics": sae.metrics}, names=[SAE_FILE, _LOG])
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

"""SAEs as the notebook on RIEBench makes them: collected and trained with a scale's numbers, or found in the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS
from sdxl_sae_kit.observation import make_recipe
from sdxl_sae_kit.plans import plan
from sdxl_sae_kit.processes import Processes
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.runs import Run, Setting
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.scales import load_scale
from sdxl_sae_kit.stamps import name_hash
from sdxl_sae_kit.tiny import NAMES
from sdxl_sae_kit.training import train

DECISIVE = ("down.2.1", "up.0.2", "up.1.0", "up.1.1")
"""The blocks that decide most on the embedded models, where those of the paper decide little."""


class UsualSAEs:
    """The SAEs of one configuration of a scale, trained on the first half of its prompts.

    Args:
        model: name of the model, as `load_scale` takes it.
        scale: "smoke" or "demo".
        name: of the configuration, such as "k10"; by default the scale's second.
        store: folder of artifacts.

    Raises:
        KitError: no such scale or configuration.

    >>> UsualSAEs("tiny-turbo", "demo").name
    'k10'
    """

    def __init__(
        self, model: str, scale: str, name: str | None = None, store: Store | Path | str | None = None
    ) -> None:
        self.scale, self.store = load_scale(model, scale), Store.at(store)
        self.hookpoints: Sequence[str] = DECISIVE if model in NAMES else DEFAULT_HOOKPOINTS
        known = self.scale.configs
        self.name = list(known)[1] if name is None else name
        if self.name not in known:
            hint = did_you_mean(self.name, known)
            raise KitError(f"The scale {scale!r} trains SAEs named {', '.join(known)}, not {self.name!r}.{hint}")
        self.config = known[self.name]

    def make(self, pipe: Any, hookpoints: Sequence[str]) -> dict[str, SAE]:
        """One for each of these hookpoints (short names), collected and trained unless the store has it."""
        cache = collect(pipe, self._prompts(), self._read_together(hookpoints), store=self.store)
        saes = train(
            cache, {self.name: self.config}, hookpoints=hookpoints,
            batch_size=self.scale.batch_size, epochs=self.scale.sweep_epochs, store=self.store,
        )  # fmt: skip
        return {hookpoint: saes[hookpoint, self.name] for hookpoint in hookpoints}

    def forecast(self, pipe: Any, hookpoints: Sequence[str]) -> str:
        """What `make` would collect and train, which is what the store lacks; collecting is timed on a few batches."""
        cache = self._find_updates(pipe, hookpoints)
        missing = [name for name in hookpoints if cache is None or not self._run(cache, name).artifact.finished]
        if not missing:
            return "The SAEs are in the store."
        epochs = self.scale.sweep_epochs
        passes = f"{epochs} pass{'es' if epochs > 1 else ''}"
        training = f"{counted(len(missing), 'SAEs')} to be trained before, in {passes} over the updates"
        if cache is not None:
            steps = max(self._run(cache, name).n_steps or 0 for name in missing)
            return f"{training}: {counted(steps, 'steps')} of {self.scale.batch_size:,} tokens."
        collecting = plan(pipe, self._prompts(), self._read_together(hookpoints), store=self.store)
        return f"Updates to be collected before: {collecting}\n{training}."

    def _find_updates(self, pipe: Any, hookpoints: Sequence[str]) -> ActivationCache | None:
        """The updates, if the store has all of them, whatever the folder's readable name."""
        recipe = make_recipe(pipe, self._prompts(), self._read_together(hookpoints))
        wanted = name_hash(self.store.artifact("activations", "updates", recipe).recipe)
        found = (each for each in self.store.artifacts() if each.kind == "activations" and each.finished)
        return next((ActivationCache(artifact) for artifact in found if artifact.name.endswith(wanted)), None)

    def _run(self, cache: ActivationCache, hookpoint: str) -> Run:
        setting = Setting(cache, self.scale.batch_size, self.scale.sweep_epochs, "float32", False, "cpu", Processes())
        return Run(setting, (hookpoint, self.name), self.config, self.store)

    def _prompts(self) -> Prompts:
        return self.scale.prompts()[: self.scale.n_images // 2]

    def _read_together(self, hookpoints: Sequence[str]) -> Sequence[str]:
        """What is collected: all the usual hookpoints where these are among them, as the store may have those."""
        return self.hookpoints if set(hookpoints) <= set(self.hookpoints) else hookpoints

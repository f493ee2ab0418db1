"""How much the notebooks do: one set of numbers for all of them, so that each picks up what the others made."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.pipelines import local_folder
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.tiny import NAMES


@dataclass(frozen=True)
class Scale:
    """Numbers of one walk through the notebooks."""

    source: str
    """Where prompts come from: see `load_prompts`."""
    n_images: int
    """Images collected, one of each prompt."""
    configs: dict[str, SAEConfig]
    """The SAEs trained at every hookpoint."""
    batch_size: int
    """Tokens per training step."""
    epochs: int
    """Passes over the training tokens."""
    sweep_epochs: int
    """The same where many SAEs are compared at one hookpoint."""
    n_features: int
    """Features ablated per hookpoint."""
    n_prompts: int
    """Prompts on which whole blocks and screened features are measured."""
    n_elsewhere: int
    """Images made in another setting or by another model, to see what carries over."""
    n_items: int
    """Items of each type of edit that RIEBench is made of."""

    def prompts(self) -> Prompts:
        """The prompts, each with its seed."""
        return load_prompts(self.source, self.n_images)


def _tiny(
    n_images: int, epochs: int, sweep_epochs: int, n_features: int, n_prompts: int, n_elsewhere: int, n_items: int
) -> Scale:
    # Steps are few and tokens narrow here, so the learning rate is higher and death comes sooner than in the paper.
    configs = {f"k{k}": SAEConfig(k=k, lr=3e-3, dead_after=50_000) for k in (5, 10)}
    # Colours and shapes are told in directions in which updates vary little: see what recovery says of its latents.
    configs["k20-white"] = SAEConfig(k=20, normalize="whiten", lr=3e-3, dead_after=50_000)
    return Scale("world", n_images, configs, 1024, epochs, sweep_epochs, n_features, n_prompts, n_elsewhere, n_items)


def _real(
    n_images: int, epochs: int, sweep_epochs: int, n_features: int, n_prompts: int, n_elsewhere: int, n_items: int
) -> Scale:
    configs = {f"k{k}": SAEConfig(k=k, dead_after=1_000_000) for k in (10, 20)}
    return Scale("scenes", n_images, configs, 4096, epochs, sweep_epochs, n_features, n_prompts, n_elsewhere, n_items)


SCALES = {
    "tiny": {"smoke": _tiny(240, 4, 1, 2, 12, 24, 1), "demo": _tiny(2048, 10, 3, 10, 24, 160, 20)},
    "real": {"smoke": _real(64, 1, 1, 3, 8, 24, 1), "demo": _real(4000, 2, 1, 10, 24, 160, 9)},
}


@checked
def load_scale(model: str, scale: str = "demo") -> Scale:
    """The numbers for a model and a scale: `smoke` shows in minutes that everything runs, `demo` is worth looking at.

    Raises:
        KitError: no such scale, or a name that no model can have; whether the hub has it shows when it is loaded.

    >>> load_scale("tiny-turbo").n_images, load_scale("tiny-turbo", "smoke").n_images
    (2048, 240)
    """
    local_folder(model)  # refuses a misspelt name, which would otherwise count as a real model
    sizes = SCALES["tiny" if model in NAMES else "real"]
    if scale not in sizes:
        raise KitError(f"SCALE is {' or '.join(map(repr, sizes))}, not {scale!r}.{did_you_mean(scale, sizes)}")
    return sizes[scale]

"""Steerings: an image that is asked for with features changed, how it is drawn, and the Python that draws it again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdxl_sae_kit.errors import EditError
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import describe, generate
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.steering_rows import VERBS, Change

Edits = dict[str, dict[str, dict[int, float]]]
"""Hookpoint → verb → latent → strength."""


@dataclass(frozen=True)
class Steering:
    """An image to be drawn: prompt, seed, which features are changed, where and at which steps."""

    prompt: str
    seed: int
    changes: tuple[Change, ...] = ()
    where: tuple[tuple[float, ...], ...] | None = None
    """Rows of a mask; None for the whole picture."""
    steps: tuple[int, ...] | None = None
    """Denoising steps, from 0; None for all."""

    @property
    def edits(self) -> Edits:
        """What `steer` is told at each hookpoint, without what changes nothing.

        Raises:
            EditError: one feature is changed twice in the same way.
        """
        edits: Edits = {}
        for change in self.changes:
            latents = edits.setdefault(change.hookpoint, {}).setdefault(change.verb, {})
            if change.latent in latents:
                raise EditError(
                    f"Two rows {change.verb} latent {change.latent} of {change.hookpoint}, by "
                    f"{latents[change.latent]:g} and {change.strength:g}. Remove one, or choose another verb."
                )
            latents[change.latent] = change.strength
        return _that_change_something(edits)

    def draw(self, pipe: Any, saes: Mapping[str, SAE], control: int | None = None) -> tuple[Image.Image, list[Any]]:
        """The image, and its edits as `steer` records them.

        With a number as `control`, every feature writes along a random direction of its decoder row's norm instead of
        along that row; another number gives other directions.
        """
        with ExitStack() as edited:
            recorded = []
            for hookpoint, verbs in self.edits.items():
                told: dict[str, Any] = {**verbs, **self._place, **_along(saes[hookpoint], verbs, control)}
                recorded.append(edited.enter_context(steer(pipe, saes[hookpoint], **told)))
            (image,) = generate(pipe, [self.prompt], [self.seed])
        return image, recorded

    def code(self, pipe: Any, names: Mapping[str, str]) -> str:
        """Python that draws this image, where `names` says how each hookpoint's SAE is written there."""
        model, edits, drawn = describe(pipe), self.edits, "(image,) = kit.generate(pipe, [prompt], [seed])"
        lines = [
            "import sdxl_sae_kit as kit",
            "",
            f"# pipe ({model.name}, revision {model.revision}) and saes are those that kit.steering_panel was given",
            f"prompt, seed = {self.prompt!r}, {self.seed}",
        ]
        if not edits:
            return "\n".join([*lines, drawn])
        place = {}
        if self.where is not None:
            rows = [f"    [{', '.join(f'{share:g}' for share in row)}]," for row in self.where]
            lines += ["where = [", *rows, "]"]
            place["where"] = "where"
        if self.steps is not None:
            place["steps"] = repr(list(self.steps))
        lines.append("with (")
        for hookpoint, verbs in edits.items():
            said = ", ".join(f"{name}={value}" for name, value in {**verbs, **place}.items())
            lines.append(f"    kit.steer(pipe, {names[hookpoint]}, {said}),")
        return "\n".join([*lines, "):", f"    {drawn}"])

    @property
    def _place(self) -> dict[str, Any]:
        """Where and when `steer` acts."""
        where = None if self.where is None else np.array(self.where)
        return {"where": where, "steps": None if self.steps is None else list(self.steps)}


def _that_change_something(edits: Edits) -> Edits:
    kept = {
        hookpoint: {
            verb: {latent: by for latent, by in latents.items() if by != VERBS[verb].unchanging}
            for verb, latents in verbs.items()
        }
        for hookpoint, verbs in edits.items()
    }
    kept = {hookpoint: {verb: each for verb, each in verbs.items() if each} for hookpoint, verbs in kept.items()}
    return {hookpoint: verbs for hookpoint, verbs in kept.items() if verbs}


def _along(sae: SAE, verbs: Mapping[str, Mapping[int, float]], control: int | None) -> dict[str, Any]:
    if control is None:
        return {}
    latents = sorted({latent for each in verbs.values() for latent in each})
    return {"along": {latent: random_direction(sae, latent, control) for latent in latents}}


def random_direction(sae: SAE, latent: int, control: int) -> Float[np.ndarray, " d_in"]:
    """A direction drawn evenly from all, as long as the latent's decoder row."""
    drawn = np.random.default_rng([control, latent]).standard_normal(sae.d_in)
    norm = float(sae.directions[latent].norm())
    return np.asarray(drawn * (norm / np.linalg.norm(drawn)))

"""The explorer: type a prompt, see the image, the features that were strongest while it was made, and where in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.galleries import Gallery, gallery
from sdxl_sae_kit.hookpoints import by_hookpoint, list_hookpoints
from sdxl_sae_kit.hooks import Recording, record
from sdxl_sae_kit.interventions import check_fit
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.panels import Panel
from sdxl_sae_kit.pipelines import describe, generate
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.selections import SelectablePicture, at_grid

TILE = 120
"""Pixels of a heat map's longer side."""

STATIC = "Static copy: draw other images and select parts of them in JupyterLab."
HOW = (
    "Drag a rectangle or lasso on the picture, or move the sliders, to see what is active there; "
    "double-click for the whole picture."
)

STYLE = f"""<style>
.sae-tiles {{ display: grid; gap: 10px 8px; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); }}
.sae-kit .sae-tiles figure {{ max-width: {TILE}px; padding: 3px; break-inside: avoid; }}
.sae-tiles img {{ width: 100%; }}
.sae-tiles figcaption {{ font-size: 12px; line-height: 1.35; margin-top: 2px; overflow-wrap: anywhere; }}
.sae-pictures {{ display: flex; gap: 8px; }}
</style>"""


@checked
def explore(
    pipe: Any,
    saes: SAE | Mapping[Any, SAE] | Iterable[SAE],
    prompt: str = "a large red circle on the left",
    *,
    seed: int = 0,
    stats: FeatureStats | Mapping[Any, FeatureStats] | Iterable[FeatureStats] | None = None,
    n: int = 6,
) -> Explorer:
    """Draw images from prompts in a notebook, and see the strongest features of each block with heat maps over them.

    A part of the picture can be selected, to see what is active under it. With guidance, codes are of the cond half.

    Args:
        pipe: an SDXL pipeline of diffusers.
        saes: one SAE for each hookpoint to be looked at, alone, in a list, or in a mapping such as `train` returns.
        prompt: to begin with.
        seed: to begin with, from 0.
        stats: statistics of some of these SAEs; with them features have labels, and pressing one opens its gallery.
        n: features shown of each block.

    Raises:
        KitError: no pipeline or no SAEs, several of one hookpoint, statistics of others, a prompt that is no text, or
            impossible numbers.
        ArtifactError: an SAE that does not fit this U-Net.

    Warns where an SAE was trained on another model than the pipeline holds.

    >>> kit.explore(pipe, saes, "a small blue star")                              # doctest: +SKIP
    """
    describe(pipe)  # refuses what is no pipeline
    placed = placed_saes("explore", pipe, by_hookpoint("explore", "saes", SAE, saes))
    if not isinstance(prompt, str):
        raise KitError(f"explore draws one prompt, a text, not {prompt!r}. Type others where the first one stands.")
    known = known_stats("explore", placed, stats)
    n, seed = whole_number("explore: n", n), whole_number("explore: seed", seed, least=0)
    return Explorer(pipe, placed, known, prompt=prompt, seed=seed, n=n)


@dataclass(frozen=True)
class Drawn:
    """An image, and the updates that made it."""

    prompt: str
    seed: int
    image: Image.Image
    updates: Recording = field(repr=False)

    @classmethod
    def of(cls, pipe: Any, hookpoints: Iterable[str], prompt: str, seed: int) -> Drawn:
        """Draw as the model is meant to be used. Raises KitError where it cannot be drawn."""
        with record(pipe, hookpoints) as updates:
            (image,) = generate(pipe, [prompt], [seed])
        return cls(prompt, seed, image, updates)

    def code(self, sae: SAE, step: int) -> Float[np.ndarray, "height width d_sae"]:
        """What the SAE reads in its hookpoint's update at this denoising step."""
        (update,) = self.updates.update(sae.hookpoint, step)
        with torch.no_grad():
            z: Float[np.ndarray, "height width d_sae"] = sae.encode(update.to(sae.W_enc)).cpu().numpy()
        return z


@dataclass(frozen=True)
class Strength:
    """How strong a latent is in one image, in multiples of its usual activation."""

    latent: int
    peak: float
    """Largest over all tokens."""
    inside: float
    """Mean over the selected tokens."""
    outside: float
    """Mean over the others; NaN where all are selected."""


def strongest(
    code: Float[np.ndarray, "height width latent"],
    usual: Float[np.ndarray, " latent"],
    selected: Bool[np.ndarray, "height width"],
    n: int,
) -> list[Strength]:
    """The n strongest latents that fire on selected tokens.

    That is, by mean over the selected tokens in multiples of `usual`; where all tokens are selected, by the largest
    over them, because a latent that fires everywhere would lead every list of means. A latent with `usual` 0 has no
    unit and is left out.
    """
    fires, known = (code[selected] > FIRES).any(axis=0), usual > 0
    unit = np.where(known, usual, 1)
    peak, inside = code.max(axis=(0, 1)) / unit, code[selected].mean(axis=0) / unit
    outside = np.full_like(inside, np.nan) if selected.all() else code[~selected].mean(axis=0) / unit
    rank = np.where(fires & known, peak if selected.all() else inside, -1)
    order = np.argsort(-rank, kind="stable")[: min(n, int((fires & known).sum()))]
    return [Strength(int(at), float(peak[at]), float(inside[at]), float(outside[at])) for at in order]


class Explorer(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Prompt, picture and blocks; made by `explore`."""

    def __init__(
        self, pipe: Any, saes: dict[str, SAE], stats: dict[str, FeatureStats], *, prompt: str, seed: int, n: int
    ) -> None:
        self._pipe, self._saes, self._stats, self._n = pipe, saes, stats, n
        self._usual = {hookpoint: sae.mean_activation.cpu().numpy() for hookpoint, sae in saes.items()}
        self._galleries: dict[str, Gallery] = {}
        self.drawn: Drawn | None = None
        n_steps = describe(pipe).num_inference_steps
        self.prompt = widget(widgets.Text, "prompt", 520, value=prompt, description="prompt", continuous_update=False)
        self.seed = widget(widgets.BoundedIntText, "seed", 150, value=seed, max=2**53 - 1, description="seed")
        self.go = widget(widgets.Button, "draw", 80, description="Draw", button_style="primary")
        self.step = widget(widgets.Dropdown, "step", 100, options=range(n_steps), description="step")
        self.block = widget(widgets.Dropdown, "block", 150, options=["all", *saes], description="block")
        self.notice = widget(widgets.HTML, "notice")
        self.picture = SelectablePicture(finest(pipe, saes), self.refresh)
        self.caption = widget(widgets.HTML, "caption")
        self.panels = {hookpoint: Panel("found", on_open=partial(self._pressed, hookpoint)) for hookpoint in saes}
        self.opened = widgets.VBox()
        found = widgets.VBox([self.caption, *self.panels.values()], layout={"flex": "1 1 420px", "min_width": "0"})
        both = widgets.HBox([self.picture, found], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        choose = [self.block] if n_steps == 1 else [self.step, self.block]
        super().__init__([line([self.prompt, self.seed, self.go, *choose]), self.notice, both, self.opened])
        for control in (self.prompt, self.seed):
            control.observe(lambda change: self.draw(), "value")
        for control in (self.step, self.block):
            control.observe(lambda change: self.refresh(), "value")
        self.go.on_click(lambda button: self.draw())
        self.draw()

    def __repr__(self) -> str:
        return f"Explorer of {', '.join(self._saes)}: {self.prompt.value!r}"

    def draw(self) -> None:
        """Draw the prompt, unless that is what is shown. Why it could not be drawn stands in the notice."""
        wanted = self.prompt.value, self.seed.value
        if self.drawn is not None and wanted == (self.drawn.prompt, self.drawn.seed):
            return
        self.notice.value = "Drawing…"
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                self.drawn = Drawn.of(self._pipe, self._saes, *wanted)
        except (KitError, RuntimeError, TypeError, ValueError) as error:  # torch and the tokenizers raise the others
            self.notice.value = f"Not drawn: {html.escape(error)}"
            return
        self.notice.value = html.escape(" ".join(str(told.message) for told in said))
        self.picture.show(self.drawn.image, html.fragment(self._told()))
        self.refresh()

    def refresh(self) -> None:
        """Show the strongest features of what is drawn, at the chosen step, in the chosen blocks."""
        if self.drawn is None:
            return
        self.caption.value = html.fragment(self._caption(), html.quiet(HOW))
        for hookpoint, panel in self.panels.items():
            shown = self._is_shown(hookpoint)
            panel.layout.display = None if shown else "none"
            panel.value = html.fragment(STYLE, self._found(hookpoint)) if shown else ""

    def show(self, hookpoint: str, latent: int) -> None:
        """Open a latent's gallery below. Raises KitError where there is none, or no statistics of its block."""
        if hookpoint not in self._stats:
            raise KitError(f"There are no statistics of {hookpoint} here. Pass them to explore(…, stats=…).")
        if hookpoint not in self._galleries:
            self._galleries[hookpoint] = gallery(self._stats[hookpoint])
        self._galleries[hookpoint].show(latent)
        self.opened.children = (self._galleries[hookpoint],)

    def static_html(self) -> str:
        """What is shown now, without controls."""
        if self.drawn is None:
            return html.fragment(html.quiet(STATIC), f"<p>{self.notice.value}</p>")
        image, selected = scaled(self.drawn.image, 2 * TILE), self.picture.selected
        pictures = html.picture(html.to_webp(image), f"The image drawn of: {self.drawn.prompt}")
        if not selected.all():
            lit = html.overlay(image, selected.astype(np.float32), 1)
            pictures += html.picture(html.to_webp(lit), "Which part of it is selected")
        blocks = [self._found(hookpoint) for hookpoint in self._saes if self._is_shown(hookpoint)]
        parts = [
            html.quiet(STATIC),
            STYLE,
            f'<div class="sae-pictures">{pictures}</div>',
            self._told(),
            self._caption(),
        ]
        return html.fragment(*parts, *blocks) + "".join(each.static_html() for each in self.opened.children)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        self.picture.prepare()
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.static_html()}

    def _is_shown(self, hookpoint: str) -> bool:
        return self.block.value in ("all", hookpoint)

    def _pressed(self, hookpoint: str, latent: int) -> None:
        try:
            self.show(hookpoint, latent)
        except KitError as error:
            self.notice.value = html.escape(error)

    def _told(self) -> str:
        assert self.drawn is not None
        (height, width), (across, down) = self.picture.selected.shape, self.drawn.image.size
        size = f"seed {self.drawn.seed}, {down}×{across} pixels, {height}×{width} tokens"
        return f'<p>{html.words(self.drawn.prompt)} <span class="sae-quiet">{size}</span></p>'

    def _caption(self) -> str:
        """What the numbers are."""
        chosen, every = int(self.picture.selected.sum()), self.picture.selected.size
        if chosen == every:
            what = "Strongest latents of each block: max, the largest z over all tokens, ranks them; mean is over all"
        else:
            rows, columns = (f"{low}–{high}" for low, high in (self.picture.rows.value, self.picture.columns.value))
            what = (
                f"Latents active on {chosen} of {every} tokens, within rows {rows} and columns {columns}: in, the mean "
                "z over these, ranks them; out is the mean over the others"
            )
        unit = "in multiples (×) of a latent's mean z over the training tokens on which it fires"
        step = f"Step {self.step.value} of 0 to {self.step.options[-1]}. " if len(self.step.options) > 1 else ""
        return html.quiet(f"{step}{what}; {unit}. Pale yellow is the latent's largest z in this image.")

    def _found(self, hookpoint: str) -> str:
        """One block's features, with their heat maps."""
        assert self.drawn is not None
        sae, stats = self._saes[hookpoint], self._stats.get(hookpoint)
        code, usual = self.drawn.code(sae, self.step.value), self._usual[hookpoint]
        selected = at_grid(self.picture.selected, code.shape[:2])
        named = LabelStore.of(stats).all() if stats else {}
        listed = strongest(code, usual, selected, self._n)
        tiles = [self._tile(hookpoint, code[..., each.latent], each, named.get(each.latent)) for each in listed]
        active = (code[selected] > FIRES).any(axis=0)
        tokens = f"{selected.size} tokens" if selected.all() else f"{int(selected.sum())} of {selected.size} tokens"
        facts = [f"{len(listed)} of {int(active.sum())} latents active on {tokens}"]
        if unknown := int((active & (usual == 0)).sum()):
            facts.append(f"{unknown} never fired in training and have no unit")
        body = f'<div class="sae-tiles">{"".join(tiles)}</div>' if tiles else html.quiet("No latent fires here.")
        return f'<h3>{html.escape(hookpoint)} <span class="sae-quiet">{", ".join(facts)}</span></h3>{body}'

    def _tile(
        self, hookpoint: str, heat: Float[np.ndarray, "height width"], strength: Strength, label: str | None
    ) -> str:
        assert self.drawn is not None
        values = {"max": strength.peak, "mean": strength.inside}
        if not np.isnan(strength.outside):
            values = {"in": strength.inside, "out": strength.outside}
        parts = [f"{name} {html.short(value)}×" for name, value in values.items()]
        where = f"Where latent {strength.latent} of {hookpoint} fires in the image of: {self.drawn.prompt}"
        alt = f"{where}; {', '.join(parts)}"
        overlaid = html.overlay(scaled(self.drawn.image, TILE), heat, float(heat.max()))
        numbers = "".join(f'<br><span class="sae-quiet sae-fact">{html.escape(part)}</span>' for part in parts)
        pressed = ' class="sae-card"', f' data-latent="{strength.latent}"'
        card, opens = pressed if hookpoint in self._stats else ("", "")
        caption = f"<b{opens}>{strength.latent}</b> {html.words(label) if label else ''}{numbers}"
        return f"<figure{card}>{html.picture(html.to_webp(overlaid), alt)}<figcaption>{caption}</figcaption></figure>"


def scaled(image: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of so many pixels."""
    factor = side / max(image.size)
    return image.convert("RGB").resize([max(1, round(n * factor)) for n in image.size], Image.Resampling.BICUBIC)


def placed_saes(asked: str, pipe: Any, saes: dict[str, SAE]) -> dict[str, SAE]:
    """The SAEs in the order of the forward pass, if they fit and tell the unit of their latents.

    Raises:
        KitError: one does not tell.
        ArtifactError: one does not fit this U-Net.
    """
    places = {}
    for sae in saes.values():
        places[check_fit(pipe, sae).name] = sae
        if not (sae.mean_activation > 0).any():
            raise KitError(
                f"{asked}: {sae.name} does not tell how strongly its latents usually fire, the unit of what is shown. "
                "Measure it with sae.mean_activation.copy_(evaluation.mean_activation(sae, cache, sae.hookpoint))."
            )
    return {name: places[name] for name in list_hookpoints(pipe) if name in places}


def known_stats(
    asked: str,
    saes: dict[str, SAE],
    stats: FeatureStats | Mapping[Any, FeatureStats] | Iterable[FeatureStats] | None,
) -> dict[str, FeatureStats]:
    """Statistics by hookpoint. Raises KitError where some are of none of these SAEs."""
    known = {} if stats is None else by_hookpoint(asked, "stats", FeatureStats, stats)
    for hookpoint, of_one in known.items():
        if hookpoint not in saes or of_one.sae != saes[hookpoint].name:
            raise KitError(
                f"{asked}: stats of {of_one.sae} belong to none of these SAEs: "
                f"{', '.join(sae.name for sae in saes.values())}. Pass those of the same SAEs."
            )
    return known


def finest(pipe: Any, saes: Iterable[str]) -> tuple[int, int]:
    """The finest grid of these hookpoints, on which tokens are selected."""
    model, known = describe(pipe), list_hookpoints(pipe)
    size = model.height // pipe.vae_scale_factor, model.width // pipe.vae_scale_factor
    return max(known[name].grid(*size) for name in saes)

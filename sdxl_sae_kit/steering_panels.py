"""The steering panel: change features of an image with sliders, draw where, and see what that does to it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from jaxtyping import Float

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked, is_sae
from sdxl_sae_kit.edits import Edit, write_edits
from sdxl_sae_kit.errors import EditError, KitError
from sdxl_sae_kit.explorer import Drawn, finest, known_stats, placed_saes, scaled, strongest
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.hookpoints import by_hookpoint
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.sae import FIRES, SAE
from sdxl_sae_kit.selections import DRAWN_SIDE, MaskedPicture
from sdxl_sae_kit.steering_rows import N_ROWS, Feature, FeatureRows
from sdxl_sae_kit.steering_views import Steered, figure, view
from sdxl_sae_kit.steerings import Steering

PAUSE = 0.015
"""Seconds from a change to the drawing, in which what else was changed meanwhile is heard."""
N_STRONGEST = 4
"""Rows at the beginning where no features are asked for."""
STATIC = "Static copy: steer other features, and draw where, in JupyterLab."
HOW = "Draw where to steer: rectangles, outlines and strokes add up. Without any, it is steered everywhere."
FAULTS = (KitError, RuntimeError, TypeError, ValueError)
"""What drawing may raise: torch and the tokenizers raise the others."""


@checked
def steering_panel(
    pipe: Any,
    saes: SAE | Mapping[Any, SAE] | Iterable[SAE],
    prompt: str = "a large red circle on the left",
    *,
    seed: int = 0,
    stats: FeatureStats | Mapping[Any, FeatureStats] | Iterable[FeatureStats] | None = None,
    features: Mapping[str, Sequence[int]] | None = None,
) -> SteeringPanel:
    """Steer an image by hand in a notebook: sliders for up to eight features, a mask drawn on the picture, steps.

    Before, after and a map of the difference stand side by side, with the same edit along random directions of the
    same norm as a control. What is shown can be had as Python and saved as JSON for `replay`.

    Args:
        pipe: an SDXL pipeline of diffusers.
        saes: one SAE for each hookpoint to steer at, alone, in a list, or in a mapping such as `train` returns.
        prompt: to begin with.
        seed: to begin with, from 0.
        stats: statistics of some of these SAEs; with them features have labels.
        features: hookpoint → latents to begin with; the strongest of the image, over all blocks, where left out. The
            first is turned off, the others are as they are.

    Raises:
        KitError: no SAEs, several of one hookpoint, statistics of others, or an impossible seed.
        EditError: features of another hookpoint, more than eight, or that the SAE does not have.
        ArtifactError: an SAE that does not fit this U-Net.

    Warns where an SAE was trained on another model than the pipeline holds.

    >>> kit.steering_panel(pipe, saes, "a small blue star", features={"up.0.1": [17, 40]})    # doctest: +SKIP
    """
    several = list(saes) if isinstance(saes, Iterable) and not isinstance(saes, Mapping) else saes
    placed = placed_saes("steering_panel", pipe, by_hookpoint("steering_panel", "saes", SAE, several))
    known = known_stats("steering_panel", placed, stats)
    chosen = None if features is None else _checked(features, placed)
    seed = whole_number("steering_panel: seed", seed, least=0)
    return SteeringPanel(pipe, placed, known, _names(several), prompt=prompt, seed=seed, features=chosen)


class SteeringPanel(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Controls and pictures; made by `steering_panel`."""

    def __init__(
        self,
        pipe: Any,
        saes: dict[str, SAE],
        stats: dict[str, FeatureStats],
        names: dict[str, str],
        *,
        prompt: str,
        seed: int,
        features: list[Feature] | None,
    ) -> None:
        self._pipe, self._saes, self._names = pipe, saes, names
        self._labels = {hookpoint: LabelStore.of(of_one) for hookpoint, of_one in stats.items()}
        self._n_steps = describe(pipe).num_inference_steps
        self._codes: dict[str, Float[np.ndarray, "height width latent"]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._direction = 0
        self._warned = ""
        self.clean: Drawn | None = None
        self.steered: Steered | None = None
        self.control: Steered | None = None
        self._make_controls(prompt, seed)
        self._draw_clean()
        self.rows.fill(self._strongest()[:N_STRONGEST] if features is None else features)
        self.draw()
        self._listen()

    def __repr__(self) -> str:
        return f"SteeringPanel of {', '.join(self._saes)}: {self.prompt.value!r}"

    def draw(self) -> None:
        """Draw all that the controls ask for and is not shown yet. Why it could not be drawn stands in the notice."""
        while self._draw_next():
            pass

    def static_html(self) -> str:
        """What is shown now, without controls."""
        if self.clean is None or self.steered is None:
            return html.fragment(html.quiet(STATIC), f"<p>{self.notice.value}</p>")
        before, told = scaled(self.clean.image, DRAWN_SIDE), f"Before, drawn of: {self.clean.prompt}"
        if self.steered.asked.where is not None:
            before, told = self.picture.outline(before), f"{told}; outlined is where it is steered"
        changes = [
            {"label": self._label(change.hookpoint, change.latent) or "no label", "change": str(change)}
            for change in self.steered.asked.changes
        ]
        steps = "" if self.steered.asked.steps is None else f", at steps {self.steered.asked.steps}"
        return html.fragment(
            html.quiet(STATIC),
            self._told(),
            html.table(changes, f"Features{steps}") if changes else html.quiet("No feature is steered."),
            view(self.clean.image, self.steered, self.control, figure(before, told, "<b>Before</b>")),
            html.folded("The same in Python", f"<pre>{html.escape(self.code.value)}</pre>"),
        )

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        self.draw()
        self.picture.prepare()
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.static_html()}

    # Controls ------------------------------------------------------------------------------------------------------

    def _make_controls(self, prompt: str, seed: int) -> None:
        self.prompt = widget(widgets.Text, "prompt", 520, value=prompt, description="prompt", continuous_update=False)
        self.seed = widget(widgets.BoundedIntText, "seed", 150, value=seed, max=2**53 - 1, description="seed")
        latents = {hookpoint: sae.d_sae for hookpoint, sae in self._saes.items()}
        self.rows = FeatureRows(latents, tell=self._about, suggest=self._strongest, on_change=self._ask)
        last = self._n_steps - 1
        self.steps = widget(widgets.IntRangeSlider, "steps", 300, max=last, value=(0, last), description="steps")
        self.steps.layout.display = None if last else "none"
        self.random = widget(
            widgets.ToggleButton, "random", 170, description="Random direction", icon="random",
            tooltip="Beside it the same edit along random directions of the same norm: a control",
        )  # fmt: skip
        self.another = widget(widgets.Button, "another", 120, description="Another one", disabled=True)
        self.notice = widget(widgets.HTML, "notice")
        self.picture = MaskedPicture(finest(self._pipe, self._saes), self._ask)
        self.result = widget(widgets.HTML, "result")
        self.result.layout.flex, self.result.layout.min_width = "1 1 300px", "0"
        self.show_code = widget(widgets.ToggleButton, "show-code", 130, description="Copy as code", icon="code")
        self.code = widget(widgets.Textarea, "code", rows=14)
        self.code.layout.width, self.code.layout.display = "auto", "none"
        self.file = widget(widgets.Text, "file", 260, value="edit.json", description="file")
        self.save = widget(widgets.Button, "save", 100, description="Save edit", icon="save")
        both = widgets.HBox([self.picture, self.result], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        super().__init__(
            [
                *(line([self.prompt, self.seed]), self.rows, line([self.steps, self.random, self.another])),
                *(self.notice, both, line([self.show_code, self.file, self.save]), self.code),
            ]
        )

    def _listen(self) -> None:
        for control in (self.prompt, self.seed, self.steps, self.random):
            control.observe(lambda change: self._ask(), "value")
        self.random.observe(lambda change: setattr(self.another, "disabled", not change["new"]), "value")
        self.another.on_click(lambda button: self._turn())
        self.save.on_click(lambda button: self._save())
        self.show_code.observe(lambda change: self._open_code(change["new"]), "value")

    def _turn(self) -> None:
        self._direction += 1
        self._ask()

    def _open_code(self, shown: bool) -> None:
        self.code.layout.display = None if shown else "none"

    def _save(self) -> None:
        """Write the edits of the picture shown to a new file."""
        self.draw()
        name = self.file.value.strip()
        if self.steered is None or self.steered.asked != self._asked():
            return  # the notice says why it could not be drawn
        if not self.steered.edits:
            self.notice.value = "Nothing is changed, so there is no edit to save. Move a slider first."
        else:
            try:
                self.notice.value = self._written(name, self.steered.edits)
            except (KitError, OSError) as error:
                self.notice.value = f"Not saved: {html.escape(error)}"

    def _written(self, name: str, edits: Sequence[Edit]) -> str:
        """What to say after writing a new file; one that is there already is left alone."""
        if not name or Path(name).exists():
            return f"There is already {html.escape(name or 'a folder')}. Choose another name of a file."
        write_edits(name, edits)
        return f"Saved. Draw with it inside: kit.replay(pipe, saes, {html.escape(repr(name))})."

    # Drawing -------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Draw soon. What arrives while something is drawn is drawn once, as it then stands."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook
            self.draw()
            return
        if self._timer is None:
            self._timer = loop.call_later(PAUSE, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if self._draw_next():
            self._ask()  # a newer wish is heard before the control is drawn

    def _asked(self) -> Steering:
        """What the controls ask for."""
        mask, (first, last) = self.picture.mask, self.steps.value
        return Steering(
            self.prompt.value,
            self.seed.value,
            self.rows.changes,
            None if mask is None else tuple(map(tuple, mask.tolist())),
            None if last - first + 1 == self._n_steps else tuple(range(first, last + 1)),
        )

    def _draw_next(self) -> bool:
        """Draw the first picture that is missing and show it; False where none is, or it cannot be drawn."""
        asked, control = self._asked(), self._direction if self.random.value else None
        if self.clean is None or (asked.prompt, asked.seed) != (self.clean.prompt, self.clean.seed):
            return self._draw_clean()
        if self.steered is None or self.steered.asked != asked:
            return self._draw(asked, None)
        if control is not None and (not self.control or (self.control.asked, self.control.control) != (asked, control)):
            return self._draw(asked, control)
        if control is None and self.control is not None:
            self.control = None
            self._show()
        return False

    def _draw_clean(self) -> bool:
        """Draw without edits, which is done once for each prompt and seed."""
        self.notice.value = "Drawing…"
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                self.clean = Drawn.of(self._pipe, self._saes, self.prompt.value, self.seed.value)
        except FAULTS as error:
            self.notice.value = f"Not drawn: {html.escape(error)}"
            return False
        self._warned = html.escape(" ".join(str(told.message) for told in said))
        self.steered = self.control = None
        self._codes.clear()
        self.picture.show(
            scaled(self.clean.image, DRAWN_SIDE), html.fragment("<p><b>Before</b></p>", self._told(), html.quiet(HOW))
        )
        self.rows.tell()
        return True

    def _draw(self, asked: Steering, control: int | None) -> bool:
        """Draw with edits, along the features' directions or, with a control, along random ones."""
        assert self.clean is not None
        self.notice.value = "Drawing…"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the clean picture gave the same
                image, edits = asked.draw(self._pipe, self._saes, control) if asked.edits else (self.clean.image, [])
        except FAULTS as error:
            self.notice.value = f"Not drawn: {html.escape(error)}"
            return False
        drawn = Steered(asked, image, edits, control)
        if control is None:
            self.steered, self.code.value = drawn, asked.code(self._pipe, self._names)
        else:
            self.control = drawn
        self._show()
        return True

    def _show(self) -> None:
        assert self.clean is not None and self.steered is not None
        of_this = self.control if self.control and self.control.asked == self.steered.asked else None
        self.result.value = html.fragment(view(self.clean.image, self.steered, of_this))
        self.notice.value = self._warned

    # Features ------------------------------------------------------------------------------------------------------

    def _code(self, hookpoint: str) -> Float[np.ndarray, "height width latent"]:
        """What the SAE reads in the clean picture, halfway through its steps."""
        assert self.clean is not None
        if hookpoint not in self._codes:
            self._codes[hookpoint] = self.clean.code(self._saes[hookpoint], self._n_steps // 2)
        return self._codes[hookpoint]

    def _strongest(self) -> list[Feature]:
        """The strongest features of the clean picture: first one of each block, then a second of each, and so on."""
        if self.clean is None:
            return []
        of_blocks = []
        for hookpoint, sae in self._saes.items():
            code = self._code(hookpoint)
            found = strongest(code, sae.mean_activation.cpu().numpy(), np.ones(code.shape[:2], dtype=bool), N_ROWS)
            of_blocks.append([(each.peak, (hookpoint, each.latent)) for each in found])
        rounds = [[each for each in of_round if each is not None] for of_round in zip_longest(*of_blocks)]
        return [feature for of_round in rounds for _, feature in sorted(of_round, reverse=True)]

    def _label(self, hookpoint: str, latent: int) -> str | None:
        return self._labels[hookpoint].get(latent) if hookpoint in self._labels else None

    def _about(self, hookpoint: str, latent: int) -> str:
        """A latent's label, and how active it is in the clean picture."""
        label = self._label(hookpoint, latent)
        named = f"{html.words(label)} " if label else ""
        return html.fragment(f'{named}<span class="sae-quiet">{self._activity(hookpoint, latent)}</span>')

    def _activity(self, hookpoint: str, latent: int) -> str:
        usual = float(self._saes[hookpoint].mean_activation[latent])
        if usual == 0:
            return "never fired in training, so add and clamp have no unit"
        if self.clean is None:
            return ""
        z = self._code(hookpoint)[..., latent]
        if not (n_active := int((z > FIRES).sum())):
            return "fires nowhere in the picture before, so scale changes nothing"
        step = f" at step {self._n_steps // 2}" if self._n_steps > 1 else ""
        peak = html.short(float(z.max()) / usual)
        return f"fires on {n_active} of {z.size} tokens{step}, at most {peak}× its mean activation"

    def _told(self) -> str:
        assert self.clean is not None
        drawn = f"seed {self.clean.seed}, {self.clean.image.height}×{self.clean.image.width} pixels"
        return f'<p>{html.words(self.clean.prompt)} <span class="sae-quiet">{drawn}</span></p>'


def _checked(features: Mapping[str, Sequence[int]], saes: Mapping[str, SAE]) -> list[Feature]:
    """The features asked for, if there are so many rows and the SAEs have them."""
    chosen = [(hookpoint, latent) for hookpoint, latents in features.items() for latent in latents]
    if len(chosen) > N_ROWS:
        raise EditError(f"steering_panel: {len(chosen)} features, but there are {N_ROWS} rows. Leave some out.")
    for hookpoint, latent in chosen:
        if hookpoint not in saes:
            raise EditError(
                f"steering_panel: features of {hookpoint}, but the SAEs are of {', '.join(saes)}. Pass its SAE too."
            )
        if not 0 <= latent < saes[hookpoint].d_sae:
            raise EditError(
                f"steering_panel: {saes[hookpoint].name} has latents 0 to {saes[hookpoint].d_sae - 1}; "
                f"there is no {latent}. Choose one of these."
            )
    return [(hookpoint, int(latent)) for hookpoint, latent in chosen]


def _names(saes: Any) -> dict[str, str]:
    """How the SAE of each hookpoint is written in Python, given what the caller calls saes."""
    if is_sae(saes):
        return {saes.hookpoint: "saes"}
    if isinstance(saes, Mapping):
        keys = {sae.hookpoint: key for key, sae in saes.items()}
        return {
            at: f"saes[{', '.join(map(repr, key)) if isinstance(key, tuple) else repr(key)}]"
            for at, key in keys.items()
        }
    return {sae.hookpoint: f"saes[{at}]" for at, sae in enumerate(saes)}

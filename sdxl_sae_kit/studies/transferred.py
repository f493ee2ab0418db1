"""What became of edits elsewhere: how often and how far they move what they should, beside the same along others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.plots import shares_by_group
from sdxl_sae_kit.studies.distances import MEASURES, estimate, written
from sdxl_sae_kit.studies.labelled import NOTHING, Labelled
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.statistics import share

FILE, PICTURE = "transfer.jsonl", "edit-{}.webp"
ALL = "all steps"
CONDITIONS = ("feature", "random direction", "other feature", "untrained SAE")
"""The last two over all steps only."""
SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width")

Place = Literal["source", "target"]
_PLACES: tuple[Place, Place] = ("source", "target")


@dataclass(frozen=True)
class Tried:
    """An edit and what it did on each of its held-out prompts: `outcomes` by place, window and condition.

    An outcome has `moved`, the change in nats of the log-odds of the label's value, positive where it is as expected;
    `follows`, whether the likeliest answer came to be the value or ceased to be; and every distance that can be told.
    """

    labelled: Labelled
    hookpoint: str
    verb: str
    """"scale" or "add"."""
    dose: float
    """What its activation is multiplied by, or how many times its mean activation is added."""
    texts: Sequence[str]
    """Its prompts."""
    outcomes: Mapping[Place, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]]

    @property
    def said(self) -> str:
        """What is done to which feature."""
        dose = f"× {self.dose:g}" if self.verb == "scale" else f"+ {self.dose:g} × mean"
        return f"{self.hookpoint} {self.labelled.latent} {dose}"

    @property
    def label(self) -> str:
        """Factor and value."""
        return f"{self.labelled.factor}: {self.labelled.value}"


@dataclass(frozen=True)
class Transfer:
    """Edits that work at the source, on held-out prompts there and at the target, by window of steps."""

    artifact: Artifact = field(repr=False)
    edits: tuple[Tried, ...] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Transfer:
        """Read what `transfer_edits` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "transfer", "transfer_edits")
        names = artifact.recipe["found"]["saes"]
        found = []
        for told in Lines(artifact, FILE).values():
            labelled = Labelled(**told["labelled"])
            outcomes = {place: told[place] for place in _PLACES}
            hookpoint = names[labelled.place][0]
            found.append(Tried(labelled, hookpoint, told["verb"], told["dose"], told["texts"], outcomes))
        return cls(artifact, tuple(found))

    def setting(self, place: Place) -> str:
        """The model, steps and guidance of a place."""
        told = self.artifact.recipe["found"]["source"] if place == "source" else self.artifact.recipe["target"]
        steps, guidance = told["num_inference_steps"], told["guidance_scale"]
        guided = f", guidance {guidance:g}" if guidance > 1 else ""
        return f"{told['model']}, {steps} step{'s' if steps > 1 else ''}{guided}"

    def windows(self, place: Place) -> list[str]:
        """All steps, then the windows that hold some of this place's steps but not all."""
        return list(self.edits[0].outcomes[place])

    @property
    def n_prompts(self) -> int:
        """Held-out prompts, each of one edit alone."""
        return sum(len(edit.texts) for edit in self.edits)

    def rows(self) -> list[dict[str, Any]]:
        """A row per place, window and condition, over the prompts of all edits.

        `success` is the share of prompts on which the log-odds of the label's value move as expected by more than 0.01,
        with Wilson's 95 % interval; `feature − it`, in the rows of controls, how much greater that of the feature is on
        the same prompts; `source − it`, in the rows of the target over all steps, how much greater that at the source
        is; `log-odds` the mean change as expected, in nats (log-odds are cut at ±69), and `log-odds, feature − it` how
        much greater the feature's is; `answer follows` the share on which the likeliest answer comes to be the value or
        ceases to be, with Wilson's interval; then mean distances from the picture as it is. Intervals other than
        Wilson's are 95 % bootstrap intervals over prompts, each of which has a random direction of its own. All hold
        for these edits on other prompts.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [
            self._row(place, window, condition)
            for place in _PLACES
            for window in self.windows(place)
            for condition in self.edits[0].outcomes[place][window]
        ]

    def _row(self, place: Place, window: str, condition: str) -> dict[str, Any]:
        moved = self._values(place, window, condition, "moved")
        own, here = (self._values(*of, "moved") for of in ((place, window, CONDITIONS[0]), ("source", ALL, condition)))
        row: dict[str, Any] = {"place": place, "setting": self.setting(place), "window": window, "condition": condition}
        success = moved > NOTHING
        row |= _share("success", success)
        control, carried = condition != CONDITIONS[0], (place, window) == ("target", ALL)
        row |= _apart("feature − it", (own > NOTHING).astype(np.float64) - success, control)
        row |= _apart("source − it", (here > NOTHING).astype(np.float64) - success, carried)
        row |= estimate("log-odds", moved) | _apart("log-odds, feature − it", own - moved, control)
        row |= _share("answer follows", self._values(place, window, condition, "follows") > 0)
        told = self.edits[0].outcomes[place][window][condition]
        for measure in (measure for measure in MEASURES if measure in told):
            row |= estimate(measure, self._values(place, window, condition, measure))
        return row | {"prompts": len(moved), "edits": len(self.edits)}

    def _values(self, place: Place, window: str, condition: str, name: str) -> NDArray[np.float64]:
        """Prompt by prompt; each is of one edit alone."""
        each = [value for edit in self.edits for value in edit.outcomes[place][window][condition][name]]
        return np.asarray(each, dtype=np.float64)

    def by_edit(self) -> list[dict[str, Any]]:
        """A row per edit: what it does, and its success at the source, at the target and there along a random one."""
        rows = []
        for edit in self.edits:
            row: dict[str, Any] = {"edit": edit.said, "label": edit.label, "AUC": edit.labelled.area}
            for name, outcome in {
                "source": edit.outcomes["source"][ALL][CONDITIONS[0]],
                "target": edit.outcomes["target"][ALL][CONDITIONS[0]],
                "target, random": edit.outcomes["target"][ALL][CONDITIONS[1]],
            }.items():
                moved = np.asarray(outcome["moved"], dtype=np.float64)
                row |= {name: float((moved > NOTHING).mean()), f"{name}, log-odds": float(moved.mean())}
            rows.append(row | {"prompts": len(edit.texts)})
        return rows

    def sentence(self) -> str:
        """What the numbers say."""
        by = {(row["place"], row["window"], row["condition"]): row for row in self.rows()}
        own, *controls = (by["target", ALL, condition] for condition in CONDITIONS)
        random = controls[0]
        found, by_chance = (written(by["source", ALL, each], "success", share=True) for each in CONDITIONS[:2])
        told = "; ".join(f"{window} {self._compared(by, window)}" for window in self.windows("target"))
        measure = next(m for m in reversed(MEASURES) if m in own)
        against = (
            f"{_verdict(row)} {name} ({written(row, 'success', share=True)})"
            for name, row in zip(("random directions", "other features", "untrained latents"), controls, strict=True)
        )
        return (
            f"{len(self.edits)} edits found on {self.setting('source')} move the log-odds of their label's value as "
            f"expected on {found} of {self.n_prompts} held-out prompts there (along as many random directions, one for "
            f"each prompt, {by_chance}). On {self.setting('target')}: {told}. So over all steps there they "
            f"{', '.join(against)}; source less target is {written(own, 'source − it')}. The mean change of log-odds "
            f"there is {written(own, 'log-odds')} nats, along random directions {written(random, 'log-odds')}, "
            f"difference {written(random, 'log-odds, feature − it')}; the answer itself follows on "
            f"{written(own, 'answer follows', share=True)}, against {written(random, 'answer follows', share=True)}; "
            f"the {measure} distance from the picture as it is is {written(own, measure)}, against "
            f"{written(random, measure)}. In brackets 95 % intervals over prompts; they hold for these edits."
        )

    def _compared(self, by: Mapping[tuple[str, str, str], Mapping[str, Any]], window: str) -> str:
        own, random = (by["target", window, condition] for condition in CONDITIONS[:2])
        return (
            f"{written(own, 'success', share=True)}, random {written(random, 'success', share=True)}, difference "
            f"{written(random, 'feature − it')}"
        )

    def plot(self) -> Any:
        """Success by window, the conditions side by side, at the source and at the target (plotly)."""
        groups = [(place, window) for place in _PLACES for window in self.windows(place)]
        series: dict[str, list[tuple[float, float, float] | None]] = {condition: [] for condition in CONDITIONS}
        by = {(row["place"], row["window"], row["condition"]): row for row in self.rows()}
        for group in groups:
            for condition, points in series.items():
                row = by.get((*group, condition))
                points.append((row["success"], *row["success interval"]) if row else None)
        title = f"Edits of {self.setting('source')}, tried on {self.setting('target')}"
        y = f"share of {self.n_prompts} prompts moved as expected"
        return shares_by_group([f"{place}: {window}" for place, window in groups], series, title=title, y=y)

    def _repr_html_(self) -> str:
        caption = (
            "Success: share of held-out prompts on which the log-odds of the label's value move as expected; of shares "
            "Wilson's 95 % interval, the other intervals are bootstrap intervals over prompts"
        )
        each = "Success and mean change of log-odds over all steps, edit by edit: too few prompts each for an interval"
        return html.fragment(
            html.heading("Do edits work elsewhere?", html.escape(self.sentence())),
            html.table([self._readable(row) for row in self.rows()], caption),
            html.table(self.by_edit(), each),
            html.figures((self._picture(place), "", edit.texts[0]) for place, edit in enumerate(self.edits)),
        )

    def _readable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the table people see."""
        shown = {name: row[name] for name in ("place", "window", "condition")}
        told = ("success", "feature − it", "source − it", "log-odds", "log-odds, feature − it", "answer follows")
        shown |= {name: written(row, name) for name in told}
        return shown | {m: written(row, m) for m in MEASURES if m in row} | {"prompts": row["prompts"]}

    def _picture(self, place: int) -> str:
        edit = self.edits[place]
        tiles = ["source", f"source edited ({edit.said}, {edit.label})", "target"]
        tiles += [f"target edited in {window}" for window in self.windows("target")]
        return html.picture(self.artifact.file(PICTURE.format(place)).read_bytes(), "; ".join(tiles))

    def __repr__(self) -> str:
        return f"Transfer of {len(self.edits)} edits: {self.sentence()}"


def _share(name: str, hits: NDArray[np.bool_]) -> dict[str, Any]:
    return {name + key.removeprefix("share"): value for key, value in share(hits).items()}


def _apart(name: str, difference: NDArray[np.float64], told: bool) -> dict[str, Any]:
    """A mean difference, NaN where there is nothing to compare."""
    return estimate(name, difference) if told else {name: np.nan, f"{name} interval": (np.nan, np.nan)}


def _verdict(row: Mapping[str, Any]) -> str:
    """How features do beside a control."""
    low, high = row["feature − it interval"]
    return "do better than" if low > 0 else "do worse than" if high < 0 else "do not stand apart from"

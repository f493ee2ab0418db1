"""What a screening found: features with their labels, the edits chosen, and what these and the controls did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.maps import selectivity_map
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.labelled import NOTHING, Labelled
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.statistics import share

FILE = "selectivity.jsonl"
CONTROLS = ("random direction", "other feature", "untrained SAE")
CONDITIONS = ("feature", *CONTROLS)
MOVED, KEPT = 0.7, 0.9
"""A feature passes if at least these shares of prompts move as expected and, in every other factor, stay the same."""


@dataclass(frozen=True)
class Outcome:
    """What an edit did, prompt by prompt.

    `moved` is the change of the log-odds ln(p / (1 − p)) of the label's value in nats, positive where it is as
    expected: up when the feature is added, down when it is turned off; `flipped` whether the judge's likeliest answer
    came to be it, or ceased to be; `changed`, by other factor, whether the likeliest answer is another than without
    the edit.
    """

    moved: Sequence[float]
    flipped: Sequence[bool]
    changed: Mapping[str, Sequence[bool]]

    @property
    def share_moved(self) -> float:
        """Share of prompts, 0 to 1, that move as expected by more than 0.01 nats."""
        return float((np.array(self.moved) > NOTHING).mean())

    @property
    def kept(self) -> Mapping[str, float]:
        """By other factor, the share of prompts, 0 to 1, whose answer stays."""
        return {factor: 1 - float(np.mean(changed)) for factor, changed in self.changed.items()}

    @property
    def passes(self) -> bool:
        """Whether it moves its own factor and leaves every other alone."""
        return self.share_moved >= MOVED and min(self.kept.values()) >= KEPT


@dataclass(frozen=True)
class Confirmed:
    """A feature with the edit that training prompts chose, and what it and the controls did on held-out prompts."""

    labelled: Labelled
    hookpoint: str
    sae: str
    verb: str
    """"scale" or "add"."""
    dose: float
    """What its activation is multiplied by, or how many times its mean activation is added."""
    outcomes: Mapping[str, Outcome]
    """By condition: "feature" and the three controls."""

    @property
    def name(self) -> str:
        """Which feature."""
        return f"{self.hookpoint} {self.labelled.latent}"


@dataclass(frozen=True)
class Selectivity:
    """The most selective labelled features of some SAEs, chosen on training prompts, on held-out ones."""

    artifact: Artifact = field(repr=False)
    features: tuple[Confirmed, ...] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Selectivity:
        """Read what `screen` made; ArtifactError where there is no finished screening."""
        artifact = open_study(folder, "selectivity", "screen")
        lines, names = Lines(artifact, FILE), artifact.recipe["saes"]
        found = []
        for unit, told in lines.items():
            if unit.startswith("confirmed"):
                labelled = Labelled(**told["labelled"])
                outcomes = {condition: Outcome(**each) for condition, each in told["outcomes"].items()}
                hookpoint, sae = names[labelled.place][:2]
                found.append(Confirmed(labelled, hookpoint, sae, told["verb"], told["dose"], outcomes))
        return cls(artifact, tuple(found))

    def passing(self, condition: str = "feature") -> dict[str, Any]:
        """Share of features that pass in one of `CONDITIONS`, with its 95 % interval (Wilson) over features.

        Raises:
            KitError: no such condition.
        """
        if condition not in CONDITIONS:
            hint = did_you_mean(condition, CONDITIONS)
            raise KitError(f"condition is {', '.join(CONDITIONS)}, not {condition!r}.{hint}")
        return share([f.outcomes[condition].passes for f in self.features])

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature; shares are of held-out prompts, each with its 95 % interval (Wilson) over them."""
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for each in self.features:
            own, labelled = each.outcomes["feature"], each.labelled
            row: dict[str, Any] = {"hookpoint": each.hookpoint, "feature": str(labelled.latent)}
            row |= {"label": f"{labelled.factor}: {labelled.value}", "AUC": labelled.area}
            row |= {"edit": f"× {each.dose:g}" if each.verb == "scale" else f"+ {each.dose:g} × mean"}
            row |= {"moved" + name[5:]: value for name, value in share(np.array(own.moved) > NOTHING).items()}
            row |= {"median log-odds": float(np.median(own.moved)), "flipped": float(np.mean(own.flipped))}
            worst = min(own.kept, key=lambda factor: own.kept[factor])
            row |= {"least kept": own.kept[worst], "of": worst, "passes": "yes" if own.passes else "no"}
            row |= {f"moved by {c}": each.outcomes[c].share_moved for c in CONTROLS}
            rows.append(row | {"prompts": len(own.moved)})
        return rows

    def sentence(self) -> str:
        """What the numbers say."""
        if not self.features:
            return "No feature tells a value of a factor well enough to be edited for it."
        shares = {condition: self.passing(condition) for condition in CONDITIONS}
        own, most = shares["feature"], max(shares[control]["share interval"][1] for control in CONTROLS)
        apart = own["share interval"][0] > most
        controls = ", ".join(f"{control} {written(shares[control], 'share', share=True)}" for control in CONTROLS)
        flips = {c: float(np.mean([np.mean(f.outcomes[c].flipped) for f in self.features])) for c in CONDITIONS}
        flipped = ", ".join(f"{condition} {often:.1%}" for condition, often in flips.items())
        return (
            f"Of the {len(self.features)} features that were the most selective on training prompts, "
            f"{written(own, 'share', share=True)} pass on held-out ones: they move the log-odds of their own value as "
            f"expected on at least {MOVED:.0%} of prompts and leave the answer to every other factor as it was on at "
            f"least {KEPT:.0%}. The same edits along other directions: {controls}; intervals are over features and "
            f"{'stand apart' if apart else 'do not stand apart'}. The answer itself "
            f"follows on so many prompts: {flipped}."
        )

    def plot(self) -> Any:
        """Every feature and control by the two shares that decide (plotly)."""
        points = {
            condition: [
                (min(o.kept.values()), o.share_moved, f"{f.name}, {f.labelled.factor}: {f.labelled.value}")
                for f in self.features
                for o in (f.outcomes[condition],)
            ]
            for condition in CONDITIONS
        }
        return selectivity_map(points, MOVED, KEPT)

    def _repr_html_(self) -> str:
        caption = (
            "Moved: share of held-out prompts on which the log-odds of the label's value go as expected, with 95 % "
            "intervals (Wilson) over prompts. Least kept: of all other factors the lowest share of prompts on which "
            "the judge's answer stays. AUC is on training images, where the labels come from"
        )
        title = html.heading("Which features move their own factor and no other", html.escape(self.sentence()))
        return html.fragment(title, html.table(self.rows(), caption))

    def __repr__(self) -> str:
        return f"Selectivity of {len(self.features)} features: {self.sentence()}" if self.features else "Selectivity: –"

"""Results of an ablation: tables, figures and what a notebook shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.plots import dose_responses, effects_by_group
from sdxl_sae_kit.studies import wording
from sdxl_sae_kit.studies.controls import CONDITIONS, HARDEST, at_step
from sdxl_sae_kit.studies.effects import (
    FeatureEffects,
    Values,
    as_units,
    compare_all,
    compare_feature,
    estimate,
    order_of,
    order_of_all,
)
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.measures import DOSED, MEASURES, MIN_DOSES
from sdxl_sae_kit.studies.statistics import benjamini_hochberg
from sdxl_sae_kit.studies.strips import columns

LINES, PLAN, STRIP = "ablation.jsonl", "plan.json", "feature-{:05d}-{:05d}.webp"
SHOWN = 3
"""Pictures kept of each feature."""
PASSES = 0.05
"""The false discovery rate up to which a feature counts as above every control."""
_OPEN = 2


@dataclass(frozen=True)
class Ablation:
    """Effects of turning features off, one at a time, and of other doses, beside controls.

    A `measure` is "pixel" (mean |difference| of colours 0 to 1, so 0 to 1), "perceptual" (the judge's map, from 0) or
    "semantic" (the judge's distance of what whole pictures show, from 0); the last two are there where the judge has
    them. Methods that take one raise KitError for another.
    """

    artifact: Artifact
    sae: str
    hookpoint: str
    features: tuple[FeatureEffects, ...]
    labelled: Mapping[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    """What features are called, and which factors that names."""

    @classmethod
    def open(cls, folder: Path | str) -> Ablation:
        """Read what `ablate` made; ArtifactError where there is no finished ablation."""
        artifact = open_study(folder, "ablation", "ablate")
        recipe = artifact.recipe
        return cls(artifact, recipe["sae_name"], recipe["hookpoint"], _read(artifact))

    @property
    def measured(self) -> list[FeatureEffects]:
        """The features that were not skipped."""
        return [effects for effects in self.features if not effects.skipped]

    @property
    def doses(self) -> tuple[float, ...]:
        """In order, 0 (ablated) and 1 (as it is) among them."""
        return tuple(self.artifact.recipe["doses"])

    @property
    def steps(self) -> range:
        """The denoising steps that were changed one by one, from 0; none without `by_step`."""
        return range(self.artifact.recipe["steps_alone"])

    @property
    def judge(self) -> str | None:
        """Name of the judge; None where there was none."""
        name: str | None = self.artifact.recipe["judge"]
        return name

    @property
    def measures(self) -> list[str]:
        """Those that this study has."""
        found = self.measured[0].lines[0]["effects"]["ablated"] if self.measured else {"pixel": ()}
        return [measure for measure in MEASURES if measure in found]

    @property
    def factors(self) -> list[str]:
        """Those that the judge tells."""
        return list((self.measured[0].answers[0] if self.measured else None) or ())

    # Tables ---------------------------------------------------------------------------------------------------------

    def rows(self, measure: str = "pixel") -> list[dict[str, Any]]:
        """One row per measured feature, with 95 % bootstrap intervals over prompts (images of one count as one).

        Per condition the effect inside the region; outside, and `locality` = inside / outside, both over the prompts
        that have an outside (`with outside`; NaN below 4); per control the paired difference ablated − control inside,
        and `p`: a one-sided sign-flip test of it. `p` alone is the largest of them, `q` that corrected for the number
        of features by Benjamini–Hochberg. `monotone` is the share of images whose readings (`statistics.read_doses`)
        rise with every dose, which by chance is not rare; `rho` their mean Spearman correlation, by chance about 0;
        compare both with those of the control that is drawn at every dose. The semantic measure is of whole pictures.
        """
        return self._tabulated(self._check(measure))[0]

    def overall(self, measure: str = "pixel") -> dict[str, Any]:
        """The same over all features, each counting once; intervals resample features: images of one are alike.

        Of one feature alone they resample its prompts; so do those of the other tables over features.

        `passing` is the number of features with q ≤ 0.05: those above every control. `on too few prompts` is the number
        of those that cannot be, whatever they do: of n prompts the least p-value is 1 / 2ⁿ.
        """
        return self._tabulated(self._check(measure))[1]

    def _tabulated(self, measure: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if measure not in self._tables:
            dosed = bool(self.measured) and len(self.doses) >= MIN_DOSES
            rows = [compare_feature(effects, measure) for effects in self.measured]
            for row, q in zip(rows, benjamini_hochberg([row["p"] for row in rows]), strict=True):
                row["q"] = q
            for row, effects in zip(rows, self.measured, strict=True):
                row |= order_of(effects, self.doses) if dosed else {}
            passing = {"passing": sum(row["q"] <= PASSES for row in rows)}
            passing["on too few prompts"] = sum(0.5 ** row["prompts"] > PASSES for row in rows)
            order = order_of_all(self.measured, self.doses) if dosed else {}
            self._tables[measure] = rows, compare_all(self.measured, measure) | passing | order
        return self._tables[measure]

    @cached_property
    def _tables(self) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
        return {}

    def dose_rows(self, measure: str = "pixel") -> list[dict[str, Any]]:
        """One row per dose: the effect inside the region of the feature and of the control, over features."""
        self._check(measure)
        return [
            {"dose": dose} | self._beside(lambda effects, c, d=dose: effects.response(c, d, measure))  # type: ignore[misc]
            for dose in self.doses
        ]

    def step_rows(self, measure: str = "pixel") -> list[dict[str, Any]]:
        """One row per denoising step that was changed alone (`by_step=True`): the effect of the feature and control."""
        self._check(measure)
        return [
            {"step": step} | self._beside(lambda effects, c, s=step: effects.inside(at_step(c, s), measure))  # type: ignore[misc]
            for step in self.steps
        ]

    def _beside(self, effect: Callable[[FeatureEffects, str], Values]) -> dict[str, Any]:
        """An effect of the features, of their control, and the paired difference, over features."""
        own, control = (as_units([effect(effects, condition) for effects in self.measured]) for condition in DOSED)
        return estimate("feature", own) | estimate(HARDEST, control) | estimate(f"feature − {HARDEST}", own - control)

    def factor_rows(self, feature: int | None = None) -> list[dict[str, Any]]:
        """One row per factor: the share of images in which the judge's likeliest answer changed, in every condition.

        Of one feature, with intervals over prompts; or over all features, each counting once. Empty where the judge
        tells no factors.

        Raises:
            KitError: the feature was not measured.
        """
        return [{"factor": factor} | self._changed(factor, feature) for factor in self.factors]

    def label_rows(self) -> list[dict[str, Any]]:
        """One row per labelled feature: how often what its label names changed, and how often anything else did.

        `named` and `others` are shares of images in which the judge's answer changed: to a factor that the label names
        (the mean over them), and to any other. Beside them the same of the controls, with intervals over prompts.
        """
        rows = []
        for effects in self.measured:
            text, named = self.labelled.get(effects.feature, ("", ()))
            told = [factor for factor in named if factor in self.factors]
            if told:
                row: dict[str, Any] = {"feature": effects.feature, "label": text, "names": ", ".join(told)}
                for condition in CONDITIONS:
                    own = np.mean([effects.changed(condition, factor) for factor in told], axis=0)
                    row |= estimate(f"named, {condition}", own)
                    row |= estimate(f"others, {condition}", effects.changed_beyond(condition, told))
                rows.append(row)
        return rows

    def _changed(self, factor: str, feature: int | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for condition in CONDITIONS:
            if feature is None:
                shares = as_units([effects.changed(condition, factor) for effects in self.measured])
            else:
                shares = self._of(feature).changed(condition, factor)
            row |= estimate(condition, shares)
        return row

    def _of(self, feature: int) -> FeatureEffects:
        for effects in self.measured:
            if effects.feature == feature:
                return effects
        raise KitError(f"Feature {feature} was not measured; {[e.feature for e in self.measured]} were. Take of those.")

    def _check(self, measure: str) -> str:
        if measure not in self.measures:
            hint = did_you_mean(str(measure), self.measures)
            raise KitError(f"This study measured {', '.join(self.measures)}, not {measure!r}.{hint}")
        return measure

    # Telling --------------------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """What the numbers say."""
        return " ".join(self._sentences())

    def _sentences(self) -> list[str]:
        if not self.measured:
            return ["No feature fires on images of enough prompts to be measured."]
        row, doses = self.overall(), len(self.doses)
        judged = {measure: self.overall(measure) for measure in self.measures[1:]}
        return [
            wording.effect(row, self._kind),
            wording.passing(row, PASSES),
            wording.locality(row),
            *([wording.judged(self.judge, judged)] if judged else []),
            *([wording.doses(row, doses)] if "rho" in row else []),
            *([wording.factors(self.factor_rows())] if self.factors else []),
        ]

    @property
    def _kind(self) -> str:
        return "images" if self.artifact.recipe["prompts"] else "held-out images"

    def plot(self, measure: str = "pixel") -> Any:
        """Effect inside the region by feature and over all features, with 95 % intervals (plotly)."""
        rows = [*self.rows(measure), self.overall(measure)] if self.measured else []
        groups = [f"feature {row['feature']}" if "feature" in row else "all features" for row in rows]
        series = {c: [(row[c], *row[f"{c} interval"]) for row in rows] for c in CONDITIONS}
        title = f"Turning features of {self.hookpoint} off, against controls"
        return effects_by_group(groups, series, title=title, y=wording.axis(measure))

    def plot_doses(self, measure: str = "pixel") -> Any:
        """Effect inside the region over the dose: means over features with intervals, and each feature (plotly)."""
        rows = self.dose_rows(measure) if self.measured else []
        means = {c: [(row["dose"], row[c], *row[f"{c} interval"]) for row in rows] for c in ("feature", HARDEST)}
        each = {
            f"feature {effects.feature}": [
                (dose, float(effects.response("ablated", dose, measure).mean())) for dose in self.doses
            ]
            for effects in self.measured
        }
        title = f"Dose and response of features of {self.hookpoint}"
        return dose_responses(means, each, title=title, y=wording.axis(measure))

    def plot_steps(self, measure: str = "pixel") -> Any:
        """Effect inside the region of changing one denoising step alone, with 95 % intervals (plotly)."""
        rows = self.step_rows(measure) if self.measured else []
        series = {c: [(row[c], *row[f"{c} interval"]) for row in rows] for c in ("feature", HARDEST)}
        title = f"Turning features of {self.hookpoint} off at one step alone"
        return effects_by_group([f"step {row['step']}" for row in rows], series, title=title, y=wording.axis(measure))

    def __repr__(self) -> str:
        return (
            f"Ablation of {len(self.measured)} features of {self.sae}: "
            f"{sum(len(effects.images) for effects in self.measured)} images at doses "
            f"{', '.join(f'{dose:g}' for dose in self.doses)}, {len(CONDITIONS) - 1} controls"
        )

    def _repr_html_(self) -> str:
        skipped = (f"Feature {e.feature} was skipped: {e.skipped}." for e in self.features if e.skipped)
        paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in [*self._sentences(), *skipped])
        title = f"<h3>Ablation at {html.words(self.hookpoint)}</h3>"
        pictures = [self._pictures(effects) for effects in self.measured]
        rest = [html.folded(f"Pictures of the other {len(pictures) - _OPEN} features", "".join(pictures[_OPEN:]))]
        return html.fragment(
            title, paragraphs, *self._html_tables(), *pictures[:_OPEN], *(rest if len(pictures) > _OPEN else ())
        )

    def _html_tables(self) -> list[str]:
        if not self.measured:
            return []
        tables = [html.table(wording.effect_table(self.rows()), wording.EFFECTS)]
        if len(self.doses) >= MIN_DOSES:
            tables.append(html.table(wording.dose_table({m: self.dose_rows(m) for m in self.measures}), wording.DOSES))
            order = html.table(wording.order_table(self.rows()), wording.ORDER)
            tables.append(html.folded("How well pictures follow the dose, feature by feature", order))
        tables += [html.table(wording.step_table(self.step_rows()), wording.STEPS)] if self.steps else []
        if self.factors:
            answers = html.table(wording.factor_table(self.factor_rows()), wording.FACTORS)
            tables.append(html.folded("Which of the judge's answers changed", answers))
        labels = self.label_rows()
        return tables + ([html.table(wording.label_table(labels), wording.LABELS)] if labels else [])

    def _pictures(self, effects: FeatureEffects) -> str:
        kept = ", ".join(columns(self.doses))
        rows = []
        for image, prompt, line in zip(effects.images, effects.prompts, effects.lines, strict=True):
            if "gain" in line:
                alt = f"Feature {effects.feature}, {prompt}. Columns: {kept}, ×{line['gain']:,.0f}."
                strip = html.picture(self.artifact.file(STRIP.format(effects.feature, image)).read_bytes(), alt)
                caption = f'<p class="sae-quiet">{html.words(prompt)} (differences ×{line["gain"]:,.0f})</p>'
                rows.append(f'<div class="sae-wide">{strip}</div>{caption}')
        return f"<h4>Feature {effects.feature}</h4>{html.quiet(f'Columns: {kept}.')}{''.join(rows)}"


def _read(artifact: Artifact) -> tuple[FeatureEffects, ...]:
    plan, lines = artifact.read_json(PLAN), Lines(artifact, LINES)
    found = []
    for feature in artifact.recipe["features"]:
        fires = [i for i in plan["features"][str(feature)] if str(feature) in lines[str(i)]["features"]]
        prompts, seeds = ([plan["images"][i][at] for i in fires] for at in (0, 1))
        mine = [lines[str(i)]["features"][str(feature)] for i in fires]
        answers = [lines[str(i)]["answers"] for i in fires]
        other = plan["others"][str(feature)]
        found.append(FeatureEffects(feature, other, fires, prompts, seeds, mine, answers))
    return tuple(found)

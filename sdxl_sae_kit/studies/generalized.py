"""What `generalize` found: tables, figures and a sentence, read from the sums that it kept prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.metrics import bootstrap_intervals
from sdxl_sae_kit.plots import step_lines
from sdxl_sae_kit.studies import carryover
from sdxl_sae_kit.studies.carryover import TRAINED, UNTRAINED
from sdxl_sae_kit.studies.densities import live, lost
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.fidelity import METRICS
from sdxl_sae_kit.studies.lines import Lines, open_study
from sdxl_sae_kit.studies.statistics import wilson

FILE, ARRAYS = "generalization.jsonl", "{}.h5"

Row = dict[str, Any]


@dataclass(frozen=True)
class Generalization:
    """What SAEs trained on a source make of a target: other steps, another model, a fine-tune."""

    artifact: Artifact = field(repr=False)
    hookpoints: tuple[str, ...]
    source: str
    """Model, steps and guidance of what the SAEs were trained on."""
    target: str
    _facts: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Generalization:
        """Read what `generalize` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "generalization", "generalize")
        facts = Lines(artifact, FILE)
        first = next(iter(facts.values()))
        hookpoints = tuple(artifact.recipe["hookpoints"])
        return cls(artifact, hookpoints, first["source"]["name"], first["target"]["name"], facts)

    # Reconstruction and codes ----------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """A row per hookpoint, step, guidance half and who, with 95 % bootstrap intervals over prompts.

        Each of `fidelity.METRICS`, NaN where it is not defined, and `dead share`, the share of latents that fire on
        none of `tokens` tokens (without an interval: fewer tokens always leave more latents dead). The first rows of a
        hookpoint are the reference, `updates of` the source: the same prompts where they are shared.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[Row]:
        return [row for hookpoint in self.hookpoints for row in self._measured(hookpoint)]

    def _measured(self, hookpoint: str) -> Iterator[Row]:
        for place in ("source", "target"):
            about = self._facts[hookpoint][place]
            counts = {name: about[name] for name in ("tokens", "images", "prompts")}
            for who, sums in self._sums(hookpoint, place).items():
                values, ends = _ratio(sums.sum(axis=0)), bootstrap_intervals(sums, _ratio)
                dead = about["dead share"].get(who, [float("nan")] * len(values))
                for row, (step, half) in enumerate(about["rows"]):
                    told: Row = {"hookpoint": hookpoint, "updates of": place, "step": step, "half": half, "who": who}
                    for at, metric in enumerate(METRICS):
                        told |= _estimate(metric, values[row, at], ends[:, row, at])
                    yield told | {"dead share": dead[row]} | counts

    def summary(self) -> list[Row]:
        """Explained variance over all steps of the target together, a row per hookpoint, guidance half and who.

        `SAE − this` is the paired difference, with its 95 % bootstrap interval over prompts.
        """
        return self._summary

    @cached_property
    def _summary(self) -> list[Row]:
        return [row for hookpoint in self.hookpoints for row in self._summed(hookpoint)]

    def _summed(self, hookpoint: str, place: str = "target") -> Iterator[Row]:
        sums, about = self._sums(hookpoint, place), self._facts[hookpoint][place]
        for half in dict.fromkeys(half for _, half in about["rows"]):
            of_half = [at for at, (_, each) in enumerate(about["rows"]) if each == half]
            pooled = {who: each[:, of_half, 0].sum(axis=1) for who, each in sums.items()}
            for who, each in pooled.items():
                row = {"hookpoint": hookpoint, "half": half, "who": who}
                row |= _estimate("explained variance", _ratio(each.sum(axis=0)), bootstrap_intervals(each, _ratio))
                pair = np.stack([pooled[TRAINED][:, 0] - each[:, 0], each[:, 1]], axis=1)
                row |= _estimate("SAE − this", _ratio(pair.sum(axis=0)), bootstrap_intervals(pair, _ratio))
                yield row | {"prompts": about["prompts"]}

    @cached_property
    def _reference(self) -> dict[str, Row]:
        """By hookpoint, what its SAE explains of the source over all its steps, of the cond half where it has both."""
        rows = (row for hookpoint in self.hookpoints for row in self._summed(hookpoint, "source"))
        return {row["hookpoint"]: row for row in rows if row["who"] == TRAINED}

    def plot(self) -> Any:
        """Explained variance over steps, a panel per hookpoint, a line for each who; uncond dashed (plotly)."""
        panels: dict[str, dict[tuple[str, bool], list[tuple[float, float, float, float]]]] = {}
        for hookpoint in self.hookpoints:
            rows = [row for row in self.rows() if row["hookpoint"] == hookpoint]
            known = self._reference.get(hookpoint)
            told = f"; in the source {html.short(known['explained variance'])}" if known else ""
            lines = panels.setdefault(f"{hookpoint}{told}", {})
            for row in rows:
                if row["updates of"] == "target":
                    line = lines.setdefault((row["who"], self._dashed(row["half"])), [])
                    line.append((row["step"], row["explained variance"], *row["explained variance interval"]))
        return step_lines(panels, title=f"SAEs of {self.source} on {self.target}", y="explained variance")

    # Labels ----------------------------------------------------------------------------------------------------------

    def labels(self) -> list[Row]:
        """How well latents chosen on the source's training images tell held-out images of the target, step by step.

        A row per hookpoint, `group` (each factor, each role of `questions.ROLES`, and all), step, or all together with
        guidance in cond, guidance half and who: the SAE, the untrained one, and the best channel and principal axis,
        chosen and measured in the same way as `recovery` does; of `trained here` those latents that tell it best on the
        target's training images. AUC is the mean over values, and `SAE − this` the paired difference, with 95 %
        bootstrap intervals over prompts; chance is 0.5. Rows with `updates of` the source are of the same images there.
        Empty where nothing is known of what images show.
        """
        return [
            {"hookpoint": hookpoint}
            | {name: tuple(each) if name.endswith("interval") else each for name, each in row.items()}
            for hookpoint in self.hookpoints
            for row in self._facts[hookpoint]["labels"]
        ]

    def chosen(self) -> list[Row]:
        """The latents that tell each value best on the source's training images (`AUC there`), by hookpoint."""
        return [{"hookpoint": h} | row for h in self.hookpoints for row in self._facts[h]["chosen"]]

    # Over time -------------------------------------------------------------------------------------------------------

    def trajectories(self) -> list[Row]:
        """When what chosen latents tell rises: a row per hookpoint, role, who and step (with guidance, of cond).

        `strength` is the mean strength (maximum of z over tokens) on images that show a value minus that on images that
        do not, in standard deviations of the latent, as a mean over the role's values, relative to its greatest over
        the steps (NaN where it is nowhere above 0); `AUC` is the mean of the values'.
        `rises at` is the first step at which AUC − ½ reaches half of its greatest, None where the greatest is not
        surely above ½. All with 95 % bootstrap intervals over prompts; that of a step is the nearest step.
        """
        return [row for hookpoint in self.hookpoints for row in self._over_steps(hookpoint)]

    def _over_steps(self, hookpoint: str) -> Iterator[Row]:
        facts = self._facts[hookpoint]
        steps = list(dict.fromkeys(step for step, _ in facts["target"]["rows"]))
        for told in facts["roles"]:
            for at, step in enumerate(steps):
                row: Row = {"hookpoint": hookpoint, "role": told["role"], "who": told["who"], "step": step}
                for name in ("strength", "AUC"):
                    row |= _estimate(name, told[name][at], told[f"{name} interval"][at])
                rises = [None if end is None else steps[end] for end in (told["rises at"], *told["rises at interval"])]
                row |= {"rises at": rises[0], "rises at interval": tuple(rises[1:])}
                yield row | {name: told[name] for name in ("values", "images")}

    def plot_trajectories(self, hookpoint: str | None = None) -> Any:
        """Relative strength of each role's latents over steps, a panel per hookpoint or of one alone (plotly).

        Raises:
            KitError: nothing is known of what images show, or no such hookpoint.
        """
        shown = self.hookpoints if hookpoint is None else (self._known(hookpoint),)
        panels: dict[str, dict[tuple[str, bool], list[tuple[float, float, float, float]]]] = {h: {} for h in shown}
        for row in self.trajectories():
            if row["hookpoint"] in panels and row["who"] == TRAINED:
                line = panels[row["hookpoint"]].setdefault((row["role"], False), [])
                line.append((row["step"], row["strength"], *row["strength interval"]))
        if not any(panels.values()):
            raise KitError(f"plot_trajectories: there are no labels to follow. {self._without_labels()}")
        y = "lead on images that show it, of its greatest"
        return step_lines(panels, title=f"When what latents tell rises in {self.target}", y=y)

    def trajectory(self, hookpoint: str, latents: int | Sequence[int]) -> list[Row]:
        """Mean activation of one latent or several over the target's held-out tokens, by step and half.

        With 95 % bootstrap intervals over prompts.

        Raises:
            KitError: no such hookpoint or latent.
        """
        chosen = [whole_number("trajectory: a latent", each, least=0) for each in np.atleast_1d(latents).tolist()]
        with self._arrays(self._known(hookpoint)) as file:
            n_latents = file["target/total"].shape[-1]
            if strange := [latent for latent in chosen if latent >= n_latents]:
                raise KitError(
                    f"trajectory: the SAE of {hookpoint} has latents 0 to {n_latents - 1}, not {strange[0]}. Take one."
                )
            total = file["target/total"][()][..., chosen].astype(np.float64)
            images = file["target/images"][()].astype(np.float64)
        about = self._facts[hookpoint]["target"]
        tokens = np.broadcast_to((images * about["tokens"] / about["images"])[:, None, None], total.shape)
        pairs = np.stack([total, tokens], axis=-1)
        values, ends = _ratio(pairs.sum(axis=0)), bootstrap_intervals(pairs, _ratio)
        return [
            {"hookpoint": hookpoint, "latent": latent, "step": step, "half": half}
            | _estimate("mean activation", values[row, at], ends[:, row, at])
            | {"prompts": about["prompts"]}
            for at, latent in enumerate(chosen)
            for row, (step, half) in enumerate(about["rows"])
        ]

    # Features that vanish or appear ----------------------------------------------------------------------------------

    def vanished(self) -> list[Row]:
        """Latents that fire on the source's held-out prompts but hardly on the same prompts in the target.

        See `densities.lost`: at none of the target's steps (with guidance, of cond) does the share of tokens on which
        they fire reach a tenth of that in the source, and the upper end of the ratio's 95 % interval over prompts is
        below ½. Empty where the caches share no images or have different grids.
        """
        return self._lost("source", "target", TRAINED)

    def appeared(self) -> list[Row]:
        """The reverse of `vanished`: latents that fire in the target but hardly in the source."""
        return self._lost("target", "source", TRAINED)

    def turnover(self) -> list[Row]:
        """The share of live latents that vanish and that appear, a row per hookpoint and who, with the untrained SAE's.

        Live latents fire on at least 5 prompts at the step where they are densest; the intervals are Wilson's over
        latents, taken as independent.
        """
        return self._turnover

    @cached_property
    def _turnover(self) -> list[Row]:
        rows = []
        for hookpoint in filter(self._comparable, self.hookpoints):
            for who in (TRAINED, UNTRAINED):
                row: Row = {"hookpoint": hookpoint, "who": who}
                for name, here, there in (("vanished", "source", "target"), ("appeared", "target", "source")):
                    n = len(live(self._fired(hookpoint, here, who)))
                    gone = sum(each["hookpoint"] == hookpoint for each in self._lost(here, there, who))
                    value, ends = wilson(gone, n) if n else (math.nan, (math.nan, math.nan))
                    row |= {f"live in the {here}": n, name: value, f"{name} interval": ends}
                rows.append(row)
        return rows

    def _lost(self, here: str, there: str, who: str) -> list[Row]:
        if (here, who) not in self._gone:
            self._gone[here, who] = [
                {"hookpoint": hookpoint} | {_placed(name, here, there): value for name, value in row.items()}
                for hookpoint in filter(self._comparable, self.hookpoints)
                for row in lost(
                    self._fired(hookpoint, here, who), self._fired(hookpoint, there, who), self._tokens(hookpoint)
                )
            ]
        return self._gone[here, who]

    @cached_property
    def _gone(self) -> dict[tuple[str, str], list[Row]]:
        return {}

    # Telling it ------------------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """What the numbers say."""
        first = self._facts[self.hookpoints[0]]["target"]
        parts = [
            f"SAEs trained on {self.source}, used unchanged on {self.target} ({first['images']} held-out images of "
            f"{first['prompts']} prompts; in brackets 95 % bootstrap intervals).",
            carryover.reconstruction(self.summary(), self._reference),
        ]
        compared = [row for row in self.rows() if self._comparable(row["hookpoint"]) and row["half"] != "uncond"]
        parts += [carryover.codes([row for row in compared if row["updates of"] == "target"])] if compared else []
        parts += [carryover.labels(rows)] if (rows := self.labels()) else [self._without_labels()]
        parts += [carryover.rises(rows)] if (rows := self.trajectories()) else []
        parts += [carryover.turnover(rows)] if (rows := self.turnover()) else []
        return " ".join([*parts, *self._not_compared()])

    def _without_labels(self) -> str:
        return f"Labels are left out: {self._facts[self.hookpoints[0]]['no labels']}"

    def _not_compared(self) -> Iterator[str]:
        """Why some hookpoints' codes are not compared with the source's."""
        apart: dict[str, list[str]] = {}
        for hookpoint in self.hookpoints:
            apart.setdefault(self._facts[hookpoint]["not compared"], []).append(hookpoint)
        for reason, where in apart.items():
            if reason:
                yield f"Codes are not compared with the source's at {', '.join(where)}: {reason}."

    def _repr_html_(self) -> str:
        summary = [
            {"hookpoint": row["hookpoint"], "half": row["half"], "who": row["who"]}
            | {name: written(row, name) for name in ("explained variance", "SAE − this")}
            for row in self.summary()
        ]
        n = f"{summary and self.summary()[0]['prompts']} prompts"
        labels = [row for row in self.labels() if row["group"] != "factor"]
        # Twenty steps make thousands of rows, which nobody reads and every report would carry.
        labels = [row for row in labels if row["step"] == "all"] or labels
        return html.fragment(
            f"<h3>What carries over to {html.escape(self.target)}</h3><p>{html.escape(self.sentence())}</p>",
            html.table(summary, f"Explained variance over all steps, with 95 % bootstrap intervals over {n}"),
            html.table(
                self.turnover(),
                "Shares of live latents that vanish and appear, with Wilson's 95 % intervals over latents",
            ),
            html.folded("Step by step", html.table(self.rows(), "With 95 % bootstrap intervals over prompts")),
            html.folded(
                "Labels by role",
                html.table(
                    labels, "Mean AUC, with 95 % bootstrap intervals over prompts; `labels()` has every step and factor"
                ),
            )
            if labels
            else "",
        )

    def _sums(self, hookpoint: str, place: str) -> dict[str, NDArray[np.float64]]:
        """(prompt, row, metric, 2) by who, in the order in which they were measured."""
        with self._arrays(hookpoint) as file:
            measured = self._facts[hookpoint][place]["who"]
            return {who: file[f"{place}/sums/{who}"][()] for who in measured}

    def _fired(self, hookpoint: str, place: str, who: str) -> NDArray[np.int32]:
        with self._arrays(hookpoint) as file:
            return np.asarray(file[f"shared/{place}/{who}"])

    def _tokens(self, hookpoint: str) -> NDArray[np.int64]:
        with self._arrays(hookpoint) as file:
            return np.asarray(file["shared/tokens"])

    def _arrays(self, hookpoint: str) -> Any:
        return open_checked(self.artifact.file(ARRAYS.format(hookpoint)))

    def _comparable(self, hookpoint: str) -> bool:
        return not self._facts[hookpoint]["not compared"]

    def _dashed(self, half: str) -> bool:
        halves = {each for _, each in self._facts[self.hookpoints[0]]["target"]["rows"]}
        return half == "uncond" and len(halves) > 1

    def _known(self, hookpoint: str) -> str:
        if hookpoint not in self.hookpoints:
            raise KitError(
                f"This study is of {', '.join(self.hookpoints)}, not of {hookpoint!r}. Take one of these."
                f"{did_you_mean(str(hookpoint), self.hookpoints)}"
            )
        return hookpoint


def _ratio(sums: Float[np.ndarray, "*number 2"]) -> NDArray[np.float64]:
    """Numerator over denominator; NaN where nothing was measured."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _estimate(name: str, value: Any, ends: Any) -> Row:
    """A number with its interval; None, as JSON has it, is NaN."""
    value, low, high = np.array([value, *ends], dtype=np.float64)
    return {name: float(value), f"{name} interval": (float(low), float(high))}


def _placed(name: str, here: str, there: str) -> str:
    """A key of `densities.lost`, with the places' names."""
    return name.replace("there", f"in the {there}").replace("here", f"in the {here}")

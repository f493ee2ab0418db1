"""What a study of block specialisation found: tables with controls and intervals, sentences from them, and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.maps import block_flow, cluster_map, response_map
from sdxl_sae_kit.plots import interval_lines
from sdxl_sae_kit.studies import claims as tests
from sdxl_sae_kit.studies.agreements import Cells, agreement
from sdxl_sae_kit.studies.cluster_views import ClusterView, sheet
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.lines import open_study
from sdxl_sae_kit.studies.statistics import wilson

TABLES, ARRAYS = "specialization.json", "specialization.h5"

Row = dict[str, Any]


@dataclass(frozen=True)
class Specialization:
    """What the features of several hookpoints respond to and cause, their clusters, and how hookpoints differ."""

    artifact: Artifact = field(repr=False)
    hookpoints: Sequence[str]
    clusters: Sequence[str]
    """Names, after the two descriptors in which each cluster's centre stands out most; the largest cluster first."""
    stable_number: int | None
    """The most stable number of clusters, 1 where none is more stable than chance; None where a number was given."""
    stability: Sequence[Mapping[str, Any]] = field(repr=False)
    """A row per number of clusters tried, none where it was given: see `clustering.measure_stability`."""
    information: Sequence[Mapping[str, Any]] = field(repr=False)
    """Rows that say what clusters tell of hookpoints, in bits: see `contrasts.association`. The first is the main one,
    the others are by those descriptors alone that controls have too, with the features' lead as `gap`."""
    effects: Sequence[Mapping[str, Any]] = field(repr=False)
    """What `rows` gives."""
    claims: Sequence[Mapping[str, Any]] = field(repr=False)
    """The published claims with outcome and parts: see `claims.weigh_claims`."""
    robustness: Sequence[Mapping[str, Any]] = field(repr=False)
    """The main row of `information` when the analysis is done in other ways: see `robustness.vary`."""

    @classmethod
    def open(cls, folder: Path | str) -> Specialization:
        """Read what `specialize` made; ArtifactError where there is no finished study of that kind."""
        artifact = open_study(folder, "block specialisation", "specialize")
        return cls(artifact, **_with_pairs(artifact.read_json(TABLES)))

    def rows(self) -> list[Row]:
        """A row per descriptor and block: `mean`, and the standardised difference from the other blocks, `effect`.

        With its 95 % interval and `q`; and, as `untrained effect` and so on, the controls' (see `contrasts.contrasts`).
        """
        return [dict(row) for row in self.effects]

    def claim_rows(self) -> list[Row]:
        """A row per part of each published claim that was asked, with n, intervals and controls."""
        return tests.part_rows([dict(claim) for claim in self.claims])

    def verdicts(self) -> list[Row]:
        """The outcome of each published claim and what it rests on."""
        keys = ("block", "claim", "outcome")
        return [{k: claim[k] for k in keys} | {"why": tests.claim_sentence(dict(claim))} for claim in self.claims]

    def shares(self) -> list[Row]:
        """A row per hookpoint and cluster: the share of the hookpoint's features, with Wilson's 95 % interval."""
        rows, f = [], self.features
        for at, hookpoint in enumerate(self.hookpoints):
            mine = f["cluster"][f["hookpoint"] == at]
            for number, name in enumerate(self.clusters):
                share, interval = wilson(int((mine == number).sum()), len(mine))
                row: Row = {"hookpoint": hookpoint, "cluster": name, "share": share, "share interval": interval}
                rows.append(row | {"features": len(mine)})
        return rows

    @cached_property
    def features(self) -> dict[str, Any]:
        """Arrays over features.

        `hookpoint` and `cluster` (indices), `feature`, `position` (in the plane), `descriptors` in the order of the
        rows, and `central`, the distance from the cluster's centre.
        """
        with open_checked(self.artifact.file(ARRAYS)) as file:
            return {name: file[name][()] for name in file if not name.startswith("picture")}

    def picture(self, at: int) -> bytes:
        """WebP of the three strongest images of a feature, by its place in `features`, over their heat maps."""
        with open_checked(self.artifact.file(ARRAYS)) as file:
            ends = file["picture_ends"]
            return bytes(file["pictures"][int(ends[at - 1]) if at else 0 : int(ends[at])].tobytes())

    def agreement(self, probes: Iterable[Mapping[str, Any]], damage: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Do features agree with the blocks themselves on which block matters for which factor (Spearman's ρ)?

        A row for the features' responses and the probes of whole updates, the features' causes and the damage done by
        leaving blocks out, and the responses and that damage: see `agreements.agreement`. AUCs count as their logits,
        as most are near 1.

        Args:
            probes: rows of `probes.probe`.
            damage: `BlockRanking.damage()`, of which only these hookpoints count.
        """
        read = {(str(row["hookpoint"]), str(row["factor"])): _logit(float(row["AUC"])) for row in probes}
        hurt = {(str(r["block"]), f): float(v) for r in damage for f, v in r.items() if f != "block"}
        responses, causes = (self._cells(verb) for verb in ("responds to ", "changes "))
        pairs: list[tuple[str, Cells, Cells]] = [
            ("features' responses and probes of the update", responses, read),
            ("features' causes and block ablation", causes, hurt),
            ("features' responses and block ablation", responses, hurt),
        ]
        seed = int(self.artifact.recipe["seed"])
        return [{"agreement of": name} | agreement(one, other, seed) for name, one, other in pairs if one and other]

    def _cells(self, verb: str) -> Cells:
        return {
            (row["block"], row["descriptor"].removeprefix(verb)): row["mean"]
            for row in self.effects
            if row["descriptor"].startswith(verb)
        }

    # What the numbers say ---------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """What the numbers say, and where a difference does not survive a control."""
        main = self.information[0]
        differ = "so hookpoints differ in the features they have" if main["p"] < 0.05 else "no evidence of a difference"
        return (
            f"{self._on_number()} The cluster of a feature tells {main['bits']:.3f} bits of its hookpoint, "
            f"{main['share']:.0%} of what there is to tell; with shuffled hookpoint labels {main['chance']:.3f} "
            f"(p = {main['p']:.3g}; {main['features']:,} features, {len(self.hookpoints)} hookpoints): {differ}. "
            f"{self._against_controls()} {self._on_robustness()} {self._on_effects()}{self._on_untold()}"
        )

    def _on_untold(self) -> str:
        share = self.information[0]["untold"]
        return f" Where a number is not told ({share:.1%} of them), clusters take the median." if share else ""

    def _on_number(self) -> str:
        if self.stable_number is None:
            return f"Features were put in {len(self.clusters)} clusters, as asked."
        if self.stable_number == 1:
            return (
                "No number of clusters is more stable and tighter than in one Gaussian cloud: the features form no "
                "groups, and the two used here are only a way to cut them apart."
            )
        best = next(row for row in self.stability if row["clusters"] == self.stable_number)
        return (
            f"{self.stable_number} clusters are as stable as the best: subsamples agree on them by "
            f"{written(best, 'agreement')}, in one Gaussian cloud of the same covariance by "
            f"{written(best, 'one cloud')} (adjusted Rand index, {best['pairs']} pairs)."
        )

    def _against_controls(self) -> str:
        beside = [row for row in self.information if "gap" in row]
        told = "; ".join(
            f"{self._own(row)['above']:.0%} against {row['above']:.0%} of {_told(row)}: {_verdict(row)}"
            for row in beside
        )
        dropped = " and ".join(map(str, self.information[0]["too few"]))
        return (
            (f"Above chance, as a share of what there is to tell, it is {told}." if told else "")
            + (f" Too few features to be compared: {dropped}." if dropped else "")
        ).strip()  # fmt: skip

    def _own(self, control: Mapping[str, Any]) -> Mapping[str, Any]:
        """The features' row by the same descriptors as this control's."""
        return next(row for row in self.information[1:] if row["descriptors"] == control["descriptors"])

    def _on_robustness(self) -> str:
        rows = self.robustness[1:]
        kept = sum(row["p"] < 0.05 for row in rows)
        above = [row["above"] for row in rows]
        return (
            f"In {kept} of {len(rows)} variations of the analysis p stays below 0.05, with {min(above):.0%} to "
            f"{max(above):.0%} of what there is to tell above chance."
        )

    def _on_effects(self) -> str:
        told = []
        for hookpoint in self.hookpoints:
            rows = [row for row in self.effects if row["block"] == hookpoint]
            if rows:
                best = max(rows, key=_beyond)
                name = _strongest_control(best)
                beside = f"; {name.removesuffix(' effect')} {written(best, name)}" if name else "; no control"
                told.append(f"{hookpoint} {best['descriptor']} ({written(best, 'effect')}{beside}; of {len(rows)})")
        return (
            "What sets each hookpoint's features apart most beyond controls, in standard deviations, the largest of "
            f"as many descriptors as is said, each interval by itself: {', '.join(told)}."
        )

    # Figures ----------------------------------------------------------------------------------------------------------

    def plot(self) -> Any:
        """Heat map of what features of each block respond to, or of their looks, beside the controls (plotly)."""
        factors = any(row["kind"] == "response" for row in self.effects)
        title = "What features respond to: mean ω²" if factors else "How features look: mean"
        return self._map(("response",) if factors else ("space", "look"), ("", "untrained ", "channels "), title)

    def plot_causes(self) -> Any:
        """Heat map of what turning features of each block off changes, on all their prompts, and beside a random
        direction on the same prompts (plotly).

        Raises:
            KitError: the study measured no causes.
        """
        if all(row["kind"] != "cause" for row in self.effects):
            raise KitError("plot_causes: no causes were measured. Call specialize with prompts_per_feature=1 or more.")
        title = "What turning a feature off changes: mean over features"
        return self._map(("cause",), ("", f"{tests.RANDOM} "), title)

    def _map(self, kinds: Sequence[str], prefixes: Sequence[str], title: str) -> Any:
        told = {(row["descriptor"], row["block"]): row for row in self.effects if row["kind"] in kinds}
        names = list(dict.fromkeys(name for name, _ in told))
        columns = [
            (prefix, hookpoint)
            for prefix in prefixes
            for hookpoint in self.hookpoints
            if any(f"{prefix}mean" in row for (_, block), row in told.items() if block == hookpoint)
        ]
        means = [
            [told.get((name, block), {}).get(f"{prefix}mean", np.nan) for prefix, block in columns] for name in names
        ]
        shown = [prefix + block for prefix, block in columns]
        return response_map(names, shown, np.array(means, dtype=float), title=title)

    def plot_stability(self) -> Any:
        """Stability over the number of clusters, beside that in one Gaussian cloud (plotly).

        Raises:
            KitError: the number of clusters was given, so none was tried.
        """
        if not self.stability:
            raise KitError("plot_stability: the number of clusters was given. Call specialize without clusters.")
        names = {"agreement": "features", "one cloud": "one Gaussian cloud", "gain": "gain"}
        lines = {
            shown: [(row["clusters"], row[name], *row[f"{name} interval"]) for row in self.stability]
            for name, shown in names.items()
        }
        title = "How well clusterings of subsamples agree"
        return interval_lines(lines, title=title, x="clusters", y="adjusted Rand index")

    def plot_clusters(self) -> Any:
        """The features in the plane, coloured by hookpoint, a symbol for each cluster (plotly)."""
        f = self.features
        plane = {"tsne": "t-SNE", "pca": "PCA", "umap": "UMAP"}[self.artifact.recipe["embedding"]]
        return cluster_map(
            f["position"], f["feature"], f["hookpoint"], self.hookpoints, f["cluster"], self.clusters, plane
        )  # fmt: skip

    def plot_flow(self) -> Any:
        """How the features of each hookpoint flow into clusters (plotly)."""
        counts = np.zeros((len(self.hookpoints), len(self.clusters)), dtype=int)
        np.add.at(counts, (self.features["hookpoint"], self.features["cluster"]), 1)
        return block_flow(self.hookpoints, self.clusters, counts)

    def view_clusters(self) -> ClusterView:
        """The map in a live notebook, with the pictures of the feature under the pointer; in an export the sheet."""
        groups = [self.features["hookpoint"] == at for at in range(len(self.hookpoints))]
        return ClusterView(self.plot_clusters(), groups, self._tell, self.sheet())

    def sheet(self, n: int = 2) -> str:
        """HTML of each cluster's most central features, n of every hookpoint, with their strongest images."""
        return sheet(self.features, self.hookpoints, self.clusters, self.picture, n)

    def _tell(self, at: int) -> tuple[str, bytes]:
        """What is said of the feature at this place, and its pictures."""
        f = self.features
        name = f"{self.hookpoints[f['hookpoint'][at]]}, feature {f['feature'][at]}"
        return f"{name}: cluster {self.clusters[f['cluster'][at]]}", self.picture(at)

    def _repr_html_(self) -> str:
        effects = (
            "Standardised mean difference from the other blocks with 95 % bootstrap interval over features (of one SAE "
            "per block, on the same images); q by Benjamini and Hochberg"
        )
        bits = (
            "What a feature's cluster tells of its hookpoint, in bits; above: beyond chance, as a share of the "
            "entropy of hookpoints; gap: the features' above − the control's, clusters held fixed, 95 % over features"
        )
        return html.fragment(
            f"<h3>Block specialisation</h3><p>{html.escape(self.sentence())}</p>",
            html.table([_readable(row) for row in self.information], bits),
            html.folded("Published claims", html.table(self.verdicts(), tests.RULE)),
            html.folded("Shares of clusters", html.table(self.shares(), "With Wilson's 95 % interval")),
            html.folded("Every descriptor", html.table([self._readable(row) for row in self.effects], effects)),
            html.folded("Variations", html.table([dict(row) for row in self.robustness], "The same in other ways")),
        )

    def _readable(self, row: Mapping[str, Any]) -> Row:
        """A row of the table people see, a dash where a control does not tell."""
        shown: Row = {key: row[key] for key in ("descriptor", "block", "features", "mean", "q")}
        shown["effect"] = written(row, "effect")
        beside = [key for r in self.effects for key in r if key.endswith(" effect")]
        return shown | {key: written(row, key) if key in row else "–" for key in dict.fromkeys(beside)}


def _logit(auc: float) -> float:
    clipped = np.clip(auc, 0.001, 0.999)
    return float(np.log(clipped / (1 - clipped)))


def _told(control: Mapping[str, Any]) -> str:
    return f"{control['of']} ({control['descriptors']}; gap {written(control, 'gap')})"


def _verdict(control: Mapping[str, Any]) -> str:
    low, high = control["gap interval"]
    of_causes = control["of"] == tests.RANDOM
    if low > 0:
        return "more than that tells"
    if high < 0:
        return "a random direction tells more" if of_causes else "so much lies in the updates and need not be learnt"
    return (
        "not told apart, so this may be where and how much is pushed, not which direction" if of_causes
        else "not told apart, so whether it is learnt stays open"
    )  # fmt: skip


def _strongest_control(row: Mapping[str, Any]) -> str | None:
    """The key of the control's effect that goes furthest the same way, if there is any control."""
    keys = [key for key in row if key.endswith(" effect")]
    return max(keys, key=lambda key: float(row[key] * np.sign(row["effect"])), default=None)


def _beyond(row: Mapping[str, Any]) -> float:
    """How much further from 0 the effect is than any control's on the same side."""
    name = _strongest_control(row)
    return float(abs(row["effect"]) - max(row[name] * np.sign(row["effect"]) if name else 0.0, 0.0))


def _readable(row: Mapping[str, Any]) -> Row:
    keys = ("of", "descriptors", "features", "bits", "share", "chance", "above", "p")
    return {key: row[key] for key in keys} | {"gap": written(row, "gap") if "gap" in row else "–"}


def _with_pairs(told: Any) -> Any:
    """Tables as they were before JSON made lists of intervals."""
    if isinstance(told, dict):
        pairs = {key: tuple(value) for key, value in told.items() if key.endswith(" interval") and value}
        return {key: _with_pairs(value) for key, value in told.items()} | pairs
    return [_with_pairs(each) for each in told] if isinstance(told, list) else told

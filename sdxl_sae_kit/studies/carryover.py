"""How generalisation's numbers are told: sentences written from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_sae_kit import html
from sdxl_sae_kit.studies.distances import written
from sdxl_sae_kit.studies.trajectories import MEAN

TRAINED, OWN, UNTRAINED = "SAE", "trained here", "untrained"
PCA_SOURCE, PCA_TARGET = "PCA of the source", "PCA of the target"
CHANNEL, AXIS = "best channel", "best PCA axis of the source"

Rows = Sequence[Mapping[str, Any]]


def reconstruction(summary: Rows, reference: Mapping[str, Mapping[str, Any]]) -> str:
    """How much of the target's updates is explained, half by half, against every control."""
    parts = []
    for half in dict.fromkeys(row["half"] for row in summary):
        rows = [row for row in summary if row["half"] == half]
        told = (
            f"{row['hookpoint']} {written(row, 'explained variance')}"
            + (f" (in the source {html.short(reference[row['hookpoint']]['explained variance'])})" if reference else "")
            for row in rows
            if row["who"] == TRAINED
        )
        parts.append(f"Over all steps of {half} the SAEs explain of the variance: {', '.join(told)}.")
        others = [who for who in dict.fromkeys(row["who"] for row in rows) if who != TRAINED]
        parts += [_against(who, [row for row in rows if row["who"] == who]) for who in others]
    return " ".join(parts)


def _against(who: str, rows: Rows) -> str:
    """In which hookpoints the SAE does better than this one, worse, or cannot be told from it."""
    verdicts: dict[str, list[str]] = {"more": [], "less": [], "not clearly either": []}
    for row in rows:
        low, high = row["SAE − this interval"]
        verdict = "more" if low > 0 else "less" if high < 0 else "not clearly either"
        verdicts[verdict].append(f"{row['hookpoint']} {written(row, 'SAE − this')}")
    told = "; ".join(f"{verdict} at {', '.join(where)}" for verdict, where in verdicts.items() if where)
    return f"Against {who}, paired by prompt (SAE − {who}): {told}."


def codes(rows: Rows) -> str:
    """How alike codes are from the first step on, to the source's and to those of the step before."""
    told = []
    for hookpoint in dict.fromkeys(row["hookpoint"] for row in rows):
        of, control = (
            [row for row in rows if row["hookpoint"] == hookpoint and row["who"] == who] for who in (TRAINED, UNTRAINED)
        )
        same, another = (_ends(of, f"cosine with {which}") for which in ("the source", "another image"))
        random = _ends(control, "cosine with the source")
        told.append(f"{hookpoint} {same} (of another image {another}; untrained {random})" + _adjacent(of))
    return (
        "Cosine of an image's codes with those of the same tokens in the source, first to last step, beside those of "
        f"another image there and of the untrained SAE: {', '.join(told)}."
    )


def _ends(rows: Rows, name: str) -> str:
    """At the first and the last step, once if there is one alone."""
    return " to ".join(dict.fromkeys(written(row, name) for row in (rows[0], rows[-1])))


def _adjacent(rows: Rows) -> str:
    between = [row["cosine of adjacent steps"] for row in rows[1:]]
    return f", of adjacent steps {html.short(min(between))} to {html.short(max(between))}" if between else ""


def labels(rows: Rows) -> str:
    """Whether latents chosen in the source still tell what images show, over all steps, against every control."""
    means = [row for row in rows if (row["group"], row["step"]) == (MEAN, MEAN)]
    source = {row["hookpoint"]: row for row in means if (row["updates of"], row["who"]) == ("source", TRAINED)}
    of = [row for row in means if row["updates of"] == "target"]
    told = (
        f"{row['hookpoint']} {written(row, 'AUC')}"
        + (f" (in the source {written(source[row['hookpoint']], 'AUC')})" if row["hookpoint"] in source else "")
        for row in of
        if row["who"] == TRAINED
    )
    n = means[0]
    others = [who for who in dict.fromkeys(row["who"] for row in of) if who != TRAINED]
    return (
        f"Latents chosen in the source for what images show tell it of held-out images here with a mean AUC over all "
        f"steps ({n['values']} values, {n['images']} images; chance 0.5) of: {', '.join(told)}. "
    ) + " ".join(_against(who, [row for row in of if row["who"] == who]) for who in others)


def turnover(rows: Rows) -> str:
    """Whether this model still thinks in these features."""
    told = (
        f"{row['hookpoint']} {written(row, 'vanished', share=True)} of {row['live in the source']} vanish and "
        f"{written(row, 'appeared', share=True)} of {row['live in the target']} appear (untrained "
        f"{control['vanished']:.1%} and {control['appeared']:.1%})"
        for row, control in zip(rows[::2], rows[1::2], strict=True)
    )
    more = [
        f"{name} at {row['hookpoint']}"
        for row, control in zip(rows[::2], rows[1::2], strict=True)
        for name in ("vanished", "appeared")
        if row[f"{name} interval"][0] > control[f"{name} interval"][1]
    ]
    verdict = f"That is clearly more than for random directions only for: {', '.join(more)}." if more else (
        "That is nowhere clearly more than for random directions."
    )  # fmt: skip
    return f"Of the latents that are live, {'; '.join(told)}. {verdict}"


def rises(rows: Rows) -> str:
    """When what the latents of each role tell rises."""
    first: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["who"] == TRAINED:
            first.setdefault(row["hookpoint"], {}).setdefault(row["role"], row)
    told = (f"{hookpoint} {', '.join(map(_rise, roles.values()))}" for hookpoint, roles in first.items())
    return (
        "The first step at which the AUC above chance reaches half of its greatest, by role: "
        f"{'; '.join(told)}. Roles whose intervals overlap are in no certain order."
    )


def _rise(row: Mapping[str, Any]) -> str:
    if row["rises at"] is None:
        return f"{row['role']} nowhere clearly above chance"
    low, high = row["rises at interval"]
    return f"{row['role']} {row['rises at']} [{low}, {high}]"

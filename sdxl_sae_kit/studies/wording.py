"""How an ablation's numbers are told: sentences and tables for people, written from the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.search import MIN_IMAGES
from sdxl_sae_kit.studies.controls import CONDITIONS, CONTROLS, HARDEST

EFFECTS = (
    "Mean |difference| of colours (0 to 1) inside the region when the feature is off, its ratio to that outside, and "
    "the paired differences from the controls; in brackets 95 % bootstrap intervals over prompts. p: the largest of "
    "the one-sided sign-flip p-values against the controls; q: that corrected for the number of features "
    "(Benjamini–Hochberg)."
)
DOSES = (
    "Effect inside the region by dose (the activation's multiple; 1 is the image as it is): mean over features with "
    f"95 % bootstrap intervals over them, beside the control {HARDEST} at the same doses."
)
ORDER = (
    "Monotone: share of images in which the dose read off the picture rises with every dose; rho: mean Spearman "
    "correlation of reading and dose; with 95 % bootstrap intervals over prompts."
)
STEPS = (
    "Effect inside the region of turning the feature off at one denoising step alone, over features, with intervals."
)
FACTORS = (
    "Share of images in which the judge's likeliest answer changed, in each condition: mean over features with 95 % "
    "bootstrap intervals over them."
)
LABELS = (
    "Share of images in which the judge's answer changed to a factor that the label names, and to any other factor; "
    "off: the feature itself. In brackets 95 % bootstrap intervals over prompts."
)
_AXES = {
    "pixel": "mean |change| inside the region",
    "perceptual": "perceptual change inside the region",
    "semantic": "semantic change of the picture",
}


def axis(measure: str) -> str:
    """What a figure's axis is called."""
    return _AXES[measure]


def effect(row: Mapping[str, Any], images: str) -> str:
    """How much colours change, against the controls."""
    smaller = [c for c in CONTROLS if not row[f"ablated − {c} interval"][0] > 0]
    verdict = f"not clearly larger than {' or '.join(smaller)}" if smaller else "larger than every control"
    controls = (f"{c} {html.short(row[c])} ({with_interval(row, f'ablated − {c}')})" for c in CONTROLS)
    return (
        f"Turning a feature off changes the colours inside its region by {html.short(row['ablated'])} of their "
        f"range ({html.short(255 * row['ablated'])} of 255 levels), {verdict}. Controls: {', '.join(controls)}, in "
        f"brackets the paired difference with its 95 % interval over {row['over']} ({row['images']} "
        f"{images}). The other feature fires on {row['overlap']:.0%} of the region."
    )


def passing(row: Mapping[str, Any], rate: float) -> str:
    """How many features are above every control by themselves, and how many could not have been."""
    few = row["on too few prompts"]
    least = math.ceil(-math.log2(rate))
    unable = f" Of these features {few} could not: of fewer than {least} prompts no p-value is below {rate:g}."
    return (
        f"By themselves {row['passing']} of {row['features']} features exceed every control at a false discovery rate "
        f"of {rate:.0%}: one-sided sign-flip tests over prompts, the largest p-value of the controls, corrected for "
        f"the number of features by Benjamini–Hochberg.{unable if few else ''}"
    )


def locality(row: Mapping[str, Any]) -> str:
    """How much more changes inside than outside."""
    if np.isnan(row["ablated locality"]):
        return "There is no outside to compare with: they fire all over the image, or nothing changes elsewhere."
    controls = ", ".join(f"{c} {with_interval(row, f'{c} locality')}" for c in CONTROLS)
    own = with_interval(row, "ablated locality")
    return (
        f"The change inside the region is {own} times that outside; for the controls: {controls} (over "
        f"{row['with outside']} of {row['over']}, those with some outside, features on {MIN_IMAGES} prompts or more)."
    )


def judged(judge: str | None, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the judge's measures say, beside the control that comes nearest."""
    parts = []
    for measure, row in rows.items():
        nearest = max(CONTROLS, key=lambda c: float(row[c]))
        difference = with_interval(row, f"ablated − {nearest}")
        parts.append(
            f"the {_AXES[measure]} is {html.short(row['ablated'])} ({nearest}, the largest control: "
            f"{html.short(row[nearest])}; difference {difference}; {row['passing']} features exceed every control)"
        )
    return f"By the {judge}, {' and '.join(parts)}."


def doses(row: Mapping[str, Any], n: int) -> str:
    """Whether pictures follow the dose."""
    share, control = with_interval(row, "monotone"), with_interval(row, f"monotone, {HARDEST}")
    rho, other = with_interval(row, "rho"), with_interval(row, f"rho, {HARDEST}")
    return (
        f"Read off each picture by a line through the pictures of the other doses, the {n} doses are in their order in "
        f"{share} of images on average over features (share 0 to 1), and Spearman's ρ of reading and dose is {rho} "
        f"(by chance about 0). Along the direction of {HARDEST} they are {control} and {other}: that "
        "a picture follows the dose is no proof that the feature means something; how far it moves is told above."
    )


def factors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which of the judge's answers changes most."""
    most = max(rows, key=lambda row: float(row["ablated"]))
    nearest = max(CONTROLS, key=lambda c: float(most[c]))
    return (
        f"Of {len(rows)} factors, the judge's answer changes most often for {most['factor']}: in a share of "
        f"{with_interval(most, 'ablated')} of images, on average over features ({nearest}, the largest control: "
        f"{with_interval(most, nearest)})."
    )


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """Value and interval; a dash for what could not be estimated."""
    value, low, high = ("–" if np.isnan(x) else html.short(x) for x in (row[name], *row[f"{name} interval"]))
    return value if value == "–" else f"{value} [{low}, {high}]"


# Tables ---------------------------------------------------------------------------------------------------------------


def effect_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per feature."""
    titles = {"inside / outside": "ablated locality"} | {f"ablated − {c}": f"ablated − {c}" for c in CONTROLS}
    table = []
    for row in rows:
        shown = {"feature": str(row["feature"]), "images": row["images"], "prompts": row["prompts"]}
        shown |= {"inside": row["ablated"], "p": row["p"], "q": row["q"]}
        table.append(shown | {title: with_interval(row, name) for title, name in titles.items()})
    return table


def order_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per feature: whether its pictures follow the dose."""
    names = [f"{name}{of}" for name in ("monotone", "rho") for of in ("", f", {HARDEST}")]
    return [{"feature": str(row["feature"])} | {name: with_interval(row, name) for name in names} for row in rows]


def dose_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row per dose, with every measure."""
    return [
        {"dose": f"{row['dose']:g}"}
        | {f"{m}, {c}": with_interval(rows[m][at], c) for m in rows for c in ("feature", HARDEST)}
        for at, row in enumerate(next(iter(rows.values())))
    ]


def step_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per step."""
    names = ("feature", HARDEST, f"feature − {HARDEST}")
    return [{"step": str(row["step"])} | {name: with_interval(row, name) for name in names} for row in rows]


def factor_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per factor."""
    return [{"factor": row["factor"]} | {c: with_interval(row, c) for c in CONDITIONS} for row in rows]


def label_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per labelled feature."""
    names = {"named, off": "named, ablated", f"named, {HARDEST}": f"named, {HARDEST}"}
    names |= {"others, off": "others, ablated", f"others, {HARDEST}": f"others, {HARDEST}"}
    return [
        {"feature": str(row["feature"]), "label": row["label"], "names": row["names"]}
        | {title: with_interval(row, name) for title, name in names.items()}
        for row in rows
    ]

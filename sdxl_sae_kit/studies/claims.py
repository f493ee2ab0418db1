"""Claims about four blocks, restated as tests on descriptors: what a block's features respond to and what they cause.

The claims are those of arXiv 2410.22366. A part of a claim is a group of descriptors, each standardised (mean 0 and
deviation 1 over the trained features of all blocks, for untrained features and channels as well; a random direction and
the features beside it each over their own, as random directions change less by nature). Its statistic, `lead`, is the
mean over the block's features minus the mean over the other blocks', of those of which every descriptor is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from sdxl_sae_kit.questions import ROLES
from sdxl_sae_kit.studies.clustering import moments
from sdxl_sae_kit.studies.contrasts import Pool, lead, resample

RULE = (
    "A part holds where the 95 % bootstrap interval of the lead is above 0 and so is that of the gap, the lead minus a "
    "control's, for each control. It fails where the interval of the lead or of a gap is below 0. A claim is supported "
    "if all its parts hold, not supported if one fails, and otherwise, also where a part could not be measured, "
    "undecided. Each interval is by itself, not corrected for how many there are, and over features alone, drawn "
    "within blocks: those of one SAE per block, on the same images. Other SAEs or images may tell another story."
)

TRAINED, SAME_PROMPT, RANDOM = "trained", "same prompts", "random direction"
"""Pools of features: of the SAEs, the same with what they change on the prompts of the random direction, and that."""

BREADTH = "breadth of response"
"""Entropy of a feature's explained variances over factors, as a share of the most possible; told of features of which
factors explain 5 % or more, summed."""

_SOME = 0.05

How = Literal["more", "less", "extreme"]
Terms = tuple[tuple[How, str], ...]
"""Descriptors, and whether the claim says there should be more, less, or more of what is far from the mean."""
Row = dict[str, Any]
_Weights = Float[np.ndarray, "sample feature"]


@dataclass(frozen=True)
class Part:
    """A part of a claim: what should be higher at the block than elsewhere."""

    words: str
    terms: Terms
    pictures: Terms = ()
    """What is asked instead where none of the terms is described, as of prompts that tell other factors or none."""


@dataclass(frozen=True)
class Claim:
    """What a block's features are said to do."""

    role: str
    parts: tuple[Part, ...]


def _all(verb: str, role: str) -> Terms:
    return tuple(("more", f"{verb} {factor}") for factor in ROLES[role])


_FACTORS = tuple(factor for factors in ROLES.values() for factor in factors)

CLAIMS = {
    "down.2.1": Claim(
        "composition, layout",
        (
            Part("respond to composition", _all("responds to", "composition"), (("more", "same place"),)),
            Part("change composition", _all("changes", "composition"), (("more", "coarse share"), ("more", "spread"))),
        ),
    ),
    "mid.0": Claim(
        "abstract",
        (
            Part("respond to no single factor", (("more", BREADTH),), (("less", "alike"),)),
            Part(
                "change little of their own",
                tuple(("less", f"changes {factor}") for factor in _FACTORS),
                (("less", "change inside"),),
            ),
        ),
    ),
    "up.0.0": Claim(
        "local detail",
        (
            Part("respond to detail", _all("responds to", "detail"), (("more", "texture"),)),
            Part("fire on few tokens", (("less", "active area"),)),
            Part("change detail", _all("changes", "detail"), (("less", "coarse share"),)),
            Part("change what is local and fine", (("less", "spread"), ("less", "coarse share"))),
        ),
    ),
    "up.0.1": Claim(
        "colour, light, style, texture",
        (
            Part(
                "respond to style",
                _all("responds to", "style"),
                (("extreme", "red − green"), ("extreme", "yellow − blue"), ("extreme", "brightness")),
            ),
            Part("change style", _all("changes", "style"), (("more", "colour share"),)),
        ),
    ),
}  # fmt: skip


def weigh_claims(pools: Mapping[str, Pool], seed: int = 0) -> list[Row]:
    """A row per claim: `block`, `claim`, `outcome` ("not asked" without that block) and the rows of its `parts`.

    Args:
        pools: features by what they are: `TRAINED`; controls by their names; of causes `RANDOM` with `SAME_PROMPT`.
        seed: of the bootstrap.
    """
    rows, weights = [], {name: resample(pool, seed) for name, pool in pools.items()}
    for block, claim in CLAIMS.items():
        asked = block in pools[TRAINED].blocks
        parts = [_weigh(block, part, pools, weights) for part in claim.parts] if asked else []
        outcomes = {part["outcome"] for part in parts}
        rows.append({"block": block, "claim": claim.role, "outcome": _verdict(outcomes), "parts": parts})
    return rows


def _verdict(outcomes: set[str]) -> str:
    if not outcomes:
        return "not asked"
    return "not supported" if "fails" in outcomes else "supported" if outcomes == {"holds"} else "undecided"


def _weigh(block: str, part: Part, pools: Mapping[str, Pool], weights: Mapping[str, _Weights]) -> Row:
    trained = pools[TRAINED]
    terms = _known(part, _names(trained))
    at = trained.blocks.index(block)
    row: Row = {"part": part.words, "descriptors": [f"{how} {name}" for how, name in terms]}
    own = {
        name: _lead(block, terms, pool, pool if name in (SAME_PROMPT, RANDOM) else trained, weights[name])
        for name, pool in pools.items() if terms
    }  # fmt: skip
    if (found := own.get(TRAINED)) is None:
        return row | _NOT_MEASURED
    row |= _means(terms, trained, trained.block == at) | _estimate("lead", found.value, found.samples)
    row |= {"features": found.features, "others": found.others}
    controls = list(_against(own))
    return row | {"outcome": _outcome(row, controls), "controls": controls}


def _known(part: Part, names: Sequence[str]) -> Terms:
    """The terms that are described; of pictures only where none is."""
    own = tuple(term for term in part.terms if term[1] in names)
    return own or tuple(term for term in part.pictures if term[1] in names)


def _names(pool: Pool) -> tuple[str, ...]:
    return (*pool.names, BREADTH) if sum(name.startswith("responds to") for name in pool.names) > 1 else pool.names


@dataclass(frozen=True)
class _Lead:
    """The statistic, in every bootstrap sample too, and how many features of the block and of others tell it."""

    value: float
    samples: NDArray[np.float64]
    features: int
    others: int


_NOT_MEASURED: Row = {
    "outcome": "not measured", "lead": None, "lead interval": None, "means": {}, "features": 0, "others": 0,
    "controls": [],
}  # fmt: skip


def _lead(block: str, terms: Terms, pool: Pool, usual: Pool, weights: _Weights) -> _Lead | None:
    """None where fewer than two of the pool's features on either side tell the descriptors."""
    if block not in pool.blocks or not {name for _, name in terms} <= set(_names(pool)):
        return None
    mine = pool.block == pool.blocks.index(block)
    score = np.mean([_score(how, name, pool, usual) for how, name in terms], axis=0)
    n, others = (int(np.isfinite(score[side]).sum()) for side in (mine, ~mine))
    if min(n, others) < 2:
        return None
    return _Lead(float(lead(score, mine, np.ones((1, len(pool))))[0]), lead(score, mine, weights), n, others)


def _means(terms: Terms, pool: Pool, mine: Bool[np.ndarray, "feature"]) -> Row:
    """Each descriptor's means over these features and over the others, in its own unit."""
    columns = {name: _column(pool, name) for _, name in terms}
    return {"means": {name: [float(np.nanmean(of[side])) for side in (mine, ~mine)] for name, of in columns.items()}}


def _score(how: How, name: str, pool: Pool, usual: Pool) -> Float[np.ndarray, "feature"]:
    """A descriptor in deviations from the usual features' mean, turned so that the claim says more."""
    mean, spread = moments(_column(usual, name))
    z = (_column(pool, name) - mean) / spread
    return np.asarray({"more": z, "less": -z, "extreme": np.abs(z)}[how])


def _column(pool: Pool, name: str) -> Float[np.ndarray, "feature"]:
    return _breadth(pool) if name == BREADTH else pool.values[:, pool.names.index(name)]


def _breadth(pool: Pool) -> Float[np.ndarray, "feature"]:
    told = pool.values[:, [name.startswith("responds to") for name in pool.names]]
    total = told.sum(axis=1, keepdims=True)
    p = np.divide(told, total, out=np.full_like(told, np.nan), where=total >= _SOME)
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(axis=1) / np.log(told.shape[1]))


def _against(own: Mapping[str, _Lead | None]) -> Iterator[Row]:
    """Each control's lead, and by how much the features' is larger; of a random direction on the same prompts."""
    for name, found in own.items():
        beside = own.get(SAME_PROMPT if name == RANDOM else TRAINED)
        if name in (TRAINED, SAME_PROMPT) or found is None or beside is None:
            continue
        row = {"control": name} | _estimate("lead", found.value, found.samples)
        yield row | _estimate("gap", beside.value - found.value, beside.samples - found.samples)


def _estimate(name: str, value: float, samples: NDArray[np.float64]) -> Row:
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return {name: value, f"{name} interval": (float(low), float(high))}


def _outcome(row: Row, controls: Sequence[Row]) -> str:
    intervals = [row["lead interval"], *(control["gap interval"] for control in controls)]
    if any(high < 0 for _, high in intervals):
        return "fails"
    return "holds" if all(low > 0 for low, _ in intervals) else "open"


def part_rows(claims: Sequence[Row]) -> list[Row]:
    """A row per part of every claim that was asked: raw means, and the lead of the features and of each control."""
    names = list(dict.fromkeys(c["control"] for claim in claims for part in claim["parts"] for c in part["controls"]))
    rows = []
    for claim in claims:
        for part in claim["parts"]:
            leads = {c["control"]: _written(c) for c in part["controls"]}
            rows.append(
                {"block": claim["block"], "its features": part["part"], "measured by": ", ".join(part["descriptors"])}
                | {"means": _written_means(part["means"]), "lead": _written(part)}
                | {name: leads.get(name, "–") for name in names}
                | {"features": part["features"], "others": part["others"], "part": part["outcome"]}
            )  # fmt: skip
    return rows


def _written(row: Row, name: str = "lead") -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{name} interval"]
    return f"{row[name]:+.2f} [{low:+.2f}, {high:+.2f}]"


def _written_means(means: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name} {own:.3g} against {others:.3g}" for name, (own, others) in means.items()) or "–"


def claim_sentence(claim: Row) -> str:
    """The outcome of a claim and what it rests on: leads, and the gap to the control that comes nearest."""
    told = "; ".join(f"{p['part']}: {p['outcome']} ({_written(p)}{_nearest(p['controls'])})" for p in claim["parts"])
    return f"{claim['block']} – {claim['claim']}: {claim['outcome']}{f' ({told})' if told else ''}."


def _nearest(controls: Sequence[Row]) -> str:
    if not controls:
        return ""
    control = min(controls, key=lambda row: float(row["gap interval"][0]))
    return f"; gap to {control['control']} {_written(control, 'gap')}"

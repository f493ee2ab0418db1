"""What matching two SAEs found: which latent is which, how alike they are, and which have no counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from numpy.typing import NDArray

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.metrics import bootstrap_interval, partners, shares_above, with_partners
from sdxl_sae_kit.plots import distributions

Basis = Literal["decoder", "codes"]
Side = Literal["one", "other"]
Row = dict[str, Any]

SIMILARITIES: Mapping[Basis, str] = {"decoder": "cosine", "codes": "correlation"}
CONTROLS = ("shuffled", "untrained")
BEYOND = 0.95
"""A latent has a counterpart if its best similarity is beyond this share of those in the shuffled control."""


@dataclass(frozen=True)
class Matches:
    """Latents of two SAEs matched one to one, in one basis under one condition."""

    partners: Int[np.ndarray, " latent"]
    """For each latent of the first, the place of its partner among those of the second; −1 if it was left over."""
    similarities: Float[np.ndarray, " latent"]
    """With the partner, −1 to 1; NaN if it was left over."""
    best: Mapping[Side, Float[np.ndarray, " latent2"]]
    """Of each latent of either SAE, the similarity with the most similar of the other, however many share that."""

    @classmethod
    def of(cls, similarity: Float[np.ndarray, "latent latent2"]) -> Matches:
        """Match by a matrix of similarities."""
        matched = partners(similarity)
        best: Mapping[Side, Any] = {"one": similarity.max(axis=1), "other": similarity.max(axis=0)}
        return cls(matched, with_partners(similarity, matched), best)

    @property
    def found(self) -> Float[np.ndarray, " match"]:
        """Similarities of those that have a partner."""
        similarities: NDArray[np.float64] = self.similarities[self.partners >= 0]
        return similarities


@dataclass(frozen=True)
class Compared:
    """What matching found in one basis."""

    latents: Mapping[Side, Int[np.ndarray, " latent"]]
    """Which of each SAE were compared."""
    conditions: Mapping[str, Matches]
    """`trained`, and the controls `shuffled` and `untrained`."""

    @property
    def partners(self) -> dict[int, tuple[int, float]]:
        """Latent of the first SAE → its partner in the second, and their similarity."""
        trained, theirs = self.conditions["trained"], self.latents["other"]
        return {
            int(latent): (int(theirs[at]), float(similarity))
            for latent, at, similarity in zip(self.latents["one"], trained.partners, trained.similarities, strict=True)
            if at >= 0
        }

    @property
    def left_over(self) -> int:
        """Latents without a partner, as one of the SAEs has more to be matched."""
        return abs(len(self.latents["one"]) - len(self.latents["other"]))

    def unmatched(self, side: Side) -> Int[np.ndarray, " latent"]:
        """Latents whose best similarity is not beyond 95 % of those in the shuffled control."""
        bound = np.quantile(self.conditions["shuffled"].best[side], BEYOND)
        alone: NDArray[np.int64] = self.latents[side][self.conditions["trained"].best[side] <= bound]
        return alone


@dataclass(frozen=True)
class Matching:
    """The latents of two SAEs, matched one to one."""

    one: str
    """Name of the first SAE."""
    other: str
    """Name of the second."""
    bases: Mapping[Basis, Compared] = field(repr=False)
    n_images: int
    """Images whose codes were compared; 0 without codes."""

    def rows(self) -> list[Row]:
        """A row per basis and condition: similarity of matched latents, and the shares of them above 0.7 and 0.9.

        Intervals are 95 % bootstrap intervals over matched latents, taken as independent, which matching makes only
        roughly true. `left over` counts latents without a partner, as one of the two SAEs has more to be matched.
        """
        return [
            {"basis": basis, "similarity": SIMILARITIES[basis], "condition": condition}
            | {"mean": float(made.found.mean()), "mean interval": bootstrap_interval(made.found)}
            | shares_above(made.found)
            | {"latents": len(made.found), "left over": compared.left_over}
            for basis, compared in self.bases.items()
            for condition, made in compared.conditions.items()
        ]

    def pairs(self) -> list[Row]:
        """A row per alive latent of the first SAE: its partners in the second by decoder and by codes; – for none.

        `agree` says whether both bases name the same one.
        """
        found = {basis: compared.partners for basis, compared in self.bases.items()}
        rows = []
        for latent in sorted({int(each) for compared in self.bases.values() for each in compared.latents["one"]}):
            row: Row = {"latent": latent}
            for basis, name in SIMILARITIES.items():
                partner, similarity = found.get(basis, {}).get(latent, ("–", "–"))
                row |= {f"partner by {basis}": partner, name: similarity}
            named = [row[f"partner by {basis}"] for basis in SIMILARITIES]
            rows.append(row | {"agree": "–" if "–" in named else "yes" if named[0] == named[1] else "no"})
        return rows

    def agreement(self) -> Row:
        """Share of latents with a partner in either basis for which both name the same, and that expected by chance.

        The interval is a 95 % bootstrap interval over latents. By chance: if the partners by codes were dealt out anew
        among these latents, (partners that both bases name) / latents² in the mean.

        Raises:
            KitError: the SAEs were compared in one basis only.
        """
        if len(self.bases) < 2:
            raise KitError(
                f"{self.one} and {self.other} were compared by {', '.join(self.bases)} only, so there is nothing to "
                "agree with. Give match SAEs of one width and a cache."
            )
        by_decoder, by_codes = (self.bases[basis].partners for basis in SIMILARITIES)
        shared = sorted(by_decoder.keys() & by_codes.keys())
        named = np.array([[by_decoder[latent][0], by_codes[latent][0]] for latent in shared]).reshape(-1, 2)
        same = (named[:, 0] == named[:, 1]).astype(np.float64)
        by_chance = len(np.intersect1d(*named.T)) / max(1, len(shared)) ** 2
        share = float(same.mean()) if len(same) else float("nan")
        return {"share": share, "share interval": bootstrap_interval(same), "chance": by_chance, "latents": len(shared)}

    def unmatched(self, side: Side) -> Int[np.ndarray, " latent"]:
        """Latents of one of the SAEs without a counterpart in the other: what vanished ("one") or appeared ("other").

        In every basis that was compared, the best similarity, one to one or not, is not beyond what 95 % of the latents
        reach in the shuffled control. A latent that is silent on the images has no codes to go by.

        Raises:
            KitError: a side other than "one" and "other".
        """
        if side not in get_args(Side):
            raise KitError(f"unmatched: {side!r} is no side; it is 'one' ({self.one}) or 'other' ({self.other}).")
        alone, *more = (set(compared.unmatched(side).tolist()) for compared in self.bases.values())
        return np.array(sorted(alone.intersection(*more)), dtype=np.int64)

    def sentence(self) -> str:
        """What the numbers say."""
        told = [self._told(basis) for basis in self.bases]
        if len(self.bases) == 2 and (row := self.agreement())["latents"]:
            told.append(
                f"Decoder and codes name the same partner for {_written(row, 'share')} of {row['latents']} latents "
                f"({row['chance']:.2%} by chance)."
            )
        vanished, appeared = (counted(len(self.unmatched(side)), "latents") for side in get_args(Side))
        return (
            f"{' '.join(told)} No counterpart beyond what 95 % of the control reach: {vanished} of {self.one} and "
            f"{appeared} of {self.other}. Intervals are over latents, taken as independent."
        )

    def _told(self, basis: Basis) -> str:
        rows = {row["condition"]: row for row in self.rows() if row["basis"] == basis}
        trained, most = rows["trained"], max(rows[control]["mean interval"][1] for control in CONTROLS)
        controls = " and ".join(f"{html.short(rows[control]['mean'])} {control}" for control in CONTROLS)
        apart = "" if trained["mean interval"][0] > most else ", from which it does not stand apart"
        where = "" if basis == "decoder" else f" over {self.n_images} images"
        low, high = map(html.short, trained["mean interval"])
        return (
            f"Matched by {basis}{where}, {trained['latents']} latents have a mean {SIMILARITIES[basis]} of "
            f"{html.short(trained['mean'])} [{low}, {high}] ({controls}{apart}), {_written(trained, 'above 0.7')} of "
            "them above 0.7."
        )

    def plot(self) -> go.Figure:
        """How similar matched latents are, by basis, beside the controls (plotly)."""
        series = {
            f"{SIMILARITIES[basis]}, {condition}": made.found
            for basis, compared in self.bases.items()
            for condition, made in compared.conditions.items()
        }
        return distributions(
            series, title=f"{self.one} and {self.other}: how similar are matched latents?", x="similarity"
        )

    def _repr_html_(self) -> str:
        caption = (
            "Mean similarity of matched latents and shares above 0.7 and 0.9, with 95 % bootstrap intervals over "
            "latents. Shuffled: decoder rows or images of the second dealt out anew; untrained: random SAEs"
        )
        title = html.heading(f"Latents of {self.one} and {self.other}", html.escape(self.sentence()))
        return html.fragment(title, html.table(self.rows(), caption))


def _written(row: Row, name: str) -> str:
    low, high = row[f"{name} interval"]
    return f"{row[name]:.1%} [{low:.1%}, {high:.1%}]"

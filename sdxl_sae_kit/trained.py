"""What training gives: SAEs by where they belong and how they were configured, with their metrics and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.plots import training_curves
from sdxl_sae_kit.sae import SAE

Key = tuple[str, str]
"""(hookpoint, name of the configuration)."""


class TrainedSAEs(dict[Key, SAE]):
    """SAEs by (hookpoint, name of the configuration), with their held-out metrics and training curves.

    `saes[key]` raises KitError for a key that is not there, and says why where its training stopped.

    Attributes:
        logs: per SAE, what each twentieth step saw (see `learning.StepLog`).
        failures: per SAE whose training stopped, why.
    """

    def __init__(
        self,
        saes: Mapping[Key, SAE],
        logs: Mapping[Key, list[dict[str, float]]],
        failures: Mapping[Key, str] | None = None,
    ) -> None:
        super().__init__(saes)
        self.logs, self.failures = dict(logs), dict(failures or {})

    def __missing__(self, key: object) -> SAE:
        if key in self.failures:
            raise KitError(f"The training of {key!r} stopped: {self.failures[key]}")
        known = ", ".join(map(repr, self))
        raise KitError(f"No SAE {key!r} here; there are {known}.{did_you_mean(str(key), map(str, self))}")

    def __repr__(self) -> str:
        explained = {key: "undefined" if m is None else f"{m:.4f}" for key, m in self.explained().items()}
        lines = [f"{h} {name}: explained variance {text}" for (h, name), text in explained.items()]
        lines += [f"{h} {name}: stopped. {why}" for (h, name), why in self.failures.items()]
        return "\n".join([f"{counted(len(self), 'trained SAEs')} (measured on held-out tokens)", *lines])

    def explained(self) -> dict[Key, float | None]:
        """Explained variance of each on held-out tokens, at most 1; None where it is not defined."""
        return {key: sae.metrics["explained_variance"] for key, sae in self.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Held-out metrics, one row per SAE."""
        return [
            {"hookpoint": h, "config": name, "kind": sae.config.kind, "k": sae.k, "d_sae": sae.d_sae, **sae.metrics}
            for (h, name), sae in self.items()
        ]

    def _repr_html_(self) -> str:
        shown = {
            "explained variance": "explained_variance",
            "L0": "l0",
            "dead share": "dead_share",
            "tokens": "n_tokens",
        }
        rows = [
            {key: row[key] for key in ("hookpoint", "config", "kind", "k", "d_sae")}
            | {title: row[name] for title, name in shown.items()}
            | {
                "95 % interval": "[{:.4f}, {:.4f}]".format(*interval)
                if (interval := row["explained_variance_interval"])
                else "–"
            }
            for row in self.rows()
        ]
        caption = (
            "Measured on held-out tokens. Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², its interval a "
            "bootstrap over images; L0 the mean number of active latents per token; dead share that of latents which "
            "never fired."
        )
        stopped = [{"hookpoint": h, "config": name, "stopped": why} for (h, name), why in self.failures.items()]
        failed = html.table(stopped, "SAEs whose training stopped") if stopped else ""
        return html.fragment(html.table(rows, caption) + failed)

    def plot(self) -> Any:
        """Training curves (plotly): unexplained share of each batch's variance over steps."""
        return training_curves({f"{hookpoint} {name}": log for (hookpoint, name), log in self.logs.items()})

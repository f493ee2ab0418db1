"""Attributions of latents at tokens: computed from gradients, kept sparse, read again."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.gradients import Differentiated
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.sae import SAE

KINDS = ("trained", "untrained")
"""Whose latents: the SAE's, and those of the control."""


@torch.no_grad()
def pack(made: Differentiated, saes: Mapping[str, Mapping[str, SAE]]) -> memoryview:
    """A part's file: for each kind and hookpoint the active latents of every token, their activation and attribution.

    Attribution = z · ⟨gradient to the update, direction of the latent⟩, which is z · ∂value/∂z.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v108", "v110")) as file:
        file["values"] = made.values.float().cpu().numpy()
        for kind, placed in saes.items():
            for hookpoint, sae in placed.items():
                x, gradient = made.updates[hookpoint].flatten(2, 3), made.gradients[hookpoint].flatten(2, 3)
                latents, activations = sae.encode_sparse(x)
                slopes = (gradient @ sae.directions.T).gather(-1, latents)
                group = file.create_group(f"{kind}/{hookpoint}")
                group.attrs.update(d_sae=sae.d_sae, grid=made.updates[hookpoint].shape[2:4])
                arrays = {"latents": latents.int(), "activations": activations, "attributions": activations * slopes}
                for name, array in arrays.items():
                    numbers = array.cpu().numpy()
                    group.create_dataset(name, data=numbers, compression="gzip", compression_opts=1, shuffle=True)
    return buffer.getbuffer()


@dataclass(frozen=True, eq=False)
class Attributed:
    """Active latents of every token of some images, with activation and attribution, by hookpoint."""

    values: Float[np.ndarray, " image"]
    """The target's number of each clean picture."""
    _entries: Mapping[str, Sequence[Mapping[str, NDArray[Any]]]]
    """By hookpoint, part by part: latents, activations and attributions, each (image, row, token, width)."""
    _d_sae: Mapping[str, int]
    _grids: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, paths: Sequence[Path], kind: str, hookpoints: Sequence[str]) -> Attributed:
        """What `pack` wrote, in the order of these files."""
        values, entries = [], {hookpoint: [] for hookpoint in hookpoints}  # type: ignore[var-annotated]
        d_sae, grids = {}, {}
        for path in paths:
            with open_checked(path) as file:
                values.append(file["values"][()])
                for hookpoint in hookpoints:
                    group = file[kind][hookpoint]
                    entries[hookpoint].append({name: group[name][()] for name in group})
                    d_sae[hookpoint], grids[hookpoint] = int(group.attrs["d_sae"]), tuple(group.attrs["grid"].tolist())
        return cls(np.concatenate(values), entries, d_sae, grids)

    def totals(self, hookpoint: str) -> Float[np.ndarray, "image latent"]:
        """The attribution of every latent in every image, summed over tokens and rows."""
        return self._summed(hookpoint, "attributions")

    def activations(self, hookpoint: str) -> Float[np.ndarray, "image latent"]:
        """The same sums of activations."""
        return self._summed(hookpoint, "activations")

    @lru_cache(maxsize=64)  # noqa: B019
    def _summed(self, hookpoint: str, name: str) -> Float[np.ndarray, "image latent"]:
        self._check(hookpoint)
        sums = []
        for part in self._entries[hookpoint]:
            flat, amounts = (part[each].reshape(len(part[each]), -1) for each in ("latents", name))
            sums += [
                np.bincount(latents, weights=numbers, minlength=self._d_sae[hookpoint])
                for latents, numbers in zip(flat, amounts, strict=True)
            ]
        return np.stack(sums)

    def heat_map(self, hookpoint: str, latent: int, image: int) -> Float[np.ndarray, "height width"]:
        """A latent's attribution at every token of an image, summed over rows.

        Raises:
            KitError: there is no such hookpoint, latent or image.
        """
        self._check(hookpoint)
        for name, asked, n in (("latent", latent, self._d_sae[hookpoint]), ("image", image, len(self.values))):
            if not 0 <= asked < n:
                raise KitError(f"There is no {name} {asked} here; there are 0 to {n - 1}.")
        for part in self._entries[hookpoint]:
            if image < len(part["latents"]):
                amounts = np.where(part["latents"][image] == latent, part["attributions"][image], 0)
                return np.asarray(amounts.sum(axis=(0, 2)).reshape(self._grids[hookpoint]))
            image -= len(part["latents"])
        raise AssertionError  # the image was found to be there

    def ranked(self) -> list[tuple[str, int]]:
        """Every (hookpoint, latent) that fires on these images, of the highest mean attribution first."""
        firing = [
            (h, latent) for h in self._entries for latent in np.flatnonzero(self.activations(h).any(axis=0)).tolist()
        ]
        means = {h: self.totals(h).mean(axis=0) for h in self._entries}
        return sorted(firing, key=lambda each: -float(means[each[0]][each[1]]))

    def choose(self, n: int, seed: int) -> dict[str, list[tuple[str, int]]]:
        """The n of the highest attribution, the n of the lowest, and n others at random.

        Raises:
            KitError: fewer than three times as many fire.
        """
        ranked = self.ranked()
        if len(ranked) < 3 * n:
            raise KitError(
                f"Only {len(ranked)} latents fire on these images, fewer than the {3 * n} to be checked. Give more "
                f"prompts or checked={max(len(ranked) // 3, 2)}."
            )
        others = np.random.default_rng(seed).choice(len(ranked) - 2 * n, size=n, replace=False)
        return {"top": ranked[:n], "bottom": ranked[-n:], "random": [ranked[n + at] for at in sorted(others.tolist())]}

    def _check(self, hookpoint: str) -> None:
        if hookpoint not in self._entries:
            hint = did_you_mean(hookpoint, self._entries)
            raise KitError(f"No attributions at {hookpoint!r}; there are those of {', '.join(self._entries)}.{hint}")

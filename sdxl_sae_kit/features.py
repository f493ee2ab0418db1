"""Feature statistics: what each latent of an SAE does over a whole cache, and the images on which it does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
from jaxtyping import Float, Int, Integer
from numpy.typing import NDArray

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked, is_sae
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, KitError, did_you_mean
from sdxl_sae_kit.evidence import Curve as Curve
from sdxl_sae_kit.evidence import Example as Example
from sdxl_sae_kit.evidence import Histogram as Histogram
from sdxl_sae_kit.evidence import Neighbour as Neighbour
from sdxl_sae_kit.evidence import Ranking as Ranking
from sdxl_sae_kit.measurement import MEMORY, least_memory, measure
from sdxl_sae_kit.metrics import bootstrap_interval
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.summary import FILE, open_part, part_name

_OFTEN = 5
_PER_LATENT = ("density", "image_density", "mean", "std", "max")


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of every latent of one SAE over all images of one cache, at one denoising step.

    Attributes:
        grid, step: height and width of an update in tokens, and the denoising step, from 0.
        n_images, n_tokens: how many were measured.
        density (d_sae,): share of tokens, 0 to 1, on which the latent fires (z > 0.001).
        image_density (d_sae,): share of images, 0 to 1, on which it fires somewhere.
        mean, std, max (d_sae,): of z over the tokens on which it fires; 0 for a latent that never fired.
        moran, moran_low, moran_high (d_sae,): mean Moran's I of its heat maps (see `Tally`), over the `moran_n` images
            on which it fires and is not the same everywhere, with Student's 95 % interval: near 1 where it fires in
            one patch, near 0 where it is scattered. NaN where there are no such images.

    >>> stats = FeatureStats.measure(saes["up.0.1", "k10"], cache)             # doctest: +SKIP
    """

    artifact: Artifact = field(repr=False)
    sae: str
    """Name of the SAE."""
    hookpoint: str
    grid: tuple[int, int]
    step: int
    n_images: int
    n_tokens: int
    density: Float[np.ndarray, "latent"] = field(repr=False)
    image_density: Float[np.ndarray, "latent"] = field(repr=False)
    mean: Float[np.ndarray, "latent"] = field(repr=False)
    std: Float[np.ndarray, "latent"] = field(repr=False)
    max: Float[np.ndarray, "latent"] = field(repr=False)
    moran: Float[np.ndarray, "latent"] = field(repr=False)
    moran_low: Float[np.ndarray, "latent"] = field(repr=False)
    moran_high: Float[np.ndarray, "latent"] = field(repr=False)
    moran_n: Float[np.ndarray, "latent"] = field(repr=False)

    @classmethod
    @checked
    def measure(
        cls,
        sae: SAE,
        cache: ActivationCache,
        *,
        step: int = 0,
        top: int = 12,
        memory: int = MEMORY,
        store: Store | Path | str | None = None,
    ) -> FeatureStats:
        """Encode the whole cache once and keep statistics, codes and examples; loaded instead if done before.

        It says what it takes before it starts (`plan_measurement` forecasts it without a cache). Killed at any moment,
        it goes on after the last 512 images when called again. Under `accelerate launch` or `torchrun` the processes,
        each of which must call it, share the images; what comes out does not depend on how many there are.

        Args:
            sae: a trained SAE, or one of its `controls`.
            cache: updates of the hookpoint it was trained at; with guidance, the cond half is taken, and `curves` tell
                of all steps and halves.
            step: which denoising step, from 0.
            top: examples kept for each latent and ranking.
            memory: bytes it may take, beside the SAE: at least what one image does. The result does not depend on it.
            store: folder of artifacts.

        Raises:
            ArtifactError: the SAE is of another model or of a hookpoint that the cache does not have, the cache keeps
                only some tokens of each image, another process is measuring the same, or the disk is too small.
            KitError: the cache does not have this step, or an impossible setting.
        """
        check_fit(sae, cache)
        step = whole_number("measure: step", step, least=0)
        cache.row(step)
        top = whole_number("measure: top", top)
        memory = whole_number("measure: memory (bytes)", memory, least=least_memory(sae, cache))
        recipe = {"sae": sae.digest, "name": sae.name, "cache": cache.artifact.digest, "step": step, "top": top}
        artifact = Store.at(store).artifact("features", sae.name.rsplit("-", 1)[0], recipe)
        measure(sae, cache, step, top, memory, artifact)
        return cls.open(artifact.folder)

    @classmethod
    def open(cls, folder: Path | str) -> FeatureStats:
        """Read what `measure` made.

        Raises:
            ArtifactError: no finished feature statistics there.
        """
        artifact = Artifact.open(folder, "features")
        with open_part(artifact.check(FILE)) as file:
            arrays = {name: file[name][()] for name in _PER_LATENT}
            arrays |= {f"moran{end}": file[f"moran/{end[1:] or 'mean'}"][()] for end in ("", "_low", "_high", "_n")}
            a = file.attrs
            arrays |= {name: int(a[name]) for name in ("step", "n_images", "n_tokens")}
            grid = (int(a["height"]), int(a["width"]))
            return cls(artifact=artifact, sae=str(a["sae"]), hookpoint=str(a["hookpoint"]), grid=grid, **arrays)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.density)

    @property
    def alive(self) -> Int[np.ndarray, "alive"]:
        """The latents that fired at least once."""
        return np.flatnonzero(self.density > 0)

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt of every image."""
        with self._file() as file:
            return Prompts.from_jsonl(bytes(file["prompts"][()].tobytes()).decode())

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """What every latent does at each step and in each guidance half that the cache holds."""
        with self._file() as file:
            halves = file.attrs["halves"].tolist()
            rows = [(step, half) for step in file.attrs["steps"].tolist() for half in halves]
            arrays = (file["curves/density"][()], file["curves/mean"][()])
            return tuple(Curve(*row, density, mean) for row, density, mean in zip(rows, *arrays, strict=True))

    @cached_property
    def histogram(self) -> Histogram:
        """How often each latent has which value where it fires, in bins of half a doubling."""
        with self._file() as file:
            return Histogram(file["histogram/edges"][()], file["histogram/counts"][()])

    def examples(self, feature: int, by: Ranking = "max", n: int | None = None) -> list[Example]:
        """The images on which a latent fires most, strongest first: up to n of the `top` that were kept.

        Raises:
            KitError: there is no such latent, or no such ranking.
        """
        _check_ranking(by)
        if n is not None:
            n = whole_number("examples: n", n)
        examples = self._examples(feature, by, n)
        if by == "area":
            tokens = self.grid[0] * self.grid[1]
            return [Example(**{**vars(example), "value": example.value / tokens}) for example in examples]
        return examples

    def sample(self, feature: int) -> list[Example]:
        """Images from all over those on which a latent fires, by maximum, weakest first: up to 12, 3 of each quarter.

        The highest of each twelfth of the ranks is taken; a latent that fires on fewer images shows them all.

        Raises:
            KitError: there is no such latent.
        """
        return self._examples(feature, "sample")

    def _examples(self, feature: int, by: str, n: int | None = None) -> list[Example]:
        self._check(feature)
        texts, seeds = self.prompts.texts, self.prompts.seeds
        with self._file() as file:
            images, values, maps = (
                file[f"examples/{by}/{name}"][feature, :n] for name in ("image", "value", "heat_map")
            )
        images = images[images >= 0]
        return [
            Example(image, texts[image], seeds[image], value, heat_map.astype(np.float32), thumbnail)
            for image, value, heat_map, thumbnail in zip(
                images.tolist(), values.tolist(), maps, self.thumbnails(images), strict=False
            )
        ]

    @cached_property
    def top_images(self) -> Int[np.ndarray, "latent place"]:
        """The images on which every latent is strongest at one token, strongest first; −1 where there are no more."""
        with self._file() as file:
            return np.asarray(file["examples/max/image"][()])

    @cached_property
    def pictured(self) -> Int[np.ndarray, "image"]:
        """Images whose pictures are kept: all of up to 4,096, else those of examples and 1,024 held-out ones."""
        with self._file() as file:
            return np.asarray(file["thumbnails/image"][()])

    def thumbnail(self, image: int) -> bytes:
        """The picture as WebP of at most 160 pixels; empty where it is not kept (see `pictured`)."""
        return self.thumbnails(np.array([image]))[0]

    def thumbnails(self, images: Int[np.ndarray, " image"]) -> list[bytes]:
        """The pictures of some images; empty ones where they are not kept (see `pictured`)."""
        place = np.searchsorted(self.pictured, images)
        ends, pictured = self._ends, self.pictured
        with self._file() as file:
            data = file["thumbnails/bytes"]
            return [
                data[ends[at] : ends[at + 1]].tobytes() if at < len(pictured) and pictured[at] == image else b""
                for at, image in zip(place, images, strict=True)
            ]

    @cached_property
    def _ends(self) -> Int[np.ndarray, " picture"]:
        with self._file() as file:
            return np.concatenate([[0], file["thumbnails/ends"][()]])

    def heat_map(self, feature: int, image: int) -> Float[np.ndarray, "height width"]:
        """A latent's z at every token of any image of the cache.

        Raises:
            KitError: there is no such latent or image.
        """
        self._check(feature)
        indices, values = self._codes(image)
        at_tokens: NDArray[Any] = np.where(indices == feature, values, 0).sum(axis=1, dtype=np.float32)
        return at_tokens.reshape(self.grid)

    def heat_maps(self, image: int) -> Float[np.ndarray, "latent height width"]:
        """Every latent's z at every token of an image of the cache.

        Raises:
            KitError: there is no such image.
        """
        indices, values = self._codes(image)
        dense = np.zeros((self.d_sae, len(indices)), np.float32)
        np.add.at(dense, (indices, np.arange(len(indices))[:, None]), values)  # what pads short codes adds 0
        return dense.reshape(self.d_sae, *self.grid)

    def _codes(self, image: int) -> tuple[Integer[np.ndarray, "token width"], Float[np.ndarray, "token width"]]:
        if not isinstance(image, Integral) or not 0 <= image < self.n_images:
            raise KitError(f"The cache of these statistics has images 0 to {self.n_images - 1}; there is no {image!r}.")
        part, row = divmod(int(image), self._part_images)
        with self._part(part) as file:
            return file["codes/indices"][row], file["codes/values"][row].astype(np.float32)

    def image_activations(self, by: Ranking = "max") -> Float[np.ndarray, "image latent"]:
        """Every latent's maximum (or mean, or share of tokens) over every image: n_images × d_sae × 4 bytes."""
        _check_ranking(by)
        if by not in self._pooled:
            self._pooled[by] = self._by_image(by)
        return self._pooled[by]

    def strengths(self, feature: int) -> Float[np.ndarray, "image"]:
        """A latent's maximum over every image.

        Raises:
            KitError: there is no such latent.
        """
        self._check(feature)
        found = np.zeros(self.n_images, np.float32)
        for tallies in self._tallies():
            mine = tallies["latent"][()] == feature
            found[tallies["image"][()][mine]] = tallies["max"][()][mine]
        return found

    @cached_property
    def _pooled(self) -> dict[Ranking, Float[np.ndarray, "image latent"]]:
        return {}

    def _by_image(self, by: Ranking) -> Float[np.ndarray, "image latent"]:
        dense = np.zeros((self.n_images, self.d_sae), np.float32)
        for tallies in self._tallies():
            dense[tallies["image"][()], tallies["latent"][()]] = tallies[by][()]
        if by == "area":
            dense /= self.grid[0] * self.grid[1]
        return dense

    def _tallies(self) -> Iterator[h5py.Group]:
        for part in range(-(-self.n_images // self._part_images)):
            with self._part(part) as file:
                yield file["tallies"]

    def coactive(self, feature: int, n: int = 8) -> list[Neighbour]:
        """The latents that fire most on the same tokens, by Jaccard index: tokens on which both fire / either does.

        0 to 1, highest first; up to 8. Each has the number of tokens counted as its own `n`.

        Raises:
            KitError: there is no such latent.
        """
        return self._neighbours(feature, "coactive", n)

    def similar(self, feature: int, n: int = 8) -> list[Neighbour]:
        """The latents, among those that fire, whose decoder rows have the highest cosine with this one's; up to 8.

        Raises:
            KitError: there is no such latent.
        """
        return self._neighbours(feature, "similar", n)

    def _neighbours(self, feature: int, kind: str, n: int) -> list[Neighbour]:
        self._check(feature)
        with self._file() as file:
            group = file[kind]
            counted = group.attrs.get("n_tokens")
            found = zip(group["latent"][feature].tolist(), group["value"][feature].tolist(), strict=True)
            n_tokens = None if counted is None else int(counted)
            return [Neighbour(latent, value, n_tokens) for latent, value in found if latent >= 0][
                : whole_number("n", n)
            ]

    def summary(self) -> dict[str, Any]:
        """One row of a table that sets SAEs beside each other: how many latents fire, and where."""
        often = np.round(self.image_density * self.n_images) >= _OFTEN
        moran = self.moran[np.isfinite(self.moran)]
        return {
            "of": self.sae,
            "latents": self.d_sae,
            "fire at all": len(self.alive),
            f"on ≥ {_OFTEN} images": int(often.sum()),
            "median density": float(np.median(self.density[self.alive])) if len(self.alive) else float("nan"),
            "mean Moran's I": float(moran.mean()) if len(moran) else float("nan"),
            "interval": bootstrap_interval(moran),
            "tokens": self.n_tokens,
        }

    def _check(self, feature: int) -> None:
        if isinstance(feature, bool) or not isinstance(feature, Integral) or not 0 <= feature < self.d_sae:
            raise KitError(f"{self.sae} has latents 0 to {self.d_sae - 1}; there is no {feature!r}.")

    @cached_property
    def _part_images(self) -> int:
        with self._file() as file:
            return int(file.attrs["part_images"])

    @contextmanager
    def _part(self, part: int) -> Iterator[h5py.File]:
        try:
            with open_part(self.artifact.file(part_name(part))) as file:
                yield file
        except (OSError, KeyError) as cause:
            raise ArtifactError(
                f"{part_name(part)} of {self.artifact.folder} cannot be read ({cause}). {self.artifact.remedy}"
            ) from None

    def _file(self) -> h5py.File:
        return open_part(self.artifact.file(FILE))

    def __repr__(self) -> str:
        return (
            f"FeatureStats of {self.sae}: {len(self.alive)} of {self.d_sae} latents fire, "
            f"over {self.n_tokens:,} tokens of {self.n_images:,} images"
        )


def _check_ranking(by: str) -> None:
    rankings = get_args(Ranking)
    if by not in rankings:
        raise KitError(f"Images are ranked by {', '.join(rankings)}, not {by!r}.{did_you_mean(str(by), rankings)}")


def check_fit(sae: SAE, cache: ActivationCache) -> None:
    """Refuse an SAE and a cache that do not belong together."""
    if not is_sae(sae):
        raise KitError(f"measure takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
    if not isinstance(cache, ActivationCache):
        raise KitError(f"measure reads a cache from collect, not {cache!r}. Collect some images for it.")
    if sae.hookpoint not in cache.hookpoints:
        raise ArtifactError(
            f"{sae.name} was trained on updates of {sae.hookpoint}; {cache.name} has {', '.join(cache.hookpoints)}. "
            f"Collect {sae.hookpoint} too."
        )
    if cache.layout.tokens_per_image is not None:
        raise ArtifactError(
            f"{cache.name} keeps {cache.layout.tokens_per_image} tokens of each image; heat maps need whole grids. "
            "Collect some images again without tokens_per_image."
        )
    made, trained = ((r["model"], r["revision"]) for r in (cache.recipe, vars(sae.site)))
    if made != trained:
        raise ArtifactError(
            f"{sae.name} was trained on {trained}, but {cache.name} was made by {made}. Use its own cache."
        )

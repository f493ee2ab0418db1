"""What a collection will cost, told before it starts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_sae_kit.amounts import human_bytes, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import ArtifactError, KitError, did_you_mean
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, SDXL
from sdxl_sae_kit.layout import Layout
from sdxl_sae_kit.observation import as_prompts, check_settings, make_recipe, observing, outline
from sdxl_sae_kit.pictures import THUMBNAIL, encode_picture
from sdxl_sae_kit.pipelines import PRESETS, Model
from sdxl_sae_kit.prompts import Prompts

_SIZES = {"stabilityai/sdxl-turbo": 512, "stabilityai/stable-diffusion-xl-base-1.0": 1024}
_TIMED_BATCHES = 3
_FEW_TOKENS = 32
_BYTES_OF_A_PIXEL = {"thumbnails": 0.12, "webp": 0.3, "png": 1.7}  # a guess, until a picture was made


@dataclass(frozen=True)
class CollectionPlan:
    """What a collection will write and how long it will take; n images of which everything else follows."""

    n_images: int
    n_tokens: int
    """Tokens of all hookpoints together."""
    nbytes: int
    """Bytes on disk, of updates and pictures: images × steps × halves × Σ tokens·d_in × bytes of a number, and 1 % or
    less for checksums and index."""
    free: int
    """Bytes free where it will be kept."""
    nbytes_sampled: int
    """Bytes if only 32 tokens of every grid were kept."""
    seconds: float | None = None
    """Time it takes on this machine, as timed on a few batches; None if not timed."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it."""
        return self.nbytes < self.free

    @property
    def advice(self) -> str:
        """What to do where it does not fit; empty where it does."""
        if self.fits:
            return ""
        few = f"tokens_per_image={_FEW_TOKENS} would take {human_bytes(self.nbytes_sampled)}"
        return (
            f"It does not fit: {human_bytes(self.free)} are free.\n"
            + (f"Keep fewer tokens of each image ({few}), or train" if self.nbytes_sampled < self.nbytes else "Train")
            + " online from stream(), which keeps nothing."
        )

    def check_space(self, share: float = 1.0) -> None:
        """Refuse to start what cannot end.

        Raises:
            ArtifactError: no more is free than this share of it (0 to 1) takes.
        """
        if share * self.nbytes >= self.free:
            advice = self.advice or "The disk is full: make room."
            raise ArtifactError(f"{human_bytes(share * self.nbytes)} are to be written.\n{advice}")

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", about {duration(self.seconds)} on this machine"
        text = f"{self.n_images:,} images, {self.n_tokens:,} tokens, {human_bytes(self.nbytes)}{took}"
        return f"{text}.\n{self.advice}" if self.advice else text


def plan_recipe(recipe: Mapping[str, Any], n_images: int, folder: Path, picture: int | None = None) -> CollectionPlan:
    """Forecast a collection of so many images from its recipe and the bytes of a picture, guessed if unknown."""
    layout = Layout.of({"prompts": "", "scheduler": "", "compute_dtype": "", **recipe, "n_images": n_images})
    picture = _guess_picture(recipe) if picture is None else picture
    tokens = sum(map(layout.n_tokens, layout.hookpoints))
    few = replace(layout, tokens_per_image=min(_FEW_TOKENS, layout.tokens_per_image or _FEW_TOKENS))
    pictures = n_images * picture
    while not folder.exists():
        folder = folder.parent
    return CollectionPlan(
        n_images,
        n_images * layout.rows_per_image * tokens,
        _updates_on_disk(layout) + pictures,
        shutil.disk_usage(folder).free,
        _updates_on_disk(few) + pictures,
    )


def _guess_picture(recipe: Mapping[str, Any]) -> int:
    """Bytes of a picture of this size, as photographs have them."""
    pixels = recipe["height"] * recipe["width"]
    if recipe["images"] == "thumbnails":
        pixels = min(pixels, THUMBNAIL**2)
    return int(_BYTES_OF_A_PIXEL.get(recipe["images"], 0) * pixels)


def _updates_on_disk(layout: Layout) -> int:
    shards, rest = divmod(layout.n_images, layout.images_per_shard)
    return shards * layout.nbytes(layout.images_per_shard) + (layout.nbytes(rest) if rest else 0)


@checked
def plan(
    pipe: Any | str,
    prompts: Prompts | Iterable[str] | int,
    hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS,
    *,
    store: Store | Path | str | None = None,
    **settings: Any,
) -> CollectionPlan:
    """Forecast what `collect` with the same arguments will write (within 5 %) and how long it will take.

    Args:
        pipe: a pipeline, which is timed on a few batches; or the name of a real model, whose weights are not needed:
            then no time is told, and the bytes of pictures are a guess.
        prompts: as `collect` takes them, or how many there will be.
        hookpoints: as `collect` takes them.
        store: where it would be kept.
        settings: those of `collect`.

    Raises:
        HookpointError, PromptError, KitError: what `collect` would refuse, or a name of no model that is known here.

    >>> print(plan("stabilityai/sdxl-turbo", 1_500_000, images=None).n_tokens)
    1536000000
    """
    check_settings(settings)
    folder = Store.at(store).root
    if isinstance(pipe, str):
        n = whole_number("prompts", prompts) if isinstance(prompts, int) else len(as_prompts(prompts))
        return plan_recipe(_outline(pipe, n, hookpoints, settings), n, folder)
    some = as_prompts(["a photograph"] * 64 if isinstance(prompts, int) else prompts)
    n = whole_number("prompts", prompts) if isinstance(prompts, int) else len(some)
    recipe = make_recipe(pipe, some, hookpoints, **settings)
    seconds, picture = _timed(pipe, some, recipe)
    return replace(plan_recipe(recipe, n, folder, picture), seconds=n * seconds)


def _outline(name: str, n_images: int, hookpoints: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    if name not in _SIZES:
        raise KitError(
            f"plan knows {', '.join(_SIZES)} by name, not {name!r}. Pass the pipeline that load_pipeline gives."
            f"{did_you_mean(name, _SIZES)}"
        )
    known = SDXL | {hookpoint.path: hookpoint for hookpoint in SDXL.values()}
    names = [each.removeprefix("unet.") for each in ([hookpoints] if isinstance(hookpoints, str) else hookpoints)]
    if unknown := [hookpoint for hookpoint in names if hookpoint not in known]:
        hint = did_you_mean(unknown[0], SDXL)
        raise KitError(f"SDXL has no hookpoint {unknown[0]!r}; it has {', '.join(SDXL)}.{hint}")
    preset, size = PRESETS[name], _SIZES[name]
    model = Model(name, "", preset.num_inference_steps, preset.guidance_scale, size, size)
    return outline(model, [known[hookpoint] for hookpoint in names], 8, n_images, **settings)


def _timed(pipe: Any, prompts: Prompts, recipe: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds per image and bytes of a picture, of the quickest of a few batches."""
    batch = range(min(len(prompts), recipe["batch_size"]))
    layout, seconds = Layout.of(recipe), []
    with observing(pipe, prompts, recipe) as observe:
        for _ in range(_TIMED_BATCHES):
            started = time.perf_counter()
            updates, pictures = observe(batch)
            layout.encode(0, [(updates, pictures)])
            seconds.append((time.perf_counter() - started) / len(batch))
    sizes = [len(encode_picture(picture, recipe["images"])) for picture in pictures]
    return min(seconds), sum(sizes) // max(1, len(sizes))


def duration(seconds: float) -> str:
    """A time a person reads: 3 h 20 min."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} seconds"

"""Steering: turn features up, down and off while an image is being made (paper §4)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from sdxl_sae_kit.arguments import checked, is_sae
from sdxl_sae_kit.edits import Cfg, Edit, Gate, Strengths, explained, read_edits
from sdxl_sae_kit.errors import ArtifactError, EditError
from sdxl_sae_kit.hookpoints import Hookpoint, resolve
from sdxl_sae_kit.hooks import rewrite
from sdxl_sae_kit.masks import Where
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.steering import Hook, digest_of

if TYPE_CHECKING:
    from sdxl_sae_kit.features import FeatureStats


@checked
@contextmanager
def steer(
    pipe: Any,
    sae: SAE | str,
    *,
    add: Strengths | None = None,
    scale: Strengths | None = None,
    clamp: Strengths | None = None,
    replace: Strengths | None = None,
    reconstruct: bool = False,
    ablate_block: bool = False,
    where: Where | None = None,
    steps: Sequence[int] | Sequence[float] | None = None,
    cfg: Cfg = "both",
    schedule: Sequence[float] | None = None,
    gate: Gate | None = None,
    keep_norm: bool = False,
    along: Mapping[int, ArrayLike] | None = None,
) -> Iterator[Edit]:
    """Edit the updates of one hookpoint in every image made inside the with block; yields the edit, to be recorded.

    Blocks nest, also for several SAEs and hookpoints; at the same hookpoint the outer one edits first.

    A strength is a number; a (height, width) map of any size, resized to the grid by area; an (image,) array with a
    number for each image of the batch; or (image, height, width).

    Args:
        pipe: the SDXL pipeline of diffusers that is called: text-to-image, image-to-image or inpainting.
        sae: gives the hookpoint, the codes and the directions. To ablate a block, its hookpoint's name will do.
        add: add this much of a latent, in multiples of its mean activation (`sae.mean_activation`).
        scale: multiply a latent's activation: 0 turns it off, 2 doubles it.
        clamp: set a latent's activation to this, in multiples of its mean activation.
        replace: put these latents, in multiples of their mean activations, in the place of the whole update.
        reconstruct: put the SAE's reconstruction, of the edited code, in the place of the update.
        ablate_block: make the update 0.
        where: what tokens to edit, in proportion to a mask: (height, width) or (image, height, width) of any size (a
            heat map is divided by its maximum), a PIL image's luminance, a `Polygon` or several.
        steps: the denoising steps that are edited, from 0, the first that is really made; or two fractions
            (start, end) for the steps i with start ≤ i / n_steps < end. By default all.
        cfg: with guidance, `add` is added to the cond half and subtracted from the uncond half (`both`), or touches
            one half only. All else acts on each half by itself, or on that half only.
        schedule: factors of the change, from the first step to the last, spread evenly and interpolated between them.
        gate: edit each latent only at tokens at which it is "active" (its activation is above 0), or "inactive".
        keep_norm: give each edited token the norm it had.
        along: latent → (d_in,) vector to write along instead of its direction; how controls are made.

    Raises:
        EditError: no such latent, step or half; a map for another number of images; `add`, `clamp` or `replace` of a
            latent that never fired; verbs that exclude each other; an SAE whose latents have no direction that is the
            same for all tokens.
        ArtifactError: the SAE does not fit this U-Net.
        HookpointError: the U-Net does not have its hookpoint.

    Warns where the SAE was trained on another model than the pipeline holds.

    Example:
        >>> with steer(pipe, sae, scale={17: 0.0}):                                    # doctest: +SKIP
        ...     image = pipe("a red circle", num_inference_steps=1, guidance_scale=0.0).images[0]
    """
    if isinstance(sae, str):
        if not ablate_block:
            raise EditError("steer takes an SAE, such as saes['up.0.1', 'k10'], for all but ablate_block. Pass one.")
        place: Any = {"hookpoint": resolve(pipe.unet, sae).name}
    elif is_sae(sae):
        place = {"hookpoint": check_fit(pipe, sae).name, "sae": sae.name, "digest": digest_of(sae)}
    else:
        raise EditError(f"steer takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
    verbs: Any = {"add": add, "scale": scale, "clamp": clamp, "replace": replace, "along": along}
    settings: Any = {"where": where, "steps": steps, "cfg": cfg, "schedule": schedule, "gate": gate}
    settings |= {"reconstruct": reconstruct, "ablate_block": ablate_block, "keep_norm": keep_norm}
    with explained("steer"):
        edit = Edit(**place, **{name: {} if each is None else each for name, each in verbs.items()}, **settings)
        hook = Hook.of(edit, sae if is_sae(sae) else None)
    with _hooked(pipe, hook):
        yield edit


@checked
@contextmanager
def replay(pipe: Any, saes: Any, edits: Edit | Sequence[Edit] | Path | str) -> Iterator[list[Edit]]:
    """Make recorded edits again, in their order, in every image made inside the with block; yields them.

    Args:
        pipe: the SDXL pipeline that is called.
        saes: the SAEs that were edited with: one, several, or a mapping of which the values are taken.
        edits: what `steer` yielded, several, or the path of a file that `write_edits` made.

    Raises:
        ArtifactError: an edits file that is none, an edit by an SAE that is not among those given, or an SAE that does
            not fit this U-Net.
        HookpointError: the U-Net does not have an edit's hookpoint.
        EditError: something else than SAEs and edits, or an edit that does not fit its SAE.

    Example:
        >>> with replay(pipe, saes, "off.json"):                                                 # doctest: +SKIP
        ...     image = pipe("a red circle", num_inference_steps=1, guidance_scale=0.0).images[0]
    """
    listed: list[Any] = [edits]
    if isinstance(edits, PathLike | str):
        listed = list(read_edits(edits))
    elif isinstance(edits, Iterable):
        listed = list(edits)
    several = saes.values() if isinstance(saes, Mapping) else saes
    given: list[Any] = list(several) if isinstance(several, Iterable) and not isinstance(several, str) else [several]
    for kind, items in ((SAE, given), (Edit, listed)):
        if wrong := [item for item in items if not (isinstance(item, kind) or (kind is SAE and is_sae(item)))]:
            raise EditError(
                f"replay takes SAEs, then edits, such as replay(pipe, saes, [edit]); {type(wrong[0]).__name__} is no "
                f"{kind.__name__}. What is JSON already becomes an edit with Edit.from_json."
            )
    by_digest = {digest_of(sae): sae for sae in given}
    hooks = []
    for number, edit in enumerate(listed):
        sae = None if edit.ablate_block else _recorded(number, edit, by_digest)
        if sae is not None and check_fit(pipe, sae).name != edit.hookpoint:
            raise EditError(f"replay: edit {number} is at {edit.hookpoint}, its SAE at {sae.hookpoint}. Mend it.")
        with explained(f"replay: edit {number}"):
            hooks.append(Hook.of(edit, sae))
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(_hooked(pipe, hook))
        yield listed


def _recorded(number: int, edit: Edit, by_digest: Mapping[str, SAE]) -> SAE:
    if edit.digest is not None and edit.digest in by_digest:
        return by_digest[edit.digest]
    known = ", ".join(f"{sae.name} ({digest[:8]})" for digest, sae in by_digest.items()) or "none"
    raise ArtifactError(
        f"replay: edit {number} was made with {edit.sae} ({(edit.digest or 'unknown')[:8]}), but the SAEs given are "
        f"{known}. Pass that one; in brackets is how their sha256 begin."
    )


@contextmanager
def _hooked(pipe: Any, hook: Hook) -> Iterator[None]:
    with rewrite(pipe, {} if hook.edit.does_nothing else {hook.edit.hookpoint: hook}):
        yield


def check_fit(pipe: Any, sae: SAE) -> Hookpoint:
    """Where an SAE belongs in this U-Net; warns where it was trained on another model than the pipeline holds.

    Raises:
        HookpointError: the U-Net does not have that hookpoint.
        ArtifactError: the SAE says not where it belongs, or reads tokens of another width.
    """
    hookpoint = resolve(pipe.unet, sae.hookpoint)
    if differs := _other_model(pipe, sae):
        warnings.warn(f"{differs}: its features may mean something else here.", stacklevel=4)
    if hookpoint.d_in != sae.d_in:
        raise ArtifactError(
            f"{sae.name} reads {sae.d_in} numbers a token, but {hookpoint.name} of this U-Net has {hookpoint.d_in}. "
            f"Take one that was trained here."
        )
    return hookpoint


def check_model(asked: str, pipe: Any, sae: SAE) -> None:
    """Refuse a pipeline of another model than the SAE was trained on, where what is measured would be of neither.

    Raises:
        ArtifactError: it is another, or the SAE says not where it belongs.
    """
    if differs := _other_model(pipe, sae):
        raise ArtifactError(f"{asked}: {differs}. Load the model it was trained on, or train an SAE on this one.")


def check_measured(asked: str, pipe: Any, sae: SAE, stats: FeatureStats) -> None:
    """Refuse statistics of another SAE, and a pipeline of another model than the SAE was trained on.

    Raises:
        ArtifactError: they do not belong together, or the SAE says not where it belongs.
    """
    if not is_sae(sae):
        raise ArtifactError(f"{asked} takes one SAE, such as saes['up.0.1', 'k10'], not a {type(sae).__name__}.")
    if (stats.sae, stats.hookpoint) != (sae.name, sae.hookpoint):
        raise ArtifactError(
            f"{asked}: the statistics are of {stats.sae} at {stats.hookpoint}, but the SAE is {sae.name} at "
            f"{sae.hookpoint}. Measure this SAE with FeatureStats.measure."
        )
    check_model(asked, pipe, sae)


def _other_model(pipe: Any, sae: SAE) -> str | None:
    """How the pipeline's model differs from the one that the SAE was trained on."""
    _ = sae.hookpoint  # refuses an SAE that says not where it belongs
    model, site = describe(pipe), sae.site
    assert site is not None
    if (model.name, model.revision) == (site.model, site.revision):
        return None
    return (
        f"{sae.name} was trained on {site.model} (revision {site.revision}), but the pipeline is {model.name} "
        f"(revision {model.revision})"
    )

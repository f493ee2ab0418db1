"""What commands are given: artifacts by folder or by name, pipelines and judges by name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.artifacts import FORMATS, Artifact, Store
from sdxl_sae_kit.errors import ArtifactError, KitError, did_you_mean

if TYPE_CHECKING:
    from sdxl_sae_kit.cache import ActivationCache
    from sdxl_sae_kit.features import FeatureStats
    from sdxl_sae_kit.labels import LabelStore
    from sdxl_sae_kit.sae import SAE

NAMING = "folder, name in the store with or without its hash, or the beginning of one"
_SHOWN, _DIFFERENCES, _SHORT = 8, 3, 48
_HASH = re.compile("[0-9a-f]{64}")


def find(kind: str, given: str, store: Path | None) -> Path:
    """The folder of an artifact of this kind: given itself, by name (without its hash, too) or by how only it begins.

    Raises:
        ArtifactError: there is none, or several begin so.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return _named([kind], given.removeprefix(f"{kind}/"), Store.at(store))
    artifact = Artifact(path.resolve())
    if artifact.finished and (made := artifact.stamp["recipe"]["format"]) != kind:
        raise ArtifactError(f"{given} is one of the {made}; what is needed here is one of the {kind}.")
    return artifact.folder


def _named(kinds: list[str], given: str, store: Store) -> Path:
    stored = store.artifacts()
    known = {artifact.name: artifact for artifact in stored if artifact.kind in kinds}
    found = [name for name in _meant(given, known) if known[name].finished] or _meant(given, known)
    if len(found) == 1:  # one that was interrupted is hardly meant where there is a finished one
        return known[found[0]].folder
    what = f"in {' or '.join(kinds)} of {store.root}"
    if found:
        differ = _differences([known[name] for name in found[:_SHOWN]], stored)
        lines = [
            f"{known[name].kind}/{name}  {told}".rstrip() for name, told in zip(found[:_SHOWN], differ, strict=True)
        ] + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
        listed = "\n  ".join(lines)
        raise ArtifactError(
            f"{given!r} begins the names of {counted(len(found), 'artifacts')} {what}. Give more of one:\n  {listed}"
        )
    if elsewhere := {artifact.kind for artifact in stored if _meant(given, [artifact.name])}:
        raise ArtifactError(
            f"{given!r} names what is in {' and '.join(sorted(elsewhere))}; what is needed here is in "
            f"{' or '.join(kinds)}."
        )
    there = f"it has {_some(list(known))}" if known else "nothing is there"
    alone = [name for name in map(_readable, known) if len(_meant(name, known)) == 1]
    raise ArtifactError(
        f"No folder {given!r}, and no such name {what}; {there}.{did_you_mean(given, [*alone, *known])}"
    )


def _meant(given: str, names: Iterable[str]) -> list[str]:
    """The names that are meant: the whole one, else those that are so but for their hash, else those that begin so."""
    fits: list[Callable[[str], bool]] = [
        lambda name: name == given,
        lambda name: _readable(name) == given,
        lambda name: bool(given) and name.startswith(given),
    ]
    return next((found for fit in fits if (found := list(filter(fit, names)))), [])


def _readable(name: str) -> str:
    return name.rsplit("-", 1)[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _differences(artifacts: list[Artifact], stored: list[Artifact]) -> list[str]:
    """What of each one's recipe is not the same in all: inputs by name where the store has them."""
    names = {digest: artifact.name for artifact in stored if (digest := _stamped(artifact).get("digest"))}
    recipes = [dict(_leaves(_stamped(artifact).get("recipe", {}), names)) for artifact in artifacts]
    known = [recipe for recipe in recipes if recipe]  # nothing is known of what is unfinished or damaged
    values = {key: {recipe.get(key, "") for recipe in known} for recipe in known for key in recipe}
    telling = [
        key
        for key, told in values.items()
        if len(told) > 1 and not any(len(text) > _SHORT or _HASH.search(text) for text in told)
    ]
    return [", ".join(f"{key} {each[key]}" for key in telling[:_DIFFERENCES] if key in each) for each in recipes]


def _stamped(artifact: Artifact) -> Mapping[str, Any]:
    """Its stamp; empty where it is unfinished or damaged."""
    with suppress(ArtifactError):
        return artifact.stamp
    return {}


def _leaves(recipe: Mapping[str, Any], names: Mapping[str, str], within: str = "") -> Iterator[tuple[str, str]]:
    """Every setting, however deep, by its path, as text; a digest as the name of what has it."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, names, f"{within}{key}.")
        else:
            yield f"{within}{key}", names.get(str(value), str(value))


def open_cache(given: str, store: Path | None) -> ActivationCache:
    """The cache of updates that is meant."""
    from sdxl_sae_kit.cache import ActivationCache

    return ActivationCache.open(find("activations", given, store))


def open_sae(given: str, store: Path | None) -> SAE:
    """The SAE that is meant: one of the store, a file, or another tool's as `SAE.load` reads it."""
    from sdxl_sae_kit.sae import SAE

    elsewhere = given.startswith("hf:") or Path(given).expanduser().is_file()
    return SAE.load(given if elsewhere else find("saes", given, store))


def open_stats(given: str, store: Path | None) -> FeatureStats:
    """The feature statistics that are meant."""
    from sdxl_sae_kit.features import FeatureStats

    return FeatureStats.open(find("features", given, store))


def open_labels(given: Path | None) -> LabelStore | None:
    """The labels in a file, which must be there."""
    from sdxl_sae_kit.labels import LabelStore

    if given is not None and not given.is_file():
        raise KitError(f"There is no file of labels {given}. Give one, such as artifacts/labels/NAME.jsonl.")
    return None if given is None else LabelStore(given)


def open_pipeline(options: argparse.Namespace, sae: SAE | None = None) -> Any:
    """The pipeline that the options say; unless they name one, that which the SAE was trained on."""
    from sdxl_sae_kit.pipelines import load_pipeline

    name = options.model or (sae and sae.site and sae.site.model)
    if not name:
        raise KitError("The SAE does not say which model it was trained on. Name it with --model.")
    return load_pipeline(
        name, device=options.device, dtype=options.compute_dtype, revision=options.revision, lora=options.lora
    )


def open_judge(given: str) -> EllipsisType | Any | None:
    """What `judge=` takes: `own` is the model's own, `none` none, and anything else names a CLIP."""
    if given in ("own", "none"):
        return ... if given == "own" else None
    from sdxl_sae_kit.judges import EmbeddingJudge
    from sdxl_sae_kit.perceptual import Lpips

    return EmbeddingJudge(open_clip(given), Lpips())


def open_clip(given: str) -> Any:
    """A CLIP of a folder or the hub."""
    from sdxl_sae_kit.similarity import ClipEmbed

    return ClipEmbed(given)


def anything(given: str, store: Path | None) -> Path:
    """A path as it is, or the folder of whatever artifact has this name or alone begins so."""
    path = Path(given).expanduser()
    if path.exists() or path.suffix == ".ipynb":
        return path
    kind, _, name = given.partition("/")
    return _named([kind], name, Store.at(store)) if kind in FORMATS else _named(list(FORMATS), given, Store.at(store))

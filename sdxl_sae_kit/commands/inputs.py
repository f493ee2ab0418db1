"""What commands are given: artifacts by folder or by name, pipelines and judges by name."""

from __future__ import annotations

import argparse
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

NAMING = "folder, name in the store, or the beginning of one"
_SHOWN = 8


def find(kind: str, given: str, store: Path | None) -> Path:
    """The folder of an artifact of this kind, given by itself, or by its name or a beginning that only it has.

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
    known = {artifact.name: artifact for artifact in store.artifacts() if artifact.kind in kinds}
    found = [given] if given in known else [name for name in known if given and name.startswith(given)]
    found = [name for name in found if known[name].finished] or found  # one that was interrupted is hardly meant
    if len(found) == 1:
        return known[found[0]].folder
    what = f"in {' or '.join(kinds)} of {store.root}"
    if found:
        raise ArtifactError(
            f"{given!r} begins the names of {counted(len(found), 'artifacts')} {what}: {_some(found)}. Say more of it."
        )
    nearly = [*(name.rsplit("-", 1)[0] for name in known), *known]
    there = f"it has {_some(list(known))}" if known else "nothing is there"
    raise ArtifactError(f"No folder {given!r}, and no such name {what}; {there}.{did_you_mean(given, nearly)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


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

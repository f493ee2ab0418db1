"""Any finished artifact, by its folder alone, as the object that the call which made it returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.attribution import Attribution
from sdxl_sae_kit.studies.benchmarked import RIEBench
from sdxl_sae_kit.studies.block_ranking import BlockRanking
from sdxl_sae_kit.studies.causes import Causes
from sdxl_sae_kit.studies.generalized import Generalization
from sdxl_sae_kit.studies.results import Ablation
from sdxl_sae_kit.studies.selected import Selectivity
from sdxl_sae_kit.studies.specialized import Specialization
from sdxl_sae_kit.studies.splicing import Splicing
from sdxl_sae_kit.studies.transferred import Transfer

_KINDS: dict[str, Callable[[Path], Any]] = {
    "activations": ActivationCache.open,
    "features": FeatureStats.open,
    "icons": Icons.open,
    "saes": SAE.load,
}
_STUDIES: dict[str, Callable[[Path], Any]] = {
    "ablation": Ablation.open,
    "attribution": Attribution.open,
    "block ranking": BlockRanking.open,
    "block specialisation": Specialization.open,
    "causes": Causes.open,
    "generalization": Generalization.open,
    "riebench": RIEBench.open,
    "selectivity": Selectivity.open,
    "splicing": Splicing.open,
    "transfer": Transfer.open,
}


@checked
def open_artifact(folder: Path | str) -> Any:
    """What a finished artifact holds: an ActivationCache, SAE, FeatureStats, Icons or the result of a study.

    Raises:
        ArtifactError: no finished artifact lies there, it is damaged, of another format version, or of a kind that
            holds nothing to look at by itself (reports, embeddings, masks, edits).

    Example:
        >>> open_artifact("artifacts/studies/splicing_tiny-turbo_4saes-d4309e9e")  # doctest: +SKIP
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}. Give that of an artifact, such as stats.artifact.folder.")
    artifact = Artifact.open(folder, folder.resolve().parent.name)
    study = artifact.recipe.get("study")
    read = _STUDIES.get(str(study)) if artifact.kind == "studies" else _KINDS.get(artifact.kind)
    if read is None:
        what = f"a study of the kind {study!r}" if artifact.kind == "studies" else f"{artifact.kind}"
        raise ArtifactError(
            f"{folder} holds {what}, which cannot be looked at by itself. "
            f"Open one of: {', '.join([*_KINDS, *(f'a study ({name})' for name in _STUDIES)])}."
        )
    return read(artifact.folder)

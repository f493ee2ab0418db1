"""What a report's numbers came from: the artifacts behind it, told as rows of tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.html import short
from sdxl_sae_kit.labels import LabelStore, LabelTest
from sdxl_sae_kit.prompts import Prompts, load_prompts

_MINOR = {
    *("format", "version", "batch_size", "compute_dtype", "images_per_shard", "precision", "scheduler", "hookpoints"),
    *("revision", "dtype", "halves", "guidance_scale"),
}
"""What is left out of a recipe's main settings: how it was computed, and what the table of the data tells."""
_USUAL = list(asdict(SAEConfig()).items())
"""Settings of SAEs that need no telling."""
SHORT = 8
"""Characters of a hash that are shown."""
_DAMAGED = "cannot be read: `sdxl-sae-kit artifacts verify` says why"
"""What stands in a report for what only the store's owner can look into."""
_CONTROL = "_control"
"""What stands between an SAE's name and the rest in the name of a file whose labels are other features'."""

Row = dict[str, Any]


def with_inputs(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Artifacts with all that they were made from, as far as it lies in their stores and can be read: by kind and name.

    What cannot be read is left out: every notebook has run by now, and one damaged folder must not cost that.
    """
    wanted = {artifact.folder: artifact for artifact in artifacts if _readable(artifact)}
    known: dict[str, Artifact] = {}
    for root in {folder.parent.parent for folder in wanted}:
        known |= _by_name_and_hash(Store(root))
    left = list(wanted.values())
    while left:
        for text in _texts(left.pop().recipe):
            if (found := known.get(text)) and found.folder not in wanted:
                wanted[found.folder] = found
                left.append(found)
    return sorted(wanted.values(), key=lambda artifact: (artifact.kind, artifact.name))


def _by_name_and_hash(store: Store) -> dict[str, Artifact]:
    """Each finished artifact under what recipes of others call it."""
    finished = [artifact for artifact in store.artifacts() if artifact.finished and _readable(artifact)]
    known = {artifact.name: artifact for artifact in finished} | {artifact.digest: artifact for artifact in finished}
    for statistics in (artifact.recipe for artifact in finished if artifact.kind == "features"):
        if sae := known.get(str(statistics.get("name"))):
            known[str(statistics.get("sae"))] = sae  # studies name an SAE by the hash of its weights
    return known


def _readable(artifact: Artifact) -> bool:
    """Whether what an artifact says of itself can be read, and is as it was written."""
    try:
        return bool(artifact.stamp)
    except ArtifactError:
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def model_names(artifacts: Iterable[Artifact]) -> list[str]:
    """The models whose pictures or updates these artifacts hold, in order of first appearance."""
    named = (a.recipe.get("model") for a in artifacts)
    return list(dict.fromkeys(_without_place(model) for model in named if model))


def data_rows(artifacts: Iterable[Artifact]) -> list[Row]:
    """A row per cache: the prompts' source, how many, how they are split, their seeds, and how images were made."""
    return [_data_row(artifact) for artifact in artifacts if artifact.kind == "activations"]


_DATA_COLUMNS = (
    *("cache", "model", "prompts", "images", "train / held out", "seeds", "hookpoints", "steps", "prompts' hash"),
)


def _data_row(artifact: Artifact) -> Row:
    try:
        cache = ActivationCache.open(artifact.folder)
    except (ArtifactError, OSError):
        return dict.fromkeys(_DATA_COLUMNS, "–") | {"cache": artifact.name, "prompts": _DAMAGED}
    recipe, prompts = cache.recipe, cache.prompts
    held_out, seeds = len(cache.images("held_out")), prompts.seeds
    return {
        "cache": cache.name,
        "model": f"{_without_place(recipe['model'])} ({recipe['revision']})",
        "prompts": _source(prompts),
        "images": cache.n_images,
        "train / held out": f"{cache.n_images - held_out:,} / {held_out:,}",
        "seeds": f"{min(seeds)} to {max(seeds)}",
        "hookpoints": ", ".join(cache.hookpoints),
        "steps": f"{recipe['num_inference_steps']}, guidance {recipe['guidance_scale']:g}",
        "prompts' hash": str(recipe["prompts"])[:SHORT],
    }


def _source(prompts: Prompts) -> str:
    """Where prompts came from: the sources that the kit makes are made again and compared."""
    for name in ("world", "scenes") if any(prompts.factors) else ("scenes",):
        if load_prompts(name, len(prompts), seed=prompts.seeds[0]).texts == prompts.texts:
            return f"load_prompts({name!r}, {len(prompts)})"
    return "captions with known factors" if any(prompts.factors) else "a list or file"


def sae_rows(artifacts: Iterable[Artifact]) -> list[Row]:
    """A row per SAE: what it is, its seed and hash, and what it came to on held-out tokens."""
    return [_sae_row(artifact) for artifact in artifacts if artifact.kind == "saes"]


def _sae_row(artifact: Artifact) -> Row:
    config, metrics = artifact.recipe["config"], artifact.stamp["facts"].get("metrics", {})
    shown = ("k", "kind", "seed")
    other = {key: value for key, value in config.items() if key not in shown}
    interval = metrics.get("explained_variance_interval") or (float("nan"), float("nan"))
    row = {"SAE": artifact.name, "hookpoint": artifact.recipe["hookpoint"]} | {key: config[key] for key in shown}
    row["hash"] = artifact.digest[:SHORT]
    row |= {"explained variance": _number(metrics, "explained_variance"), "interval": tuple(map(float, interval))}
    row |= {"L0": _number(metrics, "l0"), "dead share": _number(metrics, "dead_share")}
    return row | {"held-out tokens": metrics.get("n_tokens", 0), "other settings": _settings(other) or "–"}


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    return float("nan") if value is None else float(value)


def artifact_rows(artifacts: Iterable[Artifact], sections: Mapping[Path, Sequence[str]]) -> list[Row]:
    """A row per artifact: kind, name, hash, time, main settings, and the sections (by folder) that used it.

    One that a section used but that cannot be read is a row that says so.
    """
    damaged = [artifact for artifact in map(Artifact, sections) if not _readable(artifact)]
    return [
        {
            "kind": artifact.kind,
            "name": artifact.name,
            "hash": artifact.digest[:SHORT],
            "made": f"{artifact.stamp.get('time', '')[:16].replace('T', ' ')} by {artifact.stamp.get('kit', '–')}",
            "settings": _settings(artifact.recipe),
            "used in": ", ".join(sections.get(artifact.folder, [])) or "as an input",
        }
        for artifact in artifacts
    ] + [
        {"kind": artifact.kind, "name": artifact.name, "hash": "–", "made": "–", "settings": _DAMAGED}
        | {"used in": ", ".join(sections[artifact.folder])}
        for artifact in damaged
    ]


def _settings(recipe: Mapping[str, Any]) -> str:
    """The main settings of a recipe; hashes of inputs are left out too."""
    told = []
    for key, value in recipe.items():
        if key in _MINOR or (key, value) in _USUAL:
            continue
        if isinstance(value, Mapping):
            told += [_settings(value)]
        elif isinstance(value, list):
            told += [f"{key}: {len(value)}"] if value else []
        elif value is not None and not _is_hash(value):
            told += [f"{key} {value:g}" if isinstance(value, float) else f"{key} {_without_place(value)}"]
    return ", ".join(filter(None, told))


def _without_place(value: object) -> str:
    """A name as it is; of a folder only what it is called, since a report tells nothing of this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def label_rows(artifacts: Iterable[Artifact]) -> list[Row]:
    """A row per label of the SAEs among these: who gave it, and how well it told held-out images, beside a control.

    The control is another feature's label put to the same feature's images, where that was done.
    """
    rows = []
    for sae in (artifact for artifact in artifacts if artifact.kind == "saes"):
        for file in sorted((sae.folder.parent.parent / "labels").glob(f"{sae.name}*.jsonl")):
            if not file.stem.startswith(f"{sae.name}{_CONTROL}"):
                rows += _labels_of(sae.name, file)
    return rows


def _labels_of(sae: str, file: Path) -> list[Row]:
    labels = LabelStore(file)
    control = LabelStore(file.with_name(f"{sae}{_CONTROL}{file.name.removeprefix(sae)}"))
    try:
        tests = {(test.feature, test.text): test for test in labels.tests()}
        controls = {test.feature: test for test in control.tests()}
        named = {feature: labels.latest(feature) for feature in labels.all()}
    except ArtifactError as cause:  # the rest of the report is none the worse for it
        return [{"SAE": sae, "feature": "–", "label": str(cause)} | dict.fromkeys(_LABEL_COLUMNS, "–")]
    return [
        {"SAE": sae, "feature": str(feature), "label": label.text, "by": label.author}
        | _tested(tests.get((feature, str(label.text))), controls.get(feature))
        for feature, label in named.items()
        if label
    ]


_LABEL_COLUMNS = ("by", "balanced accuracy [95 %]", "images", "another's label [95 %]")


def _tested(test: LabelTest | None, control: LabelTest | None) -> Row:
    columns = _LABEL_COLUMNS[1:]
    return dict(zip(columns, (_accuracy(test), test.n if test else 0, _accuracy(control)), strict=True))


def _accuracy(test: LabelTest | None) -> str:
    if test is None:
        return "not tested"
    return f"{short(test.balanced_accuracy)} [{', '.join(map(short, test.interval))}]"

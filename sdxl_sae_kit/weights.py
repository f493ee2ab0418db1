"""The file an SAE of this kit lies in: safetensors, and one JSON object in its header for all that is no tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.kinds import UnknownKindError

T = TypeVar("T")

KEY, VERSION = "sdxl_sae_kit.sae", 2
"""One key, because safetensors writes several in random order."""

_TRAINING = "training."  # what begins so is no part of the SAE, but of a checkpoint of its training


def location(path: Path | str) -> Path | str:
    """The path, if it is one. Raises ArtifactError."""
    if not isinstance(path, PathLike | str):
        raise ArtifactError(f"SAE.load takes the path of a file or folder, not {path!r}. Pass one such as train's.")
    return path


def write(
    path: Path | str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], training: Mapping[str, Tensor]
) -> None:
    """Write an SAE, and what its training goes on from if there is anything. Raises ArtifactError for a folder."""
    if Path(path).is_dir():
        raise ArtifactError(f"An SAE is saved as one file, and {path} is a folder. Name a file in it: sae.safetensors.")
    named = dict(tensors) | {_TRAINING + name: tensor for name, tensor in training.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    # not save_file, which lets nobody but the owner read the file
    write_atomically(Path(path), save(on_cpu, {KEY: json.dumps({"version": VERSION, **header})}))


def read(path: Path | str, *, training: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an SAE, or of its training.

    Raises:
        ArtifactError: no such file, or not this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata() or {}, file.keys()
            wanted = [name for name in names if name.startswith(_TRAINING) == training]
            tensors = {name.removeprefix(_TRAINING): file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as cause:
        raise ArtifactError(
            f"{path} cannot be read as safetensors ({cause}). Give an SAE saved by this kit, "
            "or the whole folder of one of sdxl-unbox, SAELens, dictionary_learning or sparsify."
        ) from None
    return _header(header.get(KEY, "{}"), path), tensors


def _header(text: str, path: Path | str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        about = {}
    if about.get("version") != VERSION:
        found = f"version {about['version']}" if "version" in about else "no such header"
        raise ArtifactError(
            f"{path} is not an SAE of this kit in format version {VERSION}: it has {found}. Give one saved by this kit."
        )
    if missing := {"name", "config", "site", "data", "metrics", "origin"} - about.keys():
        raise ArtifactError(f"{path}: the header lacks {', '.join(sorted(missing))}. The file is damaged.")
    texts, objects = (about["name"], about["data"]), (about["metrics"], about["origin"])
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, dict) for each in objects):
        raise ArtifactError(f"{path}: name, data, metrics or origin are not what they should be. The file is damaged.")
    return about


def parse(kind: type[T], values: Any, path: Path | str) -> T:
    """A dataclass from its part of the header.

    Raises:
        ArtifactError: settings that are unknown, missing or impossible.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ArtifactError(f"{path}: its {kind.__name__} is no JSON object. The file is damaged; get it again.")
    if values.keys() != known:
        odd = ", ".join(sorted(values.keys() ^ known))
        raise ArtifactError(
            f"{path}: {kind.__name__} has settings this kit does not know, or lacks some: {odd}. "
            "Use the kit version that saved it."
        )
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except UnknownKindError as cause:
        raise ArtifactError(f"{path}: its {kind.__name__} is impossible so far: {cause}") from None
    except (KitError, TypeError, ValueError, OverflowError) as cause:
        raise ArtifactError(f"{path}: its {kind.__name__} is impossible ({cause}). The file is damaged.") from None


def width(tensors: Mapping[str, Tensor], expansion: float, whitened: bool, path: Path | str) -> int:
    """d_in; asked before an SAE of that size is made, so that a small file makes no large one.

    Raises:
        ArtifactError: W_enc is not (d_in, expansion · d_in), or the matrix that whitens not (d_in, d_in).
    """
    shape, scale = (tuple(tensors[name].shape) if name in tensors else () for name in ("W_enc", "input_scale"))
    if len(shape) != 2 or abs(shape[1] - shape[0] * expansion) > 0.5:
        raise ArtifactError(f"{path}: W_enc has shape {shape}, not (d_in, {expansion:g} · d_in). The file is damaged.")
    if whitened and scale != (shape[0], shape[0]):
        raise ArtifactError(f"{path}: input_scale has shape {scale}, not {shape[0], shape[0]}. The file is damaged.")
    return shape[0]


def check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuse tensors that are not just the ones wanted.

    Raises:
        ArtifactError: one is missing, unknown, misshapen, not float32 or not finite.
    """
    for name in sorted(tensors.keys() | wanted.keys()):
        if (
            name not in tensors
            or name not in wanted
            or tensors[name].shape != wanted[name].shape
            or tensors[name].dtype != torch.float32
            or not tensors[name].isfinite().all()
        ):
            raise ArtifactError(
                f"{path}: tensor {name} is missing, unknown, misshapen, not float32 or not finite. "
                "The file is damaged; train the SAE again."
            )

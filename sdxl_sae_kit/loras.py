"""LoRAs: where their weights are, and how they are fused into a pipeline's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.files import hash_file

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file that it saves a LoRA in."""


def locate(lora: Path | str) -> Path:
    """The safetensors file of a LoRA: a file, the only one of a folder, or that of a hub id.

    Raises:
        ModelError: there is none, or a folder has several.
    """
    path = Path(lora).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            named = ", ".join(each.name for each in found) or "none"
            raise ModelError(f"lora={str(lora)!r}: the folder has {named} of *.safetensors. Pass the file itself.")
        return found[0]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(
                f"lora={str(lora)!r} is no safetensors file, and other formats may run code on loading. Convert it."
            )
        return path
    if isinstance(lora, Path) or str(lora).startswith((".", "/", "~")) or str(lora).count("/") != 1:
        raise ModelError(f"lora={str(lora)!r}: there is no such file or folder. Check the path, or pass a hub id.")
    return _download(str(lora))


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, WEIGHTS))
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"lora={name!r}: there is no such file or folder, and no {WEIGHTS} of it can be had from the hub "
            f"({type(error).__name__}). Check the name, or download the file and pass its path."
        ) from error


def label(lora: Path | str) -> str:
    """What the LoRA is called: its hub id, its folder where the file has diffusers' own name, or else its file."""
    path = Path(lora).expanduser()
    if path.is_file():
        return path.parent.resolve().name if path.name == WEIGHTS else path.stem
    return path.resolve().name if path.is_dir() else str(lora)


def fuse(pipe: Any, lora: Path) -> str:
    """Add a LoRA to the weights of the pipeline's U-Net and text encoders; returns the file's sha256.

    Raises:
        ModelError: peft is not installed, or the file does not fit this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Loading a LoRA needs the extra lora: pip install 'sdxl-sae-kit[lora]'.")
    try:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
        if not (fitting := list(pipe.get_list_adapters())):
            raise ValueError("it names no layer of it.")
        pipe.fuse_lora(components=fitting)
        pipe.unload_lora_weights()
    except Exception as error:  # diffusers and peft raise whatever they trip over
        raise ModelError(
            f"{lora} is no LoRA of this model: {error} Pass one that was trained on it, or on one of its shape."
        ) from error
    return hash_file(lora)

"""Settings and tensors out of files that a stranger may have written, as plain data: nothing they bring is run."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.files import canonical_json


def load_plain(path: Path) -> Any:
    """What a .json, .safetensors or PyTorch file holds, in memory of the order of its size.

    Raises:
        ArtifactError: it is damaged, holds what is no plain data, or packs more than its size.
    """
    try:
        if path.suffix == ".json":
            return json.loads(canonical_json(json.loads(path.read_text(encoding="utf-8"))))  # refuses NaN, not JSON
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            return load(content)
        _refuse_bombs(content)
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as cause:  # whatever a damaged or hostile file trips over
        raise ArtifactError(
            f"{path} cannot be read as plain settings or tensors ({type(cause).__name__}): it is damaged, or would run "
            "code that came with it. Nothing of it was run. Get it anew, from people you trust."
        ) from None


def _refuse_bombs(content: bytes) -> None:
    """PyTorch unpacks what it never packs itself, reads one place under many names, and makes bytes of a number."""
    archive = io.BytesIO(content)
    entries = zipfile.ZipFile(archive).infolist() if zipfile.is_zipfile(archive) else []
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > len(content) or b"bytearray\n" in content:
        raise ValueError("it would take more memory than its size")

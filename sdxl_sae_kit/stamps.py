"""What a finished artifact says of itself, and how its recipe names it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdxl_sae_kit.files import canonical_json, sha256


def digest_of(recipe: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """sha256 over the recipe and what is known of every file."""
    return sha256(canonical_json({"recipe": recipe, "files": files}).encode())


def check_of(stamp: Mapping[str, Any]) -> str:
    """sha256 of all that a stamp says."""
    return sha256(canonical_json({key: value for key, value in stamp.items() if key != "check"}).encode())


def is_stamp(value: object) -> bool:
    """Whether JSON from a stranger has the shape of a stamp."""
    if not isinstance(value, dict) or not {"recipe", "files", "facts", "digest", "check"} <= value.keys():
        return False
    recipe, files, facts = value["recipe"], value["files"], value["facts"]
    if not isinstance(recipe, dict) or not isinstance(files, dict) or not isinstance(facts, dict):
        return False
    return {"format", "version"} <= recipe.keys() and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def name_hash(recipe: Mapping[str, Any]) -> str:
    """How the name of an artifact with this recipe ends."""
    return sha256(canonical_json(recipe).encode())[:8]


def kit_version() -> str:
    """Version of the installed kit."""
    try:
        return version("sdxl-sae-kit")
    except PackageNotFoundError:
        return "unknown"

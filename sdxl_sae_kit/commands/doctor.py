"""`doctor`: what this machine has, and what would fail on it."""

from __future__ import annotations

import argparse
from typing import Any

from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.commands.options import add_store, add_verb
from sdxl_sae_kit.errors import KitError

ABOUT = "Versions, device, memory, disk, kernels and what else is needed, with what to do where something is amiss."


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs, "doctor", _doctor, "say what is installed and what would fail", ABOUT, "sdxl-sae-kit doctor"
    )
    add_store(parser)


def _doctor(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.doctor import diagnose

    found = diagnose(options.store)
    failure = None if found.healthy else KitError("Something would fail here; what to do is said beside it.")
    return Answer(str(found), found.to_json(), failure)

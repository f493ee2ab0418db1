"""What the kit raises: every message names what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KitError(Exception):
    """Parent of every error the kit raises on purpose."""


class HookpointError(KitError, ValueError):
    """A hookpoint that this U-Net does not have, or that does not fit."""


class ModelError(KitError):
    """A model that cannot be found, loaded or used as an SDXL pipeline."""


class ArtifactError(KitError):
    """An artifact that is missing, unfinished, damaged or made by another recipe."""


class PromptError(KitError, ValueError):
    """Prompts or seeds that cannot be read or do not fit together."""


class EditError(KitError, ValueError):
    """An edit that cannot be expressed."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'down.2.1'?"`` for the nearest known name, or ``""`` when nothing is near.

    >>> did_you_mean("down.2.l", ["down.2.1", "mid.0"])
    " Did you mean 'down.2.1'?"
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""

"""Numbers as people give and read them: whole ones checked, sizes and counts as text."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from sdxl_sae_kit.errors import KitError


def whole_number(name: str, value: Any, *, least: int = 1, multiple_of: int = 1) -> int:
    """A setting as a plain int, which is what recipes take.

    Raises:
        KitError: it is something else, too small or no multiple.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or value % multiple_of:
        kind = "an integer" if multiple_of == 1 else f"a multiple of {multiple_of}"
        raise KitError(f"{name} must be {kind} of at least {least}, not {value!r}.")
    return int(value)


def human_bytes(n: float) -> str:
    """A size a person reads: 12.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def counted(n: int, things: str) -> str:
    """So many of them, in the singular where there is one.

    >>> counted(1, "SAEs"), counted(5120, "features")
    ('1 SAE', '5,120 features')
    """
    return f"{n:,} {things.removesuffix('s') if n == 1 else things}"

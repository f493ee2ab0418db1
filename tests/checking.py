"""Types and shapes are checked at run time where it tells something: a loop's thousandth call is like its first."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping

CHECKED_CALLS = 20
"""So many calls of every function are checked in every test: a check costs more than what many functions do."""
calls: Counter[int] = Counter()
"""By the address of the function's code, which its closures share; emptied before every test."""


def check_first_calls() -> None:
    """Let what jaxtyping's import hook decorates be checked at its first calls only."""
    jaxtyped = jaxtyping.jaxtyped

    def decorating(*, typechecker: Any) -> Callable[[Any], Any]:
        return functools.partial(_checked, jaxtyped(typechecker=typechecker))

    jaxtyping.jaxtyped = decorating


def _checked(decorate: Callable[[Any], Any], function: Any) -> Any:
    if not isinstance(function, FunctionType):
        return decorate(function)
    code, within = id(function.__code__), "<locals>" in function.__qualname__
    checked = None if within else decorate(function)  # closures are many: they are decorated when first called

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if calls[code] >= CHECKED_CALLS:
            return function(*args, **kwargs)
        calls[code] += 1
        checked = checked or decorate(function)
        return checked(*args, **kwargs)

    return called

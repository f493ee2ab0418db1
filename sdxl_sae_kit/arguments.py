"""What every public function refuses before it begins: things of another kind than its signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any

from sdxl_sae_kit.errors import KitError

_WANTED = {
    "SAE": "one SAE, such as saes['up.0.1', 'k10']",
    "FeatureStats": "FeatureStats, such as FeatureStats.measure(sae, cache)",
    "ActivationCache": "a cache, such as collect gives",
    "Activations": "a cache, such as collect gives, or a stream",
    "LabelStore": "a LabelStore, such as LabelStore.of(stats)",
}
_SAES = "SAEs, such as train gives, or one or several of them"
_PIPELINE = "a pipeline, such as load_pipeline('tiny-turbo') gives"


@cache
def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses arguments of a wrong kind in words instead of failing at them further down.

    Looked at are required arguments whose annotation is one of the kit's classes, `pipe` and `saes`; classes and what
    asks for none of them come back as they are.
    """
    if not isinstance(function, FunctionType):
        return function
    signature = inspect.signature(function)
    required = {name: str(p.annotation) for name, p in signature.parameters.items() if p.default is p.empty}
    wanted = {name: kind for name, kind in required.items() if kind in _WANTED or name == "saes"}
    wanted |= {name: kind for name, kind in required.items() if name == "pipe" and "str" not in kind}
    if not wanted:
        return function

    @wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for name, given in signature.bind_partial(*args, **kwargs).arguments.items():
            if name in wanted and (want := _refusal(name, wanted[name], given)):
                raise KitError(f"{function.__name__} takes {want}, not {_told(given)}.")
        return function(*args, **kwargs)

    return checking


def _refusal(name: str, kind: str, given: Any) -> str:
    """What it should have been; empty where it is."""
    if kind in _WANTED:
        return "" if _is_a(given, kind) else _WANTED[kind]
    if name == "pipe":
        return "" if hasattr(given, "unet") else _PIPELINE
    if _is_a(given, "SAE"):
        return ""
    several = given.values() if isinstance(given, Mapping) else given
    if not isinstance(several, Iterable) or isinstance(given, str | bytes):
        return _SAES
    if not isinstance(several, list | tuple) and several is given:  # an iterator, which looking at would use up
        return ""
    return "" if all(_is_a(each, "SAE") for each in several) else _SAES


def _is_a(given: object, kind: str) -> bool:
    """Whether its class has a parent of this name: to import them all would take seconds."""
    return any(parent.__name__ == kind for parent in type(given).__mro__)


def _told(given: object) -> str:
    """How a message names what was given: plain values as they are, things by their class."""
    plain = isinstance(given, str | int | float | bool | list | tuple | dict | None) and len(repr(given)) < 60
    return repr(given) if plain else f"{'an' if type(given).__name__[0] in 'AEIO' else 'a'} {type(given).__name__}"

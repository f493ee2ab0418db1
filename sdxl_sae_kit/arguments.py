"""What every public function refuses before it begins: things of another kind than its signature asks for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, wraps
from pathlib import PurePath
from types import FunctionType
from typing import Any

from sdxl_sae_kit.errors import KitError

_WANTED = {
    "SAE": "one SAE, such as saes['up.0.1', 'k10']",
    "FeatureStats": "FeatureStats, such as FeatureStats.measure(sae, cache)",
    "ActivationCache": "a cache, such as collect gives",
    "Activations": "a cache, such as collect gives, or a stream",
    "LabelStore": "a LabelStore, such as LabelStore.of(stats)",
    "Store": "a Store",
}
_PLAIN: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "Path": (PurePath, "a path"),
    "None": (type(None), "None"),
    "Mapping": (Mapping, "a mapping"),
    "Sequence": (Iterable, "a list"),
    "Iterable": (Iterable, "a list"),
}
_SAES = "SAEs, such as train gives, or one or several of them"
_PIPELINE = "a pipeline, such as load_pipeline('tiny-turbo') gives"


@cache
def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses arguments of a wrong kind in words instead of failing at them further down.

    Looked at is what its annotations say by name: the kit's classes, texts, paths, mappings and lists; `pipe`; and
    `saes`. What else they allow passes. Classes come back as they are.
    """
    if not isinstance(function, FunctionType):
        return function
    signature = inspect.signature(function)
    annotations = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}

    @wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for name, given in signature.bind_partial(*args, **kwargs).arguments.items():
            if want := _refusal(name, annotations[name], given):
                raise KitError(f"{function.__name__} takes {want} as {name}, not {_told(given)}.")
        return function(*args, **kwargs)

    return checking


def _refusal(name: str, annotation: str, given: Any) -> str:
    """What it should have been; empty where it is, or may be."""
    if name == "pipe" and "str" not in annotation:
        return "" if hasattr(given, "unet") else _PIPELINE
    if name == "saes":
        return "" if _are_saes(given) else _SAES
    kinds = _alternatives(annotation)
    if any(_fits(given, kind) for kind in kinds):
        return ""
    return " or ".join(dict.fromkeys(_WANTED.get(kind) or _PLAIN[kind][1] for kind in kinds))


def _alternatives(annotation: str) -> list[str]:
    """The names of what an annotation allows, without what is in brackets behind them."""
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", annotation)) != annotation:
        annotation = shorter
    return [name.strip() for name in annotation.split("|")]


def _fits(given: object, kind: str) -> bool:
    """Whether it is of this kind, or the kind is none that is looked at."""
    if kind in _WANTED:
        return _is_a(given, kind)
    return isinstance(given, _PLAIN[kind][0]) if kind in _PLAIN else True


def _are_saes(given: Any) -> bool:
    """Whether these are SAEs: one, several, or a mapping to them; an iterator is not used up to see."""
    several = given.values() if isinstance(given, Mapping) else [given] if _is_a(given, "SAE") else given
    if isinstance(several, Iterator):
        return True
    return isinstance(several, Iterable) and all(_is_a(each, "SAE") for each in several)


def _is_a(given: object, kind: str) -> bool:
    """Whether its class has a parent of this name: to import them all would take seconds."""
    return any(parent.__name__ == kind for parent in type(given).__mro__)


def _told(given: object) -> str:
    """How a message names what was given: plain values as they are, things by their class."""
    plain = isinstance(given, str | int | float | bool | list | tuple | dict | None) and len(repr(given)) < 60
    return repr(given) if plain else f"{'an' if type(given).__name__[0] in 'AEIO' else 'a'} {type(given).__name__}"

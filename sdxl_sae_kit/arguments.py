"""What public functions refuse before they begin: things of another kind than their signature asks for.

Covered are the kit's public functions and `FeatureStats.measure`, which are decorated with `checked`. Constructors and
other class methods (`Store.at`, `SAE.load`, `LabelStore.of`, …) look at what they are given themselves.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar

from sdxl_sae_kit.errors import KitError, did_you_mean

if TYPE_CHECKING:
    from sdxl_sae_kit.sae import SAE

P = ParamSpec("P")
R = TypeVar("R")


def _is_sequence(given: object) -> bool:
    return hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, Mapping)


_WANTED = {
    "SAE": "one SAE, such as saes['up.0.1', 'k10']",
    "FeatureStats": "FeatureStats, such as FeatureStats.measure(sae, cache)",
    "ActivationCache": "a cache, such as collect gives",
    "Activations": "a cache, such as collect gives, or a stream",
    "LabelStore": "a LabelStore, such as LabelStore.of(stats)",
    "Store": "a Store",
}
_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda given: isinstance(given, str), "a text"),
    "Path": (lambda given: isinstance(given, os.PathLike), "a path"),
    "None": (lambda given: given is None, "None"),
    "Mapping": (lambda given: isinstance(given, Mapping), "a mapping"),
    "Sequence": (_is_sequence, "a list"),
    "Iterable": (lambda given: isinstance(given, Iterable), "a list"),
}
_SAES = "SAEs, such as train gives, or one or several of them"
_PIPELINE = "a pipeline, such as load_pipeline('tiny-turbo') gives"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which refuses arguments of a wrong kind in words instead of failing at them further down.

    Looked at is what its annotations say by name: the kit's classes, texts, paths, mappings and lists; `pipe`; and
    `saes`. What else they allow passes. A list is whatever has a length and an order, such as a tuple or an array: no
    set, whose order is chance, and no generator, which can be read but once.
    """
    parameters = inspect.signature(function).parameters
    asked = {name: _alternatives(str(parameter.annotation)) for name, parameter in parameters.items()}
    asked = {name: kinds for name, kinds in asked.items() if _are_looked_at(name, kinds)}
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, given in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in asked:
                if want := _refusal(name, asked[name], given):
                    raise KitError(f"{function.__name__} takes {want} as {name}, not {_told(given)}.")
            elif name not in parameters and not more:
                hint = did_you_mean(name, parameters)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}.{hint}")
        return function(*args, **kwargs)

    return checking


def is_sae(given: object) -> TypeGuard[SAE]:
    """Whether it is an SAE, or a module around one that hands on what is asked of it, as that of torch.compile does."""
    inner = (getattr(given, name, None) for name in ("_orig_mod", "module"))
    return _is_a(given, "SAE") or (hasattr(given, "encode") and any(_is_a(each, "SAE") for each in inner))


def _are_looked_at(name: str, kinds: list[str]) -> bool:
    return _is_pipeline(name, kinds) or name == "saes" or all(kind in _WANTED or kind in _PLAIN for kind in kinds)


def _is_pipeline(name: str, kinds: list[str]) -> bool:
    return name == "pipe" and "str" not in kinds


def _refusal(name: str, kinds: list[str], given: Any) -> str:
    """What it should have been; empty where it is."""
    if _is_pipeline(name, kinds):
        return "" if hasattr(given, "unet") else _PIPELINE
    if name == "saes":
        return "" if _are_saes(given) else _SAES
    if any(_fits(given, kind) for kind in kinds):
        return ""
    return " or ".join(dict.fromkeys(_WANTED.get(kind) or _PLAIN[kind][1] for kind in kinds))


def _alternatives(annotation: str) -> list[str]:
    """The names of what an annotation allows, without what is in brackets behind them."""
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", annotation)) != annotation:
        annotation = shorter
    return [name.strip() for name in annotation.split("|")]


def _fits(given: Any, kind: str) -> bool:
    if kind == "SAE":
        return is_sae(given)
    return _is_a(given, kind) if kind in _WANTED else _PLAIN[kind][0](given)


def _are_saes(given: Any) -> bool:
    """Whether these are SAEs: one, several, or a mapping to them; an iterator is not used up to see."""
    several = given.values() if isinstance(given, Mapping) else [given] if is_sae(given) else given
    if isinstance(several, Iterator):
        return True
    return isinstance(several, Iterable) and all(is_sae(each) for each in several)


def _is_a(given: object, kind: str) -> bool:
    """Whether its class, as it gives it out, has a parent of this name: to import them all would take seconds."""
    return any(parent.__name__ == kind for parent in given.__class__.__mro__)


def _told(given: object) -> str:
    """How a message names what was given: plain values as they are, things by their class."""
    plain = isinstance(given, str | int | float | bool | list | tuple | dict | None)
    try:
        text = repr(given) if plain else ""
    except Exception:  # what lies in a list may not be able to say what it is
        text = ""
    if text and len(text) < 60:
        return text
    return f"{'an' if type(given).__name__[0] in 'AEIOaeio' else 'a'} {type(given).__name__}"

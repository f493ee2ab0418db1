"""Which settings a benchmark of edits tries: methods with their numbers of features, strengths and blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from sdxl_sae_kit.amounts import counted, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import HookpointError, KitError, did_you_mean
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, SDXL
from sdxl_sae_kit.plans import duration
from sdxl_sae_kit.studies.transport import ENDS, METHODS, Setting

Methods = Sequence[str] | Mapping[str, Mapping[str, Sequence[float]]]
ByBlock = tuple[str, int | None, float]

_FEATURES = {"k": (1 / 256, 1 / 128, 1 / 64, 1 / 32), "strength": (1.0, 2.0)}
_GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "sae": _FEATURES,
    "sae_adaptive": _FEATURES,
    "steering": {"strength": (0.25, 0.5, 1.0, 2.0)},
    "neurons": {"k": tuple(thousands / 204.8 for thousands in (5, 10, 20, 40, 80)), "strength": (1.0, 2.0)},
    "random": {"k": _FEATURES["k"], "strength": (1.0, 2.0, 4.0, 8.0)},  # further: features that do less
}
"""Grids of the benchmark, k as shares of all there are: 80 to 640 of SDXL's 20,480 features, 5 to 80 of its 204.8
thousand neurons."""


def settings_of(
    methods: Methods, n_features: Mapping[str, int], n_neurons: Mapping[str, int], by_block: ByBlock | None = None
) -> tuple[Setting, ...]:
    """Every setting that is asked for, once: `ENDS` first, then by method, k and strength, then block by block.

    Args:
        methods: names, with the benchmark's grids, or a mapping of each to its own {"k": [...], "strength": [...]},
            of which what is left out is the benchmark's.
        n_features, n_neurons: how many each block has, by hookpoint.
        by_block: (method, k, strength), which is also tried with all blocks, each alone, and each left out.

    Raises:
        KitError: unknown methods or settings, k for steering, more features than there are, numbers that are no such,
            the same twice, or one block alone to compare.
    """
    found = [Setting(name, None, 0.0, ()) for name in ENDS]
    blocks = tuple(n_features)
    for method, given in _named(methods).items():
        if method not in ENDS:
            there = n_neurons if method == "neurons" else n_features
            found += [
                _setting(method, k, strength, blocks, there)
                for k, strength in _grid(method, given, sum(there.values()))
            ]
    if by_block is not None:
        found += _by_block(by_block, n_features, n_neurons)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Forecast:
    """What a benchmark draws, and how long that takes."""

    n_items: int
    n_settings: int
    """`ENDS` included."""
    num_inference_steps: int
    """Of each picture."""
    seconds: float | None = None
    """Of all pictures; None where that is not known."""

    @property
    def n_pictures(self) -> int:
        """One of every item in every setting."""
        return self.n_items * self.n_settings

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", about {duration(self.seconds)}"
        return (
            f"{counted(self.n_items, 'items')} in {counted(self.n_settings, 'settings')}: "
            f"{counted(self.n_pictures, 'pictures')} in {counted(self.num_inference_steps, 'steps')} each{took}."
        )


@checked
def forecast_riebench(
    n_items: int,
    methods: Methods = METHODS,
    by_block: ByBlock | None = None,
    *,
    hookpoints: Sequence[str] = DEFAULT_HOOKPOINTS,
    num_inference_steps: int = 4,
    seconds_per_picture: float | None = None,
) -> Forecast:
    """Forecast what `riebench` draws, for SAEs and blocks as large as SDXL's, without loading any model.

    Args:
        n_items, methods, by_block, num_inference_steps: as `riebench` takes them.
        hookpoints: of the SAEs.
        seconds_per_picture: above 0: how long one takes in so many steps, judge and all; without it no time is told.

    Raises:
        KitError: what `riebench` would refuse, no items or steps, or a time that is none.
        HookpointError: SDXL has no such block.

    >>> print(forecast_riebench(296, seconds_per_picture=0.5))
    296 items in 48 settings: 14,208 pictures in 4 steps each, about 1.97 hours.
    """
    blocks = [hookpoints] if isinstance(hookpoints, str) else list(hookpoints)
    if not blocks:
        raise KitError("forecast_riebench: hookpoints are one or more, such as ['down.2.1', 'up.0.1'], not none.")
    for block in blocks:
        if block not in SDXL:
            raise HookpointError(f"SDXL has no hookpoint {block!r}, only {', '.join(SDXL)}.{did_you_mean(block, SDXL)}")
    settings = settings_of(methods, dict.fromkeys(blocks, 5_120), dict.fromkeys(blocks, 51_200), by_block)
    found = Forecast(
        whole_number("forecast_riebench: n_items", n_items), len(settings),
        whole_number("forecast_riebench: num_inference_steps", num_inference_steps),
    )  # fmt: skip
    if seconds_per_picture is None:
        return found
    _check_positive("forecast_riebench: seconds_per_picture", seconds_per_picture)
    return replace(found, seconds=found.n_pictures * seconds_per_picture)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise KitError(f"{name} is a finite number above 0, not {value!r}.")


def _named(methods: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(methods, str | Sequence | Mapping):
        raise KitError(f"riebench: methods are names such as ['sae', 'random'], or a mapping, not {methods!r}.")
    names = [methods] if isinstance(methods, str) else list(methods)
    for name in names:
        if name not in (*METHODS, *ENDS):
            hint = did_you_mean(str(name), METHODS)
            raise KitError(f"riebench: methods are {', '.join(METHODS)}, not {name!r}.{hint}")
    if len(set(names)) < len(names):
        raise KitError(f"riebench: methods has one twice: {', '.join(names)}. Name each once.")
    return methods if isinstance(methods, Mapping) else {name: {} for name in names}


def _grid(method: str, given: Any, total: int) -> list[tuple[int | None, float]]:
    default = _GRIDS[method]
    if not isinstance(given, Mapping):
        raise KitError(f"riebench: methods[{method!r}] is a mapping such as {_example(default)}, not {given!r}.")
    for name in given:
        if name not in default:
            hint = did_you_mean(str(name), default)
            raise KitError(f"riebench: {method} takes {' and '.join(default)}, no {name!r}. Leave it out.{hint}")
    for name, values in given.items():
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        if not listed or not values or len(set(map(repr, values))) < len(values):
            raise KitError(
                f"riebench: {name} of {method} is a list of different numbers, such as {_example(default)[name]}, "
                f"not {values!r}."
            )
    own = dict.fromkeys(max(1, round(share * total)) for share in default.get("k", ()))
    return [
        (k, strength) for k in given.get("k", own) or [None] for strength in given.get("strength", default["strength"])
    ]


def _example(grid: Mapping[str, Any]) -> dict[str, list[int]]:
    return {"k": [8, 16], "strength": [1, 2]} if "k" in grid else {"strength": [1, 2]}


def _setting(method: str, k: Any, strength: Any, blocks: tuple[str, ...], there: Mapping[str, int]) -> Setting:
    """One setting, if these blocks have as many as it takes."""
    _check_positive(f"riebench: strength of {method}", strength)
    if method == "steering":
        if k is not None:
            raise KitError(f"riebench: steering moves whole updates, so its k is None, not {k!r}.")
        return Setting(method, None, float(strength), blocks)
    k, total = whole_number(f"riebench: k of {method}", k), sum(there[block] for block in blocks)
    if k > total:
        raise KitError(f"riebench: k of {method} is at most {total:,}, which is all that {', '.join(blocks)} have.")
    return Setting(method, k, float(strength), blocks)


def _by_block(asked: Any, n_features: Mapping[str, int], n_neurons: Mapping[str, int]) -> list[Setting]:
    if not isinstance(asked, tuple | list) or len(asked) != 3 or asked[0] not in METHODS:
        raise KitError(
            f"riebench: by_block is a method, k and strength, such as ('sae', 8, 2.0) or ('steering', None, 1.0), not "
            f"{asked!r}."
        )
    method, k, strength = asked
    blocks = tuple(n_features)
    if len(blocks) < 2:
        raise KitError(f"riebench: by_block compares blocks, and there is only {blocks[0]}. Pass SAEs of others too.")
    alone = [(block,) for block in blocks]
    without = [tuple(each for each in blocks if each != block) for block in blocks]
    there = n_neurons if method == "neurons" else n_features
    return [_setting(method, k, strength, used, there) for used in (blocks, *alone, *without)]

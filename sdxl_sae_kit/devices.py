"""Devices and number formats by name."""

from __future__ import annotations

import os

import torch

from sdxl_sae_kit.errors import ModelError, did_you_mean

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_SHORTHANDS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def choose_device(device: str | None) -> str:
    """The device given, or the best there is.

    Raises:
        ModelError: torch does not have it.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device is None:
        kind = next(kind for kind, count in counts.items() if count)
        local = int(os.environ.get("LOCAL_RANK", "0"))  # each of several processes takes a device of its own
        return f"cuda:{local % counts['cuda']}" if kind == "cuda" and local else kind
    kind, _, index = str(device).partition(":")
    if kind not in counts or not (index or "0").isdecimal():
        raise ModelError(f"No device {device!r}; it can be {', '.join(counts)}, cuda:1, ….{did_you_mean(kind, counts)}")
    if int(index or 0) >= counts[kind]:
        there = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ModelError(f"Device {device!r} is not there; torch finds {there}. Leave device out to take the best.")
    return str(device)


def choose_dtype(dtype: torch.dtype | str | None, device: str) -> torch.dtype:
    """The dtype given, or float16, but float32 on the CPU; errors are those of `dtype_name`."""
    if dtype is None:
        return torch.float32 if device == "cpu" else torch.float16
    return DTYPES[dtype_name(dtype)]


def dtype_name(dtype: torch.dtype | str) -> str:
    """Name in `DTYPES` of a torch dtype, its name or a shorthand such as "fp16".

    Raises:
        ModelError: it is none of them.
    """
    name = str(dtype).removeprefix("torch.")
    name = DTYPE_SHORTHANDS.get(name, name)
    if name not in DTYPES:
        raise ModelError(f"No dtype {str(dtype)!r}; it can be {', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}")
    return name

"""Looks at this machine and its installation: what is there, what would fail, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdxl_sae_kit import installation, machine
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.health import Check, Diagnosis, look


@checked
def diagnose(store: Store | Path | str | None = None) -> Diagnosis:
    """What is installed here, which device, memory and disk there are, what would fail, and how to mend it.

    Takes seconds, writes nothing but a temporary folder at the store, and asks nothing of the network.

    Args:
        store: the store to look at; the default one if left out.

    Returns:
        A `Diagnosis`: `healthy` unless something keeps the kit from working, `checks` one by one.

    Example:
        >>> diagnosis = diagnose()
        >>> print(diagnosis.summary)  # doctest: +SKIP
        20 checks: 19 ok, 1 with a warning, 0 failed.
    """
    root = Store.at(store).root
    looked: dict[str, Callable[[], Check | Sequence[Check]]] = {
        "Python": installation.check_python,
        "packages": installation.check_packages,
        "extras": installation.check_extras,
        "torchvision": installation.check_torchvision,
        "embedded models": installation.check_weights,
        "JupyterLab": installation.check_jupyterlab,
        "kernel python3": installation.check_kernel,
        "browser for PDF": installation.check_browser,
        "device": machine.check_device,
        "CPU threads": machine.check_threads,
        "memory": machine.check_memory,
        "disk": lambda: machine.check_disk(root),
        "store": lambda: machine.check_store(root),
        "stabilityai/sdxl-turbo": _check_real_model,
    }
    return Diagnosis(tuple(check for name, of in looked.items() for check in look(name, of)))


def _check_real_model() -> Check:
    from huggingface_hub import constants

    return machine.check_real_model(Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE)

"""Diffusers and transformers without their chatter: progress bars, and a notice that torchvision is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


@contextmanager
def quiet() -> Iterator[None]:
    """Import, load or save models within this block without noise; outside it everything is logged as ever."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Image processors are imported with every pipeline and never used here, torchvision or not.
    notices = logging.getLogger("transformers.utils.import_utils")
    showing_bars = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    notices.addFilter(_is_not_about_torchvision)
    for library in showing_bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in showing_bars:
            library.enable_progress_bar()
        notices.removeFilter(_is_not_about_torchvision)


@contextmanager
def hushed() -> Iterator[None]:
    """Only errors of diffusers and transformers are logged within this block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(each, each.get_verbosity()) for each in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)

"""The command line, `sdxl-sae-kit`: what it is asked, how it ends; its verbs are in `commands`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

import shtab

from sdxl_sae_kit.commands import benchmark, collection, doctor, features, reports, store, studies, tiny, training
from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.commands.options import PREAMBLE
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.stamps import kit_version

DONE, FAILED, INTERRUPTED = 0, 1, 130
ABOUT = """
Sparse autoencoders on the block updates of SDXL's U-Net. Results are kept in a store, and asking for one again finds
it. The last line on stdout is where it lies; progress goes to stderr. Exit codes: 0 done, 1 refused or failed, 2 wrong
usage, 130 interrupted.
"""
_INTERRUPTED = "Interrupted; what was finished is kept, and of a training its last checkpoint. Run it again to go on."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 1 after a mistake and 130 after Ctrl-C, which one line explains."""
    try:
        options = _parser().parse_args(arguments)
        return _run(options)
    finally:
        _flush()


def _run(options: argparse.Namespace) -> int:
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    format_warning, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        with redirect_stdout(sys.stderr):  # progress must not stand among the answer
            answer: Answer = options.run(options)
        _tell(answer, options.json)
        if answer.failure is not None:
            raise answer.failure
    except KitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, terminate)
        warnings.formatwarning = format_warning
    return DONE


def _warning_line(message: Warning | str, *place: object, **line: object) -> str:
    """A warning without the line of the kit that gave it, which tells nothing in a shell."""
    return f"{message}\n"


def _tell(answer: Answer, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun started, the first speaks
        return
    try:
        print(answer.to_json() if as_json else answer.text, flush=True)
    except BrokenPipeError:
        _close_stdout()


def _flush() -> None:
    """What nobody reads any more, as in `sdxl-sae-kit artifacts list | head`, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it ends


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdxl-sae-kit", description=ABOUT)
    parser.add_argument("--version", action="version", version=kit_version())
    parser.add_argument(
        "--print-completion",
        action=shtab.completion_action(preamble=PREAMBLE),
        choices=("bash", "zsh", "tcsh"),  # shtab knows more, for which `commands.options` has no words
        help="print a completion script, for your shell's start-up file",
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for family in (collection, training, features, studies, benchmark, reports, store, tiny, doctor):
        family.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())

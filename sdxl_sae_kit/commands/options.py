"""How verbs are declared: their help, options that many share, what shells complete, and how text becomes values."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import shtab

from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS, SDXL

MODELS = ("tiny-turbo", "tiny-base", "stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0")
SCALES = ("smoke", "demo")
PREAMBLE = {
    "bash": f"""
_sdxl_sae_kit_models() {{ compgen -W "{" ".join(MODELS)}" -- "$1"; compgen -d -- "$1"; }}
_sdxl_sae_kit_scales() {{ compgen -W "{" ".join(SCALES)}" -- "$1"; }}
_sdxl_sae_kit_prompts() {{ compgen -W "world scenes" -- "$1"; compgen -f -- "$1"; }}
_sdxl_sae_kit_hookpoints() {{
  local before=; [[ $1 == *,* ]] && before="${{1%,*}},"
  compgen -P "$before" -W "{" ".join(SDXL)}" -- "${{1##*,}}"
}}
"""
}
"""What the completions below call."""


def completing(name: str, words: Iterable[str], files: str = "") -> dict[str, str]:
    """What shells offer for an option that takes other words too, so that they cannot be argparse's choices."""
    offered = " ".join(words)
    return {"bash": f"_sdxl_sae_kit_{name}", "zsh": files or f"({offered})", "tcsh": f"({offered})"}


COMPLETE = {
    "models": completing("models", MODELS),
    "scales": completing("scales", SCALES),
    "prompts": completing("prompts", ("world", "scenes"), "_files"),
    "hookpoints": completing("hookpoints", SDXL) | {"zsh": f"_values -s , hookpoint {' '.join(SDXL)}"},
    "file": shtab.FILE,
    "folder": shtab.DIRECTORY,
}


class Help(argparse.HelpFormatter):
    """Paragraphs are wrapped one by one, and lines that begin with spaces stand as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(each if each.startswith(" ") else textwrap.fill(each, width) for each in paragraphs)


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], Answer], summary: str, about: str = "", example: str = ""
) -> argparse.ArgumentParser:
    """Declare a verb: what it makes and costs, an example, and `--json`, which all have."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {about.strip()}".strip(),
        epilog="\n".join(["  example:", *(f"    {line}" for line in example.strip().splitlines())])
        if example
        else None,
        formatter_class=Help,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)
    return parser


def option(
    parser: argparse._ActionsContainer, name: str, kind: Callable[[str], Any], default: Any, text: str, *,
    complete: str | None = None, **more: Any,
) -> None:  # fmt: skip
    """Declare an option or, without dashes, a positional argument, and say its default where the text does not.

    Spaces part the names of an option that has several.
    """
    if default is not None and "default" not in text:
        text += f" (default: {_said(default)})"
    given = more if not name.startswith("-") else {"default": default, **more}
    action = parser.add_argument(*name.split(), type=kind, help=text.replace("%", "%%"), **given)
    if complete is not None:
        action.complete = COMPLETE[complete]  # type: ignore[attr-defined]  # shtab reads it


def _said(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(_said, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def add_store(parser: argparse.ArgumentParser) -> None:
    """Where artifacts lie."""
    text = "folder of artifacts (default: $SDXL_SAE_KIT_STORE, else artifacts/ of the checkout)"
    option(parser, "--store", Path, None, text, complete="folder")


def add_model(parser: argparse.ArgumentParser, default: str | None, text: str = "") -> None:
    """Which pipeline: what `load_pipeline` takes."""
    group = parser.add_argument_group("the model")
    named = f"tiny-turbo, tiny-base, a diffusers folder, or a hub id, which needs the network{text}"
    option(group, "--model", str, default, named, complete="models")
    option(group, "--revision", str, None, "branch, tag or commit on the hub")
    option(
        group, "--lora", str, None, "LoRA weights to fuse: a safetensors file, its folder or a hub id", complete="file"
    )
    option(group, "--device", str, None, "cuda, cuda:1, mps or cpu (default: the first of them that is there)")
    numbers = "what the model computes in: float16, bfloat16 or float32 (default: float16, on the CPU float32)"
    option(group, "--compute-dtype", str, None, numbers)


def add_hookpoints(parser: argparse.ArgumentParser, default: tuple[str, ...] | None = DEFAULT_HOOKPOINTS,
                   text: str = "blocks of the U-Net, by commas") -> None:  # fmt: skip
    """Which blocks."""
    option(parser, "--hookpoints", words, default, text, complete="hookpoints", metavar="BLOCKS")


def taken(options: argparse.Namespace, function: Callable[..., Any], *besides: str) -> dict[str, Any]:
    """The options that are arguments of this function, but those given to it otherwise."""
    names = inspect.signature(function).parameters.keys() - set(besides)
    return {name: value for name, value in vars(options).items() if name in names}


# How text becomes values ----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words by commas."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("name at least one, several by commas")
    return found


def integers(text: str) -> list[int]:
    """Whole numbers by commas."""
    return _numbers(text, int, "whole numbers")


def numbers(text: str) -> list[float]:
    """Numbers by commas."""
    return _numbers(text, float, "numbers")


def _numbers(text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give {what} by commas, such as 0,1") from None

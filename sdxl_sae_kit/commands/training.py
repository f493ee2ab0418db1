"""`train`: SAEs on the updates of a cache."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.commands import inputs
from sdxl_sae_kit.commands.answers import Answer, table
from sdxl_sae_kit.commands.options import add_hookpoints, add_store, add_verb, numbers, option, taken
from sdxl_sae_kit.configs import Normalize, SAEConfig
from sdxl_sae_kit.errors import KitError, did_you_mean

ABOUT = """
All SAEs, at all blocks, learn in one pass over the cache; held-out prompts are never trained on, and what each explains
of theirs is printed. Memory: 16 bytes × 2 × d_in² × expansion for each SAE. A checkpoint every 500 steps: killed, it
goes on when run again. The options of an SAE hold for all of them; each --config names one and says what is different.
"""
EXAMPLE = """
sdxl-sae-kit train CACHE -k 10 --lr 3e-3 --dead-after 50000 --batch-size 1024 --epochs 10
sdxl-sae-kit train CACHE --lr 3e-3 --config k5:k=5 --config k20:k=20,normalize=whiten
"""


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # what argparse calls it where a text is wrong
    return read


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "k": (_or_none(int), "active latents per token; none for a jumprelu held back by --sparsity-coef alone"),
    "kind": (str, "how latents become active"),
    "expansion": (float, "d_sae / d_in"),
    "prefixes": (
        numbers,
        "Matryoshka: ascending shares of d_sae below 1, by commas, such as 0.125,0.5 (default: none)",
    ),
    "normalize": (str, "what is done to tokens first"),
    "subtract_b_dec": (_truth, "true or false: whether b_pre is b_dec, or 0"),
    "auxk": (int, "dead latents that try to explain each token's SAE error"),
    "auxk_coef": (float, "weight of that in the loss; 0 leaves it out"),
    "dead_after": (int, "tokens without firing after which a latent counts as dead"),
    "resample_every": (_or_none(int), "tokens after which dead latents start anew (default: none, so never)"),
    "sparsity_coef": (float, "jumprelu: weight of (L0 / k − 1)² in the loss"),
    "lr": (float, "Adam's learning rate"),
    "warmup_steps": (int, "steps over which it rises from 0"),
    "decay_steps": (int, "last steps, over which it falls to 0"),
    "k_start": (_or_none(int), "k of the first step (default: none, so k from the start)"),
    "anneal_steps": (int, "steps over which it falls to k"),
    "seed": (int, "of the weights"),
}
"""What reads each field of `SAEConfig`, and what it is."""
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("topk", "batchtopk", "jumprelu"),  # `kinds.KINDS`, which waits for torch
    "normalize": get_args(Normalize),
}


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = add_verb(verbs, "train", _train, "train SAEs on the updates of a cache", ABOUT, EXAMPLE)
    option(parser, "cache", str, None, f"updates: {inputs.NAMING}", complete="folder")
    add_hookpoints(parser, None, "blocks, by commas (default: all of the cache)")
    option(parser, "--batch-size", int, 4096, "tokens per step")
    option(parser, "--epochs", int, 1, "passes over the training tokens")
    fast = "what the encoder computes in: bfloat16 is faster on GPUs only"
    option(parser, "--precision", str, "float32", fast, choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    option(parser, "--device", str, None, "cuda, cuda:1, mps or cpu (default: cuda if there is one, else cpu)")
    add_store(parser)
    group = parser.add_argument_group("the SAEs")
    for field in fields(SAEConfig):
        read, text = FIELDS[field.name]
        name = "-k --k" if field.name == "k" else f"--{field.name.replace('_', '-')}"
        option(group, name, read, field.default, text, choices=CHOICES.get(field.name))
    parts = "one SAE by name, with those of these options that are its own; repeat it for several (default: one SAE)"
    option(group, "--config", _named, None, parts, action="append", metavar="NAME:FIELD=VALUE,…", dest="configs")


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """A name and the fields that are said of it: `k20:k=20,prefixes=0.25,0.5`."""
    name, _, said = text.partition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with a name, such as k20:k=20")
    settings = {}
    for part in re.split(r",(?=\w+=)", said) if said else []:
        field, _, value = part.partition("=")
        if field not in FIELDS:
            raise argparse.ArgumentTypeError(f"an SAE has no setting {field!r}.{did_you_mean(field, FIELDS)}")
        try:
            settings[field] = FIELDS[field][0](value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{field} cannot be {value!r}") from None
    return name, settings


def _train(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.training import train

    common = {field.name: getattr(options, field.name) for field in fields(SAEConfig)}
    names = [name for name, _ in options.configs or ()]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise KitError(f"--config: {', '.join(twice)} is there twice. Give every SAE a name of its own.")
    cache = inputs.open_cache(options.cache, options.store)
    configs = {name: SAEConfig(**{**common, **own}) for name, own in options.configs or ()}
    settings = taken(options, train, "data", "configs")
    return _answer(train(cache, configs or SAEConfig(**common), **settings), options.store)


def _answer(saes: Any, store: Path | None) -> Answer:
    folders = {key: Store.at(store).root / "saes" / sae.name for key, sae in saes.items()}
    rows = [
        {"hookpoint": row["hookpoint"], "config": row["config"], "explained variance": row["explained_variance"],
         "95 % interval": tuple(row["explained_variance_interval"] or ()), "L0": row["l0"],
         "dead share": row["dead_share"], "held-out tokens": row["n_tokens"]}
        for row in saes.rows()
    ]  # fmt: skip
    told = [
        {"folder": folders[key], "name": sae.name, "kind": "saes", "hookpoint": key[0], "config": key[1], **sae.metrics}
        for key, sae in saes.items()
    ]
    failed = {" ".join(key): why for key, why in saes.failures.items()}
    why = " ".join(f"{key}: {reason}" for key, reason in failed.items())
    failure = KitError(f"{counted(len(failed), 'SAEs')} stopped. {why}") if failed else None
    text = "\n".join([table(rows), "", *map(str, folders.values())])
    return Answer(text, {"saes": told, "stopped": failed}, failure)

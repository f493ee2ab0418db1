"""`collect`: updates of many images into a cache."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sdxl_sae_kit.commands import inputs
from sdxl_sae_kit.commands.answers import Answer, of_artifact
from sdxl_sae_kit.commands.options import (
    MODELS,
    add_hookpoints,
    add_model,
    add_store,
    add_verb,
    integers,
    option,
    taken,
)

ABOUT = """
Every prompt becomes an image from a seed of its own, and what chosen blocks add (their updates) is kept in HDF5 shards:
images × steps × halves × tokens × d_in × 2 bytes in float16. It says what it will cost before it starts; --plan says it
and stops. Killed, it goes on when run again; `torchrun -m sdxl_sae_kit collect …` shares it over processes.
"""
EXAMPLE = """
sdxl-sae-kit collect world -n 500 --hookpoints down.2.1,up.0.1
sdxl-sae-kit collect prompts.txt --model stabilityai/sdxl-turbo --tokens-per-image 32 --plan
"""
KNOWN = tuple(name for name in MODELS if "/" in name)
"""Models of the hub whose forecast needs no weights: the kit knows their shapes."""


def add(verbs: Any) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs, "collect", _collect, "run a model over prompts and keep what its blocks add", ABOUT, EXAMPLE
    )
    prompts = "world, scenes, a .txt, .jsonl or .csv file, hf:owner/name, or hf: and a folder"
    option(parser, "source", str, None, prompts, complete="prompts")
    option(parser, "-n", int, None, "prompts; needed for world and scenes (default: all there are)")
    option(parser, "--seed", int, 0, "of generated prompts, and of the first image; the next has one more")
    option(
        parser, "--column", str, None, "which field of the source holds the prompts (default: text, prompt or caption)"
    )
    option(parser, "--split", str, "train", "of a dataset")
    add_hookpoints(parser)
    option(parser, "--num-inference-steps", int, None, "denoising steps (default: as the model is meant to be used)")
    option(parser, "--guidance-scale", float, None, "0 for none (default: as the model is meant to be used)")
    option(parser, "--height", int, None, "pixels (default: the model's)")
    option(parser, "--width", int, None, "pixels (default: the model's)")
    option(parser, "--steps", integers, None, "which denoising steps to keep, from 0, by commas (default: all)")
    option(parser, "--half", str, None, "with guidance, which half to keep (default: both)", choices=("cond", "uncond"))
    few = "keep so many tokens of every grid, drawn at random: enough to train on, not to look at (default: all)"
    option(parser, "--tokens-per-image", int, None, few)
    option(parser, "--batch-size", int, 32, "images at once; another one makes another cache")
    pictures = "what is kept of pictures; none is fastest"
    option(parser, "--images", str, "thumbnails", pictures, choices=("thumbnails", "webp", "png", "none"))
    stored = ("float16", "bfloat16", "float32")
    option(parser, "--dtype", str, "float16", "how numbers are stored", choices=stored)
    add_store(parser)
    forecast = "say how much it will write and how long it takes, and stop; the two hub models that the kit knows by "
    forecast += f"name ({' and '.join(KNOWN)}) are not loaded, and not timed; any other is"
    parser.add_argument("--plan", action="store_true", help=forecast)
    add_model(parser, "tiny-turbo")


def _collect(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.collection import collect
    from sdxl_sae_kit.plans import plan
    from sdxl_sae_kit.prompts import load_prompts

    prompts = load_prompts(options.source, options.n, seed=options.seed, column=options.column, split=options.split)
    images = None if options.images == "none" else options.images
    settings = {**taken(options, collect), "images": images}
    if options.plan:
        forecast = plan(options.model if options.model in KNOWN else inputs.open_pipeline(options), prompts, **settings)
        return Answer(str(forecast), {**asdict(forecast), "fits": forecast.fits})
    cache = collect(inputs.open_pipeline(options), prompts, **settings)
    held_out = int(prompts.held_out.sum())
    told = {"images": cache.n_images, "held_out": held_out, "hookpoints": cache.hookpoints, "bytes": cache.nbytes}
    return of_artifact(cache.artifact, repr(cache), **told)

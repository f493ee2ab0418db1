"""`riebench`: edits by moving features, scored beside controls."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sdxl_sae_kit.commands.answers import Answer, table
from sdxl_sae_kit.commands.options import add_hookpoints, add_store, add_verb, option, words
from sdxl_sae_kit.errors import KitError

ABOUT = """
Updates are collected and SAEs trained as in notebook 07, unless the store has them; what cannot be done is refused
before. The 4,680 pictures of the small model's benchmark take five to nine minutes on two cores; --plan says what yours
would cost. Interrupted, it goes on when run again with the same settings. --json prints the document that
riebench.schema.json describes.
"""
EXAMPLE = """
sdxl-sae-kit riebench --plan
sdxl-sae-kit riebench --methods sae,random --json > results.json
"""


def add(verbs: Any) -> None:
    """Declare the verb."""
    says = "edit pictures while they are drawn, by every method on the same items, and measure what comes out"
    bench = add_verb(verbs, "riebench", _riebench, says, ABOUT, EXAMPLE)
    option(bench, "--model", str, "tiny-turbo", "as load_pipeline takes it", complete="models")
    option(bench, "--scale", str, "demo", "how much SAEs are trained: smoke or demo", complete="scales")
    items = "world, natural, or the published JSON file (default: world for tiny models, else natural)"
    option(bench, "--items", str, None, items, complete="file")
    option(bench, "-n", int, None, "items of each kind (default: 20 of world, else all there are)", metavar="PER_KIND")
    option(bench, "--saes", str, None, "which of the scale's SAEs, such as k10 (default: the second)", metavar="NAME")
    methods = "of sae, sae_adaptive, steering, neurons, random, by commas (default: all); prompt and none always are"
    option(bench, "--methods", words, None, methods)
    blocks = "default: down.2.1,up.0.2,up.1.0,up.1.1, which decide most, for tiny models, else the four of the paper"
    add_hookpoints(bench, None, f"blocks whose features are moved, by commas ({blocks})")
    steps = "denoising steps of every picture (default: 4, or as a model that is meant to be guided draws)"
    option(bench, "--num-inference-steps", int, None, steps, metavar="STEPS")
    guidance = "of every picture (default: 0, or as such a model draws)"
    option(bench, "--guidance-scale", float, None, guidance, metavar="SCALE")
    option(bench, "--seed", int, 0, "of items and random features")
    option(bench, "--batch-size", int, 20, "items drawn at once")
    bench.add_argument("--plan", action="store_true", help="only say what it costs; draws a few pictures to time them")
    add_store(bench)


def _riebench(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.amounts import whole_number
    from sdxl_sae_kit.attended import few_steps
    from sdxl_sae_kit.hookpoints import resolve
    from sdxl_sae_kit.items import load_items
    from sdxl_sae_kit.pipelines import load_pipeline
    from sdxl_sae_kit.studies.grids import forecast_riebench
    from sdxl_sae_kit.studies.riebench import riebench
    from sdxl_sae_kit.studies.transport import METHODS
    from sdxl_sae_kit.tiny import NAMES
    from sdxl_sae_kit.usual_saes import UsualSAEs

    # All that may be refused comes first: collecting and training can take hours.
    source = options.items or ("world" if options.model in NAMES else "natural")
    items = load_items(source, 20 if options.n is None and source == "world" else options.n, seed=options.seed)
    size = whole_number("--batch-size", options.batch_size)
    saes = UsualSAEs(options.model, options.scale, options.saes, options.store)
    pipe = load_pipeline(options.model)
    named = (resolve(pipe.unet, name).name for name in options.hookpoints or saes.hookpoints)
    hookpoints, methods = list(dict.fromkeys(named)), options.methods or METHODS
    draws = few_steps(pipe, options.num_inference_steps, options.guidance_scale)
    forecast = forecast_riebench(
        len(items), methods, hookpoints=hookpoints, num_inference_steps=draws["num_inference_steps"]
    )
    finders = _finders(options.model)
    if options.plan:
        return _plan(_timed(forecast, pipe, items[:size], draws), saes.forecast(pipe, hookpoints))
    result = riebench(
        pipe, saes.make(pipe, hookpoints), items, methods=methods, **finders, **draws, seed=options.seed,
        batch_size=size, store=options.store,
    )  # fmt: skip
    return _answer(result)


def _timed(forecast: Any, pipe: Any, some: Any, draws: dict[str, Any]) -> Any:
    from sdxl_sae_kit.studies.riebench import time_drawing

    return dataclasses.replace(forecast, seconds=forecast.n_pictures * time_drawing(pipe, some, **draws))


def _plan(forecast: Any, before: str) -> Answer:
    drawing = f"{forecast}\nThe time is that of drawing on this machine; edits and the judge come on top."
    told = {**dataclasses.asdict(forecast), "n_pictures": forecast.n_pictures, "before": before}
    return Answer(f"{drawing}\n{before}", told)


def _answer(result: Any) -> Answer:
    from sdxl_sae_kit.amounts import counted
    from sdxl_sae_kit.studies.distances import written

    parts, failure = [], None
    if result.n:
        rows = [
            {name: row[name] for name in ("method", "k", "strength")}
            | {measure: written(row, measure) for measure in result.scores.measures}
            for row in result.rows()
        ]
        parts.append(f"Means over {counted(result.n, 'items')}, with 95 % intervals\n{table(rows)}")
        parts.append(result.sentence())
    else:
        failed = counted(len(result.failed), "items")
        failure = KitError(f"Nothing could be scored: {failed} failed; the reasons are above.")
    if result.failed:
        parts.append(f"Failed items\n{table(result.failed)}")
    return Answer("\n\n".join([*parts, str(result.artifact.folder)]), result.to_json(), failure)


def _finders(model: str) -> dict[str, Any]:
    """What finds masks and judges pictures of a real model; the tiny ones have their own."""
    from sdxl_sae_kit.grounding import GroundedSegmenter
    from sdxl_sae_kit.judges import EmbeddingJudge
    from sdxl_sae_kit.perceptual import Lpips
    from sdxl_sae_kit.similarity import ClipEmbed
    from sdxl_sae_kit.tiny import NAMES

    if model in NAMES:
        return {}
    return {
        "segmenter": GroundedSegmenter(),
        "judge": EmbeddingJudge(ClipEmbed("openai/clip-vit-large-patch14"), Lpips()),
    }

"""`ablate`, `specialize` and `generalize`: what features cause, how blocks differ, what carries over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_sae_kit.commands import inputs
from sdxl_sae_kit.commands.answers import Answer, of_artifact, table
from sdxl_sae_kit.commands.options import (
    add_model,
    add_store,
    add_verb,
    integers,
    numbers,
    option,
    taken,
)

if TYPE_CHECKING:
    from sdxl_sae_kit.studies.results import Ablation

ABLATE = """
Each feature is turned off, and given other doses, on images on which it fires, beside four controls; how much pictures
change inside and outside its region is told with 95 % intervals over features. About a dozen pictures are
drawn for each image of each feature. Killed, it goes on at the batch in hand.
"""
SPECIALIZE = """
Features are described by what they respond to, where and when they fire and what turning them off causes, clustered
over all blocks, and every difference stands beside untrained SAEs, raw channels and random directions. It draws
features × prompts × 2 pictures for each block. Killed, it goes on with what is measured.
"""
GENERALIZE = """
How well SAEs reconstruct updates that they were not trained on (more denoising steps, another model, a fine-tune), and
whether their latents still tell the same. It reads both caches once for each block, and draws nothing.
"""
_JUDGE = "what tells pictures apart: own (the model's), none (pixels only), or a CLIP's folder or hub id"
_SAES = f"one for each block: {inputs.NAMING}"


def add(verbs: Any) -> None:
    """Declare the verbs."""
    _add_ablate(verbs)
    _add_specialize(verbs)
    _add_generalize(verbs)


def _add_ablate(verbs: Any) -> None:
    parser = add_verb(verbs, "ablate", _ablate, "turn features off and measure what changes, beside controls", ABLATE,
                      "sdxl-sae-kit ablate SAE STATS --features 17,40 --doses=-1,0,1,2")  # fmt: skip
    option(parser, "sae", str, None, inputs.NAMING, complete="folder")
    option(parser, "stats", str, None, f"what measure made of it: {inputs.NAMING}", complete="folder")
    option(parser, "--features", integers, None, "latents, by commas (default: the dozen of greatest energy)")
    source = "what collect takes as its source, a file for instance (default: held-out images of the statistics)"
    option(parser, "--prompts", str, None, source, complete="prompts")
    doses = "multiples of the activation, 0 being off; where the first is negative, write --doses=-1,0"
    option(parser, "--doses", numbers, (-1.0, 0.0, 1.0, 2.0, 4.0), doses)
    option(parser, "--prompts-per-feature", int, 12, "images of each feature, at most")
    parser.add_argument("--by-step", action="store_true", help="also turn them off at each denoising step alone")
    option(parser, "--judge", str, "own", _JUDGE)
    option(parser, "--labels", Path, None, "a .jsonl file of labels (default: the SAE's in the store)", complete="file")
    option(parser, "--seed", int, 0, "of the random directions")
    option(parser, "--batch-size", int, 32, "pictures at once")
    add_store(parser)
    add_model(parser, None, " (default: what the SAE was trained on)")


def _ablate(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.labels import LabelStore
    from sdxl_sae_kit.studies.ablation import ablate

    sae, stats = inputs.open_sae(options.sae, options.store), inputs.open_stats(options.stats, options.store)
    labels = inputs.open_labels(options.labels) or LabelStore.of(stats)
    given: dict[str, Any] = {"judge": inputs.open_judge(options.judge), "labels": labels}
    settings = taken(options, ablate, "sae", "stats", *given)
    found = ablate(inputs.open_pipeline(options, sae), sae, stats, **given, **settings)
    told = {"sentence": found.sentence(), "overall": {measure: found.overall(measure) for measure in found.measures}}
    rows = {measure: found.rows(measure) for measure in found.measures}
    return of_artifact(found.artifact, f"{table(_effects(found))}\n\n{found.sentence()}", **told, rows=rows)


def _effects(found: Ablation) -> list[dict[str, Any]]:
    """A line for what was done by each measure: its effect inside the region, semantic ones on the whole picture."""
    from sdxl_sae_kit.studies.controls import CONDITIONS

    overall = {measure: found.overall(measure) for measure in found.measures if found.measured}
    return [
        {"measure": measure, "done": condition, "effect": row[condition],
         "95 % interval": row[f"{condition} interval"], "inside / outside": row[f"{condition} locality"],
         "over": row["over"]}
        for measure, row in overall.items()
        for condition in CONDITIONS
    ]  # fmt: skip


def _add_specialize(verbs: Any) -> None:
    parser = add_verb(verbs, "specialize", _specialize, "test how blocks differ in the features they have", SPECIALIZE,
                      "sdxl-sae-kit specialize SAE_1 SAE_2 CACHE --features-per-block 50")  # fmt: skip
    option(parser, "saes", str, None, _SAES, nargs="+", metavar="sae", complete="folder")
    option(parser, "cache", str, None, f"updates of these blocks: {inputs.NAMING}", complete="folder")
    timing = "updates of several denoising steps, to tell when features are active (default: not told)"
    option(parser, "--timing", str, None, timing, complete="folder")
    option(parser, "--embed", str, None, "a CLIP's folder or hub id, to tell how alike a feature's images are")
    option(parser, "--features-per-block", int, 100, "features of each block, at most")
    option(parser, "--prompts-per-feature", int, 2, "images on which each is turned off; 0 leaves causes out")
    option(parser, "--method", str, "kmeans", "how to cluster", choices=("kmeans", "ward", "mixture"))
    option(parser, "--clusters", int, None, "how many (default: the most stable number)")
    plane = "the plane in which features are drawn; umap needs an extra"
    option(parser, "--embedding", str, "tsne", plane, choices=("tsne", "pca", "umap"))
    option(parser, "--judge", str, "own", _JUDGE)
    option(parser, "--seed", int, 0, "of clustering, plane, shuffles and random directions")
    option(parser, "--permutations", int, 500, "shuffles of the block labels")
    option(parser, "--batch-size", int, 32, "pictures at once")
    add_store(parser)
    add_model(parser, None, " (default: what the first SAE was trained on)")


def _specialize(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.studies.specialization import specialize

    saes = [inputs.open_sae(each, options.store) for each in options.saes]
    cache = inputs.open_cache(options.cache, options.store)
    given: dict[str, Any] = {
        "timing": inputs.open_cache(options.timing, options.store) if options.timing else None,
        "embed": inputs.open_clip(options.embed) if options.embed else None,
        "judge": inputs.open_judge(options.judge),
    }
    settings = taken(options, specialize, "saes", "cache", *given)
    found = specialize(inputs.open_pipeline(options, saes[0]), saes, cache, **given, **settings)
    verdicts = found.verdicts()
    told = {"sentence": found.sentence(), "information": found.information, "verdicts": verdicts, "rows": found.rows()}
    outcomes = table([{key: row[key] for key in ("block", "claim", "outcome")} for row in verdicts])
    return of_artifact(found.artifact, f"{outcomes}\n\n{found.sentence()}", **told)


def _add_generalize(verbs: Any) -> None:
    parser = add_verb(verbs, "generalize", _generalize, "what SAEs make of other steps or another model", GENERALIZE,
                      "sdxl-sae-kit generalize SAE_1 SAE_2 CACHE TARGET_CACHE")  # fmt: skip
    option(parser, "saes", str, None, _SAES, nargs="+", metavar="sae", complete="folder")
    option(parser, "cache", str, None, f"the updates they were trained on: {inputs.NAMING}", complete="folder")
    target = f"updates of (some of) the same prompts and seeds, whole grids: {inputs.NAMING}"
    option(parser, "target", str, None, target, complete="folder")
    own = "an SAE trained on the target, to stand beside; repeat it for several (default: none)"
    option(parser, "--own", str, None, own, action="append", metavar="SAE", complete="folder")
    add_store(parser)


def _generalize(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.studies.generalization import generalize

    saes = [inputs.open_sae(each, options.store) for each in options.saes]
    own = [inputs.open_sae(each, options.store) for each in options.own or ()]
    cache, target = (inputs.open_cache(each, options.store) for each in (options.cache, options.target))
    found = generalize(saes, cache, target, own=own or None, store=options.store)
    shown = ("hookpoint", "half", "who", "explained variance", "explained variance interval", "prompts")
    summary = found.summary()
    told = {"sentence": found.sentence(), "summary": summary, "turnover": found.turnover()}
    rows = table([{key: row[key] for key in shown} for row in summary])
    return of_artifact(found.artifact, f"{rows}\n\n{found.sentence()}", **told)

"""`tiny train` and `tiny measure`: the embedded model, made anew and measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sdxl_sae_kit.commands.answers import Answer, table
from sdxl_sae_kit.commands.options import add_verb, option

TRAIN = "Some hours of two cores; sdxl_sae_kit/tiny/README.md has the rates. Killed, it goes on when run again."
MEASURE = "Five pictures of every caption are drawn, one of them in 20 steps, beside which the rest takes little."

SETTINGS = (
    ("--samples", int, "pictures that the base sees in all"),
    ("--turbo-samples", int, "pictures that the turbo sees in all"),
    ("--vae-samples", int, "pictures that the VAE sees in all"),
    ("--judge-samples", int, "pictures that the judge sees in all"),
    ("--processes", int, "how many train side by side"),
    ("--device", str, "cpu, cuda, cuda:1 or mps"),
    ("--seed", int, "of weights, scenes, captions and noise"),
)
"""Options of `tiny train` that are passed on only where they are given: their defaults are the function's."""


def add(verbs: Any) -> None:
    """Declare the verbs."""
    tiny = verbs.add_parser("tiny", help="the embedded model").add_subparsers(required=True, metavar="COMMAND")
    train = add_verb(tiny, "train", _train, "train it again, going on from what the folder holds", TRAIN)
    option(train, "folder", Path, None, "where checkpoints, log and sample grids go", complete="folder")
    for name, kind, text in SETTINGS:
        train.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text)
    stages = "one stage only, which needs those before it in the folder (the base needs no judge) (default: all)"
    train.add_argument(
        "--stage", choices=("all", "vae", "judge", "base", "turbo"), default=argparse.SUPPRESS, help=stages
    )

    says = "how often it draws what it is told, how good the judge is, how rich updates are"
    measure = add_verb(tiny, "measure", _measure, says, MEASURE)
    option(measure, "--captions", int, 1000, "how many captions and seeds")
    kept = "a folder that `tiny train` made (default: what is in the package)"
    option(measure, "--run", Path, None, kept, dest="folder", complete="folder")


def _train(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.tiny.train import train

    names = ["stage", *(name.removeprefix("--").replace("-", "_") for name, _, _ in SETTINGS)]
    settings = {name: getattr(options, name) for name in names if hasattr(options, name)}
    path = train(options.folder, **settings)
    return Answer(str(path), {"folder": str(options.folder), "file": str(path)})


def _measure(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.amounts import whole_number
    from sdxl_sae_kit.pipelines import load_pipeline
    from sdxl_sae_kit.tiny import WEIGHTS
    from sdxl_sae_kit.tiny.judge import load_judge
    from sdxl_sae_kit.yardstick import measure_adherence, measure_judge, measure_richness, measure_vae

    folder, n = options.folder or WEIGHTS, whole_number("--captions", options.captions, least=8)
    turbo, base = (load_pipeline(folder / name) for name in ("tiny-turbo", "tiny-base"))
    judge = load_judge(folder / "judge")
    settings = {
        "turbo, 1 step": (turbo, 1, 0.0),
        "turbo, 4 steps": (turbo, 4, 0.0),
        "base, 20 steps, guidance 3": (base, 20, 3.0),
    }
    print(f"Drawing {5 * n:,} pictures, {n:,} of them in 20 steps.", file=sys.stderr)
    tables = {
        name: measure_adherence(pipe, n, num_inference_steps=steps, guidance_scale=guidance, judge=judge)
        for name, (pipe, steps, guidance) in settings.items()
    }
    tables["The judge on renders"] = measure_judge(turbo.vae, n, judge)
    tables["The VAE on renders"] = [measure_vae(turbo.vae, n)]
    tables["Updates of turbo at one step"] = measure_richness(turbo, n)
    about = (
        f"Share of {n:,} pictures that show what their caption says, as the judge sees it.\n"
        "Control: commonest, the share of the commonest value, which a model that reads no captions could reach."
    )
    text = "\n\n".join([about, *(f"{name}\n{table(rows)}" for name, rows in tables.items())])
    return Answer(text, {"captions": n, "folder": str(folder), "tables": tables})

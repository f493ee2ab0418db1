"""`measure` and `gallery export`: statistics of an SAE's features, and a page of them."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdxl_sae_kit.commands import inputs
from sdxl_sae_kit.commands.answers import Answer, of_artifact, table
from sdxl_sae_kit.commands.options import add_store, add_verb, option, taken

MEASURE = """
Of every latent: density, mean, spread, histogram, Moran's I of its heat maps, its strongest images and a sample of all.
The cache is read once: 1.1 to 1.3 times what encoding it takes. Killed, it goes on after the last 512 images.
"""
SUMMARY = {
    "sae": "of",
    "latents": "latents",
    "alive": "fire at all",
    "on_5_images": "on ≥ 5 images",
    "median_density": "median density",
    "mean_moran": "mean Moran's I",
    "mean_moran_interval": "interval",
    "tokens": "tokens",
}
"""Keys in JSON, and what `FeatureStats.summary` calls them."""
EXPORT = """
One HTML file with all in it, which asks for nothing from anywhere and can be filtered and sorted where scripts run. A
card of the small model takes about 6 kB. Labels are those of the SAE in the store, unless a file is named.
"""


def add(verbs: Any) -> None:
    """Declare the verbs."""
    measure = add_verb(verbs, "measure", _measure, "statistics and examples of every latent of an SAE", MEASURE,
                       "sdxl-sae-kit measure tiny-turbo_up.0.1_k10 tiny-turbo_1step_500images")  # fmt: skip
    sae = f"{inputs.NAMING}; a file or folder of another tool, or hf:owner/name/folder"
    option(measure, "sae", str, None, sae, complete="folder")
    option(measure, "cache", str, None, f"updates of whole grids: {inputs.NAMING}", complete="folder")
    option(measure, "--step", int, 0, "which denoising step, from 0")
    option(measure, "--top", int, 12, "examples kept for each latent and ranking")
    option(measure, "--memory", int, 2**30, "bytes it may take; what comes out does not depend on it")
    option(measure, "--device", str, None, "cuda, cuda:1, mps or cpu (default: cuda if there is one, else cpu)")
    add_store(measure)

    galleries = verbs.add_parser("gallery", help="pages of features").add_subparsers(required=True, metavar="COMMAND")
    export = add_verb(galleries, "export", _export, "write an offline page of an SAE's features", EXPORT,
                      "sdxl-sae-kit gallery export tiny-turbo_up.0.1_k10 --sort max --out up.0.1.html")  # fmt: skip
    option(export, "stats", str, None, f"what measure made: {inputs.NAMING}", complete="folder")
    option(export, "--feature", int, None, "one latent, with all that is known of it (default: cards of many)")
    option(export, "--labels", Path, None, "a .jsonl file of labels (default: the SAE's in the store)", complete="file")
    option(export, "--icons", str, None, f"what draw_icons made: {inputs.NAMING}", complete="folder")
    orders = ("density", "max", "mean", "moran", "unlabelled", "latent")
    option(export, "--sort", str, "density", "which cards come first", choices=orders)
    option(export, "--static", int, 100, "cards on the page")
    option(export, "--out", Path, None, "the HTML file to write (default: NAME.html here)", complete="file")
    add_store(export)


def _measure(options: argparse.Namespace) -> Answer:
    import torch

    from sdxl_sae_kit.devices import choose_device
    from sdxl_sae_kit.features import FeatureStats

    sae, cache = inputs.open_sae(options.sae, options.store), inputs.open_cache(options.cache, options.store)
    device = choose_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = taken(options, FeatureStats.measure, "sae", "cache")
    stats = FeatureStats.measure(sae.to(device), cache, **settings)
    summary = stats.summary()
    told = {key: summary[name] for key, name in SUMMARY.items()}
    return of_artifact(stats.artifact, table([summary]), **told, images=stats.n_images)


def _export(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit import html
    from sdxl_sae_kit.files import writable, write_atomically
    from sdxl_sae_kit.galleries import gallery
    from sdxl_sae_kit.icons import Icons

    stats = inputs.open_stats(options.stats, options.store)
    out = writable("gallery", options.out or Path(f"{stats.artifact.name}.html"))
    icons = Icons.open(inputs.find("icons", options.icons, options.store)) if options.icons else None
    shown = gallery(
        stats, options.feature, labels=inputs.open_labels(options.labels), icons=icons, sort=options.sort,
        static=options.static,
    )  # fmt: skip
    filters = files("sdxl_sae_kit").joinpath("twin.js").read_text("utf-8")
    page = html.page(f"Features of {stats.sae}", shown.static_html(), script=filters)
    write_atomically(out, page.encode())
    told = {"file": str(out), "sae": stats.sae, "stats": stats.artifact.name, "bytes": len(page.encode())}
    return Answer(str(out), told)

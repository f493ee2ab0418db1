"""`report` and `notebooks`: notebooks and results as one offline file, and the notebooks themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdxl_sae_kit.commands import inputs
from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.commands.options import add_store, add_verb, option

REPORT = """
Notebooks are run in order, each in a fresh kernel; artifacts (statistics, studies, SAEs, caches) are shown as they are.
One HTML file comes out, which asks for nothing from anywhere. On two cores all notebooks take about an hour at the
scale demo, a few minutes at smoke, and a fraction of that once the store holds what they make.
"""
NOTEBOOKS = "They come with the package. What is there already is never written over."


def add(verbs: Any) -> None:
    """Declare the verbs."""
    report = add_verb(
        verbs, "report", _report, "run notebooks, or take artifacts, and write one offline HTML file", REPORT,
        "sdxl-sae-kit report --scale smoke\nsdxl-sae-kit report notebooks/00_quickstart.ipynb STATS --pdf",
    )  # fmt: skip
    what = "notebook files, a folder of them, or artifacts by folder or name (default: the kit's notebooks)"
    option(report, "notebooks", str, None, what, nargs="*", complete="file")
    option(report, "--scale", str, "demo", "what the notebooks call SCALE: smoke or demo", complete="scales")
    option(report, "--model", str, "tiny-turbo", "what the notebooks call MODEL", complete="models")
    option(
        report, "--out", Path, None, "the HTML file to write (default: a new artifact in the store)", complete="file"
    )
    report.add_argument("--pdf", action="store_true", help="write a PDF beside it, with a Chromium of this machine")
    option(
        report, "--template", Path, None, "a Jinja file that extends the kit's (default: the kit's)", complete="file"
    )
    add_store(report)

    copy = add_verb(verbs, "notebooks", _notebooks, "copy the kit's notebooks into a folder", NOTEBOOKS,
                    "sdxl-sae-kit notebooks mine && jupyter lab mine")  # fmt: skip
    option(copy, "folder", Path, None, "where they go; made if need be", complete="folder")


def _report(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.reports import report

    given = [inputs.anything(each, options.store) for each in options.notebooks]
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("scale", "model", "out", "pdf", "template", "store")
    }
    path = report(given[0] if len(given) == 1 else given or None, **settings)
    told = {"folder": str(path.parent), "file": str(path)}
    if not options.pdf:
        return Answer(str(path), told)
    pdf = path.with_suffix(".pdf")
    return Answer(f"{pdf}\n{path}", {**told, "pdf": str(pdf)})


def _notebooks(options: argparse.Namespace) -> Answer:
    from sdxl_sae_kit.notebooks import copy_notebooks

    names = [path.name for path in copy_notebooks(options.folder)]
    return Answer("\n".join([*names, str(options.folder)]), {"folder": str(options.folder), "notebooks": names})

"""Notebooks, run in order, and artifacts merged into one self-contained HTML file that loads nothing from anywhere."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup
from nbconvert import HTMLExporter
from plotly.offline import get_plotlyjs

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import FORMATS, Artifact, Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import hash_file, sha256, writable, write_atomically
from sdxl_sae_kit.methods import METHODS
from sdxl_sae_kit.notebooks import find_notebooks
from sdxl_sae_kit.pipelines import local_folder
from sdxl_sae_kit.printing import find_browser, print_pdf
from sdxl_sae_kit.provenance import artifact_rows, data_rows, label_rows, model_names, sae_rows, with_inputs
from sdxl_sae_kit.scales import load_scale
from sdxl_sae_kit.sections import Section, link, run_notebook, section_slug, show_artifact
from sdxl_sae_kit.stamps import kit_version
from sdxl_sae_kit.tiny import NAMES as TINY_NAMES

PACKAGES = ("torch", "diffusers", "transformers", "h5py", "numpy", "scikit-learn", "plotly", "nbconvert")
TEMPLATE, OWN = "report.html.j2", "own"
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; font-src data:; "
    "base-uri 'none'; form-action 'none'; script-src "
)
PARTS = ("contents", "data", "labels", "methods", "provenance")
"""Ids that the template uses."""


@checked
def report(
    notebooks: Path | str | Sequence[Path | str] | None = None,
    *,
    scale: str = "demo",
    model: str = "tiny-turbo",
    out: Path | str | None = None,
    pdf: bool = False,
    template: Path | str | None = None,
    store: Store | Path | str | None = None,
) -> Path:
    """Run notebooks in order, each in a fresh kernel of this Python, and write one offline HTML file; returns its path.

    Beside them or in their place stand artifacts that are finished already, such as statistics or studies: nothing is
    run for those.

    Args:
        notebooks: notebook files, folders of them, and folders of artifacts, in the order of the report; by default
            `notebooks/` of the checkout, or those that the installed package carries.
        scale: what the notebooks call SCALE.
        model: what they call MODEL.
        out: the HTML file; by default a new artifact in the store: a report shows one moment, so its time is part of
            its recipe.
        pdf: also print it, with the Chromium of this machine, to a PDF of the same name beside it.
        template: a Jinja file that begins with `{% extends "report.html.j2" %}` and fills some of its blocks: `style`
            (CSS), `front`, `section`, `labels`, `methods`, `provenance` and `footer`. Its scripts do not run.
        store: folder of artifacts.

    Raises:
        KitError: nothing to show, no such scale, `out` cannot be written, no Chromium for a PDF, a template with a
            mistake, or a cell failed or shows a picture without alt text; then it names notebook and cell.
        ArtifactError: a folder holds no finished artifact, or one with nothing to look at.
        KeyboardInterrupt: also on SIGTERM; the kernel is shut down before.

    Example:
        >>> report(scale="smoke")  # doctest: +SKIP
        PosixPath('artifacts/reports/tiny-turbo_smoke-1a2b3c4d/report.html')
    """
    home, now = Store.at(store), datetime.now(UTC)
    sources, own = _find_sources(notebooks), _read_template(template)
    paths = [source for source in sources if source.suffix == ".ipynb"]
    if paths:
        load_scale(model, scale)
    folder = None if model in TINY_NAMES else local_folder(model)
    model = str(folder.resolve()) if folder else model  # kernels run in the notebooks' folder
    target = None if out is None else writable("report", Path(out))
    if pdf:
        find_browser()
    seen = {*PARTS, *map(section_slug, sources)}
    sections = [
        run_notebook(source, f"[{paths.index(source) + 1}/{len(paths)}]", model, scale, home, seen)
        if source in paths
        else show_artifact(source, seen)
        for source in sources
    ]
    link(sections)
    page = _page(sections, {"Model": Path(model).name if folder else model, "Scale": scale} if paths else {}, now, own)
    if target is not None:
        return _write(target, page, pdf)
    recipe = _recipe(sources, sections, model if paths else None, scale) | {
        "template": sha256(own.encode()),
        "time": now.isoformat(),
    }
    artifact = home.artifact("reports", f"{Path(model).name}_{scale}" if paths else sources[0].name, recipe)
    with artifact.lock():
        written = _write(artifact.file("report.html"), page, pdf)
        artifact.seal(facts={"seconds": {s.slug: round(s.seconds, 1) for s in sections if s.seconds is not None}})
    return written


def _find_sources(given: Path | str | Sequence[Path | str] | None) -> list[Path]:
    """Notebook files and folders of artifacts, in their order."""
    if given is None:
        return find_notebooks(None)
    found: list[Path] = []
    for each in [given] if isinstance(given, PathLike | str) else given:
        place = Path(each).resolve()
        is_artifact = place.is_dir() and place.parent.name in FORMATS and not any(place.glob("*.ipynb"))
        found += [place] if is_artifact else find_notebooks(each)
    if not found:
        raise KitError("report: nothing to show. Pass notebooks, a folder of them, or folders of artifacts.")
    if len(set(map(section_slug, found))) < len(found):
        raise KitError("Two of the notebooks have the same name. Links in the report need different ones: rename one.")
    return found


def _recipe(sources: Sequence[Path], sections: Sequence[Section], model: str | None, scale: str) -> dict[str, Any]:
    shown = {source.name: Artifact(source).digest for source in sources if source.suffix != ".ipynb"}
    return {
        "model": model,
        "scale": scale if model else None,
        "notebooks": {source.name: hash_file(source) for source in sources if source.suffix == ".ipynb"},
        "shown": shown,
        "used": sorted(_digests(artifact for section in sections for artifact in section.artifacts)),
    }


def _digests(artifacts: Iterable[Artifact]) -> set[str]:
    """Of those that can be read: the provenance says which cannot."""
    known = set()
    for artifact in artifacts:
        with suppress(ArtifactError):
            known.add(artifact.digest)
    return known


def _write(target: Path, page: str, pdf: bool) -> Path:
    write_atomically(target, page.encode())
    if pdf:
        print_pdf(target, target.with_suffix(".pdf"))
    return target


def _read_template(template: Path | str | None) -> str:
    """A template's text; by default one that changes nothing."""
    if template is None:
        return f'{{% extends "{TEMPLATE}" %}}'
    try:
        text = Path(template).read_text("utf-8")
        named = set(meta.find_referenced_templates(_environment("").parse(text)))
    except (OSError, UnicodeDecodeError) as cause:
        raise KitError(f"The template {template} cannot be read ({cause}). Name a Jinja file in UTF-8.") from None
    except TemplateError as cause:
        raise KitError(f"The template {template} has a mistake: {cause}. Mend it and run the report again.") from None
    if named != {TEMPLATE}:
        raise KitError(
            f'The template {template} does not extend the kit\'s. Begin it with {{% extends "{TEMPLATE}" %}}.'
        )
    return text


def _environment(own: str) -> SandboxedEnvironment:
    """Where templates are rendered: they escape what they are given, and can call nothing of Python's."""
    kits = files("sdxl_sae_kit").joinpath(TEMPLATE).read_text("utf-8")
    loader = DictLoader({TEMPLATE: kits, OWN: own})
    return SandboxedEnvironment(autoescape=True, undefined=StrictUndefined, loader=loader)


def _page(sections: Sequence[Section], about: dict[str, str], now: datetime, own: str) -> str:
    """The whole document; `about` is what the notebooks were run with."""
    given = list({artifact.folder: artifact for section in sections for artifact in section.artifacts}.values())
    artifacts = with_inputs(given)
    data, saes, labels = data_rows(artifacts), sae_rows(artifacts), label_rows(artifacts)
    figures = [script for section in sections for script in section.scripts]
    library = get_plotlyjs() if figures else ""
    filters = html.TWIN in "".join(section.html for section in sections)
    scripts = figures + [files("sdxl_sae_kit").joinpath("twin.js").read_text("utf-8")] * filters
    # Only what was generated here is hashed: a script that came in with some output stays forbidden.
    allowed = " ".join(html.source_hash(script) for script in [library, *scripts] if script) or "'none'"
    models = model_names(artifacts)
    facts = {"Model": ", ".join(models) or "an image model"} | about
    facts |= {"Seeds": _seeds(artifacts, data)} if saes or data else {}
    facts |= {"Made": f"{now:%Y-%m-%d %H:%M} UTC", "sdxl_sae_kit": kit_version()}
    told = {
        "sections": sections,
        "policy": POLICY + allowed,
        "styles": _styles(),
        "library": library,
        "scripts": scripts,
        "facts": facts,
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "models": models,
        "counts": {"caches": counted(len(data), "caches"), "SAEs": counted(len(saes), "SAEs"),
                   "artifacts": counted(len(artifacts), "artifacts")},
        "data": _table(data, "Prompts and the images made from them; held out by prompt"),
        "saes": _table(saes, "SAEs, measured on held-out tokens; 95 % bootstrap intervals over images"),
        "labels": _table(labels, _LABELS),
        "methods": METHODS,
        "provenance": _table(artifact_rows(artifacts, _uses(sections)), "Every artifact behind this report"),
    }  # fmt: skip
    try:
        return _environment(own).get_template(OWN).render(told)
    except TemplateError as cause:
        raise KitError(f"The template has a mistake: {cause}. Mend it and run the report again.") from None


_LABELS = (
    "Labels of these SAEs, each tested on held-out images with the latent active and without it; balanced accuracy, "
    "½ is guessing; as the control, another feature's label put to the same feature's images"
)


def _uses(sections: Iterable[Section]) -> dict[Path, list[str]]:
    """The sections that used each artifact, by its folder."""
    uses: dict[Path, list[str]] = {}
    for section in sections:
        for folder in dict.fromkeys(artifact.folder for artifact in section.artifacts):
            uses.setdefault(folder, []).append(section.slug)
    return uses


def _seeds(artifacts: Iterable[Artifact], data: Sequence[dict[str, Any]]) -> str:
    """Which seeds everything started from."""
    prompts = sorted({row["seeds"] for row in data})
    saes = sorted({a.recipe["config"]["seed"] for a in artifacts if a.kind == "saes"})
    told = [f"images {'; '.join(prompts)}"] * bool(prompts) + [f"SAEs {', '.join(map(str, saes))}"] * bool(saes)
    return " · ".join(told)


def _table(rows: Sequence[dict[str, Any]], caption: str) -> Markup:
    return Markup(f'<div class="sae-kit">{html.table(rows, caption)}</div>' if rows else "")  # noqa: S704


def _styles() -> dict[str, str]:
    """JupyterLab's own styles and its two themes, and the style of the kit's pieces."""
    environment = HTMLExporter().environment
    names = {"lab": "index.css", "light": "theme-light.css", "dark": "theme-dark.css"}
    styles = {name: environment.loader.get_source(environment, f"static/{file}")[0] for name, file in names.items()}
    return styles | {"kit": html.STYLE}

"""Runs the notebooks in order and merges them into one self-contained HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.io
from bs4 import BeautifulSoup, Tag
from jinja2 import DictLoader, Environment
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs

from sdxl_sae_kit.artifacts import Store, kit_version
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import hash_file, writable, write_atomically
from sdxl_sae_kit.html import TWIN, source_hash
from sdxl_sae_kit.notebooks import cell_place, execute, find_notebooks, slug, tagged
from sdxl_sae_kit.pipelines import local_folder
from sdxl_sae_kit.scales import load_scale
from sdxl_sae_kit.tiny import NAMES as TINY_NAMES

PACKAGES = ("torch", "diffusers", "transformers", "h5py", "numpy", "scikit-learn", "plotly", "nbconvert")
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\d(%\||it).*\[\d+:\d\d[<,].*\]")
"""What tqdm's bar is as plain text."""
PICTURES = ("image/svg+xml", "image/png", "image/jpeg")
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; font-src data:; "
    "base-uri 'none'; form-action 'none'; script-src "
)
FRAGMENT = """{%- extends 'lab/base.html.j2' -%}
{%- block input_group -%}<details class="code"><summary>Code</summary>{{ super() }}</details>{%- endblock -%}"""


@dataclass(frozen=True)
class Section:
    """One executed notebook as a piece of HTML; `scripts` draw its figures."""

    slug: str
    title: str
    headings: Sequence[tuple[str, str]]
    html: str
    scripts: Sequence[str]
    seconds: float


def report(
    notebooks: Path | str | Sequence[Path | str] | None = None,
    *,
    scale: str = "demo",
    model: str = "tiny-turbo",
    out: Path | str | None = None,
    store: Store | Path | str | None = None,
) -> Path:
    """Run notebooks in order, each in a fresh kernel of this Python, and write one offline HTML file; returns its path.

    `notebooks` is a folder or a list of files, by default `notebooks/` of the checkout. The file goes to `out`, by
    default to a new artifact in the store: a report shows one moment, so its time is part of its recipe.

    Raises:
        KitError: no notebooks, no such scale, `out` cannot be written, or a cell failed or shows a picture without alt
            text; then it names notebook and cell.
        KeyboardInterrupt: also on SIGTERM; the kernel is shut down before.

    Example:
        >>> report(scale="smoke")  # doctest: +SKIP
        PosixPath('artifacts/reports/tiny-turbo_smoke-1a2b3c4d/report.html')
    """
    home, paths, now = Store.at(store), find_notebooks(notebooks), datetime.now(UTC)
    load_scale(model, scale)
    folder = None if model in TINY_NAMES else local_folder(model)
    model = str(folder.resolve()) if folder else model  # kernels run in the notebooks' folder
    target = None if out is None else writable("report", Path(out))
    seen = {"contents", *map(slug, paths)}
    sections = [_section(path, f"[{i}/{len(paths)}]", model, scale, home, seen) for i, path in enumerate(paths, 1)]
    page = _page(sections, model, scale, now).encode()
    if target is not None:
        write_atomically(target, page)
        return target
    sources = {path.name: hash_file(path) for path in paths}
    recipe = {"model": model, "scale": scale, "notebooks": sources, "time": now.isoformat()}
    artifact = home.artifact("reports", f"{Path(model).name}_{scale}", recipe)
    with artifact.lock():
        write_atomically(artifact.file("report.html"), page)
        artifact.seal(facts={"seconds": {section.slug: round(section.seconds, 1) for section in sections}})
    return artifact.file("report.html")


def _section(path: Path, progress: str, model: str, scale: str, store: Store, seen: set[str]) -> Section:
    """Run one notebook and turn it into HTML, saying so; ids already `seen` in the report are renamed."""
    started = time.monotonic()
    sys.stderr.write(f"{progress} {path.name} runs\n")
    notebook = execute(path, model, scale, store)
    seconds = time.monotonic() - started
    sys.stderr.write(f"{progress} {path.name} took {seconds:.1f} s\n")
    # What the parameters were is on the front page.
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "parameters", "injected-parameters")]
    scripts = [script for cell in notebook.cells for script in _make_static(cell, path)]
    soup = BeautifulSoup(_export(notebook, path), "html.parser")
    for pilcrow in soup.select("a.anchor-link"):
        pilcrow.decompose()
    _check_pictures(soup, path)
    _make_ids_unique(soup, seen)
    title = soup.find("h1")
    headings = [(str(h2["id"]), h2.get_text()) for h2 in soup.select("h2[id]")]
    return Section(slug(path), title.get_text() if title else path.stem, headings, str(soup), scripts, seconds)


def _make_static(cell: NotebookNode, path: Path) -> Iterable[str]:
    """Turn figures, pictures and widgets among a cell's outputs into plain HTML; yields each figure's script."""
    if "outputs" in cell:
        cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output.get("data", {}))]
    for number, output in enumerate(cell.get("outputs", [])):
        data = output.get("data", {})
        if PLOTLY in data:
            markup, script = _figure(data[PLOTLY], f"figure-{cell.id}-{number}", cell_place(cell.id, path))
            output.data = {"text/html": markup}
            yield script
        elif "text/html" in data:
            data.pop(WIDGET, None)
        elif WIDGET in data:
            output.data = {"text/html": "<p>An interactive view: open the notebook to use it.</p>"}
        elif kind := next((kind for kind in PICTURES if kind in data), None):
            metadata = output.metadata.get(kind, output.metadata)
            output.data = {"text/html": _picture(kind, data[kind], metadata.get("alt"), cell_place(cell.id, path))}


def _is_progress_bar(data: dict[str, Any]) -> bool:
    return WIDGET in data and "text/html" not in data and bool(PROGRESS_BAR.search(data.get("text/plain", "")))


def _figure(spec: dict[str, Any], name: str, place: str) -> tuple[str, str]:
    """A plotly figure as (HTML that stands in its place, script that draws it there)."""
    layout = spec.get("layout", {})
    alt = (layout.get("meta") or {}).get("alt")
    if not alt:
        raise KitError(f"{place}: a plotly figure has no alt text. Say fig.update_layout(meta={{'alt': '…'}}).")
    drawn = plotly.io.to_html(
        {"data": spec.get("data", []), "layout": layout},
        # By default plotly offers a button that sends the figure's data to its makers' server.
        config={"responsive": True, "displaylogo": False, "showSendToCloud": False},
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,
        default_height=f"{layout.get('height') or 450}px",
        validate=False,
    )
    before, script, after = re.split(r"<script[^>]*>(.*)</script>", drawn, maxsplit=1, flags=re.DOTALL)
    text = html.escape(alt, quote=True)
    unseen = "<noscript><p>A script would draw this figure; its caption says what it shows.</p></noscript>"
    inside = f"{before}{after}{unseen}<figcaption>{text}</figcaption>"
    return f'<figure role="img" aria-label="{text}">{inside}</figure>', script


def _picture(kind: str, data: str, alt: str | None, place: str) -> str:
    if alt is None:
        raise KitError(f"{place}: a picture has no alt text. Show it with IPython.display.Image(data, alt='…').")
    encoded = base64.b64encode(data.encode()).decode() if kind == "image/svg+xml" else data.replace("\n", "")
    return f'<img src="data:{kind};base64,{encoded}" alt="{html.escape(alt, quote=True)}">'


def _export(notebook: NotebookNode, path: Path) -> str:
    """The notebook's cells as HTML, pictures of its text embedded."""
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"fragment": FRAGMENT})],
        template_file="fragment",
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    resources = {"metadata": {"path": str(path.parent), "name": path.stem}}
    return str(exporter.from_notebook_node(notebook, resources=resources)[0])


def _check_pictures(soup: BeautifulSoup, path: Path) -> None:
    """Refuse pictures that are not in the file, and those whose alt text nbconvert had to make up."""
    for image in soup.find_all("img"):
        cell = image.find_parent(id=re.compile("^cell-id="))
        place = cell_place(str(cell["id"]), path) if cell else path.name
        if not str(image.get("src", "")).startswith("data:"):
            raise KitError(f"{place}: the picture {image.get('src')} lies elsewhere; embed it in the notebook.")
        if str(image["alt"]).startswith("No description has been provided"):
            raise KitError(f"{place}: a picture has no alt text. Give its <img> one.")


def _make_ids_unique(soup: BeautifulSoup, seen: set[str]) -> None:
    """Rename ids that the report already has, and what points to them from this notebook."""
    renamed: dict[str, str] = {}
    for element in soup.find_all(id=True):
        name = unique = str(element["id"])
        copies = 1
        while unique in seen:
            copies += 1
            unique = f"{name}-{copies}"
        seen.add(unique)
        renamed.setdefault(name, unique)
        element["id"] = unique
    for attribute in ("href", "for", "aria-labelledby", "aria-describedby", "aria-controls"):
        for element in soup.select(f"[{attribute}]"):
            _redirect(element, attribute, renamed)


def _redirect(element: Tag, attribute: str, renamed: dict[str, str]) -> None:
    value = str(element[attribute])
    if attribute != "href":
        element[attribute] = renamed.get(value, value)
    elif value.startswith("#"):
        element[attribute] = "#" + renamed.get(value[1:], value[1:])


def _page(sections: Sequence[Section], model: str, scale: str, now: datetime) -> str:
    """The whole document."""
    source, twins = (files("sdxl_sae_kit").joinpath(name).read_text("utf-8") for name in ("report.html.j2", "twin.js"))
    figures = [script for section in sections for script in section.scripts]
    library = get_plotlyjs() if figures else ""
    scripts = figures + [twins] * any(TWIN in section.html for section in sections)
    # Only what was generated here is hashed: a script that came in with some output stays forbidden.
    allowed = " ".join(source_hash(script) for script in [library, *scripts] if script) or "'none'"
    return (
        Environment(autoescape=True)
        .from_string(source)
        .render(
            sections=sections,
            policy=POLICY + allowed,
            styles=_styles(),
            library=library,
            scripts=scripts,
            facts={
                "Model": Path(model).name if Path(model).is_dir() else model,
                "Scale": scale,
                "Made": f"{now:%Y-%m-%d %H:%M} UTC",
                "sdxl_sae_kit": kit_version(),
            },
            versions={"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        )
    )


def _styles() -> dict[str, str]:
    """JupyterLab's own styles and its two themes."""
    environment = HTMLExporter().environment
    names = {"lab": "index.css", "light": "theme-light.css", "dark": "theme-dark.css"}
    return {name: environment.loader.get_source(environment, f"static/{file}")[0] for name, file in names.items()}

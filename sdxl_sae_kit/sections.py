"""Sections of a report: an executed notebook or a finished artifact as HTML that needs only the page's scripts."""

from __future__ import annotations

import base64
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bs4 import BeautifulSoup, Tag
from bs4.element import PreformattedString
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.figures import Drawing, draw, tabulate
from sdxl_sae_kit.galleries import gallery
from sdxl_sae_kit.notebooks import cell_place, execute, slug, tagged
from sdxl_sae_kit.opened import open_artifact
from sdxl_sae_kit.provenance import SHORT, sae_rows
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.benchmarked import RIEBench

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\d(%\||it).*\[\d+:\d\d[<,].*\]")
"""What tqdm's bar is as plain text."""
FORBIDDEN = ("script", "meta", "link", "base", "iframe", "frame", "object", "embed", "form")
"""Elements that an output may bring along and that run, load or lead away; the page's policy does not stop them all."""
PICTURES = ("image/svg+xml", "image/png", "image/jpeg")
FRAGMENT = """{%- extends 'lab/base.html.j2' -%}
{%- block input_group -%}<details class="code"><summary>Code</summary>{{ super() }}</details>{%- endblock -%}"""


@dataclass(frozen=True)
class Section:
    """A piece of the report; `scripts` draw its figures."""

    slug: str
    title: str
    soup: BeautifulSoup = field(repr=False)
    ids: Mapping[str, str]
    """What its ids were called → what they are called in the report."""
    scripts: Sequence[str]
    artifacts: Sequence[Artifact]
    """What it was made from."""
    seconds: float | None = None
    """What running it took; None where nothing was run."""

    @cached_property
    def html(self) -> str:
        """What it shows; the page has the style of the kit's pieces once."""
        return str(self.soup).replace(html.STYLE, "")

    @property
    def headings(self) -> list[tuple[str, str]]:
        """Its second headings: ids and texts."""
        return [(str(h2["id"]), h2.get_text()) for h2 in self.soup.select("h2[id]")]


def section_slug(source: Path) -> str:
    """The id of the section that a notebook or an artifact's folder becomes."""
    return slug(source) if source.suffix == ".ipynb" else re.sub(r"[^A-Za-z0-9_-]+", "-", source.name)


# Notebooks ------------------------------------------------------------------------------------------------------------


def run_notebook(path: Path, progress: str, model: str, scale: str, store: Store, seen: set[str]) -> Section:
    """Run one notebook and turn it into HTML, saying so; ids already `seen` in the report are renamed.

    Raises:
        KitError: a cell failed, or shows a picture without alt text; the message names notebook and cell.
    """
    started = time.monotonic()
    sys.stderr.write(f"{progress} {path.name} runs\n")
    notebook, used = execute(path, model, scale, store)
    seconds = time.monotonic() - started
    sys.stderr.write(f"{progress} {path.name} took {seconds:.1f} s\n")
    # What the parameters were is on the front page.
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "parameters", "injected-parameters")]
    scripts = [script for cell in notebook.cells for script in _make_static(cell, path)]
    soup = BeautifulSoup(_export(notebook, path), "html.parser")
    for pilcrow in soup.select("a.anchor-link"):
        pilcrow.decompose()
    _check_pictures(soup, path)
    _disarm(soup)
    title = soup.find("h1")
    name = title.get_text() if title else path.stem
    return Section(slug(path), name, soup, _make_ids_unique(soup, seen), scripts, used, seconds)


def _make_static(cell: NotebookNode, path: Path) -> Iterable[str]:
    """Turn figures, pictures and widgets among a cell's outputs into plain HTML; yields each figure's script."""
    if "outputs" in cell:
        cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output.get("data", {}))]
    for number, output in enumerate(cell.get("outputs", [])):
        data = output.get("data", {})
        if PLOTLY in data:
            drawing = draw(data[PLOTLY], f"figure-{cell.id}-{number}", cell_place(cell.id, path))
            output.data = {"text/html": drawing.markup}
            yield drawing.script
        elif "text/html" in data:
            data.pop(WIDGET, None)
        elif WIDGET in data:
            output.data = {"text/html": "<p>An interactive view: open the notebook to use it.</p>"}
        elif kind := next((kind for kind in PICTURES if kind in data), None):
            metadata = output.metadata.get(kind, output.metadata)
            output.data = {"text/html": _picture(kind, data[kind], metadata.get("alt"), cell_place(cell.id, path))}


def _is_progress_bar(data: dict[str, Any]) -> bool:
    return WIDGET in data and "text/html" not in data and bool(PROGRESS_BAR.search(data.get("text/plain", "")))


def _picture(kind: str, data: str, alt: str | None, place: str) -> str:
    if alt is None:
        raise KitError(f"{place}: a picture has no alt text. Show it with IPython.display.Image(data, alt='…').")
    encoded = base64.b64encode(data.encode()).decode() if kind == "image/svg+xml" else data.replace("\n", "")
    return f'<img src="data:{kind};base64,{encoded}" alt="{html.escape(alt)}">'


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


def _disarm(soup: BeautifulSoup) -> None:
    """Remove what could run, load or lead away without a click; text, tables and pictures stay."""
    # Browsers end comments and styles earlier than Python does: there markup can hide that only they would see.
    for hidden in soup.find_all(string=lambda text: isinstance(text, PreformattedString)):
        hidden.extract()
    for element in [*soup.find_all(FORBIDDEN), *(style for style in soup.find_all("style") if "<" in style.get_text())]:
        element.decompose()
    for element in soup.find_all(True):
        for name in [name for name in element.attrs if name.lower().startswith("on")]:
            del element[name]
        for name in ("href", "xlink:href"):
            target = re.sub(r"[\x00-\x20]", "", str(element.get(name, "")))
            if ":" in target and not target.lower().startswith(("http:", "https:", "mailto:", "data:image/", "#")):
                del element[name]


def _make_ids_unique(soup: BeautifulSoup, seen: set[str]) -> dict[str, str]:
    """Rename ids that the report already has, and what points to them from this section; returns old → new."""
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
    return renamed


def _redirect(element: Tag, attribute: str, renamed: dict[str, str]) -> None:
    value = str(element[attribute])
    if attribute != "href":
        element[attribute] = renamed.get(value, value)
    elif value.startswith("#"):
        element[attribute] = "#" + renamed.get(value[1:], value[1:])


def link(sections: Iterable[Section]) -> None:
    """Lead links from notebook to notebook to its section; links to other files become plain text.

    What lies beside a notebook does not lie beside the report.
    """
    known = {section.slug: section for section in sections}
    for section in known.values():
        for anchor in section.soup.select("a[href]"):
            path, _, heading = unquote(str(anchor["href"])).partition("#")
            if not path or ":" in path:  # within the section, or to the web
                continue
            if path.endswith(".ipynb") and (target := known.get(slug(Path(path)))):
                anchor["href"] = "#" + target.ids.get(heading, target.slug)
            else:
                anchor.unwrap()


# Artifacts ------------------------------------------------------------------------------------------------------------


def show_artifact(folder: Path, seen: set[str]) -> Section:
    """A finished artifact as a section: what a notebook would show of it, and its figures.

    Raises:
        ArtifactError: it is damaged, or of a kind that holds nothing to look at by itself.
    """
    artifact, name = Artifact(folder), section_slug(folder)
    opened = open_artifact(folder)
    drawings = list(_figures(opened, name))
    made = f"{artifact.kind} {artifact.digest[:SHORT]}, made {artifact.stamp['time'][:16].replace('T', ' ')} UTC"
    parts = [f"<h1>{html.escape(artifact.name)}</h1>", html.fragment(html.quiet(made)), _view(opened, artifact)]
    markup = _without_places("".join([*parts, *(drawing.markup for drawing in drawings)]), artifact)
    soup = BeautifulSoup(markup, "html.parser")
    scripts = [drawing.script for drawing in drawings]
    return Section(name, artifact.name, soup, _make_ids_unique(soup, seen), scripts, [artifact])


def _view(opened: Any, artifact: Artifact) -> str:
    """What an opened artifact shows of itself."""
    if isinstance(opened, FeatureStats):
        summary = html.fragment(html.table([opened.summary()], f"Statistics of {opened.sae} at {opened.hookpoint}"))
        return summary + gallery(opened).static_html()
    if isinstance(opened, SAE):
        return html.fragment(html.quiet(repr(opened)), html.table(sae_rows([artifact]), "Measured on held-out tokens"))
    shown = str(opened._repr_html_())
    return shown + opened.contact_sheet() if isinstance(opened, RIEBench) else shown


def _without_places(markup: str, artifact: Artifact) -> str:
    """A cache says where it lies, and where a model lay: a report tells nothing of this machine."""
    model = str(artifact.recipe.get("model", ""))
    names = {str(artifact.folder): f"artifacts/{artifact.kind}/{artifact.name}"}
    names |= {model: Path(model).name} if Path(model).is_absolute() else {}
    for place, name in names.items():
        markup = markup.replace(html.escape(place), html.escape(name))
    return markup


def _figures(opened: Any, name: str) -> Iterator[Drawing]:
    """Every figure that an opened artifact can draw by itself."""
    for number, method in enumerate(sorted(each for each in dir(type(opened)) if each.startswith("plot"))):
        try:
            spec = getattr(opened, method)().to_plotly_json()
        except KitError:  # it was not measured
            continue
        if tabulate(spec):
            yield draw(spec, f"figure-{name}-{number}", f"{type(opened).__name__}.{method}")

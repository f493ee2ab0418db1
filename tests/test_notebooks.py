"""What every notebook has, read from its file: nothing is run here, the report in CI does that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
CLOSING = "## What we saw, what it means, what comes next"
LINK = re.compile(r"\[[^\]]+\]\(([^)]+)\)")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str | None = None) -> list[nbformat.NotebookNode]:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.source.strip()]
    return [cell for cell in cells if kind in (None, cell.cell_type)]


def prose_of(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells_of(path, "markdown"))


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the last part of the called name."""
    for cell in cells_of(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func).split(".")[-1], node


def sections_of(path: Path) -> list[list[nbformat.NotebookNode]]:
    """The cells between headings of the second level; one that opens amid a cell begins with that cell's end."""
    sections: list[list[nbformat.NotebookNode]] = [[]]
    for cell in cells_of(path):
        if cell.cell_type == "markdown" and (heading := re.search(r"^## ", cell.source, re.MULTILINE)):
            if heading.start():
                sections[-1].append(cell)
            sections.append([])
        sections[-1].append(cell)
    return sections


def test_there_are_notebooks_numbered_in_order() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(len(NOTEBOOKS))]
    assert NOTEBOOKS


@every_notebook
def test_it_starts_with_its_parameters_and_carries_no_output(path: Path) -> None:
    notebook, code = nbformat.read(path, as_version=4), cells_of(path, "code")
    nbformat.validate(notebook)
    assignments = {line.split("#")[0].strip() for line in code[0].source.splitlines()}
    assert {'MODEL = "tiny-turbo"', 'SCALE = "demo"'} <= assignments
    assert '"stabilityai/sdxl-turbo"' in code[0].source and '"smoke"' in code[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "widgets" not in notebook.metadata


@every_notebook
def test_a_failing_cell_fails_the_report(path: Path) -> None:
    """The report stops at an error, unless a tag allows one or leaves the cell out: no cell has a tag but the first."""
    code = cells_of(path, "code")
    assert [cell.metadata.get("tags", []) for cell in code] == [["parameters"]] + [[]] * (len(code) - 1)


@every_notebook
def test_it_says_first_what_it_asks_how_long_it_takes_and_how_to_run_the_real_model(path: Path) -> None:
    first = cells_of(path)[0]
    assert first.cell_type == "markdown" and re.match(r"# \d\d · ", first.source)
    assert "?" in first.source or path.stem.startswith("00")
    (time,) = re.findall(r"^\*\*Time:\*\* (.+)$", first.source, re.MULTILINE)
    assert re.search(r"about .* the first time", time) and re.search(r"about .* once", time)
    (real,) = re.findall(r"^\*\*Real SDXL:\*\* (.+)$", first.source, re.MULTILINE)
    assert 'MODEL = "stabilityai/sdxl-turbo"' in real and "what it costs" in real.lower().replace("that", "it")


@every_notebook
def test_it_leads_forward_and_back_at_both_ends(path: Path) -> None:
    at = NOTEBOOKS.index(path)
    neighbours = {other.name for other in NOTEBOOKS[max(0, at - 1) : at + 2] if other != path}
    for end in (cells_of(path)[0], cells_of(path)[-1]):
        assert neighbours | ({NOTEBOOKS[0].name} - {path.name}) <= set(LINK.findall(end.source))


@every_notebook
def test_its_links_lead_to_a_page_and_a_heading_that_are_there(path: Path) -> None:
    for target in LINK.findall(prose_of(path)):
        link = urlsplit(target)
        assert not link.scheme, f"{path.name} links to {target}, which needs a network"
        page = path.parent / link.path if link.path else path
        assert page in NOTEBOOKS, f"{path.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
        assert link.fragment in ["", *(heading.replace(" ", "-") for heading in headings)], target


@every_notebook
def test_it_ends_with_what_we_saw_what_it_means_and_what_comes_next(path: Path) -> None:
    last = cells_of(path)[-1]
    assert last.cell_type == "markdown" and last.source.startswith(CLOSING)
    leads = re.findall(r"^\*\*(What .+?)\.\*\* \S", last.source, re.MULTILINE)
    assert leads == ["What we saw", "What it means", "What comes next"]


@every_notebook
def test_sections_that_show_something_say_what_was_seen(path: Path) -> None:
    shown = [cells for cells in sections_of(path)[1:] if any(cell.cell_type == "code" for cell in cells)]
    told = [cells for cells in shown if cells[-1].cell_type == "markdown"]
    assert len(told) >= 0.8 * len(shown), [cells[0].source.splitlines()[0] for cells in shown if cells not in told]
    for text in re.findall(r"^\*\*What we saw:\*\* .+$", prose_of(path), re.MULTILINE):
        assert "**What it means:**" in text


@every_notebook
def test_cells_are_short_and_a_third_of_them_is_prose(path: Path) -> None:
    for cell in cells_of(path, "code"):
        lines = cell.source.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 120, f"{path.name}: {cell.source}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno and node.end_lineno - node.lineno < 5, f"{node.name} belongs in the package"
    assert 3 * len(cells_of(path, "markdown")) >= len(cells_of(path))
    assert not re.search(r"\$[^$\n]+\$|\\\(|\\\[", prose_of(path)), "LaTeX does not render offline"


@every_notebook
def test_tables_have_captions_and_pictures_alt_texts(path: Path) -> None:
    """Figures come from the kit, which gives them alt texts; the report refuses any without."""
    for name, call in calls_in(path):
        if name == "show_table":
            assert len(call.args) == 2 and ast.unparse(call.args[1]) != "''", ast.unparse(call)
        if name == "show_images":
            assert len(call.args) == 2, ast.unparse(call)
        if name in ("Image", "SVG"):
            assert "alt" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)
    code = "\n".join(cell.source for cell in cells_of(path, "code"))
    assert not re.search(r"import (plotly|matplotlib)|from (plotly|matplotlib)", code)


@every_notebook
def test_a_number_with_an_interval_says_at_which_scale_it_was_measured(path: Path) -> None:
    for paragraph in re.split(r"\n\n|\*\*Next:\*\*", prose_of(path)):
        if re.search(r"\d %? ?\[[−\d][^\]]*, [^\]]+\]", paragraph):
            assert "demo scale" in paragraph, paragraph

"""A report is one file that loads nothing, runs only what it generated, and can be read with the ears."""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.reports import report

PLOT = """import plotly.graph_objects as go
figure = go.Figure(go.Bar(x=["a", "b"], y=[1, 2]))
figure.update_layout(meta={"alt": "Bars: b is \\"twice\\" <a>"}, title={"text": MODEL})"""
PICTURE = """import io
from IPython.display import HTML, Image, display
from PIL import Image as Pillow
file = io.BytesIO()
Pillow.new("RGB", (8, 8), "red").save(file, "PNG")
display(Image(file.getvalue(), alt="a red square"))"""
GALLERY = """import html
import ipywidgets
class Gallery(ipywidgets.VBox):
    def _repr_mimebundle_(self, **options):
        prompt = html.escape("<script>alert(1)</script>", quote=True)
        return {**super()._repr_mimebundle_(**options), "text/html": f'<p id="Shared">static twin of {prompt}</p>'}
Gallery([ipywidgets.Text()])"""
AWAY = "<meta http-equiv=refresh content='0;url=http://example.invalid'>"
HIDDEN = f"<!-->{AWAY}--><![CDATA[>{AWAY}]]><svg><style>{AWAY}</style></svg><?x {AWAY}?>"
"""Markup that Python's parser takes for a comment or a style, and browsers for what it is."""
HOSTILE = f"""HTML({'<script>alert(1)</script><b onclick="x">bold</b>' + HIDDEN!r})"""

LINKS = (
    "[whole](01_second.ipynb) [part](01_second.ipynb#Shared) [gone](./01_second.ipynb#Gone) [other](09_other.ipynb#x) "
    "[page](../docs/page.md) [web](https://example.invalid/01_second.ipynb)"
)
"""To a notebook of the report, to its heading, which the report renames, to none of it, and to what it lacks."""


def notebook(folder: Path, name: str, *cells: str) -> Path:
    """Strings that start with # are prose, the others code; the parameters cell comes first."""
    made = [nbformat.v4.new_markdown_cell(c) if c.startswith("#") else nbformat.v4.new_code_cell(c) for c in cells]
    first = nbformat.v4.new_code_cell('MODEL = "none"\nSCALE = "none"', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *made]), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    notebook(
        folder,
        "01_second",
        "# Pictures\n## Shared\nText.",
        PICTURE,
        HOSTILE,
        "import os; print(os.environ['SDXL_SAE_KIT_STORE'], SCALE)",
    )
    notebook(folder, "00_first", f"# Figures & <i>more</i>\n## Shared\n[there](#Shared) {LINKS}", PLOT, PLOT, GALLERY)
    return report(folder, scale="smoke", model="tiny-turbo", store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page(page_path) -> BeautifulSoup:
    return BeautifulSoup(page_path.read_text("utf-8"), "html.parser")


def scripts(page: BeautifulSoup) -> list[str]:
    return [script.get_text() for script in page.find_all("script")]


def test_the_report_is_a_finished_artifact_that_verifies(page_path):
    from sdxl_sae_kit.artifacts import Artifact

    artifact = Artifact.open(page_path.parent, "reports")
    artifact.verify()
    assert (artifact.recipe["scale"], artifact.recipe["model"]) == ("smoke", "tiny-turbo")
    assert re.fullmatch(r"tiny-turbo_smoke-[0-9a-f]{8}", page_path.parent.name)


def test_nothing_is_loaded_from_anywhere(page):
    for element in page.find_all(True):
        for attribute in ("src", "srcset", "poster", "data", "action"):
            assert str(element.get(attribute, "data:")).startswith("data:"), element
        if element.name != "a":
            assert not element.get("href"), element
    styles = " ".join(style.get_text() for style in page.find_all("style"))
    assert not re.findall(r"url\(\s*[\"']?(?!data:)[a-z]+:|@import", styles)


def test_plotly_comes_once_and_draws_each_figure(page):
    library = [script for script in scripts(page) if len(script) > 1_000_000]
    figures = [figure.find(class_="plotly-graph-div")["id"] for figure in page.find_all("figure")]
    assert len(library) == 1 and len(figures) == len(set(figures)) == 2
    for name in figures:
        assert sum(f'"{name}"' in script for script in scripts(page)) == 1


def test_the_policy_allows_exactly_the_generated_scripts(page):
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})
    assert page.head.find(True) is policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy["content"]))
    in_file = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts(page)}
    assert allowed == in_file
    assert "default-src 'none'" in policy["content"] and "unsafe-eval" not in policy["content"]


def test_figures_say_what_they_show_also_without_scripts(page):
    for figure in page.find_all("figure"):
        alt = figure.find(attrs={"role": "group"})["aria-label"]
        assert alt == figure.find("figcaption").get_text() == 'Bars: b is "twice" <a>'
        assert "in the table" in figure.find("noscript").get_text()
        assert figure.find("details").find("table").find("tbody").find_all("td")


def test_what_an_output_brings_along_is_disarmed_and_its_text_stays(page):
    (bold,) = [element for element in page.find_all("b") if element.get_text() == "bold"]
    assert bold.attrs == {}


def test_no_markup_hides_where_only_browsers_see_it(page_path):
    assert "<meta http-equiv=refresh" not in page_path.read_text("utf-8")


def test_every_picture_has_its_alt_text(page):
    assert [image["alt"] for image in page.find_all("img")] == ["a red square"]
    assert "No description has been provided" not in page.get_text() + str(page.find_all("img"))


def test_a_gallery_leaves_its_static_twin_with_the_prompt_as_text(page, page_path):
    assert "static twin of <script>alert(1)</script>" in page.get_text()
    text = page_path.read_text("utf-8")
    assert "widget-view+json" not in text and "widget-state+json" not in text


def test_ids_are_unique_and_every_link_of_the_page_leads_somewhere(page):
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.find_all("a") if link["href"].startswith("#")]
    assert len(links) > 4 and {link[1:] for link in links} <= set(ids)


def test_links_between_notebooks_lead_to_their_sections_and_links_to_other_files_are_text(page):
    first, second = page.find(id="00_first"), page.find(id="01_second")
    leads = {link.get_text(): link["href"] for link in first.find_all("a")}
    assert (leads["whole"], leads["gone"]) == ("#01_second", "#01_second")
    assert second.find(id=leads["part"][1:]).get_text() == "Shared" and leads["part"] != leads["there"]
    assert leads["web"] == "https://example.invalid/01_second.ipynb"
    assert "other" not in leads and "page" not in leads and "other page" in first.get_text()


def test_the_index_names_the_notebooks_in_order(page):
    entries = [item.find("a").get_text() for item in page.select("nav > ul > li")]
    assert entries == ["Figures & more", "Pictures", "Methods", "Provenance"]
    second = page.select("nav > ul > li")[1].select("li li a")[0]
    assert page.find(id=second["href"][1:]).find_parent("section")["id"] == "01_second"


def test_notebooks_get_the_parameters_and_the_store(page, page_path):
    printed = page.find(id="01_second").find(attrs={"data-mime-type": "text/plain"}).get_text()
    assert printed.split() == ["artifacts", "smoke"]  # what the store is called, wherever it lies
    assert sum('"title":{"text":"tiny-turbo"}' in script for script in scripts(page)) == 2
    assert "MODEL =" not in page.get_text()


def test_the_front_page_says_what_made_it(page):
    facts = {term.get_text(): term.find_next("dd").get_text() for term in page.find_all("dt")}
    import torch

    assert (facts["Model"], facts["Scale"], facts["torch"]) == ("tiny-turbo", "smoke", torch.__version__)
    assert {"Made", "sdxl_sae_kit", "Python", "diffusers", "h5py"} <= set(facts)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("# Prose", "x = 1", "1 / 0"), "bad.ipynb, cell 4 failed: ZeroDivisionError: division by zero"),
        (("import plotly.graph_objects as go", "go.Figure()"), "bad.ipynb, cell 3: a plotly figure has no alt text"),
        (("from PIL import Image\nImage.new('L', (2, 2))",), "bad.ipynb, cell 2: a picture has no alt text"),
        (("# Prose\n<img src='data:image/gif;base64,R0lG'>",), "bad.ipynb, cell 2: a picture has no alt text"),
        (
            ("# Prose\n<img src='http://127.0.0.1/x.png' alt='x'>",),
            "bad.ipynb, cell 2: the picture http://127.0.0.1/x.png",
        ),
        (("import os\nos._exit(1)",), "bad.ipynb, cell 2 killed its kernel"),
    ],
)
def test_a_faulty_cell_is_named(tmp_path, cells, expected):
    notebook(tmp_path, "bad", *cells)
    with pytest.raises(KitError, match="^" + re.escape(expected)):
        report(tmp_path, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_without_a_place_for_parameters_the_notebook_is_named(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tmp_path / "bare.ipynb")
    with pytest.raises(KitError, match=r"bare\.ipynb has no cell tagged 'parameters'"):
        report(tmp_path)


def test_without_notebooks_the_error_says_what_to_pass(tmp_path):
    with pytest.raises(KitError, match="Pass a folder of .ipynb files"):
        report(tmp_path)
    with pytest.raises(KitError, match=r"No notebook at .*gone\.ipynb"):
        report([tmp_path / "gone.ipynb"])


@pytest.mark.parametrize("place", ["", "file.txt/report.html"])
def test_a_place_that_takes_no_file_is_refused_before_anything_runs(tmp_path, place):
    (tmp_path / "file.txt").write_text("")
    notebook(tmp_path, "costly", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(KitError, match="The report cannot go to .*"):
        report(tmp_path, out=tmp_path / place)
    assert not (tmp_path / "ran").exists()


def test_what_cells_print_names_no_place_of_this_machine(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    says = (
        "import os, pathlib, sys",
        "from IPython.display import HTML, display",
        "store = os.environ['SDXL_SAE_KIT_STORE']",
        "print(store + '/saes/x', pathlib.Path('data.csv').resolve(), sys.prefix + '/bin', pathlib.Path.home())",
        "print(store + '-other')",
        "display(HTML(f'<p>{store}/saes</p>'))",
        "import tempfile",
        "from IPython.display import Markdown",
        "display(Markdown(f'file://{tempfile.gettempdir()}/x.png'))",
        "print(tempfile.gettempdir() + '/ipykernel_77/1.py:3: UserWarning')",
        "pathlib.Path(store)",
    )
    written = report([notebook(folder, "one", "\n".join(says))], store=tmp_path / "store", out=tmp_path / "page.html")
    soup = BeautifulSoup(written.read_text("utf-8"), "html.parser")
    shown = " ".join(output.get_text() for output in soup.select(".jp-OutputArea-output"))
    assert "artifacts/saes/x data.csv bin ." in shown and "PosixPath('artifacts')" in shown
    assert "file://x.png" in shown and "\nipykernel_77/1.py:3: UserWarning" in shown
    # Another folder, whose name begins like the store's, is not the store.
    assert f"{(tmp_path / 'store').relative_to(tempfile.gettempdir())}-other" in shown
    assert tempfile.gettempdir() not in shown


def test_progress_bars_stay_out_of_the_report_and_other_widgets_do_not(tmp_path):
    bars = "import os\nos.environ.pop('TQDM_DISABLE')\nfrom tqdm.notebook import tqdm\nlist(tqdm(range(3), desc='bar'))"
    written = report(
        [notebook(tmp_path, "bars", bars, "import ipywidgets\nipywidgets.IntSlider()")], out=tmp_path / "page.html"
    )
    text = BeautifulSoup(written.read_text("utf-8"), "html.parser").get_text()
    assert "100%" not in text and text.count("An interactive view: open the notebook to use it.") == 1


@pytest.mark.parametrize(
    ("when", "stop"),
    [
        ("the kernel starts", signal.SIGTERM),
        ("a cell runs", signal.SIGINT),
        pytest.param("the kernel starts", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("a cell runs", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stop_ends_in_one_line_and_takes_the_kernel_along(tmp_path, stop, when):
    kernel = tmp_path / "kernel"
    path = notebook(
        tmp_path,
        "long",
        f"import os, pathlib, time\npathlib.Path({str(kernel)!r}).write_text(str(os.getpid()))",
        "time.sleep(60)",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "sdxl_sae_kit", "report", str(path), "--out", str(tmp_path / "page.html")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SDXL_SAE_KIT_STORE": str(tmp_path / "store")},
        start_new_session=True,
    )
    try:
        assert process.stderr.readline() == "[1/1] long.ipynb runs\n"
        deadline = time.monotonic() + 60
        while when == "a cell runs" and not (kernel.exists() and kernel.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(stop)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (
        said.splitlines()[-1]
        == "Interrupted; what was finished is kept, and of a training its last checkpoint. Run it again to go on."
    )
    assert "Traceback" not in said and not (tmp_path / "page.html").exists()
    time.sleep(1)
    left = subprocess.run(["ps", "-o", "stat=", "-s", str(process.pid)], capture_output=True, text=True).stdout
    assert all(state.startswith("Z") for state in left.split())


def test_a_model_folder_is_found_from_where_the_command_is_given(tmp_path, monkeypatch):
    from sdxl_sae_kit.tiny import weights_folder

    (tmp_path / "books").mkdir()
    shutil.copytree(weights_folder("tiny-turbo"), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    says = "from pathlib import Path\nprint(Path(MODEL).is_dir(), MODEL)"
    written = report([notebook(tmp_path / "books", "one", says)], model="models/mine", out="page.html")
    text = BeautifulSoup(written.read_text("utf-8"), "html.parser").get_text()
    assert "True mine" in text and "Sparse autoencoders on mine" in text and str(tmp_path) not in text


def test_a_report_without_figures_carries_no_script(tmp_path):
    written = report([notebook(tmp_path, "plain", "# Only words")], out=tmp_path / "deep" / "plain.html")
    assert written == tmp_path / "deep" / "plain.html"
    assert "<script" not in written.read_text("utf-8") and "script-src 'none'" in written.read_text("utf-8")

"""A report from artifacts alone: no kernel runs, everything behind them is told, and strangers' text does nothing."""

import html
import re
import shutil

import pytest
from bs4 import BeautifulSoup
from made_reports import HOSTILE, METRICS, PAYLOADS, hostile_store

from sdxl_sae_kit import printing
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.cache import ActivationCache
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.opened import open_artifact
from sdxl_sae_kit.provenance import with_inputs
from sdxl_sae_kit.reports import report
from sdxl_sae_kit.sae import SAE


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return hostile_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page(store, tmp_path_factory):
    _, sae = store
    written = report(sae, out=tmp_path_factory.mktemp("out") / "report.html")
    return BeautifulSoup(written.read_text("utf-8"), "html.parser")


def cells(table) -> list[str]:
    return [cell.get_text(" ") for cell in table.find("tbody").find_all("td")]


def test_an_artifact_is_opened_as_what_it_holds(store):
    cache, sae = map(open_artifact, store)
    assert isinstance(cache, ActivationCache) and isinstance(sae, SAE)


def test_what_cannot_be_looked_at_is_refused_by_name(tmp_path):
    masks = Store(tmp_path).artifact("studies", "masks", {"study": "riebench masks"})
    with masks.lock():
        masks.seal()
    with pytest.raises(ArtifactError, match="holds a study of the kind 'riebench masks'"):
        report(masks.folder, out=tmp_path / "report.html")
    unfinished = Store(tmp_path).artifact("saes", "x", {})
    unfinished.folder.mkdir(parents=True)
    with pytest.raises(ArtifactError, match="No finished artifact in"):
        report(unfinished.folder, out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_all_that_an_artifact_was_made_from_is_found(store):
    cache, sae = store
    assert [a.folder for a in with_inputs([Artifact(sae)])] == [cache, sae]
    assert [a.folder for a in with_inputs([Artifact(cache)])] == [cache]


def test_the_title_page_tells_data_saes_seeds_and_hashes(page, store):
    cache, sae = map(Artifact, store)
    facts = {term.get_text(): term.find_next("dd").get_text() for term in page.select(".facts dt")}
    assert facts["Model"] == HOSTILE and facts["Seeds"] == "images 0 to 11 · SAEs 3" and "Scale" not in facts
    data, saes = page.select(".front table")
    assert {cache.name, "12", "0 to 11", cache.recipe["prompts"][:8]} <= set(cells(data))
    assert {sae.name, "mid.0", sae.digest[:8], "0.875 [0.750, 0.938]", "4,096"} <= set(cells(saes))
    assert METRICS["explained_variance"] == 0.875


def test_provenance_lists_every_artifact_with_its_hash(page, store):
    told = cells(page.select_one("#provenance table"))
    for artifact in map(Artifact, store):
        assert artifact.name in told and artifact.digest[:8] in told
    assert told.count("as an input") == 1


def test_labels_stand_beside_their_test_and_its_control(page):
    rows = [[cell.get_text(" ") for cell in row.find_all("td")] for row in page.select("#labels tbody tr")]
    assert [row[2] for row in rows] == list(PAYLOADS[:4]) and {row[3] for row in rows} == {PAYLOADS[-2]}
    assert rows[0][4].startswith("0.850 [") and rows[0][5] == "20" and rows[0][6].startswith("0.550 [")
    assert rows[1][4:] == ["not tested", "0", "not tested"]


def test_hostile_text_is_shown_and_is_no_markup(page):
    assert not page.find_all(["script", "iframe", "link", "base", "img", "svg"])
    assert len(page.find_all("meta")) == 4  # the page's own
    assert not [e for e in page.find_all(True) if any(name.startswith("on") for name in e.attrs)]
    assert all(not a["href"].startswith("javascript") for a in page.find_all("a"))
    for payload in PAYLOADS:
        assert payload in page.get_text()


def test_a_cache_says_what_it_is_and_not_where_it_lies(store, tmp_path):
    cache, _ = store
    text = BeautifulSoup(report(cache, out=tmp_path / "report.html").read_text("utf-8"), "html.parser").get_text()
    assert f"artifacts/activations/{cache.name}" in text and str(cache.parent.parent) not in text


def test_a_report_of_artifacts_is_an_artifact_that_says_what_it_shows(store):
    cache, sae = store
    written = report([sae, cache], store=cache.parent.parent)
    artifact = Artifact.open(written.parent, "reports")
    artifact.verify()
    assert artifact.recipe["shown"] == {folder.name: Artifact(folder).digest for folder in store}
    assert artifact.recipe["notebooks"] == {} and artifact.recipe["model"] is None


# Templates ------------------------------------------------------------------------------------------------------------

TEMPLATE = """{% extends "report.html.j2" %}
{% block style %}.front h1 { color: teal; }{% endblock %}
{% block front %}<p id="mine">{{ facts.Model }}, {{ sections | length }} section</p>{{ super() }}{% endblock %}
{% block section %}<div class="mine">{{ super() }}</div>{% endblock %}
{% block methods %}{% endblock %}
{% block footer %}<footer>Our laboratory</footer>{% endblock %}
"""


def test_a_template_restyles_the_page_and_escapes_like_the_kits(store, tmp_path):
    (tmp_path / "ours.j2").write_text(TEMPLATE)
    written = report(store[1], template=tmp_path / "ours.j2", out=tmp_path / "report.html")
    text = written.read_text("utf-8")
    page = BeautifulSoup(text, "html.parser")
    assert "h1 { color: teal; }" in page.find_all("style")[-2].get_text()
    assert page.find(id="mine").get_text() == f"{HOSTILE}, 1 section"
    assert len(page.select(".mine > section")) == 1 and page.find("footer").get_text() == "Our laboratory"
    assert page.find(id="methods") is None and html.escape("Content-Security-Policy") in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>", "does not extend the kit's"),
        ('{% extends "report.html.j2" %}{% block front %}', "has a mistake"),
        ('{% extends "report.html.j2" %}{% block front %}{{ nothing.here }}{% endblock %}', "'nothing' is undefined"),
        (
            '{% extends "report.html.j2" %}{% block front %}{{ "".__class__.__mro__ }}{% endblock %}',
            "access to attribute '__class__'",
        ),
    ],
)
def test_a_faulty_template_is_refused_in_words(store, tmp_path, text, expected):
    (tmp_path / "ours.j2").write_text(text)
    with pytest.raises(KitError, match=re.escape(expected)):
        report(store[1], template=tmp_path / "ours.j2", out=tmp_path / "report.html")
    with pytest.raises(KitError, match="cannot be read"):
        report(store[1], template=tmp_path / "gone.j2", out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# PDF ------------------------------------------------------------------------------------------------------------------


def test_without_a_chromium_the_pdf_is_refused_before_anything_is_made(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(printing, "MAC", ())
    with pytest.raises(KitError, match=r"A PDF is printed by Chromium, and none was found\. Install"):
        report(store[1], pdf=True, out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_browser_that_fails_is_named_with_what_it_said(tmp_path, monkeypatch):
    failing = tmp_path / "chromium"
    failing.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(printing, "find_browser", lambda: str(failing))
    (tmp_path / "page.html").write_text("<p>")
    with pytest.raises(KitError, match=r"could not print page\.html: no display"):
        printing.print_pdf(tmp_path / "page.html", tmp_path / "page.pdf")

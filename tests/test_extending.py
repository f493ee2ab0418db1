"""The pages on extending the kit hold what they say: their code is run as it stands, and what it makes fits the kit."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from reading_html import read_safely

import sdxl_sae_kit as kit
from sdxl_sae_kit import scales
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.judges import PictureJudge
from sdxl_sae_kit.kinds import KINDS, SAEKind
from sdxl_sae_kit.reports import report

PAGES = Path(__file__).parent.parent / "docs" / "extending"
BLOCK = re.compile(r"^```(python|markdown)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of a page's blocks of code and prose, in order."""
    return BLOCK.findall((PAGES / f"{page}.md").read_text("utf-8"))


def run(page: str, folder: Path, **given: object) -> dict:
    """Write the blocks that name a file, run the others one after the other; gives what they defined."""
    defined: dict = dict(given)
    for number, (_, code) in enumerate(block for block in blocks(page) if block[0] == "python"):
        if named := FILE.match(code):
            (folder / named[1]).write_text(code)
        else:
            exec(compile(code, f"{page}.md, block {number}", "exec"), defined)
    return defined


@pytest.fixture
def folder(tmp_path, store, monkeypatch):
    """A working folder of a researcher's own, whose modules are gone when the test ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SDXL_SAE_KIT_STORE", str(store.root))
    modules, known = set(sys.modules), dict(KINDS)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    KINDS.clear()
    KINDS.update(known)


def test_the_page_on_kinds_trains_one_that_saves_loads_steers_and_exports(folder, small_saes, small_cache):
    made = run("sae_kind", folder)
    sae, again, tokens = made["sae"], made["again"], small_cache.sample("up.0.1", 500)
    groups = (sae.encode(tokens) > 0).unflatten(1, (8, -1)).sum(dim=2)
    assert groups.max() == 1 and 0.5 < groups.float().mean() <= 1
    h = sae.pre_activations(tokens).unflatten(1, (8, -1))
    assert torch.equal(sae.encode(tokens).unflatten(1, (8, -1)).amax(dim=2), h.amax(dim=2).relu())
    assert sae.metrics["explained_variance"] > 0.2

    assert (again.digest, again.config.kind) == (sae.digest, "grouped")
    assert torch.equal(again(tokens), sae(tokens))
    for one in (sae, made["plain"]):
        plain = kit.generate(made["pipe"], ["a red star"], [3], output_type="np")
        with kit.steer(made["pipe"], one):
            assert np.array_equal(kit.generate(made["pipe"], ["a red star"], [3], output_type="np"), plain)
    assert kit.FeatureStats.measure(sae, small_cache).d_sae == sae.d_sae

    relu, read = made["plain"], kit.SAE.load("relu-for-saelens", sae.site)
    assert torch.allclose(relu.encode(tokens), relu.pre_activations(tokens).relu())
    assert torch.allclose(read.encode(tokens), relu.encode(tokens), atol=1e-5)
    with pytest.raises(ArtifactError, match="No other tool computes what a grouped SAE does"):
        sae.export("nowhere", "saelens")


def test_a_penalty_makes_codes_sparser(folder, small_cache):
    made = run("sae_kind", folder)
    more = replace(made["plain"].config, sparsity_coef=0.3)
    sparser = kit.train(small_cache, {"relu": more}, hookpoints=["up.0.1"], batch_size=512, epochs=6)["up.0.1", "relu"]
    assert sparser.metrics["l0"] < 0.8 * made["plain"].metrics["l0"]


def test_a_file_of_a_kind_that_is_not_imported_says_so(folder):
    (folder / "mine.py").write_text(blocks("sae_kind")[0][1])
    __import__("mine")
    kit.SAE(kit.SAEConfig(k=4, kind="grouped"), 16).save("mine.safetensors")
    del KINDS["grouped"]
    with pytest.raises(ArtifactError, match=r"'grouped'.* once the module that defines it .*import"):
        kit.SAE.load("mine.safetensors")


def test_a_kind_has_a_name_of_its_own_and_may_be_defined_again(folder):
    def define(name: str) -> type[SAEKind]:
        return type("Mine", (SAEKind,), {"name": name})

    assert define("mine") is not define("mine")  # a cell that is run twice
    with pytest.raises(KitError, match=r"an SAE kind 'topk' already: .*_TopK. Give yours another name"):
        define("topk")
    with pytest.raises(KitError, match="'my kind' cannot name an SAE kind"):
        define("my kind")


def test_the_page_on_judges_makes_one_that_studies_use(folder, small_stats):
    made = run("judge", folder)
    judge, one, other = made["judge"], made["one"], made["other"]
    assert isinstance(judge, PictureJudge)
    assert made["ranking"].measures == ("pixel", "perceptual", "semantic") and not made["ranking"].factors
    assert made["ablation"].artifact.recipe["judge"] == made["ranking"].artifact.recipe["judge"] == judge.name
    assert made["ablation"].overall("perceptual")["ablated"] > 0
    assert judge.perceptual(one, np.repeat(other, 3, axis=0)).shape == (3, *other.shape[1:3])
    black, white = np.zeros((1, 8, 8, 3), np.float32), np.ones((1, 8, 8, 3), np.float32)
    assert judge.semantic(black, white) == pytest.approx(1)
    assert not judge.perceptual(black, white).any()  # neither has edges


def test_the_page_on_studies_makes_one_that_is_found_verified_and_goes_on_where_it_was_killed(
    folder, small_saes, monkeypatch, tmp_path
):
    made = run("study", folder)
    study, module = made["study"], sys.modules["turning_off"]
    assert len(study.changes) == len(made["held_out"]) == 6
    assert all(each["SAE"] > 0 for each in study.changes.values())
    rows = {row["turned off"]: row["change"] for row in study.rows()}
    for control in ("untrained", "random direction"):
        assert rows[f"SAE − {control}"] == pytest.approx(rows["SAE"] - rows[control])
    read_safely(study._repr_html_())

    arguments, drawn, picture = (made["pipe"], made["sae"], made["cache"], made["held_out"]), [], module.picture

    def dying(*asked):
        drawn.append(asked)
        if len(drawn) == 11:  # in the third prompt, of four pictures each
            raise KeyboardInterrupt
        return picture(*asked)

    monkeypatch.setattr(module, "picture", dying)
    with pytest.raises(KeyboardInterrupt):
        module.turn_off(*arguments, store=tmp_path / "store")
    again = module.turn_off(*arguments, store=tmp_path / "store")
    assert len(drawn) == 11 + 4 * 4
    assert again.changes == study.changes and again.artifact.digest == study.artifact.digest


def notebook_of_the_page(folder: Path) -> Path:
    """The page's cells as a notebook in a folder of its own."""
    cells = []
    for language, content in blocks("notebook"):
        if not FILE.match(content):
            new = nbformat.v4.new_code_cell if language == "python" else nbformat.v4.new_markdown_cell
            cells.append(new(content.strip()))
    cells[1].metadata["tags"] = ["parameters"]
    (folder / "my_notebooks").mkdir()
    path = folder / "my_notebooks" / "steady.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_page_on_notebooks_is_one_by_the_rules_it_states(folder, monkeypatch):
    smoke = replace(scales.SCALES["tiny"]["smoke"], n_images=60, epochs=1)
    monkeypatch.setitem(scales.SCALES["tiny"], "demo", smoke)
    made = run("notebook", folder)
    assert {row["SAE"] for row in made["rows"]} == {"trained", "untrained"}
    assert "untrained: " in made["figure"].layout.meta["alt"]
    cells = nbformat.read(notebook_of_the_page(folder), as_version=4).cells
    assert cells[0].source.startswith("# ") and cells[-1].source.startswith("## What we saw")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert all(source.count("\n") < 12 for source in code)
    assert set(re.findall(r"^(\w+) =", code[0], re.MULTILINE)) == {"MODEL", "SCALE"}


@pytest.mark.slow
def test_the_page_on_notebooks_enters_the_report(folder, store):
    page = report(notebook_of_the_page(folder).parent, scale="smoke", model="tiny-turbo", store=store)
    text = BeautifulSoup(page.read_text("utf-8"), "html.parser").get_text(" ")
    for told in ("Are strong features steady?", "Density of the ten most energetic features", "untrained: "):
        assert told in text

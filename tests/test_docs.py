"""The README and the pages of docs: links lead somewhere, code and commands are real, quoted errors are raised."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

import sdxl_sae_kit as kit
from sdxl_sae_kit.__main__ import _parser

REPOSITORY = Path(__file__).parent.parent
PAGES = [
    *(
        REPOSITORY / name
        for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "artifacts/README.md")
    ),
    REPOSITORY / "sdxl_sae_kit" / "tiny" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|`[^`]*`)*)\]\(([^()\s]+)\)")
LARGEST_PICTURE = 200 * 1024

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language ("" for none)."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links can point to in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_names(source: str) -> list[str]:
    """Of the names that Python code takes from `kit`, those the package does not have."""
    taken = [
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kit"
    ]
    return [name for name in taken if name not in kit.__all__]


def texts_of_the_kit() -> list[str]:
    """Every string in the package, as Python reads it; those with places to fill in are cut there."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (REPOSITORY / "sdxl_sae_kit").rglob("*.py")]
    constants = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]


def understands(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    """Whether the words begin with verbs and then options of this command line."""
    verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if verbs and words and not words[0].startswith("-"):
        return words[0] in verbs[0].choices and understands(verbs[0].choices[words[0]], words[1:])
    options = {name for action in parser._actions for name in action.option_strings}
    return all(word in options for word in words if word.startswith("-"))


@per_page
def test_every_link_leads_somewhere(page: Path):
    for _, text, target in LINK.findall(prose(page)):
        if re.match("https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: [{text}]({target})"
        assert not anchor or anchor in anchors(there), f"{page.name}: [{text}]({target}) has no such heading"


@per_page
def test_every_picture_is_small_and_says_in_words_what_it_shows(page: Path):
    for _, text, target in (link for link in LINK.findall(prose(page)) if link[0]):
        picture = page.parent / target
        assert len(text.split()) >= 5, f"{page.name}: {target} needs alt text"
        assert picture.stat().st_size < LARGEST_PICTURE
        with Image.open(picture) as opened:
            assert min(opened.size) > 100


@per_page
def test_python_compiles_and_its_names_exist(page: Path):
    for block in blocks(page, "python"):
        assert missing_names(block) == []
    said = re.findall(r"`kit\.(\w+)", prose(page))
    assert [name for name in said if name not in kit.__all__] == []


@per_page
def test_commands_exist(page: Path):
    written = [line for block in [*blocks(page, "bash"), *blocks(page, "")] for line in block.splitlines()]
    written += re.findall(r"`([^`\n]+)`", prose(page))
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for line in written:
        first, *words = line.split("#")[0].split() or [""]
        if first == "make":
            asked = [word for word in words if "=" not in word]
            assert set(asked) <= targets, line
        elif Path(first).name == "sdxl-sae-kit":
            assert understands(_parser(), words), line


def test_every_message_quoted_as_the_kits_own_is_in_its_source():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    ours, others = page[page.index("## What the kit says") :].split("## What others say")
    quoted, spoken = re.findall(r"\*\*`([^`]+)`\*\*", ours), texts_of_the_kit()
    assert len(quoted) > 20
    assert [message for message in quoted if not any(message in text for text in spoken)] == []
    assert "Torch not compiled with CUDA enabled" in others


def test_the_two_commands_and_ten_lines_stand_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    commands = readme[readme.index("## Two commands") :].split("```")[1].split("\n")
    assert [line.split("#")[0].strip() for line in commands if line] == ["make report", "make test"]
    (code,) = blocks(REPOSITORY / "README.md", "python")
    lines = [line for line in code.splitlines() if line and not line.startswith("import ")]
    assert 10 <= len(lines) <= 12
    assert len(readme.splitlines()) <= 170


def test_the_citation_names_this_version_and_the_paper():
    told = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    paper = told["preferred-citation"]
    assert told["version"] == kit.__version__
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert [author["family-names"] for author in paper["authors"] if author["family-names"] not in readme] == []
    assert paper["title"] in readme and paper["identifiers"][0]["value"] in readme


@pytest.mark.slow
def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = blocks(REPOSITORY / "README.md", "python")
    monkeypatch.setenv("SDXL_SAE_KIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    fewer = code.replace('"world", 500', '"world", 100').replace("epochs=10", "epochs=2")
    assert fewer != code
    exec(compile(fewer, "README.md", "exec"), {})
    with Image.open(tmp_path / "without.png") as drawn:
        assert drawn.size == (64, 64)


def test_a_dead_link_and_an_unknown_name_would_be_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n\n[there](#a-heading) [nowhere](gone.md)\n")
    assert anchors(page) == {"a-heading"}
    with pytest.raises(AssertionError, match=r"gone\.md"):
        test_every_link_leads_somewhere(page)
    assert missing_names("kit.collect(kit.colect)") == ["colect"]
    assert understands(_parser(), ["report", "--scale", "smoke"])
    assert not understands(_parser(), ["report", "--scales"])
    assert not understands(_parser(), ["reprot"])

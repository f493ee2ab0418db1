"""What people read is spelt as a dictionary has it, the British way, or as the kit's own list of words does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from spellchecker import SpellChecker

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    + [ROOT / "artifacts/README.md", *ROOT.glob("sdxl_sae_kit/**/README.md")]
)
OURS = set((Path(__file__).parent / "words.txt").read_text("utf-8").split())
AMERICAN = re.compile(
    r"\b(colors?|colored|gray|centers?|centered|neighbors?|behaviors?|favor|labeled|modeled|catalog|analyz\w+)\b|"
    r"(?<!\w)[a-z]+(?:ali|eci|ani|imi|ogni|ormal|mmari)z(?:e[sd]?|ing|ations?)\b",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?```|^    .*?$|`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>\n]+>", re.DOTALL | re.MULTILINE)


def prose_of(page: Path) -> str:
    """The text of a page without code, addresses and what is quoted from code."""
    text = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    return CODE.sub(" ", text)


def words_of(text: str) -> set[str]:
    """Words of three letters or more, without the possessive; abbreviations in capitals are nobody's to spell."""
    words = {word.removesuffix("'s") for word in re.findall(r"[A-Za-zÀ-ɏ]+(?:'[a-z]+)?", text.replace("’", "'"))}
    return {word for word in words if len(word) > 2 and not word.isupper()}


@pytest.fixture(scope="module")
def dictionary() -> SpellChecker:
    return SpellChecker()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_word_is_known(page: Path, dictionary: SpellChecker) -> None:
    unknown = {word for word in words_of(prose_of(page)) if not {word, word.lower()} & OURS | dictionary.known([word])}
    assert not unknown, f"mend these, or add them to tests/words.txt: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_spelling_is_british(page: Path) -> None:
    assert [found[0] for found in AMERICAN.finditer(prose_of(page))] == []


def test_our_list_is_sorted_and_needed(dictionary: SpellChecker) -> None:
    listed = (Path(__file__).parent / "words.txt").read_text("utf-8").splitlines()
    assert listed == sorted(set(listed), key=lambda word: (word.lower(), word))
    assert not dictionary.known(OURS), "the dictionary has these already"


def test_misspelt_and_american_words_are_found(dictionary: SpellChecker) -> None:
    assert dictionary.unknown(words_of(CODE.sub(" ", "It drwas the cat's picture, not `drwan`."))) == {"drwas"}
    assert AMERICAN.findall("a colour specialises, a size, a prize") == []
    assert [found[0] for found in AMERICAN.finditer("gray, it specializes")] == ["gray", "specializes"]


def test_common_misspellings_are_nowhere() -> None:
    """codespell, also over code and docstrings; what it reads is set in pyproject.toml."""
    found = subprocess.run(
        [sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stderr

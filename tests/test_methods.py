"""The methods page: everything that tables name is stated, once, beside code that is there."""

import importlib
import re
from pathlib import Path

import pytest

import sdxl_sae_kit
from sdxl_sae_kit.methods import METHODS

ALL = [method for group in METHODS.values() for method in group]
NAMED = (
    *("explained variance", "L0", "dead share", "density", "Moran", "specificity", "AUC", "balanced accuracy"),
    *("Wilson", "Newcombe", "bootstrap", "Student", "locality", "false discovery", "sign-flip", "Kendall", "τ-b"),
    *("Spearman", "Cohen's kappa", "equal damage", "mutual information", "adjusted Rand", "participation ratio"),
    *("log-odds", "repaired", "attribution", "untrained", "PCA", "random direction", "vanish", "Bhattacharyya"),
)
"""What the kit's tables, captions and sentences call their numbers."""


def covered(word: str) -> bool:
    plain = word.casefold()
    texts = (" ".join((m.name, m.formula, m.source, *m.words)).casefold() for m in ALL)
    return any(plain in text or plain.replace("cohen's ", "") in text for text in texts)


@pytest.mark.parametrize("word", NAMED)
def test_a_word_of_the_tables_has_its_formula(word):
    source = "".join(path.read_text("utf-8") for path in Path(sdxl_sae_kit.__file__).parent.rglob("*.py")
                     if path.name != "methods.py")  # fmt: skip
    assert re.search(re.escape(word), source, re.IGNORECASE), "no table names it any more: take it off the list"
    assert covered(word)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_each_method_names_code_that_is_there(method):
    parts = method.home.split(".")
    places = [at for at in range(len(parts), 0, -1) if _is_module(".".join(parts[:at]))]
    found = importlib.import_module(f"sdxl_sae_kit.{'.'.join(parts[: places[0]])}")
    for part in parts[places[0] :]:
        found = getattr(found, part)
    assert found.__doc__ and method.formula and method.meaning.endswith(".")


def test_no_method_is_stated_twice():
    assert len({method.name for method in ALL}) == len(ALL)


def _is_module(name: str) -> bool:
    return (Path(sdxl_sae_kit.__file__).parent / f"{name.replace('.', '/')}.py").exists()

"""The methods page: everything that tables name is stated, once, beside code that is there."""

import importlib
import re
from pathlib import Path

import pytest

import sdxl_sae_kit
from sdxl_sae_kit.methods import METHODS
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.studies import densities, statistics

ALL = [method for group in METHODS.values() for method in group]
NAMED = (
    *("explained variance", "L0", "dead share", "density", "Moran", "specificity", "AUC", "balanced accuracy"),
    *("Wilson", "Newcombe", "bootstrap", "Student", "locality", "false discovery", "sign-flip", "Kendall", "τ-b"),
    *("Spearman", "Cohen's kappa", "equal damage", "mutual information", "adjusted Rand", "participation ratio"),
    *("log-odds", "repaired", "attribution", "untrained", "PCA", "random direction", "vanish", "Bhattacharyya"),
)
"""What the kit's tables, captions and sentences call their numbers."""
CALLED = {
    "Controls of an SAE": "PCA",
    "Cohen's κ": "kappa",
    "Effect of an edit": "random direction",
}
"""What tables call a method whose name, formula and source do not say so."""


def covered(word: str) -> bool:
    plain = word.casefold()
    texts = (" ".join((m.name, m.formula, m.source, CALLED.get(m.name, ""))).casefold() for m in ALL)
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
    names = {method.name for method in ALL}
    assert len(names) == len(ALL) and set(CALLED) <= names


def test_numbers_in_the_statements_are_those_of_the_code():
    told = {method.name: f"{method.formula} {method.meaning}" for method in ALL}
    for name in ("L0", "Dead share", "Density"):
        assert f"{FIRES:g}" in told[name]
    assert f"at least {densities.MIN_PROMPTS} prompts" in told["Vanished and appeared latents"]
    assert f"up to {statistics._EXACT} pairs" in told["Sign-flip test"]
    assert f"{1 + statistics._FLIPS:,} of {statistics._FLIPS:,} random" in told["Sign-flip test"]


def test_kinds_of_saes_are_told_apart():
    told = ALL[0].meaning
    assert "b_dec with subtract_b_dec, else 0" in told and "TopK(" not in ALL[0].formula
    topk, batchtopk = told.split("BatchTopK:")
    assert "at most k" in topk and "at most k" not in batchtopk
    assert "in training" in batchtopk and "one threshold for all latents" in batchtopk.split("JumpReLU:")[0]


def _is_module(name: str) -> bool:
    return (Path(sdxl_sae_kit.__file__).parent / f"{name.replace('.', '/')}.py").exists()

"""The methods page: everything that tables name is stated, once, beside code that is there."""

import importlib
import re
from datetime import UTC, datetime
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdxl_sae_kit
from sdxl_sae_kit.firing import Firing
from sdxl_sae_kit.methods import METHODS, Method
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.studies import densities, statistics

ALL = [method for group in METHODS.values() for method in group]
NAMED = (
    *("explained variance", "L0", "dead share", "density", "Moran", "specificity", "AUC", "balanced accuracy"),
    *("Wilson", "Newcombe", "bootstrap", "Student", "locality", "false discovery", "sign-flip", "Kendall", "τ-b"),
    *("Spearman", "Cohen's kappa", "equal damage", "mutual information", "adjusted Rand", "participation ratio"),
    *("log-odds", "repaired", "attribution", "untrained", "PCA", "random direction", "vanish", "Bhattacharyya", "ω²"),
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
    assert home(method).__doc__ and method.formula and method.meaning.endswith(".")


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


def home(method: Method) -> Any:
    """The code that a method names."""
    parts = method.home.split(".")
    place = next(at for at in range(len(parts), 0, -1) if _is_module(".".join(parts[:at])))
    found = importlib.import_module(f"sdxl_sae_kit.{'.'.join(parts[:place])}")
    for part in parts[place:]:
        found = getattr(found, part)
    return found


def _is_module(name: str) -> bool:
    return (Path(sdxl_sae_kit.__file__).parent / f"{name.replace('.', '/')}.py").exists()


# The formulas as the page states them, worked out by hand, beside what the code they name makes of the same numbers ---


def stated(name: str) -> Method:
    return next(method for method in ALL if method.name == name)


def test_omega_squared_is_what_its_formula_says():
    groups = {"red": [4, 5, 9], "blue": [1, 2], "green": [3, 3, 6]}
    values = [Fraction(value) for group in groups.values() for value in group]
    n, g, mean = len(values), len(groups), sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    within = sum((value - Fraction(sum(group), len(group))) ** 2 for group in groups.values() for value in group)
    ms_within = within / (n - g)
    explained = (total - within - (g - 1) * ms_within) / (total + ms_within)
    names = [name for name, group in groups.items() for _ in group]
    responses = np.array([[float(value), 1.0] for value in values], np.float32)
    assert 0.3 < explained < 0.6
    assert home(stated("ω²"))(responses, names) == pytest.approx([float(explained), 0])


def test_morans_i_is_what_its_formula_says():
    z = np.array([[3.0, 1.0, 0.0], [2.0, 0.0, 0.5]])
    places = list(product(range(2), range(3)))
    edges = [(a, b) for a in places for b in places if a < b and abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    apart = {place: z[place] - z.mean() for place in places}
    expected = len(places) / len(edges) * sum(apart[a] * apart[b] for a, b in edges)
    expected /= sum(each**2 for each in apart.values())
    codes = z.astype(np.float32).reshape(1, 6, 1)
    tally = Firing.of(np.zeros(codes.shape, int), codes, z.shape, d_sae=1).by_image()
    assert isinstance(tally, home(stated("Moran's I"))) and len(edges) == 7
    assert tally.moran == pytest.approx([expected])


def test_balanced_accuracy_is_what_its_formula_says():
    kind, _, name = stated("Balanced accuracy").home.rpartition(".")
    test = home(Method("", "", "", kind))(3, "a grid", 9, 10, 3, 6, "somebody", datetime.now(UTC))
    right = {"active": [True] * 9 + [False], "inactive": [True] * 3 + [False] * 3}
    assert getattr(test, name) == pytest.approx(float(np.mean([np.mean(each) for each in right.values()])))
    assert getattr(test, name) != pytest.approx(12 / 16)  # not the share of all that is right

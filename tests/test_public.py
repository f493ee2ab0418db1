"""The public names: all there, listed once, and a slip of the pen is corrected."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import sdxl_sae_kit as kit

PACKAGE = Path(kit.__file__).parent
FIRST_LINE = re.compile(r"[^\n]*[^\n.]\.(\n\n|$)")
EXAMPLES = [
    ".".join(("sdxl_sae_kit", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if re.search(r"^ *>>> (?!.*SKIP)", path.read_text("utf-8"), re.MULTILINE)
]
"""Modules with examples that run."""


def test_every_public_name_can_be_had_and_is_the_one_type_checkers_see():
    tree = ast.parse(Path(kit.__file__).read_text())
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names} - {
        None
    }
    assert typed == set(kit.__all__) == set(dir(kit)) - {"__version__"}
    for name in kit.__all__:
        assert getattr(kit, name) is not None
        assert getattr(kit, name).__doc__


def test_every_public_name_is_described_by_a_sentence_of_one_line():
    described = {name: inspect.getdoc(getattr(kit, name)) for name in kit.__all__ if name != "DEFAULT_HOOKPOINTS"}
    assert not {name: text for name, text in described.items() if not FIRST_LINE.match(text)}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_give_what_they_say(module):
    assert not doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS).failed


def test_version_and_slips():
    assert kit.__version__[0].isdigit()
    with pytest.raises(AttributeError, match=r"no attribute 'colect'. Did you mean 'collect'\?"):
        _ = kit.colect

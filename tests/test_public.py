"""The public names: all there, listed once, and a slip of the pen is corrected."""

import ast
from pathlib import Path

import pytest

import sdxl_sae_kit as kit


def test_every_public_name_can_be_had_and_is_the_one_type_checkers_see():
    tree = ast.parse(Path(kit.__file__).read_text())
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names} - {
        None
    }
    assert typed == set(kit.__all__) == set(dir(kit)) - {"__version__"}
    for name in kit.__all__:
        assert getattr(kit, name) is not None
        assert getattr(kit, name).__doc__


def test_version_and_slips():
    assert kit.__version__[0].isdigit()
    with pytest.raises(AttributeError, match=r"no attribute 'colect'. Did you mean 'collect'\?"):
        _ = kit.colect

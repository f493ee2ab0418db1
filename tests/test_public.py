"""The public names: all there, listed once, and a slip of the pen is corrected."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from operator import attrgetter
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
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
NUMBERS = re.compile(r"\b(float|ndarray|Tensor)\b")


def unexplained(tree: ast.Module) -> Iterator[str]:
    """Fields of public classes that hold numbers and are told of neither below nor in the class's docstring."""
    for made in tree.body:
        if isinstance(made, ast.ClassDef) and not made.name.startswith("_"):
            told = set(re.findall(r"\w+", ast.get_docstring(made) or ""))
            for field, below in zip(made.body, [*made.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and NUMBERS.search(ast.unparse(field.annotation)):
                    name = field.target.id
                    explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    if not (name.startswith("_") or explained or name in told):
                        yield f"{made.name}.{name}"


def wrong_calls(docstring: str) -> Iterator[str]:
    """Calls of the kit's public names in a docstring's examples, run or not, that these would refuse."""
    for example in doctest.DocTestParser().get_examples(docstring):
        for call in (node for node in ast.walk(ast.parse(example.source)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).removeprefix("kit.")
            if re.fullmatch(r"[\w.]+", name) and name.partition(".")[0] in kit.__all__:
                given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                try:
                    inspect.signature(attrgetter(name)(kit)).bind(*call.args, **given)
                except (AttributeError, TypeError) as error:
                    yield f"{ast.unparse(call)}: {error}"


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


def test_examples_call_what_is_there_also_where_they_do_not_run():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(n) or "" for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, documented)]
    assert [wrong for text in texts for wrong in wrong_calls(text)] == []
    assert len([text for text in texts if ">>>" in text]) > 50
    assert len(list(wrong_calls(">>> kit.collect(pipe, prompts, step=1)\n>>> SAE.read('file')\n"))) == 2


def test_fields_that_hold_numbers_say_which():
    assert {path.name: names for path, tree in TREES.items() if (names := list(unexplained(tree)))} == {}
    made = ast.parse("class Made:\n    told: float\n    'In seconds.'\n    untold: float\n    _own: float\n")
    assert list(unexplained(made)) == ["Made.untold"]


def test_version_and_slips():
    assert kit.__version__[0].isdigit()
    with pytest.raises(AttributeError, match=r"no attribute 'colect'. Did you mean 'collect'\?"):
        _ = kit.colect

"""The house rules: who imports whom, how long files are, what the environment looks like."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "sdxl_sae_kit").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_contracts_are_kept(monkeypatch):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True, no_logo=True) == 0, "`lint-imports` says which import breaks which contract"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_named_for_a_thing(path):
    assert len(path.read_text().splitlines()) <= 400
    assert not re.search("util|helper|common|misc|base$|manager|factory|registry", path.stem)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_pipelines_and_tiny_import_diffusers(path):
    """Read from the source, independently of import-linter; annotations under TYPE_CHECKING are no imports."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    excused = {id(node) for block in typing_only for node in ast.walk(block)}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in excused:
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and id(node) not in excused:
            imported.add((node.module or "").split(".")[0])
    assert not imported & {"pickle", "torchvision", "wandb", "joblib"}
    allowed = {"transformers"} if path.stem in ("grounding", "labellers", "similarity") else set()
    if path.stem != "pipelines" and path.parent.name != "tiny":
        assert not imported & {"diffusers", "transformers"} - allowed


def test_importing_the_package_is_silent_and_light():
    code = (
        "import sdxl_sae_kit, sys; print(sorted({'diffusers', 'transformers', 'plotly', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_wheel_would_carry_weights_and_template():
    data = {
        path.name
        for path in (ROOT / "sdxl_sae_kit").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {"py.typed", "report.html.j2", "panel.js", "twin.js", "model_index.json"} <= data
    ignored = subprocess.run(
        ["git", "check-ignore", *sorted((ROOT / "sdxl_sae_kit").rglob("*.*"))], cwd=ROOT, capture_output=True, text=True
    )
    assert all("__pycache__" in line for line in ignored.stdout.splitlines())


def test_environment_yml_leaves_the_bounds_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment.keys() == {"name", "channels", "dependencies"}
    assert (environment["name"], environment["channels"]) == (PROJECT["name"], ["conda-forge"])
    python, pip, pip_block = environment["dependencies"]
    assert pip.startswith("pip>=") and pip_block == {"pip": ["-e .[dev]"]}
    minor = int(python.removeprefix("python=3."))
    lowest, end = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    assert lowest <= minor < end


def test_every_direct_dependency_is_pinned_within_its_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = [entry for group in PROJECT["optional-dependencies"].values() for entry in group]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier, f"{requirement.name} has no bounds"
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_shapes_are_of_arrays_as_every_numpy_names_them() -> None:
    """Float[NDArray[…], …] is not understood at run time where numpy (2.5 on) makes NDArray an alias of its own."""
    pattern = re.compile(r"(Float|Int|Integer|Bool)\[\s*NDArray")
    assert [str(path) for path in MODULES if pattern.search(path.read_text())] == []

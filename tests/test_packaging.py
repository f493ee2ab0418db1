"""What is built: a wheel that holds what it needs and nothing else, sources that can be built and tested."""

import ast
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sdxl_sae_kit import artifacts
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.notebooks import copy_notebooks, find_notebooks

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def kept(*folders):
    """What git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that a build of sdist and, from it, wheel left."""
    pytest.importorskip("build", reason="build is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_the_package_its_notebooks_and_kernel_and_nothing_else(wheel):
    names = set(wheel.namelist())
    data = f"sdxl_sae_kit-{PROJECT['version']}"
    about = {f"{data}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    kernel = f"{data}.data/data/share/jupyter/kernels/sdxl-sae-kit/kernel.json"
    pages = {f"sdxl_sae_kit/pages/{name}" for name in NOTEBOOKS}
    licence = f"{data}.dist-info/licenses/LICENSE"
    assert names == kept("sdxl_sae_kit") | pages | about | {kernel, licence}
    assert {"sdxl_sae_kit/py.typed", "sdxl_sae_kit/report.html.j2"} <= names
    assert json.loads(wheel.read(kernel))["argv"][0] == "python", "the Python of the environment it is installed in"


def test_the_wheel_stays_small(wheel):
    assert sum(entry.compress_size for entry in wheel.infolist()) < 20_000_000


def test_the_wheel_says_what_it_is(wheel):
    about = wheel.read(f"sdxl_sae_kit-{PROJECT['version']}.dist-info/METADATA").decode()
    assert f"\nVersion: {PROJECT['version']}\n" in about
    assert "\nLicense-Expression: MIT\n" in about and "\nRequires-Python: <3.14,>=3.11\n" in about


def test_the_sources_are_what_git_has(built):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    assert names - {"PKG-INFO"} == kept() | ({".gitignore"} & names)


def test_dependencies_and_pins_are_in_order_and_named_once():
    def names(lines):
        return [canonicalize_name(Requirement(line).name) for line in lines]

    assert names(PROJECT["dependencies"]) == sorted(set(names(PROJECT["dependencies"])))
    groups = re.split(r"^# .*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    pinned = [names(group.split()) for group in groups if group.strip()]
    assert all(group == sorted(group) for group in pinned)
    known = [name for group in pinned for name in group]
    assert len(known) == len(set(known)) and set(names(PROJECT["dependencies"])) <= set(known)


def test_sources_hold_what_a_reader_and_a_tester_need(built):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    wanted = ("SECURITY.md", "CITATION.cff", "constraints.txt", "tests/conftest.py", "docs/", "notebooks/")
    assert all(any(name.startswith(each) for name in names) for each in wanted)


# What the package imports --------------------------------------------------------------------------------------------


def test_every_package_that_is_imported_is_required():
    """Wherever the import stands: one inside a function fails only when it is called."""
    wanted = PROJECT["dependencies"] + [
        need for extra in ("datasets", "lora", "riebench", "umap") for need in PROJECT["optional-dependencies"][extra]
    ]
    required = {canonicalize_name(Requirement(line).name) for line in wanted}
    # With JupyterLab and jupyter-client, whose parts these are.
    required |= {"jupyter-core", "ipython", "traitlets"}
    required |= {"pandas"}  # only those who ask for a table of it need it, and are told so
    homes = {"umap": ["umap-learn"], **packages_distributions()}  # an extra that may not be installed
    for path in (ROOT / "sdxl_sae_kit").rglob("*.py"):
        for name in imported(ast.parse(path.read_text())) - sys.stdlib_module_names - {"sdxl_sae_kit"}:
            found = {canonicalize_name(home) for home in homes.get(name, [name])}
            assert found & required, f"{path.name} imports {name}, which pyproject.toml does not require"


def imported(tree):
    nodes = list(ast.walk(tree))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


# Notebooks and store of an installed package --------------------------------------------------------------------------


@pytest.fixture
def as_installed(tmp_path, monkeypatch):
    """The package in site-packages, with a pyproject.toml beside it that some other package left there."""
    pages = tmp_path / "site-packages" / "sdxl_sae_kit" / "pages"
    pages.mkdir(parents=True)
    (pages / "00_first.ipynb").write_text("{}")
    (pages.parent.parent / "pyproject.toml").write_text("")
    monkeypatch.setattr(artifacts, "PAGES", pages)
    monkeypatch.setattr("sdxl_sae_kit.notebooks.PAGES", pages)
    return pages


def test_a_checkout_uses_its_own_notebooks_and_store(monkeypatch):
    monkeypatch.delenv(artifacts.STORE_VARIABLE, raising=False)
    assert artifacts.checkout() == ROOT and Store.at().root == ROOT / "artifacts"
    assert {path.name for path in find_notebooks(None)} == NOTEBOOKS


def test_an_installed_package_brings_notebooks_and_writes_where_one_works(as_installed, tmp_path, monkeypatch):
    monkeypatch.delenv(artifacts.STORE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert artifacts.checkout() is None and Store.at().root == tmp_path / "artifacts"
    assert find_notebooks(None) == [as_installed / "00_first.ipynb"]


def test_notebooks_are_copied_but_never_over_others(tmp_path):
    copies = copy_notebooks(tmp_path / "new" / "mine")
    assert {copy.name for copy in copies} == NOTEBOOKS
    assert all(copy.read_bytes() == (ROOT / "notebooks" / copy.name).read_bytes() for copy in copies)
    for copy in copies[1:]:
        copy.unlink()
    copies[0].write_text("mine now")
    with pytest.raises(KitError, match=f"holds {copies[0].name} already. Nothing was copied"):
        copy_notebooks(copies[0].parent)
    assert [path.name for path in copies[0].parent.iterdir()] == [copies[0].name]
    assert copies[0].read_text() == "mine now"


# Release ------------------------------------------------------------------------------------------------------------


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+) – (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version, date = headings[0]
    assert version == PROJECT["version"]
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])


@pytest.fixture
def clone(tmp_path):
    """A repository of this version, with the release script and an environment that builds nothing."""
    for name in ("pyproject.toml", "CHANGELOG.md", ".ci/release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".ci" / "release").chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\ncase "$1" in -c) exec {sys.executable} "$@";; esac\n'
    )
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "Makefile").write_text("dist:\n\tmkdir -p dist && touch dist/the.whl\n")
    (tmp_path / ".gitignore").write_text(".venv\ndist\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "change")


def release(folder):
    done = subprocess.run([".ci/release"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_only_a_clean_dated_tagged_commit_is_released(clone):
    version, changelog = PROJECT["version"], clone / "CHANGELOG.md"
    text = re.sub(rf"^## {re.escape(version)} – .*$", f"## {version} – unreleased", changelog.read_text(), flags=re.M)
    changelog.write_text(text + "\n")
    assert release(clone)[0] == 1 and "not committed" in release(clone)[1]
    commit(clone)
    assert release(clone)[0] == 1 and f"'## {version} – <date>'" in release(clone)[1]
    changelog.write_text(text.replace(f"{version} – unreleased", f"{version} – 2030-01-02"))
    commit(clone)
    git(clone, "tag", "--annotate", "v9.9.9", "--message", "another")
    assert release(clone)[0] == 1 and f"has no tag v{version}" in release(clone)[1]
    git(clone, "tag", "--delete", "v9.9.9")
    git(clone, "tag", "--annotate", f"v{version}", "--message", version)
    code, said = release(clone)
    assert code == 0 and "twine upload" in said and "the.whl" in said

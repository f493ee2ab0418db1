"""environment.yml makes the environment it promises: read as conda reads it, and once for real from a local channel."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
[PIP] = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_python_of_conda_is_one_that_the_kit_takes():
    [python] = [entry.removeprefix("python=") for entry in CONDA if entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")


def test_pip_installs_this_checkout_with_an_extra_that_it_has():
    [line] = PIP
    path, extra = re.fullmatch(r"-e (.+)\[(\w+)\]", line).groups()
    assert (ROOT / path).resolve() == ROOT and extra in PROJECT["optional-dependencies"]


def test_conda_reads_the_specifications():
    rattler = pytest.importorskip("rattler", reason="py-rattler is not installed")
    names = [str(rattler.MatchSpec(entry, strict=True).name.normalized) for entry in CONDA]
    assert names == ["python", "pip"]


def test_conda_and_pip_are_told_the_same_of_pip():
    """An editable install of a project without setup.py needs a pip that is not ancient."""
    [pip] = [Requirement(entry) for entry in CONDA if entry.startswith("pip")]
    assert pip.specifier.contains("26.0") and not pip.specifier.contains("24.0")


# For real -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """All that the test needs of a package index: a pip for the channel, and what builds an editable install."""
    pytest.importorskip("rattler", reason="py-rattler is not installed")
    folder = tmp_path_factory.mktemp("wheels")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for wanted in ([_pip_wanted(), "--no-deps"], [*build, "editables"]):  # hatchling asks for the latter as it builds
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", folder]
        if subprocess.run([*command, *wanted]).returncode:
            pytest.skip(f"no package index has {wanted[0]}")
    return folder


@pytest.fixture(scope="module")
def channel(tmp_path_factory, wheels):
    """A channel with this Python and a pip, which stand for conda-forge's."""
    pytest.importorskip("rattler", reason="py-rattler is not installed")
    for tool in ("patchelf", "whl2conda"):
        if not _tool(tool):
            pytest.skip(f"{tool} is not installed")
    if sys.platform != "linux":
        pytest.skip("only Linux's Python is packed again here")
    folder = tmp_path_factory.mktemp("conda") / "channel" / "conda-forge"
    (folder / "noarch").mkdir(parents=True)
    (folder / "linux-64").mkdir()
    _pack_python(folder / "linux-64", tmp_path_factory.mktemp("python"))
    _pack_pip(folder / "noarch", wheels)
    import rattler.index

    asyncio.run(rattler.index.index_fs(folder, force=True))
    return folder


def _tool(name):
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _pack_python(channel, work):
    """This Python as conda's package `python`, whose library is found beside it."""
    minor = f"python{sysconfig.get_python_version()}"
    base, prefix = Path(sys.base_prefix), work / "python"
    skipped = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "config-*", "site-packages", "*.a")
    shutil.copytree(base / "lib" / minor, prefix / "lib" / minor, ignore=skipped)
    (prefix / "lib" / minor / "site-packages").mkdir()
    (prefix / "bin").mkdir()
    shutil.copy(base / "bin" / minor, prefix / "bin" / minor)
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy(library, prefix / "lib")
    subprocess.run([_tool("patchelf"), "--set-rpath", "$ORIGIN/../lib", prefix / "bin" / minor], check=True)
    for name in ("python", "python3"):
        (prefix / "bin" / name).symlink_to(minor)
    full = sys.version.split()[0]
    index = {"name": "python", "version": full, "build": "0_local", "build_number": 0, "subdir": "linux-64"}
    index |= {"depends": [], "python_site_packages_path": f"lib/{minor}/site-packages"}
    files = sorted(str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file() or path.is_symlink())
    paths = [{"_path": name, "path_type": "softlink" if (prefix / name).is_symlink() else "hardlink"} for name in files]
    (prefix / "info").mkdir()
    (prefix / "info" / "index.json").write_text(json.dumps(index))
    (prefix / "info" / "paths.json").write_text(json.dumps({"paths": paths, "paths_version": 1}))
    (prefix / "info" / "files").write_text("\n".join(files))
    with tarfile.open(channel / f"python-{full}-0_local.tar.bz2", "w:bz2", compresslevel=1) as packed:
        for name in ["info", *files]:
            packed.add(prefix / name, name)


def _pack_pip(channel, wheels):
    [wheel] = wheels.glob("pip-*.whl")
    command = [_tool("whl2conda"), "convert", wheel, "--out-dir", channel, "--format", "V2"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _pip_wanted():
    return next(entry for entry in CONDA if entry.startswith("pip"))


def _solved(channel, specifications):
    import rattler

    source = rattler.Channel("conda-forge", rattler.ChannelConfig(channel_alias=channel.parent.as_uri() + "/"))
    return asyncio.run(
        rattler.solve(
            sources=[source],
            specs=[rattler.MatchSpec(entry, strict=True) for entry in specifications],
            platforms=["linux-64", "noarch"],
            virtual_packages=rattler.VirtualPackage.detect(),
        )
    )


@pytest.mark.slow
def test_conda_makes_the_environment_and_pip_finds_the_kit_in_it(channel, wheels, tmp_path):
    import rattler

    here = ".".join(map(str, sys.version_info[:2]))  # the one Python there is to pack; others differ in no other way
    records = _solved(channel, [f"python={here}" if entry.startswith("python") else entry for entry in CONDA])
    assert {record.name.normalized for record in records} == {"python", "pip"}
    prefix = tmp_path / "prefix"
    asyncio.run(rattler.install(records, target_prefix=prefix, cache_dir=tmp_path / "cache"))
    python = prefix / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*command, cwd=ROOT):
        done = subprocess.run([python, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Dependencies are those of pyproject.toml, which `make env` proves; installing 120 packages again proves no more.
    local = ["--no-index", "--find-links", str(wheels)]  # an index that answers in part would fail it half-way
    run("-m", "pip", "install", "--quiet", "--no-deps", *local, *PIP[0].split())
    told = run("-c", "import sys, sdxl_sae_kit; print(sys.prefix); print(sdxl_sae_kit.__file__)", cwd=tmp_path)
    assert told.split() == [str(prefix), str(ROOT / "sdxl_sae_kit" / "__init__.py")]
    assert (prefix / "share/jupyter/kernels/sdxl-sae-kit/kernel.json").is_file()
    assert run("-m", "pip", "show", "sdxl-sae-kit").startswith(f"Name: sdxl-sae-kit\nVersion: {PROJECT['version']}")

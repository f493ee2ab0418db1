"""What is installed here: Python, packages, extras, the embedded weights, JupyterLab and its kernels, a browser."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import hash_file
from sdxl_sae_kit.health import Check, State
from sdxl_sae_kit.printing import find_browser
from sdxl_sae_kit.tiny import WEIGHTS

if TYPE_CHECKING:
    from packaging.requirements import Requirement

KIT = "sdxl-sae-kit"
EXTRAS = {
    "browser": "tests in a real browser, for contributors",
    "datasets": "prompts from datasets of the Hugging Face hub",
    "dev": "tests, linters and builds, for contributors",
    "lora": "load_pipeline(…, lora=…)",
    "release": "audits and uploads, for maintainers",
    "riebench": "Lpips, the perceptual distance of the published benchmark",
    "umap": "maps of features by UMAP instead of PCA",
}
"""What each extra of pyproject.toml gives."""
WIDGETS = ("anywidget", "@jupyter-widgets/jupyterlab-manager")
"""JupyterLab's extensions that galleries and panels are drawn by."""


# Packages -----------------------------------------------------------------------------------------------------------


def check_python() -> Check:
    """Whether this Python is one the kit is made for."""
    from packaging.specifiers import SpecifierSet

    wanted, found = metadata.metadata(KIT)["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Check("Python", "ok", f"{found} in {sys.prefix}")
    return Check("Python", "fails", f"{found}, and {wanted} is needed", f"Make an environment of Python {wanted}.")


def check_packages() -> Check:
    """Whether each package the kit needs is there in a version it takes."""
    needed = [need for need in requirements() if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = [need for need in needed if not fits(need)]
    if not wrong:
        return Check("packages", "ok", f"all {len(needed)} are there, within their bounds")
    return Check("packages", "fails", tell(wrong), f"Run: {pip_install(map(plain, wrong))}")


def check_extras() -> Sequence[Check]:
    """What each extra gives, and whether it is there."""
    optional = [need for need in requirements() if need.marker and not need.marker.evaluate({"extra": ""})]
    needs = {
        extra: [need for need in optional if need.marker and need.marker.evaluate({"extra": extra})] for extra in EXTRAS
    }
    return [_check_extra(extra, only) for extra, only in needs.items() if only]


def _check_extra(extra: str, only: Sequence[Requirement]) -> Check:
    absent = [need for need in only if version(need.name) is None]
    wrong = [need for need in only if need not in absent and not fits(need)]
    name, gives = f"extra {extra}", EXTRAS[extra]
    if wrong:
        return Check(name, "warning", f"{gives}: {tell(wrong)}", f"Run: {pip_install(map(plain, wrong))}")
    if absent:
        return Check(name, "ok", f"not installed: {gives}", f"If wanted: {pip_install([f'{KIT}[{extra}]'])}")
    return Check(name, "ok", f"installed: {gives}")


def requirements(distribution: str = KIT) -> Sequence[Requirement]:
    """What an installed distribution says that it requires, extras included."""
    from packaging.requirements import Requirement

    return [Requirement(line) for line in metadata.requires(distribution) or []]


def version(name: str) -> str | None:
    """Of an installed distribution; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(need: Requirement) -> bool:
    """Whether it is installed in a version within its bounds."""
    found = version(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def tell(wrong: Iterable[Requirement]) -> str:
    """What is wanted and what was found."""
    return "; ".join(f"{plain(need)} is needed, {version(need.name) or 'nothing'} found" for need in wrong)


def plain(need: Requirement) -> str:
    """Name and bounds."""
    return f"{need.name}{need.specifier}"


def pip_install(packages: Iterable[str]) -> str:
    """The command that installs them for this Python."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def check_torchvision() -> Sequence[Check]:
    """Whether a torchvision that is there belongs to this torch: transformers imports it and fails with another's."""
    found = version("torchvision")
    if found is None:
        return []
    import torch

    cuda = torch.version.cuda
    build, torch_build = _torchvision_build(), f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    unfit = [need for need in requirements("torchvision") if need.name == "torch" and not fits(need)]
    both = f"torchvision {found} ({build or 'of a build it does not tell'}) beside torch {torch.__version__}"
    if not unfit and build in (None, torch_build):
        return [Check("torchvision", "ok", both)]
    remedy = (
        "Install the torchvision of this torch's version and build, from the index that torch came from, or, since the "
        f"kit does not need it: {shlex.join([sys.executable, '-m', 'pip', 'uninstall', 'torchvision'])}"
    )
    return [Check("torchvision", "fails", f"{both}: importing diffusers may fail", remedy)]


def _torchvision_build() -> str | None:
    """What torchvision was built for, such as cpu or cu130; None where its version does not tell.

    It is read and not imported, which may fail. PyPI's distributions leave the build out of their own version.
    """
    spec = importlib.util.find_spec("torchvision")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else Path()
    told = f"{file.read_text() if file.is_file() else ''}\n__version__ = '{version('torchvision')}'"
    found = re.search(r"^__version__ = '[^'+]*\+(cpu|cu\d+)'", told, re.MULTILINE)
    return found[1] if found else None


# What comes with the kit --------------------------------------------------------------------------------------------


def check_weights(folder: Path = WEIGHTS) -> Check:
    """Whether the embedded models are as they were released: the sha256 of each file."""
    sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    wrong = [name for digest, name in sums if not _is(folder / name, digest)]
    if wrong:
        again = pip_install(["--force-reinstall", "--no-deps"])
        remedy = (
            f"Install the kit again from where it came, with {again} and its name, wheel or address; "
            f"in a checkout: git restore {shlex.quote(str(folder))}"
        )
        return Check("embedded models", "fails", f"missing or changed: {', '.join(wrong)}", remedy)
    return Check("embedded models", "ok", f"{len(sums)} files as released")


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and hash_file(file) == digest


# JupyterLab ---------------------------------------------------------------------------------------------------------


def check_jupyterlab() -> Check:
    """Whether widgets would be drawn."""
    from jupyter_core.paths import jupyter_config_path, jupyter_path

    found = version("jupyterlab")
    if found is None:
        return Check("JupyterLab", "fails", "not installed", f"Run: {pip_install(['jupyterlab'])}")
    places = [Path(folder) for folder in jupyter_path("labextensions")]
    absent = [name for name in WIDGETS if not any((place / name / "package.json").is_file() for place in places)]
    listed = disabled(map(Path, jupyter_config_path()))
    off = [name for name in WIDGETS if name in listed]
    parts = [name for name in listed if name.split(":")[0] in WIDGETS and name not in off]
    if absent:
        remedy = f"Run: {pip_install(['--force-reinstall', '--no-deps', 'anywidget', 'jupyterlab_widgets'])}"
        return Check("JupyterLab", "fails", f"{found}, without its extensions {', '.join(absent)}", remedy)
    if off or parts:  # one plugin of several may well be meant to be off
        state: State = "fails" if off else "warning"
        remedy = f"Run: {'; '.join(f'jupyter labextension enable {name}' for name in [*off, *parts])}"
        return Check("JupyterLab", state, f"{found}, with {', '.join([*off, *parts])} disabled", remedy)
    return Check("JupyterLab", "ok", f"{found}, with {' and '.join(WIDGETS)}")


def disabled(folders: Iterable[Path]) -> list[str]:
    """JupyterLab's extensions and, as extension:plugin, parts of them that its settings switch off."""
    names: set[str] = set()
    for file in (folder / "labconfig" / "page_config.json" for folder in folders):
        try:
            listed = json.loads(file.read_text()).get("disabledExtensions", {})
        except (OSError, ValueError, AttributeError):
            continue
        names |= {name for name, off in listed.items() if off} if isinstance(listed, Mapping) else set(listed)
    return sorted(names)


def check_kernel() -> Check:
    """Whether the notebooks, which ask for the kernel python3, would be run by this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    specs = KernelSpecManager()
    others = ", ".join(sorted(specs.find_kernel_specs().keys() - {"python3"})) or "none"
    try:
        starts = specs.get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Check("kernel python3", "fails", "there is none", f"Run: {pip_install(['ipykernel'])}")
    if Path(starts).name == starts or Path(starts).parent == Path(sys.executable).parent:
        return Check("kernel python3", "ok", f"starts this Python; other kernels: {others}")
    name = [sys.executable, "-m", "ipykernel", "install", "--user", "--name", KIT]
    remedy = f"Choose the kernel {KIT} in JupyterLab; where it is not offered, run: {shlex.join(name)}"
    return Check("kernel python3", "warning", f"starts {starts}, not {sys.executable}", remedy)


def check_browser() -> Check:
    """Whether a report could be printed as PDF."""
    try:
        return Check("browser for PDF", "ok", find_browser())
    except KitError:
        remedy = "Install Chromium or Chrome to write reports as PDF; HTML needs none."
        return Check("browser for PDF", "ok", "none", remedy)

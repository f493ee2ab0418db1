"""Finds the kit's notebooks and runs them, each in a fresh kernel of this Python."""

from __future__ import annotations

import asyncio
import html
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from sdxl_sae_kit import errors
from sdxl_sae_kit.artifacts import PAGES, STORE_VARIABLE, Artifact, Store, checkout
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import writable


def find_notebooks(notebooks: Path | str | Sequence[Path | str] | None) -> list[Path]:
    """The kit's notebook files, those of a folder in the order of their names, or those of a list in its order.

    Raises:
        KitError: there are none, one of the list is missing, or two have the same name.
    """
    if notebooks is None:
        notebooks = PAGES if (home := checkout()) is None else home / "notebooks"
    if not isinstance(notebooks, Path | str):
        paths = [Path(path).resolve() for path in notebooks]
    elif Path(notebooks).suffix == ".ipynb":
        paths = [Path(notebooks).resolve()]
    else:
        paths = sorted(Path(notebooks).resolve().glob("*.ipynb"))
    if not paths:
        raise KitError(
            f"No notebooks in {notebooks}. Pass a folder of .ipynb files, or leave it out for the kit's own."
        )
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise KitError(f"No notebook at {', '.join(missing)}. Give the paths of .ipynb files.")
    if len(set(map(slug, paths))) < len(paths):
        raise KitError("Two of the notebooks have the same name. Links in the report need different ones: rename one.")
    return paths


def copy_notebooks(folder: Path | str) -> list[Path]:
    """Copy the kit's notebooks into a folder, made if need be, to be opened and changed there; returns the copies.

    Raises:
        KitError: files of these names are there already, which are left as they are, or the folder cannot be written.

    Example:
        >>> copy_notebooks("my-notebooks")  # doctest: +SKIP
        [PosixPath('my-notebooks/00_quickstart.ipynb'), …]
    """
    copies = {path: writable("notebook", Path(folder) / path.name) for path in find_notebooks(None)}
    if there := [copy.name for copy in copies.values() if copy.exists()]:
        raise KitError(f"{folder} holds {', '.join(there)} already. Nothing was copied: name another folder.")
    return [Path(shutil.copyfile(path, copy)) for path, copy in copies.items()]


class _ThisPython(KernelSpecManager):
    """Starts kernels with the Python that runs this, whatever kernels are installed on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        # A warning of every kernel says that others on this machine could listen to it; there are no secrets to hear.
        command = make_ipkernel_cmd(extra_arguments=["--log-level=ERROR"])
        return KernelSpec(argv=command, display_name="Python", language="python")


HAND_OVER = """from sdxl_sae_kit import artifacts
print(*(artifact.folder for artifact in artifacts.used()), sep="\\n")"""
"""A last cell, which nobody sees: the kernel says which artifacts its notebook made, found or opened."""


def execute(path: Path, model: str, scale: str, store: Store) -> tuple[NotebookNode, list[Artifact]]:
    """Run a notebook in a fresh kernel; returns it and the finished artifacts that it used.

    Its cells are named `<slug>-<number>` by their place in the file. What they say names no folder of this machine;
    what figures hold is not looked through.

    Raises:
        KitError: it has no cell tagged `parameters`, or a cell failed; the message names it.
        KeyboardInterrupt: also on SIGTERM; the kernel is shut down before.
    """
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    notebook.nbformat_minor = 5
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"{slug(path)}-{number}"
    _inject_parameters(notebook, path, {"MODEL": model, "SCALE": scale})
    notebook.cells.append(nbformat.v4.new_code_cell(HAND_OVER, id=f"{slug(path)}-{len(notebook.cells)}"))
    started: list[str] = []
    kernel = AsyncKernelManager(kernel_spec_manager=_ThisPython())
    client = _Client(
        notebook,
        km=kernel,
        timeout=None,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: started.append(cell.id),
    )
    # A progress bar is news while it moves and noise in a report.
    environment = {**os.environ, STORE_VARIABLE: str(store.root), "TQDM_DISABLE": "1"}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        client.execute(env=environment, cleanup_kc=True)
    except CellExecutionError as failure:
        place = cell_place(started[-1], path)
        raise KitError(f"{place} failed: {_cause(failure)} Open it and run that cell.") from None
    except (RuntimeError, asyncio.CancelledError) as failure:  # a dead kernel is a RuntimeError
        if client.interrupted:
            raise KeyboardInterrupt from None
        if not started:
            raise KitError(f"No kernel could be started for {path.name} ({failure}). Try it in JupyterLab.") from None
        place = cell_place(started[-1], path)
        raise KitError(f"{place} killed its kernel; often there is too little memory.") from None
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, terminate)
    said = "".join(output.get("text", "") for output in notebook.cells.pop().outputs if output.get("name") == "stdout")
    _hide_places(notebook, path, model, store)
    return notebook, [Artifact(Path(folder)) for folder in said.splitlines() if folder]


class _Client(NotebookClient):
    """Stops at the first signal; nbclient's own handlers shut the kernel down while it is being read."""

    interrupted = False

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task

        def stop() -> None:
            self.interrupted, self.shutdown_kernel = True, "immediate"
            task.cancel()
            loop.call_later(3, stop)  # between two cells a cancellation can get lost

        with suppress(RuntimeError):  # only a program's main thread hears signals
            loop.add_signal_handler(signal.SIGINT, stop)
            loop.add_signal_handler(signal.SIGTERM, stop)
        await super().async_start_new_kernel(**kwargs)


def _cause(failure: CellExecutionError) -> str:
    """The error of a cell as a sentence; the kit's own errors are not named, since they explain themselves."""
    message = str(failure.evalue).strip()
    if not hasattr(errors, failure.ename):
        message = f"{failure.ename}: {message}" if message else failure.ename
    return message if message.endswith((".", "?", "!")) else f"{message}."


def _hide_places(notebook: NotebookNode, path: Path, model: str, store: Store) -> None:
    """Call the store `artifacts` in what the cells say, and leave out where on this machine things lie."""
    names = {model: Path(model).name} if Path(model).is_dir() else {}
    names |= {f"{store.root}": "artifacts"}
    here = Path(__file__).parent.parent
    for folder in (path.parent, here, Path.cwd(), sys.prefix, sys.base_prefix, tempfile.gettempdir(), Path.home()):
        if Path(folder) != Path(Path(folder).anchor):
            names |= {f"{folder}/": "", f"{folder}": "."}
    names |= {html.escape(place): name for place, name in names.items()}
    # Longer ones first, since one may lie in another; a path ends where its last folder's name does.
    places = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = re.compile(rf"(?:(?<=file://)|(?<![\w/+.-]))(?:{places})(?:(?<=/)|(?![\w-]))")
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        said = [(output.get("data", {}), f"text/{kind}") for kind in ("plain", "html", "markdown")]
        for holder, key in [(output, "text"), (output, "evalue"), *said]:
            if key in holder:
                holder[key] = pattern.sub(lambda found: names[found[0]], holder[key])
        if "traceback" in output:
            output["traceback"] = [pattern.sub(lambda found: names[found[0]], line) for line in output["traceback"]]


def _inject_parameters(notebook: NotebookNode, path: Path, values: dict[str, str]) -> None:
    """Put a cell that sets the values right behind the one tagged `parameters`."""
    places = (i for i, cell in enumerate(notebook.cells) if tagged(cell, "parameters"))
    if (place := next(places, None)) is None:
        raise KitError(f"{path.name} has no cell tagged 'parameters'. Tag the one that sets {' and '.join(values)}.")
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    injected = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    injected.id = f"{slug(path)}-parameters"
    notebook.cells.insert(place + 1, injected)


def tagged(cell: NotebookNode, *tags: str) -> bool:
    """Whether a cell carries one of these tags."""
    return any(tag in cell.metadata.get("tags", []) for tag in tags)


def slug(path: Path) -> str:
    """A notebook's name as an id in HTML."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem)[:48]


def cell_place(cell_id: str, path: Path) -> str:
    """How a person finds the cell."""
    return f"{path.name}, cell {cell_id.rsplit('-', 1)[1]}"

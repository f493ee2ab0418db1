"""A gallery in a real JupyterLab in a real browser: sort, open a feature, label it, run the notebook again."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
from synthetic import synthetic_stats

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = """
from synthetic import synthetic_stats
from sdxl_sae_kit.galleries import gallery
stats = synthetic_stats("store")
gallery(stats, page_size=16, sort="latent")
"""
NASTY = "<img src=x onerror=\"document.title='hacked'\"> left"
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
READY = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return context?.isReady && context.session?.kernel?.connectionStatus === 'connected'
        && context.kernelDisplayStatus === 'idle';
}"""
# The promise is not returned: a modal would be awaited for ever.
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
GO_DARK = "() => { window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}); }"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab that knows nothing of this user's settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, root = secrets.token_hex(16), tmp_path / "root"
    root.mkdir()
    cell = nbformat.v4.new_code_cell(NOTEBOOK.strip())
    kernel = {"name": "python3", "display_name": "Python 3"}  # else JupyterLab asks which
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, root / "gallery.ipynb")
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    settings = tmp_path / "settings"
    news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    environment = {
        **os.environ,
        **{place: str(tmp_path / place.lower()) for place in places},
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)]),
    }
    options = [f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"]
    options += ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0"]
    command = [sys.executable, "-m", "jupyterlab", "--LabApp.expose_app_in_browser=True", *options]
    log = tmp_path / "server.log"
    with log.open("w") as written:
        server = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT, cwd=root)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/lab/workspaces/{secrets.token_hex(4)}/tree/gallery.ipynb?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox + QUIET)
        try:
            yield browser.new_page(viewport={"width": 1400, "height": 1000})
        finally:
            browser.close()


def test_a_label_given_in_jupyterlab_is_there_when_the_notebook_runs_again(lab: str, page: Any, tmp_path: Path) -> None:
    outside, faults = [], []
    page.on("request", lambda request: outside.append(request.url) if _leaves(request.url) else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.set_default_timeout(60_000)

    page.goto(lab)
    page.wait_for_function(READY)
    page.evaluate(RUN_ALL)
    first = page.locator(".sae-page .sae-card header b").first
    sync_api.expect(first).to_have_text("0", timeout=60_000)
    assert page.locator(".sae-page .sae-card").count() == 16

    page.locator(".sae-sort select").select_option(label="maximum")
    sync_api.expect(first).to_have_text(str(int(np.argmax(synthetic_stats().max))))
    _assert_pictures_show(page, 16)
    page.screenshot(path=tmp_path / "overview.png")

    _open(page, 7)
    page.locator(".sae-label input").fill(NASTY)
    page.keyboard.press("Tab")
    page.locator("button.sae-save").click()
    sync_api.expect(page.locator(".sae-notice")).to_contain_text(f"Saved {NASTY}")
    _assert_pictures_show(page, 12)
    page.screenshot(path=tmp_path / "feature.png")

    page.evaluate(RUN_ALL)
    sync_api.expect(page.locator(".sae-page .sae-card", has_text=NASTY).locator("header b")).to_have_text("7")
    page.evaluate(GO_DARK)
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    sync_api.expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    page.screenshot(path=tmp_path / "dark.png")
    _open(page, 7)
    assert page.locator(".sae-label input").input_value() == NASTY

    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert "hacked" not in page.title()
    assert (outside, faults) == ([], [])


def _open(page: Any, latent: int) -> None:
    page.locator(".sae-latent input").fill(str(latent))
    page.keyboard.press("Tab")
    page.locator("button.sae-open").click()
    sync_api.expect(page.locator(".sae-feature h3")).to_have_text(f"Latent {latent}")


def _assert_pictures_show(page: Any, at_least: int) -> None:
    widths = page.locator(".sae-kit img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) >= at_least
    assert min(widths) > 0


def _leaves(url: str) -> bool:
    address = urlsplit(url)
    return address.scheme not in ("data", "blob") and address.hostname != "127.0.0.1"


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")

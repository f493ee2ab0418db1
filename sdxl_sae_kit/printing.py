"""HTML to PDF by the Chromium of this machine: tagged, with an outline, and without any network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from base64 import b64decode, b64encode
from pathlib import Path

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.pictures import as_jpeg

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
MAC = (
    Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),
    Path("/Applications/Chromium.app/Contents/MacOS/Chromium"),
)
SECONDS = 600
"""What printing may take before it is given up."""
WIDTH = 744
"""Pixels of the window: figures are as wide as it lets them be, and must fit on a page of A4."""

_PICTURE = re.compile(
    rb'<script\b.*?</script|(<img\b[^<>]*?\ssrc=")data:image/(?:webp|png);base64,([A-Za-z0-9+/=\s]+)"', re.DOTALL
)
"""A picture, or a script: that stays as it is, or it is not the one that the page's policy lets run."""


def find_browser() -> str:
    """The Chromium or Chrome of this machine.

    Raises:
        KitError: there is none.
    """
    found = (path for name in BROWSERS if (path := shutil.which(name)))
    browser = next(found, None) or next((str(path) for path in MAC if path.exists()), None)
    if browser is None:
        raise KitError(
            "A PDF is printed by Chromium, and none was found. Install chromium or Google Chrome, "
            "or open the HTML file in any browser and print it there."
        )
    return browser


def print_pdf(page: Path, target: Path) -> None:
    """Print an HTML file; figures that its scripts draw are drawn.

    Raises:
        KitError: no Chromium, or it failed.
    """
    browser = find_browser()
    # Beside the target: a Chromium from a snap has a /tmp of its own, and sees no hidden folders.
    with tempfile.TemporaryDirectory(prefix="printing-", dir=target.resolve().parent) as folder:
        made, printed = Path(folder) / "report.pdf", Path(folder) / page.name
        printed.write_bytes(_PICTURE.sub(_as_jpeg, page.read_bytes()))
        options = [
            *("--headless", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-extensions",
            ),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={folder}/profile",
                f"--window-size={WIDTH},1000",
            ),
            *("--no-pdf-header-footer", "--export-tagged-pdf", "--generate-pdf-document-outline"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # which Chromium refuses to root
            *("--virtual-time-budget=20000", f"--print-to-pdf={made}"),
        ]
        try:
            done = subprocess.run([browser, *options, printed.as_uri()], capture_output=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as cause:
            raise KitError(f"{browser} could not print {page.name}: {cause}. Print it from a browser.") from None
        if done.returncode or not made.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise KitError(f"{browser} could not print {page.name}: {said[-1] if said else 'it said nothing'}.")
        made.replace(target)


def _as_jpeg(found: re.Match[bytes]) -> bytes:
    """The picture as JPEG, which Chromium lays into the PDF as it is: any other it unpacks, to many times its size."""
    if found[1] is None:
        return found[0]
    try:
        return found[1] + b"data:image/jpeg;base64," + b64encode(as_jpeg(b64decode(found[2]))) + b'"'
    except (ArtifactError, ValueError):  # no picture: the page shows its text instead
        return found[0]

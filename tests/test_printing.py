"""Printing, with browsers that are made up: where they write, and what is left behind."""

import io
import re
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from sdxl_sae_kit import html, printing
from sdxl_sae_kit.errors import ArtifactError
from sdxl_sae_kit.pictures import as_jpeg


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """A Chromium that writes its options as the PDF, and cannot see hidden folders."""
    script = tmp_path / "chromium"
    script.write_text(
        '#!/bin/sh\nfor option; do case "$option" in --print-to-pdf=*) made="${option#*=}";; esac; done\n'
        f'cp "${{option#file://}}" {tmp_path}/seen.html\n'
        'case "$made" in */.*) exit 3;; esac\nprintf "%s\\n" "$@" > "$made"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(printing, "find_browser", lambda: str(script))


def test_the_browser_writes_only_beside_the_target(browser, tmp_path):
    """One from a snap has a /tmp of its own, so what it writes there is never found."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.pdf").write_text("an older one")
    (out / "page.html").write_text("<p>")
    printing.print_pdf(out / "page.html", out / "report.pdf")
    options = dict(line.split("=", 1) for line in (out / "report.pdf").read_text().splitlines() if "=" in line)
    for option in ("--print-to-pdf", "--user-data-dir"):
        assert options[option].startswith(f"{out}/printing-")
    assert {path.name for path in out.iterdir()} == {"page.html", "report.pdf"}, "nothing else is left"


def test_pictures_are_printed_as_jpeg_and_scripts_as_they_are(browser, tmp_path):
    """A script that differs by one byte is not what the page's policy names."""
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    picture = html.picture(html.to_webp(Image.fromarray(smooth)), 'a > b "c"')
    broken = '<img alt="x" src="data:image/png;base64,AAAA">'
    script = f"<script>const told = '{picture}';</script>"
    (tmp_path / "page.html").write_text(page := f"{picture}{broken}{script}")
    printing.print_pdf(tmp_path / "page.html", tmp_path / "page.pdf")
    seen = (tmp_path / "seen.html").read_text()
    assert (tmp_path / "page.html").read_text() == page and seen.endswith(broken + script)
    head, data, tail = re.fullmatch(r'(<img src=")data:image/jpeg;base64,([^"]+)(".*?>)<img.*', seen).groups()
    assert f"{head}{html.data_uri(b'')}" in picture[: len(head) + 23] and picture.endswith(tail)
    drawn = np.asarray(Image.open(io.BytesIO(b64decode(data))))
    assert np.abs(drawn.astype(float) - smooth).mean() < 4


def test_what_is_clear_is_printed_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 16))
    file = io.BytesIO()
    clear.save(file, "PNG")
    printed = np.asarray(Image.open(io.BytesIO(as_jpeg(file.getvalue())))).astype(int)
    assert np.abs(printed[:, 12:] - 255).max() < 8 and np.abs(printed[:, :4] - (0, 0, 255)).max() < 8
    Image.new("RGB", (70_000, 2)).save(file := io.BytesIO(), "PNG")
    with pytest.raises(ArtifactError, match="cannot be read"):
        as_jpeg(file.getvalue())

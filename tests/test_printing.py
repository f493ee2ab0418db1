"""Printing, with browsers that are made up: where they write, and what is left behind."""

import pytest

from sdxl_sae_kit import printing


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """A Chromium that writes its options as the PDF, and cannot see hidden folders."""
    script = tmp_path / "chromium"
    script.write_text(
        '#!/bin/sh\nfor option; do case "$option" in --print-to-pdf=*) made="${option#*=}";; esac; done\n'
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

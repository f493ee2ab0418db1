"""`make audit` with a pip-audit that is made up: what it finds, what it could not ask, and when it fails itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit"
FAULT = {"id": "CVE-1", "fix_versions": ["2"]}


@pytest.fixture
def audit(tmp_path):
    """Runs the script beside a Python that says and ends as told."""

    def run(stdout="", stderr="", code=0):
        for name in (".ci", ".venv/bin"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / ".ci" / "audit").write_bytes(SCRIPT.read_bytes())
        (tmp_path / "constraints.txt").write_text("# pins\na==1\n")
        fake = tmp_path / ".venv" / "bin" / "python"
        fake.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"sys.stdout.write({stdout!r})\nsys.stderr.write({stderr!r})\nsys.exit({code})\n"
        )
        fake.chmod(0o755)
        done = subprocess.run([sys.executable, tmp_path / ".ci" / "audit"], capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def answer(*faults):
    return json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": faults}, {"name": "b"}]})


def test_vulnerabilities_fail_and_none_pass(audit):
    assert audit(answer()) == (0, "1 of 2 packages could be looked up; 0 known vulnerabilities.\n")
    code, said = audit(answer(FAULT), code=1)
    assert code == 1 and "a 1: CVE-1, mended in ['2']" in said


@pytest.mark.parametrize(
    "stderr",
    [
        "ERROR:pip_audit._cli:Tip: your network may be blocking this service. Try another service with `-s SERVICE`",
        "Traceback …\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443)",
        "requests.exceptions.ReadTimeout: Read timed out.",
    ],
)
def test_a_service_that_is_not_reached_is_told_of_and_passes(audit, stderr):
    code, said = audit(stderr=stderr, code=1)
    assert code == 0 and "could not be reached" in said


@pytest.mark.parametrize(
    ("stdout", "stderr", "code"),
    [("", "No module named pip_audit", 1), ("", "usage: pip-audit", 2), ("null", "", 0), ("{", "", 0)],
)
def test_a_look_up_that_fails_itself_fails(audit, stdout, stderr, code):
    returned, said = audit(stdout, stderr, code)
    assert returned == 1 and f"pip-audit failed (exit code {code})" in said and (stderr or stdout) in said

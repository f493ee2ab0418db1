"""The command line says what happened in one line, and passes on exactly what it was given."""

import subprocess
import sys

import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.artifacts import Store, kit_version


def finished_artifact(root):
    artifact = Store.at(root).artifact("studies", "colours", {"seed": 1})
    with artifact.lock():
        artifact.file("result.json").write_text("{}")
        artifact.seal()
    return artifact


@pytest.mark.parametrize(
    "command",
    (
        [],
        ["report"],
        ["artifacts"],
        ["artifacts", "list"],
        ["artifacts", "verify"],
        ["tiny"],
        ["tiny", "train"],
        ["tiny", "measure"],
    ),
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: sdxl-sae-kit" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from sdxl_sae_kit.__main__ import _parser; _parser().format_help(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_kit_error_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("KitError: No notebooks in ") and printed.err.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.reports.report", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


@pytest.mark.parametrize(
    ("arguments", "notebooks", "changed"),
    [
        ([], None, {}),
        (["books"], "books", {}),
        (
            ["b.ipynb", "a.ipynb", "--scale", "smoke", "--model", "m"],
            ["b.ipynb", "a.ipynb"],
            {"scale": "smoke", "model": "m"},
        ),
        (["--out", "x.html", "--store", "s"], None, {"out": "x.html", "store": "s"}),
    ],
)
def test_report_passes_on_what_it_was_given_and_prints_the_path(monkeypatch, capsys, arguments, notebooks, changed):
    calls = []
    monkeypatch.setattr(
        "sdxl_sae_kit.reports.report", lambda books, **options: calls.append((books, options)) or "there.html"
    )
    assert cli.main(["report", *arguments]) == 0
    books, options = calls[0]
    assert ([str(book) for book in books] if isinstance(books, list) else books and str(books)) == notebooks
    expected = {"scale": "demo", "model": "tiny-turbo", "out": None, "store": None} | changed
    assert {name: value and str(value) for name, value in options.items()} == expected
    assert capsys.readouterr().out == "there.html\n"


def test_artifacts_lists_finished_and_unfinished(tmp_path, capsys):
    name = finished_artifact(tmp_path).name
    (tmp_path / "saes" / "half-00000000").mkdir(parents=True)
    assert cli.main(["artifacts", "list", "--store", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(name in line and " finished" in line for line in lines)
    assert any("half-00000000" in line and "unfinished" in line for line in lines)


def test_verify_finds_the_changed_file(tmp_path, capsys):
    artifact = finished_artifact(tmp_path)
    assert cli.main(["artifacts", "verify", "--store", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said == f"intact  studies/{artifact.name}\n1 of 1 finished artifacts in {tmp_path} are intact.\n"
    artifact.file("result.json").write_text("[]")
    assert cli.main(["artifacts", "verify", "--store", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "result.json has changed" in printed.out and "1 of 1 finished artifacts" in printed.err


def test_tiny_train_passes_on_only_what_was_given(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(
        "sdxl_sae_kit.tiny.train.train", lambda folder, **settings: calls.append((folder, settings)) or folder / "ck.pt"
    )
    assert cli.main(["tiny", "train", str(tmp_path), "--samples", "64", "--stage", "base", "--device", "cpu"]) == 0
    assert calls == [(tmp_path, {"samples": 64, "stage": "base", "device": "cpu"})]
    assert capsys.readouterr().out == f"{tmp_path / 'ck.pt'}\n"


def test_the_module_and_the_script_are_the_same_program():
    output = subprocess.run(
        [sys.executable, "-m", "sdxl_sae_kit", "artifacts", "nonsense"], capture_output=True, text=True
    )
    assert output.returncode == 2 and "invalid choice: 'nonsense'" in output.stderr


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_mistyped_store_is_no_empty_one(tmp_path, capsys, verb):
    assert cli.main(["artifacts", verb, "--store", str(tmp_path / "none")]) == 1
    assert "ArtifactError: There is no folder" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"{kit_version()}\n"


def test_tiny_measure_prints_every_table(capsys):
    assert cli.main(["tiny", "measure", "--captions", "8"]) == 0
    said = capsys.readouterr().out
    assert all(title in said for title in ("turbo, 1 step", "turbo, 4 steps", "base, 20 steps", "The judge", "The VAE"))
    assert said.count("colour2") == 4 and "participation ratio" in said
    assert cli.main(["tiny", "measure", "--captions", "0"]) == 1
    assert "--captions must be an integer of at least 8, not 0" in capsys.readouterr().err

"""The command line says what happened in one line, and passes on exactly what it was given."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.artifacts import Store, kit_version
from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS


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
        ["riebench"],
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


def a_bench_of(monkeypatch, tmp_path, **facts):
    """Calls that riebench got, instead of a long run: what it gives is made up."""
    calls = []
    row = {"method": "sae", "k": 8, "strength": 2.0, "reached": 0.5, "reached interval": (0.25, 0.75)}
    none = {"method": "none", "k": None, "strength": 0.0, "reached": 0.0, "reached interval": (0.0, 0.1)}
    told = {
        "rows": lambda: [none, row],
        "scores": SimpleNamespace(measures=["reached"]),
        "n": 4,
        "failed": [{"item": "change pose 1", "kind": "change pose", "reason": "the mask is empty"}],
        "sentence": lambda: "4 items scored.",
        "write_json": lambda path: path.write_text("{}"),
        "artifact": SimpleNamespace(folder=tmp_path / "there"),
    }
    result = SimpleNamespace(**told | facts)
    monkeypatch.setattr("sdxl_sae_kit.pipelines.load_pipeline", lambda name: name)
    monkeypatch.setattr("sdxl_sae_kit.collection.collect", lambda *given, **more: calls.append((given, more)))
    monkeypatch.setattr(
        "sdxl_sae_kit.training.train",
        lambda cache, configs, hookpoints, **_: {(h, name): f"{name} at {h}" for h in hookpoints for name in configs},
    )
    monkeypatch.setattr(
        "sdxl_sae_kit.studies.riebench.riebench", lambda *given, **more: calls.append((given, more)) or result
    )
    return calls


def test_riebench_passes_on_what_it_was_given_and_prints_rows_sentence_failures_and_folder(
    monkeypatch, tmp_path, capsys
):
    calls = a_bench_of(monkeypatch, tmp_path)
    chosen = ["--saes", "k10", "--methods", "sae,random", "--hookpoints", "mid.0,up.0.1", "-n", "2", "--seed", "3"]
    kept = ["--json", str(tmp_path / "out.json"), "--store", str(tmp_path), "--batch-size", "5"]
    assert cli.main(["riebench", *chosen, *kept]) == 0
    (_, (pipe, saes, items), settings) = ("", *calls[1])
    assert pipe == "tiny-turbo" and saes == {h: f"k10 at {h}" for h in ("mid.0", "up.0.1")}
    assert len(items) == 18 and items[0].seed == 3
    assert settings == {"methods": ["sae", "random"], "seed": 3, "batch_size": 5, "store": tmp_path}
    assert calls[0][0][2] == DEFAULT_HOOKPOINTS, "what the notebooks collect, which the store may have"
    said = capsys.readouterr().out
    assert "Means over 4 items" in said and "none    –  0.000" in said and "0.500 [0.250, 0.750]" in said
    assert "4 items scored." in said and "change pose 1  change pose  the mask is empty" in said
    assert said.endswith(f"{tmp_path / 'there'}\n") and (tmp_path / "out.json").read_text() == "{}"


def test_riebench_collects_other_hookpoints_by_themselves(monkeypatch, tmp_path, capsys):
    calls = a_bench_of(monkeypatch, tmp_path, failed=[])
    assert cli.main(["riebench", "--hookpoints", "up.1.0,up.1.1", "-n", "1"]) == 0
    assert calls[0][0][2] == ["up.1.0", "up.1.1"] and "Failed" not in capsys.readouterr().out


def test_riebench_plan_draws_one_batch_and_measures_nothing(monkeypatch, tmp_path, capsys):
    calls = a_bench_of(monkeypatch, tmp_path)
    monkeypatch.setattr("sdxl_sae_kit.studies.riebench.time_drawing", lambda pipe, items: len(items) / 10)
    assert cli.main(["riebench", "--plan", "-n", "2", "--methods", "sae", "--batch-size", "5"]) == 0
    assert not calls
    assert capsys.readouterr().out.startswith(
        "18 items in 10 settings: 180 pictures in 4 step(s) each, about 1.5 minutes"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--saes", "k1"], "KitError: --saes: this scale trains k5, k10, k20-white, not 'k1'. Did you mean 'k10'?"),
        (["--items", "wrld"], "Did you mean 'world'?"),
        (["--methods", "sea", "--plan"], "not 'sea'. Did you mean 'sae'?"),
        (["-n", "0"], "load_items: n must be an integer of at least 1, not 0"),
    ],
)
def test_what_riebench_cannot_do_is_one_line(monkeypatch, tmp_path, capsys, arguments, message):
    a_bench_of(monkeypatch, tmp_path)
    monkeypatch.setattr("sdxl_sae_kit.studies.riebench.time_drawing", lambda pipe, items: 0.1)
    assert cli.main(["riebench", *arguments]) == 1
    assert message in capsys.readouterr().err

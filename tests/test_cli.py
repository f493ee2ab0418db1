"""The command line says what happened in one line, and passes on exactly what it was given."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.artifacts import DELETING, FORMATS, Artifact, Store
from sdxl_sae_kit.commands.answers import Answer
from sdxl_sae_kit.commands.inputs import anything, find
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.stamps import kit_version


def finished_artifact(root, kind="studies"):
    artifact = Store.at(root).artifact(kind, "colours", {"seed": 1})
    with artifact.lock():
        artifact.file("result.json").write_text("{}")
        artifact.seal()
    return artifact


def unfinished_artifact(root):
    artifact = Store.at(root).artifact("saes", "half", {"seed": 1})
    with artifact.lock():
        artifact.file("checkpoint.safetensors").write_bytes(b"0" * 1000)
    return artifact


def of_format(monkeypatch, root, change):
    """A finished artifact that a kit wrote whose formats were older (−1) or newer (1)."""
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "features", FORMATS["features"] + change)
        return finished_artifact(root, "features")


@pytest.fixture
def answers(monkeypatch):
    """Let `artifacts list` do something else."""

    def made(does):
        monkeypatch.setattr("sdxl_sae_kit.commands.store._list", does)

    return made


@pytest.fixture
def reports(monkeypatch):
    """What `report` was called with, instead of a report."""
    calls = []
    monkeypatch.setattr(
        "sdxl_sae_kit.reports.report",
        lambda sources, **options: calls.append((sources, options)) or Path("made/there.html"),
    )
    return calls


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from sdxl_sae_kit.__main__ import _parser; _parser().format_help(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_kit_error_is_one_line_and_exit_code_1(answers, capsys):
    def fails(_):
        raise ArtifactError("It is not there. Make it.")

    answers(fails)
    assert cli.main(["artifacts", "list", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "ArtifactError: It is not there. Make it.\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_only_the_answer_goes_to_stdout(answers, capsys, as_json):
    def talks(_):
        sys.stdout.write("Half of it is done.\n")
        return Answer("made\n/there", {"folder": "/there", "mean": float("nan"), "interval": (0.0, 1.0)})

    answers(talks)
    assert cli.main(["artifacts", "list", *["--json"] * as_json]) == 0
    printed = capsys.readouterr()
    assert printed.err == "Half of it is done.\n"
    if as_json:
        assert json.loads(printed.out) == {"folder": "/there", "mean": None, "interval": [0.0, 1.0]}
    else:
        assert printed.out == "made\n/there\n"


def test_a_failed_check_is_told_and_then_fails(answers, capsys):
    answers(lambda _: Answer("3 of 4", {"n": 4}, KitError("One is not.")))
    assert cli.main(["artifacts", "list"]) == 1
    assert capsys.readouterr() == ("3 of 4\n", "KitError: One is not.\n")


def test_of_several_processes_the_first_speaks(answers, capsys, monkeypatch):
    answers(lambda _: Answer("done", {}))
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["artifacts", "list"]) == 0 and capsys.readouterr().out == ""


def test_ctrl_c_is_exit_code_130(answers, capsys):
    def stops(_):
        raise KeyboardInterrupt

    answers(stops)
    assert cli.main(["artifacts", "list"]) == 130
    assert (
        capsys.readouterr().err
        == "Interrupted; what was finished is kept, and of a training its last checkpoint. Run it again to go on.\n"
    )


def test_a_terminated_command_is_interrupted_too(answers):
    answers(lambda _: os.kill(os.getpid(), 15))
    assert cli.main(["artifacts", "list"]) == 130


@pytest.mark.parametrize("arguments", [["artifacts", "list"], ["collect", "--help"]])
def test_a_reader_that_leaves_is_no_error(tmp_path, arguments):
    for number in range(40):
        (tmp_path / "saes" / f"half-{number:08}").mkdir(parents=True)
    where = {"SDXL_SAE_KIT_STORE": str(tmp_path)}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sdxl_sae_kit", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=os.environ | where)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.reports.report", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


@pytest.mark.parametrize(
    ("arguments", "sources", "changed"),
    [
        ([], None, {}),
        (["books"], "books", {}),
        (["b.ipynb", "a.ipynb", "--scale", "smoke", "--model", "m"], ["b.ipynb", "a.ipynb"],
         {"scale": "smoke", "model": "m"}),
        (["--out", "x.html", "--store", "s", "--pdf", "--template", "own.j2"], None,
         {"out": "x.html", "store": "s", "pdf": "True", "template": "own.j2"}),
    ],
)  # fmt: skip
def test_report_passes_on_what_it_was_given_and_prints_the_path(
    reports, monkeypatch, tmp_path, capsys, arguments, sources, changed
):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    assert cli.main(["report", *arguments]) == 0
    given, options = reports[0]
    assert ([str(each) for each in given] if isinstance(given, list) else given and str(given)) == sources
    usual = {"scale": "demo", "model": "tiny-turbo", "out": None, "store": None, "pdf": False, "template": None}
    assert {name: value and str(value) for name, value in options.items()} == usual | changed
    assert capsys.readouterr().out.splitlines()[-1] == "made/there.html"


def test_report_takes_artifacts_by_name(reports, tmp_path, capsys):
    made = finished_artifact(tmp_path)
    for name in (made.name, "col", f"studies/{made.name}", str(made.folder)):
        assert cli.main(["report", name, "--store", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["file"] == "made/there.html"
    assert [sources for sources, _ in reports] == [made.folder] * 4
    assert cli.main(["report", "colour", "clors", "--store", str(tmp_path)]) == 1
    assert "No folder 'clors', and no such name" in capsys.readouterr().err


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


@pytest.mark.parametrize("verb", ["list", "verify", "gc"])
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


def test_what_finished_is_never_unused_and_labels_are_none_of_it(tmp_path, capsys):
    finished_artifact(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "x-00000000.jsonl").write_text("{}")
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete"]) == 0
    assert "Unused in" in capsys.readouterr().out and (tmp_path / "labels" / "x-00000000.jsonl").exists()
    assert Store.at(tmp_path).unused() == [] and len(Store.at(tmp_path).artifacts()) == 1


def test_leftovers_and_older_formats_are_unused_and_newer_ones_are_not(tmp_path, monkeypatch, capsys):
    half, old = unfinished_artifact(tmp_path), of_format(monkeypatch, tmp_path, -1)
    new = of_format(monkeypatch, tmp_path, 1)
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--json"]) == 0
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)["unused"]}
    assert {name: row["why"] for name, row in told.items()} == {half.name: "unfinished", old.name: "older format"}
    assert told[half.name]["bytes"] >= 1000 and half.folder.exists(), "only listed"
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete"]) == 0
    said = capsys.readouterr().out
    assert "2 artifacts" in said and re.search(rf"unfinished +1\.0\d kB  saes/{half.name}\n", said)
    assert "1 deleted. 1 unfinished stayed: the same call goes on there." in said
    assert sorted(each.name for each in Store.at(tmp_path).artifacts()) == sorted([half.name, new.name])
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete", "--unfinished"]) == 0
    assert "1 deleted.\n" in capsys.readouterr().out
    assert [each.name for each in Store.at(tmp_path).artifacts()] == [new.name]


def test_gc_deletes_what_it_was_killed_over(tmp_path):
    artifact = unfinished_artifact(tmp_path)
    artifact.folder.rename(halfway := artifact.folder.with_name(artifact.name + DELETING))
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path)]) == 0 and halfway.is_dir()
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete"]) == 0 and not halfway.exists()


def test_verify_names_what_cannot_be_read_and_goes_on(tmp_path, capsys, monkeypatch):
    finished_artifact(tmp_path)
    finished_artifact(tmp_path, "reports")
    verify = Artifact.verify

    def failing(artifact):
        if artifact.kind == "studies":
            raise PermissionError(13, "Permission denied", str(artifact.folder))
        verify(artifact)

    monkeypatch.setattr(Artifact, "verify", failing)
    assert cli.main(["artifacts", "verify", "--store", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAULTY  studies/" in said.out and "Permission denied" in said.out and "intact  reports/" in said.out
    assert "1 of 2 finished artifacts" in said.err


def test_a_name_with_dots_is_an_artifacts_and_a_notebooks_ending_is_a_files(tmp_path):
    artifact = Store.at(tmp_path).artifact("features", "tiny-turbo_up.0.1_k10", {})
    with artifact.lock():
        artifact.seal()
    for given in (artifact.name, artifact.name[:-4], f"features/{artifact.name}"):
        assert anything(given, tmp_path) == artifact.folder
    assert anything("not_there.ipynb", tmp_path) == Path("not_there.ipynb")


def made_of(root, kind, readable, **recipe):
    artifact = Store.at(root).artifact(kind, readable, recipe)
    with artifact.lock():
        artifact.seal()
    return artifact


def test_a_name_without_its_hash_is_not_the_beginning_of_another(tmp_path):
    short, longer = (made_of(tmp_path, "saes", f"tiny_mid.0_{config}") for config in ("k10", "k10-n96"))
    assert find("saes", "tiny_mid.0_k10", tmp_path) == short.folder
    assert find("saes", "tiny_mid.0_k10-n", tmp_path) == longer.folder
    with pytest.raises(ArtifactError, match="begins the names of 2 artifacts"):
        find("saes", "tiny_mid.0_k1", tmp_path)


def test_names_that_begin_alike_are_told_apart_by_what_made_them(tmp_path):
    cache = made_of(tmp_path, "activations", "scenes")
    stranger = "0" * 64
    saes = [
        made_of(tmp_path, "saes", "tiny_k10", cache=made, config={"seed": seed, "lr": 0.1})
        for seed, made in enumerate((cache.digest, stranger))
    ]
    with pytest.raises(ArtifactError) as refused:
        find("saes", "tiny", tmp_path)
    lines = str(refused.value).split("\n  ")
    assert lines[0].endswith("Give more of one:")
    assert set(lines[1:]) == {f"saes/{sae.name}  config.seed {seed}" for seed, sae in enumerate(saes)}, (
        "a hash tells nobody anything"
    )
    made_of(tmp_path, "saes", "tiny_k5", cache=cache.digest, config={"seed": 0, "lr": 0.1})
    saes[1].file("stamp.json").write_text("{}")
    with pytest.raises(ArtifactError, match=rf"\n  saes/{saes[1].name}(\n|$)"):  # a damaged one is still named
        find("saes", "tiny", tmp_path)


def test_settings_that_only_one_has_or_that_have_one_name_tell_apart_and_long_ones_do_not(tmp_path):
    digest = made_of(tmp_path, "activations", "scenes").digest
    common = {"features": list(range(999)), "saes": [["mid.0", "k5", digest]], "target": {"steps": 1}}
    made_of(tmp_path, "studies", "transfer", **common, source={"steps": 1})
    made_of(tmp_path, "studies", "transfer", **common | {"saes": []}, source={"steps": 4})
    made_of(tmp_path, "studies", "transfer", **common | {"features": []}, source={"steps": 4}, lora="x")
    with pytest.raises(ArtifactError) as refused:
        find("studies", "transfer", tmp_path)
    told = sorted(line.partition("  ")[2] for line in str(refused.value).split("\n  ")[1:])
    assert told == ["lora x, source.steps 4", "source.steps 1", "source.steps 4"]


def test_what_is_of_another_kind_is_said_to_be(tmp_path):
    for kind in ("saes", "features"):
        made_of(tmp_path, kind, "tiny_k5")
    with pytest.raises(ArtifactError, match="'tiny_k5' names what is in features and saes; .* is in activations"):
        find("activations", "tiny_k5", tmp_path)
    with pytest.raises(ArtifactError, match=r"(?s)\n  saes/tiny_k5-.*\n  features/tiny_k5-"):
        anything("tiny_k5", tmp_path)
    assert anything("features/tiny_k5", tmp_path).parent.name == "features"


def test_many_names_that_begin_alike_are_not_all_listed(tmp_path):
    for number in range(11):
        made_of(tmp_path, "saes", "tiny", seed=number)
    with pytest.raises(ArtifactError, match=r"of 11 artifacts (.|\n)*\n  and 3 more$") as refused:
        find("saes", "tiny", tmp_path)
    assert str(refused.value).count("\n") == 9


def test_what_is_proposed_can_be_given(tmp_path):
    for readable, seed in (("tiny_k10", 0), ("tiny_k10", 1), ("tiny_k5", 0)):
        made_of(tmp_path, "saes", readable, seed=seed)
    for mistyped in ("tiny_k1o", "tiny_k50", "tyny_k10"):
        with pytest.raises(ArtifactError, match="Did you mean") as refused:
            find("saes", mistyped, tmp_path)
        proposed = re.search("Did you mean '(.*)'", str(refused.value))[1]
        assert find("saes", proposed, tmp_path).is_dir()


def test_a_version_is_told_even_of_a_copy_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("sdxl_sae_kit.__main__.kit_version", lambda: "unknown")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == "unknown\n"


def test_two_saes_of_one_name_are_refused(capsys):
    assert cli.main(["train", "nowhere", "--config", "a:k=3", "--config", "a:k=4"]) == 1
    assert "--config: a is there twice" in capsys.readouterr().err


def test_what_a_process_is_writing_is_never_unused(tmp_path):
    artifact = unfinished_artifact(tmp_path)
    with artifact.lock():
        assert Store.at(tmp_path).unused() == []
        with pytest.raises(ArtifactError, match="is being written by process"):
            Artifact(artifact.folder).remove()
    assert [each.name for each in Store.at(tmp_path).unused()] == [artifact.name]


def test_what_was_finished_since_it_was_listed_is_kept(tmp_path, capsys, monkeypatch):
    artifact = unfinished_artifact(tmp_path)
    (listed,) = Store.at(tmp_path).unused()
    with artifact.lock():
        artifact.seal()
    with pytest.raises(ArtifactError, match="was finished meanwhile"):
        listed.remove()
    monkeypatch.setattr(Store, "unused", lambda _: [listed])
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete"]) == 0
    assert "0 artifacts, 0 B. 0 deleted.\n" in capsys.readouterr().out
    monkeypatch.setattr(Artifact, "why_unused", "unfinished")
    assert cli.main(["artifacts", "gc", "--store", str(tmp_path), "--delete", "--unfinished"]) == 1
    assert "1 artifact stayed." in capsys.readouterr().err and artifact.finished


def test_links_and_damaged_stamps_are_not_unused(tmp_path):
    elsewhere = unfinished_artifact(tmp_path / "other")
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / elsewhere.name).symlink_to(elsewhere.folder)
    finished_artifact(tmp_path).file("stamp.json").write_text("{}")
    assert Store.at(tmp_path).unused() == [] and len(Store.at(tmp_path).artifacts()) == 2


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_prints_what_it_finds_and_fails_where_something_does(monkeypatch, capsys, healthy):
    class Diagnosis:
        def __str__(self):
            return "torch  ok  2.13"

        def to_json(self):
            return {"healthy": healthy}

    found = Diagnosis()
    found.healthy = healthy
    module = type(sys)("sdxl_sae_kit.doctor")
    module.diagnose = lambda store: found
    monkeypatch.setitem(sys.modules, "sdxl_sae_kit.doctor", module)
    assert cli.main(["doctor"]) == (0 if healthy else 1)
    assert capsys.readouterr().out == "torch  ok  2.13\n"
    assert cli.main(["doctor", "--json"]) == (0 if healthy else 1)
    assert json.loads(capsys.readouterr().out) == {"healthy": healthy}


def test_notebooks_copies_them_and_says_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sdxl_sae_kit.notebooks.copy_notebooks", lambda folder: [folder / "00.ipynb"], raising=False)
    assert cli.main(["notebooks", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"00.ipynb\n{tmp_path}\n"


@pytest.mark.parametrize("verb", ["list", "verify", "gc"])
def test_a_store_that_is_a_file_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, capsys, verb):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDXL_SAE_KIT_STORE", str(tmp_path / "file"))
    assert cli.main(["artifacts", verb]) == 1
    assert f"There is no folder {tmp_path / 'file'}" in capsys.readouterr().err

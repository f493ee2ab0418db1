"""The store: names from recipes, one writer, finished in one step, verified byte by byte."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
from caches import rewrite_stamp
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import canonical_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.fixture
def made(tmp_path):
    artifact = Store.at(tmp_path).artifact("studies", "a study: of 'things'", {"n": 3})
    with artifact.lock():
        artifact.file("result.json").write_text("[1, 2]")
        artifact.file("picture.png").write_bytes(b"png")
        return artifact.seal(facts={"rows": 2})


@given(st.dictionaries(st.text(), json_values), st.dictionaries(st.text(), json_values))
def test_equal_recipes_share_a_folder_and_different_ones_do_not(one, other):
    store = Store.at("somewhere")
    same = canonical_json(one) == canonical_json(other)
    assert (store.artifact("saes", "x", one).folder == store.artifact("saes", "x", other).folder) == same
    assert store.artifact("saes", "x", dict(reversed(one.items()))).folder == store.artifact("saes", "x", one).folder


def test_a_finished_artifact_reads_back_and_verifies(made):
    again = Artifact.open(made.folder, "studies")
    assert again.name.startswith("a-study-of-things-")
    assert again.recipe["n"] == 3
    assert again.stamp["facts"] == {"rows": 2}
    assert again.digest == made.digest
    again.verify()


def test_the_default_store_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SDXL_SAE_KIT_STORE", str(tmp_path / "elsewhere"))
    assert Store.at().root == tmp_path / "elsewhere"
    assert Store.at(tmp_path).root == tmp_path
    monkeypatch.delenv("SDXL_SAE_KIT_STORE")
    assert Store.at().root.name == "artifacts"


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda f: (f / "result.json").write_text("[1, 3]"), "result.json has changed"),
        (lambda f: (f / "picture.png").unlink(), "picture.png is missing"),
        (lambda f: (f / "stranger").write_text(""), "stranger does not belong"),
        (lambda f: rewrite_stamp(f, lambda s: s["recipe"].update(n=4)), "the recipe is not the one that named it"),
        (
            lambda f: rewrite_stamp(f, lambda s: s["files"].update({"../result.json": {"bytes": 0, "sha256": ""}})),
            r"\.\./result.json is missing",
        ),
    ],
)
def test_any_harm_is_found(made, harm, complaint):
    harm(made.folder)
    with pytest.raises(ArtifactError, match=complaint):
        Artifact(made.folder).verify()


def test_one_file_can_be_checked_alone(made):
    assert made.check("result.json").read_text() == "[1, 2]"
    made.file("result.json").write_text("[1, 3]")
    with pytest.raises(ArtifactError, match="result.json is missing or has changed. Delete"):
        made.check("result.json")


def test_an_unfinished_foreign_or_newer_artifact_is_not_opened(made, tmp_path):
    with pytest.raises(ArtifactError, match="No finished artifact"):
        Artifact.open(tmp_path / "nothing", "studies")
    with pytest.raises(ArtifactError, match="holds studies version 2; this kit reads saes"):
        Artifact.open(made.folder, "saes")
    rewrite_stamp(made.folder, lambda s: s["recipe"].update(version=99))
    with pytest.raises(ArtifactError, match="studies version 99"):
        Artifact.open(made.folder, "studies")


@pytest.mark.parametrize(
    "stamp", ["{}", "[]", "[" * 9999, "{", '{"recipe": 1, "files": {}, "facts": {}, "digest": "", "check": ""}', "\xff"]
)
def test_a_stamp_that_is_none_is_refused(made, stamp):
    (made.folder / "stamp.json").write_text(stamp)
    with pytest.raises(ArtifactError, match="The stamp of .* (cannot be read|is not as it was written)"):
        Artifact.open(made.folder, "studies")


def test_a_word_changed_anywhere_in_a_stamp_is_noticed(made):
    path = made.folder / "stamp.json"
    for old, new in (('"rows": 2', '"rows": 3'), ('"time": "2', '"time": "1'), ('"n": 3', '"n": 4')):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ArtifactError, match="is not as it was written"):
            Artifact.open(made.folder, "studies")
        path.write_text(text)


HOLDER = """
    import sys, time
    from sdxl_sae_kit.artifacts import Store
    with Store.at(sys.argv[1]).artifact("saes", "x", {}).lock():
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_writer_is_refused_by_the_name_of_the_first_and_a_killed_one_frees_the_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        artifact = Store.at(tmp_path).artifact("saes", "x", {})
        with pytest.raises(ArtifactError, match=f"is being written by process {holder.pid} on "), artifact.lock():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=10)
        with artifact.lock():
            pass
    finally:
        holder.kill()


def test_what_a_killed_writer_left_half_written_is_not_sealed_in(tmp_path):
    artifact = Store.at(tmp_path).artifact("studies", "x", {})
    with artifact.lock():
        artifact.file("stamp.json.tmp").write_text("{")
        artifact.file("result.json.tmp").write_text("[")
        artifact.file("result.json").write_text("[]")
        sealed = artifact.seal()
    assert list(sealed.stamp["files"]) == ["result.json"]
    sealed.verify()


@given(st.integers(min_value=1), st.integers(1, 9))
def test_a_whole_number_is_kept_as_it_is_or_refused_by_name(value, multiple):
    if value % multiple:
        with pytest.raises(KitError, match=f"size must be a multiple of {multiple} of at least 1, not {value}"):
            whole_number("size", value, multiple_of=multiple)
    else:
        assert whole_number("size", value, multiple_of=multiple) == value


def test_a_lost_text_file_is_missed_by_name(made):
    assert made.read_text("result.json") == "[1, 2]"
    with pytest.raises(ArtifactError, match="gone.json of .* cannot be read .* make it again"):
        made.read_text("gone.json")
    with pytest.raises(ArtifactError, match="picture.png of .* cannot be read"):
        made.file("picture.png").write_bytes(b"\xff\xfe")
        made.read_text("picture.png")


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_text("[1]")])
def test_a_file_that_is_lost_or_cut_is_missed_on_opening(made, harm):
    harm(made.file("result.json"))
    with pytest.raises(ArtifactError, match="result.json is missing or has changed, or is a link. Delete"):
        Artifact.open(made.folder, "studies")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=rf"The store .*{place} cannot be written .*store= or .*SDXL_SAE_KIT_STORE"),
        Store.at(tmp_path / place).artifact("studies", "x", {}).lock(),
    ):
        pass


def test_the_store_lists_what_it_holds(made):
    store = Store(made.folder.parent.parent)
    store.artifact("saes", "half", {}).folder.mkdir(parents=True)
    assert [(a.kind, a.finished) for a in store.artifacts()] == [("saes", False), ("studies", True)]
    assert "unfinished" in repr(store)
    assert made.name in repr(store)


def test_a_writer_that_locked_what_was_deleted_meanwhile_starts_again(tmp_path, monkeypatch):
    artifact, flock = Store.at(tmp_path).artifact("saes", "x", {}), fcntl.flock

    def deleting_first(handle, kind):
        monkeypatch.setattr(fcntl, "flock", flock)
        artifact.remove()
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", deleting_first)
    with artifact.lock():
        assert artifact.busy and artifact.folder.is_dir()
        artifact.seal()
    assert not artifact.busy and artifact.finished


def test_what_nobody_writes_is_not_busy_where_only_writable_files_can_be_locked_alone(tmp_path, monkeypatch):
    artifact, flock = Store.at(tmp_path).artifact("saes", "x", {}), fcntl.flock

    def as_on_nfs(handle, kind):
        if kind & fcntl.LOCK_EX and not handle.writable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with artifact.lock():
        assert artifact.busy
    assert not artifact.busy


def test_an_artifact_is_gone_in_one_step_and_its_lock_is_free_while_its_files_go(tmp_path, monkeypatch):
    store = Store.at(tmp_path)
    artifact, deleted = store.artifact("saes", "x", {}), []
    with artifact.lock():
        artifact.file("checkpoint.safetensors").write_bytes(b"0")

    def killed(folder, ignore_errors=False):
        if folder.exists():
            with open(folder / ".lock", "r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            deleted.append(folder)
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        artifact.remove()
    assert deleted[0].is_dir() and store.artifacts() == [] and not artifact.folder.exists()

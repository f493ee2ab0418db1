"""labels: nothing said is lost, whoever writes at the same time, and the newest word counts."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.labels import LONGEST, Label, LabelStore

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
label_texts = st.text(min_size=1, max_size=60).filter(str.strip)
said = st.builds(
    Label,
    st.integers(0, 4),
    st.none() | label_texts.map(lambda text: text.replace("\r\n", "\n").replace("\r", "\n").strip()),
    st.text(max_size=9),
    st.integers(0, 5).map(lambda second: NOON + timedelta(seconds=second)),
)


@pytest.fixture
def labels(tmp_path: Path) -> LabelStore:
    return LabelStore.of("tiny_mid.0_k10-0123abcd", tmp_path)


def test_labels_survive_a_new_store(labels: LabelStore, tmp_path: Path) -> None:
    labels.set(17, "red, round")
    labels.set(np.int64(3), "left")
    labels.set(17, "  red,\r\nround and\rshiny ", author="alice")
    again = LabelStore.of("tiny_mid.0_k10-0123abcd", tmp_path)
    assert labels.file == tmp_path / "labels" / "tiny_mid.0_k10-0123abcd.jsonl"
    assert again.all() == {3: "left", 17: "red,\nround and\nshiny"}
    assert [label.text for label in again.history(17)] == ["red, round", "red,\nround and\nshiny"]
    assert again.history(17)[-1].author == "alice"
    assert (again.get(3), again.get(4)) == ("left", None)


def test_a_withdrawn_label_is_gone_but_remembered(labels: LabelStore) -> None:
    labels.set(1, "red")
    labels.withdraw(1)
    assert (labels.get(1), labels.all()) == (None, {})
    assert [label.text for label in labels.history(1)] == ["red", None]
    with pytest.raises(KitError, match="Latent 1 has no label"):
        labels.withdraw(1)


def test_a_line_is_the_documented_record(labels: LabelStore) -> None:
    label = labels.set(5, "grün <b>", author="é")
    (line,) = labels.file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "version": 1,
        "feature": 5,
        "text": "grün <b>",
        "author": "é",
        "time": label.time.isoformat(timespec="microseconds"),
    }
    assert label.time.utcoffset() == timedelta(0)
    assert "grün" in line


@pytest.mark.parametrize(
    ("feature", "text", "message"),
    [
        (1, "", "needs some text"),
        (1, " \r\n\t", "needs some text"),
        (1, "x" * (LONGEST + 1), "at most 500 characters, and this one has 501"),
        (1, "half \ud83d", "half a character"),
        (-1, "red", "from 0 on, not -1"),
        (True, "red", "from 0 on, not True"),
    ],
)
def test_bad_labels_are_refused_and_nothing_is_written(
    labels: LabelStore, feature: int, text: str, message: str
) -> None:
    with pytest.raises(KitError, match=message):
        labels.set(feature, text)
    assert labels.all() == {}


def test_a_latent_that_the_sae_lacks_gets_no_label(tmp_path: Path) -> None:
    labels = LabelStore(tmp_path / "sae.jsonl", d_sae=40)
    labels.set(39, "red")
    with pytest.raises(KitError, match="No latent 40 in sae; it has 0 to 39"):
        labels.set(40, "red")
    assert labels.all() == {39: "red"}


@pytest.mark.parametrize("name", ["", "../other", "a/b", "..", "."])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot name one"):
        LabelStore.of(name, tmp_path)


@settings(deadline=None)
@given(st.lists(said, max_size=12), st.randoms())
def test_lines_mean_the_same_in_any_order_but_that_of_equal_times(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Label], random
) -> None:  # type: ignore[no-untyped-def]
    labels = LabelStore(tmp_path_factory.mktemp("labels") / "x.jsonl")
    labels.file.write_bytes(b"".join(label.line() for label in lines))
    expected: dict[int, Label] = {}
    for label in lines:
        if label.feature not in expected or label.time >= expected[label.feature].time:
            expected[label.feature] = label
    assert labels.all() == {
        feature: label.text for feature, label in sorted(expected.items()) if label.text is not None
    }

    distinct = list({(label.feature, label.time): label for label in lines}.values())
    labels.file.write_bytes(b"".join(label.line() for label in distinct))
    before = labels.all()
    random.shuffle(distinct)
    labels.file.write_bytes(b"".join(label.line() for label in distinct))
    assert labels.all() == before


def test_a_new_label_wins_against_one_from_a_clock_that_runs_ahead(labels: LabelStore) -> None:
    labels.file.parent.mkdir()
    labels.file.write_bytes(Label(1, "old", "bob", datetime.now(UTC) + timedelta(days=9)).line())
    labels.set(1, "new")
    assert labels.get(1) == "new"


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_passed_over_and_cut_by_the_next_writer(labels: LabelStore, cut: int) -> None:
    labels.set(1, "red")
    whole = labels.file.read_bytes()
    torn = Label(2, "blü", "eve", NOON).line().rstrip(b"\n")[:cut]
    labels.file.write_bytes(whole + torn)
    assert labels.all() == {1: "red"}
    labels.set(3, "green")
    assert labels.all() == {1: "red", 3: "green"}
    assert len(labels.file.read_bytes().splitlines()) == 2


def test_a_last_line_that_only_lacks_its_newline_counts_and_is_kept(labels: LabelStore) -> None:
    labels.set(1, "red")
    labels.file.write_bytes(labels.file.read_bytes().rstrip(b"\n"))
    assert labels.all() == {1: "red"}
    labels.set(2, "blue")
    assert labels.all() == {1: "red", 2: "blue"}


@pytest.mark.parametrize(
    "line",
    [
        "<<<<<<< HEAD",
        "[]",
        "7",
        '{"feature": 1}',
        '{"version": 2, "feature": 1}',
        '{"version":1,"feature":1,"text":"x","author":"","time":"2030-01-01"}',
    ],
)
def test_damage_inside_the_file_is_named_not_skipped(labels: LabelStore, line: str) -> None:
    labels.set(1, "red")
    with labels.file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ArtifactError, match=r"Line 2 of .*jsonl is not a label"):
        labels.all()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_merges_what_two_people_said(labels: LabelStore, tmp_path: Path) -> None:
    labels.set(1, "red", author="both")
    alice, bob = (LabelStore(tmp_path / f"{name}.jsonl") for name in ("alice", "bob"))
    for theirs in (alice, bob):
        shutil.copy(labels.file, theirs.file)
    alice.set(1, "dark red", author="alice")
    alice.set(2, "left", author="alice")
    bob.set(1, "crimson", author="bob")
    bob.set(3, "right", author="bob")
    for ours, theirs in ((alice, bob), (bob, alice)):
        command = ["git", "merge-file", "-p", "--union", ours.file, labels.file, theirs.file]
        merged = LabelStore(tmp_path / "merged.jsonl")
        merged.file.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        assert merged.all() == {1: "crimson", 2: "left", 3: "right"}


WRITER = """
import sys
from pathlib import Path
from sdxl_sae_kit.labels import LabelStore
labels = LabelStore(Path(sys.argv[1]))
first, count = int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for feature in range(first, first + count):
    labels.set(feature, f"label {feature} " + "ä" * 200)
    print(feature, flush=True)
"""


def writer(file: Path, first: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), str(first), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()


def test_a_writer_waits_for_the_one_before_it(labels: LabelStore) -> None:
    labels.set(1, "red")
    with labels.file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = writer(labels.file, 5, 1)
        start([process])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert labels.all() == {1: "red"}
    assert process.communicate(timeout=30)[0] == "5\n"
    assert sorted(labels.all()) == [1, 5]


def test_two_processes_write_at_once_and_nothing_is_lost(labels: LabelStore) -> None:
    processes = [writer(labels.file, first, 60) for first in (0, 1000)]
    start(processes)
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    assert sorted(labels.all()) == [*range(60), *range(1000, 1060)]
    assert len(labels.file.read_bytes().splitlines()) == 120


def test_a_killed_writer_loses_nothing_it_had_confirmed(labels: LabelStore) -> None:
    for attempt in range(3):
        process = writer(labels.file, attempt * 10_000, 5000)
        start([process])
        time.sleep(0.1 + 0.05 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        confirmed = [int(line) for line in process.communicate()[0].splitlines()]
        assert confirmed
        assert set(confirmed) <= set(labels.all())
        labels.set(99_999, f"still writable {attempt}")
        assert labels.get(99_999) == f"still writable {attempt}"

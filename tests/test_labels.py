"""labels: nothing said is lost, whoever writes at the same time, and the newest word counts."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_html import read_safely

from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.label_agreement import agreement, cohens_kappa
from sdxl_sae_kit.label_lines import NOT_A_LINE, LabelTest, Undo, parse
from sdxl_sae_kit.labels import LONGEST, Label, LabelStore, user

pytestmark = pytest.mark.filterwarnings("error::hypothesis.errors.HypothesisDeprecationWarning")


def unchecked(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Makes one without run-time checks: those draw which items they look at, and only hypothesis may draw."""

    def make(*fields: Any) -> Any:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return kind(*fields)

    return make


NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
label_texts = st.text(min_size=1, max_size=60).filter(str.strip)
tidy_texts = label_texts.map(lambda text: text.replace("\r\n", "\n").replace("\r", "\n").strip())
authors = st.text(max_size=9)
times = st.integers(0, 5).map(lambda second: NOON + timedelta(seconds=second))
tags = st.lists(st.text("ab=+-@' ,é\"", min_size=1, max_size=4).map(str.strip).filter(bool), unique=True, max_size=3)
sure = st.none() | st.floats(0, 1)
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
evidence = st.none() | st.dictionaries(st.text(max_size=5), scalars | st.lists(st.integers(), max_size=3), max_size=3)
said = st.builds(
    unchecked(Label), st.integers(0, 4), st.none() | tidy_texts, authors, times, tags.map(tuple), sure, evidence
)  # fmt: skip
undos = st.builds(Undo, st.integers(0, 4), times, authors, times)
results = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shown: st.builds(
        unchecked(LabelTest), st.integers(0, 4), tidy_texts, st.integers(0, shown[0]), st.just(shown[0]),
        st.integers(0, shown[1]), st.just(shown[1]), authors, times, evidence,
    )
)  # fmt: skip


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
    label = labels.set(5, "grün <b>", tags=["a", " b ", "a"], confidence=1, author="é",
                       evidence={"images": (np.int64(3), 4)})  # fmt: skip
    (line,) = labels.file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "version": 2,
        "kind": "label",
        "feature": 5,
        "text": "grün <b>",
        "tags": ["a", "b"],
        "confidence": 1.0,
        "evidence": {"images": [3, 4]},
        "author": "é",
        "time": label.time.isoformat(timespec="microseconds"),
    }
    assert label == labels.latest(5)
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
        (1.5, "red", "from 0 on, not 1.5"),
        ("1", "red", "from 0 on, not '1'"),
    ],
)
def test_bad_labels_are_refused_and_nothing_is_written(
    labels: LabelStore, feature: int, text: str, message: str, unchecked_types: None
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


def test_nothing_is_written_that_could_not_be_read(labels: LabelStore) -> None:
    latest = datetime(9999, 1, 1, tzinfo=UTC) - timedelta(microseconds=2)
    labels.file.parent.mkdir()
    labels.file.write_bytes(Label(1, "old", "bob", latest).line())
    assert labels.set(1, "new") == labels.latest(1)
    with pytest.raises(KitError, match="at most in the year 9998"):
        labels.set(1, "newer")
    assert labels.all() == {1: "new"}
    labels.set(2, "red")


def test_whoever_changes_evidence_changes_nothing_that_is_kept(labels: LabelStore) -> None:
    kept = {"images": [3, 17]}
    for text in ("red", "blue"):
        labels.set(1, text, evidence=kept)
    labels.add_test(1, "red", right_active=1, n_active=1, right_inactive=1, n_inactive=1, evidence=kept)
    for read in (lambda: labels.latest(1), lambda: labels.history(1)[0], lambda: labels.tests(1)[0]):
        read().evidence["images"].append(99)
        assert read().evidence == kept
    labels.undo().evidence["images"].append(99)
    assert labels.latest(1).evidence == LabelStore(labels.file).latest(1).evidence == kept


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "tear", "mend", "rewrite"]), said), max_size=8))
def test_a_store_that_reads_on_knows_what_a_new_one_reads(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Label]]
) -> None:
    labels = LabelStore(tmp_path_factory.mktemp("labels") / "x.jsonl")
    content = b""
    for step, label in steps:
        whole = content[: content.rfind(b"\n") + 1]
        content = {"add": whole + label.line(), "tear": whole + label.line()[:30], "mend": whole + label.line()[:-1],
                   "rewrite": label.line()}[step]  # fmt: skip
        labels.file.write_bytes(content)
        assert labels.history() == LabelStore(labels.file).history() and labels.all() == LabelStore(labels.file).all()


def test_only_what_was_added_is_parsed(labels: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr("sdxl_sae_kit.labels.parse", lambda line: parsed.append(line) or parse(line))
    for feature in range(20):
        labels.set(feature, "red")
        assert labels.get(feature) == "red"
    assert len([line for line in parsed if line]) == 20
    labels.file.write_bytes(labels.file.read_bytes() + b"damage\n")
    with pytest.raises(ArtifactError, match="Line 21 of"):
        labels.all()


def test_a_suggestion_replaces_nothing(labels: LabelStore) -> None:
    first = labels.suggest(1, "red", evidence={}, author="judge")
    assert first == labels.latest(1) and first.author == "judge"
    assert labels.suggest(1, "blue", evidence={}, author="judge") is None
    labels.withdraw(1)
    assert labels.suggest(1, "blue", evidence={}, author="judge") == labels.latest(1)
    assert [label.text for label in labels.history(1)] == ["red", None, "blue"]
    with pytest.raises(KitError, match="needs some text"):
        labels.suggest(2, " ", evidence={}, author="judge")


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
        '{"version":0,"kind":"label","feature":1,"text":"x","author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"kind":"poem","feature":1,"text":"x","author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"feature":1,"text":"x","confidence":2,"author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"feature":1,"text":"x","tags":"x","author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"feature":1,"text":"x","evidence":7,"author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"kind":"undo","feature":1,"author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":2,"kind":"test","feature":1,"text":"x","right_active":3,"n_active":2,"right_inactive":0,'
        '"n_inactive":1,"author":"","time":"2030-01-01T00:00:00Z"}',
        '{"version":1,"feature":1,"text":"x","author":"","time":"2030-01-01"}',
        '{"version":1,"feature":1,"text":"x","author":"","time":"0001-01-01T00:00:00+09:00"}',
        '{"version":1,"feature":1,"text":"x","author":"","time":"9999-12-31T23:59:59.999999Z"}',
        '{"version":1,"feature":1,"text":"x","author":"","time":"9999-12-31T23:59:59-05:00"}',
        '{"version":1,"feature":1,"text":"x","author":"half \\ud83d","time":"2030-01-01T00:00:00Z"}',
        '{"version":1,"feature":1,"text":"x","author":7,"time":"2030-01-01T00:00:00Z"}',
        '{"version":1,"feature":' + "[" * 100_000,
    ],
)
def test_damage_inside_the_file_is_named_not_skipped(labels: LabelStore, line: str) -> None:
    labels.set(1, "red")
    with labels.file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ArtifactError, match=r"Line 2 of .*jsonl is not a label"):
        labels.all()


def test_a_line_of_a_newer_kit_is_not_blamed_on_git(labels: LabelStore) -> None:
    labels.set(1, "red")
    with labels.file.open("a") as file:
        file.write('{"version":3,"kind":"poem"}\n')
    with pytest.raises(ArtifactError, match="Line 2 of .* has version 3, .* versions 1 and 2. Update the kit") as told:
        labels.all()
    assert "git" not in str(told.value).removeprefix(f"Line 2 of {labels.file}")


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


@given(said | undos | results)
def test_a_line_says_what_was_written(line: Label | Undo | LabelTest) -> None:
    written = line.line()
    assert parse(written) == line and written.count(b"\n") == 1 and written.endswith(b"\n")
    for cut in range(1, len(written)):
        with pytest.raises(NOT_A_LINE):
            parse(written[: len(written) - 1 - cut])


def test_lines_of_version_1_are_still_read(labels: LabelStore) -> None:
    labels.file.parent.mkdir()
    labels.file.write_text(
        '{"version": 1, "feature": 1, "text": "red", "author": "a", "time": "2026-01-01T00:00:00+00:00"}\n'
        '{"version": 1, "feature": 2, "text": "x", "author": "a", "time": "2026-01-01T00:00:00+00:00"}\n'
        '{"version": 1, "feature": 2, "text": null, "author": "a", "time": "2026-01-01T00:00:01+00:00"}\n'
    )
    label = labels.latest(1)
    assert label == Label(1, "red", "a", datetime(2026, 1, 1, tzinfo=UTC))
    assert (label.tags, label.confidence, label.evidence, labels.all()) == ((), None, None, {1: "red"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": "colour"}, "Tags are several texts"),
        ({"tags": 7}, "Tags are several texts, .* not 7"),
        ({"tags": [""]}, "A tag is 1 to 50 characters"),
        ({"tags": ["a;b"]}, "without a semicolon, and 'a;b' is not"),
        ({"tags": ["a\nb"]}, "on one line"),
        ({"tags": ["x" * 51]}, "A tag is"),
        ({"tags": [7]}, "A tag is"),
        ({"confidence": 1.01}, "from 0 .* to 1"),
        ({"confidence": float("nan")}, "from 0 .* to 1"),
        ({"confidence": True}, "from 0 .* to 1"),
        ({"confidence": "high"}, "from 0 .* to 1.*, not 'high'"),
        ({"evidence": {"image": object()}}, "that JSON can hold"),
        ({"evidence": {"value": float("nan")}}, "that JSON can hold"),
        ({"evidence": {"text": "\ud800"}}, "that JSON can hold"),
        ({"evidence": {"text": "x" * 100_001}}, "at most 100,000 bytes"),
        ({"evidence": 7}, "that JSON can hold"),
        ({"author": "half \ud83d"}, "half a character"),
        ({"author": 7}, "named by a text, not 7"),
        ({"author": 0}, "named by a text, not 0"),
    ],
)
def test_bad_details_are_refused_and_nothing_is_written(
    labels: LabelStore, options: dict, message: str, unchecked_types: None
) -> None:
    with pytest.raises(KitError, match=message):
        labels.set(1, "red", **options)
    assert not labels.file.exists()


# Undo ----------------------------------------------------------------------------------------------------------------


def test_undo_brings_back_what_stood_before_step_by_step(labels: LabelStore) -> None:
    labels.set(1, "red", tags=["colour"], confidence=0.5)
    labels.set(2, "left")
    labels.set(1, "crimson")
    labels.withdraw(2)
    seen = []
    for _ in range(4):
        undone = labels.undo()
        seen.append((undone.feature, undone.text, labels.all()))
        assert labels.get(undone.feature) == undone.text
    assert seen == [
        (2, "left", {1: "crimson", 2: "left"}),
        (1, "red", {1: "red", 2: "left"}),
        (2, None, {1: "red"}),
        (1, None, {}),
    ]
    with pytest.raises(KitError, match=f"No change by {user()} in .*jsonl is left to undo"):
        labels.undo()
    labels.set(1, "scarlet")
    assert labels.get(1) == "scarlet" and len(labels.history(1)) == 3
    assert len(labels.file.read_bytes().splitlines()) == 4 + 4 + 1, "every undo is a new line"


def test_undo_takes_back_ones_own_word_only(labels: LabelStore) -> None:
    labels.set(1, "red", author="bob", confidence=0.9)
    labels.set(1, "blue", author="alice")
    labels.set(1, "green", author="bob")
    assert labels.undo("alice").text == "green", "what bob said since stays"
    restored = labels.undo("bob")
    assert (restored.text, restored.author, restored.confidence) == ("red", "bob", 0.9)
    with pytest.raises(KitError, match="No change by eve"):
        labels.undo("eve")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abu"), st.integers(0, 2)), max_size=15))
def test_undo_is_the_same_as_never_having_said_it(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]
) -> None:
    labels = LabelStore(tmp_path_factory.mktemp("labels") / "x.jsonl")
    kept: list[tuple[str, int, str]] = []
    for number, (author, feature) in enumerate(moves):
        if author == "u":
            mine = [word for word in kept if word[0] == "a"]
            if mine:
                labels.undo("a")
                kept.remove(mine[-1])
        else:
            labels.set(feature, f"word {number}", author=author)
            kept.append((author, feature, f"word {number}"))
    assert labels.all() == {feature: text for _, feature, text in kept}


# Tests of labels -----------------------------------------------------------------------------------------------------


def test_results_are_kept_beside_labels_and_change_none(labels: LabelStore, unchecked_types: None) -> None:
    labels.set(1, "red")
    test = labels.add_test(1, " red ", right_active=9, n_active=10, right_inactive=6, n_inactive=8, author="judge")
    labels.add_test(2, "left", right_active=1, n_active=1, right_inactive=1, n_inactive=1)
    assert labels.tests(1) == [test] and [each.feature for each in labels.tests()] == [1, 2]
    assert (test.text, test.balanced_accuracy, labels.all(), len(labels.history())) == ("red", 0.825, {1: "red"}, 1)
    labels.undo()
    assert labels.tests(1) == [test], "what was measured is not undone"
    names = ("right_active", "n_active", "right_inactive", "n_inactive")
    for counts in ((3, 2, 0, 1), (0, 0, 0, 1)):
        with pytest.raises(KitError, match="cannot have more right than shown"):
            labels.add_test(1, "red", **dict(zip(names, counts, strict=True)))
    for count in (-1, 0.5, True, "1"):
        with pytest.raises(KitError, match="count must be an integer of at least 0"):
            labels.add_test(1, "red", **dict(zip(names, (count, 1, 0, 1), strict=True)))
    assert labels.add_test(1, "red", **dict.fromkeys(names, np.int64(1))) == labels.tests(1)[-1]


# CSV -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(said, max_size=8))
def test_csv_gives_back_every_label(tmp_path_factory: pytest.TempPathFactory, lines: list[Label]) -> None:
    folder = tmp_path_factory.mktemp("labels")
    labels, copy = LabelStore(folder / "a.jsonl"), LabelStore(folder / "b.jsonl")
    named = [replace(label, author=label.author or "somebody") for label in lines]  # no name is the reader's own
    labels.file.write_bytes(b"".join(label.line() for label in named))
    labels.to_csv(folder / "labels.csv")
    cells = list(csv.reader(io.StringIO((folder / "labels.csv").read_bytes().decode("utf-8-sig"), newline="")))[1:]
    assert not any(cell[0] in "=+-@\t\r" for row in cells for cell in row if cell)
    expected = [replace(labels.latest(feature), evidence=None) for feature in labels.all()]
    assert copy.read_csv(folder / "labels.csv") == expected
    assert [copy.latest(feature) for feature in copy.all()] == expected
    assert copy.read_csv(folder / "labels.csv") == [] == labels.read_csv(folder / "labels.csv")


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@x", "'=1", "''@x", "'tis", "＝1", "plain", '"quoted", and\nmore']
)
def test_a_spreadsheet_runs_nothing_and_changes_nothing(labels: LabelStore, tmp_path: Path, text: str) -> None:
    labels.set(1, text, tags=[text.split("\n")[0]], author=text)
    labels.to_csv(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(encoding="utf-8-sig", newline="") as file:
        header, row = csv.reader(file)
    assert header == ["feature", "text", "tags", "confidence", "author", "time"]
    assert row[1][0] not in "=+-@＝" and row[1].lstrip("'") == text.lstrip("'")
    copy = LabelStore(tmp_path / "copy.jsonl")
    copy.read_csv(tmp_path / "x.csv")
    assert copy.latest(1) == labels.latest(1)


def test_a_csv_file_by_hand_needs_two_columns(labels: LabelStore, tmp_path: Path) -> None:
    labels.set(1, "red", author="alice")
    labels.set(2, "left", author="alice", tags=["place"])
    (tmp_path / "x.csv").write_text("text,feature\nred,1\nright,2\n=top,3\n", encoding="utf-8")
    added = labels.read_csv(tmp_path / "x.csv")
    assert [(label.feature, label.text, label.author) for label in added] == [(2, "right", user()), (3, "=top", user())]
    assert labels.all() == {1: "red", 2: "right", 3: "=top"} and labels.latest(1).author == "alice"


def test_a_row_changed_in_a_spreadsheet_counts_unless_somebody_said_something_since(
    labels: LabelStore, tmp_path: Path
) -> None:
    for feature in (1, 2):
        labels.set(feature, "red", author="alice")
    labels.to_csv(tmp_path / "x.csv")
    labels.set(2, "blue", author="bob")
    changed = (tmp_path / "x.csv").read_text("utf-8-sig").replace("red", "crimson")
    (tmp_path / "x.csv").write_text(changed)
    assert len(labels.read_csv(tmp_path / "x.csv")) == 2
    assert labels.all() == {1: "crimson", 2: "blue"} and labels.latest(1).author == "alice"
    assert labels.read_csv(tmp_path / "x.csv") == [], "once is enough"
    assert [labels.undo("alice").text for _ in range(3)] == ["blue", "blue", "red"], "newest first"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"feature,text\n1,red\nx,blue\n", "Row 3 of .* is no label"),
        (b"feature,text\n1,\n", "Row 2 of .*needs some text"),
        (b"feature,text\n-1,red\n", "Row 2 of .*from 0 on"),
        (b"feature,text\n1,red,more\n", "Row 2 of .*more or fewer cells"),
        (b"feature,text\n1\n", "Row 2 of .*more or fewer cells"),
        (b"feature,text,confidence\n1,red,2\n", "Row 2 of .*confidence"),
        (b"feature,text,confidence\n1,red,sure\n", "Row 2 of .*sure"),
        (b"feature,text,time\n1,red,yesterday\n", "Row 2 of .*yesterday"),
        (b"feature,text,time\n1,red,2030-01-01\n", "Row 2 of .*time zone"),
        (b"feature,text,time\n1,red,9999-01-01T00:00Z\n", "Row 2 of .*at most in the year 9998"),
        (b"feature,text,tags\n1,red," + b"x" * 51 + b"\n", "Row 2 of .*A tag is"),
        (b"feature,text\n1,red\n99,blue\n", "Row 3 of .* names latent 99, and there are 40"),
        (b"feature;text\n1;red\n", r"no column feature and no column text; .* \['feature;text'\].*not semicolons"),
        (b"latent,text\n1,red\n", r"no column feature; its columns are \['latent', 'text'\]. Name them"),
        (b"feature,text\n5.0,red\n", r"Row 2 of .*its feature is an integer such as 17, not '5.0'"),
        (b"feature,text,confidence\n1,red,80%\n", r"its confidence is a number such as 0.8, not '80%'"),
        (b"", "has no column feature"),
        (b'feature,text\n1,"red\n', "cannot be read as CSV"),
        (b"feature,text\n1,r\xe9d\n", "cannot be read as CSV in UTF-8"),
        (None, r"x.csv cannot be read \(No such file or directory\)"),
    ],
)
def test_a_csv_file_with_a_bad_row_adds_nothing(tmp_path: Path, content: bytes | None, message: str) -> None:
    labels = LabelStore(tmp_path / "sae.jsonl", d_sae=40)
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(KitError, match=message):
        labels.read_csv(tmp_path / "x.csv")
    assert not labels.file.exists()


@pytest.mark.parametrize("place", [".", "missing/x.csv", "/"])
def test_a_place_where_no_csv_file_can_be_is_named_and_left_alone(
    labels: LabelStore, tmp_path: Path, place: str
) -> None:
    labels.set(1, "red")
    path = tmp_path / place
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(KitError, match=re.escape(f"cannot be written to {path} (")) as told:
        labels.to_csv(path)
    assert ".tmp" not in str(told.value) and sorted(tmp_path.parent.iterdir()) == before


# Agreement -----------------------------------------------------------------------------------------------------------


def kappa_by_hand(one: list[str], other: list[str]) -> float:
    n = len(one)
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / n
    expected = sum(one.count(word) * other.count(word) for word in {*one, *other}) / n**2
    return (observed - expected) / (1 - expected)


@settings(deadline=None)  # the first call imports sklearn
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_kappa_is_cohens(pairs: list[tuple[str, str]]) -> None:
    one, other = map(list, zip(*pairs, strict=True))
    if len({*one, *other}) < 2:
        assert math.isnan(cohens_kappa(one, other))
    else:
        assert cohens_kappa(one, other) == pytest.approx(kappa_by_hand(one, other))


def test_agreement_is_over_what_both_said_last_whatever_the_case(labels: LabelStore) -> None:
    words = {"alice": ["red", "Red", "left", "left", "x"], "bob": ["RED", "left", "left", "left"]}
    labels.set(0, "something else", author="alice")
    for author, texts in words.items():
        for feature, text in enumerate(texts):
            labels.set(feature, text, author=author)
    labels.set(9, "mine alone", author="carol")
    labels.set(1, "nothing", author="bob")
    labels.undo("bob")
    pairs = {(pair.one, pair.other): pair for pair in labels.agreement().pairs}
    assert list(pairs) == [("alice", "bob"), ("alice", "carol"), ("bob", "carol")]
    both = pairs["alice", "bob"]
    assert both.n == 4 and both.kappa == pytest.approx(kappa_by_hand(list("rrll"), list("rlll")))
    assert both.low <= both.kappa <= both.high
    assert pairs["alice", "carol"].n == 0 and math.isnan(pairs["alice", "carol"].kappa)
    assert labels.agreement().mean == both.kappa
    labels.withdraw(0, author="alice")
    assert labels.agreement().pairs[0].n == 3


def test_agreement_by_tags_compares_sets(labels: LabelStore, unchecked_types: None) -> None:
    for feature, (mine, theirs) in enumerate([(["a", "b"], ["B", "A"]), (["a"], ["b"]), ([], ["a"]), (["c"], ["c"])]):
        labels.set(feature, "x", tags=mine, author="me")
        labels.set(feature, "y", tags=theirs, author="you")
    (pair,) = labels.agreement("tags").pairs
    assert pair.n == 3 and pair.kappa == pytest.approx(kappa_by_hand(["ab", "a", "c"], ["ab", "b", "c"]))
    with pytest.raises(KitError, match="by is 'text' or 'tags', not 'time'"):
        labels.agreement("time")


def test_lights_kappa_is_the_mean_of_the_pairs_and_shown_with_them(labels: LabelStore) -> None:
    rng = np.random.default_rng(0)
    for author in ("<a>", "b", "c"):
        for feature in range(30):
            labels.set(feature, str(rng.choice(["red", "left"])), author=author)
    found = labels.agreement()
    assert len(found.pairs) == 3 and found.mean == pytest.approx(np.mean([pair.kappa for pair in found.pairs]))
    assert all(pair.low < 0.05 < pair.high + 0.4 and abs(pair.kappa) < 0.5 for pair in found.pairs)
    told = read_safely(found._repr_html_()).text
    assert (
        "<a>" in told
        and f"(Light's kappa): {found.mean:.2f}" in told
        and told.split("Light's kappa")[1].count("[") == 3
    )
    assert "Fewer than two authors" in LabelStore(labels.file.with_name("none.jsonl")).agreement()._repr_html_()


def test_the_interval_of_kappa_covers_it() -> None:
    """100 pairs of authors who agree beyond chance to a known degree: share σ of answers copied, the rest random."""
    rng = np.random.default_rng(1)
    share, covered = 0.6, 0
    for _ in range(100):
        one = rng.integers(0, 3, 60)
        other = np.where(rng.random(60) < share, one, rng.integers(0, 3, 60))
        said = {"a": dict(enumerate(map(str, one))), "b": dict(enumerate(map(str, other)))}
        (pair,) = agreement(said, "text").pairs
        covered += pair.low <= share <= pair.high
    assert 88 <= covered <= 99


# Several writers -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_merges_two_branches_with_labels_undone_tests_and_labels(tmp_path: Path) -> None:
    """A whole repository, whose .gitattributes says how, as the project's does."""

    def git(*command: str) -> None:
        settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *settings, *command], cwd=tmp_path, check=True, capture_output=True)

    labels = LabelStore(tmp_path / "labels" / "x.jsonl")
    git("init")
    (tmp_path / ".gitattributes").write_text("labels/*.jsonl merge=union\n")
    labels.set(1, "red", author="alice")
    labels.set(2, "left", author="alice")
    git("add", ".")
    git("commit", "-m", "both")
    git("checkout", "-b", "bob")
    labels.set(1, "crimson", author="bob")
    labels.add_test(1, "crimson", right_active=1, n_active=2, right_inactive=2, n_inactive=2, author="bob")
    git("commit", "-am", "bob's")
    git("checkout", "main")
    labels.undo("alice")
    labels.set(3, "right", author="alice")
    git("commit", "-am", "alice's")
    git("merge", "bob")
    assert labels.all() == {1: "crimson", 3: "right"}
    assert [test.author for test in labels.tests()] == ["bob"]
    assert labels.undo("bob").text == "red"


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


UNDOER = WRITER.replace("    print(feature", "    if feature % 2: labels.undo()\n    print(feature")


def test_two_who_write_and_undo_at_once_undo_their_own(labels: LabelStore) -> None:
    assert "labels.undo()" in UNDOER
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNDOER, str(labels.file), str(first), "20"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"LOGNAME": name},
        )
        for first, name in ((0, "alice"), (1000, "bob"))
    ]  # fmt: skip
    start(processes)
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    assert sorted(labels.all()) == [*range(0, 20, 2), *range(1000, 1020, 2)]
    assert {label.author for label in labels.history()} == {"alice", "bob"} and len(labels.history()) == 40


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


@pytest.mark.parametrize("own_file", ["", "_automatic", "_control"])
def test_labels_in_a_file_of_their_own_are_of_the_sae_that_it_names(tmp_path, own_file) -> None:
    assert LabelStore.of(f"tiny_mid.0_k5-0123abcd{own_file}", tmp_path).sae == "tiny_mid.0_k5-0123abcd"

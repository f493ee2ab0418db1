"""Lines: what was added stays, whatever a kill leaves behind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.studies.lines import Lines, open_study


@given(cut=st.integers(0, 200))
def test_a_line_counts_when_it_is_whole_and_the_next_is_added_after_the_last_that_counts(tmp_path_factory, cut) -> None:
    artifact = Store.at(tmp_path_factory.mktemp("store")).artifact("studies", "made-up", {"study": "made up"})
    artifact.folder.mkdir(parents=True)
    lines = Lines(artifact, "results.jsonl")
    for unit in ("a", "b", "c"):
        lines.add(unit, {"value": [1.5, None], "unit": unit})
    path = artifact.file("results.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    again = Lines(artifact, "results.jsonl")
    assert list(again) == ["a", "b", "c"][: whole[:cut].count(b"\n")]
    again.add("d", {})
    assert dict(Lines(artifact, "results.jsonl")) == dict(again) == {u: lines[u] for u in again if u != "d"} | {"d": {}}


@pytest.mark.parametrize("line", [b"{}\n", b"1\n", b"nonsense\n", b'["a"]\n'])
def test_a_line_that_is_no_result_is_refused(tmp_path, line) -> None:
    artifact = Store.at(tmp_path).artifact("studies", "made-up", {"study": "made up"})
    artifact.folder.mkdir(parents=True)
    artifact.file("results.jsonl").write_bytes(line)
    with pytest.raises(ArtifactError, match="line 1 is no result. Delete its folder and make it again"):
        Lines(artifact, "results.jsonl")


def test_a_number_that_is_not_finite_is_refused_with_its_unit_and_nothing_is_lost(tmp_path) -> None:
    artifact = Store.at(tmp_path).artifact("studies", "made-up", {"study": "made up"})
    artifact.folder.mkdir(parents=True)
    lines = Lines(artifact, "results.jsonl")
    lines.add("a", {"value": 1.0})
    with pytest.raises(KitError, match="A number of image 3 is not finite"):
        lines.add("image 3", {"value": float("nan")})
    assert list(Lines(artifact, "results.jsonl")) == ["a"]


def test_a_study_of_another_kind_is_refused_with_what_makes_one(tmp_path) -> None:
    artifact = Store.at(tmp_path).artifact("studies", "made-up", {"study": "made up"})
    with artifact.lock():
        artifact.seal()
    assert open_study(artifact.folder, "made up", "make").digest == artifact.digest
    with pytest.raises(ArtifactError, match="is a study of made up, not of splicing. Call splice"):
        open_study(artifact.folder, "splicing", "splice")

"""What a report tells of where its numbers came from, in a store of which a part is damaged."""

import pytest
from made_reports import hostile_store

from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.provenance import artifact_rows, data_rows, sae_rows, with_inputs


@pytest.fixture
def store(tmp_path):
    return hostile_store(tmp_path)


def damage_stamp(folder):
    (folder / "stamp.json").write_text((folder / "stamp.json").read_text().replace('"time"', '"tine"', 1))


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": {}}', b"\xff"])
def test_what_is_damaged_and_not_used_is_passed_over(store, content):
    cache, sae = store
    other = Store(cache.parent.parent).artifact("studies", "another", {"study": "x"})
    with other.lock():
        other.seal()
    (other.folder / "stamp.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = with_inputs([Artifact(sae)])
    assert [artifact.folder for artifact in found] == [cache, sae]
    assert len(artifact_rows(found, {sae: ["here"]})) == 2


def test_what_is_used_and_damaged_is_told_of_beside_the_rest(store):
    cache, sae = store
    damage_stamp(sae)
    found = with_inputs([Artifact(cache), Artifact(sae)])
    assert [artifact.folder for artifact in found] == [cache] and sae_rows(found) == []
    rows = artifact_rows(found, {cache: ["one"], sae: ["one", "two"]})
    assert rows[0].keys() == rows[1].keys() and [row["name"] for row in rows] == [cache.name, sae.name]
    assert rows[1]["used in"] == "one, two" and "cannot be read" in rows[1]["settings"]
    assert "/" not in rows[1]["settings"], "a report tells nothing of this machine"


def test_a_cache_that_has_lost_a_file_keeps_a_row(store):
    cache, _ = store
    whole = data_rows([Artifact(cache)])
    next(cache.glob("*.h5")).unlink()
    [row] = data_rows([Artifact(cache)])
    assert list(row) == list(whole[0]) and row["cache"] == cache.name and "cannot be read" in row["prompts"]

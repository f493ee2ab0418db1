"""Recorded edits: what goes into a file comes out of it, and a stranger's file is told what is wrong with it."""

import json

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_sae_kit.edits import FORMAT, Edit, read_edits, write_edits
from sdxl_sae_kit.errors import ArtifactError, EditError
from sdxl_sae_kit.masks import Polygon

EDITS = [
    Edit("up.0.1", "k10", "ab" * 32, scale={17: 0.0}),
    Edit("mid.0", "k10", "cd" * 32, add={3: np.eye(4), 9: [1.0, 2.0]}, clamp={5: 1}, steps=[0, 2], cfg="cond"),
    Edit("mid.0", "k10", "cd" * 32, replace={3: 2.0}, steps=(0.0, 1.0), schedule=[1, 0.5], gate="active"),
    Edit("mid.0", ablate_block=True, where=[Polygon([(0, 0), (1, 0), (0, 1)]), Polygon([(1, 1), (1, 0), (0, 1)])]),
    Edit("down.2.1", "k", "e" * 64, reconstruct=True, keep_norm=True, where=Image.new("L", (9, 5), 77)),
    Edit("down.2.1", "k", "e" * 64, scale={1: 0.0}, along={1: np.linspace(0, 1, 7)}, where=np.ones((2, 3, 3))),
    Edit("up.0.0", "k", "f" * 64),
]
floats = st.floats(-1e6, 1e6, allow_nan=False)
strengths = st.dictionaries(st.integers(0, 9999), floats | st.lists(floats, min_size=1, max_size=3), max_size=3)


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_an_edit_survives_json(edit):
    assert Edit.from_json(json.loads(json.dumps(edit.to_json(), allow_nan=False))) == edit


@given(strengths, strengths, st.sampled_from(["both", "cond", "uncond"]), st.none() | st.sampled_from(["active"]))
@settings(max_examples=50, deadline=None)
def test_any_edit_survives_json(add, scale, cfg, gate):
    edit = Edit("mid.0", "k", "0", add=add, scale=scale, cfg=cfg, gate=gate)
    assert Edit.from_json(json.loads(json.dumps(edit.to_json()))) == edit


def test_edits_survive_a_file_in_their_order(tmp_path):
    write_edits(tmp_path / "edits.json", EDITS)
    assert read_edits(tmp_path / "edits.json") == EDITS
    write_edits(str(tmp_path / "edits.json"), EDITS[0])
    assert read_edits(str(tmp_path / "edits.json")) == EDITS[:1]
    content = json.loads((tmp_path / "edits.json").read_text())
    assert content == {
        "format": "sdxl-sae-kit edits",
        "version": 1,
        "edits": [{"hookpoint": "up.0.1", "sae": "k10", "digest": "ab" * 32, "scale": {"17": 0.0}}],
    }


def test_shares_of_the_steps_are_not_mistaken_for_steps(tmp_path):
    write_edits(tmp_path / "e.json", [Edit("mid.0", "k", "", scale={1: 0.0}, steps=s) for s in ((0.0, 1.0), [0, 1])])
    content = (tmp_path / "e.json").read_text().replace("0.0", "0").replace("1.0", "1")  # as other tools write them
    (tmp_path / "e.json").write_text(content)
    assert [edit.factor(2, 4) for edit in read_edits(tmp_path / "e.json")] == [1.0, 0.0]


GOOD = {"hookpoint": "mid.0", "sae": "k", "digest": "0" * 64}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "is an object with at least its hookpoint, not \\[\\]"),
        ({"sae": "k"}, "is an object with at least its hookpoint"),
        (GOOD | {"scael": {}}, r"an edit has no 'scael'; it has hookpoint, .*\. Did you mean 'scale'\?"),
        (GOOD | {"hookpoint": 5}, "hookpoint must be a text, not 5"),
        (GOOD | {"digest": ["x"]}, r"digest must be a text, not \['x'\]"),
        (GOOD | {"scale": [1]}, r"scale must be an object by latent, such as \{'17': 2.0\}, not \[1\]"),
        (GOOD | {"scale": {"1.5": 0}}, "it has the key '1.5'"),
        (GOOD | {"scale": {"-1": 0}}, "it has the key '-1'"),
        (GOOD | {"scale": {"01": 0}}, "it has the key '01'"),
        (GOOD | {"add": {"9" * 5000: 0}}, "it has the key '999"),
        (GOOD | {"scale": {"1": "off"}}, r"scale\[1\] must be a finite number or a map of them, .* not 'off'"),
        (GOOD | {"scale": {"1": float("nan")}}, r"scale\[1\] must be a finite number or a map of them, .* not nan"),
        (GOOD | {"clamp": {"1": [[1, 2], [3]]}}, r"clamp\[1\] must be a finite number or a map"),
        (GOOD | {"clamp": {"1": None}}, r"clamp\[1\] must be a finite number or a map"),
        (GOOD | {"add": {"1": 10**400}}, r"add\[1\] must be a finite number"),
        (GOOD | {"where": "left"}, "where must be a map of finite numbers, a picture or polygons, not 'left'"),
        (GOOD | {"where": {"polygon": []}}, r"where is a map or \{'polygons': \[…\]\}"),
        (GOOD | {"where": {"polygons": [[[0, 0], [9, 9], [0, 1]]]}}, "A polygon's points are fractions"),
        (GOOD | {"where": [[0.5] * 3000] * 1500}, "where has 4,500,000 numbers, more than"),
        (GOOD | {"steps": {"from": 0.5}}, "steps must be numbers, not None"),
        (GOOD | {"steps": {"from": 0.5, "to": 0.2}}, r"steps as fractions are two, 0 ≤ start < end ≤ 1"),
        (GOOD | {"steps": "first"}, "steps, such as .*, must be integers, not 'first'"),
        (GOOD | {"steps": []}, r"steps=\[\] must name one step or more"),
        (GOOD | {"steps": [-1]}, r"steps=\[-1\] must name one step or more, numbered from 0"),
        (GOOD | {"cfg": "none"}, "cfg is 'both', 'cond' or 'uncond', not 'none'"),
        (GOOD | {"cfg": {}}, "cfg is 'both'"),
        (GOOD | {"gate": "open"}, "gate is None, 'active' or 'inactive', not 'open'"),
        (GOOD | {"schedule": 0.5}, r"schedule must be finite factors, such as \[1.0, 0.0\], not 0.5"),
        (GOOD | {"schedule": []}, "schedule must be finite factors"),
        (GOOD | {"keep_norm": 1}, "keep_norm must be True or False, not 1"),
        (GOOD | {"along": {"1": [1.0]}}, r"along\[1\] must be a vector for a latent that is edited; edited are \[\]"),
        (GOOD | {"scale": {"1": 0}, "clamp": {"1": 0}}, r"latents \[1\] are both scaled and clamped"),
        (GOOD | {"scale": {"1": 0}, "replace": {"2": 0}}, "replace leaves nothing of the update, so it goes with no"),
        (GOOD | {"scale": {"1": 0}, "ablate_block": True}, "ablate_block makes the update 0, so it goes with no"),
        (GOOD | {"keep_norm": True, "ablate_block": True}, "ablate_block makes the update 0, so it goes with no"),
        (GOOD | {"reconstruct": True, "gate": "active"}, "gate says at which tokens latents are edited, but none is"),
    ],
)
def test_a_strangers_edit_is_refused_by_file_and_field(tmp_path, record, complaint, unchecked_types):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({"format": FORMAT, "version": 1, "edits": [GOOD, record]}))
    with pytest.raises(ArtifactError, match=f"theirs.json, edit 1: .*{complaint}") as caught:
        read_edits(path)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON|is no edits file"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is no edits file: it must say format"),
        ('{"format": "labels", "version": 1, "edits": []}', "is no edits file"),
        (f'{{"format": "{FORMAT}", "version": 1, "edits": {{}}}}', "is no edits file"),
        (f'{{"format": "{FORMAT}", "version": 2, "edits": []}}', "has version 2 .* this kit reads version 1"),
        (f'{{"format": "{FORMAT}", "version": 1, "edits": [], "author": 1}}', "fields format, version, edits, author"),
        (f'{{"format": "{FORMAT}", "version": 1, "version": 1, "edits": []}}', "has a key twice"),
    ],
)
def test_what_is_no_edits_file_is_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "theirs.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=f"theirs.json.*({complaint})"):
        read_edits(path)


def test_a_missing_or_huge_file_is_refused_unread(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="nowhere.json cannot be read"):
        read_edits(tmp_path / "nowhere.json")
    monkeypatch.setattr("sdxl_sae_kit.edits.LARGEST_FILE", 10)
    (tmp_path / "big.json").write_text(" " * 11)
    with pytest.raises(ArtifactError, match="big.json has 11 bytes; edits files of up to 10 are read"):
        read_edits(tmp_path / "big.json")
    with pytest.raises(ArtifactError, match="edits.json cannot be written"):
        write_edits(tmp_path / "nowhere" / "edits.json", EDITS)


def test_an_edit_shows_what_it_does_and_runs_nothing():
    bad = "<script>alert(1)</script>"
    edit = Edit(bad, bad, bad, add={3: 1.5, 4: np.eye(8)}, where=[[0.0, 1.0]], steps=(0.0, 0.5), cfg="cond")
    page = BeautifulSoup(edit._repr_html_(), "html.parser")
    assert not page.find_all("script")
    assert bad in page.get_text()
    cells = [[cell.get_text() for cell in row.find_all("td")] for row in page.find_all("tr")[1:]]
    assert cells == [
        ["add 3", "1.50"],
        ["add 4", "a map of 8×8, 0.00 to 1.00"],
        ["where", "a mask of 1×2: 50 % of the picture"],
        ["steps", "from 0 to 0.5 of all"],
        ["cfg", "cond"],
    ]
    (picture,) = page.find_all("img")
    assert picture["alt"] == "where, white where edited: a mask of 1×2: 50 % of the picture"
    assert "nothing" in BeautifulSoup(EDITS[-1]._repr_html_(), "html.parser").get_text()


def test_an_edit_says_itself_in_a_line():
    assert repr(EDITS[0]) == "Edit at up.0.1 by k10: scale 17: 0.00"
    assert repr(EDITS[3]) == "Edit at mid.0: ablate_block: 0; where: 2 polygon(s): 100 % of the picture"
    assert all(len(repr(edit)) < 250 for edit in EDITS)


def test_an_edit_is_checked_however_it_is_made():
    with pytest.raises(EditError, match=r"latents \[3\] are both scaled and clamped"):
        Edit("mid.0", scale={3: 0.0}, clamp={3: 1.0})

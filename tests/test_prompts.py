"""Prompts: sources, seeds, the held-out split, and what is refused."""

import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.errors import KitError, PromptError
from sdxl_sae_kit.prompts import HELD_OUT_SHARE, Prompts, is_held_out, load_prompts
from sdxl_sae_kit.tiny import world

texts = st.text(min_size=1).filter(str.strip)


@given(st.lists(texts, min_size=1), st.integers(0, 2**31))
def test_prompts_survive_json_lines_with_any_text(lines, seed):
    prompts = load_prompts(lines, seed=seed)
    assert Prompts.from_jsonl(prompts.to_jsonl()) == prompts
    assert prompts.seeds == tuple(range(seed, seed + len(lines)))


@given(st.lists(texts, min_size=1), st.randoms())
def test_a_text_is_on_the_same_side_of_the_split_wherever_it_stands(lines, random):
    side = dict(zip(lines, load_prompts(lines).held_out, strict=True))
    shuffled = [*lines, *lines]
    random.shuffle(shuffled)
    assert [side[text] for text in shuffled] == load_prompts(shuffled).held_out.tolist()


def test_texts_are_hashed_once_however_often_one_asks(monkeypatch):
    asked = []
    monkeypatch.setattr("sdxl_sae_kit.prompts.is_held_out", lambda text: asked.append(text) or is_held_out(text))
    prompts = load_prompts(["a fox", "a cat", "a dog"])
    for _ in range(3):
        assert prompts.held_out.tolist() == [is_held_out(text) for text in prompts.texts]
    assert asked == list(prompts.texts)
    assert prompts == load_prompts(list(prompts.texts)) and prompts[:2].held_out.shape == (2,)


def test_about_the_stated_share_is_held_out():
    assert np.mean(load_prompts(f"prompt {i}" for i in range(5000)).held_out) == pytest.approx(HELD_OUT_SHARE, abs=0.02)


@pytest.mark.parametrize("source", ["world", "scenes"])
def test_generated_prompts_depend_only_on_the_seed_and_state_their_factors(source):
    prompts = load_prompts(source, 200, seed=7)
    assert prompts == load_prompts(source, 200, seed=7)
    assert prompts.texts != load_prompts(source, 200, seed=8).texts
    assert len(set(prompts.texts)) > 100
    if source == "scenes":
        assert all(
            value in text
            for text, factors in zip(prompts.texts, prompts.factors, strict=True)
            for value in factors.values()
        )


def test_world_factors_are_the_worlds():
    for factors in load_prompts("world", 100).factors:
        assert all(value in world.FACTORS[name] for name, value in factors.items())


def test_files_of_three_kinds_read_alike(tmp_path):
    lines = ["a fox", 'a "quoted", comma', "line\u2028separator and ünïcode"]
    (tmp_path / "p.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8-sig")
    (tmp_path / "p.jsonl").write_text(load_prompts(lines).to_jsonl(), encoding="utf-8")
    (tmp_path / "p.csv").write_text(
        'id,prompt\n1,a fox\n2,"a ""quoted"", comma"\n3,line\u2028separator and ünïcode\n', encoding="utf-8"
    )
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert load_prompts(tmp_path / name).texts == tuple(lines)
        assert load_prompts(tmp_path / name, 2).texts == tuple(lines[:2])


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        ('["a fox"]\n', "p.jsonl", "Row 1 of .* is .*, not a text. Write it as"),
        ('{"words": "x"}\n', "p.jsonl", "no field 'text' or 'prompt' or 'caption', only 'words'. Say with column="),
        ("{oops\n", "p.jsonl", "Line 1 is not JSON"),
        ('{"text": 5}\n', "p.jsonl", "Prompt 1 of .* is 5, not a text"),
        ('{"text": "half a pair \\ud800"}\n', "p.jsonl", "Prompt 1 of .* no valid Unicode"),
        ("[" * 100_000 + "\n", "p.jsonl", "Line 1 is not JSON"),
        ("words\nx\n", "p.csv", "no field 'text' or .*, only 'words'"),
        ("", "p.jsonl", "No prompts in"),
        ("x", "p.parquet", "Unknown prompt source"),
    ],
)
def test_files_that_cannot_be_prompts_are_refused(tmp_path, content, name, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=complaint):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "seed", "told"),
    [
        ("world", 2**32, "from a seed of 0 to 2³² − 1, not 4294967296"),
        ("scenes", 2**32, "from a seed of 0 to 2³² − 1"),
        (["a", "b"], 2**63 - 1, "2 prompts from the seed 9223372036854775807 on need seeds of more than 2⁶³ − 1"),
    ],
)
def test_seeds_that_no_generator_takes_are_refused(source, seed, told):
    with pytest.raises(PromptError, match=told):
        load_prompts(source, 2, seed=seed)
    assert load_prompts(source, 2, seed=seed - 1).seeds == (seed - 1, seed)


def test_seeds_and_factors_that_a_file_tells_are_kept(tmp_path):
    made = load_prompts("world", 5, seed=30)
    (tmp_path / "p.jsonl").write_text(made.to_jsonl(), encoding="utf-8")
    assert load_prompts(tmp_path / "p.jsonl") == made
    (tmp_path / "p.csv").write_text("text,seed\na fox,7\na cow,\n", encoding="utf-8")
    assert load_prompts(tmp_path / "p.csv", seed=100).seeds == (7, 101)
    (tmp_path / "bad.csv").write_text("text,seed\na fox,soon\n", encoding="utf-8")
    with pytest.raises(PromptError, match=r"Row 1 of .*bad.csv has the seed 'soon', which is no integer"):
        load_prompts(tmp_path / "bad.csv")


def test_other_mistakes_say_what_to_do(tmp_path):
    with pytest.raises(PromptError, match="There is no file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="say n="):
        load_prompts("world")
    with pytest.raises(PromptError, match="Did you mean 'world'"):
        load_prompts("wordl")


def test_a_field_of_any_name_can_hold_the_prompts(tmp_path):
    (tmp_path / "p.csv").write_text("id,words\n1,a fox\n2,a cow\n", encoding="utf-8")
    assert load_prompts(tmp_path / "p.csv", column="words").texts == ("a fox", "a cow")
    rows = [{"words": "a fox", "text": "not this"}, {"words": "a cow", "seed": 9}]
    assert load_prompts(rows, column="words").texts == ("a fox", "a cow")
    assert load_prompts(iter(rows), column="words", seed=5).seeds == (5, 9)
    with pytest.raises(PromptError, match="has no field 'wrods', only 'words', 'text'.* Did you mean 'words'"):
        load_prompts(rows, column="wrods")


def test_rows_without_a_text_are_left_out_and_counted_but_among_strings_they_are_mistakes(tmp_path):
    rows = [{"caption": None}, {"caption": "a fox"}, {"caption": ""}, {"caption": float("nan")}, {"caption": "a cow"}]
    with pytest.warns(UserWarning, match="Rows of the list given without a text, left out: 3"):
        assert load_prompts(rows).texts == ("a fox", "a cow")
    with pytest.warns(UserWarning, match="left out: 1"):
        assert load_prompts(rows, 1).texts == ("a fox",)
    with pytest.warns(UserWarning, match="left out: 1"):
        assert load_prompts([{"text": "  "}, {"text": "a fox"}]).texts == ("a fox",)
    for wrong in ("", "  ", None, 3):
        with pytest.raises(PromptError, match="(Prompt 2|Row 2) of the list given is .*, not a text"):
            load_prompts(["a fox", wrong])


def test_what_is_no_source_is_refused(unchecked_types):
    for wrong in (5, None, {"a fox": 1}):
        with pytest.raises(KitError, match="load_prompts takes a .* a list.*, not"):
            load_prompts(wrong)
    assert load_prompts(np.array(["a fox", "a cow"])).texts == ("a fox", "a cow")
    for seed in (2**70, -1):
        with pytest.raises(PromptError, match="it must be from 0 to"):
            load_prompts([{"text": "a fox", "seed": seed}])


def test_an_endless_source_is_read_only_as_far_as_wanted():
    def endless():
        for number in itertools.count():
            assert number < 5
            yield {"caption": f"a fox {number}"}

    assert len(load_prompts(endless(), 4)) == 4


def test_a_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    """A real dataset in a folder, as the hub has them; where the library is missing, the error names the extra."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"needs the extra datasets: pip install 'sdxl-sae-kit\[datasets\]'"):
        load_prompts("hf:owner/name", 3)
    monkeypatch.delitem(sys.modules, "datasets")
    pytest.importorskip("datasets")
    lines = [{"caption": f"a fox, {i} ünï"} for i in range(10)] + [{"caption": None}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert load_prompts(f"hf:{tmp_path}", 3).texts == tuple(f"a fox, {i} ünï" for i in range(3))
    with pytest.warns(UserWarning, match="Rows of hf:.* without a text, left out: 1"):
        assert len(load_prompts(f"hf:{tmp_path}")) == 10
    with pytest.raises(PromptError, match="split 'nothing'.* cannot be read"):
        load_prompts(f"hf:{tmp_path}", split="nothing")


def test_prompts_of_a_stranger_are_read_or_refused():
    rows = ['{"text": 1, "seed": 0, "factors": {}}\n', '{"text": "a", "seed": 0.5, "factors": {}}\n']
    for text in ("[]\n", "{}\n", "x\n", *rows):
        with pytest.raises(PromptError):
            Prompts.from_jsonl(text)


def test_it_counts_repeats_and_shows_itself_as_rows():
    prompts = load_prompts(["a fox", "a cow", "a fox", "a fox"])
    assert prompts.n_repeated == 2
    assert prompts.rows(1) == [
        {"prompt": "a fox", "seed": 0, "held out": "yes" if prompts.held_out[0] else "no", "factors": ""}
    ]
    known = Prompts(("a fox",), (3,), ({"animal": "fox", "hue": "red"},))
    assert known.rows()[0]["factors"] == "animal fox, hue red"
    assert prompts.take([3, 1]).seeds == (3, 1)


def test_seeds_of_a_column_with_blanks_are_whole_numbers():
    prompts = load_prompts([{"text": "a", "seed": 7.0}, {"text": "b", "seed": float("nan")}])
    assert prompts.seeds == (7, 1)
    with pytest.raises(PromptError, match="has the seed 7.5, which is no integer"):
        load_prompts([{"text": "a", "seed": 7.5}])
    for seed in (2**64, -5):
        with pytest.raises(PromptError, match="load_prompts has the seed"):
            load_prompts(["a"], seed=seed)


def test_prompts_are_a_source_too_and_too_few_are_told_of():
    made = load_prompts("world", 5, seed=3)
    assert load_prompts(made) is made
    assert load_prompts(made, 2) == made[:2]
    with pytest.warns(UserWarning, match="the list given has 2 prompts, fewer than the 5 asked for"):
        load_prompts(["a", "b"], 5)
    assert repr(load_prompts(["a fox", "a cow", "b"])).startswith("Prompts: 3, ")
    assert len(repr(load_prompts("world", 500))) < 300
    assert "a fox" in load_prompts(["a fox"])._repr_html_()

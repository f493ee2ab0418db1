"""Prompts: sources, seeds, the held-out split, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.errors import PromptError
from sdxl_sae_kit.prompts import HELD_OUT_SHARE, Prompts, load_prompts
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
        ('["a fox"]\n', "p.jsonl", "Line 1 is .*, not an object"),
        ('{"caption": "x"}\n', "p.jsonl", "neither 'text' nor 'prompt', only caption"),
        ("{oops\n", "p.jsonl", "Line 1 is not JSON"),
        ('{"text": null}\n', "p.jsonl", "Prompt 0 of .* is None"),
        ("words\nx\n", "p.csv", "neither 'text' nor 'prompt', only words"),
        ("", "p.jsonl", "No prompts in"),
        ("x", "p.parquet", "Unknown prompt source"),
    ],
)
def test_files_that_cannot_be_prompts_are_refused(tmp_path, content, name, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=complaint):
        load_prompts(tmp_path / name)


def test_seeds_and_factors_that_a_file_tells_are_kept(tmp_path):
    made = load_prompts("world", 5, seed=30)
    (tmp_path / "p.jsonl").write_text(made.to_jsonl(), encoding="utf-8")
    assert load_prompts(tmp_path / "p.jsonl") == made
    (tmp_path / "p.csv").write_text("text,seed\na fox,7\na cow,\n", encoding="utf-8")
    assert load_prompts(tmp_path / "p.csv", seed=100).seeds == (7, 101)
    (tmp_path / "bad.csv").write_text("text,seed\na fox,soon\n", encoding="utf-8")
    with pytest.raises(PromptError, match=r"bad.csv cannot be read .* Row 1 has the seed 'soon', which is no integer"):
        load_prompts(tmp_path / "bad.csv")


def test_other_mistakes_say_what_to_do(tmp_path):
    with pytest.raises(PromptError, match="There is no file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="say n="):
        load_prompts("world")
    with pytest.raises(PromptError, match="Did you mean 'world'"):
        load_prompts("wordl")

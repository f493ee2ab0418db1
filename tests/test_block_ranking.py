"""Ranking of blocks: the distances are those of pictures without a block, the ranking and its stability are theirs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import Forked
from reading_html import read_safely

from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError, PromptError
from sdxl_sae_kit.hooks import rewrite
from sdxl_sae_kit.judges import WorldJudge
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.studies import block_ranking
from sdxl_sae_kit.studies.block_ranking import OTHER_SEED, BlockRanking, rank_blocks

BLOCKS = ["up.0.1", "down.2.1", "up.2.resnet.0"]
ORDER = ("down.2.1", "up.0.1", "up.2.resnet.0")


@pytest.fixture(scope="module")
def prompts():
    return load_prompts("world", 5)


@pytest.fixture(scope="module")
def result(pipe, prompts, store) -> BlockRanking:
    return rank_blocks(pipe, prompts, blocks=BLOCKS, batch_size=2, store=store)


def drawn(pipe, prompts, seeds):
    batches = [slice(0, 2), slice(2, 4), slice(4, 5)]
    return np.concatenate([generate(pipe, prompts.texts[b], seeds[b], output_type="np") for b in batches])


@pytest.fixture(scope="module")
def expected(pipe, prompts):
    """The pictures, made without the study's code."""
    made = {"clean": drawn(pipe, prompts, prompts.seeds)}
    for block in ("down.2.1", "up.0.1"):
        with rewrite(pipe, {block: lambda update, call: update * 0}):
            made[block] = drawn(pipe, prompts, prompts.seeds)
    resnet = pipe.unet.up_blocks[2].resnets[0]
    handle = resnet.register_forward_hook(lambda module, args, out: module.conv_shortcut(args[0]))
    try:
        made["up.2.resnet.0"] = drawn(pipe, prompts, prompts.seeds)
    finally:
        handle.remove()
    return made


def test_distances_are_those_of_the_pictures_without_the_block(result, expected) -> None:
    judge = WorldJudge()
    for row in result.rows():
        changed = expected[row["block"]]
        assert row["pixel"] == pytest.approx(np.abs(changed - expected["clean"]).mean(), rel=1e-3, abs=1e-6)
        seen = judge.perceptual(expected["clean"], changed).mean()
        assert row["perceptual"] == pytest.approx(seen, rel=1e-2, abs=1e-5)


def test_factor_damage_is_the_share_of_images_to_which_the_answer_differs(result, expected) -> None:
    judge = WorldJudge()
    before = judge.factors(expected["clean"])
    assert [row["block"] for row in result.damage()] == list(ORDER)
    for row in result.damage():
        after = judge.factors(expected[row["block"]])
        shares = {f: np.mean(before[f].argmax(1) != after[f].argmax(1)) for f in before}
        assert {f: row[f] for f in shares} == pytest.approx(shares)
    assert max(row["shape"] for row in result.damage()) > 0
    for row in result.rows():
        damage = next(each for each in result.damage() if each["block"] == row["block"])
        assert row["share"] == max(share for share in damage.values() if not isinstance(share, str))
        assert damage[row["most changed"]] == row["share"]


def made_up(result, values: dict[str, list[float]], factor: list[int] = (0, 0, 0, 0)) -> BlockRanking:
    changed = {
        name: {"perceptual": list(v), "factors": {"shape": [0] * 4, "colour": list(factor)}}
        for name, v in values.items()
    }
    results = {"all": {"texts": ["a", "b", "c", "d"], "changed": changed}}
    blocks = tuple(name for name in values if name != OTHER_SEED)
    return replace(result, blocks=blocks, measures=("perceptual",), n_images=4, _results=results)


def test_the_largest_mean_ranks_first_and_ranks_that_never_change_are_certain(result) -> None:
    clear = made_up(result, {"x": [1, 2, 1, 2], "y": [9, 8, 9, 8], "z": [0.1, 0.2, 0.1, 0.2], OTHER_SEED: [1.2] * 4})
    assert [(row["block"], row["rank"], row["rank interval"]) for row in clear.rows()] == [
        ("y", 1, (1, 1)), ("x", 2, (2, 2)), ("z", 3, (3, 3)),
    ]  # fmt: skip
    assert clear.stability()["tau"] == pytest.approx(1)
    assert "2 of the blocks are worth more than that" in clear.sentence()
    unclear = made_up(result, {"x": [9, 0, 0, 0], "y": [0, 8, 0, 0], "z": [0, 0, 7, 0], OTHER_SEED: [1.0] * 4})
    assert {row["rank interval"] for row in unclear.rows()} == {(1, 3)}
    assert unclear.stability()["tau"] < 0.5


def test_the_most_changed_factor_and_the_yardstick_are_told(result) -> None:
    sentence = made_up(result, {"x": [1] * 4, "y": [2] * 4, OTHER_SEED: [3] * 4}, [1, 1, 1, 0]).sentence()
    assert "furthest at y 2.00 [2.00, 2.00], x" in sentence and "least at x" in sentence
    assert "y colour (75.0% [25.0%, 100.0%])" in sentence
    assert "is 3.00 [3.00, 3.00] away: 0 of the blocks" in sentence


def test_the_yardstick_is_another_picture_of_the_same_prompt(pipe, prompts, result, expected) -> None:
    other = drawn(pipe, prompts, [seed + block_ranking._FURTHER for seed in prompts.seeds])
    assert result.other_seed()["pixel"] == pytest.approx(np.abs(other - expected["clean"]).mean(), rel=1e-3)


def test_too_few_prompts_do_not_tell_how_stable_the_ranking_is(pipe, store) -> None:
    made = rank_blocks(pipe, ["a red circle"], blocks=BLOCKS[:2], judge=None, store=store)
    assert all(np.isnan(row["rank interval"]).all() for row in made.rows())
    assert "1 [–, –]" in made._repr_html_()
    assert np.isnan(made.stability()["tau"]) and "do not tell how stable" in made.sentence()
    assert made.measures == ("pixel",) and made.factors == () and "judge" not in made.sentence()
    assert made.plot().layout.meta["alt"] and "nan" not in made.sentence() + made._repr_html_().split("</style>")[1]
    with pytest.raises(KitError, match="no factors were judged here"):
        made.plot_damage()


def test_killed_it_goes_on_at_the_batch_in_hand_and_ends_the_same(pipe, prompts, result, tmp_path, monkeypatch) -> None:
    measure, calls = block_ranking._measure, []

    def dying(*arguments):
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(arguments)
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(block_ranking, "_measure", dying)
        killed = Forked(lambda: rank_blocks(pipe, prompts, blocks=BLOCKS, batch_size=2, store=tmp_path))
    assert killed.wait() == -signal.SIGKILL
    (lines,) = tmp_path.rglob("blocks.jsonl")
    assert lines.read_bytes().count(b"\n") == 2
    with lines.open("ab") as file:
        file.write(b'["images 4 to 4", {"texts": ["a ')  # what a kill in the middle of writing leaves

    def counted(*arguments):
        calls.append(list(arguments[1].texts))
        return measure(*arguments)

    monkeypatch.setattr(block_ranking, "_measure", counted)
    again = rank_blocks(pipe, prompts, blocks=BLOCKS, batch_size=2, store=tmp_path)
    assert calls == [[prompts.texts[4]]]
    assert again.artifact.digest == result.artifact.digest  # covers every byte of every file
    again.artifact.verify()


def test_any_steps_and_guidance_will_do(pipe, prompts, tmp_path) -> None:
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    made = rank_blocks(pipe, prompts[:1], blocks=BLOCKS[:2], store=tmp_path, **settings)
    with rewrite(pipe, {"up.0.1": lambda update, call: torch.zeros_like(update)}):
        without = generate(pipe, prompts.texts[:1], prompts.seeds[:1], output_type="np", **settings)
    clean = generate(pipe, prompts.texts[:1], prompts.seeds[:1], output_type="np", **settings)
    (row,) = (row for row in made.rows() if row["block"] == "up.0.1")
    assert row["pixel"] == pytest.approx(np.abs(without - clean).mean(), rel=1e-4)


def test_figures_say_in_words_what_they_show(result) -> None:
    first = result.rows()[0]
    assert f"{first['block']} {first['perceptual']:.3g} [" in result.plot().layout.meta["alt"]
    assert f"{len(result.factors)} columns" in result.plot_damage().layout.meta["alt"]
    assert {trace.name for trace in result.plot().data} == {"resnet", "transformer block"}


def test_prompts_are_shown_and_never_run(result) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    results = {name: r | {"texts": [nasty, *r["texts"][1:]]} for name, r in result._results.items()}
    page = read_safely(replace(result, _results=results)._repr_html_())
    assert nasty in page.text
    assert page.tags.count("img") == 1 + len(BLOCKS)


def test_what_cannot_be_ranked_is_refused(pipe, prompts, store, result, small_stats) -> None:
    with pytest.raises(HookpointError, match=r"No block 'up.0.l' .*Did you mean 'up.0.\d'\?"):
        rank_blocks(pipe, prompts, blocks=["up.0.l", "mid.0"], store=store)
    with pytest.raises(KitError, match="must name two blocks or more, each once"):
        rank_blocks(pipe, prompts, blocks=["mid.0", "mid.0"], store=store)
    with pytest.raises(PromptError, match="No prompts"):
        rank_blocks(pipe, [], store=store)
    with pytest.raises(KitError, match="guidance_scale must be a finite number"):
        rank_blocks(pipe, prompts, guidance_scale=-1.0, store=store)
    with pytest.raises(ArtifactError):
        BlockRanking.open(small_stats.artifact.folder)

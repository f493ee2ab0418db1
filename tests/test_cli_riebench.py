"""`riebench` on the command line: what is passed on, what is refused before any work, what is told."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.scales import load_scale
from sdxl_sae_kit.usual_saes import DECISIVE, UsualSAEs


@pytest.fixture
def bench_of(monkeypatch, tmp_path, pipe):
    """What was timed, collected, trained and measured, in order, instead of a long run: what it gives is made up."""

    def made(pipe=pipe, **facts):
        calls = []
        row = {"method": "sae", "k": 8, "strength": 2.0, "reached": 0.5, "reached interval": (0.25, 0.75)}
        none = {"method": "none", "k": None, "strength": 0.0, "reached": 0.0, "reached interval": (0.0, 0.1)}
        told = {
            "rows": lambda: [none, row],
            "scores": SimpleNamespace(measures=["reached"]),
            "n": 4,
            "failed": [{"item": "change pose 1", "kind": "change pose", "reason": "the mask is empty"}],
            "sentence": lambda: "4 items scored.",
            "to_json": lambda: {"format": "made up"},
            "artifact": SimpleNamespace(folder=tmp_path / "there"),
        }

        def stand_in(name, gives):
            return lambda *given, **more: calls.append((name, given, more)) or gives(*given)

        def trained(cache, configs):
            hookpoints = calls[-1][2]["hookpoints"]
            return {(h, n): SAE(config, 16, name=f"{n} at {h}") for h in hookpoints for n, config in configs.items()}

        monkeypatch.setattr("sdxl_sae_kit.pipelines.load_pipeline", lambda name: pipe)
        monkeypatch.setattr("sdxl_sae_kit.usual_saes.collect", stand_in("collect", lambda *_: "cache"))
        monkeypatch.setattr("sdxl_sae_kit.usual_saes.train", stand_in("train", trained))
        result = SimpleNamespace(**told | facts)
        monkeypatch.setattr("sdxl_sae_kit.studies.riebench.riebench", stand_in("riebench", lambda *_: result))
        monkeypatch.setattr(
            "sdxl_sae_kit.studies.riebench.time_drawing",
            lambda pipe, items, **draws: calls.append(("time", len(items), draws)) or len(items) / 10,
        )
        return calls

    return made


TURBO = {"num_inference_steps": 4, "guidance_scale": 0.0}


def test_riebench_passes_on_what_it_was_given_and_prints_rows_sentence_failures_and_folder(
    bench_of, tmp_path, pipe, capsys
):
    calls = bench_of()
    chosen = ["--saes", "k10", "--methods", "sae, random,", "--hookpoints", "up.1.0,down.2.1", "-n", "2", "--seed", "3"]
    kept = ["--store", str(tmp_path), "--batch-size", "5"]
    assert cli.main(["riebench", *chosen, *kept]) == 0
    assert [name for name, *_ in calls] == ["collect", "train", "riebench"]
    (_, (given_pipe, saes, items), settings) = calls[2]
    names = {hookpoint: sae.name for hookpoint, sae in saes.items()}
    assert given_pipe is pipe and names == {h: f"k10 at {h}" for h in ("up.1.0", "down.2.1")}
    assert len(items) == 18 and items[0].seed == 3
    assert settings == {"methods": ["sae", "random"], "seed": 3, "batch_size": 5, "store": tmp_path, **TURBO}
    assert calls[0][1][2] == DECISIVE, "what the notebook collects, which the store may have"
    said = capsys.readouterr().out
    assert "Means over 4 items" in said and "none    –  0.000" in said and "0.500 [0.250, 0.750]" in said
    assert "4 items scored." in said and "change pose 1  change pose  the mask is empty" in said
    assert said.endswith(f"{tmp_path / 'there'}\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_where_every_item_fails_riebench_says_why_and_tells_what_there_is(bench_of, tmp_path, capsys, as_json):
    bench_of(n=0, rows=None, sentence=None)
    assert cli.main(["riebench", "-n", "1", *["--json"] * as_json]) == 1
    said = capsys.readouterr()
    assert said.err == "KitError: Nothing could be scored: 1 item failed; the reasons are above.\n"
    if as_json:
        assert json.loads(said.out) == {"format": "made up"}
    else:
        assert "change pose 1  change pose  the mask is empty" in said.out and str(tmp_path / "there") in said.out


def test_riebench_collects_other_hookpoints_by_themselves_and_knows_module_paths(bench_of, capsys):
    calls = bench_of(failed=[])
    assert cli.main(["riebench", "--hookpoints", "up.0.0, unet.up_blocks.0.attentions.0,up.0.1", "-n", "1"]) == 0
    assert calls[0][1][2] == ["up.0.0", "up.0.1"] and list(calls[2][1][1]) == ["up.0.0", "up.0.1"]
    assert "Failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "arguments", "draws"),
    [
        ("tiny-turbo", [], TURBO),
        ("tiny-base", [], {"num_inference_steps": 10, "guidance_scale": 3.0}),
        ("tiny-base", ["--num-inference-steps", "7"], {"num_inference_steps": 7, "guidance_scale": 3.0}),
        ("tiny-turbo", ["--num-inference-steps", "1", "--guidance-scale", "2"],
         {"num_inference_steps": 1, "guidance_scale": 2.0}),
    ],
)  # fmt: skip
def test_riebench_draws_in_its_own_steps_or_as_a_guided_model_is_meant_to(
    bench_of, monkeypatch, model, arguments, draws
):
    calls = bench_of(pipe=load_pipeline(model))
    monkeypatch.setattr(UsualSAEs, "forecast", lambda *_: "nothing")
    assert cli.main(["riebench", "--model", model, "-n", "1", *arguments]) == 0
    assert {name: calls[2][2][name] for name in draws} == draws
    assert cli.main(["riebench", "--model", model, "-n", "1", "--plan", *arguments]) == 0
    assert calls[3] == ("time", 9, draws)


def test_riebench_plan_draws_one_batch_and_says_what_drawing_collecting_and_training_cost(bench_of, tmp_path, capsys):
    calls = bench_of()
    chosen = ["--plan", "-n", "2", "--methods", "sae", "--batch-size", "5", "--scale", "smoke"]
    assert cli.main(["riebench", *chosen, "--store", str(tmp_path)]) == 0
    assert calls == [("time", 5, TURBO)]
    drawing, _, collecting, training = capsys.readouterr().out.splitlines()
    assert drawing.startswith("18 items in 10 settings: 180 pictures in 4 step")
    assert drawing.endswith("each, about 1.5 minutes.")
    assert re.match(
        r"Updates to be collected before: 120 images, .* tokens, .*MB, about .* on this machine", collecting
    )
    assert training == "4 SAEs to be trained before, in 1 pass over the updates."


def test_a_plan_leaves_out_what_the_store_has(pipe, store, monkeypatch):
    """Collected and trained for a moment, with few prompts and one pass."""
    few = replace(load_scale("tiny-turbo", "smoke"), n_images=30)
    monkeypatch.setattr("sdxl_sae_kit.usual_saes.load_scale", lambda *_: few)
    saes = UsualSAEs("tiny-turbo", "smoke", "k10", store)
    assert saes.forecast(pipe, ["up.1.0"]).startswith("Updates to be collected before: 15 images")
    made = saes.make(pipe, ["up.1.0"])
    assert made["up.1.0"].k == 10 and made["up.1.0"].hookpoint == "up.1.0"
    assert saes.forecast(pipe, ["up.1.0"]) == "The SAEs are in the store."
    more = saes.forecast(pipe, ["up.1.0", "up.1.1"])
    assert re.fullmatch(r"1 SAE to be trained before, in 1 pass over the updates: \d+ steps? of 1,024 tokens\.", more)
    other = UsualSAEs("tiny-turbo", "smoke", "k5", store).forecast(pipe, ["up.1.0"])
    assert other.startswith("1 SAE to be trained before")
    assert saes.forecast(pipe, ["mid.0"]).startswith("Updates to be collected before")


REFUSED = [
    (["--saes", "k1"], "The scale 'demo' trains SAEs named k5, k10, k20-white, not 'k1'. Did you mean 'k10'?"),
    (["--items", "wrld"], "Did you mean 'world'?"),
    (["--methods", "sea"], "not 'sea'. Did you mean 'sae'?"),
    (["-n", "0"], "load_items: n must be an integer of at least 1, not 0"),
    (["--seed", "-1"], "load_items: seed must be an integer of at least 0, not -1"),
    (["--batch-size", "0"], "--batch-size must be an integer of at least 1, not 0"),
    (["--batch-size", "-3"], "--batch-size must be an integer of at least 1, not -3"),
    (["--hookpoints", "down.9,foo"], "No hookpoint 'down.9' in this U-Net"),
    (["--scale", "huge"], "SCALE is 'smoke' or 'demo', not 'huge'"),
    (["--num-inference-steps", "0"], "num_inference_steps must be an integer of at least 1, not 0"),
    (["--guidance-scale", "nan"], "guidance_scale must be a finite number from 0 on, not nan"),
]


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_riebench_cannot_do_is_one_line_before_any_work(bench_of, capsys, arguments, message, plan):
    calls = bench_of()
    small = [] if "-n" in arguments else ["-n", "1"]
    assert cli.main(["riebench", *small, *arguments, *plan]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not calls


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_what_finds_masks_and_judges_is_there_before_any_work(bench_of, monkeypatch, capsys, plan):
    def lacking():
        raise ModelError("LPIPS needs an extra: pip install 'sdxl-sae-kit[riebench]'.")

    calls = bench_of()
    monkeypatch.setattr("sdxl_sae_kit.grounding.GroundedSegmenter", lambda: "segmenter")
    monkeypatch.setattr("sdxl_sae_kit.similarity.ClipEmbed", lambda name: name)
    monkeypatch.setattr("sdxl_sae_kit.perceptual.Lpips", lacking)
    assert cli.main(["riebench", "--model", "stabilityai/sdxl-turbo", "-n", "1", *plan]) == 1
    assert "ModelError: LPIPS needs an extra" in capsys.readouterr().err and not calls


@pytest.mark.parametrize("option", ["--methods", "--hookpoints"])
@pytest.mark.parametrize("words", ["", " , ,"])
def test_of_names_by_commas_at_least_one_is_needed(bench_of, capsys, option, words):
    calls = bench_of()
    with pytest.raises(SystemExit) as left:
        cli.main(["riebench", option, words])
    assert left.value.code == 2 and not calls
    assert f"argument {option}: name at least one, several by commas" in capsys.readouterr().err

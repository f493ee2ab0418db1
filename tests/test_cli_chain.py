"""The main job by command: from prompts to what a feature causes, each step found by the next by its name."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.studies.results import Ablation

STEPS = {
    "collect": ["collect", "world", "-n", "60", "--hookpoints", "up.0.1"],
    "train": ["train", "tiny", "--lr", "3e-3", "--batch-size", "512", "--expansion", "2",
              "--config", "k5:k=5", "--config", "k8:k=8,auxk=16"],
    "measure": ["measure", "tiny-turbo_up.0.1_k8", "tiny"],
    "gallery": ["gallery", "export", "tiny", "--static", "3", "--out", "page.html"],
    "ablate": ["ablate", "saes/tiny-turbo_up.0.1_k8", "tiny", "--prompts-per-feature", "4", "--features", "1",
               "--doses=0"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("shell")


@pytest.fixture
def said(place, monkeypatch, capsys):
    """Run a step in the store that all share; returns what it printed."""
    monkeypatch.chdir(place)

    def run(step, *more):
        assert cli.main([*STEPS[step], *more, "--store", str(place / "store")]) == 0
        return capsys.readouterr().out

    return run


def test_from_prompts_to_causes(said, place):
    updates = json.loads(said("collect", "--json"))
    assert updates["images"] == 60 and Path(updates["folder"]).parent == place / "store" / "activations"

    saes = json.loads(said("train", "--json"))
    assert [(sae["config"], sae["l0"]) for sae in saes["saes"]] == [("k5", 5.0), ("k8", 8.0)]
    low, high = saes["saes"][1]["explained_variance_interval"]
    assert low <= saes["saes"][1]["explained_variance"] <= high and saes["stopped"] == {}
    assert said("train").splitlines()[-2:] == [sae["folder"] for sae in saes["saes"]]

    measured = json.loads(said("measure", "--json"))
    stats = FeatureStats.open(measured["folder"])
    assert stats.sae == saes["saes"][1]["name"] and measured["alive"] == len(stats.alive)
    assert measured["tokens"] == stats.n_tokens == 60 * 64 and measured["latents"] == stats.d_sae
    low, high = measured["mean_moran_interval"]
    assert low < measured["mean_moran"] < high and measured["mean_moran"] == pytest.approx(np.nanmean(stats.moran))
    assert measured["median_density"] == pytest.approx(np.median(stats.density[stats.density > 0]))
    assert measured["on_5_images"] == (np.round(stats.image_density * 60) >= 5).sum()

    page = Path(said("gallery").strip())
    text = page.read_text(encoding="utf-8")
    assert page == place / "page.html" and text.count("<article") == 3 and "Content-Security-Policy" in text
    assert "http://" not in text and "https://" not in text

    told = json.loads(said("ablate", "--json"))
    study = Ablation.open(told["folder"])
    assert told["overall"]["pixel"]["images"] == study.overall()["images"]
    assert told["sentence"] == study.sentence()


def test_a_plan_collects_nothing(said, place, capsys):
    before = sorted((place / "store").glob("*/*"))
    assert json.loads(said("collect", "--plan", "--json", "-n", "7"))["n_images"] == 7
    assert cli.main(["collect", "scenes", "-n", "9", "--model", "stabilityai/sdxl-turbo", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 images, ") and "on this machine" not in out, "weights that are not there are not timed"
    assert sorted((place / "store").glob("*/*")) == before


WRONG = [
    (["train", "tiny", "--epochs", "0"], "epochs must be an integer of at least 1, not 0"),
    (["train", "tiny", "-k", "0"], "SAEConfig: k must be an integer of at least 1, not 0"),
    (["train", "tinny"], "No folder 'tinny', and no such name in activations"),
    (["measure", "small_up.0.1_k9", "tiny"], "Did you mean 'small_up.0.1_k8'?"),
    (
        ["measure", "tiny", "small_up.0.1_k8"],
        "'tiny' names what is in activations; what is needed here is in saes.",
    ),
    (["measure", "{cache}", "{cache}"], "is one of the activations; what is needed here is one of the saes."),
    (["gallery", "export", "nothing"], "; nothing is there."),
    (["collect", "wrld", "-n", "3"], "wrld"),
    (["collect", "world", "-n", "3", "--hookpoints", "down.2.l"], "Did you mean 'down.2.1'?"),
    (["collect", "world", "-n", "3", "--model", "tiny-turbos"], "Did you mean 'tiny-turbo'?"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_one_line(small_cache, tmp_path, capsys, arguments, message):
    folder = small_cache.artifact.folder
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / folder.name).symlink_to(folder)
    for name in ("small_up.0.1_k8-00000000", "small_up.0.2_k8-00000000"):
        (tmp_path / "saes" / name).mkdir(parents=True)
    given = [each.format(cache=folder) for each in arguments]
    assert cli.main([*given, "--store", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.fixture
def stand_in(monkeypatch):
    """Let a study take what it takes, and say only what it was given."""

    def made(module, name, result):
        real, calls = getattr(__import__(module, fromlist=[name]), name), []

        def study(*given, **more):
            calls.append(inspect.signature(real).bind(*given, **more).arguments)
            return result

        study.__signature__ = inspect.signature(real)
        monkeypatch.setattr(f"{module}.{name}", study)
        return calls

    return made


def test_specialize_passes_on_saes_and_caches_and_tells_verdicts(stand_in, small_cache, small_saes, store, capsys):
    verdict = {"block": "up.0.1", "claim": "colour", "outcome": "undecided", "why": "too few"}
    result = SimpleNamespace(
        artifact=small_cache.artifact, verdicts=lambda: [verdict], sentence=lambda: "They differ.",
        information=[{"bits": 0.1}], rows=list,
    )  # fmt: skip
    calls = stand_in("sdxl_sae_kit.studies.specialization", "specialize", result)
    names = [sae.name for sae in small_saes.values()]
    more = ["--timing", small_cache.name, "--method", "ward", "--judge", "none", "--store", str(store.root)]
    assert cli.main(["specialize", *names, small_cache.name, *more]) == 0
    given = calls[0]
    assert [sae.name for sae in given["saes"]] == names and given["cache"].name == given["timing"].name
    assert (given["method"], given["judge"], given["features_per_block"]) == ("ward", None, 100)
    out = capsys.readouterr().out
    assert "up.0.1  colour  undecided" in out and out.endswith(f"They differ.\n{small_cache.artifact.folder}\n")


def test_generalize_passes_on_both_caches(stand_in, small_cache, small_saes, store, capsys):
    row = {"hookpoint": "up.0.1", "half": "cond", "who": "SAE", "explained variance": 0.9,
           "explained variance interval": (0.8, 0.95), "prompts": 12}  # fmt: skip
    result = SimpleNamespace(
        artifact=small_cache.artifact, summary=lambda: [row], turnover=list, sentence=lambda: "They hold."
    )
    calls = stand_in("sdxl_sae_kit.studies.generalization", "generalize", result)
    name = small_saes["up.0.1", "k8"].name
    caches = [small_cache.name, str(small_cache.artifact.folder)]
    assert cli.main(["generalize", name, *caches, "--own", name, "--store", str(store.root), "--json"]) == 0
    assert [sae.name for sae in (*calls[0]["saes"], *calls[0]["own"])] == [name, name]
    told = json.loads(capsys.readouterr().out)
    assert told["summary"][0]["explained variance interval"] == [0.8, 0.95] and told["sentence"] == "They hold."

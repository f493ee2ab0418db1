"""Slips of newcomers: a thing of the wrong kind is refused in words that say what to pass, and nothing is written."""

import inspect
from types import FunctionType, SimpleNamespace

import pytest

import sdxl_sae_kit as kit
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.cards import Subject
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.explorer import explore
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.galleries import gallery
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.label_tests import test_label
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.search import most_energetic
from sdxl_sae_kit.similarity import WorldEmbed, specificity
from sdxl_sae_kit.training import train


@pytest.fixture(scope="module")
def sae(small_saes):
    return small_saes["up.0.1", "k8"]


def asked() -> list[tuple[str, str]]:
    """Every public function with each argument it needs that is a pipeline or a thing of the kit's."""
    functions = {name: each for name in kit.__all__ if type(each := getattr(kit, name)) is FunctionType}
    kinds = {"SAE", "FeatureStats", "ActivationCache", "Activations", "LabelStore"}
    return [
        (name, p.name)
        for name, function in functions.items()
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty
        and (p.annotation in kinds or p.name in ("pipe", "saes"))
        and p.annotation != "Any | str"
    ]


@pytest.mark.parametrize(("name", "argument"), asked())
@pytest.mark.parametrize("given", [3, None, "up.0.1", ["up.0.1"], {("up.0.1", "k8"): 3}, kit.Store.at("nowhere")])
def test_every_public_function_refuses_another_kind_of_thing_in_words(name, argument, given):
    with pytest.raises(KitError, match=rf"^{name} takes \w+.*, not .*\w"):
        getattr(kit, name)(**{argument: given})


def test_lists_paths_and_stores_are_asked_for_by_name(unchecked_types):
    pipe = SimpleNamespace(unet=None)
    for slip, told in {
        lambda: kit.generate(pipe, 3, [0]): "generate takes a list as prompts, not 3",
        lambda: kit.rewrite(pipe, []): r"rewrite takes a mapping as edits, not \[\]",
        lambda: kit.read_edits(3): "read_edits takes a path or a text as path, not 3",
        lambda: kit.rank_blocks(pipe, ["a"], store=3): "rank_blocks takes a Store or .* as store, not 3",
        lambda: kit.Store.at(3): "store is a Store or the path of a folder, not 3",
        lambda: kit.FeatureStats.open(None): "open takes the path of an artifact's folder, .*, not None",
        lambda: kit.ActivationCache.open([]): "open takes the path of an artifact's folder",
    }.items():
        with pytest.raises(KitError, match=told):
            slip()


def test_what_is_right_passes_unchanged(pipe, small_stats, small_saes, sae):
    assert kit.most_energetic is kit.most_energetic
    assert kit.most_energetic(small_stats) == most_energetic(small_stats)
    assert inspect.signature(kit.steer) == inspect.signature(steer)
    for saes in (small_saes, [sae], (sae,), {"mine": sae}, sae, iter([sae])):
        with kit.replay(pipe, saes, []) as replayed:
            assert not replayed


@pytest.mark.parametrize("judge", [None, WorldEmbed()], ids=["default judge", "judge"])
def test_specificity_takes_statistics(sae, judge, unchecked_types):
    with pytest.raises(KitError, match="takes FeatureStats, as FeatureStats.measure gives, not a SAE"):
        specificity(sae, judge)


def test_statistics_are_measured_of_an_sae(small_stats, small_cache, unchecked_types):
    with pytest.raises(KitError, match=r"measure takes one SAE, such as saes\[.*\], not a FeatureStats"):
        FeatureStats.measure(small_stats, small_cache)


def test_explore_takes_a_pipeline_and_one_prompt(pipe, sae, unchecked_types):
    with pytest.raises(KitError, match=r"takes a pipeline, such as load_pipeline\('tiny-turbo'\) gives, not None"):
        explore(None, sae)
    with pytest.raises(KitError, match=r"explore draws one prompt, a text, not \['a red circle'\]"):
        explore(pipe, sae, ["a red circle"])


def test_an_sae_is_saved_as_a_file_and_loaded_from_a_path(sae, tmp_path, unchecked_types):
    with pytest.raises(KitError, match="saved as one file, and .* is a folder. Name a file in it"):
        sae.save(tmp_path)
    assert not list(tmp_path.iterdir())
    sae.save(tmp_path / "sae.safetensors")
    assert SAE.load(tmp_path).digest == sae.digest
    for nothing in (None, 3, sae):
        with pytest.raises(KitError, match="SAE.load takes the path of a file or folder, not"):
            SAE.load(nothing)


def test_labels_of_another_sae_are_refused_by_name(small_stats, tmp_path, unchecked_types):
    other = LabelStore.of("another_sae-0123abcd", tmp_path)
    other.set(0, "red")
    for refuse in (gallery, lambda stats, labels: test_label(stats, 0, labels=labels)):
        with pytest.raises(
            KitError, match=f"labels are of another_sae-0123abcd, but the statistics of {small_stats.sae}"
        ):
            refuse(small_stats, labels=other)
    anonymous = LabelStore(other.file)  # it may hold labels of any SAE
    assert Subject(small_stats, anonymous).labels.get(0) == "red"


def test_one_is_told_of_in_the_singular(small_cache, tmp_path, capsys):
    assert [counted(n, "SAEs") for n in (0, 1, 2, 5120)] == ["0 SAEs", "1 SAE", "2 SAEs", "5,120 SAEs"]
    saes = train(small_cache, SAEConfig(k=4, expansion=1), hookpoints=["up.0.1"], store=tmp_path)
    assert "Training 1 SAE at up.0.1" in capsys.readouterr().out
    assert repr(saes).startswith("1 trained SAE (measured")

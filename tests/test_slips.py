"""Slips of newcomers: a thing of the wrong kind is refused in words that say what to pass, and nothing is written."""

import importlib
import inspect
import os
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import sdxl_sae_kit as kit
from sdxl_sae_kit.amounts import counted
from sdxl_sae_kit.arguments import checked, is_sae
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
    with pytest.raises(KitError, match="specificity takes FeatureStats, such as .* as stats, not a SAE"):
        specificity(sae, judge)


def test_statistics_are_measured_of_an_sae(small_stats, small_cache, unchecked_types):
    with pytest.raises(KitError, match=r"measure takes one SAE, such as saes\[.*\] as sae, not a FeatureStats"):
        FeatureStats.measure(small_stats, small_cache)


def test_explore_takes_a_pipeline_and_one_prompt(pipe, sae, unchecked_types):
    with pytest.raises(
        KitError, match=r"explore takes a pipeline, such as load_pipeline\('tiny-turbo'\) gives as pipe, not None"
    ):
        explore(None, sae)
    with pytest.raises(KitError, match=r"explore takes a text as prompt, not \['a red circle'\]"):
        explore(pipe, sae, ["a red circle"])


def test_what_cannot_say_what_it_is_is_still_named(pipe, sae, unchecked_types):
    class Mute:
        def __repr__(self):
            raise RuntimeError("no words")

    for given, told in (([Mute()], "a list"), (["long"] * 99, "a list"), ("a" * 99, "a str"), (10**5000, "an int")):
        with pytest.raises(KitError, match=f"explore takes a pipeline, .* as pipe, not {told}"):
            explore(given, sae)


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


def functions():
    return [name for name in kit.__all__ if inspect.isfunction(getattr(kit, name))]


@pytest.mark.parametrize("name", functions())
def test_a_public_function_is_one_object_that_looks_at_its_arguments_and_pickles(name):
    function = getattr(kit, name)
    assert function is getattr(importlib.import_module(function.__module__), name)
    ForkingPickler.dumps(function)  # which refuses what its module does not have under its name
    if name not in ("plan", "stream"):  # which hand on to `collect` what they do not know
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'nonsense'"):
            function(nonsense=1)


def test_a_misspelt_keyword_is_named_with_the_function_and_the_nearest_one(unchecked_types):
    with pytest.raises(TypeError, match=r"^load_prompts\(\) got an unexpected .* 'sed'. Did you mean 'seed'\?"):
        kit.load_prompts("world", 3, sed=1)
    with pytest.raises(TypeError, match=r"load_prompts\(\) missing 1 required positional argument: 'source'"):
        kit.load_prompts(n=3)
    with pytest.raises(TypeError, match=r"load_prompts\(\) takes from 1 to 2 positional arguments but 3 were given"):
        kit.load_prompts("world", 3, 4)


def test_modules_around_an_sae_and_stand_ins_for_it_pass_if_they_answer_like_one(pipe, sae, unchecked_types):
    compiled, deaf = torch.compile(sae), torch.nn.DataParallel(sae)
    assert is_sae(compiled) and is_sae(Mock(spec=SAE)) and not is_sae(deaf) and not is_sae(torch.nn.Linear(1, 1))
    with steer(pipe, compiled, scale={3: 0.0}) as edit:
        assert edit.sae == sae.name
    with pytest.raises(KitError, match="not a DataParallel"), steer(pipe, deaf, scale={3: 0.0}):
        pass


class Pathlike(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


def test_whatever_names_a_path_is_one(sae, small_stats, tmp_path, unchecked_types):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    prompts = kit.load_prompts(Pathlike(tmp_path / "prompts.txt"))
    assert prompts.texts == kit.load_prompts(tmp_path / "prompts.txt").texts
    assert kit.open_artifact(Pathlike(small_stats.artifact.folder)).sae == small_stats.sae
    assert kit.Store.at(Pathlike(tmp_path)).root == tmp_path.resolve()
    sae.save(tmp_path / "sae.safetensors")
    assert SAE.load(Pathlike(tmp_path)).digest == sae.digest


def test_a_list_has_a_length_and_an_order(unchecked_types):
    @checked
    def take(things: "Sequence[str]") -> int:  # noqa: F821
        return len(things)

    assert [take(given) for given in (["a"], ("a",), "a", range(1), torch.zeros(1))] == [1] * 5
    for given in ({"a"}, frozenset("a"), iter("a"), (each for each in "a"), {"a": 1}, 3):
        with pytest.raises(KitError, match="take takes a list as things, not "):
            take(given)

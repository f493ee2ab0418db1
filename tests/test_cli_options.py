"""Options have the names and defaults of what they are passed to; every verb has help; shells can complete them."""

import argparse
import importlib
import inspect
import shutil
import subprocess

import pytest

from sdxl_sae_kit import __main__ as cli
from sdxl_sae_kit.commands.options import MODELS, SCALES
from sdxl_sae_kit.hookpoints import SDXL

PIPE = ("pipelines", "load_pipeline", {
    "name": "--model: as `report` calls it; its default is the embedded model, or the SAE's",
    "dtype": "--compute-dtype: `collect` has a dtype, which is how numbers are stored",
})  # fmt: skip
MADE = "the verb makes it from what it is given"
OBJECT = "an object that no text names"
JUDGE = "--judge: own stands for the default `...`, none for None, a CLIP's name for a judge made of it"
FUNCTIONS = {
    "collect": [
        ("collection", "collect", {"pipe": MADE, "prompts": MADE}), ("prompts", "load_prompts", {}), PIPE
    ],
    "train": [
        ("training", "train", {"data": "a cache, by name", "site": "a cache says it itself",
                               "configs": "--config: without it one SAE, of the options of `SAEConfig`"}),
        ("configs", "SAEConfig", {}),
    ],
    "measure": [("features", "FeatureStats.measure", {})],
    "gallery export": [("galleries", "gallery", {"similarity": OBJECT, "page_size": "one page holds all"})],
    "ablate": [("studies.ablation", "ablate", {"pipe": MADE, "judge": JUDGE}), PIPE],
    "specialize": [("studies.specialization", "specialize", {"pipe": MADE, "judge": JUDGE}), PIPE],
    "generalize": [("studies.generalization", "generalize", {})],
    "riebench": [
        ("studies.riebench", "riebench", {
            "pipe": MADE, "saes": MADE, "items": MADE, "segmenter": OBJECT, "judge": OBJECT,
            "methods": "None stands for all, so that help does not wait for the list",
            "by_block": "notebook 07 asks it", "spatial": "notebook 07 asks it",
        }),
        ("scales", "load_scale", {"model": "required there"}),
        ("items", "load_items", {"source": "--items: the default depends on the model"}),
    ],
    "report": [("reports", "report", {})],
    "notebooks": [("notebooks", "copy_notebooks", {})],
    "artifacts list": [("artifacts", "Store.at", {})],
    "artifacts verify": [("artifacts", "Store.at", {})],
    "artifacts gc": [("artifacts", "Store.at", {})],
    "tiny train": [("tiny.train", "train", {"recipe": OBJECT})],
    "tiny measure": [],
    "doctor": [("doctor", "diagnose", {})],
}  # fmt: skip
"""What each verb passes its options to, and which arguments are given otherwise, with the reason."""
ONLY_HERE = {
    ("collect", "source"), ("collect", "plan"),  # how prompts are named; `plan` instead of `collect`
    ("train", "cache"),  # the data
    ("measure", "device"),  # where the SAE lies, which `measure` sees
    ("gallery export", "out"),  # a file, where notebooks show it
    ("riebench", "items"), ("riebench", "hookpoints"), ("riebench", "plan"),  # what SAEs and items are made from
    ("artifacts gc", "delete"), ("artifacts gc", "unfinished"),
    ("tiny measure", "captions"), ("tiny measure", "folder"),  # it calls four functions
}  # fmt: skip


def verbs(parser=None, name=""):
    """Every verb's parser by its words."""
    parser = parser or cli._parser()
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {name: parser}
    return {
        words: leaf
        for verb, each in below[0].choices.items()
        for words, leaf in verbs(each, f"{name} {verb}".strip()).items()
    }


VERBS = verbs()


def options_of(verb):
    """Name → action of what is a verb's own."""
    return {action.dest: action for action in VERBS[verb]._actions if action.dest not in ("help", "json")}


def found(module, name):
    """A function of the kit, imported only now."""
    thing = importlib.import_module(f"sdxl_sae_kit.{module}")
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("verb", VERBS)
def test_options_have_the_names_and_defaults_of_the_functions(verb):
    options, passed = options_of(verb), set()
    for module, name, otherwise in FUNCTIONS[verb]:
        for parameter in inspect.signature(found(module, name)).parameters.values():
            passed.add(parameter.name)
            if parameter.name in otherwise:
                continue
            assert parameter.name in options, f"{name} has {parameter.name}, {verb} has not"
            default = options[parameter.name].default
            if default is not argparse.SUPPRESS:  # left to the function
                required = parameter.default is inspect.Parameter.empty
                assert plain(default) == (None if required else plain(parameter.default)), parameter.name
    given_otherwise = {"model", "compute_dtype"} if PIPE in FUNCTIONS[verb] else set()
    strange = options.keys() - passed - given_otherwise - {name for one, name in ONLY_HERE if one == verb}
    assert strange <= {"store"}, "an option that is passed to nothing"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_makes_and_every_option_what_it_is(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*verb.split(), "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and f"usage: sdxl-sae-kit {verb}" in said and "--json" in said
    assert VERBS[verb].description.endswith((".", "…"))
    assert all(action.help for action in VERBS[verb]._actions)


@pytest.mark.parametrize("group", ["gallery", "artifacts", "tiny"])
def test_groups_have_help(group, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([group, "--help"])
    assert left.value.code == 0 and f"usage: sdxl-sae-kit {group}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["collect"], ["collect", "world", "-n", "many"],
                                       ["train", "c", "--config", "k5:k=five"], ["train", "c", "--config", "k5:l=5"],
                                       ["train", "c", "--config", ""], ["train", "c", "--config", ":k=5"],
                                       ["--print-completion", "fish"],
                                       ["train", "c", "--subtract-b-dec", "maybe"],
                                       ["ablate", "s", "t", "--features", "1,x"],
                                       ["ablate", "s", "t", "--doses", ","]])  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and capsys.readouterr().out == ""


def test_an_sae_is_named_with_what_is_its_own():
    parse = cli._parser().parse_args
    said = parse(["train", "c", "--config", "a:k=none,kind=jumprelu", "--config", "b:prefixes=0.25,0.5,lr=3e-3"])
    assert said.configs == [("a", {"k": None, "kind": "jumprelu"}), ("b", {"prefixes": [0.25, 0.5], "lr": 3e-3})]
    assert parse(["train", "c", "--config", "plain"]).configs == [("plain", {})]


def completion(shell, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--print-completion", shell])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_script_is_one_its_shell_reads(shell, capsys):
    script = completion(shell, capsys)
    assert all(name in script for name in (*MODELS, *SCALES, *SDXL, "--hookpoints", "gallery"))
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sdxl-sae-kit col", {"collect"}),
        ("sdxl-sae-kit collect --model tiny-", {"tiny-turbo", "tiny-base"}),
        ("sdxl-sae-kit collect --hookpoints down.2.1,mid", {"down.2.1,mid.0"}),
        ("sdxl-sae-kit report --scale s", {"smoke"}),
        ("sdxl-sae-kit train x --kind jump", {"jumprelu"}),
    ],
)
def test_bash_completes(typed, offered, capsys):
    line = [*typed.split()]
    script = completion("bash", capsys)
    words = f"COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}"
    asks = f'{words}; _shtab_sdxl_sae_kit; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{asks}"], capture_output=True, text=True, cwd="/")
    assert set(done.stdout.split()) == offered, done.stderr

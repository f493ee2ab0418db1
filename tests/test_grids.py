"""Settings of the benchmark: the paper's grids at SDXL's size, each once, and nothing impossible."""

from __future__ import annotations

from itertools import product

import pytest

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.studies.grids import Forecast, forecast_riebench, settings_of
from sdxl_sae_kit.studies.transport import METHODS, Setting

BLOCKS = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
FEATURES, NEURONS = dict.fromkeys(BLOCKS, 5_120), dict.fromkeys(BLOCKS, 51_200)


def told(settings, method):
    return [(each.k, each.strength) for each in settings if each.method == method]


def test_the_grids_of_names_are_the_benchmarks() -> None:
    settings = settings_of(METHODS, FEATURES, NEURONS)
    assert settings[:2] == (Setting("none", None, 0.0, ()), Setting("prompt", None, 0.0, ()))
    for method in ("sae", "sae_adaptive"):
        assert told(settings, method) == list(product((80, 160, 320, 640), (1.0, 2.0)))
    assert told(settings, "steering") == [(None, strength) for strength in (0.25, 0.5, 1.0, 2.0)]
    assert told(settings, "neurons") == list(product((5_000, 10_000, 20_000, 40_000, 80_000), (1.0, 2.0)))
    assert told(settings, "random") == list(product((80, 160, 320, 640), (1.0, 2.0, 4.0, 8.0)))
    assert {each.blocks for each in settings[2:]} == {BLOCKS}
    assert len({each.key for each in settings}) == len(settings) == 48


def test_small_saes_have_no_setting_twice() -> None:
    settings = settings_of(["sae"], dict.fromkeys(BLOCKS, 16), NEURONS)
    assert told(settings, "sae") == list(product((1, 2), (1.0, 2.0)))  # a quarter and half of a feature are one


def test_own_grids_take_the_place_of_those_that_are_given_and_the_rest_stays() -> None:
    own = {"sae": {"k": [8]}, "prompt": {}, "steering": {"strength": [3]}, "random": {"k": [4, 2], "strength": [0.5]}}
    settings = settings_of(own, FEATURES, NEURONS)
    assert told(settings, "sae") == [(8, 1.0), (8, 2.0)] and told(settings, "steering") == [(None, 3.0)]
    assert told(settings, "random") == [(4, 0.5), (2, 0.5)] and told(settings, "prompt") == [(None, 0.0)]
    assert settings_of("sae", FEATURES, NEURONS) == settings_of(["sae", "none"], FEATURES, NEURONS)


@pytest.mark.parametrize(
    ("by_block", "there"), [(("sae", 80, 2), 4), (("steering", None, 1.0), 1), (("neurons", 7, 1), 0)]
)
def test_by_block_tries_all_blocks_each_alone_and_each_left_out_once(by_block, there) -> None:
    settings = settings_of({"sae": {"k": [80]}, "steering": {}}, FEATURES, NEURONS, by_block)
    whole = [each for each in settings if (each.method, each.k, each.strength) == by_block]
    alone = [(block,) for block in BLOCKS]
    without = [tuple(each for each in BLOCKS if each != block) for block in BLOCKS]
    assert sorted(each.blocks for each in whole) == sorted([BLOCKS, *alone, *without])
    two = {"mid.0": 5_120, "up.0.1": 5_120}
    settings = settings_of([], two, dict.fromkeys(two, 51_200), by_block)
    assert len(settings) == 2 + 3, "of two blocks, one left out is the other alone"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["steer"], r"methods are sae, .*, not 'steer'. Did you mean 'steering'\?"),
        (["sae", "sae"], "has one twice"),
        (None, "methods are names such as .* or a mapping, not None"),
        (5, "methods are names such as"),
        ({"sae": {"k": [[8]]}}, r"k of sae must be an integer of at least 1, not \[8\]"),
        ({"sae": [8]}, r"is a mapping such as \{'k': \[8, 16\]"),
        ({"sae": {"strengths": [1]}}, r"takes k and strength, no 'strengths'. .* Did you mean 'strength'\?"),
        ({"steering": {"k": [1]}}, "steering takes strength, no 'k'. Leave it out"),
        ({"sae": {"k": []}}, r"k of sae is a list of different numbers, such as \[8, 16\], not \[\]"),
        ({"sae": {"k": [4, 4]}}, "list of different numbers"),
        ({"sae": {"k": 4}}, "list of different numbers"),
        ({"sae": {"k": [0]}}, "k of sae must be an integer of at least 1, not 0"),
        ({"sae": {"k": [2.5]}}, "must be an integer"),
        ({"sae": {"k": [20_481]}}, "k of sae is at most 20,480, which is all that down.2.1, mid.0"),
        ({"neurons": {"k": [204_801]}}, "k of neurons is at most 204,800"),
        ({"sae": {"strength": [0]}}, "strength of sae is a finite number above 0, not 0"),
        ({"sae": {"strength": [float("inf")]}}, "finite number above 0"),
        ({"sae": {"strength": ["much"]}}, "finite number above 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(methods, message, unchecked_types) -> None:
    with pytest.raises(KitError, match=message):
        settings_of(methods, FEATURES, NEURONS)


@pytest.mark.parametrize(
    ("by_block", "message"),
    [
        (("sae", 5_121, 1), "k of sae is at most 5,120, which is all that down.2.1 have"),
        (("steering", 4, 1), "steering moves whole updates, so its k is None, not 4"),
        (("prompt", None, 1), "by_block is a method, k and strength, such as"),
        ("sae", "by_block is a method, k and strength, such as"),
    ],
)
def test_impossible_blocks_are_refused_by_name(by_block, message, unchecked_types) -> None:
    with pytest.raises(KitError, match=message):
        settings_of(["sae"], FEATURES, NEURONS, by_block)


def test_one_block_cannot_be_compared_with_others() -> None:
    with pytest.raises(KitError, match="by_block compares blocks, and there is only mid.0"):
        settings_of(["sae"], {"mid.0": 5_120}, {"mid.0": 51_200}, ("sae", 8, 1.0))


def test_the_forecast_multiplies_items_and_settings() -> None:
    forecast = forecast_riebench(296, by_block=("sae", 640, 2), seconds_per_picture=0.5)
    assert forecast == Forecast(296, 48 + 8, 4, 296 * 56 / 2) and forecast.n_pictures == 16_576
    assert str(forecast) == "296 items in 56 settings: 16,576 pictures in 4 steps each, about 2.3 hours."
    assert str(forecast_riebench(1, [])) == "1 item in 2 settings: 2 pictures in 4 steps each."


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        *(({"n_items": n}, "n_items must be an integer of at least 1") for n in ("296", None, -1, 1.5, True)),
        *(({"seconds_per_picture": s}, "seconds_per_picture is a finite number above 0") for s in ("0.5", -1, True)),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, not 0"),
        ({"hookpoints": []}, "hookpoints are one or more"),
        ({"hookpoints": ["up.0.l"]}, "SDXL has no hookpoint 'up.0.l', only .* Did you mean 'up.0"),
    ],
)
def test_a_forecast_of_what_cannot_be_is_refused(asked, message, unchecked_types) -> None:
    with pytest.raises(KitError, match=message):
        forecast_riebench(**{"n_items": 296} | asked)
    assert forecast_riebench(1, ["sae"], hookpoints="up.0.1").n_settings == 2 + 8

"""Targets: numbers of pictures, against what numpy and the judge's own probabilities say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.targets import FactorScore, RegionColour, Target
from sdxl_sae_kit.tiny.judge import load_judge


@pytest.fixture(scope="module")
def pictures(pipe):
    prompts = ["a large red circle on a gray background", "a large blue circle on a gray background"]
    return generate(pipe, prompts, [0, 1], output_type="pt")


@pytest.mark.parametrize(("factor", "value", "at"), [("colour", "red", 0), ("background", "teal", 4)])
def test_a_factors_score_is_the_log_odds_of_the_judges_probability(pictures, factor, value, at):
    pixels = (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    probability = load_judge().probabilities(pixels.numpy())[factor].astype(np.float64)
    others = np.delete(probability, at, axis=1).sum(axis=1)
    scores = FactorScore(factor, value)(pixels.permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(scores.numpy(), np.log(probability[:, at] / others), atol=1e-3)


def test_red_is_more_likely_in_the_red_picture_and_it_has_more_of_it(pictures):
    for target in (FactorScore("colour", "red"), RegionColour((1, -0.5, -0.5))):
        red, blue = target(pictures).tolist()
        assert red > blue and isinstance(target, Target)


def test_a_regions_colour_is_the_mean_over_its_pixels_along_the_direction(pictures):
    mask = np.zeros((64, 64))
    mask[10:30, 5:25], mask[30:32, 5:25] = 1, 0.5
    direction = np.array([2.0, -1.0, 0.5])
    along = np.einsum("icyx,c->iyx", pictures.numpy().astype(np.float64), direction / np.linalg.norm(direction))
    expected = (along * mask).sum((1, 2)) / mask.sum()
    np.testing.assert_allclose(RegionColour((2.0, -1.0, 0.5), mask)(pictures).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        RegionColour((2.0, -1.0, 0.5))(pictures).numpy(), along.mean((1, 2)), rtol=1e-5, atol=1e-7
    )
    left = RegionColour((0, 1, 0), [[1, 0]])(pictures)  # a mask of any size
    np.testing.assert_allclose(left.numpy(), pictures[:, 1, :, :32].mean((1, 2)).numpy(), rtol=1e-5)


def test_names_tell_targets_apart():
    masks = [None, np.eye(4), np.eye(4)[::-1]]
    names = {RegionColour((1, 0, 0), mask).name for mask in masks} | {RegionColour((0, 1, 0)).name}
    names |= {FactorScore("colour", value).name for value in ("red", "blue")}
    assert len(names) == 6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FactorScore("color", "red"), r"no factor 'color'; .*Did you mean 'colour'\?"),
        (lambda: FactorScore("colour", "rad"), r"no value of colour 'rad'; .*Did you mean 'red'\?"),
        (lambda: RegionColour((0, 0, 0)), "red, green, blue, not all 0"),
        (lambda: RegionColour((1, 0)), "red, green, blue"),
        (lambda: RegionColour((1, 0, 0), [1, 2]), "a 2-D mask"),
        (lambda: RegionColour((1, 0, 0), np.zeros((2, 2))), "not all 0"),
        (lambda: RegionColour((1, 0, 0), [[1, -1]]), "from 0 on"),
    ],
)
def test_what_cannot_be_read_is_refused(make, said, unchecked_types):
    with pytest.raises(KitError, match=said):
        make()


def test_pictures_of_another_size_are_refused(unchecked_types):
    with pytest.raises(KitError, match="64×64 pixels, not 96×32"):
        FactorScore("colour", "red")(torch.zeros(1, 3, 32, 96))

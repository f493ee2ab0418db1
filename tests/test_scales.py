"""The numbers the notebooks share."""

import pytest

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.scales import SCALES, load_scale


def test_the_demo_is_worth_looking_at_and_smoke_is_smaller():
    demo, smoke = load_scale("tiny-turbo"), load_scale("tiny-turbo", "smoke")
    assert demo.n_images >= 2000 > 10 * smoke.n_images / 2
    assert len(demo.configs) >= 2
    assert len(smoke.prompts()) == smoke.n_images
    assert smoke.prompts().factors[0]


def test_real_models_get_everyday_prompts():
    for scale in SCALES["real"]:
        assert load_scale("stabilityai/sdxl-turbo", scale).source == "scenes"


def test_an_unknown_scale_is_refused():
    with pytest.raises(KitError, match=r"SCALE is 'smoke' or 'demo', not 'dem'. Did you mean 'demo'\?"):
        load_scale("tiny-turbo", "dem")


def test_a_misspelt_model_is_refused_and_not_taken_for_a_real_one():
    with pytest.raises(ModelError, match=r"No model 'tiny-turb'.* Did you mean 'tiny-turbo'\?"):
        load_scale("tiny-turb")

"""Plans: what they say before is what is there afterwards."""

import pytest

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.plans import CollectionPlan, plan
from sdxl_sae_kit.prompts import load_prompts

PROMPTS = load_prompts("world", 80, seed=9)


@pytest.mark.parametrize(
    "settings",
    [
        {"images": None},
        {},
        {"images": "png"},
        {"tokens_per_image": 16, "images": None},
        {"num_inference_steps": 2, "steps": [1], "dtype": "float32", "images": None},
        {"guidance_scale": 3.0, "dtype": "bfloat16", "images": None},
    ],
)
def test_bytes_are_forecast_within_five_per_cent(pipe, tmp_path, settings):
    forecast = plan(pipe, PROMPTS, store=tmp_path, **settings)
    cache = collect(pipe, PROMPTS, store=tmp_path, **settings)
    assert forecast.nbytes == pytest.approx(cache.nbytes, rel=0.05)
    assert forecast.n_tokens == sum(cache.n_tokens(hookpoint) for hookpoint in cache.hookpoints)


def test_the_time_is_that_of_a_few_batches(pipe, tmp_path):
    few, many = (plan(pipe, n, ["mid.0"], images=None, store=tmp_path) for n in (100, 100_000))
    assert many.n_images == 100_000
    assert many.seconds > few.seconds > 0
    assert "on this machine" in str(few)
    assert not list(tmp_path.iterdir())


def test_the_papers_scale_is_forecast_without_its_weights(tmp_path):
    paper = plan("stabilityai/sdxl-turbo", 1_500_000, images=None, store=tmp_path)
    assert paper.n_tokens == 4 * 384_000_000
    assert paper.nbytes == pytest.approx(1_500_000 * 4 * 256 * 1280 * 2, rel=0.01)
    assert paper.nbytes_sampled == pytest.approx(paper.nbytes / 8, rel=0.03)
    assert paper.seconds is None
    base = plan("stabilityai/stable-diffusion-xl-base-1.0", 10, ["down.1.0"], images=None, store=tmp_path)
    assert base.nbytes == pytest.approx(10 * 20 * 2 * 64 * 64 * 640 * 2, rel=0.01)


def test_it_says_when_a_stream_is_the_better_way():
    large = CollectionPlan(10, 10, nbytes=4 * 10**12, free=10**11, nbytes_sampled=5 * 10**11)
    assert "It does not fit: 100 GB are free.\nKeep fewer tokens of each image (tokens_per_image=32" in str(large)
    assert "train online from stream()" in str(large)
    assert "Train online" in str(CollectionPlan(10, 10, 10**12, 10**11, nbytes_sampled=10**12))
    assert "fit" not in str(CollectionPlan(10, 10, 10**9, 10**11, nbytes_sampled=10**8, seconds=7200.0))
    assert "2 hours" in str(CollectionPlan(10, 10, 10**9, 10**11, nbytes_sampled=10**8, seconds=7200.0))


def test_names_that_it_does_not_know_are_refused():
    with pytest.raises(KitError, match="plan knows stabilityai/sdxl-turbo, .* not 'sdxl-turbo'. Pass the pipeline"):
        plan("sdxl-turbo", 10)
    with pytest.raises(KitError, match="SDXL has no hookpoint 'up.0.3'; it has .* Did you mean 'up.0.2'"):
        plan("stabilityai/sdxl-turbo", 10, ["up.0.3"])
    with pytest.raises(KitError, match="prompts must be an integer of at least 1, not 0"):
        plan("stabilityai/sdxl-turbo", 0)


def test_whole_pictures_are_counted_even_where_none_was_made(tmp_path):
    bare, small, whole = (
        plan("stabilityai/sdxl-turbo", 1000, ["unet.mid_block.attentions.0"], images=images, store=tmp_path).nbytes
        for images in (None, "thumbnails", "png")
    )
    assert bare + 1000 * 1000 < small < bare + 1000 * 10_000
    assert bare + 1000 * 200_000 < whole < bare + 1000 * 786_432


def test_plans_at_the_papers_scale_need_not_fit_in_few_shards(pipe, tmp_path):
    one_a_shard = plan("stabilityai/stable-diffusion-xl-base-1.0", 1_500_000, batch_size=1, store=tmp_path)
    assert one_a_shard.n_images == 1_500_000

"""Streams: the same updates as a cache, made on the way, within bounded memory and with nothing on disk."""

import numpy as np
import pytest
import torch

from sdxl_sae_kit import observation
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import HookpointError, KitError
from sdxl_sae_kit.pipelines import draw
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.streaming import stream
from sdxl_sae_kit.training import train

PROMPTS = load_prompts("world", 60, seed=3)


def rows(batches, hookpoint):
    """Tokens as a sorted array, so that sets of them can be compared."""
    tokens = torch.cat([batch[hookpoint] for batch in batches]).numpy()
    return tokens[np.lexsort(tokens.T)]


@pytest.mark.parametrize("settings", [{}, {"tokens_per_image": 5}, {"dtype": "bfloat16", "num_inference_steps": 2}])
def test_a_stream_reads_what_a_cache_reads(pipe, tmp_path, settings):
    cache = collect(pipe, PROMPTS, ["mid.0", "up.0.1"], batch_size=60, images=None, store=tmp_path, **settings)
    made = stream(pipe, PROMPTS, ["mid.0", "up.0.1"], batch_size=60, **settings)
    for hookpoint in made.hookpoints:
        assert torch.equal(made.read(hookpoint, range(60)), cache.read(hookpoint, range(60)))
        assert made.n_tokens(hookpoint, "train") == cache.n_tokens(hookpoint, "train")
    assert np.array_equal(made.images("held_out"), cache.images("held_out"))


def test_its_batches_hold_every_training_token_once_and_are_the_same_again(pipe):
    made = stream(pipe, PROMPTS, ["mid.0", "up.0.1"], batch_size=16, dtype="float32")
    batches = list(made.batches(["mid.0", "up.0.1"], 500, memory=2**18))
    assert [len(batch["mid.0"]) for batch in batches[:-1]] == [500] * (len(batches) - 1)
    expected = [{"mid.0": made.read("mid.0", made.images("train")).flatten(0, 2)}]
    assert np.allclose(rows(batches, "mid.0"), rows(expected, "mid.0"), atol=2e-3)
    again = list(made.batches(["mid.0", "up.0.1"], 500, memory=2**18))
    assert all(torch.equal(one["up.0.1"], other["up.0.1"]) for one, other in zip(batches, again, strict=True))
    other = next(made.batches(["mid.0", "up.0.1"], 500, epoch=1, memory=2**18))
    assert not torch.equal(batches[0]["mid.0"], other["mid.0"])


def test_it_runs_the_model_only_as_far_as_it_is_read(pipe, monkeypatch):
    drawn = []

    def counting(pipe, texts, seeds, **settings):
        drawn.extend(seeds)
        return draw(pipe, texts, seeds, **settings)

    monkeypatch.setattr(observation, "draw", counting)
    made = stream(pipe, PROMPTS, ["mid.0"], batch_size=8)
    next(made.batches(["mid.0"], 100, memory=600 * 96 * 2))
    assert len(drawn) == 16  # the first batch of images fills the buffer, the second pushes the first tokens out


def test_train_takes_a_stream_in_place_of_a_cache_and_writes_nothing_but_saes(pipe, tmp_path):
    made = stream(pipe, PROMPTS, ["mid.0"], batch_size=32)
    config = SAEConfig(k=8, expansion=2, lr=3e-3)
    settings = {"batch_size": 256, "epochs": 2, "store": tmp_path}
    saes = train(made, {"k8": config}, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"saes"}
    assert saes["mid.0", "k8"].metrics["explained_variance"] > 0.3
    assert saes["mid.0", "k8"].metrics["n_images"] == len(made.images("held_out"))
    again = train(stream(pipe, PROMPTS, ["mid.0"], batch_size=32), {"k8": config}, **settings)
    assert torch.equal(again["mid.0", "k8"].W_dec, saes["mid.0", "k8"].W_dec)


def test_mistakes_are_refused_at_once(pipe):
    with pytest.raises(HookpointError, match="Did you mean 'mid.0'"):
        stream(pipe, PROMPTS, ["mid.O"])
    with pytest.raises(KitError, match="steps must be denoising steps from 0 to 0, not"):
        stream(pipe, PROMPTS, steps=[3])
    with pytest.raises(KitError, match="half is 'cond' at guidance_scale 0, not 'uncond'"):
        stream(pipe, PROMPTS, half="uncond")
    with pytest.raises(HookpointError, match="has no updates of 'up.0.0'"):
        stream(pipe, PROMPTS, ["mid.0"]).read("up.0.0", [0])
    for wrong, complaint in [
        ({"images": "png"}, "no setting 'images' here"),
        ({"token_per_image": 3}, "no setting 'token_per_image' here.* Did you mean 'tokens_per_image'"),
        ({"height": 100_000}, "more than 8 times what tiny-turbo draws .64×64"),
    ]:
        with pytest.raises(KitError, match=complaint):
            stream(pipe, PROMPTS, ["mid.0"], **wrong)
    assert stream(pipe, PROMPTS, ["mid.0"], tokens_per_image=64).digest == stream(pipe, PROMPTS, ["mid.0"]).digest
    assert "ActivationStream stream-" in repr(stream(pipe, PROMPTS))

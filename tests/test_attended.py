"""Attention is what diffusers' own scores say, its hooks leave nothing behind; on the tiny model it tells a little."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from sdxl_sae_kit.attended import AttentionSegmenter, tokens_of
from sdxl_sae_kit.errors import HookpointError, KitError, ModelError
from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.items import load_items
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.segmenters import Segmenter, Shot, WorldSegmenter, find_masks
from sdxl_sae_kit.tiny.world import caption, sample_scene

PROMPTS = ["a large red star on a teal background", "a small blue heart on the left"]
WORDS, TOKENS = ["red star", "heart"], [[3, 4], [4]]  # after the token that starts a prompt


def drawn(pipe, prompts, **settings):
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0} | settings
    pictures = generate(pipe, prompts, list(range(len(prompts))), output_type="np", **settings)
    return [
        Shot(str(i), "original", p, i, x.astype(np.float32))
        for i, (p, x) in enumerate(zip(prompts, pictures, strict=True))
    ]


def scores(pipe, hookpoint, draw):
    """What diffusers' processor without fused attention computes in each layer and step."""
    layers = [block.attn2 for block in pipe.unet.get_submodule(resolve(pipe.unet, hookpoint).path).transformer_blocks]
    seen, before = [], [layer.processor for layer in layers]

    def noting(layer):
        def get_attention_scores(query, key, mask=None):
            found = type(layer).get_attention_scores(layer, query, key, mask)
            seen.append(found.unflatten(0, (-1, layer.heads)))
            return found

        return get_attention_scores

    for layer in layers:
        layer.set_processor(AttnProcessor())
        layer.get_attention_scores = noting(layer)
    try:
        draw()
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
            del layer.get_attention_scores
    return torch.stack(seen)  # (layer and step, shot, head, token, word)


@pytest.mark.parametrize("settings", [{}, {"num_inference_steps": 2, "guidance_scale": 3.0}])
def test_attention_is_what_diffusers_computes(pipe, settings):
    shots = drawn(pipe, PROMPTS, **settings)
    for hookpoint in ("up.0.1", "mid.0"):
        expected = scores(pipe, hookpoint, lambda: drawn(pipe, PROMPTS, **settings))[:, -2:].mean((0, 2))
        read = torch.stack([expected[i][:, tokens].mean(-1) for i, tokens in enumerate(TOKENS)])
        side = round(read.shape[1] ** 0.5)
        maps = F.interpolate(read.reshape(2, 1, side, side), (64, 64), mode="bilinear")[:, 0].numpy()
        found = AttentionSegmenter(pipe, [hookpoint], **settings).maps(shots, WORDS)
        assert found == pytest.approx(maps, abs=1e-5) and np.ptp(found) > 1e-3


def test_several_hookpoints_are_averaged_by_their_layers(pipe):
    shots, names = drawn(pipe, PROMPTS), ["down.2.1", "mid.0", "up.0.0"]
    each = [AttentionSegmenter(pipe, [name]).maps(shots, WORDS) for name in names]
    layers = [len(pipe.unet.get_submodule(resolve(pipe.unet, n).path).transformer_blocks) for n in names]
    assert AttentionSegmenter(pipe, names).maps(shots, WORDS) == pytest.approx(
        np.average(each, axis=0, weights=layers), abs=1e-6
    )


def test_a_mask_is_where_attention_reaches_the_share_of_its_range(pipe):
    shots = drawn(pipe, PROMPTS)
    for threshold in (0.3, 0.5, 1.0):
        segmenter = AttentionSegmenter(pipe, ["up.0.1"], threshold=threshold)
        for mask, attention in zip(segmenter(shots, WORDS), segmenter.maps(shots, WORDS), strict=True):
            share = (attention - attention.min()) / np.ptp(attention)
            assert mask.shape == (64, 64) and (mask == (share >= threshold - 1e-6)).mean() > 0.999
            assert mask.any() and not mask.all()


@pytest.fixture
def generated(monkeypatch):
    """The prompts of every call and what came of it."""
    calls = []

    def noting(pipe, prompts, seeds, **settings):
        calls.append((list(prompts), generate(pipe, prompts, seeds, **settings)))
        return calls[-1][1]

    monkeypatch.setattr("sdxl_sae_kit.attended.generate", noting)
    return calls


def test_nothing_stays_behind_and_the_picture_is_the_same(pipe, generated, monkeypatch):
    before, layers = drawn(pipe, PROMPTS), [m for m in pipe.unet.modules() if hasattr(m, "attn2")]
    segmenter = AttentionSegmenter(pipe)
    segmenter.maps(before, WORDS)
    assert np.array_equal(generated[0][1].astype(np.float32), np.stack([shot.picture for shot in before]))
    monkeypatch.setattr("sdxl_sae_kit.attended.generate", lambda *args, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segmenter.maps(before, WORDS)
    assert not any(layer.attn2._forward_pre_hooks for layer in layers)


def test_a_picture_is_drawn_once_and_few_at_once(pipe, generated):
    prompts = [*PROMPTS, "a green circle", "a red square", "a blue cross"]
    shots = drawn(pipe, prompts)
    words = ["star", "heart", "circle", "square", "cross"]
    expected = AttentionSegmenter(pipe, ["up.0.1"]).maps([*shots, shots[0]], [*words, "red"])
    found = AttentionSegmenter(pipe, ["up.0.1"], batch_size=2).maps([*shots, shots[0]], [*words, "red"])
    assert [asked for asked, _ in generated] == [prompts, prompts[:2], prompts[2:4], prompts[4:]]
    assert found == pytest.approx(expected, abs=1e-5) and np.abs(expected[0] - expected[5]).max() > 1e-3
    again = replace(shots[0], seed=1, picture=drawn(pipe, [PROMPTS[0]] * 2)[1].picture)
    AttentionSegmenter(pipe, ["up.0.1"]).maps([shots[0], again], ["star"] * 2)
    assert generated[-1][0] == [PROMPTS[0]] * 2


def test_words_are_looked_up_before_anything_is_drawn(pipe, generated):
    with pytest.raises(KitError, match="'whale'"):
        AttentionSegmenter(pipe, ["up.0.1"], batch_size=1).maps(drawn(pipe, PROMPTS), ["star", "whale"])
    assert not generated


@pytest.mark.parametrize("other", [{"num_inference_steps": 2}, {"guidance_scale": 3.0}])
def test_a_picture_that_was_made_otherwise_is_refused(pipe, other):
    shots = drawn(pipe, PROMPTS, **other)
    with pytest.raises(ModelError, match=r"item '0' \(original\) otherwise.*it draws with 4 steps and guidance 0"):
        AttentionSegmenter(pipe, ["up.0.1"])(shots, WORDS)
    rounded = [replace(shot, picture=(shot.picture * 255).round() / 255) for shot in shots]
    assert len(AttentionSegmenter(pipe, ["up.0.1"], **other)(rounded, WORDS)) == 2


def test_each_shot_is_found_as_it_is_alone(pipe):
    shots, segmenter = drawn(pipe, PROMPTS), AttentionSegmenter(pipe, ["up.0.1"])
    alone = [segmenter.maps([shot], [words])[0] for shot, words in zip(shots, WORDS, strict=True)]
    assert segmenter.maps(shots, WORDS) == pytest.approx(np.stack(alone), abs=1e-5)


def test_words_must_be_in_the_prompt(pipe):
    segmenter, shots = AttentionSegmenter(pipe, ["up.0.1"]), drawn(pipe, PROMPTS)
    for words in ("circle", "", "of the circle", "lue"):
        with pytest.raises(KitError, match=f"asked for {words!r}, and 'a small.* has none of these words"):
            segmenter(shots[1:], [words])
    long = drawn(pipe, ["a red star " * 10 + "on a teal background"])
    with pytest.raises(KitError, match="'teal', and 'a red.* has none of these words, as far as the model reads"):
        segmenter(long, ["teal"])


@pytest.fixture(scope="module")
def read(pipe):
    """What the words asked for of a prompt are read as; the tiny model's tokenizer, if it read long prompts."""
    tokenizer = deepcopy(pipe.tokenizer)
    tokenizer.model_max_length = 500

    def words_of(prompt, asked):
        ids = tokenizer(prompt).input_ids
        tokens = tokenizer.convert_ids_to_tokens([ids[at] for at in tokens_of(tokenizer, prompt, asked)])
        return "".join(tokens).replace("</w>", " ").strip()

    return words_of


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("laptop", "laptop"),
        ("Old Laptop", "old laptop"),
        ("laptop screen", "screen"),
        ("old screen", "screen"),
        ("the big old laptop", "old laptop"),
        ("window of the desk", "desk"),
        ("a desk", "a desk"),
        ("the desk", "desk"),
        ("foreground", "old laptop"),
    ],
)
def test_the_longest_run_of_the_words_counts_and_of_those_the_last(read, asked, words):
    assert read("an old laptop on a desk, with its screen off", asked) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of a pear on a blue plate", "pear"),
        ("a bottle of perfume among pink blossoms", "bottle perfume"),
        ("Portrait of a young chef, in a kitchen with a chef", "young chef"),
        ("a red star left of a blue star", "red star"),
        ("the sleeping hot-air balloon", "sleeping hot air balloon"),
    ],
)
def test_the_foreground_is_what_is_said_before_the_first_preposition(read, prompt, words):
    assert read(prompt, "foreground") == words
    with pytest.raises(KitError, match="asked for 'foreground', and 'on the table' has no subject"):
        read("on the table", "foreground")


def test_words_are_found_whole(read):
    assert read("a giant ant", "ant") == "ant"
    with pytest.raises(KitError, match="none of these words"):
        read("a giant", "ant")


def test_every_natural_item_can_be_answered(read):
    """In its own words; nothing that the rules ask of the segmenter is without an answer."""
    asked = []

    def noting(shots, words):
        asked.extend((shot.prompt, word, read(shot.prompt, word)) for shot, word in zip(shots, words, strict=True))
        return [np.eye(2, dtype=bool) for _ in shots]

    segmenter = type("Noting", (), {"name": "noting", "__call__": staticmethod(noting)})()
    items = load_items("natural")
    blank = np.zeros((2, 2, 3), dtype=np.float32)
    shots = [
        [Shot(item.name, side, getattr(item, side), item.seed, blank) for item in items]
        for side in ("original", "edited")
    ]
    told = find_masks(segmenter, items, *shots)
    assert [item.name for item, each in zip(items, told, strict=True) if isinstance(each, str)] == []
    assert len(asked) == 2 * (81 - 27) + 18  # style asks nothing, adding and deleting once
    for _, word, found in asked:
        assert found.replace(" - ", "-") == word


def test_every_occurrence_of_the_words_counts(pipe):
    shots, segmenter = drawn(pipe, ["a red star left of a blue star"]), AttentionSegmenter(pipe, ["up.0.1"])
    one, other = segmenter.maps(shots, ["red star"]), segmenter.maps(shots, ["blue star"])
    colours = segmenter.maps(shots, ["red"]), segmenter.maps(shots, ["blue"])
    assert segmenter.maps(shots, ["star"]) == pytest.approx(one + other - sum(colours) / 2, abs=1e-6)


def test_pictures_of_other_sizes_are_drawn_apart(pipe):
    segmenter = AttentionSegmenter(pipe, ["up.0.1"])
    small, wide = drawn(pipe, PROMPTS[:1])[0], drawn(pipe, PROMPTS[:1], width=96)[0]
    assert segmenter([wide], ["star"])[0].shape == (64, 96)
    with pytest.raises(KitError, match="one size at a time, not of 2 sizes"):
        segmenter([small, wide], ["star"] * 2)
    item = SimpleNamespace(kind="change pose", original_mask="star", edited_mask="star")
    ((one, other),) = find_masks(segmenter, [item], [small], [wide])
    assert one.shape == (64, 64) and other.shape == (64, 96)


def test_the_name_tells_the_model_and_the_settings(pipe, unchecked_types):
    names = {
        AttentionSegmenter(pipe).name, AttentionSegmenter(pipe, ["mid.0"]).name,
        AttentionSegmenter(pipe, threshold=0.4).name, AttentionSegmenter(pipe, num_inference_steps=1).name,
        AttentionSegmenter(pipe, guidance_scale=3.0).name,
    }  # fmt: skip
    assert len(names) == 5 and all("tiny-turbo" in name for name in names)
    assert isinstance(AttentionSegmenter(pipe), Segmenter)
    with pytest.raises(KitError, match="threshold is a share"):
        AttentionSegmenter(pipe, threshold=0.0)
    with pytest.raises(KitError, match="threshold is a share of the range, above 0 to 1, not '0.5'"):
        AttentionSegmenter(pipe, threshold="0.5")
    with pytest.raises(KitError, match="reads one hookpoint or more"):
        AttentionSegmenter(pipe, [])
    assert AttentionSegmenter(pipe, "up.0.1").name == AttentionSegmenter(pipe, ["up.0.1"]).name
    with pytest.raises(KitError, match="batch_size must be an integer of at least 1"):
        AttentionSegmenter(pipe, batch_size=0)
    with pytest.raises(HookpointError, match="No hookpoint .up.0.l."):
        AttentionSegmenter(pipe, ["up.0.l"])


def test_on_the_tiny_model_the_shapes_word_is_attended_to_on_the_shape_more_than_elsewhere(pipe):
    """Mean AUC of up.0.1 over 60 pictures: 0.82, and IoU 0.29 (0.20 with other pictures' masks): a weak segmenter."""
    rng = np.random.RandomState(0)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(20)) if not scene.relation][:12]
    shots = drawn(pipe, [caption(scene) for scene in scenes])
    shown = WorldSegmenter()(shots, ["object"] * len(shots))
    maps = AttentionSegmenter(pipe, ["up.0.1"]).maps(shots, [scene.shape for scene in scenes])

    def auc(attention, mask):
        return (attention[mask][:, None] > attention[~mask][None]).mean()

    told = [auc(attention, mask) for attention, mask in zip(maps, shown, strict=True)]
    others = [auc(attention, mask) for attention, mask in zip(maps, shown[1:] + shown[:1], strict=True)]
    assert np.mean(told) > 0.7 and np.mean(told) > np.mean(others)

"""Specificity against plain loops over pairs; intervals that know copies; CLIP against transformers' own steps."""

import io
import itertools
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_sae_kit import similarity
from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.similarity import ClipEmbed, Embed, WorldEmbed, embed_pictures, specificity, top_pictures
from sdxl_sae_kit.tiny.judge import load_judge


class Given:
    """A judge that knows each picture by its grey level, and counts what it is shown."""

    def __init__(self, rows, name="given"):
        self.rows, self.name, self.shown = np.asarray(rows, dtype=np.float32), name, 0

    def __call__(self, images):
        self.shown += len(images)
        return self.rows[[round(np.asarray(image).mean() / 2) for image in images]]


def webp(level, size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (2 * level,) * 3).save(file, "WEBP", lossless=True)
    return file.getvalue()


def made_up(strengths, folder, texts=None, size=(16, 16), cache="a cache", kept=12):
    """Just what similarity reads of FeatureStats: image i has grey level 2 i."""
    strengths = np.asarray(strengths, dtype=np.float32)
    n, d_sae = strengths.shape
    texts = texts or [f"prompt {i}" for i in range(n)]

    best = np.argsort(-strengths, axis=0)[:kept]
    top = np.where(np.take_along_axis(strengths, best, axis=0) > 1e-3, best, -1).T

    return Mock(
        spec=FeatureStats,
        sae="made up", hookpoint="mid.0", d_sae=d_sae, n_images=n, pictured=np.arange(n), top_images=top,
        artifact=Artifact(folder / "features" / "made-up-00000000", {"cache": cache}),
        prompts=Prompts(tuple(texts), tuple(range(n)), ({},) * n),
        alive=np.flatnonzero(strengths.max(axis=0) > 1e-3), thumbnail=lambda i: webp(i, size),
        thumbnails=lambda images: [webp(i, size) for i in images],
    )  # fmt: skip


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pairwise(rows):
    return float(np.mean([a @ b for a, b in itertools.combinations(rows, 2)]))


def test_specificity_is_the_mean_over_pairs_of_top_images(tmp_path, unchecked_types):
    rng = np.random.default_rng(0)
    strengths = rng.random((60, 9)) * (rng.random((60, 9)) < 0.5)
    strengths[:, 8], strengths[:, 7] = 0, 0
    strengths[:7, 7] = 1  # seven images are too few
    rows = unit(rng.normal(size=(60, 5)) + 0.4)
    found = specificity(made_up(strengths, tmp_path), Given(rows), n=10)
    for feature in range(7):
        top = [i for i in np.argsort(-strengths[:, feature])[:10] if strengths[i, feature] > 1e-3]
        assert found.value[feature] == pytest.approx(pairwise(rows[top]), abs=1e-5)
        assert found.n[feature] == len(top)
        assert found.low[feature] < found.value[feature] < found.high[feature]
    assert np.isnan([found.value[[7, 8]], found.low[[7, 8]], found.high[[7, 8]]]).all()
    assert found.n[[7, 8]].tolist() == [7, 0] and found.measured.tolist() == np.argsort(-found.value)[:7].tolist()


def test_images_of_one_prompt_count_once(tmp_path, unchecked_types):
    strengths = np.linspace(1, 0.1, 8)[:, None]
    texts = ["a", "a", "b", "b", "a", "c", "d", "a"]
    (top,) = top_pictures(made_up(strengths, tmp_path, texts), 3).values()
    assert top.tolist() == [0, 2, 5]


def test_the_bootstrap_never_pairs_an_image_with_its_copy(unchecked_types):
    different = np.eye(6, dtype=np.float32)[None]  # six images with nothing in common
    value, low, high = similarity._alike(different, similarity._draws(np.random.default_rng(0), 6))
    assert (value[0], low[0], high[0]) == (0, 0, 0)


def test_each_bootstrap_sample_is_what_loops_over_its_images_give(unchecked_types):
    rng = np.random.default_rng(1)
    rows, draws = unit(rng.normal(size=(5, 3)).astype(np.float32)), similarity._draws(rng, 5)[:40]
    expected = []
    for draw in draws.astype(int):
        images = np.repeat(np.arange(5), draw)
        expected.append(np.mean([rows[a] @ rows[b] for a in images for b in images if a != b]))
    _, low, high = similarity._alike(rows[None], draws)
    assert [low[0], high[0]] == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=1e-5)


@pytest.mark.parametrize("n", [similarity.MIN_IMAGES, 12])
def test_the_interval_covers_the_true_similarity_about_as_often_as_it_says(n, unchecked_types):
    rng, hits = np.random.default_rng(2), 0
    many = unit(rng.normal(size=(200_000, 4)) + 0.7)
    truth = float((many.mean(axis=0) ** 2).sum())  # of two independent images
    draws = similarity._draws(rng, n)
    for _ in range(200):
        _, low, high = similarity._alike(many[rng.integers(len(many), size=(1, n))].astype(np.float32), draws)
        hits += low[0] <= truth <= high[0]
    assert 0.84 <= hits / 200 <= 0.99


def test_random_sets_are_the_baseline_and_a_planted_feature_lies_above_it(tmp_path, unchecked_types):
    rng = np.random.default_rng(3)
    rows = unit(rng.normal(size=(100, 8)) + 0.5)
    strengths = rng.random((100, 41))
    rows[:15] = unit(rng.normal(size=(15, 8)) + 4 * np.eye(8)[0])
    strengths[:15, 40] += 1  # fires most on images that lie in one direction
    found = specificity(made_up(strengths, tmp_path), Given(rows))
    assert found.baseline == pytest.approx(pairwise(rows), abs=0.02)
    assert found.measured[0] == 40 and found.low[40] > found.baseline_interval[1]
    inside = (found.baseline_interval[0] <= found.value[:40]) & (found.value[:40] <= found.baseline_interval[1])
    assert 0.85 <= inside.mean() <= 1  # features that fire at random
    above = (found.low > found.chance).sum()
    assert f"The interval of {above} features lies above" in found.sentence() and 1 <= above <= 4
    assert "Judge: given." in found._repr_html_()


def test_each_feature_is_compared_with_random_sets_of_as_many_images(tmp_path, unchecked_types):
    rng = np.random.default_rng(5)
    rows, strengths = unit(rng.normal(size=(100, 8)) + 0.5), np.zeros((100, 30))
    for feature in range(30):  # fires at random, on 8 or 12 images
        strengths[rng.choice(100, 8 if feature < 15 else 12, replace=False), feature] = 1
    found = specificity(made_up(strengths, tmp_path), Given(rows))
    for few, size in ((slice(0, 15), 8), (slice(15, 30), 12)):
        sets = [pairwise(rows[rng.choice(100, size, replace=False)]) for _ in range(1500)]
        assert set(found.n[few]) == {size} and len(set(found.chance[few])) == 1
        assert found.chance[few][0] == pytest.approx(np.quantile(sets, 0.975), abs=0.015)
    assert found.chance[0] > found.chance[20] + 0.02 and found.chance[20] == pytest.approx(found.baseline_interval[1])
    between = found.low.copy()
    between[3] = (found.chance[0] + found.chance[20]) / 2  # above random sets of 12, but it has 8
    before = int((found.low > found.chance).sum())
    assert f"The interval of {before} features lies above" in replace(found, low=between).sentence()


@pytest.mark.parametrize("size", [8, 12])
def test_features_that_fire_at_random_hardly_ever_lie_above_random_sets(size, tmp_path, unchecked_types):
    rng = np.random.default_rng(6)
    rows, strengths = unit(rng.normal(size=(120, 4)) + 0.7), np.zeros((120, 400))
    for feature in range(400):
        strengths[rng.choice(120, size, replace=False), feature] = 1
    found = specificity(made_up(strengths, tmp_path), Given(rows))
    assert len(found.measured) == 400 and (found.low > found.chance).mean() <= 0.025


def test_too_few_kept_examples_are_told_apart_from_rare_features(tmp_path, unchecked_types):
    rows = unit(np.random.default_rng(7).normal(size=(40, 3)))
    with pytest.raises(KitError, match=r"keep 2 examples.* larger top, such as FeatureStats.measure\(.*top=12\)"):
        specificity(made_up(np.ones((40, 2)), tmp_path, kept=2), judge := Given(rows))
    assert not judge.shown
    rare = specificity(made_up(np.eye(40), tmp_path), Given(rows))
    assert rare.sentence() == "No feature has 8 images of different prompts."


def test_embeddings_are_kept_by_cache_pictures_and_judge(tmp_path, unchecked_types):
    rows = unit(np.random.default_rng(4).normal(size=(70, 3)))
    stats, judge = made_up(np.ones((70, 2)), tmp_path), Given(rows)
    assert embed_pictures(stats, judge) == pytest.approx(rows) and judge.shown == 70
    embed_pictures(made_up(np.eye(70), tmp_path), judge)
    assert judge.shown == 70  # loaded: another SAE on the same images
    for changed in (made_up(np.ones((70, 2)), tmp_path, cache="another"), made_up(np.ones((69, 2)), tmp_path)):
        before = judge.shown
        embed_pictures(changed, judge)
        assert judge.shown == before + len(changed.pictured)
    embed_pictures(stats, other := Given(rows, "another"))
    assert other.shown == 70  # another judge is another matter
    assert len(list((tmp_path / "studies").glob("embeddings_*/stamp.json"))) == 4


def test_where_only_some_pictures_are_kept_the_baseline_is_of_held_out_ones(tmp_path, unchecked_types):
    stats = made_up(np.ones((100, 2)), tmp_path)
    held_out = stats.prompts.held_out
    assert 5 < held_out.sum() < 50
    rows = np.where(held_out[:, None], [[1, 0]], unit(np.random.default_rng(0).normal(size=(100, 2))))
    assert similarity._random_sets(stats, rows.astype(np.float32), 5, np.random.default_rng(0))[0] < 0.9
    stats.n_images = 5000
    assert similarity._random_sets(stats, rows.astype(np.float32), 5, np.random.default_rng(0))[0] == pytest.approx(1)


def test_a_judge_must_be_named_where_the_world_judge_cannot_see(tmp_path, unchecked_types):
    stats = made_up(np.ones((4, 2)), tmp_path)
    with pytest.raises(KitError, match="16×16 pixels. Name a CLIP"):
        specificity(stats)
    stats.pictured = np.arange(0)
    with pytest.raises(KitError, match="No pictures are kept"):
        specificity(stats)
    with pytest.raises(KitError, match="embed is a judge such as"):
        specificity(stats, "clip")


# The embedded judge ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(small_cache):
    return [Image.open(io.BytesIO(small_cache.thumbnail(i))).convert("RGB") for i in range(70)]


def test_probabilities_are_what_verdicts_are_made_of(pictures):
    judge = load_judge()
    told, verdicts = judge.probabilities(pictures), judge.read(pictures)
    assert list(told) == list(verdicts.likeliest)
    for factor, each in told.items():
        assert each.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert each.max(axis=1) == pytest.approx(verdicts.confidence[factor], abs=1e-5)


def test_the_world_judge_compares_factor_by_factor(pictures):
    embed = WorldEmbed()
    assert isinstance(embed, Embed)
    rows = embed(pictures)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    told = load_judge().probabilities(pictures).values()
    expected = np.mean([np.sqrt(p[3] * p[4]).sum() for p in told])
    assert rows[3] @ rows[4] == pytest.approx(expected, abs=1e-5)


def test_pictures_that_share_factors_are_more_alike(small_cache, pictures):
    rows, known = WorldEmbed()(pictures), small_cache.prompts.factors
    shared, alike = [], []
    for a, b in itertools.combinations(range(len(pictures)), 2):
        shared.append(sum(known[a][f] == known[b][f] for f in known[a].keys() & known[b].keys()))
        alike.append(float(rows[a] @ rows[b]))
    assert np.corrcoef(shared, alike)[0, 1] > 0.3


def test_specificity_on_the_embedded_model(small_stats, small_cache):
    found = specificity(small_stats, store=small_stats.artifact.folder.parent.parent)
    assert found.judge.startswith("world judge") and found.value.shape == (small_stats.d_sae,)
    assert set(found.measured) <= set(small_stats.alive.tolist())
    rows = WorldEmbed()([Image.open(io.BytesIO(small_cache.thumbnail(i))).convert("RGB") for i in range(120)])
    for feature in found.measured[:5].tolist():
        top = {e.prompt: e.image for e in reversed(small_stats.examples(feature))}
        assert found.n[feature] == len(top)
        assert found.value[feature] == pytest.approx(pairwise(rows[list(top.values())]), abs=1e-3)
    assert found.baseline_interval[0] < found.baseline < found.baseline_interval[1]
    assert found.mean[1] > found.baseline  # even after a moment of training


# CLIP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, pipe):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    pipe.tokenizer.save_pretrained(folder)
    text = small | {
        "vocab_size": len(pipe.tokenizer), "max_position_embeddings": 16, "eos_token_id": pipe.tokenizer.eos_token_id
    }  # fmt: skip
    vision = small | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs():
    rng = np.random.default_rng(0)
    sizes = ((48, 75), (75, 48), (32, 32), (20, 31), (64, 64))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_images_pass_through_clip_as_transformers_passes_them(clip_folder, photographs):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor, model = CLIPImageProcessorPil.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
    seen = [processor(image, return_tensors="pt").pixel_values for image in photographs]
    with torch.no_grad():
        expected = model(pixel_values=torch.cat(seen), input_ids=torch.zeros(1, 3, dtype=torch.long)).image_embeds
    clip = ClipEmbed(clip_folder)
    assert isinstance(clip, Embed) and clip.name.startswith("CLIP ")
    assert clip(photographs) == pytest.approx(expected.numpy(), abs=2e-4)
    assert np.ptp(expected.numpy(), axis=0).max() > 0.01  # the pictures do differ


def test_texts_pass_through_clip_as_transformers_passes_them(clip_folder, pipe):
    from transformers import CLIPModel

    model, texts = CLIPModel.from_pretrained(clip_folder), ["a red circle", "a large blue star on a black background"]
    expected = []
    for text in texts:
        ids = torch.tensor([pipe.tokenizer(text).input_ids])
        with torch.no_grad():
            expected.append(model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds[0].numpy())
    assert ClipEmbed(clip_folder).texts(texts) == pytest.approx(np.stack(expected), abs=1e-4)
    assert ClipEmbed(clip_folder).texts(["red " * 100]).shape == (1, 24)  # cut


def test_another_clip_has_another_name(clip_folder, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder)
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert ClipEmbed(clip_folder).name.split()[-1] != ClipEmbed(tmp_path).name.split()[-1]


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a CLIP"):
        ClipEmbed(tmp_path)

"""Pictures and words reach Grounding DINO and SAM 2 as transformers' own processors send them; boxes become pixels.

The models are tiny and random: what is tested is the way to them and back. What they see is not.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.grounding import GroundedSegmenter
from sdxl_sae_kit.segmenters import Segmenter, Shot, find_masks

SAM_SIDE = 64
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WORDS = ["[PAD]", "[UNK]", "a", "black", "dog", "cat"]
PLACES = {101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}  # where Grounding DINO looks for what parts its words


def shot(height, width, item="1"):
    rng = np.random.default_rng(height * width)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    return Shot(item, "original", "a dog", 0, np.asarray(coarse, dtype=np.float32) / 255)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import BertConfig, BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    folder = tmp_path_factory.mktemp("dino")
    vocabulary = [PLACES.get(i, WORDS[i] if i < len(WORDS) else f"[unused{i}]") for i in range(1030)]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    bert = BertConfig(vocab_size=1030, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=9,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 192}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    return save_sam(tmp_path_factory.mktemp("sam"), video=False)


def save_sam(folder, video):
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2Model,
        Sam2VideoConfig,
        Sam2VideoModel,
        Sam2VisionConfig,
    )

    trunk = Sam2HieraDetConfig(
        hidden_size=8, image_size=[SAM_SIDE, SAM_SIDE], blocks_per_stage=[1, 1, 2, 1], num_attention_heads=1,
        embed_dim_per_stage=[8, 16, 24, 32], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=trunk, backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=16,
        backbone_feature_sizes=[[SAM_SIDE // n] * 2 for n in (4, 8, 16)],
    )  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SAM_SIDE, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16
    }  # fmt: skip
    parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    torch.manual_seed(1)
    if video:
        memory = {
            "memory_encoder_hidden_size": 16, "memory_encoder_output_channels": 16, "memory_attention_hidden_size": 16,
            "memory_attention_num_layers": 1, "memory_attention_num_attention_heads": 1,
            "memory_attention_feed_forward_hidden_size": 16, "memory_fuser_embed_dim": 16, "image_size": SAM_SIDE,
            "memory_fuser_intermediate_dim": 16, "mask_downsampler_embed_dim": 16,
        }  # fmt: skip
        Sam2VideoModel(Sam2VideoConfig(**parts, **memory)).save_pretrained(folder)
    else:
        Sam2Model(Sam2Config(**parts)).save_pretrained(folder)
    settings = {"size": {"height": SAM_SIDE, "width": SAM_SIDE}} | COLOURS
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def segmenter(dino_folder, sam_folder):
    return GroundedSegmenter(dino_folder, sam_folder, device="cpu")


def planted(monkeypatch, segmenter, boxes, probabilities):
    """Let Grounding DINO find these boxes (centre, size) with these probabilities; returns its calls and answer."""
    calls = []
    logits = torch.full((1, len(boxes), 256), -torch.inf)
    logits[0, :, 1] = torch.tensor(probabilities).logit()
    logits[0, :, 2] = torch.tensor(probabilities).logit() - 2
    answer = SimpleNamespace(logits=logits, pred_boxes=torch.tensor([boxes], dtype=torch.float32))
    monkeypatch.setattr(segmenter, "_dino", lambda **given: calls.append(given) or answer)
    return calls, answer


def test_dino_gets_what_its_own_processor_makes(segmenter, dino_folder, monkeypatch):
    from transformers import AutoTokenizer
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    processor = GroundingDinoImageProcessorPil.from_pretrained(dino_folder)
    calls, _ = planted(monkeypatch, segmenter, [[0.5, 0.5, 1, 1]], [0.1])
    sizes = (48, 75), (75, 48), (64, 64), (20, 90), (96, 32), (128, 128)
    for (height, width), words in zip(
        sizes, ["dog", "a black dog", "Dog.", " DOG ", "dog . ", "a cat. a dog."], strict=True
    ):
        segmenter([shot(height, width)], [words])
        image = Image.fromarray((shot(height, width).picture * 255).round().astype(np.uint8))
        expected = processor(image, return_tensors="pt")
        assert calls[-1]["pixel_values"].shape == expected["pixel_values"].shape, (height, width)
        assert torch.allclose(calls[-1]["pixel_values"], expected["pixel_values"], atol=0.02)
        assert torch.equal(calls[-1]["pixel_mask"], expected["pixel_mask"])
    tokens = AutoTokenizer.from_pretrained(dino_folder)
    said = [tokens.decode(call["input_ids"][0]) for call in calls]
    assert said == [f"[CLS] {text} [SEP]" for text in (
        "dog.", "a black dog.", "dog.", "dog.", "dog.", "a cat. a dog."
    )]  # fmt: skip
    assert calls[1]["input_ids"].tolist() == [[101, 2, 3, 4, 1012, 102]]
    assert all(call["token_type_ids"].sum() == 0 and call["attention_mask"].all() for call in calls)


def test_boxes_are_those_that_transformers_finds(segmenter, monkeypatch):
    from transformers.models.grounding_dino.processing_grounding_dino import GroundingDinoProcessor

    boxes = [[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.2, 0.2], [0.7, 0.3, 0.5, 0.1], [0.5, 0.5, 1.0, 1.0]]
    _, answer = planted(monkeypatch, segmenter, boxes, [0.9, 0.34, 0.36, 0.01])
    filled = []
    monkeypatch.setattr(
        segmenter, "_filled", lambda image, boxes: filled.append(boxes) or np.ones((50, 80), dtype=bool)
    )
    segmenter([shot(50, 80)], ["dog"])
    reader = SimpleNamespace(batch_decode=lambda ids: [])
    (theirs,) = GroundingDinoProcessor.post_process_grounded_object_detection(
        reader, answer, input_ids=[[0] * 256], threshold=0.35, target_sizes=[(50, 80)]
    )
    assert torch.allclose(filled[0] * torch.tensor([80, 50, 80, 50]), theirs["boxes"], atol=1e-4)
    assert filled[0].tolist() == [pytest.approx([0.4, 0.3, 0.6, 0.7]), pytest.approx([0.45, 0.25, 0.95, 0.35])]


def test_the_mask_is_what_sam_fills_of_every_box(segmenter, monkeypatch):
    planted(monkeypatch, segmenter, [[0.25, 0.5, 0.5, 1.0], [0.75, 0.25, 0.5, 0.5]], [0.9, 0.5])
    calls = []

    def sam(pixel_values, input_boxes, multimask_output):
        calls.append((pixel_values, input_boxes))
        assert not multimask_output
        side = SAM_SIDE // 4
        masks = torch.full((1, input_boxes.shape[1], 1, side, side), -1.0)
        for mask, (left, top, right, bottom) in zip(masks[0, :, 0], (input_boxes[0] / 4).round().int(), strict=True):
            mask[top:bottom, left:right] = 1.0
        return SimpleNamespace(pred_masks=masks)

    monkeypatch.setattr(segmenter, "_sam", sam)
    (mask,) = segmenter([shot(40, 100)], ["dog"])
    rows, columns = np.mgrid[:40, :100]
    assert (mask == ((columns < 50) | (rows < 20))).mean() > 0.998  # interpolation rounds a corner
    (pixels, boxes) = calls[0]
    assert boxes.tolist() == [[[0, 0, 32, 64], [32, 0, 64, 32]]]
    image = Image.fromarray((shot(40, 100).picture * 255).round().astype(np.uint8))
    scaled = np.asarray(image.resize((SAM_SIDE, SAM_SIDE), Image.Resampling.BILINEAR)) / 255
    expected = (scaled - COLOURS["image_mean"]) / COLOURS["image_std"]
    assert pixels[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)


def test_the_whole_way_gives_masks_of_the_pictures_sizes_and_again_the_same(segmenter, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.grounding.BOX_THRESHOLD", 0.0)
    shots, words = [shot(64, 64), shot(48, 80), shot(80, 48)], ["dog", "a black dog", "cat"]
    masks = segmenter(shots, words)
    assert [mask.shape for mask in masks] == [(64, 64), (48, 80), (80, 48)]
    assert all(0 < mask.mean() < 1 for mask in masks)  # else the rest would say little
    assert all((one == other).all() for one, other in zip(masks, segmenter(shots, words), strict=True))
    alone = segmenter(shots[1:2], words[1:2])
    assert (alone[0] == masks[1]).all()
    assert isinstance(segmenter, Segmenter)


def test_each_boxs_mask_is_what_sam_gives_for_it_alone(segmenter):
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.4, 0.2, 0.9, 0.8]])
    image = Image.fromarray((shot(48, 64).picture * 255).round().astype(np.uint8))
    alone = [segmenter._filled(image, box[None]) for box in boxes]
    assert (segmenter._filled(image, boxes) == np.any(alone, axis=0)).mean() > 0.999


def test_no_box_is_an_empty_mask_and_fails_the_item(segmenter, monkeypatch):
    planted(monkeypatch, segmenter, [[0.5, 0.5, 1, 1]], [0.35])
    assert not segmenter([shot(40, 50)], ["dog"])[0].any()
    item = SimpleNamespace(kind="change pose", original_mask="dog", edited_mask="~dog")
    (reason,) = find_masks(segmenter, [item], [shot(40, 50)], [shot(40, 50)])
    assert reason.startswith("the mask of the original picture is empty: Grounding DINO ") and "'dog'" in reason
    with pytest.raises(KitError, match="no words to look for"):
        segmenter([shot(40, 50)], [" . "])


def changed(folder, copy, **settings):
    """A copy whose pictures are prepared otherwise; None leaves a setting out."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    path = copy / "preprocessor_config.json"
    said = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return copy


@pytest.mark.parametrize("part", ["vision_encoder.neck.convs.0.weight", "mask_decoder.iou_token.weight"])
def test_other_weights_have_another_name(segmenter, dino_folder, sam_folder, tmp_path, part):
    from transformers import Sam2Model

    shutil.copytree(sam_folder, tmp_path, dirs_exist_ok=True)
    sam = Sam2Model.from_pretrained(sam_folder)
    sam.get_parameter(part).data.flatten()[0] += 1
    sam.save_pretrained(tmp_path)
    one, other = segmenter.name, GroundedSegmenter(dino_folder, tmp_path, device="cpu").name
    assert one.split(" + ")[0] == other.split(" + ")[0] and one.split()[-1] != other.split()[-1]


def test_pictures_prepared_otherwise_have_another_name_and_the_same_have_the_same(
    segmenter, dino_folder, sam_folder, tmp_path
):
    assert GroundedSegmenter(dino_folder, sam_folder, device="cpu").name == segmenter.name
    larger = changed(dino_folder, tmp_path, size={"shortest_edge": 130, "longest_edge": 192})
    other = GroundedSegmenter(larger, sam_folder, device="cpu").name
    (dino, sam), (changed_dino, same_sam) = segmenter.name.split(" + "), other.split(" + ")
    assert sam == same_sam and dino.split()[3] != changed_dino.split()[3]


def test_the_filter_and_the_range_of_colours_are_those_of_the_folder(sam_folder, dino_folder, tmp_path):
    folder = changed(sam_folder, tmp_path, resample=0, rescale_factor=0.5, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    image = Image.fromarray((shot(20, 30).picture * 255).round().astype(np.uint8))
    read = GroundedSegmenter(dino_folder, folder, device="cpu")._sam_input(image)[0].permute(1, 2, 0).numpy()
    at = (np.arange(SAM_SIDE) + 0.5) / SAM_SIDE
    nearest = np.asarray(image)[np.ix_((at * 20).astype(int), (at * 30).astype(int))]
    assert (read == nearest / 2).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_resize": False}, "do_resize False"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"do_center_crop": True}, "do_center_crop True"),
        ({"do_pad": True, "pad_size": {"height": 99, "width": 99}}, "pad_size {'height': 99"),
        ({"size": {"max_height": 64, "max_width": 64}}, "size is {'max_height': 64"),
        ({"resample": 99}, "99 is not a valid Resampling"),
        ({"image_std": None}, "image_std"),
    ],
)
def test_what_is_not_known_of_preparing_pictures_is_refused(sam_folder, dino_folder, tmp_path, settings, said):
    with pytest.raises(ModelError, match=f"cannot be loaded as a SAM 2 .*{said}"):
        GroundedSegmenter(dino_folder, changed(sam_folder, tmp_path, **settings), device="cpu")


def test_sam_gets_what_its_own_processor_makes(segmenter):
    """That processor needs torchvision."""
    pytest.importorskip("torchvision", exc_type=Exception)
    from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor

    processor = Sam2ImageProcessor(size={"height": SAM_SIDE, "width": SAM_SIDE}, **COLOURS)
    for height, width in ((48, 75), (200, 90), (64, 64)):
        image = Image.fromarray((shot(height, width).picture * 255).round().astype(np.uint8))
        expected = processor(image, return_tensors="pt")["pixel_values"]
        read = segmenter._sam_input(image)
        assert read.shape == expected.shape and torch.allclose(read, expected, atol=0.02)


def test_a_sam_saved_for_video_is_one_too(dino_folder, tmp_path):
    """The hub's SAM 2 are saved so."""
    segmenter = GroundedSegmenter(dino_folder, save_sam(tmp_path, video=True), device="cpu")
    image = Image.fromarray((shot(48, 64).picture * 255).round().astype(np.uint8))
    assert segmenter._filled(image, torch.tensor([[0.1, 0.1, 0.5, 0.5]])).shape == (48, 64)


def test_what_cannot_be_loaded_says_so(dino_folder, sam_folder, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a Grounding DINO.*Pass a folder with safetensors"):
        GroundedSegmenter(tmp_path, sam_folder, device="cpu")
    with pytest.raises(ModelError, match="cannot be loaded as a SAM 2"):
        GroundedSegmenter(dino_folder, tmp_path, device="cpu")
    with pytest.raises(ModelError, match="cannot be loaded as a (Grounding DINO|SAM 2)"):
        GroundedSegmenter(sam_folder, dino_folder, device="cpu")
    shutil.copytree(sam_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded as a SAM 2.*preprocessor_config.json"):
        GroundedSegmenter(dino_folder, tmp_path, device="cpu")

"""Models by name: they load quietly and offline, draw the same for the same seed, and say what is wrong."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch

from sdxl_sae_kit.errors import KitError, ModelError, PromptError, did_you_mean
from sdxl_sae_kit.pipelines import PRESETS, Model, describe, generate, load_pipeline
from sdxl_sae_kit.tiny import weights_folder

WEIGHTS = weights_folder("tiny-turbo")
PROMPTS = ["a large red circle on a black background", "a neon star", "a blue square left of a green heart"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def turbo():
    return load_pipeline("tiny-turbo", device="cpu")


@pytest.fixture(scope="module")
def base():
    return load_pipeline("tiny-base", device="cpu")


@pytest.fixture
def offline(monkeypatch):
    """Any use of the network fails as it does without one."""

    def refuse(*args, **settings):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def copy_of_weights(folder, index=None, unet=None):
    """A folder like the embedded one, with keys of its model_index.json and U-Net configuration replaced."""
    shutil.copytree(WEIGHTS, folder)
    for path, change in ((folder / "model_index.json", index), (folder / "unet" / "config.json", unet)):
        path.write_text(json.dumps(json.loads(path.read_text()) | (change or {})))
    return folder


# Drawing


@pytest.mark.parametrize(("name", "steps"), [("turbo", 1), ("turbo", 4), ("base", 2)])
def test_an_image_depends_on_its_prompt_and_seed_only(name, steps, request):
    pipe = request.getfixturevalue(name)
    settings = {"num_inference_steps": steps, "output_type": "pt"}
    together = generate(pipe, PROMPTS, [3, 4, 5], **settings)
    assert together.shape == (3, 3, 64, 64)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(pipe, [prompt], [3 + i], **settings)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    other_seed = generate(pipe, PROMPTS[:1], [9], **settings)
    assert (other_seed[0] - together[0]).abs().mean() > 0.01


def test_one_step_draws_what_it_is_told(turbo):
    prompts = ["a large red square on a white background", "a large blue square on a black background"]
    red, blue = generate(turbo, prompts, [0, 1], output_type="np")
    assert red[28:36, 28:36, 0].mean() > red[28:36, 28:36, 2].mean() + 0.2
    assert blue[28:36, 28:36, 2].mean() > blue[28:36, 28:36, 0].mean() + 0.2
    assert red[:4, :4].mean() > 0.8 and blue[:4, :4].mean() < 0.2


def test_timesteps_are_those_of_sdxl_turbo(turbo):
    for steps, expected in ((1, [999]), (4, [999, 749, 499, 249])):
        turbo.scheduler.set_timesteps(steps)
        assert turbo.scheduler.timesteps.tolist() == expected


def test_guidance_changes_tiny_base(base):
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    guided, plain = (generate(base, PROMPTS[:1], [0], guidance_scale=scale, **settings) for scale in (3.0, 0.0))
    assert (guided - plain).abs().mean() > 0.01


def test_generate_returns_pil_images_of_the_models_size(turbo):
    images = generate(turbo, PROMPTS[:1], [0])
    assert [image.size for image in images] == [(64, 64)]


@pytest.mark.parametrize(
    ("prompts", "seeds"), [([], []), (["a star"], []), (["a star"], [1, 2]), (np.array(["a star", "a disc"]), [1])]
)
def test_generate_needs_one_seed_per_prompt(turbo, prompts, seeds, unchecked_types):
    with pytest.raises(PromptError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
        generate(turbo, prompts, seeds)


def test_long_prompts_are_told_of_in_one_line(turbo, caplog):
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 24 tokens") as warned:
        generate(turbo, ["a red star " * 30, "a star"], [0, 1])
    assert [each.category for each in warned].count(UserWarning) == 1 and not caplog.records


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"height": 100}, "height must be a multiple of 8 of at least 8, not 100"),
        ({"guidance_scale": -1}, "guidance_scale must be a finite number from 0 on, not -1"),
        ({"output_type": "pill"}, "not 'pill'. Did you mean 'pil'"),
        ({"seeds": [1.5]}, "A seed is an integer, not 1.5"),
        ({"seeds": [2**63]}, f"A seed is from 0 to 2⁶³ − 1, not {2**63}"),
        ({"seeds": [-1]}, "A seed is from 0 to 2⁶³ − 1, not -1"),
    ],
)
def test_impossible_settings_are_refused(turbo, settings, complaint, unchecked_types):
    with pytest.raises(KitError, match=complaint):
        generate(turbo, ["a star"], **{"seeds": [0], **settings})


def test_a_name_is_no_pipeline():
    with pytest.raises(ModelError, match="takes a pipeline, such as load_pipeline"):
        describe("tiny-turbo")


# What is loaded


def test_blocks_are_where_sdxl_has_them(turbo):
    unet = turbo.unet
    blocks = [unet.down_blocks[2].attentions[1], unet.mid_block.attentions[0], *unet.up_blocks[0].attentions[:2]]
    assert all(type(block).__name__ == "Transformer2DModel" and block.use_linear_projection for block in blocks)
    assert {block.proj_out.out_features for block in blocks} == {96}
    assert type(turbo).__name__ == "StableDiffusionXLPipeline"


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.parent.rglob("*")) < 25e6


def test_describe_tells_presets_and_weights(turbo, base, tmp_path):
    model = describe(turbo)
    assert model == Model("tiny-turbo", model.revision, 1, 0.0, 64, 64)
    assert describe(base) == Model("tiny-base", describe(base).revision, 10, 3.0, 64, 64)
    assert describe(base).revision != model.revision
    same = copy_of_weights(tmp_path / "same")
    assert describe(load_pipeline(same, device="cpu")).num_inference_steps == 1
    weights = same / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert describe(load_pipeline(str(same), device="cpu")).revision != model.revision


def test_describe_reads_a_pipeline_made_elsewhere(turbo):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    parts = turbo.components | {"scheduler": EulerDiscreteScheduler()}
    parts["unet"] = type(turbo.unet).from_config(turbo.unet.config)
    made = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    assert describe(made) == Model("unnamed", "unknown", 20, 7.5, 64, 64)


def test_describe_knows_a_pipeline_made_of_anothers_components(turbo):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    made = StableDiffusionXLImg2ImgPipeline(**turbo.components, add_watermarker=False)
    assert describe(made) == describe(turbo)


def test_dtype_and_device_can_be_chosen():
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="fp16")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    image = generate(pipe, PROMPTS[:1], [0], output_type="np")
    exact = generate(load_pipeline("tiny-turbo", device="cpu", dtype=torch.float32), PROMPTS[:1], [0], output_type="np")
    assert np.abs(image - exact).mean() < 0.01


def test_hub_models_load_by_commit_and_only_after_a_look_at_them(monkeypatch, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = copy_of_weights(tmp_path / "snapshots" / COMMIT)
    downloads = []

    def download(name, **settings):
        downloads.append((name, settings))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(folder / file))
    monkeypatch.setattr(StableDiffusionXLPipeline, "download", download)
    pipe = load_pipeline("someone/finetune", device="cpu", revision="main")
    assert describe(pipe).revision == COMMIT
    assert downloads == [("someone/finetune", {"revision": COMMIT, "variant": None, "use_safetensors": True})]
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match="not SDXL-shaped"):
        load_pipeline("someone/finetune", device="cpu")
    assert len(downloads) == 1


def test_presets_of_the_real_models_are_the_papers():
    turbo, base = PRESETS["stabilityai/sdxl-turbo"], PRESETS["stabilityai/stable-diffusion-xl-base-1.0"]
    assert (turbo.num_inference_steps, turbo.guidance_scale) == (1, 0.0)
    assert (base.num_inference_steps, base.guidance_scale) == (20, 7.5)


# Quiet, quick, offline


def test_tiny_models_and_folders_need_no_network(offline, tmp_path):
    load_pipeline("tiny-turbo", device="cpu")
    load_pipeline("tiny-base", device="cpu")
    load_pipeline(copy_of_weights(tmp_path / "copy"), device="cpu")


def test_loading_and_drawing_are_quiet_and_importing_is_light():
    code = """
import sys
import sdxl_sae_kit.pipelines as pipelines
assert not {"diffusers", "transformers"} & sys.modules.keys()
for name in ("tiny-turbo", "tiny-base"):
    pipelines.generate(pipelines.load_pipeline(name), ["a star"], [0], num_inference_steps=2)
from diffusers.utils.logging import is_progress_bar_enabled
assert is_progress_bar_enabled()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_and_one_image_take_a_moment(turbo):
    start = time.process_time()
    generate(load_pipeline("tiny-turbo", device="cpu"), ["a star"], [0])
    assert time.process_time() - start < 1.5


# Errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-turb0", "No model 'tiny-turb0'.*Did you mean 'tiny-turbo'"),
        ("sdxl-turbo", "Did you mean 'stabilityai/sdxl-turbo'"),
        ("", "No model ''"),
        ("./nowhere", "There is no folder ./nowhere"),
        ("/nowhere/at/all", "There is no folder /nowhere/at/all"),
        (__file__, "is a file"),
    ],
)
def test_unknown_names_and_missing_folders(name, message, offline):
    with pytest.raises(ModelError, match=message):
        load_pipeline(name)


@pytest.mark.parametrize(
    ("index", "unet", "message"),
    [
        ({"text_encoder_2": [None, None], "_class_name": "StableDiffusionPipeline"}, {}, "no text_encoder_2"),
        ({}, {"addition_embed_type": None}, "addition_embed_type=None, not 'text_time'"),
        ({}, {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "down_block_types="),
    ],
)
def test_models_that_are_not_sdxl(index, unet, message, tmp_path):
    folder = copy_of_weights(tmp_path / "other", index, unet)
    with pytest.raises(ModelError, match=f"not SDXL-shaped: .*{message}"):
        load_pipeline(folder)


def test_folders_that_are_no_pipelines_or_are_damaged(tmp_path):
    with pytest.raises(ModelError, match="no model_index.json"):
        load_pipeline(tmp_path)
    folder = copy_of_weights(tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_pipeline(folder, device="cpu")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_pipeline(folder)


def test_no_network(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be reached.*'tiny-turbo', 'tiny-base'"):
        load_pipeline("stabilityai/sdxl-turbo")


def test_not_on_the_hub(monkeypatch):
    def not_found(*args, **settings):
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
        raise huggingface_hub.errors.RepositoryNotFoundError("not found", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_found)
    with pytest.raises(ModelError, match="Did you mean 'stabilityai/sdxl-turbo'"):
        load_pipeline("stabilityai/sdxl-turb0")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no diffusers pipeline 'what is/this'"):
        load_pipeline("what is/this")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "flaot16"}, "Did you mean 'float16'"),
        ({"dtype": torch.int8}, "No dtype 'torch.int8'"),
        ({"device": "cuad"}, "Did you mean 'cuda'"),
        ({"device": "cpu:x"}, "No device 'cpu:x'"),
        ({"device": "cuda:99"}, "'cuda:99' is not there"),
        ({"revision": "main"}, "Leave revision out"),
    ],
)
def test_devices_dtypes_and_revisions_that_cannot_be_had(settings, message):
    with pytest.raises(ModelError, match=message):
        load_pipeline("tiny-turbo", **settings)


def test_did_you_mean_is_silent_when_nothing_is_near():
    assert did_you_mean("TINY-TURBO", PRESETS) == " Did you mean 'tiny-turbo'?"
    assert did_you_mean("midjourney", PRESETS) == ""
    assert issubclass(ModelError, KitError)

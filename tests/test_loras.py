"""LoRAs: fused weights are base + B·A, the model's name and revision tell them apart, and misfits are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_sae_kit import loras
from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.pipelines import describe, generate, load_pipeline

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LoRA of every attention layer's queries and values, made by peft and saved by diffusers."""
    peft = pytest.importorskip("peft")
    pipe = load_pipeline("tiny-turbo", device="cpu")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made = tmp_path_factory.mktemp("loras") / "neon"
    layers, about = peft.get_peft_model_state_dict(pipe.unet), config.to_dict()
    type(pipe).save_lora_weights(made, unet_lora_layers=layers, unet_lora_adapter_metadata=about)
    return made


@pytest.fixture(scope="module")
def tuned(folder):
    return load_pipeline("tiny-turbo", device="cpu", lora=folder)


def test_weights_are_the_bases_and_the_product(pipe, tuned, folder):
    tensors = load_file(folder / loras.WEIGHTS)
    down, up = (tensors[f"unet.{PATH}.lora_{end}.weight"] for end in "AB")
    weight = pipe.unet.get_submodule(PATH).weight
    torch.testing.assert_close(tuned.unet.get_submodule(PATH).weight, weight + 8 / 4 * up @ down)
    assert not any("lora" in name for name, _ in tuned.unet.named_modules())
    same, other = (p.unet.get_submodule(PATH.replace("to_q", "to_k")).weight for p in (pipe, tuned))
    assert torch.equal(same, other)


def test_pictures_and_names_tell_them_apart(pipe, tuned, folder, tmp_path):
    images = [generate(each, ["a red circle"], [0], output_type="pt") for each in (pipe, tuned)]
    assert (images[0] - images[1]).abs().mean() > 0.01
    base, model = describe(pipe), describe(tuned)
    assert model == replace(base, name="tiny-turbo + neon", revision=model.revision)
    assert model.revision != base.revision and len(model.revision) == 12
    other = {name: tensor * 0.5 for name, tensor in load_file(folder / loras.WEIGHTS).items()}
    save_file(other, tmp_path / "weaker.safetensors")
    weaker = describe(load_pipeline("tiny-turbo", device="cpu", lora=str(tmp_path / "weaker.safetensors")))
    assert weaker.name == "tiny-turbo + weaker"
    assert weaker.revision not in (base.revision, model.revision)


def test_a_relative_path_is_called_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "neon" / "inner").mkdir(parents=True)
    (tmp_path / "neon" / loras.WEIGHTS).touch()
    monkeypatch.chdir(tmp_path / "neon" / "inner")
    assert [loras.label(name) for name in (".", "..", f"../{loras.WEIGHTS}")] == ["inner", "neon", "neon"]
    assert loras.label("owner/neon") == "owner/neon"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("./nowhere", "there is no such file or folder"),
        ("empty", r"the folder has none of \*.safetensors"),
        ("two", "the folder has a.safetensors, b.safetensors"),
        ("pickle.bin", "is no safetensors file"),
        ("strange.safetensors", "is no LoRA of this model"),
        ("wide.safetensors", "is no LoRA of this model"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, monkeypatch, name, complaint):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for place in ("two/a.safetensors", "two/b.safetensors", "strange.safetensors"):
        save_file({"weight": torch.zeros(2)}, tmp_path / place)
    ends = {"A": torch.zeros(4, 1280), "B": torch.zeros(1280, 4)}
    save_file({f"unet.{PATH}.lora_{end}.weight": each for end, each in ends.items()}, tmp_path / "wide.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=complaint):
        load_pipeline("tiny-turbo", device="cpu", lora=name if name.startswith(".") else tmp_path / name)


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(loras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'sdxl-sae-kit\[lora\]'"):
        loras.fuse(None, tmp_path / "a.safetensors")


def test_a_hub_id_that_cannot_be_had_says_so():
    with pytest.raises(ModelError, match="no pytorch_lora_weights.safetensors of it can be had"):
        loras.locate("nobody/nothing")

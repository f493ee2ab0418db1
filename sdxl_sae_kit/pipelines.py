"""Models by name: ordinary diffusers SDXL pipelines from this package, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import operator
import re
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdxl_sae_kit import loras
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.devices import choose_device, choose_dtype
from sdxl_sae_kit.errors import KitError, ModelError, PromptError, did_you_mean
from sdxl_sae_kit.tiny import NAMES as TINY_NAMES
from sdxl_sae_kit.tiny import weights_folder
from sdxl_sae_kit.tiny.quiet import hushed, quiet

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
else:
    StableDiffusionXLPipeline = Any  # importing diffusers takes seconds, which only those who load a model should pay

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SIZE_STEP = 8
"""diffusers draws SDXL at multiples of this many pixels."""


@dataclass(frozen=True)
class Preset:
    """How a model is meant to be used."""

    num_inference_steps: int
    guidance_scale: float
    """From 0; up to 1 is none."""
    variant: str | None = None
    """File name suffix of its half-precision weights on the hub, where it has them apart."""


TURBO, BASE = Preset(1, 0.0), Preset(20, 7.5)
PRESETS = {
    "tiny-turbo": TURBO,
    "tiny-base": Preset(10, 3.0),  # more steps draw the same
    "stabilityai/sdxl-turbo": Preset(1, 0.0, variant="fp16"),
    "stabilityai/stable-diffusion-xl-base-1.0": Preset(20, 7.5, variant="fp16"),
}


@dataclass(frozen=True)
class Model:
    """Which weights a pipeline holds and how it draws unless told otherwise."""

    name: str
    revision: str
    """The hub's commit, or the beginning of the sha256 of the folder's weights and configurations."""
    num_inference_steps: int
    guidance_scale: float
    """From 0; up to 1 is none."""
    height: int
    """In pixels, as is the width."""
    width: int


@checked
def load_pipeline(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    lora: str | Path | None = None,
) -> StableDiffusionXLPipeline:
    """Load an SDXL pipeline, ready to draw, with its progress bar off.

    Args:
        name: "tiny-turbo" or "tiny-base" (in this package, never on the network), a diffusers folder, or a hub id.
        device: "cuda", "cuda:1", "mps" or "cpu"; the first of them that is there if left out.
        dtype: "float16", "bfloat16" or "float32"; float16 if left out, but float32 on the CPU.
        revision: branch, tag or commit on the hub.
        lora: a safetensors file of LoRA weights, its folder or hub id, to be fused into the model's; needs the extra
            `lora`. The pipeline's model is then named "name + lora", with a revision of its own.

    Raises:
        ModelError: nothing is found under that name, it is no SDXL pipeline, the LoRA does not fit, or device or dtype
            cannot be had.

    >>> pipe = load_pipeline("tiny-turbo")
    >>> pipe("a large red circle", num_inference_steps=1, guidance_scale=0.0).images[0].size
    (64, 64)
    """
    name = name if isinstance(name, str) else Path(name)
    lora = lora if isinstance(lora, str | None) else Path(lora)
    device = choose_device(device)
    numbers = choose_dtype(dtype, device)
    local = local_folder(name)
    if local is not None and revision is not None:
        raise ModelError(f"revision={revision!r} is for models on the hub; {name} is local. Leave revision out.")
    weights = None if lora is None else loras.locate(lora)
    folder = local or _look_up(str(name), revision)
    _check_sdxl(str(name), folder)
    pipe = _load(str(name), folder, numbers, on_hub=local is None)
    pipe.set_progress_bar_config(disable=True)
    model = _model(pipe, str(name), _revision(folder))
    if lora is not None and weights is not None:
        revision = hashlib.sha256(f"{model.revision} {loras.fuse(pipe, weights)}".encode()).hexdigest()[:12]
        model = replace(model, name=f"{model.name} + {loras.label(lora)}", revision=revision)
    pipe.sdxl_sae_kit_model = pipe.unet.sdxl_sae_kit_model = model
    return pipe if device == "cpu" else pipe.to(device)


def describe(pipe: StableDiffusionXLPipeline) -> Model:
    """Return which model this is, as `load_pipeline` noted it or, for a pipeline made elsewhere, as it is configured.

    One made of another's components is of its model. Weights changed after loading (a LoRA set later, …) are not
    noticed: give `load_pipeline` its lora=.
    """
    if not hasattr(pipe, "unet"):
        raise ModelError(f"This takes a pipeline, such as load_pipeline('tiny-turbo') gives, not {pipe!r}.")
    noted: Model | None = getattr(pipe, "sdxl_sae_kit_model", None) or getattr(pipe.unet, "sdxl_sae_kit_model", None)
    if noted:
        return noted
    source = str(pipe.config.get("_name_or_path") or "unnamed")
    model = _model(pipe, source, _revision(Path(source)) if Path(source).is_dir() else "unknown")
    pipe.sdxl_sae_kit_model = pipe.unet.sdxl_sae_kit_model = model  # noted, because hashing gigabytes takes seconds
    return model


def scheduler(pipe: StableDiffusionXLPipeline) -> str:
    """The scheduler a pipeline has now, by class and the beginning of its configuration's sha256; it may be swapped."""
    settings = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    return f"{type(pipe.scheduler).__name__}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


@checked
def generate(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    output_type: str = "pil",
) -> Any:
    """Draw one image per prompt and seed in one batch; what is left out is as the model is meant to be used.

    Each image has its own CPU generator, so it depends on its prompt and seed and not on what it is drawn with. Steps
    are from 1, guidance from 0 (up to 1 is none), height and width in pixels, multiples of 8. Warns of prompts that are
    longer than what the model reads.

    Returns:
        A list of PIL images; with `output_type` "np" or "pt" an array (B, H, W, 3) or tensor (B, 3, H, W) from 0 to 1,
        with "latent" the VAE latents.

    Raises:
        PromptError: there are no prompts, not as many seeds as prompts, or a seed that is none.
        KitError: impossible steps, guidance or size, or no such output type.

    >>> generate(pipe, ["a red circle", "a blue star"], [0, 1])[1].save("star.png")                # doctest: +SKIP
    """
    if isinstance(prompts, str) or not hasattr(seeds, "__len__"):
        raise PromptError(
            f'generate takes lists, such as ["a red circle"] and [0]; it got prompts {prompts!r} and seeds {seeds!r}.'
        )
    if len(prompts) == 0 or len(prompts) != len(seeds):  # an array has no truth value
        raise PromptError(f"generate needs one seed per prompt; it got {len(prompts)} prompts and {len(seeds)} seeds.")
    model = describe(pipe)
    if output_type not in OUTPUT_TYPES:
        hint = did_you_mean(str(output_type), OUTPUT_TYPES)
        raise KitError(f"generate: output_type is {', '.join(OUTPUT_TYPES)}, not {output_type!r}.{hint}")
    settings = {
        "num_inference_steps": chosen("num_inference_steps", num_inference_steps, model.num_inference_steps),
        "guidance_scale": chosen_guidance(guidance_scale, model.guidance_scale),
        "height": chosen("height", height, model.height, SIZE_STEP),
        "width": chosen("width", width, model.width, SIZE_STEP),
        "output_type": output_type,
    }
    with hushed() if _warn_of_long(pipe, prompts) else nullcontext():
        return draw(pipe, prompts, seeds, **settings)


def draw(pipe: StableDiffusionXLPipeline, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> Any:
    """One call of the pipeline, each image with its own CPU generator; `settings` are the pipeline's.

    Raises KitError for a setting that the pipeline does not know: diffusers itself would ignore it.
    """
    known = inspect.signature(pipe.__call__).parameters.keys() - {"kwargs"}
    for name in settings.keys() - known:
        hint = did_you_mean(name, known)
        raise KitError(f"{type(pipe).__name__} takes no {name!r}, and would ignore it. Leave it out.{hint}")
    generators = [torch.Generator().manual_seed(_seed(seed)) for seed in seeds]
    return pipe(list(prompts), generator=generators, **settings).images


def _seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        raise PromptError(f"A seed is an integer, not {seed!r}.") from None
    if not 0 <= number < 2**63:
        raise PromptError(f"A seed is from 0 to 2⁶³ − 1, not {seed!r}.")
    return number


def count_long(pipe: StableDiffusionXLPipeline, prompts: Sequence[str]) -> int:
    """How many prompts have more tokens than the model reads, which cuts them there."""
    parts = (list(prompts[start : start + 1000]) for start in range(0, len(prompts), 1000))
    tokens = (ids for part in parts for ids in pipe.tokenizer(part, verbose=False).input_ids)
    return sum(len(ids) > pipe.tokenizer.model_max_length for ids in tokens)


def _warn_of_long(pipe: Any, prompts: Sequence[str]) -> bool:
    """Say in one line what the tokenizer and the pipeline would say in many; False if there is nothing to say."""
    if long := count_long(pipe, prompts):
        warnings.warn(
            f"{long} of {len(prompts)} prompts are longer than the {pipe.tokenizer.model_max_length} tokens that this "
            "model reads: cut there.",
            stacklevel=4,
        )
    return bool(long)


def chosen(name: str, value: int | None, default: int, multiple_of: int = 1) -> int:
    """A positive setting of `generate`, or the model's where it is None.

    Raises:
        KitError: it is no positive multiple.
    """
    return default if value is None else whole_number(name, value, least=multiple_of, multiple_of=multiple_of)


def chosen_guidance(value: float | None, default: float) -> float:
    """A guidance scale, or the model's where it is None.

    Raises:
        KitError: it is no finite number from 0 on.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise KitError(f"guidance_scale must be a finite number from 0 on, not {value!r}.")
    return float(value)


# Where a model is ---------------------------------------------------------------------------------------------------


def local_folder(name: str | Path) -> Path | None:
    """The folder that holds the model, or None where only the hub can tell.

    Raises:
        ModelError: it is neither a folder nor a name that the hub could know.
    """
    folder, text = Path(name).expanduser(), str(name)
    if name in TINY_NAMES:
        return weights_folder(text)
    if text and folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{text} is a file; load_pipeline takes a diffusers folder, such as save_pretrained writes.")
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"There is no folder {text}. Check the path, or pass a hub id or one of {_known()}.")
    if "/" not in text:
        raise ModelError(f"No model {text!r}; there are {_known()}, folders and hub ids.{did_you_mean(text, PRESETS)}")
    return None


def _look_up(name: str, revision: str | None) -> Path:
    """The folder of a hub model, so far only with what tells whether it is SDXL: the weights are gigabytes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(name, "model_index.json", revision=revision)).parent
        hf_hub_download(name, "unet/config.json", revision=folder.name)
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"There is no folder {name}, and the hub's {name!r} is not on this computer and cannot be reached. "
            f"Connect to the network, pass a folder, or use one of {_known(TINY_NAMES)}, which need none."
            f"{did_you_mean(name, [known for known in PRESETS if known != name])}"
        ) from error
    except (OSError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"There is no folder {name}, and the hub has no diffusers pipeline {name!r}{at} that you may read "
            f"({type(error).__name__}).{did_you_mean(name, PRESETS)}"
        ) from error
    return folder


def _known(names: Sequence[str] = tuple(PRESETS)) -> str:
    return ", ".join(map(repr, names))


# Whether it will do -------------------------------------------------------------------------------------------------

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline may name: any other module would be imported."""
COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
BLOCKS = {
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


def _check_sdxl(name: str, folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{name} is no diffusers pipeline: it has no model_index.json. Pass a folder that save_pretrained wrote."
        )
    index, unet = _read(folder / "model_index.json"), _read(folder / "unet" / "config.json")
    named = {part: told[0] for part, told in index.items() if isinstance(told, list) and told}
    if foreign := sorted(part for part, library in named.items() if library not in (None, *LIBRARIES)):
        raise ModelError(
            f"{name} wants {', '.join(foreign)} from {named[foreign[0]]!r}: code that may have come with it, and is "
            f"not run. Pass a model whose parts are all of {' and '.join(LIBRARIES)}."
        )
    missing = [part for part in COMPONENTS if not (index.get(part) or [None])[0]]
    different = [f"{key}={unet.get(key)!r}, not {value!r}" for key, value in BLOCKS.items() if unet.get(key) != value]
    if missing or different:
        lacks = [f"it has no {', '.join(missing)}"] if missing else []
        differs = [f"its U-Net has {'; '.join(different)}"] if different else []
        raise ModelError(
            f"{name} is a {index.get('_class_name')}, not SDXL-shaped: {' and '.join(lacks + differs)}. "
            f"Pass SDXL, one of its fine-tunes, or one of {_known()}."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Save or download the pipeline again.") from error
    return content if isinstance(content, dict) else {}


# Loading and describing it ------------------------------------------------------------------------------------------


def _load(name: str, folder: Path, dtype: torch.dtype, on_hub: bool) -> Any:
    half = PRESETS[name].variant if name in PRESETS and dtype != torch.float32 else _only_variant(folder)
    settings = {"variant": half, "use_safetensors": True}  # never a pickle, which runs code on loading
    with quiet():
        from diffusers import StableDiffusionXLPipeline
    try:
        if on_hub:
            StableDiffusionXLPipeline.download(name, revision=folder.name, **settings)
        with quiet():
            return StableDiffusionXLPipeline.from_pretrained(
                folder, dtype=dtype, local_files_only=True, add_watermarker=False, **settings
            )
    except Exception as error:  # diffusers has no error of its own: a damaged folder raises whatever it trips over
        raise ModelError(f"{name} could not be loaded from {folder}: {error} Save or download it again.") from error


def _only_variant(folder: Path) -> str | None:
    """The file name suffix of a folder that holds nothing but half-precision weights."""
    names = [path.name for path in folder.glob("unet/*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _model(pipe: Any, name: str, revision: str) -> Model:
    scheduler = pipe.scheduler.config
    few_steps = type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    turbo_like = "turbo" in name.lower() or (few_steps and scheduler.get("timestep_spacing") == "trailing")
    preset = PRESETS.get(name, TURBO if turbo_like else BASE)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor  # what it was trained for
    return Model(name, revision, preset.num_inference_steps, preset.guidance_scale, size, size)


def _revision(folder: Path) -> str:
    """The commit that a folder of the hub's cache is named after, or a digest of weights and configurations."""
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/*.safetensors")]):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]

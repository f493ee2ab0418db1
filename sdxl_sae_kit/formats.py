"""SAEs in the files of other tools, read and written.

Whatever a tool calls its parts, they come down to one form; norm and denorm act on each token:

h  = (norm(x) − b_pre) W_enc + b_enc     b_pre is b_dec, or zero
z  = relu(h) where h is among the k largest of its token, else 0          (topk)
z  = h where h > threshold, else 0                                        (jumprelu, threshold ≥ 0)
x̂ = denorm(z W_dec + b_dec)

A relu is a jumprelu with threshold 0, BatchTopK at inference one with the same threshold everywhere, and a gated
encoder one too, since its two paths share their weights. What does not come to this form exactly is refused by name,
and so is any setting or tensor that is not known: a wrong guess would still give plausible numbers.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from sdxl_sae_kit.errors import ArtifactError, did_you_mean
from sdxl_sae_kit.files import hash_file, write_atomically
from sdxl_sae_kit.untrusted import load_plain

FORMATS = ("sdxl-unbox", "saelens", "dictionary_learning", "sparsify")
"""The tools; steerers writes the first one's files, SAeUron the last one's. None tells updates from outputs."""

# The tools' words: names, and where they differ shapes, with d for d_in and n for d_sae
_NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "latent_bias": "b_enc", "gate_bias": "b_gate",
    "decoder.weight": "W_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec", "mag_bias": "b_mag",
    "bias": "b_dec", "pre_bias": "b_dec",
}  # fmt: skip
_PLAIN = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d"}
_LINEAR = {"encoder.weight": "nd", "decoder.weight": "dn"}
_UNBOX = {**_LINEAR, "pre_bias": "d", "latent_bias": "n"}
_SPARSIFY = {"encoder.weight": "nd", "encoder.bias": "n", "W_dec": "nd", "b_dec": "d"}
_SAELENS = {"standard": _PLAIN, "topk": _PLAIN, "jumprelu": {**_PLAIN, "threshold": "n"}}
_SAELENS["gated"] = {"W_enc": "dn", "W_dec": "nd", "b_dec": "d", "b_gate": "n", "b_mag": "n", "r_mag": "n"}
_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
_DICTIONARIES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "encoder.bias": "n", "bias": "d"},
    "AutoEncoderNew": {**_LINEAR, "encoder.bias": "n", "decoder.bias": "d"},
    "AutoEncoderTopK": {**_LINEAR, "encoder.bias": "n", "b_dec": "d"},
    "BatchTopKSAE": {**_LINEAR, "encoder.bias": "n", "b_dec": "d", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": ""},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "n"},
    "GatedAutoEncoder": {**_LINEAR, "r_mag": "n", "gate_bias": "n", "mag_bias": "n", "decoder_bias": "d"},
}
_TRAINER = """trainer_class k target_l0 lr steps seed device layer lm_name wandb_name submodule_name auxk_alpha
    warmup_steps decay_start threshold_beta threshold_start_step top_k_aux group_fractions group_weights group_sizes
    l1_penalty lambda_warm_steps sparsity_function sparsity_penalty sparsity_warmup_steps sparsity_queue_length
    n_sparsity_updates p_start p_end anneal_start resample_steps bandwidth"""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An SAE as plain data, whichever tool wrote it; this module's page has the formulas with W_enc, b_enc and b_dec.

    Raises:
        ArtifactError: the k of a topk SAE is not between 1 and d_sae.
    """

    kind: Literal["topk", "jumprelu"]
    k: int | None
    """Active latents per token (topk); the mean that training aimed at, None if the file does not say (jumprelu)."""
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    """Rows are as the file has them, not made unit."""
    b_dec: Float[Tensor, "d_in"]
    threshold: Float[Tensor, "d_sae"]
    """Not negative; zeros for topk."""
    subtract_b_dec: bool
    """Whether b_pre is b_dec; a transcoder, among others, subtracts nothing."""
    normalize: Literal["none", "layer_norm", "constant_norm"]
    """layer_norm: (x − mean) / (unbiased std + 1e-5), undone by · std + mean; constant_norm: x · √d_in / ‖x‖."""
    mean_activation: Float[Tensor, "d_sae"] | None = None
    """Mean of z over the tokens on which a latent fires, 0 if on none; only sdxl-unbox has it."""
    hookpoint: str | None = None
    """Short name, where the folder is named after a block as sdxl-unbox does."""
    origin: dict[str, Any] = field(default_factory=dict)
    """JSON values: format, path, revision on the hub, sha256 of the weights, and the tool's whole configuration."""

    def __post_init__(self) -> None:
        if self.kind == "topk" and not (self.k and 1 <= self.k <= len(self.b_enc)):
            raise ArtifactError(f"k={self.k} does not fit a top-k SAE of {len(self.b_enc)} latents: 1 to that many do.")


def recognise(path: Path | str) -> str | None:
    """Which of `FORMATS` a folder or one of its files is; None if none, and for `hf:`, where nobody has looked."""
    path = Path(path).expanduser()
    folder = path.parent if path.is_file() else path
    there = [(name, files) for name, (files, _, _) in _TOOLS.items() if all((folder / f).is_file() for f in files)]
    found = [name for name, files in there if folder == path or path.name in files]
    return found[0] if len(found) == 1 else None


def read(path: Path | str) -> Checkpoint:
    """Read an SAE of one of `FORMATS`, as float32 on the CPU; nothing that its files may bring is run.

    Args:
        path: folder, configuration or weights file, or `hf:owner/name/folder` on the Hugging Face hub.

    Raises:
        ArtifactError: none of these formats; settings or tensors that are unknown, missing, misshapen or not finite;
            or an SAE that no `Checkpoint` expresses exactly.
    """
    local, origin = _fetch(str(path)) if str(path).startswith("hf:") else (Path(path).expanduser(), {})
    format = recognise(local)
    if format is None:
        known = "; ".join(f"{' and '.join(files)} ({name})" for name, (files, _, _) in _TOOLS.items())
        raise ArtifactError(f"{path} is no SAE this kit reads. Give a folder with the files of just one of: {known}.")
    folder = local.absolute().parent if local.is_file() else local.absolute()
    files, from_tool, _ = _TOOLS[format]
    config, weights = load_plain(folder / files[0]), folder / files[1]
    checkpoint = from_tool(_Foreign(weights, config, load_plain(weights)))
    origin = {"format": format, "path": str(path), **origin, "sha256": hash_file(weights), "config": config}
    return replace(checkpoint, origin=origin, **(_beside(folder, checkpoint) if format == "sdxl-unbox" else {}))


def write(checkpoint: Checkpoint, folder: Path | str, format: str) -> None:
    """Write an SAE in the files of one of `FORMATS`, such that the tool gives the same codes and reconstructions.

    Only sdxl-unbox keeps `mean_activation`; none keeps `origin` and `hookpoint`.

    Raises:
        ArtifactError: no such format, the format cannot hold this SAE, or the folder has one already.
    """
    if format not in FORMATS:
        raise ArtifactError(f"No format {format!r}; there are {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    folder, (files, _, content) = Path(folder).expanduser(), _TOOLS[format]
    config, tensors = content(checkpoint)
    if there := [file for file in (*files, "mean.pt") if (folder / file).exists()]:
        raise ArtifactError(f"{folder} has {', '.join(there)} already. Give a new folder: no SAE is overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    if format == "sdxl-unbox" and checkpoint.mean_activation is not None:
        _dump(folder / "mean.pt", _plain(checkpoint.mean_activation, checkpoint.b_enc.shape, "mean_activation"))
    _dump(folder / files[1], tensors)
    _dump(folder / files[0], config)  # last: it makes the folder an SAE


class _Foreign:
    """A tool's configuration and tensors; each is taken by name, and what is not known is refused."""

    def __init__(self, path: Path, config: Any, tensors: Any) -> None:
        self.path, self.config, self.tensors = path, _dict(config), _dict(tensors)

    def admit(self, needed: str, optional: str = "") -> None:
        if odd := (set(needed.split()) - self.config.keys()) | (self.config.keys() - f"{needed} {optional}".split()):
            raise ArtifactError(
                f"{self.path}: settings are missing or not known: {', '.join(sorted(odd))}. They may change what the "
                "SAE computes, so it is not read. Save it again with a current version of its tool."
            )

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArtifactError(f"{self.path}: {name} must be an integer of at least {least}, not {value!r}.")
        return value

    def one_of(self, name: str, options: Iterable[Any], default: Any = None) -> Any:
        value, options = self.config.get(name, default), list(options)
        if (type(value), value) not in [(type(option), option) for option in options]:
            raise ArtifactError(
                f"{self.path}: {name} is {value!r}, and this kit reads {' or '.join(map(repr, options))}; taken for "
                "that, it would give other codes. If its tool can convert it, do that first."
            )
        return value

    def take(self, axes: Mapping[str, str], ignored: str = "", **sizes: int) -> dict[str, Tensor]:
        if odd := (self.tensors.keys() ^ axes.keys()) - (set(ignored.split()) - axes.keys()):
            raise ArtifactError(
                f"{self.path}: tensors are missing or not known: {', '.join(sorted(map(str, odd)))}. "
                "The file is damaged, or its configuration is another SAE's."
            )
        shapes = {name: tuple(sizes[letter] for letter in letters) for name, letters in axes.items()}
        checked = {name: _plain(self.tensors[name], shape, f"{self.path}: {name}") for name, shape in shapes.items()}
        return {_NAMES.get(name, name): t.T if name.endswith(".weight") else t for name, t in checked.items()}

    @staticmethod
    def named(axes: Mapping[str, str], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The other way: a tool's names, and its linear layers' weights as (out, in)."""
        ours = {name: parts[_NAMES.get(name, name)] for name in axes}
        return {name: t.T if name.endswith(".weight") else t for name, t in ours.items()}


def _plain(tensor: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """A float32 copy, if it is an honest tensor of this shape: a tiny file can claim to hold a huge one."""
    honest = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    honest = honest and tensor.is_floating_point() and tensor.nbytes <= tensor.untyped_storage().nbytes()
    fits = honest and tensor.shape == shape
    copy = tensor.detach().to("cpu", torch.float32, copy=True) if fits else torch.tensor(torch.nan)
    if not copy.isfinite().all():
        raise ArtifactError(f"{name} is not what it must be, finite numbers of shape {tuple(shape)}. It is damaged.")
    return copy


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dump(path: Path, content: Any) -> None:
    buffer = io.BytesIO()
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1).encode())
    elif path.suffix == ".safetensors":
        buffer.write(save({name: tensor.contiguous() for name, tensor in content.items()}))
    else:
        torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def _beside(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What sdxl-unbox tells outside the two files: feature means, and in a folder's name the block."""
    found: dict[str, Any] = {}
    if (folder / "mean.pt").is_file():
        mean, shape = load_plain(folder / "mean.pt"), tuple(checkpoint.b_enc.shape)
        if isinstance(mean, Tensor) and mean.shape == shape:
            mean = torch.where(mean.isnan(), 0.0, mean)  # 0/0, of a latent that never fired
        found["mean_activation"] = _plain(mean, shape, f"{folder}: mean.pt")
    block = r"(?:unet\.)?(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)(?:_.*)?"
    for name in (folder.parent.name, folder.name):
        if match := re.fullmatch(block, name):
            found["hookpoint"] = ".".join(filter(None, match.groups()))
    return found


def _fetch(path: str) -> tuple[Path, dict[str, str]]:
    """A folder of a hub repository, of which only what an SAE is read from is downloaded, and its revision."""
    from huggingface_hub import errors, snapshot_download

    parts = path.removeprefix("hf:").strip("/").split("/")
    if len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts):
        raise ArtifactError(f"{path!r} names no folder on the hub. Write it as hf:owner/name/folder.")
    wanted = ["/".join([*parts[2:], file]) for file in {"mean.pt"}.union(*(files for files, _, _ in _TOOLS.values()))]
    try:
        root = Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted))
    except (OSError, errors.HFValidationError) as cause:
        raise ArtifactError(
            f"{path!r} is not on this computer, nor to be had from the hub ({type(cause).__name__}). Check the name."
        ) from None
    return root.joinpath(*parts[2:]), {"revision": root.name}


def _checkpoint(path: Path, t: dict[str, Tensor], k: int | None, topk: bool, subtract: bool, norm: Any) -> Checkpoint:
    if "r_mag" in t:  # the gate lin + b_gate > 0 is open where h = lin · scale + b_mag > b_mag − b_gate · scale
        scale, b_mag = t["r_mag"].exp(), t["b_mag"]
        t |= {"W_enc": t["W_enc"] * scale, "b_enc": b_mag, "threshold": b_mag - t["b_gate"] * scale}
    t["threshold"] = t.get("threshold", torch.zeros(())).clamp(min=0).expand_as(t["b_enc"])
    names = (*_PLAIN, "threshold")
    parts: Any = {name: _plain(p := t[name].contiguous(), p.shape, f"{path}: {name}, scaled,") for name in names}
    return Checkpoint("topk" if topk else "jumprelu", k, **parts, subtract_b_dec=subtract, normalize=norm)


def _parts(checkpoint: Checkpoint, format: str, **only: Any) -> dict[str, Tensor]:
    """Copies of an SAE's tensors, if its other values are the only ones that the format can express."""
    for name, value in only.items():
        if (found := getattr(checkpoint, name)) != value:
            raise ArtifactError(f"{format} cannot hold an SAE with {name}={found!r}, only {value!r}. Use 'saelens'.")
    parts = {name: getattr(checkpoint, name).contiguous() for name in (*_PLAIN, "threshold")}
    return {name: _plain(part, part.shape, name) for name, part in parts.items()}


def _read_sdxl_unbox(foreign: _Foreign) -> Checkpoint:
    foreign.admit("n_dirs_local d_model k auxk dead_steps_threshold", "auxk_coef")
    inner = _Foreign(foreign.path, foreign.config, foreign.tensors.get("state_dict"))
    tensors = inner.take(_UNBOX, "stats_last_nonzero", d=inner.whole("d_model"), n=inner.whole("n_dirs_local"))
    return _checkpoint(inner.path, tensors, inner.whole("k"), topk=True, subtract=True, norm="none")


def _write_sdxl_unbox(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = _parts(checkpoint, "sdxl-unbox", kind="topk", subtract_b_dec=True, normalize="none")
    d_in, d_sae = parts["W_enc"].shape
    known = checkpoint.origin.get("config", {})  # what only training reads
    trained = {"auxk": known.get("auxk"), "dead_steps_threshold": known.get("dead_steps_threshold", 0)}
    parts["stats_last_nonzero"] = torch.zeros(d_sae, dtype=torch.int64)  # its loader wants one
    config = {"n_dirs_local": d_sae, "d_model": d_in, "k": checkpoint.k, **trained}
    return config, {"state_dict": _Foreign.named({**_UNBOX, "stats_last_nonzero": "n"}, parts)}


def _read_saelens(foreign: _Foreign) -> Checkpoint:
    topk = foreign.one_of("architecture", _SAELENS) == "topk"
    needed = "architecture d_in d_sae apply_b_dec_to_input normalize_activations reshape_activations"
    foreign.admit(f"{needed} k" if topk else needed, "dtype device metadata rescale_acts_by_decoder_norm")
    foreign.one_of("reshape_activations", ["none"])
    # others scale the data in training by numbers that are not in these files until the last save folds them in
    norm = _NORMS[foreign.one_of("normalize_activations", _NORMS)]
    tensors = foreign.take(_SAELENS[foreign.config["architecture"]], d=foreign.whole("d_in"), n=foreign.whole("d_sae"))
    if foreign.one_of("rescale_acts_by_decoder_norm", [True, False] if topk else [False], False):
        norms = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
        tensors["W_dec"] = tensors["W_dec"] / norms.where(norms > 0, 1)[:, None]
    # SAELens saves BatchTopK as jumprelu and leaves its k, which may be a fraction, among the metadata
    aim = _dict(_dict(foreign.config.get("metadata")).get("training_architecture_details")).get("k", 0)
    told = type(aim) in (int, float) and aim >= 1 and float(aim).is_integer()
    k = foreign.whole("k") if topk else int(aim) if told else None
    return _checkpoint(foreign.path, tensors, k, topk, foreign.one_of("apply_b_dec_to_input", [True, False]), norm)


def _write_saelens(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    parts, kind, k = _parts(checkpoint, "saelens"), checkpoint.kind, checkpoint.k
    aim = {"training_architecture_details": {"k": k}} if kind == "jumprelu" and k else {}
    config: dict[str, Any] = {
        "architecture": kind, "d_in": len(parts["b_dec"]), "d_sae": len(parts["b_enc"]), "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": checkpoint.subtract_b_dec, "reshape_activations": "none",
        "normalize_activations": next(name for name, ours in _NORMS.items() if ours == checkpoint.normalize),
        "metadata": {"sae_lens_version": "6.0.0", **aim},  # without a version it takes it for an old file
    }  # fmt: skip
    config |= {"k": k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    return config, _Foreign.named(_SAELENS[kind], parts)


def _read_dictionary_learning(foreign: _Foreign) -> Checkpoint:
    foreign.admit("trainer", "buffer")
    backup = foreign.tensors if "ae" in foreign.tensors else {"ae": foreign.tensors}
    # a backup does not say whether its biases are still in units of the factor that inputs were divided by
    _Foreign(foreign.path, backup, {}).one_of("norm_factor", [None])
    foreign = _Foreign(foreign.path, foreign.config["trainer"], backup["ae"])
    foreign.admit("dict_class activation_dim dict_size", _TRAINER)
    name = foreign.one_of("dict_class", _DICTIONARIES)
    counts, subtract = "TopK" in name, name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    if counts and isinstance(own := foreign.tensors.get("k"), Tensor) and own.numel() == 1:
        foreign.one_of("k", [own.item()])
    # the threshold of AutoEncoderTopK has to be asked for, and all groups of a Matryoshka SAE are in use
    sizes = {"d": foreign.whole("activation_dim"), "n": foreign.whole("dict_size")}
    tensors = foreign.take(_DICTIONARIES[name], "k threshold group_sizes" if counts else "", **sizes)
    k = foreign.whole("k" if counts else "target_l0") if counts or "target_l0" in foreign.config else None
    return _checkpoint(foreign.path, tensors, k, name == "AutoEncoderTopK", subtract, "none")


def _write_dictionary_learning(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    tied = {"subtract_b_dec": True} if checkpoint.kind == "topk" else {}
    parts = _parts(checkpoint, "dictionary_learning", normalize="none", **tied)
    k, threshold, (d_in, d_sae) = checkpoint.k, parts["threshold"], parts["W_enc"].shape
    if checkpoint.kind == "topk" or (k and checkpoint.subtract_b_dec and (threshold == threshold[0]).all()):
        name = "AutoEncoderTopK" if checkpoint.kind == "topk" else "BatchTopKSAE"
        parts |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold[0]}
        axes, aim = {**_DICTIONARIES[name], "k": "", "threshold": ""}, {"k": k}
    else:  # one gated with r_mag = 0 is a jumprelu that subtracts b_dec
        name = "GatedAutoEncoder" if checkpoint.subtract_b_dec else "JumpReluAutoEncoder"
        parts |= {"r_mag": torch.zeros(d_sae), "b_mag": parts["b_enc"], "b_gate": parts["b_enc"] - threshold}
        axes, aim = _DICTIONARIES[name], {"target_l0": k} if k else {}
    trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": d_sae, **aim}
    return {"trainer": trainer}, _Foreign.named(axes, parts)


def _read_sparsify(foreign: _Foreign) -> Checkpoint:
    # multi_topk is a term of the loss, normalize_decoder a step of training: neither changes a code
    known = "activation expansion_factor normalize_decoder num_latents multi_topk skip_connection transcode"
    foreign.admit("d_in k", f"{known} batch_topk sample_topk input_unit_norm")
    foreign.one_of("activation", ["topk"], "topk")
    foreign.one_of("skip_connection", [False], False)
    foreign.one_of("sample_topk", [False], False)  # k latents of a whole image, not of a token
    foreign.one_of("batch_topk", [False, True], False)  # in training; to use an SAE, SAeUron takes k of each token
    norm = "layer_norm" if foreign.one_of("input_unit_norm", [False, True], False) else "none"
    transcode, d_in = foreign.one_of("transcode", [False, True], False), foreign.whole("d_in")
    d_sae = foreign.whole("num_latents", 0, least=0) or d_in * foreign.whole("expansion_factor")
    tensors = foreign.take(_SPARSIFY, d=d_in, n=d_sae)
    return _checkpoint(foreign.path, tensors, foreign.whole("k"), topk=True, subtract=not transcode, norm=norm)


def _write_sparsify(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = _parts(checkpoint, "sparsify", kind="topk", normalize="none")
    d_in, d_sae = parts["W_enc"].shape
    sizes = {"d_in": d_in, "num_latents": d_sae, "expansion_factor": max(1, d_sae // d_in), "k": checkpoint.k}
    off = dict.fromkeys(("normalize_decoder", "multi_topk", "skip_connection"), False)
    config = {"activation": "topk", **sizes, **off, "transcode": not checkpoint.subtract_b_dec}
    return config, _Foreign.named(_SPARSIFY, parts)


_TOOLS: dict[str, tuple[tuple[str, str], Callable[[_Foreign], Checkpoint], Callable[[Checkpoint], Any]]] = {
    "sdxl-unbox": (("config.json", "state_dict.pth"), _read_sdxl_unbox, _write_sdxl_unbox),
    "saelens": (("cfg.json", "sae_weights.safetensors"), _read_saelens, _write_saelens),
    "dictionary_learning": (("config.json", "ae.pt"), _read_dictionary_learning, _write_dictionary_learning),
    "sparsify": (("cfg.json", "sae.safetensors"), _read_sparsify, _write_sparsify),
}

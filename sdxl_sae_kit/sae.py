"""The Top-K sparse autoencoder (paper §3), its configuration, and the file it lives in.

h  = (x − b_dec) W_enc + b_enc           pre-activations, signed
z  = relu(h) where h is among the k largest of its token, else 0
x̂ = z W_dec + b_dec                      rows of W_dec have unit norm
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sdxl_sae_kit.artifacts import whole_number
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.sparse import decode_sparse, to_dense, top_k

T = TypeVar("T")

FIRES = 1e-3
"""A latent fires on a token when its value is above this."""

FORMAT_KEY, FORMAT_VERSION = "sdxl_sae_kit.sae", 1
"""Everything but the tensors is one JSON object under this key: safetensors writes several keys in random order."""


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and how it is trained; defaults are the paper's."""

    k: int = 10
    """Active latents per token, at most."""
    expansion: int = 4
    """d_sae / d_in."""
    auxk: int = 256
    """Dead latents that try to explain each token's SAE error."""
    auxk_coef: float = 1 / 32
    """Weight of that attempt in the loss."""
    dead_after: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""
    lr: float = 1e-4
    """Adam's learning rate, constant."""
    seed: int = 0
    """Start of the weights."""

    def __post_init__(self) -> None:
        for name in ("k", "expansion", "auxk", "dead_after", "seed"):
            number = whole_number(f"SAEConfig: {name}", getattr(self, name), least=0 if name == "seed" else 1)
            object.__setattr__(self, name, number)  # how a frozen dataclass is normalised
        for name in ("lr", "auxk_coef"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise KitError(f"SAEConfig: {name} must be a finite positive number, not {value!r}.")


@dataclass(frozen=True)
class Site:
    """Where the tokens an SAE was trained on come from; an SAE is only meaningful there."""

    model: str
    revision: str
    hookpoint: str
    num_inference_steps: int
    guidance_scale: float
    kind: str = "update"
    """Always the update, never the block's output."""


class SAE(nn.Module):
    """A Top-K SAE for one hookpoint.

    Attributes:
        W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,): weights.
        mean_activation (d_sae,): mean of z over the training tokens on which the latent fires; 0 for one that never
            fired. The unit of strengths in `steer`.
        site: where it belongs. None until it is trained.
        metrics: held-out metrics, by name.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    mean_activation: Tensor

    def __init__(self, config: SAEConfig, d_in: int, site: Site | None = None, name: str = "untrained") -> None:
        super().__init__()
        if config.k > d_in * config.expansion:
            raise KitError(
                f"SAEConfig: k={config.k} is more than the {d_in * config.expansion} latents "
                f"({d_in} × expansion {config.expansion})."
            )
        self.config, self.site, self.name = config, site, name
        self.metrics: dict[str, Any] = {}
        d_sae = d_in * config.expansion
        generator = torch.Generator().manual_seed(config.seed)
        start = (torch.rand(d_in, d_sae, generator=generator) * 2 - 1) / d_in**0.5  # uniform ±1/√d_in
        self.W_enc = nn.Parameter(start)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        unit_rows = start.T / start.T.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(unit_rows.contiguous())  # fused Adam pairs by memory
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("mean_activation", torch.zeros(d_sae))

    @property
    def d_in(self) -> int:
        """Width of a token."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def hookpoint(self) -> str:
        """Where it belongs.

        Raises:
            ArtifactError: it was never trained.
        """
        if self.site is None:
            raise ArtifactError(f"{self.name} has no hookpoint: it was never trained. Train it, or load one that was.")
        return self.site.hookpoint

    @property
    def k(self) -> int:
        """Active latents per token, at most."""
        return self.config.k

    def pre_activations(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_sae"]:
        """h of the module's equations."""
        flat = x.reshape(-1, self.d_in) - self.b_dec
        h: Tensor = torch.addmm(self.b_enc, flat, self.W_enc).unflatten(0, x.shape[:-1])
        return h

    def encode_sparse(
        self, x: Float[Tensor, "*token d_in"]
    ) -> tuple[Int[Tensor, "*token k"], Float[Tensor, "*token k"]]:
        """The code as (indices, values ≥ 0), k of each per token, in no order; a value of 0 is an inactive latent."""
        return top_k(self.pre_activations(x), self.k)

    def encode(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_sae"]:
        """The code z with its zeros."""
        return to_dense(*self.encode_sparse(x), self.d_sae)

    def decode(self, z: Float[Tensor, "*token d_sae"]) -> Float[Tensor, "*token d_in"]:
        """z W_dec + b_dec."""
        return z @ self.W_dec + self.b_dec

    def decode_sparse(
        self, indices: Int[Tensor, "*token k"], values: Float[Tensor, "*token k"]
    ) -> Float[Tensor, "*token d_in"]:
        """The same for a code given as indices and values."""
        return decode_sparse(indices, values, self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_in"]:
        """The reconstruction x̂."""
        return self.decode_sparse(*self.encode_sparse(x))

    def untrained(self) -> SAE:
        """The control for anything claimed of this SAE: the same shape and place, random weights, centred alike."""
        config = replace(self.config, seed=self.config.seed + 1)
        sae = SAE(config, self.d_in, self.site, f"untrained_{self.name}").to(self.W_enc.device)
        with torch.no_grad():
            sae.b_dec.copy_(self.b_dec)
        return sae.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """sha256 over configuration, site and weights, for the recipes of what is made with it."""
        about = [asdict(self.config), asdict(self.site) if self.site else None]
        hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for _, tensor in sorted(self.state_dict().items()):
            hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write one safetensors file with configuration, site, name and metrics in its header."""
        site = asdict(self.site) if self.site else None
        header = {
            "version": FORMAT_VERSION,
            "name": self.name,
            "config": asdict(self.config),
            "site": site,
            "metrics": self.metrics,
        }
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        # not save_file, which lets nobody but the owner read the file
        write_atomically(Path(path), save(tensors, {FORMAT_KEY: json.dumps(header)}))

    @classmethod
    def load(cls, path: Path | str) -> SAE:
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, not this format, unknown settings, or tensors that are missing, misshapen or
                not finite.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header, names = file.metadata() or {}, file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as cause:
            raise ArtifactError(
                f"{path} cannot be read as safetensors ({cause}). Give the path of an SAE saved by this kit."
            ) from None
        about = _header(header.get(FORMAT_KEY, "{}"), path)
        config, site = _parse(SAEConfig, about["config"], path), about["site"] and _parse(Site, about["site"], path)
        if site and site.kind != "update":
            raise ArtifactError(
                f"{path} was trained on {site.kind}s of {site.hookpoint}; this kit works on updates only."
            )
        shape = tuple(tensors["W_enc"].shape) if "W_enc" in tensors else ()
        if len(shape) != 2 or shape[1] != shape[0] * config.expansion:
            raise ArtifactError(
                f"{path}: W_enc has shape {shape}, not (d_in, {config.expansion}·d_in). The file is damaged."
            )
        sae = cls(config, shape[0], site, about["name"])
        _check(tensors, sae.state_dict(), path)
        sae.load_state_dict(tensors)
        sae.metrics = about["metrics"]
        return sae.eval().requires_grad_(False)

    def __repr__(self) -> str:
        where = f"updates of {self.site.hookpoint} in {self.site.model}" if self.site else "nothing yet"
        return f"SAE {self.name}: {self.d_in} → {self.d_sae} latents, k={self.k}, trained on {where}"


def _header(text: str, path: Path | str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError):
        about = {}
    if about.get("version") != FORMAT_VERSION:
        found = f"version {about['version']}" if "version" in about else "no such header"
        raise ArtifactError(
            f"{path} is not an SAE of this kit in format version {FORMAT_VERSION}: it has {found}. "
            "Give one saved by this kit."
        )
    if missing := {"name", "config", "site", "metrics"} - about.keys():
        raise ArtifactError(f"{path}: the header lacks {', '.join(sorted(missing))}. The file is damaged.")
    return about


def _parse(kind: type[T], values: Mapping[str, Any], path: Path | str) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != known:
        odd = ", ".join(sorted(values.keys() ^ known))
        raise ArtifactError(
            f"{path}: {kind.__name__} has settings this kit does not know, or lacks some: {odd}. "
            "Use the kit version that saved it."
        )
    return kind(**values)


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str) -> None:
    for name in sorted(tensors.keys() | wanted.keys()):
        if (
            name not in tensors
            or name not in wanted
            or tensors[name].shape != wanted[name].shape
            or not tensors[name].isfinite().all()
        ):
            raise ArtifactError(
                f"{path}: tensor {name} is missing, unknown, misshapen or not finite. "
                "The file is damaged; train the SAE again."
            )

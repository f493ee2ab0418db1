"""Sparse autoencoders: three kinds behind one interface, and the file they live in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdxl_sae_kit import formats, weights
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.kinds import SAEKind, find_kind
from sdxl_sae_kit.scaling import divided, times
from sdxl_sae_kit.sparse import Active, active, combine

FIRES = 1e-3
"""A latent fires on a token when its value is above this."""


class SAE(nn.Module):
    """A sparse autoencoder for one hookpoint.

        x′ = (x − mean) / scale                  only where the input is normalised
        h  = (x′ − b_pre) W_enc + b_enc          pre-activations, signed; b_pre is b_dec (paper §3), or 0
        z  = act(h)                              the code, from 0
        x̂ = (z W_dec + b_dec) · scale + mean     rows of W_dec have unit norm; scale may be a matrix (whiten)

        topk        z = relu(h) where h is among the k largest of its token, else 0
        batchtopk   trained with z = relu(h) where h is among the k · n largest of a batch of n tokens; afterwards
                    z = h where h > θ, else 0, with one θ for all that leaves k active per training token on average
        jumprelu    z = h where h > θ, else 0, with a θ ≥ 0 for each latent, learnt

    Matryoshka prefixes change how the first two are trained (see `learning`), not what they compute. A kind of your own
    is a subclass of `SAEKind`. `SAE(config, d_in)` is untrained; what `train` and `SAE.load` give is ready for use.

    Attributes:
        W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,): weights.
        threshold (d_sae,): θ of the equations; zeros for topk.
        input_mean (d_in,), input_scale (d_in,): mean and scale of the equations, where they are the same for all
            tokens (normalize is "scale" or "channels"); else zeros and ones. For "whiten" the scale is (d_in, d_in).
        prefix_ends: number of latents in each Matryoshka prefix.
        mean_activation (d_sae,): mean of z over the training tokens on which the latent fires; 0 for one that never
            fired. The unit of strengths in `steer`.
        site: where it belongs. None until it is trained.
        data: digest of the activations it was trained on.
        metrics: held-out metrics, as `evaluate` gives them.
        origin: for one that another tool trained, its format, path, hash and configuration.

    Raises:
        KitError: more active latents than d_sae, or prefixes of which one adds no latent.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    input_mean: Tensor
    input_scale: Tensor
    mean_activation: Tensor

    def __init__(self, config: SAEConfig, d_in: int, site: Site | None = None, name: str = "untrained") -> None:
        super().__init__()
        d_sae = round(d_in * config.expansion)
        if (config.k_start or config.k or 1) > d_sae:
            raise KitError(
                f"SAEConfig: k={config.k_start or config.k} is more than the {d_sae} latents "
                f"({d_in} × expansion {config.expansion:g})."
            )
        self.prefix_ends = [round(share * d_sae) for share in config.prefixes]
        if sorted({0, *self.prefix_ends, d_sae}) != [0, *self.prefix_ends, d_sae]:
            raise KitError(
                f"SAEConfig: prefixes={config.prefixes} of {d_sae} latents end at {self.prefix_ends}; each must have a "
                f"latent that the one before has not, and the last fewer than {d_sae}. Choose others."
            )
        self.config, self.site, self.name = config, site, name
        self.data = ""
        self.metrics: dict[str, Any] = {}
        self.origin: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(config.seed)
        start = (torch.rand(d_in, d_sae, generator=generator) * 2 - 1) / d_in**0.5  # uniform ±1/√d_in
        # latent by latent in memory, like the decoder: that is how gradients arrive
        self.W_enc = nn.Parameter(start.T.contiguous().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter((start / start.norm(dim=0)).T.contiguous())
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.threshold = nn.Parameter(torch.zeros(d_sae), requires_grad=self.kind.threshold == "learnt")
        self.register_buffer("input_mean", torch.zeros(d_in))
        self.register_buffer("input_scale", torch.eye(d_in) if config.normalize == "whiten" else torch.ones(d_in))
        self.register_buffer("mean_activation", torch.zeros(d_sae))

    @property
    def d_in(self) -> int:
        """How many numbers a token has."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def kind(self) -> SAEKind:
        """How its latents become active."""
        return find_kind(self.config.kind)

    @property
    def k(self) -> int | None:
        """Active latents per token, as the configuration has it."""
        return self.config.k

    @property
    def b_pre(self) -> Float[Tensor, "d_in"]:
        """What is subtracted before encoding: b_dec, or zeros."""
        return self.b_dec if self.config.subtract_b_dec else torch.zeros_like(self.b_dec)

    @property
    def hookpoint(self) -> str:
        """Where it belongs.

        Raises:
            ArtifactError: nothing says where, or it was trained on something else than updates.
        """
        if self.site is None:
            raise ArtifactError(
                f"{self.name} has no hookpoint: nothing says where it belongs. Give train or SAE.load its site=Site(…)"
                ", or take one that was trained on a cache."
            )
        self.check_site(self.site.hookpoint)
        return self.site.hookpoint

    def check_site(self, hookpoint: str, kind: str = "update") -> None:
        """Refuse to be applied elsewhere than where it was trained.

        Raises:
            ArtifactError: it was trained at another hookpoint, or on outputs instead of updates.
        """
        if self.site and (self.site.kind != kind or self.site.hookpoint != hookpoint):
            raise ArtifactError(
                f"{self.name} was trained on {self.site.kind}s of {self.site.hookpoint}, not {kind}s of {hookpoint}. "
                f"Use one that was trained there, or apply it to {self.site.kind}s of {self.site.hookpoint}."
            )

    def normalised(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_in"]:
        """x′ of the equations."""
        if self.config.normalize == "none":
            return x
        mean, scale = self._statistics(x)
        return divided(x - mean, scale)

    def _statistics(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale: the SAE's own, or each token's."""
        normalize = self.config.normalize
        if normalize not in ("layer_norm", "constant_norm"):
            return self.input_mean, self.input_scale
        if x is None:
            raise KitError(f"{self.name} normalises each token by itself, so decoding needs the token: decode(z, x).")
        if normalize == "constant_norm":
            return torch.zeros_like(self.b_dec), x.norm(dim=-1, keepdim=True).clamp_min(1e-8) / self.d_in**0.5
        return x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True) + 1e-5

    def _restored(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        if self.config.normalize == "none":
            return x_hat
        mean, scale = self._statistics(x)
        return times(x_hat, scale) + mean

    def pre_activations(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_sae"]:
        """h of the equations.

        Raises:
            KitError: tokens of another width.
        """
        if x.shape[-1] != self.d_in:
            raise KitError(
                f"{self.name} reads tokens of {self.d_in} numbers, not {x.shape[-1]}. Give it its own hookpoint's."
            )
        flat = self.normalised(x).reshape(-1, self.d_in)
        h: Tensor = torch.addmm(self.b_enc, flat - self.b_pre, self.W_enc).view(*x.shape[:-1], self.d_sae)
        return h

    def _code(self, x: Float[Tensor, "*token d_in"]) -> tuple[Active, Float[Tensor, "entry"]]:
        h = self.pre_activations(x).reshape(-1, self.d_sae)
        entries = self.kind.active(h, self.config.k, self.threshold)
        return entries, entries.of(h).relu()

    def encode_sparse(
        self, x: Float[Tensor, "*token d_in"]
    ) -> tuple[Int[Tensor, "*token width"], Float[Tensor, "*token width"]]:
        """The code as (indices, values ≥ 0) of each token, in no order; a value of 0 is an inactive latent.

        The width is k for topk; where tokens differ it is what the longest of these needs.
        """
        entries, values = self._code(x)
        indices, values = entries.padded(values)
        return indices.view(*x.shape[:-1], -1), values.view(*x.shape[:-1], -1)

    def encode(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_sae"]:
        """The code z with its zeros; KitError for tokens of another width."""
        entries, values = self._code(x)
        z: Tensor = entries.matrix(values).view(*x.shape[:-1], self.d_sae)
        return z

    def decode(
        self, z: Float[Tensor, "*token d_sae"], x: Float[Tensor, "*token d_in"] | None = None
    ) -> Float[Tensor, "*token d_in"]:
        """x̂ of a code; SAEs that normalise each token by itself need the tokens too, or raise KitError."""
        return self._restored(z @ self.W_dec + self.b_dec, x)

    def forward(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_in"]:
        """The reconstruction x̂."""
        return self._restored(combine(*self._code(x), self.W_dec, self.b_dec).view_as(x), x)

    @property
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of each latent adds to an update: W_dec, times the scale where the input is normalised.

        Raises:
            KitError: each token has a scale of its own.
        """
        if self.config.normalize == "none":
            return self.W_dec
        if self.config.normalize in ("layer_norm", "constant_norm"):
            raise KitError(
                f"{self.name} normalises each token by itself, so its latents have no direction that is the same "
                "for all tokens. Take an SAE that does not."
            )
        return times(self.W_dec, self._statistics(None)[1])

    def decode_sparse(
        self,
        indices: Int[Tensor, "*token width"],
        values: Float[Tensor, "*token width"],
        x: Float[Tensor, "*token d_in"] | None = None,
    ) -> Float[Tensor, "*token d_in"]:
        """The same for a code given as indices and values."""
        entries = active(indices.reshape(-1, indices.shape[-1]), self.d_sae)
        x_hat = combine(entries, values.flatten(), self.W_dec, self.b_dec)
        return self._restored(x_hat.view(*indices.shape[:-1], self.d_in), x)

    def untrained(self, seed: int | None = None) -> SAE:
        """The control for anything claimed of this SAE: the same shape and place, random weights, centred alike.

        Where a threshold decides what is active, the control takes as many active latents per token as this SAE has on
        average, the largest ones. The seed is the SAE's own plus one; two controls that are to differ need two.
        """
        config = replace(self.config, seed=self.config.seed + 1 if seed is None else seed)
        if config.kind != "topk":
            k = max(1, round(self.metrics.get("l0") or config.k or 1))
            config = replace(config, kind="topk", k=k, k_start=None, anneal_steps=0)
        sae = SAE(config, self.d_in, self.site, f"untrained_{self.name}").to(self.W_enc.device)
        with torch.no_grad():
            for name in ("b_dec", "input_mean", "input_scale"):
                getattr(sae, name).copy_(getattr(self, name))
        return sae.eval().requires_grad_(False)

    @torch.no_grad()
    def folded(self) -> SAE:
        """The same function without input normalisation: the weights take it in, and rows are not of unit norm then.

        Raises:
            KitError: each token has statistics of its own, which no weights can hold.
        """
        if self.config.normalize == "none":
            return self
        mean, scale = self._statistics(None)
        sae = SAE(replace(self.config, normalize="none"), self.d_in, self.site, self.name).to(self.W_enc.device)
        sae.load_state_dict(self.state_dict() | {"input_scale": torch.ones_like(self.b_dec)})
        sae.W_enc.copy_(divided(self.W_enc.T, scale).T)  # the scale is symmetric where it is a matrix
        sae.W_dec.copy_(times(self.W_dec, scale))
        sae.b_dec.copy_(times(self.b_dec, scale) + mean)
        if not self.config.subtract_b_dec:
            sae.b_enc.copy_(self.b_enc - mean @ sae.W_enc)
        sae.input_mean.zero_()
        sae.data, sae.metrics, sae.origin = self.data, dict(self.metrics), self.origin
        return sae.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """sha256 over configuration, site and weights, for the recipes of what is made with it."""
        about = [asdict(self.config), asdict(self.site) if self.site else None]
        hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for _, tensor in sorted(self.state_dict().items()):
            hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def save(self, path: Path | str, training: Mapping[str, Tensor] | None = None) -> None:
        """Write one safetensors file with configuration, site, data digest and metrics in its header.

        Where the path is a folder it raises ArtifactError. `training` makes it a checkpoint: what the next step of
        training needs beside the SAE, by name.
        """
        header = {
            "name": self.name,
            "config": asdict(self.config),
            "site": asdict(self.site) if self.site else None,
            "data": self.data,
            "metrics": self.metrics,
            "origin": self.origin,
        }
        weights.write(path, header, self.state_dict(), training or {})

    def export(self, folder: Path | str, format: str) -> None:
        """Write it in the files of another tool (one of `formats.FORMATS`), with input normalisation folded.

        The tool gives the same codes and reconstructions; of site, data and metrics the files tell nothing.

        Raises:
            ArtifactError: no such format, the format cannot hold this SAE, or the folder has one already.
        """
        if self.kind.exported_as is None:
            raise ArtifactError(f"No other tool computes what a {self.config.kind} SAE does. Share what `save` writes.")
        per_token = self.config.normalize in ("layer_norm", "constant_norm")
        sae = self if per_token else self.folded()
        tensors: Any = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
        for name in ("input_mean", "input_scale"):  # folded
            del tensors[name]
        formats.write(
            formats.Checkpoint(
                kind=self.kind.exported_as,
                k=self.config.k,
                **tensors,
                subtract_b_dec=self.config.subtract_b_dec,
                normalize=sae.config.normalize,  # type: ignore[arg-type]  # folded, it is one of three
            ),
            folder,
            format,
        )

    @classmethod
    def load(cls, path: Path | str, site: Site | None = None) -> SAE:
        """Read what `save` wrote, a checkpoint of training, or an SAE of another tool (one of `formats.FORMATS`).

        Args:
            path: file, or the artifact's folder; for another tool its folder, one of its files, or
                `hf:owner/name/folder` on the hub.
            site: where it belongs, if the files do not say so. Those of other tools do not; sdxl-unbox names the
                hookpoint only, and is taken to be of SDXL Turbo's updates, as its released SAEs are.

        Raises:
            ArtifactError: no such file, no format that is known, unknown settings, tensors that are missing, misshapen
                or not finite; or a site although the file has its own.

        Only sdxl-unbox's files tell how strongly latents fire, the unit of `steer`; for others measure it with
        `sae.mean_activation.copy_(evaluation.mean_activation(sae, cache, sae.hookpoint))`.

        Example:
            >>> sae = SAE.load("unet.mid_block.attentions.0_k10_hidden5120_…/final")          # doctest: +SKIP
        """
        if str(weights.location(path)).startswith("hf:") or formats.recognise(path):
            return cls._from_checkpoint(formats.read(path), site)
        sae = cls._load(path)
        if site and sae.site:
            raise ArtifactError(f"{path} says where it belongs: {sae.site}. Leave site= out.")
        sae.site = sae.site or site
        return sae

    @classmethod
    def _from_checkpoint(cls, found: formats.Checkpoint, site: Site | None) -> SAE:
        d_in, d_sae = found.W_enc.shape
        same = {name: getattr(found, name) for name in ("k", "kind", "normalize", "subtract_b_dec")}
        config = SAEConfig(expansion=d_sae / d_in, **same)
        if site is None and found.origin["format"] == "sdxl-unbox" and found.hookpoint:
            site = Site("stabilityai/sdxl-turbo", "", found.hookpoint, 1, 0.0)
        sae = cls(config, d_in, site, f"{found.origin['format']}_{found.origin['sha256'][:8]}")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "mean_activation"):
            if (tensor := getattr(found, name)) is not None:
                getattr(sae, name).data.copy_(tensor)
        sae.origin = found.origin
        return sae.eval().requires_grad_(False)

    @classmethod
    def _load(cls, path: Path | str) -> SAE:
        path = Path(path) / "sae.safetensors" if Path(path).is_dir() else path  # an artifact's folder
        about, tensors = weights.read(path)
        config = weights.parse(SAEConfig, about["config"], path)
        site = weights.parse(Site, about["site"], path) if about["site"] else None
        d_in = weights.width(tensors, config.expansion, config.normalize == "whiten", path)
        try:
            sae = cls(config, d_in, site, about["name"])
        except KitError as cause:
            raise ArtifactError(f"{path}: {cause} The file is damaged.") from None
        weights.check(tensors, sae.state_dict(), path)
        sae.load_state_dict(tensors)
        sae.data, sae.metrics, sae.origin = about["data"], about["metrics"], about["origin"]
        return sae.eval().requires_grad_(False)

    def __repr__(self) -> str:
        where = f"{self.site.kind}s of {self.site.hookpoint} in {self.site.model}" if self.site else "unknown tokens"
        shape = f"{self.d_in} → {self.d_sae} latents"
        return f"SAE {self.name}: {self.config.kind}, {shape}, k={self.k}, trained on {where}"

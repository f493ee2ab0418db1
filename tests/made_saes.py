"""SAEs and tokens made up for tests."""

from dataclasses import replace

import torch

from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.pipelines import describe
from sdxl_sae_kit.sae import SAE

SITE = Site("tiny-turbo", "abc", "mid.0", 1, 0.0)
CONFIG = SAEConfig(k=3, expansion=4, auxk=5, dead_after=100, lr=1e-2)


def random_sae(seed=0, d_in=6, config=CONFIG):
    """Every weight random, so that no misplaced one goes unnoticed; decoder rows of unit norm."""
    sae = SAE(replace(config, seed=seed), d_in, SITE, "test-00000000")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if name in ("threshold", "mean_activation"):
                tensor.abs_()
        if config.kind == "topk":
            sae.threshold.zero_()
        if config.kind == "batchtopk":
            sae.threshold.fill_(sae.threshold[0].item())
        sae.input_mean.mul_(config.normalize in ("channels", "whiten"))
        sae.input_scale.abs_().add_(0.5)
        if config.normalize == "whiten":  # symmetric, and far from singular
            sae.input_scale.copy_((sae.input_scale + sae.input_scale.T) / 8 + 2 * torch.eye(d_in))
        if config.normalize == "scale":
            sae.input_scale.fill_(sae.input_scale[0].item())
        if config.normalize not in ("scale", "channels", "whiten"):
            sae.input_scale.fill_(1)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def sae_of(pipe, block, config, d_in=96):
    """An untrained one that fits a hookpoint of this model, with biases and statistics that are not 0 and 1."""
    model = describe(pipe)
    sae = SAE(config, d_in, Site(model.name, model.revision, block, 1, 0.0), "test-00000000").eval()
    generator = torch.Generator().manual_seed(len(block))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(sae.d_sae, generator=generator) / 10)
        sae.b_dec.copy_(torch.randn(d_in, generator=generator) / 10)
        if config.normalize == "channels":
            sae.input_mean.copy_(torch.randn(d_in, generator=generator) / 10)
            sae.input_scale.copy_(torch.rand(d_in, generator=generator) + 0.5)
        if config.normalize == "whiten":
            half = torch.randn(d_in, d_in, generator=generator) / d_in
            sae.input_scale.copy_(half + half.T + 2 * torch.eye(d_in))
        if config.kind == "batchtopk":
            sae.threshold.fill_(0.7)
    return sae


def tokens(n=64, d_in=6, seed=1):
    """Tokens whose mean is not zero."""
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) * 2 + 1

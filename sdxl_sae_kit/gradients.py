"""Gradients of pictures: an ordinary pipeline, drawn so that what is computed from the picture can be differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def differentiable(pipe: Any) -> Iterator[None]:
    """Within it gradients flow through the pipeline's networks but not to their weights, which would cost memory.

    So the graph begins at the first update that something asks a gradient of, and what comes before it takes none. A
    half-precision VAE that must compute in float32 is kept there meanwhile: the pipeline itself would take it back to
    float16 after the picture, and the graph with it.
    """
    networks = [network for network in pipe.components.values() if isinstance(network, nn.Module)]
    trained = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    with ExitStack() as undo:
        for weight in trained:
            weight.requires_grad_(False)
            undo.callback(weight.requires_grad_, True)
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            undo.callback(pipe.vae.to, torch.float16)
            pipe.vae.to(torch.float32)
            undo.callback(pipe.vae.decoder.register_forward_pre_hook(_in_float32).remove)
            undo.callback(pipe.vae.post_quant_conv.register_forward_pre_hook(_in_float32).remove)
        with torch.enable_grad():
            yield


def draw_with_graph(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> Float[Tensor, "image 3 y x"]:
    """The pictures that `generate` makes, colours 0 to 1, with the graph that leads to them.

    Call it within `differentiable`. The pipeline's own code runs, without the decorator that turns gradients off; any
    number of steps and guidance will do. The graph holds every step from the first update that needs a gradient on,
    and the VAE's decoder.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = inspect.unwrap(type(pipe).__call__)
    pictures: Tensor = call(pipe, list(prompts), generator=generators, output_type="pt", **settings).images
    return pictures


def _in_float32(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in args)

"""Gradients of a number read off a picture, to the updates of transformer blocks that made it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.hooks import Call, rewrite

Rows = Float[Tensor, "image row height width d_in"]
"""Rows go step by step, uncond before cond, as those of an activation cache."""


@dataclass(frozen=True)
class Differentiated:
    """Some pictures, a number of each, and its gradient to every token of every update."""

    pictures: Float[Tensor, "image 3 y x"]
    """Colours 0 to 1."""
    values: Float[Tensor, " image"]
    """The number of each."""
    updates: Mapping[str, Rows]
    gradients: Mapping[str, Rows]
    graph_bytes: int
    """Bytes that the graph kept for the backward pass, weights not counted."""


def differentiate(
    pipe: Any,
    hookpoints: Sequence[str],
    target: Callable[[Float[Tensor, "image 3 y x"]], Float[Tensor, " image"]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    **settings: Any,
) -> Differentiated:
    """Draw pictures, and take the gradient of each one's number to all updates that made it, in one backward pass.

    Each update gets a zero added to it, whose gradient is the update's with everything that follows in the same step
    and in later ones, other hookpoints included.

    Args:
        pipe: an SDXL pipeline of diffusers.
        hookpoints: short names.
        target: from pictures, colours 0 to 1, to a number for each.
        prompts, seeds: one of each for every picture.
        settings: the pipeline's, such as num_inference_steps.

    Raises:
        KitError: the target gives something else or does not depend on the picture, or a gradient is not finite.
    """
    kept: dict[str, list[tuple[Tensor, Tensor, bool]]] = {hookpoint: [] for hookpoint in hookpoints}

    def keep(update: Tensor, call: Call) -> Tensor:
        zero = torch.zeros_like(update).requires_grad_()
        kept[call.hookpoint].append((update.detach(), zero, call.guided))
        return update + zero

    with differentiable(pipe), rewrite(pipe, dict.fromkeys(hookpoints, keep)):
        counter = _Counter(pipe)  # only here weights are where they stay: the VAE's may have been copied to float32
        with torch.autograd.graph.saved_tensors_hooks(counter, lambda saved: saved):
            pictures = draw_with_graph(pipe, prompts, seeds, **settings)
            values = target(pictures)
        _check(values, len(prompts))
        zeros = [zero for calls in kept.values() for _, zero, _ in calls]
        found = iter(torch.autograd.grad(values.float().sum(), zeros))
    gradients = {h: _rows([(next(found), guided) for _, _, guided in calls]) for h, calls in kept.items()}
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise KitError(
            f"A gradient is not finite in {str(pipe.unet.dtype).removeprefix('torch.')}. Load the pipeline in bfloat16 "
            "or float32, or scale the target down."
        )
    updates = {h: _rows([(update, guided) for update, _, guided in calls]) for h, calls in kept.items()}
    return Differentiated(pictures.detach(), values.detach(), updates, gradients, counter.nbytes)


def _check(values: Any, n: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (n,):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise KitError(f"The target must give one number for each of {n} pictures, shape ({n},); it gave {found}.")
    if not values.requires_grad:
        raise KitError(
            "The target's numbers do not depend on the pictures in a way that torch can differentiate. Compute them "
            "with torch alone, without detach, numpy or rounding."
        )


def _rows(calls: Sequence[tuple[Tensor, bool]]) -> Rows:
    """Of each call of a hookpoint the one or two rows of every image, in float32."""
    rows = [row for each, guided in calls for row in (each.chunk(2) if guided else (each,))]
    return torch.stack([row.float() for row in rows], dim=1)


class _Counter:
    """Counts the bytes of what autograd saves, each storage once; weights are there anyway."""

    def __init__(self, pipe: Any) -> None:
        networks = [network for network in pipe.components.values() if isinstance(network, nn.Module)]
        self.seen = {weight.untyped_storage().data_ptr() for network in networks for weight in network.parameters()}
        self.nbytes = 0

    def __call__(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return saved


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

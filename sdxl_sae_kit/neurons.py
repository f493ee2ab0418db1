"""Read and rewrite the neurons of transformer blocks: the outputs of the gated layers in their feed-forward parts.

A hookpoint has one such layer in each of its transformer layers: `mid.0 layer 3` is that of the fourth, GEGLU's output
value · gelu(gate) with four times as many neurons as the update has channels. SDXL has ten layers at each of its four
usual hookpoints, 4 · 10 · 5,120 = 204,800 neurons. Unlike the activations of an SAE they may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sdxl_sae_kit.hookpoints import resolve
from sdxl_sae_kit.hooks import Call, Clock, Recording, hooked

Neurons = Float[Tensor, "batch token neuron"]


def list_layers(unet: Any, hookpoint: str) -> dict[str, str]:
    """Module paths of a hookpoint's gated layers by their names, in the order of the forward pass.

    Raises:
        HookpointError: the U-Net has no such hookpoint.

    >>> list_layers(pipe.unet, "mid.0")                                                       # doctest: +SKIP
    {'mid.0 layer 0': 'mid_block.attentions.0.transformer_blocks.0.ff.net.0'}
    """
    place, unet = resolve(unet, hookpoint), getattr(unet, "_orig_mod", unet)
    n = len(unet.get_submodule(place.path).transformer_blocks)
    return {f"{place.name} layer {i}": f"{place.path}.transformer_blocks.{i}.ff.net.0" for i in range(n)}


def hookpoint_of(layer: str) -> str:
    """The hookpoint that a layer with this name is in; a hookpoint is its own.

    >>> hookpoint_of("mid.0 layer 3")
    'mid.0'
    """
    return layer.partition(" ")[0]


@contextmanager
def record_neurons(pipe: Any, hookpoints: Iterable[str]) -> Iterator[Recording]:
    """Record all neurons of these hookpoints, at all steps, for every image made inside the with block.

    They are kept on the CPU in the model's dtype, by the names of their layers: (image, token, neuron), tokens row by
    row. Of real SDXL at 512 × 512 pixels that is 105 MB for each image and step in half precision.

    Raises:
        HookpointError: the U-Net has no such hookpoint.

    Example:
        >>> with record_neurons(pipe, ["mid.0"]) as recording:                                # doctest: +SKIP
        ...     generate(pipe, ["a red circle"], [0])
        >>> recording.update("mid.0 layer 0").shape                                           # doctest: +SKIP
        torch.Size([1, 64, 384])
    """
    recording = Recording()

    def read(neurons: Tensor, call: Call) -> None:
        recording.add(neurons.detach().to("cpu", copy=True), call)

    with _hooked(pipe, dict.fromkeys(hookpoints, read)):
        yield recording


@contextmanager
def rewrite_neurons(pipe: Any, edits: Mapping[str, Callable[[Neurons, Call], Tensor | None]]) -> Iterator[None]:
    """Let functions change the neurons of hookpoints while images are made inside the with block.

    Args:
        pipe: the SDXL pipeline of diffusers that is called.
        edits: by hookpoint what gets the neurons (batch, token, neuron) of each of its layers in turn and the `Call`,
            whose `hookpoint` is the layer's name; it returns the new ones, or None to leave them as they are, and must
            not change them in place.

    Raises:
        HookpointError: the U-Net has no such hookpoint.
    """
    with _hooked(pipe, edits):
        yield


def _hooked(pipe: Any, edits: Mapping[str, Callable[[Tensor, Call], Tensor | None]]) -> AbstractContextManager[None]:
    def register(unet: Any, clock: Clock) -> Iterator[Any]:
        for hookpoint, edit in edits.items():
            for name, path in list_layers(unet, hookpoint).items():
                yield unet.get_submodule(path).register_forward_hook(_hook(name, edit, clock))

    return hooked(pipe, register)


def _hook(
    name: str, edit: Callable[[Tensor, Call], Tensor | None], clock: Clock
) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        changed = edit(output, clock.call(name))
        return None if changed is None else changed.to(output.dtype)

    return hook

"""Read and rewrite the updates of transformer blocks while an ordinary diffusers pipeline runs.

diffusers adds a block's input back as the very last thing (`proj_out(h) + residual`), so the update is exactly what the
block's own `proj_out` returns. Reading it there needs no subtraction and loses nothing in half precision; changing it
there changes the block's output by the same amount. Nothing here knows what an SAE is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import HookpointError
from sdxl_sae_kit.hookpoints import list_hookpoints, resolve, resolve_block

Half = Literal["uncond", "cond"]
Update = Float[Tensor, "batch height width d_in"]


@dataclass(frozen=True)
class Call:
    """Where in the making of an image a hook was called."""

    hookpoint: str
    """Short name."""
    step: int
    """Denoising step, from 0: the first that is really made, which for image-to-image is in the middle of the
    scheduler's."""
    n_steps: int
    """Steps that are really made."""
    guided: bool
    """With guidance the batch is [uncond ; cond], each half of the images; without it every row is cond."""


@dataclass
class Recording:
    """Updates read by `record`, by hookpoint, step and guidance half; more calls of the pipeline add to the batch."""

    _parts: dict[tuple[str, int, Half], list[Tensor]] = field(default_factory=dict)

    def update(self, hookpoint: str, step: int = 0, half: Half = "cond") -> Float[Tensor, "batch *grid d_in"]:
        """The update of every image made, (batch, height, width, d_in), in the order in which images were made.

        Raises:
            HookpointError: nothing was recorded there; the message says what was.
        """
        if (hookpoint, step, half) not in self._parts:
            known = (
                ", ".join(f"{h} step {s} {half}" for h, s, half in self._parts)
                or "nothing: call the pipeline inside the with block"
            )
            raise HookpointError(f"Nothing recorded at {hookpoint} step {step} {half}; recorded: {known}.")
        parts = self._parts[hookpoint, step, half]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def steps(self) -> list[int]:
        """The denoising steps recorded."""
        return sorted({step for _, step, _ in self._parts})

    @property
    def halves(self) -> list[Half]:
        """`["cond"]`, or both halves when guidance was on."""
        present = {half for _, _, half in self._parts}
        return [half for half in ("uncond", "cond") if half in present]

    def keep(self, images: Sequence[int]) -> None:
        """Forget all but some of the images, by their places; part by part, so that little is held twice."""
        for key, parts in self._parts.items():
            self._parts[key] = [torch.cat(parts)[list(images)]]

    def add(self, update: Tensor, call: Call) -> None:
        """Keep what one call of a hook saw, as the halves that it has."""
        halves: list[tuple[Half, Tensor]] = [("cond", update)]
        if call.guided:
            uncond, cond = update.chunk(2)
            halves = [("uncond", uncond), ("cond", cond)]
        for half, part in halves:
            self._parts.setdefault((call.hookpoint, call.step, half), []).append(part)


class _Stopped(Exception):
    """Raised inside the U-Net once everything wanted was read; never leaves `record`."""


@checked
@contextmanager
def record(
    pipe: Any,
    hookpoints: Iterable[str],
    *,
    dtype: torch.dtype | None = None,
    steps: Collection[int] | None = None,
    stop_early: bool = False,
    edited: bool = False,
) -> Iterator[Recording]:
    """Record the updates of these hookpoints for every image made inside the with block.

    Updates are kept on the CPU. Each block's own update is read, before any `rewrite` of the same hookpoint. With
    `stop_early` the pipeline call is broken off after the last hookpoint of the last step read, and the with block ends
    there: for when only updates are wanted.

    Args:
        pipe: the SDXL pipeline of diffusers that is called.
        hookpoints: short names or module paths.
        dtype: what to keep them in; by default what the model computes in.
        steps: denoising steps to read, from 0; by default all.
        stop_early: skip the rest of the U-Net and the VAE.
        edited: read what `steer` and `rewrite` blocks that are open already make of the updates.

    Warns where the U-Net is compiled: inside the with block it runs uncompiled.

    Raises:
        HookpointError: the U-Net has no such hookpoint, or is called by something else than its pipeline.

    Example:
        >>> with record(pipe, ["down.2.1"]) as recording:                      # doctest: +SKIP
        ...     pipe("a red circle", num_inference_steps=1, guidance_scale=0.0)
        >>> recording.update("down.2.1").shape                                 # doctest: +SKIP
        torch.Size([1, 8, 8, 96])
    """
    recording = Recording()
    readers = _readers(pipe, recording, hookpoints, dtype, steps, stop_early)
    with suppress(_Stopped), _hooked(pipe, readers, first=not edited):
        yield recording


@contextmanager
def watch(
    pipe: Any, hookpoints: Iterable[str], *, dtype: torch.dtype, steps: Collection[int], stop_early: bool
) -> Iterator[Callable[[Callable[[], Any]], tuple[Recording, Any]]]:
    """Like `record` for many calls of the pipeline, with hooks that stay: yields what makes one of them.

    That takes a function which calls the pipeline, and returns what was recorded during it alone and what it returned,
    which is None if it was broken off.
    """
    recording = Recording()

    def run(call: Callable[[], Any]) -> tuple[Recording, Any]:
        recording._parts.clear()
        try:
            made = call()
        except _Stopped:
            made = None
        return Recording(dict(recording._parts)), made

    with _hooked(pipe, _readers(pipe, recording, hookpoints, dtype, steps, stop_early), first=True):
        yield run


def _readers(
    pipe: Any,
    recording: Recording,
    hookpoints: Iterable[str],
    dtype: torch.dtype | None,
    steps: Collection[int] | None,
    stop_early: bool,
) -> dict[str, Callable[[Tensor, Call], None]]:
    order = list(list_hookpoints(pipe.unet))
    names = [resolve(pipe.unet, name).name for name in hookpoints]
    last = max(names, key=order.index) if names else None

    def read(update: Tensor, call: Call) -> None:
        if steps is None or call.step in steps:
            recording.add(update.detach().to("cpu", dtype or update.dtype, copy=True), call)
        if stop_early and call.hookpoint == last and call.step == (max(steps) if steps else call.n_steps - 1):
            raise _Stopped

    return dict.fromkeys(names, read)


@checked
@contextmanager
def rewrite(pipe: Any, edits: Mapping[str, Callable[[Update, Call], Tensor | None]]) -> Iterator[None]:
    """Let functions change the updates of hookpoints while images are made inside the with block.

    Each function gets the update (batch, height, width, d_in) and the `Call`; it returns the new update, or None to
    leave it as it is. It must not change the update in place. Warns where the U-Net is compiled, as `record` does.

    Raises:
        HookpointError: the U-Net has no such hookpoint, or is called by something else than its pipeline.

    Example:
        >>> with rewrite(pipe, {"mid.0": lambda update, call: update / 2}):    # doctest: +SKIP
        ...     image = pipe("a red circle", num_inference_steps=1, guidance_scale=0.0).images[0]
    """
    with _hooked(pipe, {resolve(pipe.unet, name).name: edit for name, edit in edits.items()}, first=False):
        yield


def _hooked(
    pipe: Any, functions: Mapping[str, Callable[[Tensor, Call], Tensor | None]], *, first: bool
) -> AbstractContextManager[None]:
    """Let functions see the updates of hookpoints inside the with block."""

    def register(unet: Any, clock: Clock) -> Iterator[Any]:
        for name, function in functions.items():
            block = unet.get_submodule(resolve(unet, name).path)
            tap = _Tap(name, function, clock)
            yield block.register_forward_pre_hook(tap.see_input, with_kwargs=True)
            yield block.proj_out.register_forward_hook(tap.see_update, prepend=first)

    return hooked(pipe, register)


@contextmanager
def hooked(pipe: Any, register: Callable[[Any, Clock], Iterator[Any]]) -> Iterator[None]:
    """Hold hooks for as long as the with block lasts, and remove them however it ends.

    Args:
        pipe: the pipeline that is called inside the with block.
        register: gets the U-Net and a clock that knows the step it is at, registers hooks and yields their handles.
    """
    unet, clock, handles = getattr(pipe.unet, "_orig_mod", pipe.unet), Clock(pipe), []  # a compiled one wraps it
    try:
        with _uncompiled(unet, wrapped=unet is not pipe.unet):
            handles.append(unet.register_forward_pre_hook(clock, with_kwargs=True))
            for handle in register(unet, clock):
                handles.append(handle)  # one by one: those before a failure are removed too
            yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(unet: nn.Module, wrapped: bool) -> AbstractContextManager[Any]:
    """Run what is compiled as it was written: compiled code calls no hooks, or those of the day it was compiled."""
    if not (wrapped or any(map(_is_compiled, unet.modules()))):
        return nullcontext()
    warnings.warn(
        "The U-Net is compiled, and compiled code calls no hooks: while updates are read or edited it runs uncompiled, "
        "so more slowly.",
        stacklevel=6,
    )
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)` in another, by `module.compile()`, or its `forward` by `torch.compile`."""
    return (
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


class Clock:
    """Knows the denoising step from the timestep the U-Net was called with, so that it can never drift."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.step, self.n_steps, self.guided = pipe, 0, 1, False
        self._timesteps: Tensor | None = None
        self._first = self._last = 0

    def __call__(self, _unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the timestep, before the U-Net runs."""
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0]
        scheduler, timesteps = self.pipe.scheduler, self.pipe.scheduler.timesteps
        (found,) = (timesteps.cpu() == timestep.cpu()).nonzero(as_tuple=True)
        if not len(found):
            raise HookpointError(
                f"The U-Net ran at timestep {timestep.item():g}, which the pipeline's scheduler does not visit. "
                "Call the pipeline, not its U-Net."
            )
        # Some schedulers visit a timestep twice; which visit this is, most say themselves.
        visits: list[int] = found.tolist()
        current: int | None = getattr(scheduler, "step_index", None)
        begun = timesteps is self._timesteps  # every image has a tensor of its own
        place = next((v for v in visits if v == current or (current is None and begun and v > self._last)), visits[0])
        if not begun:
            self._timesteps, self._first = timesteps, place
        self._last = place
        # Image-to-image starts in the middle, and most schedulers are told where.
        start = scheduler.begin_index or 0 if hasattr(scheduler, "begin_index") else self._first
        self.step = place - start
        self.n_steps = getattr(self.pipe, "num_timesteps", None) or len(timesteps) - start
        self.guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def call(self, hookpoint: str) -> Call:
        """Where a hook is called that is called now."""
        return Call(hookpoint, self.step, self.n_steps, self.guided)


class _Tap:
    """One hookpoint's pair of hooks: the block's input gives the grid, its proj_out gives the update."""

    def __init__(self, name: str, function: Callable[[Tensor, Call], Tensor | None], clock: Clock) -> None:
        self.name, self.function, self.clock = name, function, clock
        self.grid = (0, 0)

    def see_input(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
        self.grid = (height, width)

    def see_update(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        changed = self.function(output.unflatten(1, self.grid), self.clock.call(self.name))
        return None if changed is None else changed.to(output.dtype).flatten(1, 2)


@contextmanager
def silence(pipe: Any, blocks: Iterable[str]) -> Iterator[None]:
    """Let blocks add nothing, at every step, in images made inside the with block: each passes on what it got.

    A transformer block's update becomes 0; of a resnet only its shortcut is left.

    Args:
        pipe: an SDXL pipeline of diffusers.
        blocks: names such as `list_blocks(pipe)` gives, or module paths; one name alone will do.

    Raises:
        HookpointError: the U-Net has no such block.

    >>> with silence(pipe, ["up.0.resnet.1", "mid.0"]):                                   # doctest: +SKIP
    ...     image = generate(pipe, ["a red circle"], [0])[0]
    """
    names = [blocks] if isinstance(blocks, str) else blocks
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    layers = [unet.get_submodule(resolve_block(unet, name).adds) for name in names]
    handles: list[Any] = []
    try:
        with _uncompiled(unet, wrapped=unet is not pipe.unet):
            for layer in layers:
                handles.append(layer.register_forward_hook(lambda _module, _args, added: torch.zeros_like(added)))
            yield
    finally:
        for handle in handles:
            handle.remove()

"""How many processes share a piece of work: one, unless `accelerate launch` or `torchrun` started several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from sdxl_sae_kit.artifacts import Artifact

_PATIENCE = timedelta(days=1)  # shares of long work end far apart


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that does what must be done once."""
        return self.index == 0

    def wait(self) -> None:
        """Return once all have come here; fails if one of them has died."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextmanager
    def hold(self, artifact: Artifact, prepare: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of an artifact that all write, which the first takes for them once it has prepared the folder.

        Raises:
            ArtifactError: somebody else is writing it.
        """
        if not self.first:
            self.wait()
        with artifact.lock(shared=not self.first) as admit_others:
            if self.first:
                prepare()
                if self.count > 1:
                    admit_others()
                self.wait()
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """This tensor summed over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flags: Tensor) -> Tensor:
        """Which of these flags any process has set."""
        return self.sum(flags.to(torch.int32)) > 0 if self.count > 1 else flags

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which are of one shape, one after the other."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


def find_processes() -> Processes:
    """This process and how many work beside it, as the launcher's environment variables tell; sets up their contact.

    Each of them must make every call that shares work: one that does not is waited for.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return Processes()
    from accelerate import PartialState  # seconds to import, which only those who launch several should pay

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes)

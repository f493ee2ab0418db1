"""Kinds of SAE: which latents are active, when an SAE is used and while it learns.

topk        the k largest pre-activations of each token
batchtopk   in training the k · n largest of a batch of n tokens; in use those above one threshold for all latents
jumprelu    those above a threshold of each latent, which is learnt

A kind of your own is a subclass of `SAEKind` with a name: `docs/extending/sae_kind.md` shows one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from sdxl_sae_kit.artifacts import slug
from sdxl_sae_kit.errors import KitError, did_you_mean
from sdxl_sae_kit.processes import Processes
from sdxl_sae_kit.sparse import Active, above, active, largest, top_k

KINDS: dict[str, SAEKind] = {}
"""Every kind that was defined so far, by name."""


class SAEKind:
    """Which latents of a token are active; z = relu(h) there and 0 elsewhere.

    A subclass that sets `name` is known to `SAEConfig(kind=name)`, `train` and `SAE.load` from then on. It has no
    state: all that an SAE learns is in its weights. A file only names its kind, and nothing in it is run.

    Raises:
        KitError: the name is another kind's, or has other characters than letters, digits, `.`, `_` and `-`.

    Example:
        >>> class Strongest(SAEKind):
        ...     name = "strongest"
        ...     def active(self, h, k, threshold):
        ...         return active(top_k(h, 1), h.shape[1])
        >>> "strongest" in KINDS
        True
    """

    name: ClassVar[str] = ""
    """What `SAEConfig.kind` calls it."""
    needs_k: ClassVar[bool] = True
    """Whether it cannot do without k. Only one that needs it takes Matryoshka prefixes and a `k_start`."""
    threshold: ClassVar[Literal["unused", "calibrated", "learnt"]] = "unused"
    """Whether the SAE's thresholds stay 0, are set to leave k latents active per token once training is over, or are
    learnt as those of a jumprelu are, with its penalty."""
    exported_as: ClassVar[Literal["topk", "jumprelu"] | None] = None
    """What other tools call what it computes; None where they cannot hold it, and `SAE.export` refuses."""

    def __init_subclass__(cls) -> None:
        if not cls.name:
            return
        known = KINDS.get(cls.name)
        if known and _place(type(known)) != _place(cls):  # a cell or module that is run again defines the same one
            raise KitError(
                f"There is an SAE kind {cls.name!r} already: {_place(type(known))}. Give yours another name."
            )
        if cls.name != slug(cls.name):
            raise KitError(f"{cls.name!r} cannot name an SAE kind. Use letters, digits, '.', '_' and '-'.")
        KINDS[cls.name] = cls()

    def active(self, h: Float[Tensor, "token d_sae"], k: int | None, threshold: Float[Tensor, "d_sae"]) -> Active:
        """Entries that are active when the SAE is used, from the signed pre-activations h.

        `sparse.active` and `sparse.above` make such entries, from latents of each token or from a threshold.
        """
        raise NotImplementedError(f"The SAE kind {self.name!r} does not say which latents are active.")

    def active_in_training(
        self,
        h: Float[Tensor, "token d_sae"],
        k: int | None,
        threshold: Float[Tensor, "d_sae"],
        n: int,
        processes: Processes,
    ) -> Active:
        """The same while it learns; h is this process's part of a batch of n tokens."""
        return self.active(h, k, threshold)

    def penalty(self, z: Float[Tensor, "entry"], n: int) -> Float[Tensor, ""]:
        """What `SAEConfig.sparsity_coef` weighs in the loss: this part of a batch of n tokens' share of it, here 0."""
        return z.new_zeros(())


def find_kind(name: object) -> SAEKind:
    """The kind of this name.

    Raises:
        UnknownKindError: none was defined.
    """
    if isinstance(name, str) and name in KINDS:
        return KINDS[name]
    raise UnknownKindError(
        f"kind is one of {', '.join(KINDS)}, not {name!r}.{did_you_mean(name, KINDS)} One of your own is known once "
        "the module that defines it (a subclass of SAEKind) is imported."
    )


class UnknownKindError(KitError):
    """A kind of SAE that nothing imported so far defines."""


class _TopK(SAEKind):
    name, exported_as = "topk", "topk"

    def active(self, h: Float[Tensor, "token d_sae"], k: int | None, threshold: Float[Tensor, "d_sae"]) -> Active:
        assert k
        return active(top_k(h, k), h.shape[1])


class _BatchTopK(SAEKind):
    name, threshold, exported_as = "batchtopk", "calibrated", "jumprelu"

    def active(self, h: Float[Tensor, "token d_sae"], k: int | None, threshold: Float[Tensor, "d_sae"]) -> Active:
        return above(h, threshold)

    def active_in_training(
        self,
        h: Float[Tensor, "token d_sae"],
        k: int | None,
        threshold: Float[Tensor, "d_sae"],
        n: int,
        processes: Processes,
    ) -> Active:
        assert k
        most = largest(h, k * n + 1)  # all but the last are to be active
        if processes.count > 1:
            most = processes.gather(most).topk(k * n + 1).values
        return above(h, most[-1])


class _JumpReLU(SAEKind):
    name, needs_k, threshold, exported_as = "jumprelu", False, "learnt", "jumprelu"

    def active(self, h: Float[Tensor, "token d_sae"], k: int | None, threshold: Float[Tensor, "d_sae"]) -> Active:
        return above(h, threshold)


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

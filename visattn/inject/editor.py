"""What an editor gets for an attention call: its inputs, and a function that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from visattn.geometry.layout import TokenLayout
from visattn.inject.observation import Observation

__all__ = ["AttentionCall", "Editor", "Kernel", "Kind"]

Kind = Literal["self", "joint", "cross"]


class Kernel(Protocol):
    """Attention of a part of the batch by the plan, or by the pipeline if the plan has no rule for
    the layer.

    Args:
        part: index of the part of the batch. Each pass is one part, all of the same size; 0 if
            there is one.
        q: queries ``[b, H', Lq, D']``. ``D'`` may be larger than ``D`` of the call; the scale does
            not change.
        k: keys ``[b, H', Lk, D']``.
        v: values ``[b, H', Lk, D']``.
        heads: numbers of the heads in ``q``, ascending; None: all heads.
        lse: whether the log-sum-exp ``[b, H', Lq]`` is also returned.
        again: whether this is a further attention of the same call. Dynamic patterns then choose
            for it alone and remember nothing of it.
    """

    def __call__(
        self,
        part: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: tuple[int, ...] | None = None,
        lse: bool = False,
        again: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


@dataclass(frozen=True)
class AttentionCall(Observation):
    """An attention call that an editor may change.

    Args:
        kind: ``self``, ``joint`` (text is part of the sequence) or ``cross`` (keys are text).
        kv_layout: layout of the keys.
        factor: factor of the logits.
        sparse: whether some head of some part of the batch is sparse under the plan.
        kernel: computes the attention.
        masked: whether the call has an attention mask or is causal.
    """

    kind: Kind
    kv_layout: TokenLayout
    factor: float
    sparse: bool
    kernel: Kernel
    masked: bool = False


class Editor(Protocol):
    """Changes attention calls.

    Attributes:
        paths: paths of the layers whose calls it gets.
    """

    paths: frozenset[str]

    def wants(self, call: Observation) -> bool:
        """Return whether it edits a call; this depends on the layer, step and passes."""
        ...

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        """Return the attention ``[B, H, Lq, D]``, or None if it changes nothing."""
        ...

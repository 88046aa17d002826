"""What an editor sees of an attention call: the call before it is computed, and the computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from visattn.geometry.layout import TokenLayout
from visattn.inject.observation import Observation

__all__ = ["AttentionCall", "Editor", "Kernel", "Kind"]

Kind = Literal["self", "joint", "cross"]


class Kernel(Protocol):
    """Attention of a part of the batch as the plan has it, or the pipeline's own where it has
    nothing for the layer.

    Args:
        part: which of the equal parts of the batch that the passes make; 0 where there is one.
        q: ``[b, H', Lq, D']``; k, v: ``[b, H', Lk, D']`` as they are to be used: ``D'`` may be
            wider than that of the call, whose scale stays.
        heads: numbers of the heads that ``q`` has, ascending; None: all of them.
        lse: whether the LSE ``[b, H', Lq]`` is given too.
        again: whether this is a further attention of a call, of which dynamic patterns remember
            nothing; they choose for it alone.
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
    """An attention call that an editor may compute in its own way.

    Args:
        kind: ``self``, ``joint`` (text is part of the sequence) or ``cross`` (keys are text).
        kv_layout: what the keys are.
        factor: of the logits.
        sparse: whether some head of some part of the batch is sparse under the plan.
        kernel: the computing.
        masked: whether the call has an attention mask or is causal.
    """

    kind: Kind
    kv_layout: TokenLayout
    factor: float
    sparse: bool
    kernel: Kernel
    masked: bool = False


class Editor(Protocol):
    """Computes attention calls in its own way. ``paths``: of the layers whose calls it is shown."""

    paths: frozenset[str]

    def wants(self, call: Observation) -> bool:
        """Whether it edits a call, by its layer, step and passes."""
        ...

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        """The attention ``[B, H, Lq, D]``, or None where nothing is edited."""
        ...

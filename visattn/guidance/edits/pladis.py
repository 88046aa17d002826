"""PLADIS: cross-attention moved beyond softmax, away from it towards its sparse relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State

__all__ = ["PLADIS", "entmax15", "sparse_attention_of", "sparsemax"]

CHUNK = 1 << 22  # numbers of a tensor that are there at a time
KEYS = 512
Rule = Literal["entmax15", "sparsemax"]


@dataclass(frozen=True, kw_only=True)
class PLADIS(Edit):
    """``O <- lambda O_sparse + (1 - lambda) O`` for cross-attention, ``O_sparse`` having entmax or
    sparsemax in place of softmax (Kim and Sim 2025, ICCV, arXiv 2503.07677). No further pass.

    Args:
        weight: ``lambda``; 0 changes nothing, 1 is sparse attention, above 1 it goes beyond.
        rule: ``entmax15`` (Peters, Niculae and Martins 2019) or ``sparsemax`` (Martins and
            Astudillo 2016, arXiv 1602.02068), which keeps fewer keys.

    Rows of keys are sorted, so that there may be at most 512 of them.

    Source:
        Kim and Sim (2025), "PLADIS: Pushing the Limits of Attention in Diffusion Models at
        Inference Time by Leveraging Sparsity", arXiv 2503.07677.
    Default:
        paper. No code of the authors is known.
    Differences:
        - Rows have at most 512 keys.
    """

    weight: float = 2.0
    rule: Rule = "entmax15"
    attention: Literal["self", "cross"] = "cross"
    example: ClassVar[str] = "PLADIS(weight=2.0, rule='entmax15')"
    stage: ClassVar[str] = "lerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight):
            raise ValueError(f"PLADIS(weight={self.weight!r}) must be a finite number; 0 is none")
        if self.rule not in RULES:
            raise ValueError(f"PLADIS(rule={self.rule!r}) must be {' or '.join(RULES)}")
        if self.attention != "cross":
            raise ValueError(
                "PLADIS(attention='self') is not possible: it sorts the keys of every row, which "
                "is for the text of cross-attention; take attention='cross'"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.weight == 0:
            return
        call, keys = state.call, state.k.shape[2]
        if keys > KEYS:
            raise ValueError(
                f"PLADIS is for at most {KEYS} keys, and {call.layer} has {keys}; leave the layer "
                "out"
            )
        if call.masked:
            raise ValueError(
                f"PLADIS does not know the attention mask that {call.layer} is given; leave the "
                "layer out"
            )
        sparse = sparse_attention_of(state.q, state.k, state.v, call.factor, self.rule)
        new = sparse if self.weight == 1 else torch.lerp(state.out, sparse, self.weight)
        self.change(state, "out", new, strength)


def sparse_attention_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, rule: Rule
) -> torch.Tensor:
    """Attention with another rule than softmax, ``[b, H, L, D]``, in chunks of rows."""
    wide = torch.promote_types(q.dtype, torch.float32)
    own_k, own_v = k.to(wide).mT, v.to(wide)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    step = max(1, CHUNK // (q.shape[0] * q.shape[1] * max(k.shape[2], q.shape[3])))
    for first in range(0, q.shape[2], step):
        rows = slice(first, first + step)
        weights = RULES[rule](q[:, :, rows].to(wide) @ own_k * factor)
        out[:, :, rows] = (weights @ own_v).to(out.dtype)
    return out


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Weights ``max(z / 2 - t, 0)^2`` over the last axis, ``t`` being such that they sum to 1."""
    half = (logits - logits.amax(-1, keepdim=True)) / 2
    # t is from -1 on, so that what is below counts for nothing
    ordered = half.clamp(min=-1).sort(-1, descending=True).values
    count = torch.arange(1, half.shape[-1] + 1, dtype=half.dtype, device=half.device)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    bound = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    kept = (bound <= ordered).sum(-1, keepdim=True)
    return (half - bound.gather(-1, kept - 1)).clamp(min=0).square()


def sparsemax(logits: torch.Tensor) -> torch.Tensor:
    """Weights ``max(z - t, 0)`` over the last axis, ``t`` being such that they sum to 1."""
    own = logits - logits.amax(-1, keepdim=True)
    ordered = own.clamp(min=-1).sort(-1, descending=True).values
    count = torch.arange(1, own.shape[-1] + 1, dtype=own.dtype, device=own.device)
    bound = (ordered.cumsum(-1) - 1) / count
    kept = (bound < ordered).sum(-1, keepdim=True)
    return (own - bound.gather(-1, kept - 1)).clamp(min=0)


RULES = {"entmax15": entmax15, "sparsemax": sparsemax}

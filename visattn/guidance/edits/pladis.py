"""PLADIS: extrapolate cross-attention from softmax towards a sparse alternative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visattn._arguments import check_number
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State

__all__ = ["PLADIS", "entmax15", "sparse_attention_of", "sparsemax"]

CHUNK = 1 << 22  # elements of the largest intermediate tensor
MAX_KEYS = 512
Rule = Literal["entmax15", "sparsemax"]


@dataclass(frozen=True, kw_only=True)
class PLADIS(Edit):
    """Extrapolate cross-attention from softmax towards entmax or sparsemax: ``O <- lambda O_sparse
    + (1 - lambda) O``, where ``O_sparse`` is attention with the sparse rule (Kim and Sim 2025,
    ICCV, arXiv 2503.07677). No additional denoiser pass is needed.

    The logits of every row are sorted, so a layer may have at most 512 keys.

    Args:
        weight: ``lambda``. 0 changes nothing, 1 is sparse attention, above 1 extrapolates.
        rule: ``entmax15`` (Peters, Niculae and Martins 2019) or ``sparsemax`` (Martins and
            Astudillo 2016, arXiv 1602.02068), which keeps fewer keys.
        attention: ``cross``, the only allowed value.

    The other arguments are those of ``Edit``.

    Raises:
        ValueError: an argument is out of range; or, at an attention call, the layer has more than
            512 keys or an attention mask.

    Example:
        >>> from visattn.guidance import PLADIS, steer
        >>> with steer(pipe, PLADIS(weight=2.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        check_number("PLADIS", "weight", self.weight, "a finite number; 0 changes nothing")
        if self.rule not in RULES:
            raise ValueError(f"PLADIS(rule={self.rule!r}) must be {' or '.join(RULES)}")
        if self.attention != "cross":
            raise ValueError(
                "PLADIS(attention='self') is not possible: it sorts the logits of every row, which "
                "only the few text keys of cross-attention allow; use attention='cross'"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.weight == 0:
            return
        call, keys = state.call, state.k.shape[2]
        if keys > MAX_KEYS:
            raise ValueError(
                f"PLADIS allows at most {MAX_KEYS} keys, and {call.layer} has {keys}; leave the "
                "layer out"
            )
        if call.masked:
            raise ValueError(
                f"PLADIS ignores attention masks, and {call.layer} has one; leave the layer out"
            )
        sparse = sparse_attention_of(state.q, state.k, state.v, call.factor, self.rule)
        new = sparse if self.weight == 1 else torch.lerp(state.out, sparse, self.weight)
        self.change(state, "out", new, strength)


def sparse_attention_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, rule: Rule
) -> torch.Tensor:
    """Compute attention with another rule than softmax, in chunks of rows.

    Args:
        q: queries ``[b, H, Lq, D]``.
        k: keys ``[b, H, Lk, D]``.
        v: values ``[b, H, Lk, D]``.
        factor: scale of the logits.
        rule: name of a function of ``RULES``.

    Returns:
        The output ``[b, H, Lq, D]``, of the dtype of ``v``.
    """
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    k_transposed, values = k.to(acc_dtype).mT, v.to(acc_dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    step = max(1, CHUNK // (q.shape[0] * q.shape[1] * max(k.shape[2], q.shape[3])))
    for first in range(0, q.shape[2], step):
        rows = slice(first, first + step)
        weights = RULES[rule](q[:, :, rows].to(acc_dtype) @ k_transposed * factor)
        out[:, :, rows] = (weights @ values).to(out.dtype)
    return out


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Return weights ``max(z / 2 - t, 0)^2`` of logits ``z`` over the last axis, where ``t`` makes
    them sum to 1."""
    half = (logits - logits.amax(-1, keepdim=True)) / 2
    # t is at least -1, so smaller logits have no weight
    ordered = half.clamp(min=-1).sort(-1, descending=True).values
    count = torch.arange(1, half.shape[-1] + 1, dtype=half.dtype, device=half.device)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    bound = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    kept = (bound <= ordered).sum(-1, keepdim=True)
    return (half - bound.gather(-1, kept - 1)).clamp(min=0).square()


def sparsemax(logits: torch.Tensor) -> torch.Tensor:
    """Return weights ``max(z - t, 0)`` of logits ``z`` over the last axis, where ``t`` makes them
    sum to 1."""
    shifted = logits - logits.amax(-1, keepdim=True)
    ordered = shifted.clamp(min=-1).sort(-1, descending=True).values
    count = torch.arange(1, shifted.shape[-1] + 1, dtype=shifted.dtype, device=shifted.device)
    bound = (ordered.cumsum(-1) - 1) / count
    kept = (bound < ordered).sum(-1, keepdim=True)
    return (shifted - bound.gather(-1, kept - 1)).clamp(min=0)


RULES = {"entmax15": entmax15, "sparsemax": sparsemax}

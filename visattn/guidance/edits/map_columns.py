"""Columns of the attention map for a few keys, without the map, and their gradient.

With ``S = factor q k^T``, ``P = softmax(S)`` and ``G`` the gradient of the columns, ``W = P G`` in
the columns and ``c`` the row sums of ``W``, the gradient is ``dS = W - c P``: ``dq = factor dS k``
and ``dk = factor dS^T q``. Some rows at a time are computed, so that memory is that of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from visattn.attention.dense_attention import dense_with_lse
from visattn.runtime.torch_settings import plain_torch

__all__ = ["columns_by_lse", "row_chunks", "token_columns"]

LOGITS = 1 << 22  # of a product, so that memory stays that of the inputs


@plain_torch()
def token_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor,
    groups: torch.Tensor,
    weights: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """What queries attend to groups of keys with, the mean over heads; differentiable by ``q`` and
    ``k``, once.

    Args:
        q: ``[B, H, Lq, D]``; k: ``[B, H, Lk, D]``, any float dtype; logits are never rounded to it.
        keys: int64 ``[n]``, which keys, each once.
        groups: float ``[n, columns]``, what each of them counts for in each column.
        weights: float ``[H]``, of the heads in the mean.
        factor: of the logits.

    Returns:
        ``sum_h weights[h] P_h[:, keys] groups``, float32 ``[B, Lq, columns]`` (float64 for
        float64).
    """
    found: torch.Tensor = _TokenColumns.apply(q, k, keys, groups, weights, factor)  # type: ignore[no-untyped-call]
    return found


@plain_torch()
def columns_by_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    groups: torch.Tensor,
    weights: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """The same by a normaliser ``lse [B, H, Lq]`` that is known, without a gradient: what is not in
    it, as what a sparse pattern drops, is not in the columns' normaliser either."""
    wide = lse.dtype
    chosen = k[:, :, keys].to(wide).mT
    groups, weights = groups.to(q.device, wide), weights.to(q.device, wide)
    out = torch.empty(q.shape[0], q.shape[2], groups.shape[1], dtype=wide, device=q.device)
    for rows in row_chunks(q, len(keys)):
        share = (q[:, :, rows].to(wide) @ chosen * factor - lse[:, :, rows, None]).exp()
        out[:, rows] = torch.einsum("bhrn,h->brn", share, weights) @ groups
    return out


class _TokenColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        keys: torch.Tensor,
        groups: torch.Tensor,
        weights: torch.Tensor,
        factor: float,
    ) -> torch.Tensor:
        lse = dense_with_lse(q, k, k, factor)[1]
        ctx.save_for_backward(q, k, lse, keys, groups, weights)
        ctx.factor = factor
        return columns_by_lse(q, k, lse, keys, groups, weights, factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @plain_torch()
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, lse, keys, groups, weights = ctx.saved_tensors
        wide, factor = lse.dtype, ctx.factor
        own = k.to(wide)
        of_keys = gradient.to(wide) @ groups.to(q.device, wide).mT  # [B, Lq, n]
        weights = weights.to(q.device, wide)[None, :, None, None]
        dq = torch.empty_like(q)
        dk = torch.zeros_like(own) if ctx.needs_input_grad[1] else None
        for rows in row_chunks(q, k.shape[2]):
            mine = q[:, :, rows].to(wide)
            share = (mine @ own.mT).mul_(factor).sub_(lse[:, :, rows, None]).exp_()
            weighted = share[..., keys] * of_keys[:, None, rows] * weights
            share.mul_(-weighted.sum(-1, keepdim=True))
            share[..., keys] += weighted
            dq[:, :, rows] = (share @ own * factor).to(q.dtype)
            if dk is not None:
                dk += share.mT @ mine * factor
        return dq, None if dk is None else dk.to(k.dtype), None, None, None, None


def row_chunks(q: torch.Tensor, keys: int) -> list[slice]:
    """Rows of queries whose logits with some keys are few enough."""
    batch, heads, length, _ = q.shape
    step = max(1, LOGITS // max(1, batch * heads * keys))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]

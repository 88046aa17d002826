"""Columns of the attention map for a few keys, and their gradient, without storing the map.

Let ``S = factor q k^T``, ``P = softmax(S)``, ``G`` the gradient of the columns, ``W = P G`` in the
columns and ``c`` the row sums of ``W``. Then ``dS = W - c P``, ``dq = factor dS k`` and
``dk = factor dS^T q``. The rows are computed in chunks, so that memory stays of the order of the
inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from visattn.attention.dense_attention import dense_with_lse
from visattn.runtime.torch_settings import plain_torch

__all__ = ["columns_by_lse", "row_chunks", "token_columns"]

LOGITS = 1 << 22  # logits that are computed at a time


@plain_torch()
def token_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor,
    groups: torch.Tensor,
    weights: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """Return the weights of groups of keys in dense attention, as a mean over heads. The result is
    differentiable once with respect to ``q`` and ``k``.

    Args:
        q: queries ``[B, H, Lq, D]``, of any float dtype. Logits are not rounded to it.
        k: keys ``[B, H, Lk, D]``, of the dtype of ``q``.
        keys: indices of the keys, without repeats, int64 ``[n]``.
        groups: coefficient of each of these keys in each column, float ``[n, columns]``.
        weights: weights of the heads in the mean, float ``[H]``.
        factor: scale of the logits.

    Returns:
        ``sum_h weights[h] P_h[:, keys] groups``, float32 ``[B, Lq, columns]`` (float64 for
        float64).
    """
    columns: torch.Tensor = _TokenColumns.apply(q, k, keys, groups, weights, factor)  # type: ignore[no-untyped-call]
    return columns


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
    """Return the columns of ``token_columns`` from a known log-sum-exp, without a gradient.

    Args:
        q: as in ``token_columns``.
        k: as in ``token_columns``.
        lse: log-sum-exp of the logits, ``[B, H, Lq]``. Keys that it leaves out, such as those that
            a sparse pattern drops, are left out of the normalisation of the columns too.
        keys: as in ``token_columns``.
        groups: as in ``token_columns``.
        weights: as in ``token_columns``.
        factor: as in ``token_columns``.

    Returns:
        The columns ``[B, Lq, columns]``, of the dtype of ``lse``.
    """
    acc_dtype = lse.dtype
    chosen = k[:, :, keys].to(acc_dtype).mT
    groups, weights = groups.to(q.device, acc_dtype), weights.to(q.device, acc_dtype)
    out = torch.empty(q.shape[0], q.shape[2], groups.shape[1], dtype=acc_dtype, device=q.device)
    for rows in row_chunks(q, len(keys)):
        logits = q[:, :, rows].to(acc_dtype) @ chosen * factor
        probabilities = (logits - lse[:, :, rows, None]).exp()
        out[:, rows] = torch.einsum("bhrn,h->brn", probabilities, weights) @ groups
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
        acc_dtype, factor = lse.dtype, ctx.factor
        k_acc = k.to(acc_dtype)
        key_gradient = gradient.to(acc_dtype) @ groups.to(q.device, acc_dtype).mT  # [B, Lq, n]
        weights = weights.to(q.device, acc_dtype)[None, :, None, None]
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k_acc) if ctx.needs_input_grad[1] else None
        for rows in row_chunks(q, k.shape[2]):
            q_rows = q[:, :, rows].to(acc_dtype)
            d_logits = (q_rows @ k_acc.mT).mul_(factor).sub_(lse[:, :, rows, None]).exp_()  # P
            weighted = d_logits[..., keys] * key_gradient[:, None, rows] * weights  # W
            d_logits.mul_(-weighted.sum(-1, keepdim=True))  # -c P
            d_logits[..., keys] += weighted  # dS
            dq[:, :, rows] = (d_logits @ k_acc * factor).to(q.dtype)
            if dk is not None:
                dk += d_logits.mT @ q_rows * factor
        return dq, None if dk is None else dk.to(k.dtype), None, None, None, None


def row_chunks(q: torch.Tensor, keys: int) -> list[slice]:
    """Split the query rows into chunks with at most ``LOGITS`` logits.

    Args:
        q: queries ``[B, H, Lq, D]``.
        keys: number of keys.
    """
    batch, heads, length, _ = q.shape
    step = max(1, LOGITS // max(1, batch * heads * keys))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]

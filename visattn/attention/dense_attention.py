"""Dense attention that returns the LSE, which torch's public function does not return."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from visattn.attention.spec import wants_gradients
from visattn.runtime.private_names import flash_attention_cpu, flash_attention_cuda
from visattn.runtime.torch_settings import plain_torch

__all__ = ["dense_with_lse"]

HALF = torch.float16, torch.bfloat16
LOGITS = 1 << 22  # limit of the logits of a product in plain torch, to bound the memory


@plain_torch()
def dense_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of all queries to all keys.

    The kernels of torch compute it if they return an LSE and no gradient is needed. Otherwise it is
    computed in plain torch in chunks of queries, which the backward pass recomputes.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, H, Lk, D]``; ``Lk`` may be 0.
        v: ``[B, H, Lk, Dv]``.
        factor: factor of the logits.

    Returns:
        Output ``[B, H, Lq, Dv]`` in the inputs' dtype, and natural-log LSE ``[B, H, Lq]``, float32
        (float64 for float64). Rows without a key have output 0 and LSE minus infinity.
    """
    batch, heads, length, dim = q.shape
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if k.shape[2] == 0 or length == 0:
        out = v.new_zeros(batch, heads, length, v.shape[3])
        return out, torch.full((batch, heads, length), -torch.inf, dtype=acc_dtype, device=q.device)
    if not wants_gradients(q, k, v) and v.shape[3] == dim:
        if q.device.type == "cpu":
            out, lse = flash_attention_cpu(q, k, v, factor)
            return out, lse.to(acc_dtype)
        if q.device.type == "cuda" and q.dtype in HALF and dim <= 256 and dim % 8 == 0:
            out, lse = flash_attention_cuda(q, k, v, factor)
            return out, lse[..., :length].to(acc_dtype)
    chunks = q.split(max(1, LOGITS // max(1, batch * heads * k.shape[2])), dim=2)
    recompute = wants_gradients(q, k, v)
    results = [
        checkpoint(_rows, rows, k, v, factor, use_reentrant=False)
        if recompute
        else _rows(rows, k, v, factor)
        for rows in chunks
    ]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one chunk of queries in plain torch."""
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = q.to(acc_dtype) @ k.to(acc_dtype).mT * factor
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().to(q.dtype).to(acc_dtype)
    return (weights @ v.to(acc_dtype)).to(q.dtype), lse

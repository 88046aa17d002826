"""Dense attention with the normaliser of its softmax, which torch's public function keeps."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from visattn.attention.spec import wants_gradients
from visattn.runtime.private_names import flash_attention_cpu, flash_attention_cuda
from visattn.runtime.torch_settings import plain_torch

__all__ = ["dense_with_lse"]

HALF = torch.float16, torch.bfloat16
LOGITS = 1 << 22  # of a product in plain torch, so that memory stays that of the inputs


@plain_torch()
def dense_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries to all keys.

    Args:
        q: ``[B, H, Lq, D]``; k: ``[B, H, Lk, D]``; v: ``[B, H, Lk, Dv]``; ``Lk`` may be 0.
        factor: of the logits.

    Returns:
        ``[B, H, Lq, Dv]`` in the inputs' dtype, and natural-log LSE ``[B, H, Lq]``, float32
        (float64 for float64); rows without a key are 0 and minus infinity. By the kernels of torch
        where they give an LSE and no gradient is wanted, else in plain torch in chunks of queries,
        which a backward pass computes again.
    """
    batch, heads, length, dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if k.shape[2] == 0 or length == 0:
        out = v.new_zeros(batch, heads, length, v.shape[3])
        return out, torch.full((batch, heads, length), -torch.inf, dtype=wide, device=q.device)
    if not wants_gradients(q, k, v) and v.shape[3] == dim:
        if q.device.type == "cpu":
            out, lse = flash_attention_cpu(q, k, v, factor)
            return out, lse.to(wide)
        if q.device.type == "cuda" and q.dtype in HALF and dim <= 256 and dim % 8 == 0:
            out, lse = flash_attention_cuda(q, k, v, factor)
            return out, lse[..., :length].to(wide)
    chunks = q.split(max(1, LOGITS // max(1, batch * heads * k.shape[2])), dim=2)
    again = wants_gradients(q, k, v)
    found = [
        checkpoint(_rows, rows, k, v, factor, use_reentrant=False)
        if again
        else _rows(rows, k, v, factor)
        for rows in chunks
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of some queries."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = q.to(wide) @ k.to(wide).mT * factor
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().to(q.dtype).to(wide)
    return (weights @ v.to(wide)).to(q.dtype), lse

"""The oracle: dense masked attention from the patterns' token rules. Any dtype, any device, O(L^2)
memory.

No other part of the package creates an ``Lq x Lk`` tensor.
"""

from __future__ import annotations

import torch

from visattn.attention.spec import AttentionSpec
from visattn.blocks.block_map import NONE, PARTIAL, BlockMap
from visattn.geometry.layout import TokenLayout, on_cpu, valid_keys
from visattn.patterns import Pattern

__all__ = ["known_finite", "map_mask", "masked_attention", "pattern_mask", "reference_attention"]


def pattern_mask(
    pattern: Pattern,
    layout: TokenLayout,
    kv_layout: TokenLayout | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the token rule of a pattern as a mask, bool ``[Lq, Lk]``."""
    q = torch.arange(layout.length, device=device)
    k = torch.arange((kv_layout or layout).length, device=device)
    return pattern.allows(q[:, None], k[None, :], layout, kv_layout)


@on_cpu
def map_mask(block_map: BlockMap) -> torch.Tensor:
    """Return the pairs that a block map keeps, as a mask in token order, bool ``[Lq, Lk]``."""
    status = block_map.status()
    out = torch.zeros(block_map.layout.length, block_map.kv_layout.length, dtype=torch.bool)
    whole = ((status != NONE) & (status != PARTIAL)).nonzero()
    tiles, index = block_map.tiles
    rows, columns = block_map.partial_pairs
    masks = torch.cat(
        [torch.ones(len(whole), 1, 1).bool().expand(-1, *tiles.shape[1:]), tiles[index]]
    )
    q, q_exists = block_map.q_blocks.tokens(torch.cat([whole[:, 0], rows]))
    k, k_exists = block_map.k_blocks.tokens(torch.cat([whole[:, 1], columns]))
    kept = masks & q_exists[:, :, None] & k_exists[:, None, :]
    number, a, b = kept.nonzero(as_tuple=True)
    out[q[number, a], k[number, b]] = True
    return out


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute masked softmax attention; a row without a key has output 0 and LSE minus infinity.

    Logits, softmax and sums are in float32 (float64 for float64 inputs). Probabilities are rounded
    to the input dtype.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]`` with ``Hk`` dividing ``H``.
        v: ``[B, Hk, Lk, D]``.
        spec: static patterns only; text lengths int64.

    Returns:
        Output ``[B, H, Lq, D]`` in the input dtype and natural-log LSE ``[B, H, Lq]`` in the
        accumulating dtype.
    """
    patterns = spec.static_patterns
    masks = {
        pattern: pattern_mask(pattern, spec.layout, spec.kv_layout, q.device)
        for pattern in dict.fromkeys(patterns)
    }
    mask = torch.stack([masks[pattern] for pattern in patterns])[None]  # [1, H, Lq, Lk]
    if spec.text_lengths is not None:
        mask = mask & valid_keys(spec.text_lengths, spec.key_layout)[:, None, None, :]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return masked_attention(q, k, v, mask, spec.factor, careful=not known_finite(q, k, v))


def known_finite(*tensors: torch.Tensor) -> bool:
    """Return whether all values are finite. It is False for tensors on a device other than the CPU,
    where the check would wait for the device."""
    return all(
        x.device.type == "cpu" and bool(x.detach().sum(dtype=_wide(x)).isfinite()) for x in tensors
    )


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    careful: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention over the last two axes; results as ``reference_attention``.

    Args:
        q: ``[..., Lq, D]``.
        k: ``[..., Lk, D]``.
        v: ``[..., Lk, D]``.
        mask: bool ``[..., Lq, Lk]``; None: every query attends to every key.
        scale: factor of the logits.
        careful: whether inputs may be NaN or infinite. A weight of 0 does not remove such a number
            from a product. They are therefore replaced by 0 in the products, and their effect is
            added for the queries that attend to them. So a masked NaN reaches no output and no
            gradient, and a NaN query without a gradient reaches no gradient.
    """
    acc_dtype, in_dtype = _wide(q), q.dtype
    q, k, v = (x.to(acc_dtype) for x in (q, k, v))
    if not careful:
        logits, values = q @ k.mT * scale, v
    else:
        q_finite, k_finite = (x.isfinite().all(-1, keepdim=True) for x in (q, k))
        finite_q = torch.where(q_finite, q, 0)
        values = torch.where(v.isfinite(), v, 0)
        logits = finite_q @ torch.where(k_finite, k, 0).mT * scale
        nonfinite_logits = (finite_q @ k.mT * scale).detach()
        logits = torch.where(q_finite & ~k_finite.mT, nonfinite_logits, logits)
    if mask is None:
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp()
    else:
        weights, lse = _masked_softmax(logits, mask)
    weights = weights.to(in_dtype).to(acc_dtype)
    out = weights @ values
    if careful:
        nonfinite_v = (~v.isfinite()).to(acc_dtype)
        kept = torch.ones_like(weights) if mask is None else mask.to(acc_dtype).expand_as(weights)
        nonfinite_out = weights.detach() @ torch.where(v.isfinite(), 0, v)
        out = out + torch.where(kept @ nonfinite_v > 0, nonfinite_out, 0)
        nan_rows = torch.where(q_finite[..., 0] | (lse == -torch.inf), 0, torch.nan)
        out, lse = out + nan_rows[..., None], lse + nan_rows
    return out.to(in_dtype), lse


def _masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax weights and the LSE of masked logits. A row without a key has weights 0,
    LSE minus infinity, and gradients without NaN."""
    empty = ~mask.any(-1)
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(empty[..., None], 0)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(empty[..., None], 0)
    return weights, lse.masked_fill(empty, -torch.inf)

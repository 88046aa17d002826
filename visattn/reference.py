"""The oracle: dense masked attention from the patterns' token rules. Any dtype, any device, O(L^2)
memory.

This is the only place where an ``Lq x Lk`` tensor is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visattn.blockmap import NONE, PARTIAL, BlockMap
from visattn.layout import TokenLayout, on_cpu, valid_keys
from visattn.patterns import Pattern

__all__ = ["map_mask", "masked_softmax", "pattern_mask", "reference_attention"]


def pattern_mask(
    pattern: Pattern,
    layout: TokenLayout,
    kv_layout: TokenLayout | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The token rule of a pattern as a mask, bool ``[Lq, Lk]``."""
    q = torch.arange(layout.length, device=device)
    k = torch.arange((kv_layout or layout).length, device=device)
    return pattern.allows(q[:, None], k[None, :], layout, kv_layout)


@on_cpu
def map_mask(block_map: BlockMap) -> torch.Tensor:
    """What a block map computes, as a mask in token order, bool ``[Lq, Lk]``."""
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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    patterns: Sequence[Pattern],
    layout: TokenLayout,
    kv_layout: TokenLayout | None,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention; a row without a key gives 0 and LSE minus infinity.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hk, Lk, D]`` with ``Hk`` dividing ``H``. Logits, softmax
            and sums are in float32, float64 for float64 inputs; probabilities are rounded to the
            input dtype.
        patterns: one per head; text_lengths: int64 ``[B, text segments]`` or None.

    Returns:
        Output ``[B, H, Lq, D]`` in the input dtype and natural-log LSE ``[B, H, Lq]`` in the
        accumulating dtype.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    masks = {p: pattern_mask(p, layout, kv_layout, q.device) for p in dict.fromkeys(patterns)}
    mask = torch.stack([masks[p] for p in patterns])[None]  # [1, H, Lq, Lk]
    if text_lengths is not None:
        mask = mask & valid_keys(text_lengths, kv_layout or layout)[:, None, None, :]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = (q.to(wide) @ k.to(wide).mT * scale).masked_fill(~mask, -torch.inf)
    out, lse = masked_softmax(logits, mask, v.to(wide), q.dtype)
    return out.to(q.dtype), lse


def masked_softmax(
    logits: torch.Tensor, mask: torch.Tensor, v: torch.Tensor, rounded: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of logits that are minus infinity outside the mask; a row without a key gives
    0 and minus infinity, and no NaN in its gradients. Probabilities are rounded to ``rounded``."""
    empty = ~mask.any(-1)
    logits = logits.masked_fill(empty[..., None], 0)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(empty[..., None], 0)
    return weights.to(rounded).to(v.dtype) @ v, lse.masked_fill(empty, -torch.inf)

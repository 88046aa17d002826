"""The largest logit of each block pair, in plain torch; the Triton kernel records the same values
while it computes attention."""

from __future__ import annotations

import torch

from visattn.selectors.stages.selection import Selection

__all__ = ["largest_logits"]

CHUNK = 1 << 22  # logits of one product


def largest_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    selection: Selection,
    reference: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the largest value of logit minus reference for each block pair at level 1.

    Args:
        q: queries ``[B, H, L, D]``.
        k: keys ``[B, Hk, L, D]``.
        selection: the blocks and their levels.
        reference: subtracted from the logits of each query, ``[B, H, L]``.
        scale: factor of the logits.

    Returns:
        float32 ``[B, H, Nq, Nk]``, minus infinity for pairs at other levels.
    """
    q_side, k_side = selection.q_side, selection.k_side
    queries = q_side.take(q).float()
    apart = q_side.take(reference[..., None].float()).masked_fill(
        ~q_side.exists[..., None], torch.inf
    )
    keys = k_side.take(k).float()
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
    flat = keys.flatten(2, 3).mT[:, :, None]
    gone = ~k_side.exists.flatten(2)[:, :, None, None]
    batch, heads, num_k, size = keys.shape[:4]
    step = max(1, CHUNK // (batch * heads * num_k * size * q_side.size))
    maxima = []
    for first in range(0, queries.shape[2], step):
        rows = slice(first, first + step)
        logits = queries[:, :, rows] @ flat * scale - apart[:, :, rows]
        logits = logits.masked_fill(gone, -torch.inf)
        maxima.append(logits.unflatten(-1, (num_k, size)).amax((-1, -3)))
    return torch.cat(maxima, 2).masked_fill(selection.levels != 1, -torch.inf)

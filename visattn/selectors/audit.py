"""What a call misses, from exact attention of some of its query rows.

The identity: leaving out keys of mass ``d`` changes a row's output by ``d`` times the difference of
the mean values of what is left out and what is kept, and ``d = 1 - exp(LSE_kept - LSE_full)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.runtime.torch_settings import plain_torch

__all__ = ["Audit", "audit", "audited_rows"]

CHUNK = 1 << 24  # logits of one product
PRIME = 7919  # rows move by it from step to step


class Audit(NamedTuple):
    """Of the audited rows, float32 ``[B, H, r]``.

    Attributes:
        dropped: the mass that was left out; where means stand for keys, what they miss of it. NaN
            without an LSE.
        error: L1 norm of the output's error over that of the exact output.
    """

    dropped: torch.Tensor
    error: torch.Tensor


def audited_rows(layout: TokenLayout, rows: int, step: int, device: torch.device) -> torch.Tensor:
    """Grid tokens, evenly spread, others at another step; int64."""
    grids = [torch.arange(grid.numel, device=device) + begin for begin, grid in layout.grids]
    tokens = torch.cat(grids)
    count = min(rows, len(tokens))
    at = torch.arange(count, device=device) * len(tokens) // count
    return tokens[(at + step * PRIME) % len(tokens)]


@plain_torch()
def audit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
    rows: int,
    step: int = 0,
) -> Audit:
    """Compare some rows of a call with exact attention, at ``rows / L`` of its cost.

    Args:
        q, out: ``[B, H, L, D]``; k, v: ``[B, Hk, L, D]``; lse: ``[B, H, L]`` or None.
        text_lengths: int64 ``[B, text segments]`` or None.
        rows: of each head; step: of the generation, so that other rows are seen at another one.
    """
    at = audited_rows(layout, rows, step, q.device)
    valid = None if text_lengths is None else valid_keys(text_lengths, layout)[:, None, None]
    share = q.shape[1] // k.shape[1]
    each = max(1, CHUNK // (q.shape[0] * len(at) * k.shape[2]))  # heads at a time
    dropped, error = [], []
    for begin in range(0, q.shape[1], each):
        heads = torch.arange(begin, min(begin + each, q.shape[1]), device=q.device)
        keys, values = (x.index_select(1, heads // share).float() for x in (k, v))
        logits = q[:, heads][:, :, at].float() @ keys.mT * scale
        if valid is not None:
            logits = logits.masked_fill(~valid, -torch.inf)
        full = logits.logsumexp(-1)
        exact = (logits - full[..., None]).exp() @ values
        own = out[:, heads][:, :, at].float()
        norm = exact.abs().sum(-1).clamp(min=1e-30)
        error.append((own - exact).abs().sum(-1) / norm)
        if lse is None:
            dropped.append(torch.full_like(full, torch.nan))
        else:
            dropped.append((1 - (lse[:, heads][:, :, at].float() - full).exp()).clamp(min=0))
    return Audit(torch.cat(dropped, 1), torch.cat(error, 1))

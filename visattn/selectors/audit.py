"""The error of a call, measured by exact attention for some of its query rows.

Leaving out keys with attention mass ``d`` changes the output of a row by ``d`` times the difference
between the mean values of the dropped keys and of the kept keys, with
``d = 1 - exp(LSE_kept - LSE_full)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.runtime.torch_settings import plain_torch

__all__ = ["Audit", "audit", "audited_rows"]

CHUNK = 1 << 24  # most logits of one matrix product
PRIME = 7919  # the audited rows shift by this many tokens from step to step


class Audit(NamedTuple):
    """Measurements of the audited rows, float32 ``[B, H, r]`` each.

    Attributes:
        dropped: the attention mass of the dropped keys. Where block means replace keys, the part
            of the mass that the means miss. NaN if the call has no LSE.
        error: relative error of the output: L1 norm of the error over that of the exact output.
    """

    dropped: torch.Tensor
    error: torch.Tensor


def audited_rows(layout: TokenLayout, rows: int, step: int, device: torch.device) -> torch.Tensor:
    """Return evenly spread grid tokens, int64; each step gets other tokens."""
    grids = [torch.arange(grid.numel, device=device) + begin for begin, grid in layout.grids]
    tokens = torch.cat(grids)
    count = min(rows, len(tokens))
    index = torch.arange(count, device=device) * len(tokens) // count
    return tokens[(index + step * PRIME) % len(tokens)]


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
    """Compare some rows of a call with exact attention; costs ``rows / L`` of dense attention.

    Args:
        q: queries ``[B, H, L, D]``.
        k: keys ``[B, Hk, L, D]``.
        v: values ``[B, Hk, L, D]``.
        out: output of the call, ``[B, H, L, D]``.
        lse: LSE of the call, ``[B, H, L]``, or None.
        layout: the segments of the sequence.
        text_lengths: valid text tokens, int64 ``[B, text segments]``, or None.
        scale: factor of the logits.
        rows: number of audited rows of each head.
        step: denoising step; each step audits other rows.
    """
    audited = audited_rows(layout, rows, step, q.device)
    valid = None if text_lengths is None else valid_keys(text_lengths, layout)[:, None, None]
    share = q.shape[1] // k.shape[1]
    each = max(1, CHUNK // (q.shape[0] * len(audited) * k.shape[2]))  # heads at a time
    dropped, error = [], []
    for begin in range(0, q.shape[1], each):
        heads = torch.arange(begin, min(begin + each, q.shape[1]), device=q.device)
        keys, values = (x.index_select(1, heads // share).float() for x in (k, v))
        logits = q[:, heads][:, :, audited].float() @ keys.mT * scale
        if valid is not None:
            logits = logits.masked_fill(~valid, -torch.inf)
        full = logits.logsumexp(-1)
        exact = (logits - full[..., None]).exp() @ values
        approximate = out[:, heads][:, :, audited].float()
        norm = exact.abs().sum(-1).clamp(min=1e-30)
        error.append((approximate - exact).abs().sum(-1) / norm)
        if lse is None:
            dropped.append(torch.full_like(full, torch.nan))
        else:
            dropped.append((1 - (lse[:, heads][:, :, audited].float() - full).exp()).clamp(min=0))
    return Audit(torch.cat(dropped, 1), torch.cat(error, 1))

"""Text past its length: what it holds, NaN too, must reach neither an output nor a gradient."""

from __future__ import annotations

import torch

from visattn.geometry.layout import TokenLayout, valid_keys

__all__ = ["set_aside", "without_padding", "without_unused_text"]


def without_padding(
    x: torch.Tensor, layout: TokenLayout, text_lengths: torch.Tensor
) -> torch.Tensor:
    """Keys or values ``[B, H, L, D]`` with 0 past the end of each text; lengths int64 ``[B,
    texts]``."""
    return x.masked_fill(~valid_keys(text_lengths, layout)[:, None, :, None], 0)


def set_aside(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[B, H, L, D]`` with 0 for those that are NaN or infinite, and what is to be added
    to their output and LSE: NaN, for the others 0, ``[B, H, L]``. In products a NaN query would
    reach the gradients of all keys."""
    there = q.isfinite().all(-1)
    return torch.where(there[..., None], q, 0), q.new_zeros(()).masked_fill(~there, torch.nan)


def without_unused_text(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    layout: TokenLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a backward pass: q, out ``[B, H, L, D]`` and LSE ``[B, H, L]``, where text queries that
    have no gradient are 0 and see nothing.

    Padding is not told apart from text that nobody used, which adds nothing to a gradient either.
    """
    q, out, lse = q.clone(), out.clone(), lse.clone()
    for first, length in layout.texts:
        rows = slice(first, first + length)
        unused = (grad_out[:, :, rows] == 0).all(-1)
        if grad_lse is not None:
            unused &= grad_lse[:, :, rows] == 0
        for x in (q, out):
            x[:, :, rows].masked_fill_(unused[..., None], 0)
        lse[:, :, rows].masked_fill_(unused, -torch.inf)
    return q, out, lse

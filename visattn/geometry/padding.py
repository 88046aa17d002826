"""Padding of text: its values, also NaN, must affect neither an output nor a gradient."""

from __future__ import annotations

import torch

from visattn.geometry.layout import TokenLayout, valid_keys

__all__ = ["set_aside", "without_padding", "without_unused_text"]


def without_padding(
    x: torch.Tensor, layout: TokenLayout, text_lengths: torch.Tensor
) -> torch.Tensor:
    """Return keys or values ``[B, H, L, D]`` with 0 after the end of each text.

    Args:
        x: ``[B, H, L, D]``.
        layout: tokens of ``x``.
        text_lengths: int64 ``[B, text segments]``.
    """
    return x.masked_fill(~valid_keys(text_lengths, layout)[:, None, :, None], 0)


def set_aside(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace queries that are NaN or infinite by 0, because a product with such a query would
    make the gradients of all keys NaN.

    Returns:
        The queries ``[B, H, L, D]``, and the values ``[B, H, L]`` to add to their output and LSE:
        NaN for the queries that were replaced, 0 for the others.
    """
    finite = q.isfinite().all(-1)
    return torch.where(finite[..., None], q, 0), q.new_zeros(()).masked_fill(~finite, torch.nan)


def without_unused_text(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    layout: TokenLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, out and LSE for a backward pass that skips text queries without a gradient.

    For these queries, q and out ``[B, H, L, D]`` are 0, and LSE ``[B, H, L]`` is minus infinity.
    Text that nothing uses has no gradient either, so padding and unused text are treated alike.
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

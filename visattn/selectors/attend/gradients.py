"""Gradients of attention over a selection, computed by the kernels.

The choice of blocks is treated as constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.geometry.layout import TokenLayout
from visattn.geometry.padding import without_unused_text
from visattn.kernels.launch import backward_launch_of, on_device
from visattn.runtime.torch_settings import plain_torch
from visattn.selectors.attend.dynamic_blockwise import means_of
from visattn.selectors.attend.dynamic_triton import kernel_attend
from visattn.selectors.attend.rest import (
    first_order,
    sampled_bias,
    sampled_tokens,
    valid_block_tokens,
)
from visattn.selectors.selector import Selector
from visattn.selectors.stages.choose import BLOCK
from visattn.selectors.stages.selection import SampledRest, Selection

__all__ = ["LevelAttention", "why_no_gradients"]


def why_no_gradients(selector: Selector, selection: Selection) -> str | None:
    """Return why the kernels cannot compute the gradients of a selection, or None if they can."""
    if selector.records:
        return "the largest logits of its blocks are recorded"
    if selection.correction is not None:
        return "its output is corrected after the softmax"
    if first_order(selection):
        return "its rest has a first-order term"
    return None


class LevelAttention(torch.autograd.Function):
    """``kernel_attend`` with gradients of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        selection: Selection,
        layout: TokenLayout,
        text_lengths: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = kernel_attend(q, k, v, selection, layout, text_lengths, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (selection, layout, text_lengths, scale)
        return out, lse

    @staticmethod
    @plain_torch()
    def backward(
        ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        selection, layout, text_lengths, scale = ctx.call
        given = (q, k, v, out, lse, grad_out, grad_lse)
        grads = gradients(*given, selection, layout, text_lengths, scale)
        return (*grads, None, None, None, None)


@on_device
def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, in their dtypes.

    Plain torch computes the keys and values of each level from k and v, and propagates their
    gradients back to k and v. The kernels compute the gradients of the level's keys and values.
    """
    from visattn.kernels.backward import delta_of
    from visattn.kernels.levels import Keys
    from visattn.kernels.levels_backward import LIST, MEANS, SAMPLE, level_backward

    if text_lengths is not None:
        q, out, lse = without_unused_text(q, out, lse, grad_out, grad_lse, layout)
    q, grad_out = (x if x.stride(3) == 1 else x.contiguous() for x in (q, grad_out))
    delta = delta_of(out, grad_out, grad_lse.float().contiguous())
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    (_, block_k), (block_q, _), warps, stages = backward_launch_of(q, spare=True)
    q_side, k_side = selection.q_side, selection.k_side
    leaf_k, leaf_v = (x.detach().float().requires_grad_() for x in (k, v))
    first = True

    def back(
        keys: torch.Tensor,
        values: torch.Tensor,
        spread: torch.Tensor | None,
        bias: torch.Tensor,
        level: int,
        kind: int,
    ) -> None:
        """Add the gradients of one key set ``[B, h, rows, D]``, computed from leaf_k and leaf_v."""
        nonlocal first
        given = [x for x in (keys, values, spread) if x is not None]
        packed = [x.detach().to(q.dtype).contiguous() for x in given]
        lanes = Keys(packed[0], packed[1], (bias / math.log(2)).float().contiguous(), *packed[2:])
        level_grads = level_backward(
            q,
            grad_out,
            lse,
            delta,
            dq,
            selection.levels.contiguous(),
            q_side.tokens32,
            q_side.length32,
            lanes,
            scale,
            level=level,
            kind=kind,
            first=first,
            tile=(block_q, block_k),
            warps=warps,
            stages=stages,
        )
        first = False
        shared = [
            grad.unflatten(1, (x.shape[1], -1)).sum(2)
            for x, grad in zip(given, level_grads, strict=False)
            if grad is not None
        ]
        torch.autograd.backward(given, shared, retain_graph=True)

    with torch.enable_grad():
        blocks_k, blocks_v = k_side.take(leaf_k), k_side.take(leaf_v)
        exists = valid_block_tokens(k_side, layout, text_lengths)
        for value in selection.values:
            means = means_of(selection, value, blocks_k, blocks_v, exists)
            spread = None if means.spread is None else means.spread.flatten(2, 3)
            alone = means.keys.shape[3] == 1 and value == BLOCK
            kind = MEANS.value if alone else LIST.value
            flat = (means.keys.flatten(2, 3), means.values.flatten(2, 3), spread)
            back(*flat, means.bias.flatten(2), value, kind)
        if isinstance(selection.rest, SampledRest):
            tokens = sampled_tokens(selection.rest, layout, k.device)
            bias = sampled_bias(selection, tokens, layout, torch.float32)
            keys, values = (x.index_select(2, tokens) for x in (leaf_k, leaf_v))
            back(keys, values, None, bias, 0, SAMPLE.value)
    zero = torch.zeros((), device=q.device)
    dk, dv = (zero.expand(x.shape) if x.grad is None else x.grad for x in (leaf_k, leaf_v))
    if first:
        dq = dq.zero_()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

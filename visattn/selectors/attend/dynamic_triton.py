"""Attention over a selection, computed by the Triton kernels."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.kernels.launch import launch_of
from visattn.selectors.attend.rest import (
    first_order,
    sampled_bias,
    sampled_tokens,
    to_tokens,
    value_slope,
    weighted_means,
)
from visattn.selectors.stages.blocks import BlockPartition
from visattn.selectors.stages.choose import BLOCK
from visattn.selectors.stages.kernels import summary, unit_stride
from visattn.selectors.stages.selection import SampledRest, Selection

if TYPE_CHECKING:
    from visattn.kernels.levels import Keys

__all__ = ["kernel_attend"]

MOST_POOLS = 4  # most levels that one launch reads as pooled units
WASTE = 1.25  # blocks are read as whole tiles if padding grows them by at most this factor


def _settings(q: torch.Tensor, size: int) -> tuple[int, int, int, int]:
    """Return the queries and keys of a tile, the warps and the pipeline stages of a launch."""
    block_q, block_k, warps, stages = launch_of(q)[:4]
    while block_q >= 2 * max(16, size):
        block_q //= 2
    return block_q, block_k, warps, stages


def kernel_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
    *,
    settings: tuple[int, int, int, int] | None = None,
    reference: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute attention over a selection by the kernels.

    Takes the same arguments as ``attend``, and:

    Args:
        settings: queries and keys of a tile, warps, stages; default: those of the launch table.
        reference: LSE ``[B, H, L]``. With it, the kernel records the largest value of logit minus
            reference for block pairs at level 1, unless padding the blocks to whole tiles would
            cost too much. None: nothing is recorded.

    Returns:
        The output in the dtype of q; the LSE, float32 ``[B, H, L]``; and the recorded values,
        float32 ``[B, H, Nq, Nk]``, or None.

    Raises:
        ValueError: the kernels do not support the levels of the selection.
    """
    from visattn.kernels.levels import levels_forward
    from visattn.kernels.queries import queries_forward

    q, k, v = (unit_stride(x) for x in (q, k, v))
    q_side, k_side = selection.q_side, selection.k_side
    block_m, block_n, warps, stages = settings or _settings(q, q_side.size)
    size = k_side.size
    slots = max(k.shape[1], k_side.tokens.shape[1])
    if selection.weights is not None:
        slots = max(slots, selection.weights.shape[1])
    valid = None
    if text_lengths is not None:
        valid = valid_keys(text_lengths, layout).to(torch.uint8).contiguous()
    pack = functools.partial(_keys, k, v, k_side, slots, valid)
    plain = selection.values == (1,) and selection.rest is None and selection.correction is None
    if q_side.size == 1 and plain and reference is None:
        block_m, block_n, warps, stages = settings or launch_of(q)[:4]
        while block_n >= 2 * max(16, size):
            block_n //= 2
        return *queries_forward(
            q,
            selection.levels.contiguous(),
            q_side.tokens32,
            pack(((1, -(-size // block_n) * block_n),)),
            scale,
            tile=(block_m, block_n),
            warps=warps,
            stages=stages,
        ), None
    padded_size = -(-size // block_n) * block_n
    tiled = 1 in selection.values and padded_size <= WASTE * size
    full = pack(((1, padded_size),)) if tiled else None
    values = [x for x in selection.values if x != BLOCK and (x != 1 or not tiled)]
    pooled_keys, pools, unit = None, [], 0
    if values:
        parts = [min(value, size) for value in values]
        lanes = [-(-size // part) for part in parts]
        unit = min(block_n, 1 << (min(lanes).bit_length() - 1))
        each = [-(-lane // unit) for lane in lanes]
        if len(values) > MOST_POOLS or (selection.variance and selection.weights is not None):
            raise ValueError(
                f"no kernel supports levels {selection.values} with rest={selection.rest}; use "
                "backend='blockwise'"
            )
        pooled_keys = pack(
            tuple((part, n * unit) for part, n in zip(parts, each, strict=True)),
            selection.variance,
        )
        first = 0
        for value, number in zip(values, each, strict=True):
            pools.append((value, number, first))
            first += number * len(k_side)
    rest: Keys | None = None
    if isinstance(selection.rest, SampledRest):
        rest = _sample(k, v, selection, layout, slots)
    elif selection.weights is not None:
        rest = _weighted(k, v, selection, slots)
    elif BLOCK in selection.values:
        rest = pack(((size, 1),), selection.variance)
    out, lse, share, highest = levels_forward(
        q,
        selection.levels.contiguous(),
        q_side.tokens32,
        q_side.length32,
        scale,
        full=full,
        pools=tuple(pools),
        pooled=pooled_keys,
        unit=unit,
        rest=rest,
        share=first_order(selection),
        reference=reference if tiled else None,
        tile=(block_m, block_n),
        warps=warps,
        stages=stages,
    )
    if share is not None:
        keys, values_ = k_side.take(k).float(), k_side.take(v).float()
        means = summary(k, k_side, keys.shape[1])
        slope = value_slope(keys, values_, means[:, :, :, None], k_side, scale)
        slope = slope.repeat_interleave(q.shape[1] // slope.shape[1], 1)
        out = (out + share[..., None] * (q.float() @ slope)).to(q.dtype)
    if selection.correction is not None:
        factor, extra = (
            to_tokens(
                x.unsqueeze(3).expand(*x.shape[:3], q_side.size, *x.shape[3:]), q_side, q.shape[2]
            )
            for x in (selection.correction[0][..., None], selection.correction[1])
        )
        out = (out * factor + extra).to(q.dtype)
    return out, lse, highest


def _keys(
    k: torch.Tensor,
    v: torch.Tensor,
    side: BlockPartition,
    slots: int,
    valid: torch.Tensor | None,
    parts: tuple[tuple[int, int], ...],
    variance: bool = False,
) -> Keys:
    """Return the means of keys and values, for each (part, width) of ``parts`` in turn.

    A block gives ``width`` means of ``part`` tokens each.
    """
    from visattn.kernels.levels import Keys
    from visattn.kernels.summary import summarise

    batch, _, _, dim = k.shape
    rows = len(side) * sum(width for _, width in parts)
    keys, values = (x.new_empty(batch, slots, rows, dim) for x in (k, v))
    bias = torch.empty(batch, slots, rows, dtype=torch.float32, device=k.device)
    spread = torch.zeros_like(keys) if variance else None
    begin = 0
    for part, width in parts:
        run = functools.partial(
            summarise,
            tokens=side.tokens32,
            length=side.length32,
            part=part,
            width=width,
            begin=begin,
        )
        run(k, mean=keys, bias=bias, valid=valid, spread=spread if part > 1 else None)
        run(v, mean=values)
        begin += width * len(side)
    return Keys(keys, values, bias, spread)


def _weighted(k: torch.Tensor, v: torch.Tensor, selection: Selection, slots: int) -> Keys:
    """Return one weighted mean of each block."""
    from visattn.kernels.levels import Keys

    side = selection.k_side
    keys, values, bias = weighted_means(selection, side.take(k).float(), side.take(v).float())
    share = slots // keys.shape[1]
    keys, values, bias = (x.repeat_interleave(share, 1) for x in (keys, values, bias))
    bias = (bias / math.log(2)).contiguous()
    return Keys(keys.to(k.dtype).contiguous(), values.to(v.dtype).contiguous(), bias)


def _sample(
    k: torch.Tensor, v: torch.Tensor, selection: Selection, layout: TokenLayout, slots: int
) -> Keys:
    """Return the sampled keys, with the logarithm of their weight in each row."""
    from visattn.kernels.levels import Keys

    assert isinstance(selection.rest, SampledRest)
    tokens = sampled_tokens(selection.rest, layout, k.device)
    bias = sampled_bias(selection, tokens, layout, torch.float32)
    keys, values = (
        x.index_select(2, tokens).repeat_interleave(slots // x.shape[1], 1).contiguous()
        for x in (k, v)
    )
    return Keys(keys, values, (bias / math.log(2)).contiguous())

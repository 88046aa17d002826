"""Summaries of blocks of tokens: means, variances and biases of groups of tokens in block order.

Each ``part`` consecutive tokens of a block form a lane: their mean, and optionally the variance of
each component. ``part = 1`` copies the tokens in block order. A block has ``width`` lanes in
adjacent rows. The last lanes of a short block are empty: value 0 and bias minus infinity.

x ``[B, H, L, D]`` has stride 1 along D and any other strides. Sums are float32, in the order of the
tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from visattn.kernels.pooled import apart


@triton.jit
def _summary_kernel(
    x,
    tokens,
    length,
    valid,
    mean,
    spread,
    bias,
    stride_xb,
    stride_xh,
    stride_xl,
    stride_tb,
    stride_th,
    stride_nb,
    stride_nh,
    total,
    blocks,
    width,
    size,
    begin,
    rows,
    share,
    part,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    VALID: tl.constexpr,
    SPREAD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program: BLOCK_R lanes of one head; lane ``r`` is part ``r % width`` of block
    ``r // width`` and is written at row ``begin + r`` of ``rows``."""
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < blocks * width
    m_d = (o_d < DIM)[None, :]
    block = o_r // width
    first = (o_r % width) * part
    p_length = length + i_b.to(tl.int64) * stride_nb + i_h.to(tl.int64) * stride_nh
    p_tokens = tokens + i_b.to(tl.int64) * stride_tb + i_h.to(tl.int64) * stride_th
    p_x = x + i_b.to(tl.int64) * stride_xb + (i_h // share).to(tl.int64) * stride_xh
    many = tl.load(p_length + block, mask=m_r, other=0) - first
    many = tl.minimum(many, part)
    total_r = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    square_r = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_R], tl.int32)
    for i in range(0, part):
        here = m_r & (i < many)
        place = block.to(tl.int64) * size + first + i
        token = tl.load(p_tokens + place, mask=here, other=0).to(tl.int64)
        # [R, D]
        b_x = tl.load(
            p_x + token[:, None] * stride_xl + o_d[None, :], mask=here[:, None] & m_d, other=0.0
        ).to(tl.float32)
        if VALID:
            counts = here & (
                tl.load(valid + i_b.to(tl.int64) * total + token, mask=here, other=0) != 0
            )
            count += counts.to(tl.int32)
        else:
            count += here.to(tl.int32)
        total_r += b_x
        if SPREAD:
            square_r += b_x * b_x
    number = tl.maximum(many, 1).to(tl.float32)[:, None] + tl.zeros([1, BLOCK_D], tl.float32)
    mean_r = tl.div_rn(total_r, number)
    row = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * rows + begin + o_r
    at = row[:, None] * DIM + o_d[None, :]
    m_rd = m_r[:, None] & m_d
    tl.store(mean + at, mean_r.to(mean.dtype.element_ty), mask=m_rd)
    if SPREAD:
        spread_r = tl.maximum(tl.div_rn(square_r, number) - mean_r * mean_r, 0.0)
        tl.store(spread + at, spread_r.to(spread.dtype.element_ty), mask=m_rd)
    if BIAS:
        some = tl.log2(tl.maximum(count, 1).to(tl.float32))
        tl.store(bias + row, tl.where(count > 0, some, float("-inf")), mask=m_r)


def summarise(
    x: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    *,
    part: int,
    width: int,
    mean: torch.Tensor,
    begin: int = 0,
    spread: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
) -> None:
    """Write the lanes of all blocks.

    Args:
        x: ``[B, Hx, L, D]``, stride 1 along D.
        tokens: the tokens of each block, int32 ``[G, G', N, size]``, contiguous; ``G`` and ``G'``
            are 1 or those of ``mean``.
        length: the length of each block, int32 ``[G, G', N]``, contiguous.
        part: tokens of a lane.
        width: lanes of a block.
        mean: output, ``[B, H, rows, D]``, contiguous, of any floating type; H is a multiple of Hx.
        begin: the row of the first lane.
        spread: output of the variances, as ``mean``; None: not computed.
        bias: output, float32 ``[B, H, rows]``: log2 of the number of valid tokens of each lane;
            None: not computed.
        valid: uint8 ``[B, L]``, 1 for the tokens that ``bias`` counts; None: all. The mean includes
            all tokens.
    """
    batch, heads, rows, dim = mean.shape
    blocks, size = tokens.shape[2:]
    block_d = max(16, triton.next_power_of_2(dim))
    block_r = max(1, min(32, 2048 // block_d))
    _summary_kernel[(triton.cdiv(blocks * width, block_r), heads, batch)](
        x=x,
        tokens=tokens,
        length=length,
        valid=length if valid is None else valid,
        mean=mean,
        spread=mean if spread is None else spread,
        bias=mean if bias is None else bias,
        stride_xb=x.stride(0),
        stride_xh=x.stride(1),
        stride_xl=x.stride(2),
        stride_tb=apart(tokens)[0],
        stride_th=apart(tokens)[1],
        stride_nb=apart(length)[0],
        stride_nh=apart(length)[1],
        total=x.shape[2],
        blocks=blocks,
        width=width,
        size=size,
        begin=begin,
        rows=rows,
        share=heads // x.shape[1],
        part=part,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        VALID=valid is not None,
        SPREAD=spread is not None,
        BIAS=bias is not None,
        num_warps=4,
    )

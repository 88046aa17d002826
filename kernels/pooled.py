"""Pooled scores: the mean query of each block times the mean key of each block.

``score = factor * mean(q) . mean(k) + bias``. Pairs that are excluded from the choice get minus
infinity. The same launch computes the mean queries; products are float32 (ieee).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _pooled_kernel(
    q,
    k_mean,
    bias,
    scores,
    tokens,
    length,
    q_some,
    k_some,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_tb,
    stride_th,
    stride_nb,
    stride_nh,
    stride_kb,
    stride_kh,
    heads,
    slots,
    num_q,
    num_k,
    size,
    factor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: ROWS query blocks of a head.

    k_mean float32 ``[B, S, Nk, D]``; bias float32 and k_some uint8 ``[G, G', Nk]``; tokens int32
    ``[G, G', Nq, size]``; length int32 and q_some uint8 ``[G, G', Nq]``. q_some and k_some are 1
    for blocks that take part in the choice.
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_q = o_q < num_q
    m_d = o_d < DIM
    own = i_b.to(tl.int64) * stride_nb + i_h * stride_nh
    many = tl.load(length + own + o_q, mask=m_q, other=0)
    p_tokens = tokens + i_b.to(tl.int64) * stride_tb + i_h.to(tl.int64) * stride_th
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    b_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(0, size):
        here = m_q & (i < many)
        token = tl.load(p_tokens + o_q.to(tl.int64) * size + i, mask=here, other=0).to(tl.int64)
        b_q += tl.load(
            p_q + token[:, None] * stride_ql + o_d[None, :],
            mask=here[:, None] & m_d[None, :],
            other=0.0,
        ).to(tl.float32)
    number = tl.maximum(many, 1).to(tl.float32)[:, None] + tl.zeros([1, BLOCK_D], tl.float32)
    b_q = tl.div_rn(b_q, number)
    chosen = tl.load(q_some + own + o_q, mask=m_q, other=0) != 0
    p_k = k_mean + (i_b.to(tl.int64) * slots + i_h // (heads // slots)) * num_k * DIM
    keys = i_b.to(tl.int64) * stride_kb + i_h * stride_kh
    at = ((i_b.to(tl.int64) * heads + i_h) * num_q + o_q) * num_k
    for first in range(0, num_k, BLOCK_N):
        block = first + o_n
        m_n = block < num_k
        # [D, N]
        b_k = tl.load(
            p_k + block[None, :] * DIM + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0
        )
        b_x = tl.dot(b_q, b_k, input_precision="ieee") * factor
        b_x += tl.load(bias + keys + block, mask=m_n, other=0.0)[None, :]
        some = tl.load(k_some + keys + block, mask=m_n, other=0) != 0
        b_x = tl.where(chosen[:, None] & some[None, :], b_x, float("-inf"))
        tl.store(scores + at[:, None] + block[None, :], b_x, mask=m_q[:, None] & m_n[None, :])


def pooled_scores(
    q: torch.Tensor,
    k_mean: torch.Tensor,
    bias: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    q_some: torch.Tensor,
    k_some: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """Return scores float32 ``[B, H, Nq, Nk]``. Arguments as in ``_pooled_kernel``, contiguous;
    ``G`` (``G'``) is 1 if all batch items (heads) share a tensor."""
    batch, heads, _, dim = q.shape
    num_q, num_k = tokens.shape[2], k_mean.shape[2]
    scores = torch.empty(batch, heads, num_q, num_k, dtype=torch.float32, device=q.device)
    rows = 16
    _pooled_kernel[(triton.cdiv(num_q, rows), heads, batch)](
        q,
        k_mean,
        bias,
        scores,
        tokens,
        length,
        q_some,
        k_some,
        *q.stride()[:3],
        *apart(tokens),
        *apart(length),
        *apart(bias),
        heads,
        k_mean.shape[1],
        num_q,
        num_k,
        tokens.shape[3],
        factor,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        ROWS=rows,
        BLOCK_N=32,
        num_warps=4,
        num_stages=2,
    )
    return scores


def apart(x: torch.Tensor) -> tuple[int, int]:
    """Return the strides of the first two axes; 0 for an axis of length 1, which is broadcast."""
    first, second = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1))
    return first, second

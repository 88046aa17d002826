"""Keys and values in block order, each head in its own order: ``dst[b, s, i] = src[b, head[s],
index[s, i]]``.

src ``[B, Hk, L, D]`` has stride 1 along D and any other strides; dst ``[B, S, L, D]`` is
contiguous. One launch writes keys and values.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _permute_kernel(
    k,
    v,
    k_out,
    v_out,
    head_of,
    order_of,
    index,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    length,
    DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_L positions of one slot of a batch item, of the keys (even index) or the
    values (odd index)."""
    i_s = tl.program_id(1)
    slots = tl.num_programs(1)
    i_b = tl.program_id(2) // 2
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_l = o_l < length
    m_ld = m_l[:, None] & (o_d < DIM)[None, :]
    i_h = tl.load(head_of + i_s).to(tl.int64)
    token = tl.load(index + tl.load(order_of + i_s) * length + o_l, mask=m_l, other=0).to(tl.int64)
    target = ((i_b.to(tl.int64) * slots + i_s) * length + o_l)[:, None] * DIM + o_d[None, :]
    if tl.program_id(2) % 2 == 0:
        p_src = k + i_b.to(tl.int64) * stride_kb + i_h * stride_kh
        tl.store(
            k_out + target,
            tl.load(p_src + token[:, None] * stride_kl + o_d[None, :], mask=m_ld, other=0.0),
            mask=m_ld,
        )
    else:
        p_src = v + i_b.to(tl.int64) * stride_vb + i_h * stride_vh
        tl.store(
            v_out + target,
            tl.load(p_src + token[:, None] * stride_vl + o_d[None, :], mask=m_ld, other=0.0),
            mask=m_ld,
        )


def permute(
    k: torch.Tensor,
    v: torch.Tensor,
    head_of: torch.Tensor,
    order_of: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values in block order, ``[B, S, L, D]``.

    Args:
        k: ``[B, Hk, L, D]``, stride 1 along D.
        v: ``[B, Hk, L, D]``, stride 1 along D.
        head_of: int32 ``[S]``, the head of each slot.
        order_of: int32 ``[S]``, the row of ``index`` of each slot.
        index: int32 ``[orders, L]``, ordered position -> token.
    """
    batch, _, length, dim = k.shape
    slots = head_of.shape[0]
    k_out, v_out = (
        torch.empty(batch, slots, length, dim, dtype=k.dtype, device=k.device) for _ in range(2)
    )
    block = 64
    _permute_kernel[(triton.cdiv(length, block), slots, 2 * batch)](
        k,
        v,
        k_out,
        v_out,
        head_of,
        order_of,
        index,
        *k.stride()[:3],
        *v.stride()[:3],
        length,
        DIM=dim,
        BLOCK_L=block,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=4,
    )
    return k_out, v_out

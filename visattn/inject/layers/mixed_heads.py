"""Attention of one part of a batch: the pipeline computes the dense heads, visattn the others."""

from __future__ import annotations

import torch

from visattn.attention import AttentionSpec, Backend, Choice, attention_by, sparse_attention
from visattn.geometry.layout import TokenLayout
from visattn.inject.layers.call import Plain
from visattn.inject.layers.head_groups import HeadGroups, Heads
from visattn.selectors import Memory
from visattn.selectors.audit import audit

__all__ = ["mixed_attention"]


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    part: HeadGroups,
    layout: TokenLayout,
    lengths: torch.Tensor | None,
    scale: float | None,
    plain: Plain,
    memory: Memory,
    backend: Backend,
    audited_rows: int,
    choice: Choice | None = None,
) -> torch.Tensor:
    """Return the attention of all heads, ``[B, H, L, D]``.

    Args:
        q: queries ``[B, H, L, D]``.
        k: keys ``[B, Hk, L, D]``.
        v: values ``[B, Hk, L, D]``.
        part: the patterns of the heads.
        layout: the tokens.
        lengths: valid tokens of each text, int64 ``[B, texts]``; None: all.
        scale: factor of the logits; None: ``D ** -0.5``.
        plain: the attention of the pipeline, which dense heads run.
        memory: the memory of the dynamic patterns.
        backend: the backend of sparse attention.
        audited_rows: query rows of a head for which exact attention is also computed; 0: none.
        choice: the backend that runs, chosen for ``q``; None: each group of heads chooses.
    """
    if not part.sparse:
        return plain(q, k, v)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> torch.Tensor:
        if torch.compiler.is_compiling():  # after a graph break
            return sparse_attention(
                q, k, v, heads, layout, text_lengths=lengths, scale=scale, backend=backend
            )
        with_lse = audited_rows > 0 and not part.products  # products have no LSE
        spec = AttentionSpec(heads, layout, None, lengths, scale, backend, with_lse, choice)
        out, lse = attention_by(q, k, v, spec, memory)
        if audited_rows:
            factor = q.shape[3] ** -0.5 if scale is None else scale
            step = memory.step or 0
            with torch.no_grad():
                result = audit(q, k, v, out, lse, layout, lengths, factor, audited_rows, step)
            memory.audited = (heads, result)
        return out

    if not part.dense or k.shape[1] != q.shape[1]:  # grouped keys are not split by query head
        return run(q, k, v, part.heads)
    dense, sparse = part.indices(q.device)
    out = torch.empty_like(q)
    out[:, dense] = plain(q[:, dense], k[:, dense], v[:, dense])
    out[:, sparse] = run(q[:, sparse], k[:, sparse], v[:, sparse], part.patterns)
    return out

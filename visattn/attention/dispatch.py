"""Execution of a checked and resolved call: groups of heads, forward and backward."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from visattn.attention.choice import IMPLEMENTATIONS, BackendUnavailable, check_kernels
from visattn.attention.spec import AttentionSpec, wants_gradients
from visattn.geometry.layout import index_on
from visattn.geometry.padding import without_padding
from visattn.kernels.launch import on_device
from visattn.patterns import HeadPattern, Pattern
from visattn.runtime.log_once import warn_once
from visattn.runtime.torch_settings import plain_torch
from visattn.selectors import Agent, Selector
from visattn.selectors.attend.largest_logits import largest_logits
from visattn.selectors.memory import Memory

__all__ = ["execute", "execute_backward"]

logger = logging.getLogger(__name__)


@on_device
@plain_torch()
def execute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    memory: Memory | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention by the chosen backend.

    Heads with static patterns run together. Heads that share a dynamic pattern run together, apart
    from the others.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: checked against q, k and v, and resolved.
        memory: choices of earlier steps that dynamic patterns may reuse.

    Returns:
        Output ``[B, H, Lq, D]``, and the LSE ``[B, H, Lq]``, which may be None where
        ``spec.return_lse`` is False.

    Raises:
        ValueError: a dynamic pattern with two layouts, or one that has no LSE.
        BackendUnavailable: the backend that the caller named has no kernel for a pattern.
    """
    groups: dict[HeadPattern | None, list[int]] = {}
    for head, pattern in enumerate(spec.patterns):
        groups.setdefault(None if isinstance(pattern, Pattern) else pattern, []).append(head)
    if list(groups) == [None]:
        return IMPLEMENTATIONS[spec.chosen].forward(q, k, v, spec)
    if spec.key_layout != spec.layout:
        raise ValueError(
            f"kv_layout={spec.kv_layout} differs from layout={spec.layout}; dynamic patterns "
            "choose among the keys of one layout, so give a static pattern, or leave kv_layout out"
        )
    check_kernels(spec.backend, spec.patterns)
    memory = memory or Memory()
    out = torch.empty_like(q)
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=acc_dtype) if spec.return_lse else None
    queries_per_key = q.shape[1] // k.shape[1]
    for dynamic, heads in groups.items():
        group = replace(spec, patterns=tuple(spec.patterns[head] for head in heads))
        q_heads = index_on(tuple(heads), q.device)
        if len(heads) == q.shape[1]:
            tensors = (q, k, v)
        else:
            k_heads = index_on(tuple(head // queries_per_key for head in heads), q.device)
            tensors = (
                q.index_select(1, q_heads),
                k.index_select(1, k_heads),
                v.index_select(1, k_heads),
            )
        if dynamic is None:
            group_out, group_lse = IMPLEMENTATIONS[spec.chosen].forward(*tensors, group)
        else:
            group_out, group_lse = _dynamic(*tensors, group, dynamic, memory)
        out.index_copy_(1, q_heads, group_out)
        if lse is not None:
            if group_lse is None:
                raise ValueError(f"{dynamic} has no LSE; leave return_lse out")
            lse.index_copy_(1, q_heads, group_lse)
    return out, lse


def _dynamic(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    pattern: HeadPattern,
    memory: Memory,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention of heads that share a dynamic pattern."""
    layout, lengths, scale = spec.layout, spec.text_lengths, spec.factor
    if lengths is not None:  # padding must reach neither the choice nor the attention
        k, v = (without_padding(x, layout, lengths) for x in (k, v))
    if isinstance(pattern, Agent):
        return pattern.run(q, k, v, layout, lengths, scale), None
    assert isinstance(pattern, Selector)
    implementation = IMPLEMENTATIONS[spec.chosen]
    kernels = implementation.uses_kernels
    with torch.no_grad():
        selection = memory.choose(pattern, q, k, v, layout, scale, kernels=kernels)
    assert selection.levels.shape[:2] == q.shape[:2], "the selection is for other heads"
    reference = memory.past(pattern).lse if pattern.records else None
    highest = None
    differentiate = wants_gradients(q, k, v)
    if kernels and differentiate:
        from visattn.selectors.attend.gradients import LevelAttention, why_no_gradients

        reason = why_no_gradients(pattern, selection)
        if reason is not None:
            if spec.backend != "auto":
                raise BackendUnavailable(
                    f"backend={spec.backend!r} has no gradients of {pattern}: {reason}; use "
                    "backend='blockwise' or 'auto'"
                )
            warn_once(logger, f"{pattern}: plain torch computes calls with gradients, as {reason}")
            kernels = False
    if kernels and differentiate:
        run_both = LevelAttention.apply
        out, lse = run_both(q, k, v, selection, layout, lengths, scale)  # type: ignore[no-untyped-call]
    elif kernels:
        from visattn.selectors.attend.dynamic_triton import kernel_attend

        out, lse, highest = kernel_attend(
            q, k, v, selection, layout, lengths, scale, reference=reference
        )
    else:
        out, lse = implementation.attend(q, k, v, selection, layout, lengths, scale)
    with torch.no_grad():
        if reference is not None and highest is None:
            highest = largest_logits(q, k, selection, reference, scale)
        memory.learn(pattern, q, k, v, out, lse, layout, lengths, scale, highest)
    return out, lse


@plain_torch()
def execute_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k and v of heads with static patterns.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        out: output of ``execute``, ``[B, H, Lq, D]``.
        lse: LSE of ``execute``, ``[B, H, Lq]``.
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``; None: zero.
        spec: that of ``execute``.

    Returns:
        Gradients in the dtypes of q, k and v.
    """
    backward = IMPLEMENTATIONS[spec.chosen].backward
    return backward(q, k, v, out, lse, grad_out, grad_lse, spec)

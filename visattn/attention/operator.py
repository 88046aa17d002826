"""The operator: attention of q, k, v with a pattern for each head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, overload

import torch

from visattn.attention.checks import check_call, check_patterns, check_tensors
from visattn.attention.choice import Backend, resolve
from visattn.attention.compiled_op import attention_op, dynamic_op, handle_of
from visattn.attention.dispatch import execute
from visattn.attention.spec import AttentionSpec, wants_gradients
from visattn.geometry.layout import TokenLayout
from visattn.patterns import HeadPattern, Pattern
from visattn.runtime.torch_settings import cast_for_attention
from visattn.selectors import Memory

__all__ = ["attention_by", "merge_attention", "sparse_attention"]

logger = logging.getLogger(__name__)


def merge_attention(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets, from the attention over each.

    Args:
        outputs: the output of each set, ``[B, H, L, D]``; at least one.
        lses: the natural-log LSE of each set, ``[B, H, L]``.

    Returns:
        ``sum_i exp(lse_i - lse) output_i`` in the dtype of the outputs, and ``lse = log sum_i
        exp(lse_i)``. The result is exact for disjoint sets. A row without a key in any set has the
        output 0 and the LSE minus infinity.

    Raises:
        ValueError: there is no set, or the shapes do not fit.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv
    1805.02867.

    Example:
        >>> import torch
        >>> from visattn.attention import merge_attention
        >>> logits, v = torch.randn(1, 2, 8, 6), torch.randn(1, 2, 6, 4)
        >>> def attend(keys):
        ...     part = logits[..., keys]
        ...     return part.softmax(-1) @ v[:, :, keys], part.logsumexp(-1)
        >>> (out_a, lse_a), (out_b, lse_b) = attend(slice(0, 4)), attend(slice(4, 6))
        >>> out, lse = merge_attention([out_a, out_b], [lse_a, lse_b])
        >>> torch.allclose(out, logits.softmax(-1) @ v, atol=1e-5)
        True
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses hold {len(outputs)} and {len(lses)} tensors; give one of each per "
            "key set"
        )
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outputs of shape {list(out.shape)} and lses of shape {list(lse.shape)} must be "
                f"{list(outputs[0].shape)} and {list(outputs[0].shape[:-1])}"
            )
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    weights = (stacked - lse.masked_fill(lse == -torch.inf, 0)).exp()
    merged = (torch.stack([out.to(weights.dtype) for out in outputs]) * weights[..., None]).sum(0)
    return merged.to(outputs[0].dtype), lse


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: HeadPattern | Sequence[HeadPattern],
    layout: TokenLayout,
    *,
    kv_layout: TokenLayout | None = ...,
    text_lengths: torch.Tensor | None = ...,
    scale: float | None = ...,
    backend: Backend = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: HeadPattern | Sequence[HeadPattern],
    layout: TokenLayout,
    *,
    kv_layout: TokenLayout | None = ...,
    text_lengths: torch.Tensor | None = ...,
    scale: float | None = ...,
    backend: Backend = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: HeadPattern | Sequence[HeadPattern],
    layout: TokenLayout,
    *,
    kv_layout: TokenLayout | None = None,
    text_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each head computes only the pairs that its pattern keeps.

    Args:
        q: ``[B, H, Lq, D]``, float16, bfloat16, float32 or float64, any device.
        k: ``[B, Hk, Lk, D]``, dtype and device of ``q``. ``Hk`` divides ``H`` (grouped-query
            heads).
        v: shape, dtype and device of ``k``.
        pattern: one for all heads, or one for each head of ``q``: static patterns of
            ``visattn.patterns`` and dynamic patterns of ``visattn.selectors``.
        layout: what the tokens are; ``layout.length == Lq``.
        kv_layout: what the keys are, if they are not the tokens of ``layout``. Only static patterns
            take it.
        text_lengths: valid tokens of each text segment of the keys, int32 or int64 ``[B]`` or
            ``[B, text segments]``. Keys after them are ignored. By default all are valid.
        scale: factor of the logits; by default ``D ** -0.5``.
        backend: ``"triton"`` runs the Triton kernels, on CUDA or ROCm. ``"blockwise"`` computes
            only the visited blocks, in plain torch, on any device. ``"reference"`` computes dense
            attention with a mask. ``"auto"`` takes triton where it runs and blockwise elsewhere,
            and logs its choice.
        return_lse: whether to return the natural-log LSE too.

    Returns:
        ``[B, H, Lq, D]`` in the dtype of ``q``; with ``return_lse`` also the LSE ``[B, H, Lq]`` in
        float32 (float64 for float64). A row without a key (Skip, or text of length 0) has the
        output 0 and the LSE minus infinity.

    Raises:
        TypeError: an argument has a wrong type; the message names the argument, its value and what
            is allowed.
        ValueError: an argument has a wrong value; the message names the same.
        BackendUnavailable: the backend that you named cannot run on this device, or has no kernel
            for a pattern.

    Note:
        NaN and infinite numbers: values after the end of a text, in another head or in another
        sample have no effect. A key or value that is not finite affects the queries that attend to
        it. With ``triton``, and with ``blockwise`` on devices other than the CPU, it affects all
        queries of the blocks that visit its block. If the scores of a head are not finite, a
        dynamic pattern keeps all pairs of that head.

        Gradients: autograd differentiates ``reference`` and ``blockwise``. ``triton`` has kernels
        for the gradients, which read the transposed block lists. Gradients of a dynamic pattern are
        those of the blocks that it chose; they are not available under ``torch.compile``.

        Compilation: ``torch.compile(fullgraph=True)`` traces one operator. Create patterns and
        layouts outside the compiled function.

        Autocast: under ``torch.autocast``, q, k and v are cast to its dtype, as by torch's own
        attention. Internal results keep the precision that they have without autocast. Run
        ``backward`` outside autocast, as torch advises.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.patterns import Neighborhood
        >>> layout = TokenLayout(Grid(4, 8, 8))
        >>> q, k, v = (torch.randn(1, 2, layout.length, 32) for _ in range(3))
        >>> sparse_attention(q, k, v, Neighborhood((3, 5, 5)), layout).shape
        torch.Size([1, 2, 256, 32])
    """
    if torch.compiler.is_compiling():
        heads = (pattern,) * q.shape[1] if isinstance(pattern, HeadPattern) else tuple(pattern)
        spec = AttentionSpec(heads, layout, kv_layout, text_lengths, scale, backend, return_lse)
        out, lse = _traced(q, k, v, spec)
    else:
        q, k, v = cast_for_attention(q, k, v)
        check_tensors(q, k, v)
        heads = check_patterns(pattern, q)
        spec = AttentionSpec(heads, layout, kv_layout, text_lengths, scale, backend, return_lse)
        out, lse = _run(q, k, v, spec, Memory())
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def attention_by(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, memory: Memory
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute ``sparse_attention`` from a spec, with choices of earlier steps that dynamic patterns
    may reuse. It does not work under ``torch.compile``.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: what to compute; it is checked. A resolved spec runs on its backend.
        memory: choices of these heads at earlier steps; dynamic patterns read and update it.

    Returns:
        Output ``[B, H, Lq, D]``, and the LSE ``[B, H, Lq]``, or None where ``spec.return_lse`` is
        False.

    Raises:
        TypeError: as ``sparse_attention``.
        ValueError: as ``sparse_attention``.
        BackendUnavailable: as ``sparse_attention``.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.attention import AttentionSpec, attention_by
        >>> from visattn.patterns import Dense, Neighborhood
        >>> from visattn.selectors import Memory
        >>> layout = TokenLayout(Grid(4, 8, 8))
        >>> q, k, v = (torch.randn(1, 2, layout.length, 32) for _ in range(3))
        >>> spec = AttentionSpec((Dense(), Neighborhood((3, 5, 5))), layout, return_lse=True)
        >>> out, lse = attention_by(q, k, v, spec, Memory())
        >>> lse.shape
        torch.Size([1, 2, 256])
    """
    q, k, v = cast_for_attention(q, k, v)
    check_tensors(q, k, v)
    check_patterns(spec.patterns, q)
    return _run(q, k, v, spec, memory)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, memory: Memory
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check the spec of a call, choose its backend, and compute it."""
    spec = resolve(check_call(q, k, spec), q)
    if spec.backend == "auto":
        assert spec.choice is not None
        logger.debug("sparse_attention runs %s: %s", *spec.choice)
    out, lse = execute(q, k, v, spec, memory)
    return out, lse if spec.return_lse else None


def _traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the call as ``torch.compile`` traces it: one opaque operator. It refers to patterns and
    layouts by identity, so that another pattern gives another graph. They must be created outside
    the compiled function."""
    keys = None if spec.kv_layout is None else id(spec.kv_layout)
    patterns = tuple([id(item) for item in spec.patterns])
    handle = handle_of(patterns, id(spec.layout), keys, spec.backend)
    scale = q.shape[3] ** -0.5 if spec.scale is None else float(spec.scale)
    q, k, v = cast_for_attention(q, k, v)
    with_lse = spec.return_lse or wants_gradients(q, k, v)
    dynamic = [item for item in spec.patterns if not isinstance(item, Pattern)]
    run = dynamic_op if dynamic else attention_op
    out, lse = run(q, k, v, handle, spec.text_lengths, scale, with_lse)
    return out, lse

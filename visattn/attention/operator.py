"""The operator: attention of q, k, v by a pattern per head, and the choice of a backend for it."""

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
        outputs: ``[B, H, L, D]`` each; lses: natural-log LSE ``[B, H, L]`` each; at least one of
            both.

    Returns:
        ``sum_i exp(lse_i - lse) output_i`` in the outputs' dtype and ``lse = log sum_i
        exp(lse_i)``, exact for disjoint sets (Milakov and Gimelshein 2018, arXiv 1805.02867). Rows
        without a key in any set: 0, -inf.

    Raises:
        ValueError: no set, or shapes that do not fit.
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
        k, v: ``[B, Hk, Lk, D]``, dtype and device of ``q``; ``Hk`` divides ``H``
            (grouped-query heads).
        pattern: one for all heads, or one per head of ``q``; static ones of ``visattn.patterns``,
            dynamic ones of ``visattn.selectors``.
        layout: what the tokens are, ``layout.length == Lq``.
        kv_layout: what the keys are, when that is something else; static patterns only.
        text_lengths: valid tokens of each text segment of the keys, int32 or int64 ``[B]`` or
            ``[B, text segments]``; keys beyond are not seen. None: all are valid.
        scale: factor of the logits; default ``D ** -0.5``.
        backend: ``"triton"`` (the kernels: CUDA or ROCm), ``"blockwise"`` (computes visited blocks
            only, in plain torch, on any device), ``"reference"`` (dense with a mask, the oracle),
            or ``"auto"``, which logs what it takes: triton where it runs, else blockwise.
        return_lse: also return the natural-log LSE.

    Returns:
        ``[B, H, Lq, D]`` in the dtype of ``q``; with ``return_lse`` also the LSE ``[B, H, Lq]`` in
        float32 (float64 for float64). A row without a key (Skip, or text of length 0) is 0 with
        LSE minus infinity.

    Raises:
        TypeError, ValueError: an argument is wrong; the sentence names it, what came and what
            is allowed.
        BackendUnavailable: an explicit backend cannot run here, or has no kernel for a pattern.

    NaN and infinite numbers: what is past the end of a text, in another head or another sample
    never matters. A key or value that is not finite reaches the queries that see it, in ``triton``
    and, on other devices than the CPU, ``blockwise`` all queries of the blocks that visit its
    block. A dynamic pattern keeps everything in a head whose scores are not finite, as these have
    no order.

    Gradients: through ``reference`` and ``blockwise`` by autograd, through ``triton`` by kernels
    over the transposed block lists; through dynamic patterns for the blocks that were chosen, and
    not under ``torch.compile``. ``torch.compile(fullgraph=True)`` sees one
    op; patterns and layouts are then made outside the compiled function.

    Under ``torch.autocast`` q, k and v are cast to its dtype, as torch's own attention does;
    nothing inside is computed in a narrower dtype than without it. Run ``backward`` outside of it,
    as torch advises.
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
    may reuse; not under ``torch.compile``.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: what to compute; checked here. A spec that is resolved runs on its backend.
        memory: of these heads; read and updated by dynamic patterns.

    Returns:
        Output ``[B, H, Lq, D]``, and the LSE ``[B, H, Lq]``, or None where ``spec.return_lse`` is
        False.

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``sparse_attention``.
    """
    q, k, v = cast_for_attention(q, k, v)
    check_tensors(q, k, v)
    check_patterns(spec.patterns, q)
    return _run(q, k, v, spec, memory)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, memory: Memory
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check what is left of a call, choose its backend, and compute it."""
    spec = resolve(check_call(q, k, spec), q)
    if spec.backend == "auto":
        assert spec.choice is not None
        logger.debug("sparse_attention runs %s: %s", *spec.choice)
    out, lse = execute(q, k, v, spec, memory)
    return out, lse if spec.return_lse else None


def _traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The call as ``torch.compile`` traces it: one opaque op. Its objects are named by identity, so
    that another pattern is another graph; they must be made outside the compiled function."""
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

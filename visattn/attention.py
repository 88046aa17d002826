"""The operator: attention of q, k, v by a pattern per head, and the choice of a backend for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch

from visattn.blockmap import BlockMap, MapCache, PartialPolicy
from visattn.blockwise import blockwise_attention
from visattn.layout import TokenLayout, check_text_lengths
from visattn.patterns import Pattern
from visattn.patterns.pattern import paired_layouts
from visattn.reference import reference_attention

__all__ = [
    "BACKENDS",
    "Choice",
    "choose_backend",
    "lower_cached",
    "merge_attention",
    "sparse_attention",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "blockwise", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Backend = Literal["auto", "blockwise", "reference"]

MAPS = MapCache(limit_bytes=256 << 20)


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str


def choose_backend(backend: str, device: torch.device) -> Choice:
    """Resolve ``backend``; only ``"auto"`` leaves a choice.

    Raises:
        ValueError: ``backend`` is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return Choice(backend, "asked for")
    return Choice("blockwise", f"plain torch runs on device type {device.type}")


def block_sizes(length: int) -> tuple[int, int]:
    """Query and key block of ``blockwise`` for a sequence length."""
    return (64, 64) if length < 16384 else (128, 128)


def lower_cached(
    pattern: Pattern,
    layout: TokenLayout,
    kv_layout: TokenLayout | None,
    block_q: int,
    block_k: int,
    partial: PartialPolicy = "exact",
) -> BlockMap:
    """``pattern.lower(...)`` through the process-wide cache, so that equal patterns share one
    map."""
    key = (pattern, layout, kv_layout, block_q, block_k, partial)
    return MAPS.get(
        key, lambda: pattern.lower(layout, block_q, block_k, partial=partial, kv_layout=kv_layout)
    )


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


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [B, H, L, D], not {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} of shape {list(x.shape)} must be [B, H, L, D] with no empty axis"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} of dtype {x.dtype} must be float16, bfloat16, float32 or float64"
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} of dtype {x.dtype} must have the dtype of q, {q.dtype}; convert it"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} on {x.device} must be on the device of q, {q.device}; move it"
            )
    if k.shape != v.shape:
        raise ValueError(f"v of shape {list(v.shape)} must have the shape of k, {list(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k of shape {list(k.shape)} must have the batch and head size of q, {list(q.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which the {k.shape[1]} heads of k do not divide"
        )


def _patterns_of(pattern: Pattern | Sequence[Pattern], heads: int) -> tuple[Pattern, ...]:
    if isinstance(pattern, Pattern):
        return (pattern,) * heads
    if not isinstance(pattern, Sequence) or isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} must be a pattern, or a sequence of one per head")
    for item in pattern:
        if not isinstance(item, Pattern):
            raise TypeError(f"pattern holds {item!r}; it takes patterns, for example Radial()")
    if len(pattern) != heads:
        raise ValueError(
            f"pattern holds {len(pattern)} patterns; q has {heads} heads, give one for each"
        )
    return tuple(pattern)


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
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
    pattern: Pattern | Sequence[Pattern],
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
    pattern: Pattern | Sequence[Pattern],
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
        pattern: one for all heads, or one per head of ``q``.
        layout: what the tokens are, ``layout.length == Lq``.
        kv_layout: what the keys are, when that is something else.
        text_lengths: valid tokens of each text segment of the keys, int32 or int64 ``[B]`` or
            ``[B, text segments]``; keys beyond are not seen. None: all are valid.
        scale: factor of the logits; default ``D ** -0.5``.
        backend: ``"blockwise"`` (computes visited blocks only), ``"reference"`` (dense with a mask,
            the oracle), or ``"auto"``, which logs what it takes.
        return_lse: also return the natural-log LSE.

    Returns:
        ``[B, H, Lq, D]`` in the dtype of ``q``; with ``return_lse`` also the LSE ``[B, H, Lq]`` in
        float32 (float64 for float64). A row without a key (Skip, or text of length 0) is 0 with
        LSE minus infinity.

    Raises:
        TypeError, ValueError: an argument is wrong; the sentence names it, what came and what
            is allowed.
    """
    _check_tensors(q, k, v)
    patterns = _patterns_of(pattern, q.shape[1])
    keys = paired_layouts(layout, kv_layout)
    for name, own, x in (("q", layout, q), ("k", keys, k)):
        if own.length != x.shape[2]:
            which = "layout" if own is layout else "kv_layout"
            raise ValueError(f"{name} has {x.shape[2]} tokens but {which} {own} has {own.length}")
    if text_lengths is not None:
        text_lengths = check_text_lengths(text_lengths, keys, q.shape[0]).to(q.device)
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number or None")
    choice = choose_backend(backend, q.device)
    if backend == "auto":
        logger.debug("sparse_attention runs %s: %s", choice.backend, choice.reason)
    if choice.backend == "reference":
        out, lse = reference_attention(q, k, v, patterns, layout, kv_layout, text_lengths, scale)
        return (out, lse) if return_lse else out
    block_q, block_k = block_sizes(max(layout.length, keys.length))
    maps = [lower_cached(item, layout, kv_layout, block_q, block_k) for item in patterns]
    out, row_lse = blockwise_attention(q, k, v, maps, text_lengths, scale, return_lse)
    if return_lse:
        assert row_lse is not None
        return out, row_lse
    return out

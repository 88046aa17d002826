"""Checks of the arguments of a call; an error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from visattn._arguments import is_number
from visattn.attention.spec import AttentionSpec
from visattn.geometry.layout import check_text_lengths
from visattn.patterns import HeadPattern, Pattern
from visattn.patterns.base.pattern import paired_layouts
from visattn.runtime.private_names import is_batched

__all__ = ["check_call", "check_patterns", "check_tensors"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check that q, k and v are dense tensors whose shapes, dtypes and devices fit.

    Raises:
        TypeError: not a tensor, not a dense one, or of another dtype.
        ValueError: a shape or device does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [B, H, L, D], not {type(x).__name__}")
        kind = _unsupported(x)
        if kind is not None:
            raise TypeError(f"{name} is {kind}")
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


def _unsupported(x: torch.Tensor) -> str | None:
    """Return why a tensor is not supported, or None."""
    if x.is_nested:
        return "a nested tensor; attention takes dense ones: call to_padded_tensor() first"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}; attention takes dense ones: call to_dense() first"
    if is_batched(x):
        return "batched by torch.vmap, which patterns cannot follow; put that axis into the batch"
    return None


def check_patterns(
    pattern: HeadPattern | Sequence[HeadPattern], q: torch.Tensor
) -> tuple[HeadPattern, ...]:
    """Return one pattern for each head of q.

    Raises:
        TypeError: not a pattern, or not a sequence of patterns.
        ValueError: not one pattern per head, or a dynamic pattern for a meta tensor.
    """
    heads = q.shape[1]
    patterns = _one_per_head(pattern, heads)
    dynamic = next((item for item in patterns if not isinstance(item, Pattern)), None)
    if q.device.type == "meta" and dynamic is not None:
        raise ValueError(
            f"q is a meta tensor, which has no values for {dynamic} to choose by; give a static "
            "pattern, or tensors on a device"
        )
    return patterns


def _one_per_head(
    pattern: HeadPattern | Sequence[HeadPattern], heads: int
) -> tuple[HeadPattern, ...]:
    if isinstance(pattern, HeadPattern):
        return (pattern,) * heads
    if not isinstance(pattern, Sequence) or isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} must be a pattern, or a sequence of one per head")
    for item in pattern:
        if not isinstance(item, HeadPattern):
            raise TypeError(f"pattern holds {item!r}; it takes patterns, for example Radial()")
    if len(pattern) != heads:
        raise ValueError(
            f"pattern holds {len(pattern)} patterns; q has {heads} heads, give one for each"
        )
    return tuple(pattern)


def check_call(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> AttentionSpec:
    """Check layouts, text lengths and scale against checked tensors.

    Returns:
        The spec with text lengths int64 ``[B, text segments]`` on the device of q, and with the
        factor of the logits as ``scale``.

    Raises:
        TypeError, ValueError: something does not fit.
    """
    paired_layouts(spec.layout, spec.kv_layout)
    return replace(
        spec,
        text_lengths=_checked_lengths(q, k, spec),
        scale=_checked_scale(spec.scale, q.shape[3]),
    )


def _checked_lengths(
    q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor | None:
    """Check the lengths of q and k against their layouts; return the text lengths, int64
    ``[B, text segments]``, or None."""
    keys = spec.key_layout
    for name, layout, x in (("q", spec.layout, q), ("k", keys, k)):
        if layout.length != x.shape[2]:
            which = "layout" if layout is spec.layout else "kv_layout"
            raise ValueError(
                f"{name} has {x.shape[2]} tokens but {which} {layout} has {layout.length}"
            )
    if spec.text_lengths is None:
        return None
    return check_text_lengths(spec.text_lengths, keys, q.shape[0]).to(q.device)


def _checked_scale(scale: float | None, dim: int) -> float:
    """Return the factor of the logits."""
    if scale is None:
        return float(dim**-0.5)
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number or None")
    return float(scale)

"""What a call computes (a Spec), the choice of its backend, and its execution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from visattn.blockmap import BlockMap, MapCache, PartialPolicy
from visattn.blockwise import blockwise_attention
from visattn.layout import TokenLayout
from visattn.patterns import Pattern
from visattn.reference import reference_attention
from visattn.triton_backend import triton_attention, why_unavailable

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "Choice",
    "Spec",
    "choose_backend",
    "execute",
    "lower_cached",
]

BACKENDS = ("auto", "triton", "blockwise", "reference")

MAPS: MapCache[BlockMap] = MapCache(limit_bytes=256 << 20)


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run; the message says why and what to use."""


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Spec:
    """One pattern per query head, the layouts, and the backend asked for."""

    patterns: tuple[Pattern, ...]
    layout: TokenLayout
    kv_layout: TokenLayout | None
    backend: str


def choose_backend(backend: str, q: torch.Tensor) -> Choice:
    """Resolve ``backend`` for tensors like ``q``; only ``"auto"`` leaves a choice.

    Raises:
        ValueError: ``backend`` is unknown.
        BackendUnavailable: it was asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if backend in ("blockwise", "reference"):
        return Choice(backend, "asked for")
    reason = why_unavailable(q)
    if backend == "triton":
        if reason is not None:
            raise BackendUnavailable(
                f"backend='triton' cannot run: {reason}; use backend='blockwise'"
            )
        return Choice("triton", "asked for")
    if q.device.type != "cuda":
        return Choice("blockwise", f"plain torch runs on device type {q.device.type}")
    if reason is None:
        return Choice("triton", f"{q.device} runs Triton")
    return Choice("blockwise", f"not triton: {reason}")


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
    """``pattern.lower(...)`` through the process-wide cache, so that equal patterns share a map."""
    key = (pattern, layout, kv_layout, block_q, block_k, partial)
    return MAPS.get(
        key,
        lambda: pattern.lower(layout, block_q, block_k, partial=partial, kv_layout=kv_layout),
    )


def execute(
    spec: Spec,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run checked tensors on a resolved backend; output, and the LSE when it is asked for."""
    layout, kv_layout = spec.layout, spec.kv_layout
    if backend == "reference":
        return reference_attention(q, k, v, spec.patterns, layout, kv_layout, text_lengths, scale)

    def lower(pattern: Pattern, block_q: int, block_k: int) -> BlockMap:
        return lower_cached(pattern, layout, kv_layout, block_q, block_k)

    if backend == "triton":
        return triton_attention(
            q, k, v, spec.patterns, layout, kv_layout, text_lengths, scale, lower
        )
    return blockwise_attention(q, k, v, blockwise_maps(spec), text_lengths, scale, with_lse)


def blockwise_maps(spec: Spec) -> list[BlockMap]:
    """The map of each head at the blocks of ``blockwise``."""
    sizes = block_sizes(max(spec.layout.length, (spec.kv_layout or spec.layout).length))
    return [lower_cached(item, spec.layout, spec.kv_layout, *sizes) for item in spec.patterns]

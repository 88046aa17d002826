"""What a call computes (a Spec), the choice of its backend, and its execution."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from visattn.attention.backends.blockwise import blockwise_attention, blockwise_backward
from visattn.attention.backends.reference import reference_attention
from visattn.attention.backends.triton_kernels import (
    TritonAttention,
    triton_attention,
    triton_backward,
    why_unavailable,
)
from visattn.blocks.block_map import BlockMap, PartialPolicy
from visattn.blocks.cache import MapCache
from visattn.geometry.layout import TokenLayout, index_on
from visattn.geometry.padding import without_padding
from visattn.kernels.launch import on_device
from visattn.patterns import HeadPattern, Pattern
from visattn.runtime.torch_settings import plain_torch
from visattn.selectors import Agent, Selector
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend
from visattn.selectors.attend.largest_logits import largest_logits
from visattn.selectors.memory import Memory

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "Choice",
    "Spec",
    "choose_backend",
    "execute",
    "execute_backward",
    "lower_cached",
    "wants_gradients",
]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "blockwise", "reference")

MAPS: MapCache[BlockMap] = MapCache(limit_bytes=1 << 30)  # with all that is made of the maps


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run; the message says why and what to use."""


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Spec:
    """One pattern per query head, the layouts, and the backend asked for."""

    patterns: tuple[HeadPattern, ...]
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


@on_device
@plain_torch()
def execute(
    spec: Spec,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
    memory: Memory | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run checked tensors on a resolved backend; output, and the LSE when it is asked for.

    Heads with static patterns run together; those with a dynamic one run beside them, all heads
    that share one in one go.
    """
    groups: dict[HeadPattern | None, list[int]] = {}
    for head, pattern in enumerate(spec.patterns):
        groups.setdefault(None if isinstance(pattern, Pattern) else pattern, []).append(head)
    if list(groups) == [None]:
        return _static(spec, backend, q, k, v, text_lengths, scale, with_lse)
    if spec.kv_layout is not None and spec.kv_layout != spec.layout:
        raise ValueError(
            f"kv_layout={spec.kv_layout} differs from layout={spec.layout}; dynamic patterns "
            "choose among the keys of one layout, so give a static pattern, or leave kv_layout out"
        )
    check_kernels(spec.backend, spec.patterns)
    out = torch.empty_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=wide) if with_lse else None
    share = q.shape[1] // k.shape[1]
    for dynamic, heads in groups.items():
        own = replace(spec, patterns=tuple(spec.patterns[head] for head in heads))
        if len(heads) == q.shape[1]:
            parts = (q, k, v)
        else:
            at = index_on(tuple(heads), q.device)
            of_keys = index_on(tuple(head // share for head in heads), q.device)
            parts = (q.index_select(1, at), k.index_select(1, of_keys), v.index_select(1, of_keys))
        if dynamic is None:
            own_out, own_lse = _static(own, backend, *parts, text_lengths, scale, with_lse)
        else:
            own_out, own_lse = _dynamic(
                dynamic, own, backend, *parts, text_lengths, scale, memory or Memory()
            )
        at = index_on(tuple(heads), q.device)
        out.index_copy_(1, at, own_out)
        if lse is not None:
            if own_lse is None:
                raise ValueError(f"{dynamic} has no LSE; leave return_lse out")
            lse.index_copy_(1, at, own_lse)
    return out, lse


def check_kernels(backend: str, patterns: Iterable[HeadPattern]) -> None:
    """Refuse an explicit backend that cannot run a pattern.

    Raises:
        BackendUnavailable: the kernels were asked for, and a pattern has none.
    """
    other = next((item for item in patterns if isinstance(item, Agent)), None)
    if backend == "triton" and other is not None:
        raise BackendUnavailable(
            f"backend='triton' has no kernel for {other}, which is plain products; use "
            "backend='blockwise' or 'auto'"
        )


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether what is computed of some tensors is to be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def _dynamic(
    pattern: HeadPattern,
    spec: Spec,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    memory: Memory,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads that share a dynamic pattern."""
    layout = spec.layout
    if text_lengths is not None:  # neither the choice nor what follows it looks at padding
        k, v = (without_padding(x, layout, text_lengths) for x in (k, v))
    if isinstance(pattern, Agent):
        return pattern.run(q, k, v, layout, text_lengths, scale), None
    assert isinstance(pattern, Selector)
    kernels = backend == "triton"
    with torch.no_grad():
        selection = memory.choose(pattern, q, k, v, layout, scale, kernels=kernels)
    assert selection.levels.shape[:2] == q.shape[:2], "a choice of other heads"
    reference = memory.past(pattern).lse if pattern.records else None
    highest = None
    wants_grad = wants_gradients(q, k, v)
    if kernels and wants_grad:
        from visattn.selectors.attend.gradients import LevelAttention, why_no_gradients

        reason = why_no_gradients(pattern, selection)
        if reason is not None:
            if spec.backend == "triton":
                raise BackendUnavailable(
                    f"backend='triton' has no gradients of {pattern}: {reason}; use "
                    "backend='blockwise' or 'auto'"
                )
            _say_once(f"{pattern}: plain torch computes what has gradients, as {reason}")
            kernels = False
    if kernels and wants_grad:
        run_both = LevelAttention.apply
        out, lse = run_both(q, k, v, selection, layout, text_lengths, scale)  # type: ignore[no-untyped-call]
    elif kernels:
        from visattn.selectors.attend.dynamic_triton import kernel_attend

        out, lse, highest = kernel_attend(
            q, k, v, selection, layout, text_lengths, scale, reference=reference
        )
    else:
        run = reference_attend if backend == "reference" else attend
        out, lse = run(q, k, v, selection, layout, text_lengths, scale)
    with torch.no_grad():
        if reference is not None and highest is None:
            highest = largest_logits(q, k, selection, reference, scale)
        memory.learn(pattern, q, k, v, out, lse, layout, text_lengths, scale, highest)
    return out, lse


def _static(
    spec: Spec,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads with static patterns."""
    layout, kv_layout = spec.layout, spec.kv_layout
    patterns = static_patterns(spec)
    if backend == "reference":
        return reference_attention(q, k, v, patterns, layout, kv_layout, text_lengths, scale)

    def lower(pattern: Pattern, block_q: int, block_k: int) -> BlockMap:
        return lower_cached(pattern, layout, kv_layout, block_q, block_k)

    if backend == "triton":
        run = TritonAttention.apply if wants_gradients(q, k, v) else triton_attention
        out, row_lse = run(q, k, v, patterns, layout, kv_layout, text_lengths, scale, lower)
        return out, row_lse
    return blockwise_attention(q, k, v, blockwise_maps(spec), text_lengths, scale, with_lse)


@plain_torch()
def execute_backward(
    spec: Spec,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v of heads with static patterns, from what ``execute`` gave."""
    layout, kv_layout = spec.layout, spec.kv_layout

    def lower(pattern: Pattern, block_q: int, block_k: int) -> BlockMap:
        return lower_cached(pattern, layout, kv_layout, block_q, block_k)

    given = (q, k, v, out, lse, grad_out, grad_lse)
    if backend == "triton":
        patterns = static_patterns(spec)
        return triton_backward(*given, patterns, layout, kv_layout, text_lengths, scale, lower)
    return blockwise_backward(*given, blockwise_maps(spec), text_lengths, scale)


def static_patterns(spec: Spec) -> tuple[Pattern, ...]:
    """The patterns of a Spec that has no dynamic one."""
    out = tuple(item for item in spec.patterns if isinstance(item, Pattern))
    if len(out) < len(spec.patterns):
        raise NotImplementedError(
            "gradients of dynamic patterns are computed without torch.compile only"
        )
    return out


def blockwise_maps(spec: Spec) -> list[BlockMap]:
    """The map of each head at the blocks of ``blockwise``."""
    sizes = block_sizes(max(spec.layout.length, (spec.kv_layout or spec.layout).length))
    patterns = static_patterns(spec)
    return [lower_cached(item, spec.layout, spec.kv_layout, *sizes) for item in patterns]

"""The torch custom ops: what ``torch.compile`` sees of a call, and the gradients of the kernels.

There are two ops. Static patterns only launch kernels, which a CUDA graph can capture after a first
call. Dynamic patterns may read values back from the device; their op has a tag that makes Inductor
leave it out of its CUDA graphs.

An op takes no Python objects, so a call's AttentionSpec is passed as a handle, a 0-d CPU tensor. A
handle is a hash of the spec: in a compiled graph it means the same in any process, and the op looks
up the same spec in forward and backward. Tensors and numbers that may change from call to call
(text lengths, scale, whether the LSE is needed) stay arguments of the op.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from visattn.attention.checks import check_call, check_patterns, check_tensors
from visattn.attention.choice import resolve
from visattn.attention.dispatch import execute, execute_backward
from visattn.attention.spec import AttentionSpec
from visattn.geometry.layout import TokenLayout, alive
from visattn.patterns import HeadPattern
from visattn.runtime.private_names import mark_constant

__all__ = ["attention_op", "dynamic_op", "handle_of", "register"]

_SPECS: dict[int, AttentionSpec] = {}


def register(spec: AttentionSpec) -> torch.Tensor:
    """Return the handle of a spec, int64, 0-d, on the CPU."""
    digest = hashlib.sha256(repr(spec).encode()).digest()
    handle = int.from_bytes(digest[:8], "little") >> 1
    _SPECS[handle] = spec
    return torch.tensor(handle, device="cpu")


def handle_of(
    patterns: tuple[int, ...], layout: int, kv_layout: int | None, backend: str
) -> torch.Tensor:
    """``register`` for objects named by their ``id()``, as a constant of the compiled graph."""
    heads: list[HeadPattern] = []
    for identity in patterns:
        pattern = alive(identity)
        assert isinstance(pattern, HeadPattern)
        heads.append(pattern)
    queries, keys = alive(layout), None if kv_layout is None else alive(kv_layout)
    assert isinstance(queries, TokenLayout)
    assert keys is None or isinstance(keys, TokenLayout)
    return register(AttentionSpec(tuple(heads), queries, keys, backend=backend))


mark_constant(handle_of)


@torch.library.custom_op("visattn::attention", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, H, Lq, D]`` and LSE ``[B, H, Lq]`` (empty without ``with_lse``)."""
    return _run(q, k, v, handle, text_lengths, scale, with_lse)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors(q, k, v)
    spec = _spec_of(q, k, handle, text_lengths, scale, with_lse)
    check_patterns(spec.patterns, q)
    out, lse = execute(q, k, v, spec)
    if lse is None or not with_lse:
        lse = q.new_empty(0, dtype=_acc_dtype(q))
    return out.contiguous(), lse.contiguous()


def _spec_of(
    q: torch.Tensor,
    k: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> AttentionSpec:
    """The spec of a call, checked and resolved."""
    spec = _SPECS[int(handle)]
    spec = replace(spec, text_lengths=text_lengths, scale=scale, return_lse=with_lse)
    return resolve(check_call(q, k, spec), q)


def _acc_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "visattn::dynamic_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def dynamic_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``attention_op``, for patterns some of which are dynamic."""
    return _run(q, k, v, handle, text_lengths, scale, with_lse)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[:3] if with_lse else (0,), dtype=_acc_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _save(ctx: object, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, handle, text_lengths, scale, with_lse = inputs
    assert with_lse, "gradients need the LSE"
    ctx.save_for_backward(q, k, v, handle, text_lengths, *output)  # type: ignore[attr-defined]
    ctx.scale = scale  # type: ignore[attr-defined]


@torch.library.custom_op("visattn::attention_backward", mutates_args=())
def backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, contiguous, by the backend that ran forward."""
    spec = _spec_of(q, k, handle, text_lengths, scale, True)
    return execute_backward(q, k, v, out, lse, grad_out, grad_lse, spec)


@backward_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    handle: torch.Tensor,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _backward(
    ctx: object, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, handle, text_lengths, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = backward_op(
        q,
        k,
        v,
        out,
        lse,
        grad_out,
        grad_lse,
        handle,
        text_lengths,
        ctx.scale,  # type: ignore[attr-defined]
    )
    return (*grads, None, None, None, None)


for _op in (attention_op, dynamic_op):
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_save)

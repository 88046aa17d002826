"""The Triton backend: it prepares the inputs of the kernels and launches them."""

from __future__ import annotations

from typing import Any

import torch

from visattn.attention.backends.kernel_check import Variant, trusted
from visattn.attention.lowering import head_maps
from visattn.attention.spec import AttentionSpec, wants_gradients
from visattn.blocks.cache import MapCache
from visattn.blocks.device_lists import DeviceMaps, device_maps
from visattn.geometry.padding import without_padding, without_unused_text
from visattn.kernels.launch import backward_launch_of, interpreting, launch_of, on_device
from visattn.kernels.targets import Launch
from visattn.patterns import HeadPattern
from visattn.selectors import Agent

__all__ = [
    "TritonAttention",
    "differentiable_triton_attention",
    "triton_attention",
    "triton_backward",
    "why_no_kernel",
    "why_unavailable",
]

MAX_HEAD_SIZE = 256

DEVICE_MAPS: MapCache[DeviceMaps] = MapCache(limit_bytes=1 << 30)


def why_unavailable(q: torch.Tensor) -> str | None:
    """Return why the kernels cannot run on a tensor like ``q``, or None if they can."""
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreting()):
        return f"it needs a CUDA or ROCm GPU, and q is on {q.device}"
    try:
        import triton
    except ImportError:
        return "the package triton is not installed"
    del triton
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes float16, bfloat16 and float32, and q is {q.dtype}"
    if q.shape[3] > MAX_HEAD_SIZE:
        return f"its head size is at most {MAX_HEAD_SIZE}, and q has {q.shape[3]}"
    if q.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        if major < 8:
            return f"it needs compute capability 8.0, and {q.device} has {major}.{minor}"
    return None


def why_no_kernel(pattern: HeadPattern) -> str | None:
    """Return why the kernels cannot compute a pattern, or None if they can."""
    if isinstance(pattern, Agent):
        return f"has no kernel for {pattern}, which is plain products"
    return None


@on_device
def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    settings: Launch | None = None,
    split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention; shapes and results as ``reference_attention``. The LSE is float32.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        spec: static patterns only.
        settings: launch settings; default: those of the launch table.
        split: rows with more key blocks are split; default as ``device_maps``.

    Returns:
        Output ``[B, H, Lq, D]`` and natural-log LSE ``[B, H, Lq]``.
    """
    from visattn.kernels.forward import forward

    launch = settings or launch_of(q)
    blocks = (launch.block_q, launch.block_k)
    maps = _maps(spec, blocks, k, split=split)
    text_lengths, scale = spec.text_lengths, spec.factor
    q, k, v = _ready(maps, q, k, v)
    lengths = None if text_lengths is None else text_lengths.int().contiguous()
    if launch.warp_groups and _takes_groups(q, maps, lengths, scale):
        from visattn.kernels.hopper import forward_hopper

        order, parts = maps.ordered[0], maps.num_parts
        return forward_hopper(q, k, v, maps.lists, lengths, scale, q_ordered=order, num_parts=parts)
    # Lanes after the end of a block read its first key again, with weight 0.
    if text_lengths is not None:
        v = without_padding(v, spec.key_layout, text_lengths)
    return forward(
        q,
        k,
        v,
        maps.lists,
        lengths,
        scale,
        block=maps.block,
        kinds=maps.kinds,
        ordered=maps.ordered,
        num_parts=maps.num_parts,
        warps=launch.warps,
        stages=launch.stages,
        descriptors=launch.descriptors,
    )


@on_device
def triton_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    spec: AttentionSpec,
    *,
    settings: tuple[tuple[int, int], tuple[int, int], int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k and v.

    Args:
        q: ``[B, H, Lq, D]``.
        k: ``[B, Hk, Lk, D]``.
        v: ``[B, Hk, Lk, D]``.
        out: output of ``triton_attention``, ``[B, H, Lq, D]``.
        lse: LSE of ``triton_attention``, ``[B, H, Lq]``.
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``; None: zero.
        spec: that of the forward pass.
        settings: (queries, keys) of a block, queries of a (whole, masked) part, warps, stages;
            default: those of the launch table.

    Returns:
        Gradients in the dtype of q.
    """
    from visattn.kernels.backward import backward

    blocks, queries, warps, stages = settings or backward_launch_of(q)
    maps = _maps(spec, blocks, k, backward=True)
    text_lengths = spec.text_lengths
    if settings is None and maps.by_coordinates:
        _, queries, warps, stages = backward_launch_of(q, spare=True)
    keys = k.shape
    if text_lengths is not None:
        q, out, lse = without_unused_text(q, out, lse, grad_out, grad_lse, spec.layout)
        k, v = (without_padding(x, spec.key_layout, text_lengths) for x in (k, v))
    q, k, v = _ready(maps, q, k, v)
    dq, dk, dv = backward(
        q,
        k,
        v,
        out,
        lse,
        grad_out if grad_out.stride(3) == 1 else grad_out.contiguous(),
        None if grad_lse is None else grad_lse.float().contiguous(),
        maps.lists,
        None if text_lengths is None else text_lengths.int().contiguous(),
        spec.factor,
        block=maps.block,
        queries=queries,
        kinds=maps.kinds,
        ordered=maps.ordered,
        shared_keys=keys[1] < q.shape[1],
        warps=warps,
        stages=stages,
    )
    if keys[1] < q.shape[1]:
        dk, dv = (x.unflatten(1, (keys[1], -1)).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv


class TritonAttention(torch.autograd.Function):
    """``triton_attention`` with gradients of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: AttentionSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.spec = spec
        out, lse = triton_attention(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (*triton_backward(q, k, v, out, lse, grad_out, grad_lse, ctx.spec), None)


def differentiable_triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``triton_attention``; autograd records it if a gradient is needed."""
    if wants_gradients(q, k, v):
        run = TritonAttention.apply
        out, lse = run(q, k, v, spec)  # type: ignore[no-untyped-call]
        return out, lse
    return triton_attention(q, k, v, spec)


def _maps(
    spec: AttentionSpec,
    blocks: tuple[int, int],
    k: torch.Tensor,
    split: int | None = None,
    backward: bool = False,
) -> DeviceMaps:
    """Return the block lists of a launch, cached. On a GPU, masks are packed bits if these fit the
    memory limit."""
    patterns, layouts = spec.patterns, (spec.layout, spec.kv_layout)
    key = (patterns, *layouts, blocks, k.shape[1], k.device, split, backward)

    def make() -> DeviceMaps:
        packed = k.device.type == "cuda"
        maps = head_maps(spec, *blocks)
        return device_maps(maps, k.shape[1], k.device, split, backward, packed)

    return DEVICE_MAPS.get(key, make)


def _takes_groups(
    q: torch.Tensor, maps: DeviceMaps, lengths: torch.Tensor | None, scale: float
) -> bool:
    """Return whether the kernel for Hopper computes a call.

    It needs a 16-bit dtype, a head size that is a multiple of 8 and at most 128, a scale above 0
    (it takes the maximum before scaling), masks as packed bits, and a variant that passed its
    self-test.
    """
    dim = q.shape[3]
    if q.element_size() != 2 or dim % 8 or dim > 128 or scale <= 0 or "firsts" not in maps.lists:
        return False
    split = maps.num_parts > 0
    return trusted(Variant(q.device, q.dtype, dim, maps.ordered[0], lengths is not None, split))


def _ready(
    maps: DeviceMaps, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v as the kernels read them: stride 1 along D, keys and values in block order."""
    from visattn.kernels.permute import permute

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if maps.key_slots is not None:
        k, v = permute(k, v, maps.key_slots[0], maps.key_slots[1], maps.lists["k_index"])
    return q, k, v

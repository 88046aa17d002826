"""The Triton backend: the launches that compute the heads of a layer, and what they read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from visattn.blockmap import BlockMap, MapCache
from visattn.devicemaps import DeviceMaps, device_maps
from visattn.launch import interpreting, launch_of
from visattn.layout import TokenLayout
from visattn.patterns import Pattern

__all__ = ["triton_attention", "why_unavailable"]

Lower = Callable[[Pattern, int, int], BlockMap]
MAX_HEAD_SIZE = 256

DEVICE_MAPS: MapCache[DeviceMaps] = MapCache(limit_bytes=1 << 30)


def why_unavailable(q: torch.Tensor) -> str | None:
    """Why the kernels cannot run on a tensor like ``q``, or None when they can."""
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


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    patterns: tuple[Pattern, ...],
    layout: TokenLayout,
    kv_layout: TokenLayout | None,
    text_lengths: torch.Tensor | None,
    scale: float,
    lower: Lower,
    *,
    settings: tuple[int, int, int, int] | None = None,
    split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and results as ``reference_attention``; the LSE is float32.

    Args:
        lower: gives the map of a pattern at a block size.
        settings: blocks of queries and keys, warps, stages; default: the launch table's.
        split: most key blocks of a row that is not split; default as ``device_maps``.
    """
    from visattn.kernels.forward import forward
    from visattn.kernels.permute import permute

    block_q, block_k, warps, stages = settings or launch_of(q)
    key = (patterns, layout, kv_layout, block_q, block_k, k.shape[1], q.device, split)

    def make() -> DeviceMaps:
        maps = {pattern: lower(pattern, block_q, block_k) for pattern in dict.fromkeys(patterns)}
        return device_maps([maps[pattern] for pattern in patterns], k.shape[1], q.device, split)

    maps = DEVICE_MAPS.get(key, make)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if maps.key_slots is not None:
        k, v = permute(k, v, maps.key_slots[0], maps.key_slots[1], maps.lists["k_index"])
    return forward(
        q,
        k,
        v,
        maps.lists,
        None if text_lengths is None else text_lengths.int().contiguous(),
        scale,
        block=maps.block,
        kinds=maps.kinds,
        ordered=maps.ordered,
        num_parts=maps.num_parts,
        warps=warps,
        stages=stages,
    )

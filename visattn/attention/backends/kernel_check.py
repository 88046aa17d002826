"""A first small call of the kernel for Hopper, before a variant of it is trusted.

It is written in Gluon, whose names and meaning may change with any release of Triton. So each
variant computes a small case once in a process, beside plain torch; one that does not compile, or
is wrong, is told once with the reason, and the portable kernel runs instead.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from visattn.attention.backends.reference import reference_attention
from visattn.attention.spec import AttentionSpec
from visattn.blocks.block_map import BlockMap
from visattn.blocks.device_lists import device_maps
from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import Dense, Diagonal, Neighborhood, Pattern
from visattn.runtime.log_once import warn_once

__all__ = ["Variant", "trusted"]

logger = logging.getLogger(__name__)

LAYOUT = TokenLayout(Grid(4, 9, 24), text_after=70)  # short, partial and whole blocks
LENGTH = 41  # of the text, where lengths are given
ALLOWED = {torch.float16: 0.01, torch.bfloat16: 0.03}  # of the largest value


class Variant(NamedTuple):
    """What is compiled apart."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    q_ordered: bool
    lengths: bool
    split: bool


def trusted(variant: Variant) -> bool:
    """Whether a variant gives what it should; while a graph is captured, whether it has."""
    if variant not in _FOUND:
        if variant.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            warn_once(
                logger,
                "a CUDA graph is captured before the kernel for Hopper was tried on "
                f"{variant.dtype} at head size {variant.dim}; the graph keeps the portable one, "
                "which is slower: call the layer once before the capture",
            )
            return False
        _FOUND[variant] = _tried(variant)
        reason = _FOUND[variant]
        if reason is not None:
            warn_once(
                logger, f"the kernel for Hopper {reason}; the portable one runs, which is slower"
            )
    return _FOUND[variant] is None


_FOUND: dict[Variant, str | None] = {}


def _tried(variant: Variant) -> str | None:
    """Why a variant is not used, or None."""
    try:
        out, lse, exact, exact_lse = _outputs(variant)
    except Exception as error:  # whatever another release raises
        if "CUDA error" in str(error):  # nothing runs in this process any more
            raise
        return f"does not run ({type(error).__name__}: {str(error).strip()[:200]})"
    off = float((out.float() - exact).abs().max() / exact.abs().max())
    apart = float((lse - exact_lse).abs().max())
    if not (off <= ALLOWED[variant.dtype] and apart <= 0.01):  # NaN is refused
        return f"is off by {off:.2g} of the largest value, and by {apart:.2g} in the LSE"
    return None


def _outputs(
    variant: Variant,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and LSE of the kernel and of plain torch."""
    from visattn.kernels.hopper import BLOCK_K, BLOCK_Q, forward_hopper

    device, dim = variant.device, variant.dim
    patterns: tuple[Pattern, ...] = (Diagonal(100), Dense())
    if variant.q_ordered:
        patterns = (Neighborhood((3, 5, 9)), Dense())
    maps: list[BlockMap] = [item.lower(LAYOUT, BLOCK_Q, BLOCK_K) for item in patterns]
    packed = device_maps(maps, 2, device, 2 if variant.split else None, words=True)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, LAYOUT.length, dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device="cpu").to(device, variant.dtype)
        for _ in range(3)
    )
    lengths = torch.tensor([[LENGTH]], dtype=torch.int32, device=device)
    given = lengths if variant.lengths else None
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
    spec = AttentionSpec(patterns, LAYOUT, text_lengths=given, scale=dim**-0.5)
    exact, exact_lse = reference_attention(wide_q, wide_k, wide_v, spec)
    if packed.key_slots is not None:
        from visattn.kernels.permute import permute

        key_heads, orders = packed.key_slots
        k, v = permute(k, v, key_heads, orders, packed.lists["k_index"])
    out, lse = forward_hopper(
        q,
        k,
        v,
        packed.lists,
        given,
        dim**-0.5,
        q_ordered=variant.q_ordered,
        num_parts=packed.num_parts,
    )
    return out, lse, exact, exact_lse

"""A self-test of the kernel for Hopper, before a variant of it is used.

The kernel is written in Gluon, whose interface may change with any release of Triton. So each
variant computes a small case once per process, and the result is compared with plain torch. If the
variant does not compile or is wrong, a warning gives the reason once, and the portable kernel runs
instead.
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
LENGTH = 41  # valid tokens of the text, in variants with text lengths
ALLOWED = {torch.float16: 0.01, torch.bfloat16: 0.03}  # error relative to the largest value


class Variant(NamedTuple):
    """The properties of a call for which the kernel is compiled separately."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    q_ordered: bool
    lengths: bool
    split: bool


def trusted(variant: Variant) -> bool:
    """Return whether a variant has passed its self-test; run the test on the first call. During the
    capture of a CUDA graph an untested variant is not run, and the result is False."""
    if variant not in _FAILURES:
        if variant.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            warn_once(
                logger,
                "a CUDA graph is captured before the kernel for Hopper was tested with "
                f"{variant.dtype} at head size {variant.dim}; the graph keeps the portable kernel, "
                "which is slower: call the layer once before the capture",
            )
            return False
        _FAILURES[variant] = _failure(variant)
        reason = _FAILURES[variant]
        if reason is not None:
            warn_once(
                logger, f"the kernel for Hopper {reason}; the portable one runs, which is slower"
            )
    return _FAILURES[variant] is None


_FAILURES: dict[Variant, str | None] = {}


def _failure(variant: Variant) -> str | None:
    """Run the self-test of a variant; return why it failed, or None."""
    try:
        out, lse, exact, exact_lse = _outputs(variant)
    except Exception as error:  # another release may raise any exception
        if "CUDA error" in str(error):  # the device cannot be used in this process any more
            raise
        return f"does not run ({type(error).__name__}: {str(error).strip()[:200]})"
    error_out = float((out.float() - exact).abs().max() / exact.abs().max())
    error_lse = float((lse - exact_lse).abs().max())
    if not (error_out <= ALLOWED[variant.dtype] and error_lse <= 0.01):  # false also for NaN
        return f"is off by {error_out:.2g} of the largest value, and by {error_lse:.2g} in the LSE"
    return None


def _outputs(
    variant: Variant,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output and LSE of the kernel, and output and LSE of plain torch."""
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
    text_lengths = lengths if variant.lengths else None
    q_float32, k_float32, v_float32 = (x.float() for x in (q, k, v))
    spec = AttentionSpec(patterns, LAYOUT, text_lengths=text_lengths, scale=dim**-0.5)
    exact, exact_lse = reference_attention(q_float32, k_float32, v_float32, spec)
    if packed.key_slots is not None:
        from visattn.kernels.permute import permute

        key_heads, orders = packed.key_slots
        k, v = permute(k, v, key_heads, orders, packed.lists["k_index"])
    out, lse = forward_hopper(
        q,
        k,
        v,
        packed.lists,
        text_lengths,
        dim**-0.5,
        q_ordered=variant.q_ordered,
        num_parts=packed.num_parts,
    )
    return out, lse, exact, exact_lse

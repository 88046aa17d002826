"""Queries and keys sorted by a hash of their direction, with a sample of the other keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_count
from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.selectors.per_head_order import PerHeadSelector, Runs, even_runs, grid_tokens
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.selection import SampledRest, Selection

__all__ = ["Hashing"]

MOST_BITS = 16


@dataclass(frozen=True, eq=False)
class Hashing(PerHeadSelector):
    """Key blocks with similar hashes, and a random sample of the other keys.

    Queries and keys are sorted by a hash: the signs of some random projections, in Gray order. Each
    block of sorted queries sees the block of sorted keys at the same place. It also sees a uniform
    sample of the keys outside that block, with ln(n / m) added to the logits.

    Args:
        block: tokens of a block.
        samples: number of sampled keys.
        projections: number of signs in a hash, 1 to 16.
        seed: seed of the projections and of the sample.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import Hashing
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Hashing(block=16, samples=8), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Han et al. (2023), "HyperAttention: Long-context Attention in Near-Linear Time", arXiv
        2310.05869. Code: github.com/insuhan/hyper-attn (commit 68b91e9).
    Default:
        paper. The code's order is no Gray order from 3 projections on (neighbouring buckets differ
        in up to 4 of 7 signs), and its sample counts keys of the block twice.
    Differences:
        - The sample is drawn without replacement, and is the same for all heads and rows.
        - n and m are the keys and the sampled keys outside the block.
    """

    block: int = 256
    samples: int = 256
    projections: int = 7
    seed: int = 0
    name: ClassVar[str] = "hashing"
    color: ClassVar[str] = "#7fcdb4"
    example: ClassVar[str] = "hashing(8, 9, 4)"

    def __post_init__(self) -> None:
        check_block("block", self.block)
        check_block("samples", self.samples)
        if check_count("projections", self.projections, 1) > MOST_BITS:
            raise ValueError(f"projections={self.projections} must be at most {MOST_BITS}")
        check_count("seed", self.seed, 0)

    def hashes(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rank of the signs of each vector in Gray order, int64 ``[B, H, n]``.

        Neighbouring ranks differ in one sign.
        """
        planes = _planes(x.shape[3], self.projections, self.seed, x.dtype, x.device)
        signs = (x @ planes) > 0
        powers = 1 << torch.arange(self.projections, device=x.device)
        code = (signs * powers).sum(-1)
        for shift in (1, 2, 4, 8):  # the inverse of n ^ (n >> 1), for up to 16 bits
            code = code ^ (code >> shift)
        return code

    def arrange(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        past: SelectorState,
    ) -> tuple[torch.Tensor, Runs, int, torch.Tensor, Runs, int]:
        acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = grid_tokens(q, layout).to(acc_dtype), grid_tokens(k, layout).to(acc_dtype)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q_order, k_order = (self.hashes(x).argsort(dim=-1, stable=True) for x in (queries, keys))
        runs = even_runs(q_order, self.block)
        return q_order, runs, self.block, k_order, runs, self.block

    def choose(self, inputs: Inputs, q_runs: Runs, k_runs: Runs) -> torch.Tensor:
        return q_runs.group[..., :, None] == k_runs.group[..., None, :]

    def finished(self, selection: Selection) -> Selection:
        return replace(selection, rest=SampledRest(self.samples, self.seed))


@functools.lru_cache(maxsize=64)
@on_cpu
def _planes(
    dim: int, count: int, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the projections, ``[dim, count]``; copied to the device once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, count, generator=generator, dtype=torch.float32).to(device, dtype)

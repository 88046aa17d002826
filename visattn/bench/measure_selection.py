"""What it costs to choose the blocks of a dynamic pattern, beside dense attention."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention import choose_backend
from visattn.bench.timing import take_turns
from visattn.geometry.layout import TokenLayout
from visattn.selectors import Selector
from visattn.selectors.stages.history import SelectorState

__all__ = ["SelectionTime", "smooth_fields", "time_selection"]

WAVES = 8  # of each component


@dataclass(frozen=True)
class SelectionTime:
    """Seconds of one call, medians: dense attention and the choice of blocks; ``share`` is the one
    over the other, with quartiles of the choice, and ``density`` what was chosen."""

    pattern: str
    tokens: int
    dense: float
    selection: float
    share: float
    share_low: float
    share_high: float
    density: float

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def smooth_fields(
    layout: TokenLayout, heads: int, dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[1, heads, L, dim]`` that change smoothly over the grid, as in
    models: few waves of the coordinates and some noise, so that attention is local and far from
    even."""
    generator = torch.Generator().manual_seed(seed)
    places = []
    for segment in layout.segments:
        if segment.grid is None:
            places.append(torch.rand(segment.length, 3, generator=generator) * 4)
            continue
        sides = [torch.arange(side) / side for side in segment.grid.shape]
        places.append(torch.cartesian_prod(*sides).view(-1, 3))
    place = torch.cat(places)
    waves = torch.randn(heads, 3, WAVES, generator=generator) * 3
    phase = torch.rand(heads, 1, WAVES, generator=generator) * 2 * math.pi
    field = (place @ waves + phase).cos()  # [heads, L, WAVES]

    def mixed(factor: float) -> torch.Tensor:
        weights = torch.randn(heads, WAVES, dim, generator=generator)
        noise = torch.randn(heads, layout.length, dim, generator=generator)
        return (field @ weights * factor + 0.3 * noise)[None]

    keys = mixed(1.0)
    queries = keys + 0.3 * torch.randn(keys.shape, generator=generator)
    return queries, keys, mixed(1.0)


@torch.no_grad()
def time_selection(
    selector: Selector,
    layout: TokenLayout,
    *,
    heads: int = 4,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 5,
) -> SelectionTime:
    """Time a selector's choice and dense attention in turn.

    Args:
        layout: of queries and keys, of ``heads`` heads of size ``dim``.
        device: where Triton runs, its kernels choose.

    What a selector carries from step to step (centres of clusters) is there from the first call,
    which is not counted: it is the cost of a later step.
    """
    device = torch.device(device)
    q, k, v = (x.to(device, dtype) for x in smooth_fields(layout, heads, dim))
    scale = dim**-0.5
    kernels = choose_backend("auto", q).backend == "triton"
    past = SelectorState()

    def choose() -> Any:
        return selector.select(q, k, v, layout, scale, kernels=kernels, past=past)

    density = float(choose().block_density().mean())
    dense, own = take_turns(
        [lambda: scaled_dot_product_attention(q, k, v, scale=scale), choose], repeats, device
    )
    return SelectionTime(
        pattern=str(selector),
        tokens=layout.length,
        dense=dense.median,
        selection=own.median,
        share=own.median / dense.median,
        share_low=own.low / dense.median,
        share_high=own.high / dense.median,
        density=density,
    )

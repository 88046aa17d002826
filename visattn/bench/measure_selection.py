"""Times of the selection of blocks by dynamic patterns, compared with dense attention."""

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

WAVES = 8  # cosine waves of a head


@dataclass(frozen=True)
class SelectionTime:
    """Times of one selection of blocks and of one call of dense attention.

    Attributes:
        pattern: the dynamic pattern in written form.
        tokens: number of tokens.
        dense: median time of dense attention in seconds.
        selection: median time of the selection in seconds.
        share: selection / dense.
        share_low: lower quartile of the selection times / dense.
        share_high: upper quartile of the selection times / dense.
        density: share of the blocks that are selected.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.bench import time_selection
        >>> from visattn.selectors import TopBlocks
        >>> time = time_selection(TopBlocks(0.25), TokenLayout(Grid(4, 8, 8)), heads=1, repeats=1)
        >>> time.tokens, 0 < time.density < 1
        (256, True)
    """

    pattern: str
    tokens: int
    dense: float
    selection: float
    share: float
    share_low: float
    share_high: float
    density: float

    def numbers(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def smooth_fields(
    layout: TokenLayout, heads: int, dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values ``[1, heads, L, dim]`` that change smoothly over the grid.

    They are a few cosine waves of the coordinates and some noise, so that attention is local and
    far from uniform, as in models.
    """
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
    """Time the selection of blocks and dense attention in turn.

    The state that a selector keeps between steps (centres of clusters) comes from a first call that
    is not counted, so the time is that of a later step.

    Args:
        selector: the dynamic pattern.
        layout: layout of queries and keys.
        heads: number of heads.
        dim: channels of a head.
        dtype: dtype of queries, keys and values.
        device: the device that computes. Triton kernels select the blocks if they run on it.
        repeats: number of timed rounds.

    Returns:
        The times.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.bench import time_selection
        >>> from visattn.selectors import TopBlocks
        >>> time = time_selection(TopBlocks(0.25), TokenLayout(Grid(4, 8, 8)), heads=1, repeats=1)
        >>> time.selection > 0
        True
    """
    device = torch.device(device)
    q, k, v = (x.to(device, dtype) for x in smooth_fields(layout, heads, dim))
    scale = dim**-0.5
    kernels = choose_backend("auto", q).backend == "triton"
    state = SelectorState()

    def choose() -> Any:
        return selector.select(q, k, v, layout, scale, kernels=kernels, past=state)

    density = float(choose().block_density().mean())
    dense, selection = take_turns(
        [lambda: scaled_dot_product_attention(q, k, v, scale=scale), choose], repeats, device
    )
    return SelectionTime(
        pattern=str(selector),
        tokens=layout.length,
        dense=dense.median,
        selection=selection.median,
        share=selection.median / dense.median,
        share_low=selection.low / dense.median,
        share_high=selection.high / dense.median,
        density=density,
    )

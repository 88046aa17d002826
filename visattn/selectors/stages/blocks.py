"""The blocks of queries and of keys that a selector chooses from, as tensors on a device.

Blocks follow an order of the grid's tokens: one for all heads, or a separate one for each batch
item and head (clusters, sorted keys).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import Order, SequenceBlocks, sequence_blocks
from visattn.runtime.torch_settings import lasting

__all__ = [
    "BlockPartition",
    "block_means",
    "block_parts",
    "partition_by_head",
    "partition_by_order",
    "take_tokens",
]


@dataclass(frozen=True, eq=False)
class BlockPartition:
    """Blocks of a sequence.

    ``G`` and ``G'`` are 1 if all batch items and heads share the blocks, else the numbers of batch
    items and heads.

    Attributes:
        size: most tokens of a block.
        tokens: int64 ``[G, G', N, size]``, the tokens of each block; those past its length repeat
            its first one.
        length: int64 ``[G, G', N]``, tokens of each block; 0 for an empty one.
        grid: bool ``[N]``, the blocks of grid tokens. Only these are chosen as keys, and only
            their queries choose.
    """

    size: int
    tokens: torch.Tensor
    length: torch.Tensor
    grid: torch.Tensor

    def __len__(self) -> int:
        return len(self.grid)

    @functools.cached_property
    @lasting
    def exists(self) -> torch.Tensor:
        """Which places hold a token, bool ``[G, G', N, size]``."""
        offset = torch.arange(self.size, device=self.length.device)
        return offset < self.length[..., None]

    @functools.cached_property
    @lasting
    def of_grid(self) -> torch.Tensor:
        """Numbers of the blocks of grid tokens, int64."""
        return self.grid.nonzero()[:, 0]

    def part(self, rows: slice) -> BlockPartition:
        """Return the blocks of ``rows``."""
        tokens, length = self.tokens[:, :, rows], self.length[:, :, rows]
        return BlockPartition(self.size, tokens, length, self.grid[rows])

    @functools.cached_property
    @lasting
    def tokens32(self) -> torch.Tensor:
        """The tokens as the kernels read them."""
        return self.tokens.int().contiguous()

    @functools.cached_property
    @lasting
    def length32(self) -> torch.Tensor:
        """The lengths as the kernels read them."""
        return self.length.int().contiguous()

    @functools.cached_property
    @lasting
    def some(self) -> torch.Tensor:
        """Grid blocks that are not empty, uint8 ``[G, G', N]``."""
        return ((self.length > 0) & self.grid).to(torch.uint8).contiguous()

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, H, L, D]`` in blocks, ``[B, H, N, size, D]``; 0 where no token exists."""
        return take_tokens(x, self.tokens).masked_fill(~self.exists[..., None], 0)


def take_tokens(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return ``[B, H, L, D]`` at tokens ``[G, G', ...]``, as ``[B, H, ..., D]``.

    If ``tokens`` has more heads than ``x``, the heads of ``x`` are repeated.
    """
    batch, heads = x.shape[:2]
    shape = tokens.shape[2:]
    if tokens.shape[:2] == (1, 1):
        taken = x.index_select(2, tokens.flatten())
        return taken.reshape(batch, heads, *shape, x.shape[3])
    if tokens.shape[1] > heads:
        x = x.repeat_interleave(tokens.shape[1] // heads, 1)
    index = tokens.expand(batch, x.shape[1], *shape).reshape(batch, x.shape[1], -1, 1)
    taken = x.gather(2, index.expand(-1, -1, -1, x.shape[3]))
    return taken.reshape(batch, x.shape[1], *shape, x.shape[3])


def block_means(blocks: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the mean of the existing tokens of each block, ``[..., N, D]``; 0 for an empty block.

    Args:
        blocks: ``[..., N, size, D]``.
        exists: bool ``[..., N, size]``.

    Returns:
        float32, or float64 for float64 blocks.
    """
    acc_dtype = torch.float64 if blocks.dtype == torch.float64 else torch.float32
    count = exists.sum(-1, keepdim=True).clamp(min=1)
    return (blocks.to(acc_dtype) * exists[..., None]).sum(-2) / count


def block_parts(
    blocks: torch.Tensor, exists: torch.Tensor, part: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of each run of ``part`` tokens of a block, and the lengths of the runs.

    The means are ``[..., N, parts, D]``, the lengths int64 ``[..., N, parts]``.
    """
    size = blocks.shape[-2]
    parts = -(-size // part)
    pad = parts * part - size
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, pad))
    exists = torch.nn.functional.pad(exists, (0, pad))
    blocks = blocks.unflatten(-2, (parts, part))
    exists = exists.unflatten(-1, (parts, part))
    return block_means(blocks, exists), exists.sum(-1)


@functools.lru_cache(maxsize=64)
@on_cpu
def partition_by_order(
    layout: TokenLayout, orders: tuple[Order, ...], size: int, device: torch.device
) -> BlockPartition:
    """Return the blocks of a layout, with one order for each grid.

    Text and prefix tokens have blocks of their own.
    """
    blocks = sequence_blocks(layout, orders, size)
    tokens, _ = blocks.tokens(torch.arange(len(blocks)))
    tokens = torch.where(
        torch.arange(size) < blocks.length[:, None], tokens, tokens[:, :1]
    )
    return BlockPartition(
        size=size,
        tokens=tokens[None, None].to(device),
        length=blocks.length[None, None].to(device),
        grid=grid_blocks(blocks).to(device),
    )


def grid_blocks(blocks: SequenceBlocks) -> torch.Tensor:
    """Return which blocks hold grid tokens, bool ``[N]``."""
    kinds = torch.tensor([segment.kind == "grid" for segment in blocks.layout.segments])
    return kinds[blocks.segment]


def partition_by_head(
    layout: TokenLayout, order: torch.Tensor, start: torch.Tensor, length: torch.Tensor, size: int
) -> BlockPartition:
    """Return blocks of the grid's tokens in a separate order for each head.

    The blocks of text and prefix tokens are the same for all heads.

    Args:
        layout: a layout with one grid.
        order: int64 ``[B, H, n]``, a permutation of the grid's tokens, counted from its first.
        start: first place of each block in the order, int64 ``[B, H, M]``.
        length: tokens of each block, int64 ``[B, H, M]``, at most ``size``.
        size: most tokens of a block.
    """
    begin, grid = layout.grids[0]
    batch, heads = order.shape[:2]
    offset = torch.arange(size, device=order.device)
    place = start[..., None] + offset.minimum((length[..., None] - 1).clamp(min=0))
    flat = order.gather(2, place.clamp(max=grid.numel - 1).flatten(2)) + begin
    grid_tokens = flat.view(*place.shape)
    pieces, lengths, kinds = [], [], []
    for first, segment in zip(layout.starts, layout.segments, strict=True):
        if segment.grid is not None:
            pieces.append(grid_tokens)
            lengths.append(length)
            kinds.append(torch.ones(length.shape[2], dtype=torch.bool, device=order.device))
            continue
        starts = torch.arange(0, segment.length, size, device=order.device)
        count = (segment.length - starts).clamp(max=size)
        tokens = first + starts[:, None] + offset.minimum(count[:, None] - 1)
        pieces.append(tokens.expand(batch, heads, -1, -1))
        lengths.append(count.expand(batch, heads, -1))
        kinds.append(torch.zeros(len(starts), dtype=torch.bool, device=order.device))
    tokens, lengths_all = torch.cat(pieces, 2), torch.cat(lengths, 2)
    exists = offset < lengths_all[..., None]
    tokens = torch.where(exists, tokens, tokens[..., :1])
    return BlockPartition(size=size, tokens=tokens, length=lengths_all, grid=torch.cat(kinds))

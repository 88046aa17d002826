"""Terms of the unselected keys, shared by the blockwise backend, the kernels and the gradients."""

from __future__ import annotations

import functools

import torch

from visattn.geometry.layout import TokenLayout, on_cpu, valid_keys
from visattn.selectors.stages.blocks import BlockPartition, take_tokens
from visattn.selectors.stages.selection import PooledRest, SampledRest, Selection

__all__ = [
    "first_order",
    "sample_tokens",
    "sampled_bias",
    "sampled_tokens",
    "to_tokens",
    "valid_block_tokens",
    "value_slope",
    "weighted_means",
]


def valid_block_tokens(
    side: BlockPartition, layout: TokenLayout, text_lengths: torch.Tensor | None
) -> torch.Tensor:
    """Return which tokens of the blocks are valid keys, bool ``[G, G', N, size]``."""
    if text_lengths is None:
        return side.exists
    valid = valid_keys(text_lengths, layout)[:, None, :, None]
    return side.exists & take_tokens(valid, side.tokens)[..., 0]


def to_tokens(blocks: torch.Tensor, side: BlockPartition, length: int) -> torch.Tensor:
    """Return blocks ``[B, H, N, size, C]`` in the order of the sequence, ``[B, H, length, C]``."""
    batch, heads, _, _, width = blocks.shape
    flat = blocks.flatten(2, 3)
    # the place of each token in the blocks; padding goes to an extra place that is cut off
    token = torch.where(side.exists, side.tokens, length).flatten(2)
    number = torch.arange(token.shape[2], device=token.device).expand_as(token)
    place = token.new_empty(*token.shape[:2], length + 1).scatter_(2, token, number)[..., :-1]
    if token.shape[:2] == (1, 1):
        return flat.index_select(2, place.flatten())
    place = place.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, width)
    return flat.gather(2, place)


def first_order(selection: Selection) -> bool:
    """Return whether the rest of a selection has a first-order term."""
    return isinstance(selection.rest, PooledRest) and selection.rest.first_order


def value_slope(
    keys: torch.Tensor,
    values: torch.Tensor,
    means: torch.Tensor,
    side: BlockPartition,
    scale: float,
) -> torch.Tensor:
    """Return ``scale / N`` times the sum over the N grid keys of (key - mean of its block) x value.

    The result is ``[B, Hk, D, D]``.
    """
    there = (side.exists & side.grid[:, None])[..., None]
    apart = (keys - means).masked_fill(~there, 0).flatten(2, 3)
    slope: torch.Tensor = apart.mT @ values.masked_fill(~there, 0).flatten(2, 3)
    return slope * (scale / there.sum((2, 3, 4)).to(slope)[..., None, None])


def weighted_means(
    selection: Selection, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the means of blocks ``[B, Hk, Nk, size, D]``, by the weights of the selection.

    Returns:
        Mean keys and mean values ``[B, H, Nk, D]``, and the logarithms of their softmax weights
        ``[B, H, Nk]``.
    """
    assert selection.weights is not None
    weights = selection.weights.to(keys)
    share = weights.shape[1] // keys.shape[1]
    mean_k, mean_v = (
        torch.einsum("bhns,bhnsd->bhnd", weights, x.repeat_interleave(share, 1))
        for x in (keys, values)
    )
    entropy = torch.special.entr(weights).sum(-1)
    return mean_k, mean_v, entropy.masked_fill(selection.k_side.length == 0, -torch.inf)


def sample_tokens(rest: SampledRest, layout: TokenLayout) -> torch.Tensor:
    """Return the drawn grid tokens, ascending, int64 on the CPU."""
    grid = torch.cat([torch.arange(grid.numel) + begin for begin, grid in layout.grids])
    generator = torch.Generator().manual_seed(rest.seed)
    chosen = torch.randperm(len(grid), generator=generator)[: rest.count]
    return grid[chosen].sort().values


@functools.lru_cache(maxsize=64)
@on_cpu
def sampled_tokens(
    rest: SampledRest, layout: TokenLayout, device: torch.device
) -> torch.Tensor:
    """Return the drawn grid tokens, ascending, int64; copied to the device once."""
    return sample_tokens(rest, layout).to(device)


def sampled_bias(
    selection: Selection, tokens: torch.Tensor, layout: TokenLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return the logarithm of the weight of each sampled key in each row, ``[B, H, Nq, m]``.

    It is minus infinity where the row sees the block of the key.
    """
    batch, heads, num_q, num_k = selection.levels.shape
    side = selection.k_side
    owner = torch.zeros(
        *side.tokens.shape[:2], layout.length, dtype=torch.int64, device=tokens.device
    )
    number = torch.arange(num_k, device=tokens.device)[:, None].expand_as(side.tokens)
    owner.scatter_(2, side.tokens.flatten(2), number.flatten(2))
    owner = owner[..., tokens].expand(batch, heads, -1)
    gone = selection.levels == 0
    unseen = gone.gather(3, owner[:, :, None].expand(-1, -1, num_q, -1))  # [B, H, Nq, m]
    num_unseen = (gone * (side.length * side.grid)[..., None, :]).sum(-1)
    weight = (num_unseen.to(dtype) / unseen.sum(-1).clamp(min=1)).log()
    return weight[..., None].expand_as(unseen).masked_fill(~unseen, -torch.inf)

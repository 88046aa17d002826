"""Window patterns of image backbones against the backbones' own partitions."""

from __future__ import annotations

import pytest
import torch

from visattn import Grid, TokenLayout
from visattn.patterns import Block, GridBlocks, Halo, ShiftedBlock


def image_mask(pattern: object, height: int, width: int) -> torch.Tensor:
    assert isinstance(pattern, (Block, GridBlocks, Halo))
    place = torch.arange(height * width)
    return pattern.allows(place[:, None], place, TokenLayout(Grid(1, height, width)))


def joined(ids: torch.Tensor) -> torch.Tensor:
    """Pairs of tokens with the same window number."""
    return ids[:, None] == ids


@pytest.mark.parametrize(
    ("size", "window", "shift"), [(8, 4, 2), (12, 4, 1), (14, 7, 3), (12, 6, 5), (7, 7, 3)]
)
def test_shifted_windows_are_swins(size: int, window: int, shift: int) -> None:
    """timm's mask: tokens share a window after the roll, and no mask entry parts them."""
    from timm.models import swin_transformer as swin

    block = swin.SwinTransformerBlock(
        dim=8, input_resolution=(size, size), num_heads=1, window_size=window, shift_size=shift
    )
    tokens = torch.arange(size * size).view(1, size, size, 1).float()
    rolled = torch.roll(tokens, tuple(-s for s in block.shift_size), (1, 2))
    windows = swin.window_partition(rolled, (window, window)).view(-1, window * window).long()
    expected = torch.zeros(size * size, size * size, dtype=torch.bool)
    masks = [None] * len(windows) if block.attn_mask is None else block.attn_mask
    for members, mask in zip(windows, masks, strict=True):
        expected[members[:, None], members] = True if mask is None else mask == 0
    assert torch.equal(image_mask(ShiftedBlock(window, shift), size, size), expected)


@pytest.mark.parametrize(("height", "width", "part"), [(8, 12, 4), (14, 14, 7), (6, 10, 2)])
def test_block_and_grid_attention_are_maxvits(height: int, width: int, part: int) -> None:
    from timm.models import maxxvit

    tokens = torch.arange(height * width).view(1, height, width, 1)
    for partition, pattern in (
        (maxxvit.window_partition, Block(part)),
        (maxxvit.grid_partition, GridBlocks(part)),
    ):
        groups = partition(tokens, (part, part)).reshape(-1, part * part)
        ids = torch.empty(height * width, dtype=torch.int64)
        ids[groups] = torch.arange(len(groups))[:, None].expand_as(groups)
        assert torch.equal(image_mask(pattern, height, width), joined(ids))


def test_halo_from_its_definition() -> None:
    expected = torch.zeros(9 * 11, 9 * 11, dtype=torch.bool)
    for q in range(99):
        for k in range(99):
            (a, b), (c, d) = divmod(q, 11), divmod(k, 11)
            top, left = a // 4 * 4, b // 4 * 4
            expected[q, k] = top - 2 <= c < top + 6 and left - 2 <= d < left + 6
    assert torch.equal(image_mask(Halo(4, 2), 9, 11), expected)


def test_windows_at_the_border_are_cut() -> None:
    """DaViT pads right and bottom; what is padded does not exist here."""
    place = torch.arange(10 * 9)
    ids = place // 9 // 7 * 2 + place % 9 // 7
    assert torch.equal(image_mask(Block(7), 10, 9), joined(ids))


def test_layers_alternate() -> None:
    assert ShiftedBlock(8, 4).for_layers(3) == (Block(8), ShiftedBlock(8, 4), Block(8))
    assert GridBlocks(7).for_layers(2) == (Block(7), GridBlocks(7))

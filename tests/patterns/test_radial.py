"""Radial attention's block rule, drawn frame pair by frame pair as the published form does."""

from __future__ import annotations

import pytest
import torch

from visattn import Grid, TokenLayout
from visattn.patterns import Radial


def drawn(pattern: Radial, grid: Grid) -> torch.Tensor:
    """The block table by brute force: each pair of frames on a canvas, reduced, and joined by
    OR."""
    size, plane = pattern.block, grid.height * grid.width
    blocks = -(-grid.numel // size)
    reach = -(-plane // size)
    out = torch.zeros(blocks + 1, blocks + 1, dtype=torch.bool)
    place = torch.arange(plane)
    distance = (place[:, None] - place).abs()
    rows = (grid.numel - torch.arange(blocks + 1) * size).clamp(1, size)
    power = 1 << plane.bit_length()
    for i in range(grid.frames):
        for j in range(grid.frames):
            d = abs(i - j)
            length = power / (1 << d.bit_length())
            width = plane if d <= 1 else max(size, pattern.decay * length)
            kept = distance <= width
            if length < 128 and d % int(128 / length):
                kept = torch.zeros_like(kept)
            if pattern.sink and j == 0:
                kept = torch.ones_like(kept)
            top, left = i * plane % size, j * plane % size
            canvas = torch.zeros((reach + 1) * size, (reach + 1) * size, dtype=torch.bool)
            canvas[top : top + plane, left : left + plane] = kept
            first, second = i * plane // size, j * plane // size
            for a in range(min(reach, blocks - first)):
                for b in range(min(reach, blocks - second)):
                    tile = canvas[a * size : (a + 1) * size, b * size : (b + 1) * size]
                    fraction = tile.sum(0) / rows[first + a]
                    many, some = int((fraction > 1 / 3).sum()), int((fraction > 0).sum())
                    if many > 0.6 * some:
                        out[first + a, second + b] = True
    return out[:blocks, :blocks] | torch.eye(blocks, dtype=torch.bool)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("decay", [0.2, 0.95, 2.0])
@pytest.mark.parametrize(
    ("grid", "block"),
    [
        (Grid(5, 16, 16), 64),  # aligned
        (Grid(6, 15, 17), 64),
        (Grid(9, 11, 13), 128),
        (Grid(12, 10, 15), 32),
        (Grid(3, 20, 33), 128),
        (Grid(1, 12, 12), 128),
        (Grid(21, 8, 16), 128),
    ],
    ids=str,
)
def test_block_rule_is_the_drawn_one(grid: Grid, block: int, decay: float, sink: bool) -> None:
    pattern = Radial(decay, sink, block=block)
    status = pattern.lower(TokenLayout(grid), block, block).status() > 0
    assert torch.equal(status, drawn(pattern, grid))


def test_block_rule_on_frames_below_a_block_is_the_token_rule() -> None:
    layout, place = TokenLayout(Grid(20, 5, 7)), torch.arange(700)
    block, token = (
        Radial(0.5, rule=rule).allows(place[:, None], place, layout) for rule in ("block", "token")
    )
    assert torch.equal(block, token)


def test_token_rule_from_its_definition() -> None:
    grid = Grid(20, 11, 13)
    pattern = Radial(1.1, rule="token")
    place = torch.arange(grid.numel)
    t, r = place // 143, place % 143
    expected = torch.zeros(grid.numel, grid.numel, dtype=torch.bool)
    for d in range(20):
        length = 256 / 2 ** d.bit_length()  # 256 = 2 ** bitlen(143)
        if length < 128 and d % int(128 / length):
            continue
        width = 143 if d <= 1 else max(128, 1.1 * length)
        apart = (t[:, None] - t).abs() == d
        expected |= apart & ((r[:, None] - r).abs() <= width)
    assert torch.equal(pattern.allows(place[:, None], place, TokenLayout(grid)), expected)

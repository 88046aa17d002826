"""What the tests of the kernels of static patterns share."""

from __future__ import annotations

import torch
from support.cases import LAYOUTS, draw, draw_text_lengths

from visattn import TokenLayout
from visattn.patterns import (
    AxisOrder,
    Dense,
    Diagonal,
    GridBlocks,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    Skip,
    Stripe,
    Union,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WALKED = [  # one token, one frame, a ragged tail, odd text on both sides, two grids, prefix tokens
    "one_token_text_1",
    "frame_1_of_11x3",
    "video_7x4x6",
    "video_7x5x3_text_31",
    "two_grids_text_between",
    "video_6x6x7_both_texts",
    "prefix_and_text",
]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
# Of tests on a GPU, which compile each: a padded size and those of most models.
HEAD_SIZES = {torch.float16: 64, torch.bfloat16: 128, torch.float32: 40}
MIXED: list[Pattern] = [Radial(rule="token"), Neighborhood((3, 3, 3)), Skip(), Dense()]
UNIONS = {
    "two_bands": Union(Diagonal(3), AxisOrder(Diagonal(2), "wht")),
    "axis_and_label": Union(Neighborhood((3, 3, 1)), Stripe(False, (5, 40))),
    "radial_and_axis": Radial(0.5, sink=True, rule="token"),
    "strided": GridBlocks((2, 2, 2)),
    "bits": Union(Diagonal(2), Stripe(False, (5,)), Neighborhood(3)),
    "table": Sharded(1, 2, block=48, causal=True),
    "other_radial": AxisOrder(Radial(rule="paper"), "hwt"),
}


def inputs(
    layout: TokenLayout, heads: int, key_heads: int, dim: int, dtype: torch.dtype, batch: int = 1
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, layout.length, dim) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def case(name: str, layout_name: str) -> tuple[Pattern, TokenLayout, torch.Tensor | None]:
    layout = LAYOUTS[layout_name]
    lengths = draw_text_lengths(layout, 1, torch.Generator().manual_seed(len(layout_name)))
    if lengths is not None:
        lengths = lengths // 2 + 1  # one sample, and not its capacity
    return draw(name, layout, 1), layout, lengths

"""What kernels see of a call, and a walk over patterns and layouts that is reduced by it.

Kernels know no patterns. They see kinds of predicates, classes of blocks, orders of tokens and
lengths of blocks. ``traits`` names those of a call, and ``REDUCED`` has calls enough for every
trait of the full walk, which is every pattern on every layout of ``WALKED``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from support.kernel_cases import WALKED, case

from visattn.attention.lowering import lower_cached
from visattn.blocks.device_lists import AXIS, BAND, BITS, LABEL, RADIAL, STRIDED, device_maps
from visattn.patterns import PATTERNS

KINDS = {AXIS: "axis", STRIDED: "strided", BAND: "band", RADIAL: "radial", LABEL: "label"}
KINDS[BITS] = "bits"
CLASSES = ("full", "text", "short", "partial")
# (pattern, layout)
FULL = [(name, layout) for name in PATTERNS for layout in WALKED]
REDUCED = [
    ("axis_order", "video_7x5x3_text_31"),
    ("block", "video_7x4x6"),
    ("dense", "prefix_and_text"),
    ("diagonal", "frame_1_of_11x3"),
    ("grid_blocks", "frame_1_of_11x3"),
    ("grid_blocks", "prefix_and_text"),
    ("neighborhood", "video_7x4x6"),
    ("radial", "prefix_and_text"),
    ("sharded", "two_grids_text_between"),
    ("shifted_block", "frame_1_of_11x3"),
    ("skip", "video_7x5x3_text_31"),
    ("stencil", "frame_1_of_11x3"),
    ("stencil", "video_7x5x3_text_31"),
    ("stripe", "two_grids_text_between"),
    ("stripe", "video_7x5x3_text_31"),
    ("union", "frame_1_of_11x3"),
    ("union", "two_grids_text_between"),
    ("union", "video_7x5x3_text_31"),
]

Trait = tuple[str, ...]


@functools.cache
def traits(name: str, layout_name: str, block: tuple[int, int]) -> frozenset[Trait]:
    """Return what the kernels see of the pattern ``name`` on a layout.

    Args:
        name: of a pattern in ``PATTERNS``.
        layout_name: of a layout in ``WALKED``.
        block: queries and keys of a block.

    Returns:
        The kinds of predicates of the launch and the sequences that it reorders; for each row of
        blocks how it is masked, its length and its grid; for each visited block its class, order
        and length, with the kind of predicate where one masks it. Bits know no order.
    """
    pattern, layout, text_lengths = case(name, layout_name)
    block_map = lower_cached(pattern, layout, None, *block)
    maps = device_maps([block_map], 1, torch.device("cpu"))
    kinds = [KINDS[kind] for kind in maps.kinds if kind]
    mask = "none" if not kinds else "bits" if kinds == ["bits"] else "coordinates"
    key_order = "any" if mask == "bits" else "ordered" if maps.ordered[1] else "raster"
    columns = maps.lists["columns"].tolist()
    result: set[Trait] = {("kinds", *kinds), ("ordered", *map(str, maps.ordered))}
    for row in maps.lists["work"].tolist():
        grid = "outside" if row[3] < 0 else "first grid" if row[3] == 0 else "later grid"
        length = "short" if row[5] < block[0] else "whole"
        result.add(("row", mask, length, grid))
        if row[7] == row[11]:
            result.add(("row", "empty"))
        for group, begin, end in zip(CLASSES, row[7:11], row[8:12], strict=True):
            for column in columns[begin:end]:
                _, keys, text, offset = maps.lists["k_table"][row[2], column].tolist()
                length = "short" if keys < block[1] else "whole"
                if text >= 0 and text_lengths is not None:
                    valid = min(max(int(text_lengths[0, text]) - offset, 0), keys)
                    length = "padding" if valid == 0 else "cut" if valid < keys else "text"
                for kind in kinds if group == "partial" else [mask]:
                    result.add(("visit", group, kind, key_order, length))
    return frozenset(result)


def tile_steps(name: str, layout_name: str, block: tuple[int, int]) -> int:
    """Return the number of key blocks that a launch visits."""
    pattern, layout, _ = case(name, layout_name)
    return lower_cached(pattern, layout, None, *block).num_visited


def missing(
    block: tuple[int, int], calls: Sequence[tuple[str, str]]
) -> dict[Trait, tuple[str, str]]:
    """Return the traits of the full walk that ``calls`` lack, each with a call that has it."""
    covered = frozenset[Trait]().union(*(traits(*call, block) for call in calls))
    return {trait: call for call in FULL for trait in traits(*call, block) - covered}

"""Block lists by key block: the query blocks that visit it. The gradients of k and v use them."""

from __future__ import annotations

import torch

from visattn.blocks.bank import MapBank
from visattn.geometry.layout import TokenLayout

__all__ = ["grid_numbers", "key_lists"]

WHOLE, SHORT, PARTIAL = range(3)  # no mask; fewer queries than block_q; a mask


def grid_numbers(layout: TokenLayout) -> torch.Tensor:
    """Return the grid number of each segment, -1 for a segment that is no grid."""
    numbers, count = [], 0
    for segment in layout.segments:
        numbers.append(count if segment.grid is not None else -1)
        count += segment.grid is not None
    return torch.tensor(numbers)


def key_lists(
    bank: MapBank, slots: list[int], q_rows: list[int], k_rows: list[int], tile_of: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the lists that ``_dkdv_kernel`` reads in addition to those of the forward pass.

    Args:
        bank: the maps of all heads.
        slots: key slot of each head.
        q_rows: row of ``q_index`` of each map.
        k_rows: row of ``k_index`` of each map.
        tile_of: int32 ``[columns]``, the bit tile of each visit, or one element.

    Returns:
        key_work int32 ``[W, 16]``, heaviest first; key_rows int32, the query blocks of each list;
        row_tiles int32, their bit tiles; q_table int32 ``[M, Nq, 2]``.
    """
    bounds, rows, tiles, offset = [], [], [], 0
    for item in bank.maps:
        visits = item.visits
        row = torch.repeat_interleave(torch.arange(len(visits)), visits)
        place = torch.arange(len(row))
        column = item.columns.long()
        kind = torch.full_like(row, WHOLE)
        kind[item.q_blocks.length[row] < item.block_q] = SHORT
        kind[place >= item.bounds[row, 3]] = PARTIAL
        order = ((column * 3 + kind) * len(visits) + row).argsort()
        count = torch.bincount(column * 3 + kind, minlength=3 * len(item.k_blocks)).view(-1, 3)
        ends = offset + count.flatten().cumsum(0).view_as(count)
        bounds.append(torch.cat([ends[:, :1] - count[:, :1], ends], 1))
        rows.append(row[order])
        tiles.append(tile_of[order + offset] if len(tile_of) > 1 else torch.zeros(0))
        offset += len(row)
    grids = grid_numbers(bank.maps[0].kv_layout)
    grids[grids >= len(bank.maps[0].layout.grids)] = -1  # no query grid has this number
    work = []
    for head, number in enumerate(bank.head_map.tolist()):
        blocks = bank.maps[number].k_blocks
        head_work = torch.zeros(len(blocks), 16, dtype=torch.int64)
        head_work[:, 0], head_work[:, 1], head_work[:, 2] = head, slots[head], number
        head_work[:, 3] = grids[blocks.segment]
        head_work[:, 4] = torch.arange(len(blocks))
        head_work[:, 5:9] = bounds[number]
        head_work[:, 9], head_work[:, 10] = q_rows[number], k_rows[number]
        work.append(head_work)
    all_work = torch.cat(work)
    heaviest = (all_work[:, 8] - all_work[:, 5]).argsort(descending=True, stable=True)
    return {
        "key_work": all_work[heaviest].int(),
        "key_rows": torch.cat(rows).int(),
        "row_tiles": torch.cat(tiles).int() if len(tile_of) > 1 else tile_of,
        "q_table": bank.q_table,
    }

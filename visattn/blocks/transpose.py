"""Block lists by key block: which query blocks visit it, for the gradients of keys and values."""

from __future__ import annotations

import torch

from visattn.blocks.bank import MapBank
from visattn.geometry.layout import TokenLayout

__all__ = ["grid_numbers", "key_lists"]

WHOLE, SHORT, PARTIAL = range(3)  # all queries of a block see all keys; some are not there; a mask


def grid_numbers(layout: TokenLayout) -> torch.Tensor:
    """Number of the grid of each segment, -1 where it is none."""
    numbers, count = [], 0
    for segment in layout.segments:
        numbers.append(count if segment.grid is not None else -1)
        count += segment.grid is not None
    return torch.tensor(numbers)


def key_lists(
    bank: MapBank, slots: list[int], q_rows: list[int], k_rows: list[int], tile_of: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What ``_dkdv_kernel`` reads beside the lists of the forward pass.

    Args:
        slots: key slot of each head; q_rows, k_rows: rows of ``q_index``, ``k_index`` of each map.
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
    grids[grids >= len(bank.maps[0].layout.grids)] = -1  # which no query's grid meets
    work = []
    for head, number in enumerate(bank.head_map.tolist()):
        blocks = bank.maps[number].k_blocks
        own = torch.zeros(len(blocks), 16, dtype=torch.int64)
        own[:, 0], own[:, 1], own[:, 2] = head, slots[head], number
        own[:, 3] = grids[blocks.segment]
        own[:, 4] = torch.arange(len(blocks))
        own[:, 5:9] = bounds[number]
        own[:, 9], own[:, 10] = q_rows[number], k_rows[number]
        work.append(own)
    all_work = torch.cat(work)
    heaviest = (all_work[:, 8] - all_work[:, 5]).argsort(descending=True, stable=True)
    return {
        "key_work": all_work[heaviest].int(),
        "key_rows": torch.cat(rows).int(),
        "row_tiles": torch.cat(tiles).int() if len(tile_of) > 1 else tile_of,
        "q_table": bank.q_table,
    }

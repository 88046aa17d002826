"""MapBank: the distinct block maps of a layer's heads, packed for one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visattn.blocks.block_map import BlockMap

__all__ = ["MapBank"]


@dataclass(frozen=True, eq=False)
class MapBank:
    """The distinct maps of a layer's heads, packed for one launch; ``M`` maps.

    Attributes:
        maps: the distinct maps.
        head_map: int32 ``[H]``, the index of the map of each head.
        bounds: int32 ``[M, Nq, 5]``, indices into ``columns``; rows after the last one of a map are
            empty.
        columns: the columns of all maps, concatenated.
        q_table: int32 ``[M, Nq, 2]``, first position and length of each query block.
        k_table: int32 ``[M, Nk, 2]``, first position and length of each key block.
    """

    maps: tuple[BlockMap, ...]
    head_map: torch.Tensor
    bounds: torch.Tensor
    columns: torch.Tensor
    q_table: torch.Tensor
    k_table: torch.Tensor

    @staticmethod
    def of(heads: Sequence[BlockMap]) -> MapBank:
        """Pack one map per head, each distinct map once.

        Raises:
            ValueError: there is no head, or the maps differ in layout or block size.
        """
        if not heads:
            raise ValueError("heads=() is empty; a bank holds one map per head")
        first = heads[0]
        for item in heads:
            if (item.layout, item.kv_layout, item.block_q, item.block_k) != (
                first.layout,
                first.kv_layout,
                first.block_q,
                first.block_k,
            ):
                raise ValueError(
                    f"heads hold maps of layout {first.layout} with blocks "
                    f"{first.block_q}x{first.block_k} and of "
                    f"layout {item.layout} with blocks {item.block_q}x{item.block_k}; one bank "
                    "takes one of each"
                )
        maps = tuple(dict.fromkeys(heads))
        head_map = torch.tensor([maps.index(item) for item in heads], dtype=torch.int32)
        num_q = max(len(m.q_blocks) for m in maps)
        num_k = max(len(m.k_blocks) for m in maps)
        bounds = torch.zeros(len(maps), num_q, 5, dtype=torch.int32)
        q_table = torch.zeros(len(maps), num_q, 2, dtype=torch.int32)
        k_table = torch.zeros(len(maps), num_k, 2, dtype=torch.int32)
        offset = 0
        for number, item in enumerate(maps):
            bounds[number, : len(item.bounds)] = item.bounds + offset
            for table, blocks in ((q_table, item.q_blocks), (k_table, item.k_blocks)):
                table[number, : len(blocks), 0] = blocks.start
                table[number, : len(blocks), 1] = blocks.length
            offset += item.num_visited
        widest = torch.int32 if any(m.columns.dtype == torch.int32 for m in maps) else torch.int16
        columns = torch.cat([m.columns.to(widest) for m in maps])
        return MapBank(maps, head_map, bounds, columns, q_table, k_table)

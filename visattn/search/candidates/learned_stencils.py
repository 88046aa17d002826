"""Where heads attend: mean attention mass by relative tile offset and by key tile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.inject import Observation
from visattn.patterns import Stencil
from visattn.readout import Tiling, attention_rows, draw_rows
from visattn.search.measure.recorded_attention import AttentionSample, SamplePlace, calls_of
from visattn.search.measure.tile_grid import TileGrid, stencil_of, tile_grids
from visattn.tasks.result_store import StoredResult

__all__ = ["Learner", "learned", "middle_of", "stencils_of"]

MOST_DRAWN = 8192  # longest layout, in tokens, for which the attention of a query is kept


def middle_of(grid: Grid) -> Triple:
    """Return the position of the query whose attention is drawn."""
    t, h, w = (length // 2 for length in grid.shape)
    return t, h, w


class Learner:
    """An observer that collects the attention tables of a generation.

    Rows are sampled by ``draw_rows`` from the flattest tiling.

    Args:
        steps: the denoising steps whose attention is read.
        block: largest number of tokens in a tile.
        tiles: number of sampled query tiles.
        rows_per_tile: number of sampled rows in each of these tiles.
        seed: seed of the sample.
    """

    def __init__(
        self, steps: Collection[int], block: int, tiles: int, rows_per_tile: int, seed: int = 0
    ) -> None:
        self.steps, self.block = steps, block
        self.tiles, self.rows_per_tile, self.seed = tiles, rows_per_tile, seed
        self.grids: list[TileGrid] = []
        self.places: list[SamplePlace] = []
        self.tables: list[list[torch.Tensor]] = []  # of each place, by tiling
        self.failures: list[str] = []
        self.attention: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}  # calls, sums

    def __call__(self, observation: Observation) -> None:
        for call in calls_of(observation, self.steps):
            if not self.grids:
                self.grids = tile_grids(call.layout, self.block)
                tiling = Tiling(self.grids[0].tile)
                self.rows = draw_rows(
                    call.layout,
                    [tiling],
                    tiles=self.tiles,
                    rows_per_tile=self.rows_per_tile,
                    seed=self.seed,
                ).tokens
                self.numbers = [self._numbers(grid) for grid in self.grids]
            tables = [torch.empty(0)] * len(self.grids)
            finite = True
            for chunk in attention_rows(
                call.q, call.k, self.rows, scale=call.scale, valid=call.valid
            ):
                finite = finite and bool(torch.isfinite(chunk.lse).all())
                for tiling_index, grid in enumerate(self.grids):
                    table = self._table(grid, tiling_index, chunk.weights, chunk.rows)
                    if chunk.rows.start:
                        tables[tiling_index][chunk.heads] += table
                    elif chunk.heads.start:
                        tables[tiling_index] = torch.cat([tables[tiling_index], table])
                    else:
                        tables[tiling_index] = table
            if not finite:
                self.failures.append(f"{call.layer} at step {call.place.step} is not finite")
                continue
            self.places.append(call.place)
            self.tables.append(tables)
            if call.layout.length <= MOST_DRAWN:
                self._attend(call)

    def _attend(self, call: AttentionSample) -> None:
        """Add the attention of the query in the middle of the grid to its sum, for pictures."""
        start, grid = call.layout.grids[0]
        token = start + sum(x * s for x, s in zip(middle_of(grid), grid.strides, strict=True))
        row = torch.cat(
            [
                chunk.weights[:, 0, start : start + grid.numel].cpu()
                for chunk in attention_rows(
                    call.q, call.k, torch.tensor([token]), scale=call.scale, valid=call.valid
                )
            ]
        ).unflatten(1, grid.shape)
        key = call.place.role, call.place.number
        count, total = self.attention.get(key, (0, torch.zeros(())))
        self.attention[key] = count + 1, total + row

    def _numbers(self, grid: TileGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the number of the offset of every key tile from each row, ``[R, n]``, and how
        often each offset occurs."""
        owner = grid.owner[self.rows]
        numbers = grid.offset(owner[:, None], torch.arange(grid.count.numel))
        return numbers, torch.bincount(numbers.flatten(), minlength=len(grid.pairs))

    def _table(
        self, grid: TileGrid, tiling_index: int, weights: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """Return what some rows add to the mean mass by offset, then by key tile,
        ``[h, m + n]``."""
        mass = grid.mass(weights).cpu()
        numbers, visits = self.numbers[tiling_index]
        offsets = torch.zeros(len(mass), len(visits))
        offsets.index_add_(1, numbers[rows].flatten(), mass.flatten(1))
        return torch.cat([offsets / visits.clamp(min=1), mass.sum(1) / len(self.rows)], 1)

    def item(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return what is stored of a generation: JSON values and tensors."""
        tables = {
            f"tiles {index}": torch.stack([of_place[index] for of_place in self.tables])
            for index in range(len(self.grids) if self.tables else 0)
        }
        attended = sorted(self.attention)
        if attended:
            means = [total / count for count, total in map(self.attention.__getitem__, attended)]
            tables["attention"] = torch.stack(means)
        value = {
            "places": [list(place) for place in self.places],
            "attended": [list(layer) for layer in attended],
            "failures": self.failures,
        }
        return value, tables


def learned(
    items: Sequence[StoredResult], phase_of: Any
) -> dict[tuple[int, str, int], list[torch.Tensor]]:
    """Return the mean tables of each (phase, role, layer) over generations, steps and passes, by
    tiling.

    Args:
        items: stored results of ``Learner.item``.
        phase_of: function from a step to its phase.
    """
    sums: dict[tuple[int, str, int], list[torch.Tensor]] = {}
    counts: dict[tuple[int, str, int], int] = {}
    for item in items:
        tilings = sum(name.startswith("tiles ") for name in item.tensors)
        tables = [item.tensors[f"tiles {index}"] for index in range(tilings)]
        for number, values in enumerate(item.value["places"]):
            place = SamplePlace(*values)
            key = phase_of(place.step), place.role, place.number
            of_place = [table[number].double() for table in tables]
            counts[key] = counts.get(key, 0) + 1
            if key in sums:
                of_place = [a + b for a, b in zip(sums[key], of_place, strict=True)]
            sums[key] = of_place
    return {key: [total / counts[key] for total in totals] for key, totals in sums.items()}


def stencils_of(
    tables: Sequence[torch.Tensor], grids: Sequence[TileGrid], levels: Sequence[float]
) -> list[list[Stencil]]:
    """Return the stencils of each head of a layer, for every tiling and level of density.

    All heads have the same number of stencils.

    Args:
        tables: the tables of the layer by tiling, as ``learned`` returns them.
        grids: the tilings.
        levels: densities, as shares of the pairs of tiles.
    """
    heads = len(tables[0])
    by_head: list[list[Stencil]] = [[] for _ in range(heads)]
    for table, grid in zip(tables, grids, strict=True):
        offsets = len(grid.pairs)
        for level in levels:
            stencils = [stencil_of(grid, row[:offsets], row[offsets:], level) for row in table]
            if stencils[0] is not None:  # only the level decides whether it is None
                for head, stencil in enumerate(stencils):
                    assert stencil is not None
                    by_head[head].append(stencil)
    return by_head

"""The rows of the receipt for each head: pattern, density, error, stability, and stencil."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.attention.lowering import block_sizes, lower_cached
from visattn.patterns import Dense, Pattern, Stencil
from visattn.search.clip_statistics import rounded
from visattn.search.measure.output_losses import Layer
from visattn.search.measure.tile_grid import TileGrid
from visattn.search.solve.price_table import Assignment, Group, PriceTable

__all__ = ["head_rows", "stability_rows", "stencil_rows"]

MOST_STENCILS = 200  # heads whose stencils the page draws
STABILITY_DENSITY = (0.15, 0.26)  # range of the static candidates whose order shows stability


def head_rows(table: PriceTable, assignment: Assignment) -> list[dict[str, Any]]:
    """Return the pattern of every head with its density, error and seconds, one row a head."""
    sizes = block_sizes(table.layout.length)
    rows = []
    for group in table.groups:
        phase, role, number = group
        heads = assignment.get(group, (Dense(),) * table.heads[role, number])
        for head, pattern in enumerate(heads):
            candidates = table.candidates(group, head)
            index = next((n for n, (_, other) in enumerate(candidates) if other == pattern), None)
            loss = 0.0 if index is None else float(table.losses[group][head, index, 0])
            density = executed = None
            if isinstance(pattern, Pattern):
                density = pattern.density(table.layout)
                executed = lower_cached(pattern, table.layout, None, *sizes).block_density
            rows.append(
                {
                    "role": role,
                    "layer": table.paths[role, number],
                    "number": number,
                    "head": head,
                    "phase": phase,
                    "pattern": repr(pattern),
                    "family": pattern.name if index is None else candidates[index][0],
                    "density": rounded(density),
                    "executed": rounded(executed),
                    "error": rounded(loss, 6),
                    "seconds": rounded(table.weight(group) * table.times.head(pattern), 6)
                    if repr(pattern) in table.times.seconds
                    else None,
                    "reason": None,
                    "stability": _stability(table, group, head),
                }
            )
    return rows


def _stability(table: PriceTable, group: Group, head: int) -> dict[str, float | None]:
    """Return how often two generations, and two steps, agree on the best static candidate of about
    a quarter of the pairs."""
    low, high = STABILITY_DENSITY
    near = [
        number
        for number, (_, pattern) in enumerate(table.pool.static)
        if low <= pattern.density(table.layout) <= high
    ]
    if not near:
        return {"prompts": None, "steps": None}
    by_prompt: dict[int, list[torch.Tensor]] = {}
    by_step: dict[int, list[torch.Tensor]] = {}
    for generation, place, losses in table.calls[group]:
        projected = losses[head, near, 0]
        by_prompt.setdefault(generation, []).append(projected)
        by_step.setdefault(place.step, []).append(projected)
    return {"prompts": _agreement(by_prompt), "steps": _agreement(by_step)}


def _agreement(losses: Mapping[int, Sequence[torch.Tensor]]) -> float | None:
    """Return the share of pairs of generations or steps that have the same best candidate."""
    best = [int(torch.stack(list(calls)).nanmean(0).argmin()) for calls in losses.values()]
    pairs = [(a, b) for n, a in enumerate(best) for b in best[n + 1 :]]
    return rounded(sum(a == b for a, b in pairs) / len(pairs)) if pairs else None


def stability_rows(heads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the means of stability over the rows of ``head_rows``."""
    rows = []
    for name in ("prompts", "steps"):
        known = [row["stability"][name] for row in heads if row["stability"][name] is not None]
        if known:
            rows.append(
                {
                    "name": f"two {name} agree on a head's best static candidate",
                    "value": rounded(statistics.fmean(known)),
                    "note": "of about a quarter of the pairs, mean over heads",
                }
            )
    return rows


def stencil_rows(
    table: PriceTable,
    assignment: Assignment,
    tables: Mapping[Layer, Sequence[torch.Tensor]],
    grids: Sequence[TileGrid],
    attention: Mapping[Layer, torch.Tensor],
    query: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """Return the attention mass of heads by relative tile offset, and what their stencils keep.

    Args:
        table: of the search.
        assignment: patterns of the heads.
        tables: attention mass of each layer by tiling.
        grids: the tilings.
        attention: of one query, ``[H, T, Y, X]`` by layer.
        query: the position of that query.
    """
    rows: list[dict[str, Any]] = []
    for group in table.groups:
        phase, role, number = group
        if phase or len(rows) >= MOST_STENCILS or (role, number) not in tables:
            continue
        heads = assignment.get(group, (Dense(),) * table.heads[role, number])
        for head, pattern in enumerate(heads):
            stencil = pattern if isinstance(pattern, Stencil) else None
            index = next(
                (n for n, grid in enumerate(grids) if stencil and grid.tile == stencil.tile), 0
            )
            grid, values = grids[index], tables[role, number][index][head]
            mass = values[: len(grid.pairs)].view(grid.sides.shape)
            maps = attention.get((role, number))
            rows.append(
                {
                    "role": role,
                    "number": number,
                    "head": head,
                    "tile": list(grid.tile),
                    "count": list(grid.count.shape),
                    "mass": _nested(mass),
                    "kept": [] if stencil is None else [list(x) for x in stencil.offsets],
                    "columns": [] if stencil is None else list(stencil.columns),
                    "attention": None if maps is None else _nested(maps[head]),
                    "query": None if maps is None else list(query),
                }
            )
    return rows


def _nested(values: torch.Tensor) -> Any:
    """Return numbers with four significant digits, as nested lists."""
    return [
        [[float(f"{x:.4g}") for x in row] for row in plane] for plane in values.double().tolist()
    ]

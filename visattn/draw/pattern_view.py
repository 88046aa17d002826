"""What there is to see of a pattern: numbers, samples of its mask and block map, a query's keys.

Nothing here has a size that grows with the square of the tokens: a mask is sampled through the
pattern's rule, and a block map through its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from visattn._arguments import check_count
from visattn.blocks.block_map import NONE, BlockMap, PartialPolicy
from visattn.geometry.layout import Grid, TokenLayout, check_query, on_cpu
from visattn.geometry.orders import BoxOrder, ExplicitOrder, HilbertOrder, LineOrder, Order
from visattn.patterns import Pattern

__all__ = ["GridView", "PatternView", "axis_samples", "order_name", "view_pattern", "view_text"]

MAX_BLOCK_PAIRS = 1 << 24
CLASSES = ("none", "full", "text", "short", "partial")  # in the order of the block map's codes
SYMBOLS = ".#ts+"
TEXT_BLOCKS = 64  # rows and columns of the block map in the terminal
TEXT_WIDTH = 78
TEXT_FRAME = (16, 32)  # rows and columns of a frame in the terminal
TEXT_BANDS = 4  # rows of frames in the terminal


def axis_samples(length: int, limit: int, keep: int | None = None) -> torch.Tensor:
    """Return the places of an axis that are shown: all, or the centres of ``limit`` pixels.

    Args:
        length: places of the axis.
        limit: most places that are shown.
        keep: a place that is always shown; it replaces the centre of its pixel.

    Returns:
        int64, ascending.
    """
    if length <= limit:
        return torch.arange(length)
    places = (2 * torch.arange(limit) + 1) * length // (2 * limit)
    if keep is not None:
        places[keep * limit // length] = keep
    return places


def order_name(order: Order) -> str:
    """Return an order in words: ``"raster thw"``, ``"boxes 2x8x8"``."""
    if isinstance(order, LineOrder):
        return f"raster {order.axes}"
    if isinstance(order, BoxOrder):
        words = f"boxes {'x'.join(map(str, order.tile))}"
        words += f" offset {order.offset}" if any(order.offset) else ""
        return words + (f" dilation {order.dilation}" if max(order.dilation) > 1 else "")
    if isinstance(order, HilbertOrder):
        return "Hilbert curve"
    return "explicit" if isinstance(order, ExplicitOrder) else type(order).__name__


@dataclass(frozen=True, eq=False)
class GridView:
    """The keys of one grid that a query sees.

    Attributes:
        grid: the grid.
        places: the coordinates shown, per axis.
        seen: which keys are seen, bool ``[frames, rows, columns]`` at these coordinates.
        query: index of the query in ``seen``; None when it is no token of this grid.
    """

    grid: Grid
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    seen: torch.Tensor
    query: tuple[int, int, int] | None

    @property
    def sampled(self) -> bool:
        return self.seen.numel() < self.grid.numel


@dataclass(frozen=True, eq=False)
class PatternView:
    """A pattern on a layout, lowered, and one query.

    Attributes:
        pattern: the pattern.
        layout: the layout.
        partial: how partly kept blocks are treated.
        block_map: the pattern lowered to blocks.
        density: the kept share of all token pairs.
        query: token index of the query.
        place: ``(t, h, w)`` of the query in the first grid, None without a grid.
        seen: which keys the query sees, bool ``[L]``.
    """

    pattern: Pattern
    layout: TokenLayout
    partial: PartialPolicy
    block_map: BlockMap
    density: float
    query: int
    place: tuple[int, int, int] | None
    seen: torch.Tensor

    def counts(self) -> dict[str, int]:
        """Return the number of visited blocks of each class."""
        edges = self.block_map.bounds.long()
        numbers = (edges[:, 1:] - edges[:, :-1]).sum(0).tolist()
        return dict(zip(CLASSES[1:], numbers, strict=True))

    def order_names(self) -> tuple[list[str], list[str]]:
        """The order of the query and of the key tokens, per grid."""
        sides = (self.block_map.q_blocks, self.block_map.k_blocks)
        q_names, k_names = ([order_name(order) for order in side.orders] for side in sides)
        return q_names, k_names

    def layout_words(self) -> str:
        """The layout and its length."""
        length = self.layout.length
        return f"{self.layout}, {length} token{'s' if length > 1 else ''}"

    def order_words(self) -> str:
        """Both orders in words."""
        q_names, k_names = self.order_names()
        if q_names == k_names:
            return ", ".join(dict.fromkeys(q_names)) or "as they are"
        return f"queries {', '.join(q_names)}; keys {', '.join(k_names)}"

    def numbers(self) -> dict[str, object]:
        """The numbers, ready for JSON."""
        block_map, (q_names, k_names) = self.block_map, self.order_names()
        sizes = {"query": len(block_map.q_blocks), "key": len(block_map.k_blocks)}
        visited = {"visited": block_map.num_visited, **self.counts()}
        query = {"token": self.query, "place": self.place, "keys_seen": int(self.seen.sum())}
        return {
            "pattern": repr(self.pattern),
            "layout": str(self.layout),
            "tokens": self.layout.length,
            "density": round(self.density, 6),
            "sparsity": round(1 - self.density, 6),
            "block_density": round(block_map.block_density, 6),
            "block_q": block_map.block_q,
            "block_k": block_map.block_k,
            "partial": self.partial,
            "blocks": sizes | visited,
            "orders": {"query": q_names, "key": k_names},
            "query": query,
        }

    def mask(self, limit: int) -> torch.Tensor:
        """The token rule at no more than ``limit`` queries and keys, bool ``[rows, columns]``."""
        places = axis_samples(self.layout.length, limit)
        return self.pattern.allows(places[:, None], places[None, :], self.layout)

    def blocks(self, limit: int) -> torch.Tensor:
        """The class of no more than ``limit`` query and key blocks, uint8 ``[rows, columns]``."""
        block_map = self.block_map
        rows = axis_samples(len(block_map.q_blocks), limit)
        columns = axis_samples(len(block_map.k_blocks), limit)
        out = torch.empty(len(rows), len(columns), dtype=torch.uint8)
        line = torch.empty(len(block_map.k_blocks), dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            line.fill_(NONE)
            edges = block_map.bounds[row].tolist()
            for kind, (begin, end) in enumerate(pairwise(edges), 1):
                line[block_map.columns[begin:end].long()] = kind
            out[number] = line[columns]
        return out

    def grid_view(self, number: int, frames: int, rows: int, columns: int) -> GridView:
        """Return what the query sees in one grid, at no more than the given places per axis."""
        start, grid = self.layout.grids[number]
        query = self.place if number == 0 else None
        limits = zip(grid.shape, (frames, rows, columns), query or (None,) * 3, strict=True)
        t, h, w = (axis_samples(*limit) for limit in limits)
        seen = self.seen[start : start + grid.numel].view(grid.shape)[t][:, h][:, :, w]
        if query is not None:
            index = [int((p == x).nonzero()[0, 0]) for p, x in zip((t, h, w), query, strict=True)]
            query = (index[0], index[1], index[2])
        return GridView(grid, (t, h, w), seen, query)

    def query_words(self) -> str:
        """Return one sentence on what the query sees, with the tokens outside grids listed."""
        where = "token 0" if self.place is None else f"({', '.join(map(str, self.place))})"
        words = f"query {where} sees {int(self.seen.sum())} of {self.layout.length} keys"
        for start, part in zip(self.layout.starts, self.layout.segments, strict=True):
            if part.grid is None:
                kept = int(self.seen[start : start + part.length].sum())
                words += f"; {part.kind} {kept} of {part.length}"
        return words


@on_cpu
def view_pattern(
    pattern: Pattern,
    layout: TokenLayout,
    block_q: int = 64,
    block_k: int = 64,
    *,
    partial: PartialPolicy = "exact",
    query: tuple[int, int, int] | None = None,
) -> PatternView:
    """Lower a pattern on a layout and find the keys of one query.

    Args:
        pattern: any static pattern.
        layout: the layout of the tokens.
        block_q: most tokens in a block of queries, 1 to 4096.
        block_k: most tokens in a block of keys, 1 to 4096.
        partial: how partly kept blocks are treated, as in ``Pattern.lower``.
        query: ``(t, h, w)`` of the query in the first grid; default: the middle of the grid.

    Returns:
        The view; ``view_text`` prints it and ``visattn.draw.pattern_picture.draw_view`` draws it.

    Raises:
        TypeError, ValueError: an argument is wrong, does not fit, or asks for too many blocks.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern={pattern!r} must be a pattern, for example Radial()")
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"layout={layout!r} must be a TokenLayout, for example TokenLayout(Grid(21, 30, 52))"
        )
    pairs = 1
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        pairs *= -(-layout.length // check_count(name, size, 1))
    if pairs > MAX_BLOCK_PAIRS:
        raise ValueError(
            f"blocks of {block_q}x{block_k} on {layout.length} tokens make {pairs} block pairs, "
            f"more than the {MAX_BLOCK_PAIRS} allowed; use larger blocks or a smaller layout"
        )
    token, place = _query(layout, query)
    seen = pattern.allows(torch.tensor([token]), torch.arange(layout.length), layout)
    block_map = pattern.lower(layout, block_q, block_k, partial=partial)
    density = pattern.density(layout)
    return PatternView(pattern, layout, partial, block_map, density, token, place, seen)


def _query(
    layout: TokenLayout, query: tuple[int, int, int] | None
) -> tuple[int, tuple[int, int, int] | None]:
    """Return token and place of the given query, or of the middle of the first grid."""
    if not layout.grids:
        if query is not None:
            raise ValueError(f"query={query} is a place in a grid, but layout {layout} has no grid")
        return 0, None
    start, grid = layout.grids[0]
    place = check_query(query, grid)
    return start + sum(x * s for x, s in zip(place, grid.strides, strict=True)), place


def view_text(view: PatternView) -> str:
    """Return the view for a terminal, in ASCII.

    Lines other than the pattern have at most 78 columns.
    """
    block_map, counts = view.block_map, view.counts()
    all_blocks = len(block_map.q_blocks) * len(block_map.k_blocks)
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    lines = [
        repr(view.pattern),
        f"  layout         {view.layout_words()}",
        f"  density        {view.density:.4f} of all token pairs (sparsity {1 - view.density:.4f})",
        f"  block density  {block_map.block_density:.4f} with blocks of "
        f"{block_map.block_q}x{block_map.block_k}, partial blocks: {view.partial}",
        f"  visited        {block_map.num_visited} of {all_blocks} blocks"
        + (f": {kinds}" if kinds else ""),
        f"  order          {view.order_words()}",
        "",
    ]
    blocks = view.blocks(TEXT_BLOCKS)
    shown = "" if blocks.numel() == all_blocks else f", sampled from {all_blocks}"
    legend = ", ".join(f"{sign} {kind}" for sign, kind in zip(SYMBOLS, CLASSES, strict=True))
    cell_width = 2 if 2 * blocks.shape[1] <= TEXT_BLOCKS else 1
    lines += [f"block map, rows are queries{shown}", f"  {legend}"]
    lines += ["  " + "".join(SYMBOLS[kind] * cell_width for kind in row) for row in blocks.tolist()]
    lines += ["", view.query_words(), "  # seen, . not seen, Q the query (q: not seen by itself)"]
    for number in range(len(view.layout.grids)):
        lines += _grid_text(view, number)
    return "\n".join(lines)


def _grid_text(view: PatternView, number: int) -> list[str]:
    """Return the lines of the frames of one grid, side by side."""
    grid = view.layout.grids[number][1]
    factor = max(-(-grid.height // TEXT_FRAME[0]), -(-grid.width // TEXT_FRAME[1]))
    rows, columns = -(-grid.height // factor), -(-grid.width // factor)
    width = max(columns, 1 + len(f"t={grid.frames}"))
    across = TEXT_WIDTH // (width + 2)
    grid_view = view.grid_view(number, across * TEXT_BANDS, rows, columns)
    note = f", {grid_view.seen.numel()} of {grid.numel} places shown" if grid_view.sampled else ""
    lines = [f"grid {grid}{note}"] if note or len(view.layout.grids) > 1 else []
    signs = [
        [["#" if kept else "." for kept in row] for row in frame]
        for frame in grid_view.seen.tolist()
    ]
    if grid_view.query is not None:
        t, h, w = grid_view.query
        signs[t][h][w] = "Q" if signs[t][h][w] == "#" else "q"
    times = grid_view.places[0].tolist()
    for begin in range(0, len(times), across):
        band = slice(begin, begin + across)
        lines.append("  " + "  ".join(f"t={time}".ljust(width) for time in times[band]).rstrip())
        for row in range(rows):
            parts = ["".join(frame[row]).ljust(width) for frame in signs[band]]
            lines.append("  " + "  ".join(parts).rstrip())
    return lines

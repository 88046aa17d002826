"""Measures of a head, as shares of its attention mass, from sampled rows of attention.

Uniform attention gives the reference values.

Letters: ``h`` heads, ``R`` sampled rows, ``L`` tokens, ``A(q, k)`` the softmax weight of a key, and
the query at ``(t, y, x)`` of a grid of ``T`` frames. Every row has mass 1. Definitions; the first
four are means over the sampled rows:

- ``frame``: mass of the keys of the query's grid in frame ``t``, the query's own token among them.
- ``same_place``: mass of the keys at ``(t', y, x)`` with ``t' != t``.
- ``window``: mass of the keys with ``|t' - t| <= (a - 1) / 2``, and likewise for rows and columns,
  for a window ``(a, b, c)`` of odd sides. At borders it is cut, not shifted.
- ``text``: mass of all keys in text segments, at their capacity.
- ``columns``: mass of the ``ceil(L / 64)`` keys, of any kind, with most mean mass. So that a local
  head is not taken for one with columns because few of its neighbourhoods were sampled, the keys
  are chosen by the queries of one half of the grid and their mass is that of the queries of the
  other half, and the other way round; the mean of both. The halves are cut through the longer side
  of a frame (the width where both are equal; time where a frame is one token). NaN where no query
  of a half was sampled.
- ``tile_share``: the smallest share of all key tiles, text and the like among them, that holds 90 %
  of the mass of a query tile: the tile's rows are averaged first, then its key tiles sorted, for a
  block-sparse kernel keeps key tiles for a whole query tile. The mean over the sampled tiles.

They overlap: a window has keys of the frame. By relative tile offset ``(dt, dy, dx)``, key tile
minus query tile, ``offsets`` is the mass that a query tile has there, 0 where that is outside the
grid, as a mean over the sampled query tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from visattn._arguments import check_count
from visattn.geometry.layout import Grid
from visattn.geometry.orders import Triple
from visattn.readout.sampled_rows import MAX_BYTES, RowChunk, RowSample, TileSample
from visattn.runtime.torch_settings import lasting, plain_torch

__all__ = [
    "AROUND",
    "COLUMN_SHARE",
    "FEW_TILES",
    "MASS",
    "WINDOW",
    "Measures",
    "Tally",
    "check_window",
    "column_mass",
    "smallest_share",
    "uniform_rows",
]

MASS = 0.9
FEW_TILES = 0.3  # a head that needs at most this share of the tiles gains from sparsity
COLUMN_SHARE = 64  # one key in 64 is a column
WINDOW: Triple = (3, 5, 5)
AROUND: Triple = (5, 17, 17)
ROUNDING = 1e-6  # of the sum of a row of float32 weights


@dataclass(frozen=True, eq=False)
class Tally:
    """Means over the sampled rows or tiles of one call, or of several; on the CPU.

    Attributes:
        frame: float64 ``[H]``.
        same_place: float64 ``[H]``.
        window: float64 ``[H]``.
        text: float64 ``[H]``.
        columns: mean weight of each key, by the half that the queries are in, float32
            ``[2, H, L]``.
        tile_shares: of each tiling, float64 ``[H, tilings]``.
        offsets: of each tiling, float32 ``[H, 2 nt - 1, 2 ny - 1, 2 nx - 1]`` for a grid of ``(nt,
            ny, nx)`` tiles; offset 0 is in the middle.
        profile: mass by frame offset ``t' - t``, float32 ``[H, 2 T - 1]``.
        around: mean weight of the key at each offset from the query, 0 where that is outside the
            grid, float32 ``[H, at, ay, ax]`` with odd sides.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.readout import Measures, Tiling, draw_rows
        >>> sample = draw_rows(TokenLayout(Grid(2, 4, 4)), [Tiling((1, 2, 2))])
        >>> Measures(sample).chance.frame
        tensor([0.5000], dtype=torch.float64)
    """

    frame: torch.Tensor
    same_place: torch.Tensor
    window: torch.Tensor
    text: torch.Tensor
    columns: torch.Tensor
    tile_shares: torch.Tensor
    offsets: tuple[torch.Tensor, ...]
    profile: torch.Tensor
    around: torch.Tensor

    def add(self, other: Tally) -> None:
        """Add the numbers of another tally to these, in place."""
        for total, term in zip(self.tensors(), other.tensors(), strict=True):
            total.add_(term)

    def over(self, count: int) -> Tally:
        """Return these numbers divided by a count."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: value / count for name, value in values.items() if name != "offsets"}
        return Tally(**parts, offsets=tuple(table / count for table in self.offsets))

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors, in the order of the fields."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [one for value in values for one in (value if isinstance(value, tuple) else [value])]


def check_window(name: str, window: object) -> Triple:
    """Return a window of three odd sides.

    Raises:
        TypeError: it is no tuple of three integers.
        ValueError: a side is even or below 1.
    """
    if not isinstance(window, tuple) or len(window) != 3:
        raise TypeError(f"{name}={window!r} must be three odd integers, (frames, height, width)")
    for side in window:
        if check_count(name, side, 1) % 2 == 0:
            raise ValueError(f"{name}={window} must have odd sides, with the query in the middle")
    return window[0], window[1], window[2]


def smallest_share(tile_mass: torch.Tensor, mass: float = MASS) -> torch.Tensor:
    """Return the smallest share of tiles that holds ``mass``, float64 ``[...]``.

    ``tile_mass`` is the mass of each tile, ``[..., tiles]``; it sums to 1 up to rounding.
    """
    held = tile_mass.double().sort(-1, descending=True).values.cumsum(-1)
    count = ((held < mass - ROUNDING).sum(-1) + 1).clamp(max=held.shape[-1])
    return count.double() / held.shape[-1]


def column_mass(columns: torch.Tensor) -> torch.Tensor:
    """Return the measure ``columns``, float64 ``[H]``, from mean weights ``[2, H, L]``."""
    keys = columns.double()
    count = -(-keys.shape[-1] // COLUMN_SHARE)
    chosen = keys.topk(count, -1).indices
    return keys.flip(0).gather(-1, chosen).sum(-1).mean(0)


def uniform_rows(sample: RowSample, max_bytes: int = MAX_BYTES) -> Iterator[RowChunk]:
    """Yield the rows of one head with uniform attention."""
    length = sample.layout.length
    count = max(1, max_bytes // (4 * length))
    for row in range(0, len(sample), count):
        rows = slice(row, min(row + count, len(sample)))
        weights = torch.full((1, rows.stop - rows.start, length), 1 / length)
        yield RowChunk(slice(0, 1), rows, weights, torch.full(weights.shape[:2], math.log(length)))


class Measures:
    """Computes the measures of this module from the rows of a sample.

    Args:
        sample: the sampled rows.
        window: sides of the window for the measure ``window``, in tokens, odd.
        around: sides of ``Tally.around``, odd; at most ``2 n - 1`` for a grid side ``n``.
        device: device of the weights.

    Raises:
        TypeError: a window is not a tuple of three integers.
        ValueError: a side of a window is even or below 1.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.readout import Measures, Tiling, attention_rows, draw_rows
        >>> sample = draw_rows(TokenLayout(Grid(2, 4, 4)), [Tiling((1, 2, 2))])
        >>> q, k = torch.randn(2, 3, 32, 8)
        >>> tally = Measures(sample)(attention_rows(q, k, sample.tokens), heads=3)
        >>> tally.frame.shape
        torch.Size([3])
    """

    def __init__(
        self,
        sample: RowSample,
        *,
        window: Triple = WINDOW,
        around: Triple = AROUND,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sample, self.device = sample, torch.device(device)
        self.window = check_window("window", window)
        sides = zip(check_window("around", around), sample.grid.shape, strict=True)
        self.around = [2 * min(side // 2, length - 1) + 1 for side, length in sides]
        self.places = [axis.to(self.device) for axis in sample.places]
        self.near = [
            ((torch.arange(length, device=self.device) - place[:, None]).abs() <= side // 2).float()
            for length, place, side in zip(sample.grid.shape, self.places, self.window, strict=True)
        ]

    # ---- tensors that do not depend on the weights

    @cached_property
    @lasting
    @plain_torch()
    def half(self) -> torch.Tensor:
        """Whether a row is in the second half of the grid, bool ``[R]``."""
        _, height, width = shape = self.sample.grid.shape
        axis = 0 if max(height, width) == 1 else 1 if height > width else 2
        return self.places[axis] >= shape[axis] / 2

    @cached_property
    @lasting
    @plain_torch()
    def averages(self) -> torch.Tensor:
        """Weights of the rows in means, float32 ``[2 + tiles, R]``: over both halves, then over
        every sampled tile of each tiling. NaN for a half without rows."""
        rows = len(self.sample)
        lines = torch.stack([~self.half, self.half]).float()
        parts = [lines / lines.sum(1, keepdim=True)]
        for tiles in self.sample.samples:
            exists = tiles.exists.to(self.device).float()
            line = torch.zeros(len(exists), rows, device=self.device)
            members = tiles.members.to(self.device)
            line.scatter_add_(1, members, exists / exists.sum(1, keepdim=True))
            parts.append(line)
        return torch.cat(parts)

    @cached_property
    @lasting
    @plain_torch()
    def reach(self) -> torch.Tensor:
        """The share of the rows for which each place of ``Tally.around`` is inside the grid,
        float32 ``[at, ay, ax]``."""
        t, y, x = (self._line(axis, slice(None))[1].float() for axis in range(3))
        return torch.einsum("rt,ry,rx->tyx", t, y, x).cpu() / len(self.sample)

    @cached_property
    @lasting
    @plain_torch()
    def profile_reach(self) -> torch.Tensor:
        """The share of the rows for which each frame of ``Tally.profile`` exists, ``[2 T - 1]``."""
        return self._frame_offsets(slice(None))[1].float().mean(0).cpu()

    @cached_property
    @lasting
    @plain_torch()
    def chance(self) -> Tally:
        """The measures of uniform attention on the same rows, with ``H = 1``."""
        t, y, x = self.around
        uniform = Measures(self.sample, window=self.window, around=(t, y, x))
        return uniform(uniform_rows(self.sample), 1)

    def _line(self, axis: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The coordinates at the offsets of ``around`` along an axis, int64 ``[r, side]``, and
        which are inside the grid."""
        reach = torch.arange(self.around[axis], device=self.device) - self.around[axis] // 2
        line = self.places[axis][rows, None] + reach
        return line, (line >= 0) & (line < self.sample.grid.shape[axis])

    def _frame_offsets(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The frame at each offset of the profile, int64 ``[r, 2 T - 1]``, and which exist."""
        frames = self.sample.grid.frames
        frame = self.places[0][rows, None] + torch.arange(1 - frames, frames, device=self.device)
        return frame, (frame >= 0) & (frame < frames)

    # ---- the measures

    @plain_torch()
    def __call__(self, chunks: Iterable[RowChunk], heads: int) -> Tally:
        """Return the measures of ``heads`` heads; the chunks cover each of their rows once."""
        sample, grid = self.sample, self.sample.grid
        sums = torch.zeros(4, heads, device=self.device)
        means = torch.zeros(0, device=self.device)
        profile = torch.zeros(heads, 2 * grid.frames - 1, device=self.device)
        around = torch.zeros(heads, math.prod(self.around), device=self.device)
        columns = torch.empty(2, heads, sample.layout.length)
        tables = [
            torch.empty(heads, *(2 * n - 1 for n in tiles.tiling.count(grid).shape))
            for tiles in sample.samples
        ]
        shares = torch.empty(heads, len(tables), dtype=torch.float64)
        for chunk in chunks:
            heads_read, rows, weights = chunk.heads, chunk.rows, chunk.weights
            frames, seen = self._of_rows(rows, weights)
            sums[:, heads_read] += seen
            frame, exists = self._frame_offsets(rows)
            frame = frame.clamp(0, grid.frames - 1).expand(len(frames), -1, -1)
            profile[heads_read] += frames.gather(-1, frame).masked_fill_(~exists, 0).sum(1)
            around[heads_read] += self._around(rows, weights)
            part = self.averages[:, rows] @ weights  # [h, 2 + tiles, L]
            means = part if rows.start == 0 else means.add_(part)
            if rows.stop == len(sample):
                columns[:, heads_read] = means[:, :2].transpose(0, 1).cpu()
                self._of_tiles(means[:, 2:], heads_read, shares, tables)
        frame, same_place, near, text = (sums.cpu().double() / len(sample)).unbind()
        return Tally(
            frame=frame,
            same_place=same_place,
            window=near,
            text=text,
            columns=columns,
            tile_shares=shares,
            offsets=tuple(tables),
            profile=profile.cpu() / len(sample),
            around=around.cpu().view(heads, *self.around) / len(sample),
        )

    def _of_rows(self, rows: slice, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass by frame, ``[h, r, T]``, and the sums over rows of the first four measures,
        ``[4, h]``."""
        sample, grid = self.sample, self.sample.grid
        inside = weights[..., sample.start : sample.start + grid.numel]
        t, y, x = (axis[rows] for axis in self.places)
        by_frame = inside.unflatten(-1, (grid.frames, -1))  # [h, r, T, Y X]
        frames = by_frame.sum(-1)
        frame = frames.gather(-1, t.expand(len(weights), -1)[..., None]).squeeze(-1)
        place = (y * grid.width + x)[:, None, None].expand(*by_frame.shape[:3], 1)
        line = by_frame.gather(-1, place).squeeze(-1)  # [h, r, T]
        same = line.sum(-1) - line.gather(-1, t.expand(len(weights), -1)[..., None]).squeeze(-1)
        near_t, near_y, near_x = (near[rows] for near in self.near)
        left = inside.unflatten(-1, (-1, grid.width)) @ near_x[..., None]
        left = left.squeeze(-1).unflatten(-1, (grid.frames, -1)) @ near_y[..., None]
        window = (left.squeeze(-1) * near_t).sum(-1)
        text = torch.zeros_like(window)
        for start, length in sample.layout.texts:
            text += weights[..., start : start + length].sum(-1)
        return frames, torch.stack([frame.sum(1), same.sum(1), window.sum(1), text.sum(1)])

    def _around(self, rows: slice, weights: torch.Tensor) -> torch.Tensor:
        """Sums over rows of the weights at offsets from the query, ``[h, offsets]``, frame by
        frame."""
        grid = self.sample.grid
        (t, in_t), (y, in_y), (x, in_x) = (self._line(axis, rows) for axis in range(3))
        t, y, x = (
            line.clamp(0, length - 1) * stride
            for line, length, stride in zip((t, y, x), grid.shape, grid.strides, strict=True)
        )
        plane = (self.sample.start + y[:, :, None] + x[:, None]).flatten(1)
        in_plane = (in_y[:, :, None] & in_x[:, None]).flatten(1)
        frames = []
        for frame, exists in zip(t.unbind(1), in_t.unbind(1), strict=True):
            places = (plane + frame[:, None]).expand(len(weights), -1, -1)
            near = weights.gather(-1, places).masked_fill_(~(in_plane & exists[:, None]), 0)
            frames.append(near.sum(1))
        return torch.cat(frames, 1)

    def _of_tiles(
        self, means: torch.Tensor, heads: slice, shares: torch.Tensor, tables: list[torch.Tensor]
    ) -> None:
        """Fill in shares and offset tables from the mean rows of the sampled tiles,
        ``[h, tiles, L]``."""
        first = 0
        for number, (tiles, table) in enumerate(zip(self.sample.samples, tables, strict=True)):
            tile_means = means[:, first : first + len(tiles.tiles)]
            first += len(tiles.tiles)
            mass = _by_tile(tile_means, tiles).cpu()
            shares[heads, number] = smallest_share(mass).mean(1)
            count, begin = tiles.tiling.count(self.sample.grid), tiles.blocks.first
            of_grid = mass[..., begin[self.sample.number] :][..., : count.numel]
            table[heads] = _by_offset(
                of_grid.unflatten(-1, count.shape), tiles.tiles - begin[self.sample.number], count
            )


def _by_tile(means: torch.Tensor, tiles: TileSample) -> torch.Tensor:
    """Mass of each key tile, ``[h, n, tiles]``, of mean rows ``[h, n, L]``. Sums are gathered, not
    scattered, so that they are the same in every run on every device."""
    tokens, exists = tiles.blocks.tokens(torch.arange(len(tiles.blocks)))
    tokens, exists = tokens.to(means.device), exists.to(means.device)
    return (means[..., tokens] * exists).sum(-1)


def _by_offset(mass: torch.Tensor, tiles: torch.Tensor, count: Grid) -> torch.Tensor:
    """Mean over query tiles of the mass at each relative tile offset, ``[h, 2 nt - 1, ...]``, from
    that of the key tiles, ``[h, n, nt, ny, nx]``."""
    out = torch.zeros(len(mass), *(2 * n - 1 for n in count.shape))
    for row, place in enumerate(torch.stack(count.coordinates(tiles), 1).tolist()):
        t, y, x = (slice(n - 1 - p, 2 * n - 1 - p) for n, p in zip(count.shape, place, strict=True))
        out[:, t, y, x] += mass[:, row]
    return out / len(tiles)

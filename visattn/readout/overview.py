"""A picture of all heads of a model: attention around the query, and share of tiles needed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from PIL import Image, ImageDraw

from visattn.draw.canvas import font, wrapped, write
from visattn.draw.heat import heat_picture, legend, top_of
from visattn.draw.palette import BAR, GREY, INK, LOW_SHARE, PAPER, QUERY
from visattn.readout.head_readout import HeadReadout, Key
from visattn.readout.measures import FEW_TILES
from visattn.readout.sampler import Sampler

__all__ = ["bars", "by_distance", "draw_overview", "percent", "seen_around", "titled"]

MARGIN, GAP = 72, 12
MOST_WIDTH = 4000  # of the picture, before a token is drawn smaller
LEAST_WIDTH, MOST_WORDS = 1500, 2150  # of its head
SCALES = (4, 3, 2, 1)  # pixels of a token
LAYER_WIDTH = 120


def seen_around(sampler: Sampler, key: Key) -> torch.Tensor:
    """Return the mean weight at offsets from the query, ``[H, at, ay, ax]``.

    The unit is the weight of uniform attention; NaN where no sampled query has a token.
    """
    reach = sampler.measures.reach
    values = sampler.tally(key).around / reach * sampler.measures.sample.layout.length
    return values.masked_fill(reach == 0, torch.nan)


def shared_keys(sampler: Sampler, key: Key) -> torch.Tensor:
    """Return how much all queries attend to the same keys, ``[H, height, width]``.

    The value of a place is the mean weight of the key from the half of the queries that attends to
    it less, in the frame where this is largest. The unit is the weight of uniform attention.
    """
    sample = sampler.measures.sample
    least = sampler.tally(key).columns.nan_to_num(0).amin(0)
    grid = least[:, sample.start : sample.start + sample.grid.numel]
    frames: torch.Tensor = grid.unflatten(1, sample.grid.shape)
    return frames.amax(1) * sample.layout.length


def by_distance(sampler: Sampler, key: Key) -> torch.Tensor:
    """Return the mass by frame offset, ``[H, 2 T - 1]``, over the queries with a frame there."""
    reach = sampler.measures.profile_reach
    return (sampler.tally(key).profile / reach).nan_to_num(0)


def percent(share: float) -> str:
    """Return a share as text, such as ``"30 %"``, ``"0.7 %"`` or ``"<0.1 %"``."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


class _Cells:
    """The sizes of the parts of a cell, in pixels.

    Args:
        sampler: the sampler that is drawn.
        scale: pixels of a token.
    """

    def __init__(self, sampler: Sampler, scale: int) -> None:
        self.scale = scale
        self.label, self.small = {1: (13, 0), 2: (16, 11)}.get(scale, (22, 17))
        self.frames, rows, columns = sampler.measures.around
        self.side = (columns * scale, rows * scale)
        sample = sampler.measures.sample
        _, height, width = sample.grid.shape
        self.shared = max(1, round(max(self.side) / max(height, width)))  # pixels of a token
        apart = scale + 2
        self.lefts = [frame * (self.side[0] + apart) for frame in range(self.frames + 1)]
        self.lefts[-1] += apart  # of the shared keys
        self.maps_width = self.lefts[-1] + width * self.shared
        widest = "16x2x2"
        widest += ", text 99 %" if sample.layout.texts else ""
        labels = font(self.label).getlength("100 %")
        labels += font(self.small).getlength(widest) + 8 if self.small else 0
        offsets = 2 * sample.grid.frames - 1
        self.bars = max(min(8 * offsets, 40 * scale), offsets)
        self.width = max(self.maps_width, int(labels) + 16 + self.bars * (sample.grid.frames > 1))
        self.high = max(self.side[1], height * self.shared)
        self.step = self.width + 2 * GAP + scale


def draw_overview(
    sampler: Sampler, *, title: str, notes: Sequence[str] = (), few: float = FEW_TILES
) -> Image.Image:
    """Draw all heads that a sampler has read: one row for each layer, one column for each head.

    A cell shows the mean attention around the query in its own and the nearest frames, then the
    keys that all queries share. Below are the share of key tiles that holds 90 % of the mass and,
    as bars, the mass by frame distance.

    Args:
        sampler: a sampler that has read calls.
        title: the title above the picture.
        notes: lines below the title.
        few: heads that need at most this share of the tiles are counted and highlighted.

    Returns:
        An RGB image.

    Raises:
        ValueError: the sampler has read nothing.
    """
    table, keys = sampler.table(), sampler.seen()
    heads = sorted({line.head for line in table})
    around = {key: seen_around(sampler, key) for key in keys}
    power = top_of(torch.cat([values.flatten() for values in around.values()]))
    for scale in SCALES:
        cells = _Cells(sampler, scale)
        width = LAYER_WIDTH + len(heads) * cells.step
        if width <= MOST_WIDTH:
            break
    words = min(max(width, LEAST_WIDTH), MOST_WORDS)
    parts = [_header(sampler, table, title, notes, power, words, few)]
    lines = {(Key(x.role, x.number, x.layer, x.pass_), x.head): x for x in table}
    sections = groupby(sorted(keys, key=lambda key: (key.role, key.pass_)), _section)
    for name, section_keys in sections:
        parts.append(_section_head(name, heads, cells, width))
        parts += [
            _layer_row(sampler, key, heads, around[key], power, cells, lines, few)
            for key in section_keys
        ]
    height = sum(part.height for part in parts) + 2 * MARGIN
    out = Image.new("RGB", (max(part.width for part in parts) + 2 * MARGIN, height), PAPER)
    y = MARGIN
    for part in parts:
        out.paste(part, (MARGIN, y))
        y += part.height
    return out


def _section(key: Key) -> str:
    return f"{key.role}, pass {key.pass_}"


def titled(title: str, notes: Sequence[str], width: int, below: int) -> tuple[Image.Image, int]:
    """Draw a title and notes, with ``below`` empty pixels under them.

    Returns the picture and the height at which the notes end.
    """
    lines = [(line, 46, INK, 60) for line in wrapped(title, 46, width, 2)]
    lines += [(line, 26, GREY, 36) for note in notes for line in wrapped(note, 26, width, 2)]
    out = Image.new("RGB", (width, sum(step for *_, step in lines) + below), PAPER)
    y = 0
    for line, size, ink, step in lines:
        write(out, 0, y, line, size, ink)
        y += step
    return out, y


def _header(
    sampler: Sampler,
    table: Sequence[HeadReadout],
    title: str,
    notes: Sequence[str],
    power: int,
    width: int,
    few: float,
) -> Image.Image:
    """Draw the title, the notes, the main numbers and an explanation of the cells."""
    shares = sorted(line.shares.tile_share for line in table)
    count = sum(share <= few + 1e-9 for share in shares)
    facts = {
        f"heads with 90 % of the mass in {percent(few)} of the tiles": f"{count} of {len(shares)}",
        "of the tiles, the median head": percent(shares[len(shares) // 2]),
        "of the tiles, uniform attention": percent(sampler.chance.tile_share),
    }
    frames = sampler.measures.around[0]
    where = f"the {frames} frames about its own" if frames > 1 else "the frame"
    how = (
        f"Each cell: mean attention around the query (red) in {where}, times uniform attention; "
        "right, the keys that queries all over the frame share. Below: the smallest share of key "
        f"tiles that holds 90 % of a query tile's mass, green up to {percent(few)}, and the shape "
        "of the tiles"
    )
    how += "; the mass by frame distance, own frame red." if frames > 1 else "."
    explained = wrapped(how, 22, width - 540, 5)
    out, y = titled(title, notes, width, 150 + max(30 * len(explained), 70) + 34)
    x, y = 0, y + 24
    for name, value in facts.items():
        text_width = write(out, x, y, value, 50)
        x += max(text_width, write(out, x, y + 60, name, 22, GREY)) + 56
    y += 118
    for number, line in enumerate(explained):
        write(out, 0, y + 30 * number, line, 22, GREY)
    scale = legend(power)
    out.paste(scale, (width - scale.width, y))
    return out


def _section_head(name: str, heads: Sequence[int], cells: _Cells, width: int) -> Image.Image:
    """Draw the name of a denoiser and pass, and the head and frames of each column."""
    out = Image.new("RGB", (width, 92), PAPER)
    write(out, 0, 8, name, 26)
    middle = cells.frames // 2
    frames = [f"t{frame - middle:+d}" if frame != middle else "t" for frame in range(cells.frames)]
    for number, head in enumerate(heads):
        x = LAYER_WIDTH + number * cells.step
        write(out, x, 44 if cells.scale > 2 else 64, f"head {head}", 20 if cells.scale > 1 else 15)
        for left, text in zip(cells.lefts, [*frames, "keys"], strict=True):
            if cells.scale > 2:
                write(out, x + left, 70, text, 14, GREY)
    return out


def _layer_row(
    sampler: Sampler,
    key: Key,
    heads: Sequence[int],
    around: torch.Tensor,
    power: int,
    cells: _Cells,
    lines: dict[tuple[Key, int], HeadReadout],
    few: float,
) -> Image.Image:
    """Draw the cells of one layer."""
    size = (LAYER_WIDTH + len(heads) * cells.step, cells.high + cells.label + 10 + 2 * GAP)
    out = Image.new("RGB", size, PAPER)
    write(out, 0, cells.high // 2 - 12, f"layer {key.number}", 22 if cells.scale > 1 else 16)
    shared, distance = shared_keys(sampler, key), by_distance(sampler, key)
    has_text = bool(sampler.measures.sample.layout.texts)
    place = 0
    for number, head in enumerate(heads):
        line = lines.get((key, head))
        if line is None:
            continue
        x = LAYER_WIDTH + number * cells.step
        _cell(out, x, around[place], shared[place], power, cells)
        y = cells.high + 6
        share = line.shares.tile_share
        ink = LOW_SHARE if share <= few + 1e-9 else INK
        text_width = write(out, x, y, percent(share), cells.label, ink)
        if cells.small:
            words = line.shares.tiling
            words += f", text {percent(line.shares.text)}" if has_text else ""
            text_width += 8 + write(out, x + text_width + 8, y + 3, words, cells.small, GREY)
        right = x + max(cells.maps_width, cells.width)
        box = (max(x + text_width + 16, right - cells.bars), y, right, y + cells.label)
        bars(out, box, distance[place])
        place += 1
    return out


def _cell(
    out: Image.Image,
    x: int,
    around: torch.Tensor,
    shared: torch.Tensor,
    power: int,
    cells: _Cells,
) -> None:
    """Draw the maps of one head."""
    scale = cells.scale
    for left, values in zip(cells.lefts, around, strict=False):
        out.paste(heat_picture(values, power, scale, scale), (x + left, 0))
    row, column = (side // 2 for side in around.shape[1:])
    left, upper = x + cells.lefts[cells.frames // 2] + column * scale, row * scale
    box = (left - 1, upper - 1, left + scale, upper + scale)
    ImageDraw.Draw(out).rectangle(box, outline=QUERY)
    out.paste(heat_picture(shared, power, cells.shared, cells.shared), (x + cells.lefts[-1], 0))


def bars(
    out: Image.Image,
    box: tuple[int, int, int, int],
    values: torch.Tensor,
    widest: int = 8,
) -> tuple[int, int]:
    """Draw mass by frame distance as bars at the right of a box ``(left, upper, right, lower)``.

    The largest bar is as high as the box; the bar of distance 0 is red.

    Returns:
        The left edge and the width of a bar; width 0 if nothing was drawn.
    """
    left, upper, right, lower = box
    count, height = len(values), lower - upper
    bar_width = min(widest, (right - left) // count)
    if bar_width < 1 or count == 1:
        return right, 0
    draw = ImageDraw.Draw(out)
    left = right - bar_width * count
    for number, value in enumerate((values / values.max().clamp(min=1e-9)).tolist()):
        high = max(1, round(value * height))
        color = QUERY if number == count // 2 else BAR
        edge = left + (number + 1) * bar_width - (1 if bar_width < 3 else 1 + -(-bar_width // 8))
        draw.rectangle((left + number * bar_width, lower - high, edge, lower - 1), color)
    return left, bar_width

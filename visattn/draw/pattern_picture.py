"""A picture of a pattern: its token mask, its block map, and the keys that one query sees.

Cells are whole pixels, never smoothed. What does not fit is sampled at pixel centres, and a note in
the picture says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from visattn.draw.canvas import GAP_FROM, cells_picture, wrapped, write
from visattn.draw.palette import (
    EMPTY,
    GREY,
    GRID_BANDS,
    KEPT,
    PAPER,
    PARTIAL,
    QUERY,
    SHORT,
    WHOLE_TEXT,
    Color,
)
from visattn.draw.pattern_view import CLASSES, PatternView
from visattn.geometry.orders import SequenceBlocks

__all__ = ["arranged", "draw_view", "frames_picture", "mask_picture"]

Strip = list[tuple[float, float, Color]]  # begin and end as shares of an axis
CLASS_COLORS = dict(zip(CLASSES, (EMPTY, KEPT, WHOLE_TEXT, SHORT, PARTIAL), strict=True))

SIDE, SAMPLES = 1024, 512  # pixels of a square panel; most rows and columns of cells in it
LARGEST_CELL, LARGEST_TOKEN = 128, 40  # pixels, in a panel and in a frame
MARGIN, SPACE, STRIP, INDENT = 72, 16, 14, 46  # INDENT: left of a panel, for strip and mark
WIDTH = 2 * (SIDE + INDENT) + 56
FRAMES_HEIGHT, MOST_FRAMES = 880, 64
LABEL, LABEL_WIDTH, RING = 26, 48, 4


def _fitted(cells: torch.Tensor, colors: Sequence[Color], side: int) -> Image.Image:
    """Return the largest picture of the cells on a square of ``side`` pixels."""
    height, width = (max(1, min(LARGEST_CELL, side // count)) for count in cells.shape)
    return cells_picture(cells, colors, height, width)


def mask_picture(view: PatternView, side: int = SIDE, samples: int = SAMPLES) -> Image.Image:
    """Draw the token mask on at most ``side`` pixels, queries down, keys across."""
    return _fitted(view.mask(min(samples, side)).byte(), (EMPTY, KEPT), side)


def arranged(shape: tuple[int, int, int], width: int, height: int, gap: int) -> tuple[int, int]:
    """Return the pixels of a token, 0 when the frames do not fit, and the frames in a row."""
    count, rows, columns = shape
    best = (0, 1)
    for across in range(1, count + 1):
        room = (width + gap) // across - gap
        if count > 1 and room < LABEL_WIDTH:
            break
        high = (height + gap) // -(-count // across) - gap - LABEL
        best = max(best, (min(room // columns, high // rows, LARGEST_TOKEN), across))
    scale, across = best
    return scale, -(-count // -(-count // across))  # no row much shorter than the others


def frames_picture(
    view: PatternView, number: int, width: int, height: int, gap: int = 16
) -> tuple[Image.Image, int]:
    """Draw the keys of one grid that the query sees, frame by frame, with the query's token marked.

    Returns:
        The picture, and the number of tokens that it shows. A grid that is too large for ``width``
        and ``height`` pixels is sampled.
    """
    grid, factor, scale, across = view.layout.grids[number][1], 0, 0, 1
    while scale < 1:  # show fewer tokens until the frames fit
        factor += 1
        shape = (min(grid.frames, MOST_FRAMES), -(-grid.height // factor), -(-grid.width // factor))
        scale, across = arranged(shape, width, height, gap)
    grid_view = view.grid_view(number, *shape)
    count, rows, columns = shape
    step_x = max(columns * scale, LABEL_WIDTH if count > 1 else 0) + gap
    step_y = LABEL + rows * scale + gap
    size = (across * step_x - gap, -(-count // across) * step_y - gap)
    out = Image.new("RGB", size, PAPER)
    times = grid_view.places[0].tolist()
    for place, (time, seen) in enumerate(zip(times, grid_view.seen, strict=True)):
        x, y = place % across * step_x, place // across * step_y
        write(out, x, y, f"t={time}", 20, GREY)
        out.paste(cells_picture(seen.byte(), (EMPTY, KEPT), scale, scale), (x, y + LABEL))
    if grid_view.query is not None:
        place, row, column = grid_view.query
        x = place % across * step_x + column * scale
        y = place // across * step_y + LABEL + row * scale
        ring = 0 if scale >= GAP_FROM else RING
        right, lower = (min(z + scale + ring, n) - 1 for z, n in zip((x, y), out.size, strict=True))
        box = (max(0, x - ring), y - ring, right, lower)
        ImageDraw.Draw(out).rectangle(box, outline=QUERY, width=max(RING - 1, scale // 7))
    return out, grid_view.seen.numel()


def _token_strip(view: PatternView) -> Strip:
    """Return the colours of the tokens: text, prefix, and alternating frames of grids."""
    strip: Strip = []
    total = view.layout.length
    for start, part in zip(view.layout.starts, view.layout.segments, strict=True):
        frames = part.grid.frames if part.grid is not None else 1
        size = part.length / frames
        for frame in range(frames):
            color = _segment_color(part.kind, frame if size * SIDE >= 4 * total else 0)
            begin = start + frame * size
            strip.append((begin / total, (begin + size) / total, color))
    return strip


def _block_strip(blocks: SequenceBlocks) -> Strip:
    """Return the colours of the blocks: text, prefix or a grid."""
    strip: Strip = []
    begin = 0
    for number, count in enumerate(torch.bincount(blocks.segment).tolist()):
        color = _segment_color(blocks.layout.segments[number].kind, number)
        strip.append((begin / len(blocks), (begin + count) / len(blocks), color))
        begin += count
    return strip


def _segment_color(kind: str, number: int) -> Color:
    return GRID_BANDS[number % 2] if kind == "grid" else CLASS_COLORS["text"]


def _panel(
    title: str, note: str, picture: Image.Image, down: Strip, along: Strip, legend: dict[str, Color]
) -> Image.Image:
    """Draw a square picture under its title, with strips for the kinds of its rows and columns."""
    top = 104
    out = Image.new("RGB", (SIDE + INDENT, top + STRIP + 8 + picture.height + 96), PAPER)
    write(out, INDENT, 0, title, 34)
    write(out, INDENT, 48, note, 26, GREY)
    draw = ImageDraw.Draw(out)
    x, y = INDENT, top + STRIP + 8
    out.paste(picture, (x, y))
    for begin, end, color in along:
        left, right = (x + round(share * picture.width) for share in (begin, end))
        draw.rectangle((left, top, max(left, right - 1), top + STRIP - 1), color)
    for begin, end, color in down:
        upper, lower = (y + round(share * picture.height) for share in (begin, end))
        draw.rectangle((x - STRIP - 8, upper, x - 9, max(upper, lower - 1)), color)
    y += picture.height + 24
    for name, color in legend.items():
        draw.rectangle((x, y + 2, x + 23, y + 25), color)
        x += 34 + write(out, x + 34, y, name, 24, GREY) + 32
    return out


def _mask_panel(view: PatternView, picture: Image.Image) -> Image.Image:
    strip, length = _token_strip(view), view.layout.length
    note = f"{length} queries down, {length} keys across"
    if length > SAMPLES:
        note += f", sampled at {SAMPLES} of each"
    legend = {"kept": KEPT, "not kept": EMPTY}
    legend |= {"alternating frames": GRID_BANDS[0]} if view.layout.grids else {}
    if any(part.grid is None for part in view.layout.segments):
        legend["text or prefix"] = CLASS_COLORS["text"]
    out = _panel("Token pairs", note, picture, strip, strip, legend)
    row = 104 + STRIP + 8 + int((view.query + 0.5) / length * picture.height)
    tip = INDENT - STRIP - 12
    ImageDraw.Draw(out).polygon([(tip, row), (tip - 15, row - 9), (tip - 15, row + 9)], QUERY)
    return out


def _block_panel(view: PatternView, side: int) -> Image.Image:
    block_map = view.block_map
    sides = (block_map.q_blocks, block_map.k_blocks)
    status = view.blocks(SAMPLES)
    picture = _fitted(status, tuple(CLASS_COLORS.values()), side)
    note = f"{len(sides[0])} x {len(sides[1])} blocks of {block_map.block_q} x {block_map.block_k}"
    note += ", order " + view.order_words()
    if status.numel() < len(sides[0]) * len(sides[1]):
        note += f", sampled at {SAMPLES}"
    legend = {name: CLASS_COLORS[name] for name, number in view.counts().items() if number}
    legend["not visited"] = EMPTY
    down, along = (_block_strip(blocks) for blocks in sides)
    return _panel("Block map", wrapped(note, 26, SIDE, 1)[0], picture, down, along, legend)


def _header(view: PatternView) -> Image.Image:
    """Draw the pattern, the layout and the most important numbers."""
    block_map, counts = view.block_map, view.counts()
    pairs = len(block_map.q_blocks) * len(block_map.k_blocks)
    facts = {
        "density": f"{view.density:.4f}",
        "block density": f"{block_map.block_density:.4f}",
        "blocks visited": f"{block_map.num_visited} of {pairs}",
        f"partial blocks ({view.partial})": str(counts["partial"]),
        "keys of the query": f"{int(view.seen.sum())} of {view.layout.length}",
    }
    title = wrapped(repr(view.pattern), 46, WIDTH - INDENT, 3)
    out = Image.new("RGB", (WIDTH - INDENT, len(title) * 60 + 206), PAPER)
    for number, line in enumerate(title):
        write(out, 0, number * 60, line, 46)
    y = len(title) * 60 + 6
    layout = wrapped(view.layout_words(), 30, WIDTH - INDENT, 1)[0]
    write(out, 0, y, layout, 30, GREY)
    x = 0
    for name, value in facts.items():
        value_width = write(out, x, y + 70, value, 50)
        x += max(value_width, write(out, x, y + 130, name, 26, GREY)) + 84
    return out


def _heading(title: str, note: str) -> Image.Image:
    out = Image.new("RGB", (WIDTH - INDENT, 104), PAPER)
    write(out, 0, 0, title, 34)
    write(out, 0, 48, note, 26, GREY)
    return out


def _query_parts(view: PatternView) -> list[Image.Image]:
    """Draw what the query sees: a heading, and the frames of each grid."""
    words = view.query_words()
    grids = view.layout.grids
    note = "seen keys dark, the query's own token outlined in red" if grids else "there is no grid"
    parts = [_heading(words[0].upper() + words[1:], note)]
    for number, (_, grid) in enumerate(grids):
        height = max(160, FRAMES_HEIGHT // len(grids))
        picture, shown = frames_picture(view, number, WIDTH - INDENT, height)
        if len(grids) > 1 or shown < grid.numel:
            note = f", {shown} of {grid.numel} places shown" if shown < grid.numel else ""
            label = Image.new("RGB", (WIDTH - INDENT, 50), PAPER)
            write(label, 0, 4, f"Grid {grid}{note}", 26)
            parts.append(label)
        parts.append(picture)
    return parts


def draw_view(view: PatternView) -> Image.Image:
    """Draw the whole picture: numbers, mask, block map, and the query's keys frame by frame.

    Returns:
        An RGB image 2294 pixels wide, and as high as its parts need.
    """
    mask = mask_picture(view)
    panels = _mask_panel(view, mask), _block_panel(view, max(mask.height, SIDE // 2))
    both = Image.new("RGB", (WIDTH, max(panel.height for panel in panels)), PAPER)
    both.paste(panels[0], (0, 0))
    both.paste(panels[1], (WIDTH - panels[1].width, 0))
    parts = [(INDENT, _header(view)), (0, both)]
    parts += [(INDENT, part) for part in _query_parts(view)]
    height = sum(part.height + SPACE for _, part in parts) - SPACE
    out = Image.new("RGB", (WIDTH + 2 * MARGIN - INDENT, height + 2 * MARGIN), PAPER)
    y = MARGIN
    for indent, part in parts:
        out.paste(part, (MARGIN - INDENT + indent, y))
        y += part.height + SPACE
    return out

"""A picture of one head: its measures, the attention of one query, and the mean around queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from visattn.draw.canvas import font, wrapped, write
from visattn.draw.heat import heat_picture, legend, top_of
from visattn.draw.palette import GREY, PAPER, QUERY
from visattn.draw.pattern_picture import INDENT, LABEL, MARGIN, WIDTH, arranged
from visattn.geometry.layout import on_cpu
from visattn.readout.head_readout import HeadReadout, Key
from visattn.readout.overview import bars, by_distance, percent, seen_around, titled
from visattn.readout.sampler import Sampler

__all__ = ["draw_detail"]

ROOM = WIDTH - INDENT
FRAMES_HEIGHT, AROUND_HEIGHT, MOST_FRAMES = 1100, 420, 64
GAP, APART = 16, 40
NAMES = {
    "frame": "own frame",
    "same_place": "same place, other frames",
    "window": "window",
    "columns": "columns",
    "text": "text",
    "tile_share": "of the tiles for 90 %",
}


@on_cpu
def draw_detail(
    sampler: Sampler,
    head: HeadReadout,
    *,
    title: str,
    notes: Sequence[str] = (),
    video: torch.Tensor | None = None,
) -> Image.Image:
    """Draw one head of a sampler that keeps a query.

    Args:
        sampler: a sampler that has read calls.
        head: a line of its table.
        title: the title above the picture.
        notes: lines below the title.
        video: the generated frames ``[F, h, w, 3]`` in [0, 1], shown above the attention to their
            latent frames; the first latent frame is that of the first video frame.

    Returns:
        An RGB image 2294 pixels wide.

    Raises:
        ValueError: the sampler keeps no query.
    """
    key = Key(head.role, head.number, head.layer, head.pass_)
    place = sampler.heads.index(head.head) if sampler.heads is not None else head.head
    attention = sampler.query_attention(key)[place]
    around = seen_around(sampler, key)[place]
    sample = sampler.measures.sample
    length, query = sample.layout.length, sampler.query
    assert query is not None
    seen = attention[sample.start : sample.start + sample.grid.numel].view(sample.grid.shape)
    power = top_of(torch.cat([seen.flatten() * length, around.flatten()]))
    words = f"The query at ({', '.join(map(str, query))})"
    note = "its attention to every token, times that of uniform attention"
    for text, count in sample.layout.texts:
        note += f"; {percent(float(attention[text : text + count].sum()))} goes to text"
    distance = by_distance(sampler, key)[place]
    parts = [
        _header(sampler, head, title, notes),
        _heading(words, f"{note}; its own token is outlined in red", legend(power)),
        _frames(seen * length, query, power, video),
        _heading("All sampled queries", "mean attention around them"),
        _around(around, distance, power),
    ]
    height = sum(part.height + APART for part in parts) - APART + 2 * MARGIN
    out = Image.new("RGB", (WIDTH + 2 * MARGIN - INDENT, height), PAPER)
    y = MARGIN
    for part in parts:
        out.paste(part, (MARGIN, y))
        y += part.height + APART
    return out


def _header(sampler: Sampler, head: HeadReadout, title: str, notes: Sequence[str]) -> Image.Image:
    """Draw the title and the measures of the head, with those of uniform attention."""
    shares, chance = head.shares.numbers(), sampler.chance.numbers()
    out, y = titled(title, notes, ROOM, 250)
    x, y = 0, y + 24
    for name, label in NAMES.items():
        if name == "text" and not sampler.measures.sample.layout.texts:
            continue
        label += f" {'x'.join(map(str, sampler.window))}" if name == "window" else ""
        value = "-" if shares[name] is None else percent(shares[name])
        other = "-" if chance[name] is None else percent(chance[name])
        text_width = write(out, x, y, value, 50)
        text_width = max(text_width, write(out, x, y + 60, label, 26, GREY))
        x += max(text_width, write(out, x, y + 92, f"uniform {other}", 22, GREY)) + 64
    tiles = ", ".join(f"{name} {percent(n)}" for name, n in head.shares.tile_shares.items())
    write(
        out, 0, y + 142, wrapped(f"Tiles for 90 % of the mass: {tiles}", 26, ROOM, 1)[0], 26, GREY
    )
    return out


def _heading(title: str, note: str, legend_image: Image.Image | None = None) -> Image.Image:
    """Draw a heading with a note and, at the right, a legend."""
    out = Image.new("RGB", (ROOM, 104), PAPER)
    write(out, 0, 0, title, 34)
    write(out, 0, 48, note, 26, GREY)
    if legend_image is not None:
        out.paste(legend_image, (ROOM - legend_image.width, 8))
    return out


def _frames(
    values: torch.Tensor,
    query: tuple[int, int, int],
    power: int,
    video: torch.Tensor | None,
) -> Image.Image:
    """Draw heat maps of all frames, ``[T, height, width]``, as large as the space allows.

    If there is a video, its frames are drawn above them.
    """
    latents, high = values.shape[:2], 2 if video is not None else 1
    shown = torch.arange(values.shape[0])
    if len(shown) > MOST_FRAMES:  # spread, and the query's own frame among them
        shown = (torch.arange(MOST_FRAMES) * len(shown) // MOST_FRAMES).unique()
        shown[(shown - query[0]).abs().argmin()] = query[0]
    factor, scale, across = 0, 0, 1
    while scale < 1:  # average tokens until the frames fit
        factor += 1
        rows, columns = (-(-n // factor) for n in values.shape[1:])
        scale, across = arranged((len(shown), high * rows, columns), ROOM, FRAMES_HEIGHT, GAP)
    if factor > 1:
        values = torch.nn.functional.avg_pool2d(values[None], factor, ceil_mode=True)[0]
    frame_width, frame_height = columns * scale, rows * scale
    step_x = max(frame_width, 48 if len(shown) > 1 else 0) + GAP
    step_y = LABEL + high * frame_height + (2 if video is not None else 0) + GAP
    bands = -(-len(shown) // across)
    out = Image.new("RGB", (across * step_x - GAP, bands * step_y - GAP), PAPER)
    for number, frame in enumerate(shown.tolist()):
        x, y = number % across * step_x, number // across * step_y
        write(out, x, y, f"t={frame}", 20, QUERY if frame == query[0] else GREY)
        y += LABEL
        if video is not None:
            out.paste(_still(video, frame, latents[0], frame_width, frame_height), (x, y))
            y += frame_height + 2
        out.paste(heat_picture(values[frame], power, scale, scale), (x, y))
        if frame == query[0]:
            column, row = query[2] // factor * scale, query[1] // factor * scale
            for upper in (y,) if video is None else (y, y - frame_height - 2):
                _ring(out, x + column, upper + row, scale)
    return out


def _ring(out: Image.Image, left: int, upper: int, scale: int) -> None:
    """Outline a token in red with a light border; the outline of a small token lies outside it."""
    ring, draw = 0 if scale >= 16 else 3, ImageDraw.Draw(out)
    box = (max(0, left - ring), upper - ring, left + scale + ring - 1, upper + scale + ring - 1)
    draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), outline=PAPER, width=2)
    draw.rectangle(box, outline=QUERY, width=max(2, scale // 9))


def _still(
    video: torch.Tensor, frame: int, latents: int, frame_width: int, frame_height: int
) -> Image.Image:
    """Return the video frame at a latent frame, ``frame_width`` by ``frame_height`` pixels."""
    index = round(frame * (len(video) - 1) / max(1, latents - 1))
    pixels = (video[index] * 255).round().to(torch.uint8)
    height, width = pixels.shape[:2]
    still = Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))
    return still.resize((frame_width, frame_height), Image.Resampling.LANCZOS)


def _around(values: torch.Tensor, distance: torch.Tensor, power: int) -> Image.Image:
    """Draw the mean around the query, ``[at, ay, ax]``, and the mass by frame distance."""
    count, rows, columns = values.shape
    middle, room = count // 2, ROOM // 4
    frame_width = (ROOM - room) // count - GAP
    scale = max(1, min(frame_width // columns, AROUND_HEIGHT // rows, 40))
    lower = LABEL + max(rows * scale, 200 if len(distance) > 1 else 0)
    out = Image.new("RGB", (ROOM, lower + 34), PAPER)
    x = 0
    for number, frame in enumerate(values):
        offset = number - middle
        label = f"frame t{offset:+d}" if offset else "own frame"
        write(out, x, 0, label, 20, GREY if offset else QUERY)
        out.paste(heat_picture(frame, power, scale, scale), (x, LABEL))
        if not offset:
            left, upper = x + columns // 2 * scale, LABEL + rows // 2 * scale
            box = (left - 1, upper - 1, left + scale, upper + scale)
            ImageDraw.Draw(out).rectangle(box, outline=QUERY, width=2)
        x += columns * scale + GAP
    if len(distance) > 1:
        x += 2 * GAP
        write(
            out, x, 0, f"mass by frame distance, highest {percent(float(distance.max()))}", 20, GREY
        )
        left, bar_width = bars(out, (x, LABEL, ROOM - 24, lower), distance, 48)
        last = len(distance) // 2
        for offset in (-last, 0, last) if bar_width else ():
            text = f"{offset:+d}" if offset else "0"
            middle = left + (offset + last) * bar_width + bar_width // 2
            write(out, middle - int(font(20).getlength(text)) // 2, lower + 6, text, 20, GREY)
    return out

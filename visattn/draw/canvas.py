"""Drawing in whole pixels: cells, lines of text, and PNG files written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from visattn._atomic import write_whole
from visattn.draw.palette import INK, PAPER, Color

__all__ = ["cells_picture", "font", "save_png", "wrapped", "write"]

GAP_FROM = 16  # cells of so many pixels are set apart by a line of paper


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow carries."""
    return ImageFont.load_default(size=size)


def write(image: Image.Image, x: int, y: int, text: str, size: int, ink: Color = INK) -> int:
    """Draw one line of text with its top left corner at ``(x, y)``; returns its width."""
    ImageDraw.Draw(image).text((x, y), text, fill=ink, font=font(size))
    return int(font(size).getlength(text))


def wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """``text`` broken at spaces into a few lines of at most ``width`` pixels, the rest left out."""
    out = [""]
    for word in text.split(" "):
        longer = f"{out[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            out[-1] = longer
        elif len(out) < lines:
            out.append(word)
        else:
            while out[-1] and font(size).getlength(f"{out[-1]} ...") > width:
                out[-1] = out[-1].rpartition(" ")[0]
            out[-1] += " ..."
            break
    return out


def cells_picture(
    cells: torch.Tensor, colors: Sequence[Color], high: int, wide: int
) -> Image.Image:
    """Colour numbers ``[rows, columns]`` as cells of ``high`` by ``wide`` pixels."""
    rows, columns = cells.shape
    small = Image.frombytes("P", (columns, rows), bytes(cells.flatten().tolist()))
    small.putpalette([channel for color in colors for channel in color])
    picture = small.convert("RGB").resize((columns * wide, rows * high), Image.Resampling.NEAREST)
    if min(high, wide) >= GAP_FROM:
        draw = ImageDraw.Draw(picture)
        for x in range(wide, picture.width, wide):
            draw.line([(x, 0), (x, picture.height)], PAPER)
        for y in range(high, picture.height, high):
            draw.line([(0, y), (picture.width, y)], PAPER)
    return picture


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image whole or not at all, under a name that ends in ``.png``.

    Raises:
        ValueError: the name ends in something else.
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"output {str(path)!r} must end in .png; no other format is written")
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    write_whole(target, data.getvalue())

"""Drawing in whole pixels: cells, lines of text, and PNG files that are written atomically."""

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

GAP_FROM = 16  # pixels of a cell from which a line separates it from the next


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font."""
    return ImageFont.load_default(size=size)


def write(image: Image.Image, x: int, y: int, text: str, size: int, ink: Color = INK) -> int:
    """Draw one line of text with its top left corner at ``(x, y)`` and return its width."""
    ImageDraw.Draw(image).text((x, y), text, fill=ink, font=font(size))
    return int(font(size).getlength(text))


def wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """Break text at spaces into at most ``lines`` lines of at most ``width`` pixels.

    What does not fit is replaced by ``...``.
    """
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
    cells: torch.Tensor, colors: Sequence[Color], height: int, width: int
) -> Image.Image:
    """Draw colour numbers ``[rows, columns]`` as cells of ``height`` by ``width`` pixels."""
    rows, columns = cells.shape
    small = Image.frombytes("P", (columns, rows), bytes(cells.flatten().tolist()))
    small.putpalette([channel for color in colors for channel in color])
    size = (columns * width, rows * height)
    picture = small.convert("RGB").resize(size, Image.Resampling.NEAREST)
    if min(height, width) >= GAP_FROM:
        draw = ImageDraw.Draw(picture)
        for x in range(width, picture.width, width):
            draw.line([(x, 0), (x, picture.height)], PAPER)
        for y in range(height, picture.height, height):
            draw.line([(0, y), (picture.width, y)], PAPER)
    return picture


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image atomically, under a name that ends in ``.png``.

    Raises:
        ValueError: the name has another ending.
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"output {str(path)!r} must end in .png; no other format is written")
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    write_whole(target, data.getvalue())

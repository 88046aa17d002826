"""Draw the gallery of all patterns: the token mask of each, and what one query sees.

    python scripts/draw_patterns.py [--output assets/patterns/gallery.png]

The same versions of Pillow and torch write the same bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from PIL import Image

from visattn import Grid, TokenLayout
from visattn.draw.canvas import font, save_png, wrapped, write
from visattn.draw.palette import GREY, PAPER
from visattn.draw.pattern_picture import frames_picture, mask_picture
from visattn.draw.pattern_view import PatternView, view_pattern
from visattn.patterns import PATTERNS, Pattern, Union, parse_pattern

GALLERY = Path(__file__).resolve().parents[1] / "assets" / "patterns" / "gallery.png"
LAYOUT = TokenLayout(Grid(6, 8, 8))
COLUMNS = 4
MARGIN, GUTTER = 56, 56
SIDE = LAYOUT.length  # one pixel a token
HEAD = 98  # name, parameters, density


def examples() -> dict[str, Pattern]:
    """Return the example of every pattern.

    Raises:
        ValueError: a class has no example, or one that is written as another pattern.
    """
    patterns = {}
    for name, kind in PATTERNS.items():
        pattern = parse_pattern(kind.example) if hasattr(kind, "example") else None
        if not isinstance(pattern, kind):
            raise ValueError(f"example of {name!r} must be the written form of a {kind.__name__}")
        patterns[name] = pattern
    return patterns


def written(pattern: Pattern) -> str:
    """The arguments of a pattern as one would write them, defaults left out."""
    if isinstance(pattern, Union):
        return ", ".join(f"{type(item).__name__}({written(item)})" for item in pattern.patterns)
    values = {field.name: getattr(pattern, field.name) for field in fields(pattern)}
    defaults = {field.name: field.default for field in fields(pattern)}
    return ", ".join(f"{name}={v!r}" for name, v in values.items() if v != defaults[name])


def tile(name: str, view: PatternView) -> Image.Image:
    """The picture of one pattern."""
    frames, _ = frames_picture(view, 0, SIDE, 90, gap=8)
    out = Image.new("RGB", (SIDE, HEAD + SIDE + 12 + frames.height), PAPER)
    write(out, 0, 0, name, 30)
    density = f"{view.density:.3f}"
    write(out, SIDE - int(font(26).getlength(density)), 4, density, 26)
    for number, line in enumerate(wrapped(written(view.pattern), 20, SIDE, 2)):
        write(out, 0, 40 + 24 * number, line, 20, GREY)
    out.paste(mask_picture(view, SIDE), (0, HEAD))
    out.paste(frames, (0, HEAD + SIDE + 12))
    return out


def gallery() -> Image.Image:
    """All tiles, in the order of ``PATTERNS``."""
    views = {name: view_pattern(pattern, LAYOUT) for name, pattern in examples().items()}
    tiles = [tile(name, view) for name, view in views.items()]
    place = next(iter(views.values())).place
    rows = -(-len(tiles) // COLUMNS)
    step_x, step_y = SIDE + GUTTER, tiles[0].height + GUTTER
    top = MARGIN + 92
    size = (2 * MARGIN + COLUMNS * step_x - GUTTER, top + rows * step_y - GUTTER + MARGIN)
    out = Image.new("RGB", size, PAPER)
    caption = (
        f"Every pattern on a grid of {LAYOUT}: which pairs of its {LAYOUT.length} tokens are kept,",
        f"queries down, keys across; the density; what query {place} sees in each frame.",
    )
    for number, line in enumerate(caption):
        write(out, MARGIN, MARGIN - 16 + 38 * number, line, 28)
    for number, picture in enumerate(tiles):
        x, y = MARGIN + number % COLUMNS * step_x, top + number // COLUMNS * step_y
        out.paste(picture, (x, y))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gallery of all patterns.")
    parser.add_argument("--output", type=Path, default=GALLERY, metavar="FILE.png")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    save_png(gallery(), output)
    print(f"wrote {output} ({output.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()

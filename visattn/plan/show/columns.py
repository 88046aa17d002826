"""Text tables with aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["aligned"]

GAP = 2  # spaces between columns
LEAST_WIDTH = 48  # of a last column that is wrapped


def aligned(table: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return the lines of a table whose columns are aligned to the left.

    Args:
        table: rows of equally many cells; the first row may be the header.
        width: the last column is wrapped so that lines have at most this many characters, as far
            as 48 characters of it fit; None: no wrapping.
    """
    sizes = [max(map(len, column)) + GAP for column in zip(*table, strict=True)][:-1]
    left = sum(sizes)
    lines = []
    for row in table:
        start = "".join(text.ljust(size) for text, size in zip(row, sizes, strict=False))
        pieces = [row[-1]]
        if width is not None:
            room = max(width - left, LEAST_WIDTH)
            pieces = textwrap.wrap(row[-1], room, break_on_hyphens=False)
        for piece in pieces:
            lines.append((start + piece).rstrip())
            start = " " * left
    return lines

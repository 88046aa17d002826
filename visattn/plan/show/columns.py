"""Text tables with aligned columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["aligned", "cell"]

GAP = 2  # spaces between columns
LEAST_WIDTH = 48  # of a last column that is wrapped


def cell(value: float | None, form: str = ".3f") -> str:
    """Return a number as a cell of a table; None is a dash."""
    return "-" if value is None else format(value, form)


def aligned(
    table: Sequence[Sequence[str]], width: int | None = None, numbers: int = 0
) -> list[str]:
    """Return the lines of a table with aligned columns.

    Args:
        table: rows of equally many cells; the first row may be the header.
        width: the last column is wrapped so that lines have at most this many characters, as far
            as 48 characters of it fit; None: no wrapping.
        numbers: how many columns, from the first on, are aligned to the right; the others are
            aligned to the left.
    """
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    last_start = sum(sizes[:-1]) + GAP * (len(sizes) - 1)
    lines = []
    for row in table:
        cells = [
            text.rjust(size) if index < numbers else text.ljust(size)
            for index, (text, size) in enumerate(zip(row, sizes, strict=True))
        ]
        start = "".join(padded + " " * GAP for padded in cells[:-1])
        pieces = [cells[-1]]
        if width is not None:
            room = max(width - last_start, LEAST_WIDTH)
            pieces = textwrap.wrap(row[-1], room, break_on_hyphens=False)
        for piece in pieces:
            lines.append((start + piece).rstrip())
            start = " " * last_start
    return lines

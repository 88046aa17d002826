"""Frame rate, number and size of the frames of an mp4, read from its boxes without decoding."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from operator import mul
from typing import NamedTuple

__all__ = ["Timing", "timing_of"]


class Timing(NamedTuple):
    """Frames per second, number of frames, and width and height in pixels of a video track."""

    fps: float
    frames: int
    width: int
    height: int


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        size, head = int(struct.unpack_from(">I", data, start)[0]), 8
        if size == 1:
            size, head = int(struct.unpack_from(">Q", data, start + 8)[0]), 16
        last = end if size == 0 else min(start + max(size, head), end)
        yield data[start + 4 : start + 8], start + head, last
        start = last


def _inside(data: bytes, path: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    first, _, rest = path.partition("/")
    for name, low, high in _boxes(data, start, end):
        if name == first.encode():
            yield from _inside(data, rest, low, high) if rest else ((low, high),)


def timing_of(data: bytes) -> Timing | None:
    """Return the timing of the bytes of an mp4, or None if the boxes do not contain it."""
    try:
        for low, high in _inside(data, "moov/trak", 0, len(data)):
            ((handler, _),) = _inside(data, "mdia/hdlr", low, high)
            if data[handler + 8 : handler + 12] != b"vide":
                continue
            ((head, _),) = _inside(data, "mdia/mdhd", low, high)
            ((table, _),) = _inside(data, "mdia/minf/stbl/stts", low, high)
            ((_, track),) = _inside(data, "tkhd", low, high)
            (scale,) = struct.unpack_from(">I", data, head + (20 if data[head] else 12))
            (entries,) = struct.unpack_from(">I", data, table + 4)
            runs = struct.unpack_from(f">{2 * entries}I", data, table + 8)
            counts, steps = runs[::2], runs[1::2]
            frames, ticks = sum(counts), sum(map(mul, counts, steps))
            width, height = struct.unpack_from(">II", data, track - 8)
            return Timing(scale * frames / ticks, frames, width >> 16, height >> 16)
    except (ValueError, ZeroDivisionError, struct.error):
        pass
    return None

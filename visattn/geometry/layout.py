"""The geometry of a token sequence: grids, segments and layouts.

Sizes used all over the package: ``B`` batch, ``H`` heads, ``L`` tokens, ``D`` head dimension. A
grid is ``(frames, height, width)`` in latent tokens, row-major: token ``(t, h, w)`` has index
``(t * height + h) * width + w``. Axes are named by the letters ``t``, ``h``, ``w``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from visattn._arguments import check_count
from visattn.runtime.torch_settings import lasting

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Grid",
    "Segment",
    "TokenLayout",
    "Tokens",
    "check_text_lengths",
    "copied_to",
    "index_on",
    "on_cpu",
    "valid_keys",
]

SegmentKind = Literal["grid", "text", "prefix"]
# A layout as words and numbers, in the order of the sequence: ("text", length),
# ("prefix", length) and ("grid", frames, height, width).
Tokens = tuple[tuple[str | int, ...], ...]


_ALIVE: weakref.WeakValueDictionary[int, Traceable] = weakref.WeakValueDictionary()


P = ParamSpec("P")
T = TypeVar("T")


def on_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function compute geometry on the CPU, whatever default device a user has set. Its
    results may be cached."""

    @functools.wraps(function)
    @lasting
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":  # entering the context slows every torch call
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


@functools.lru_cache(maxsize=256)
@on_cpu
def index_on(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return numbers as an int64 index on a device. It is copied there once; do not write to it."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@on_cpu
def copied_to(constant: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a constant tensor on a device. It is copied there once; do not write to it."""
    if constant.device == torch.device(device):
        return constant
    copies = _COPIES.setdefault(constant, {})
    if device not in copies:
        copies[device] = constant.to(device)
    copy: torch.Tensor = copies[device]
    return copy


class Traceable:
    """A value that a compiled call refers to by its identity. Dynamo can trace and guard ``id(x)``
    where it cannot trace the object itself."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        self = super().__new__(cls)
        _ALIVE[id(self)] = self
        return self


def alive(identity: int) -> Traceable:
    """Return the object with an ``id()``; it must still exist."""
    return _ALIVE[identity]


@dataclass(frozen=True)
class Grid:
    """A row-major grid of latent tokens.

    Args:
        frames: latent frames, at least 1 (1 for an image).
        height: token rows, at least 1.
        width: token columns, at least 1.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1.

    Example:
        >>> from visattn import Grid
        >>> grid = Grid(frames=13, height=30, width=45)
        >>> grid.numel
        17550
        >>> str(grid)
        '13x30x45'
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            check_count(name, getattr(self, name), 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)

    @property
    def numel(self) -> int:
        return self.frames * self.height * self.width

    @property
    def strides(self) -> tuple[int, int, int]:
        """Weights of the linear form ``index = sum(stride * coordinate)``."""
        return (self.height * self.width, self.width, 1)

    def coordinates(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the coordinates ``(t, h, w)`` of raster indices of any shape."""
        plane = self.height * self.width
        return index // plane, index // self.width % self.height, index % self.width

    def permuted(self, axes: tuple[int, int, int]) -> Grid:
        """Return the grid whose axis ``i`` is axis ``axes[i]`` of this grid."""
        return Grid(*(self.shape[axis] for axis in axes))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def check_query(query: tuple[int, int, int] | None, grid: Grid) -> tuple[int, int, int]:
    """Return the coordinates ``(t, h, w)`` of a query; those of the middle of the grid for None.

    Raises:
        TypeError: ``query`` is not a tuple of three integers.
        ValueError: ``query`` is outside the grid.
    """
    if query is None:
        return grid.frames // 2, grid.height // 2, grid.width // 2
    if not isinstance(query, tuple) or len(query) != 3:
        raise TypeError(f"query={query!r} must be three integers (t, h, w)")
    for value in query:
        check_count("query", value, 0)
    if any(x >= n for x, n in zip(query, grid.shape, strict=True)):
        last = tuple(n - 1 for n in grid.shape)
        raise ValueError(f"query={query} is outside grid {grid}; its last place is {last}")
    return query


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind.

    Args:
        kind: ``"grid"``: tokens with coordinates. ``"text"``: at most ``length`` tokens; the number
            of valid ones is given for each sample at run time. ``"prefix"``: class or register
            tokens, which are always valid.
        length: number of tokens, at least 1.
        grid: the grid of a segment of kind ``"grid"``; None for other kinds.

    Raises:
        TypeError: ``length`` is not an integer.
        ValueError: a value is not allowed, or ``length`` is not the number of tokens of ``grid``.

    Example:
        >>> from visattn import Grid, Segment, TokenLayout
        >>> layout = TokenLayout(segments=[Segment("prefix", 5), Grid(1, 14, 14)])
        >>> layout.length
        201
    """

    kind: SegmentKind
    length: int
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("grid", "text", "prefix"):
            raise ValueError(f"kind={self.kind!r} must be 'grid', 'text' or 'prefix'")
        check_count("length", self.length, 1)
        if (self.kind == "grid") != (self.grid is not None):
            raise ValueError(
                f"grid={self.grid} must be given for kind 'grid' and for no other; "
                f"kind={self.kind!r}"
            )
        if self.grid is not None and self.grid.numel != self.length:
            raise ValueError(
                f"length={self.length} must be the {self.grid.numel} tokens of grid {self.grid}"
            )


@dataclass(frozen=True, init=False)
class TokenLayout(Traceable):
    """What the tokens of a sequence are: one or more grids, text before or after, prefix tokens.

    Layouts are hashable and compare by value. The valid length of a text segment is not part of a
    layout: it is a run-time tensor (``text_lengths``).

    Args:
        grid: the grid of a sequence with one grid; give ``grid`` or ``segments``.
        text_before: largest number of text tokens before the grid.
        text_after: largest number of text tokens after the grid.
        segments: for other sequences: ``Grid`` and ``Segment`` items in the order of the tokens.

    Raises:
        TypeError: a size is not an integer, or ``segments`` holds another type.
        ValueError: a size is too small, or both or none of ``grid`` and ``segments`` are given.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> layout = TokenLayout(Grid(13, 30, 45), text_before=226)
        >>> layout.length
        17776
        >>> str(layout)
        'text(226) + 13x30x45'
    """

    segments: tuple[Segment, ...] = field()

    def __init__(
        self,
        grid: Grid | None = None,
        text_before: int = 0,
        text_after: int = 0,
        *,
        segments: Sequence[Segment | Grid] | None = None,
    ) -> None:
        if (grid is None) == (segments is None):
            raise ValueError("TokenLayout takes either grid= or segments=, one of the two")
        check_count("text_before", text_before, 0)
        check_count("text_after", text_after, 0)
        items: list[Segment | Grid]
        if segments is None:
            assert grid is not None
            items = [Segment("text", text_before)] if text_before else []
            items.append(grid)
            items += [Segment("text", text_after)] if text_after else []
        elif text_before or text_after:
            raise ValueError(
                f"text_before={text_before} and text_after={text_after} go with grid=; "
                "with segments= put Segment('text', n) into the list"
            )
        else:
            items = list(segments)
        parts: list[Segment] = []
        for item in items:
            if isinstance(item, Grid):
                item = Segment("grid", item.numel, item)
            if not isinstance(item, Segment):
                raise TypeError(f"segments holds {item!r}; it takes Grid and Segment items only")
            parts.append(item)
        if not parts:
            raise ValueError("segments=() is empty; a layout has at least one token")
        object.__setattr__(self, "segments", tuple(parts))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.segments)

    @classmethod
    def from_tokens(cls, tokens: Tokens) -> Self:
        """Return the layout that is written as in ``(("text", 226), ("grid", 13, 30, 45))``.

        Raises:
            TypeError: a size is not an integer.
            ValueError: an item does not describe a segment.
        """
        parts: list[Segment | Grid] = []
        for kind, *sizes in tokens:
            numbers = [check_count(f"a size of segment {kind!r}", size, 1) for size in sizes]
            if kind == "grid" and len(numbers) == 3:
                parts.append(Grid(*numbers))
            elif kind in ("text", "prefix") and len(numbers) == 1:
                parts.append(Segment("text" if kind == "text" else "prefix", numbers[0]))
            else:
                raise ValueError(
                    f"segment {(kind, *sizes)} must be ('grid', frames, height, width), "
                    "('text', length) or ('prefix', length)"
                )
        return cls(segments=parts)

    @cached_property
    def tokens(self) -> Tokens:
        """The segments as words and numbers; ``from_tokens`` reads them."""
        return tuple(
            (s.kind, *s.grid.shape) if s.grid is not None else (s.kind, s.length)
            for s in self.segments
        )

    @cached_property
    def length(self) -> int:
        """Tokens of the sequence, text at its capacity."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        starts, position = [], 0
        for segment in self.segments:
            starts.append(position)
            position += segment.length
        return tuple(starts)

    @cached_property
    def grids(self) -> tuple[tuple[int, Grid], ...]:
        """(first token, grid) of each grid segment, in order."""
        pairs = zip(self.starts, self.segments, strict=True)
        return tuple((start, segment.grid) for start, segment in pairs if segment.grid is not None)

    @cached_property
    def texts(self) -> tuple[tuple[int, int], ...]:
        """(first token, capacity) of each text segment, in order."""
        pairs = zip(self.starts, self.segments, strict=True)
        return tuple((start, segment.length) for start, segment in pairs if segment.kind == "text")

    def __str__(self) -> str:
        return " + ".join(
            str(s.grid) if s.grid is not None else f"{s.kind}({s.length})" for s in self.segments
        )


def check_text_lengths(text_lengths: torch.Tensor, layout: TokenLayout, batch: int) -> torch.Tensor:
    """Return valid text lengths as int64 ``[B, text segments]``.

    Args:
        text_lengths: integer tensor ``[B]`` (one text segment) or ``[B, text segments]``.
        layout: the key layout.
        batch: ``B``.

    Raises:
        TypeError: the dtype is not int32 or int64.
        ValueError: the shape does not fit the layout and batch. Values are not checked, because
            reading them would wait for the device; they are clamped to the capacity.
    """
    count = len(layout.texts)
    if count == 0:
        raise ValueError(
            f"text_lengths is given but the key layout {layout} has no text segment; leave it out"
        )
    if not isinstance(text_lengths, torch.Tensor) or text_lengths.dtype not in (
        torch.int32,
        torch.int64,
    ):
        got = getattr(text_lengths, "dtype", type(text_lengths).__name__)
        raise TypeError(f"text_lengths must be an int32 or int64 tensor, not {got}")
    shape = tuple(text_lengths.shape)
    if shape != (batch, count) and not (count == 1 and shape == (batch,)):
        allowed = f"[{batch}, {count}]" + (f" or [{batch}]" if count == 1 else "")
        raise ValueError(
            f"text_lengths of shape {list(shape)} must be {allowed}: batch, text segments"
        )
    lengths = text_lengths.reshape(batch, count).long()
    columns = zip(lengths.unbind(1), layout.texts, strict=True)
    return torch.stack([column.clamp(0, capacity) for column, (_, capacity) in columns], 1)


def valid_keys(text_lengths: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return which keys are valid, bool ``[B, L]``, for checked text lengths ``[B, text
    segments]``."""
    valid = text_lengths.new_ones((text_lengths.shape[0], layout.length), dtype=torch.bool)
    for column, (start, length) in enumerate(layout.texts):
        position = torch.arange(length, device=text_lengths.device)
        valid[:, start : start + length] = position < text_lengths[:, column, None]
    return valid

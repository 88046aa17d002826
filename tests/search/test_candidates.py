"""The static candidates of the search: which patterns, under which labels, in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import pytest

from visattn import Grid, TokenLayout
from visattn.patterns import PATTERNS, Diagonal
from visattn.patterns.base.head_pattern import unregister
from visattn.patterns.base.pattern import SearchMembers
from visattn.search.candidates.static import members, static_families

# of 4 x 9 x 10 tokens: how many members each label has
COUNTS = {
    "band": 10,
    "band twh": 10,
    "band htw": 10,
    "band hwt": 10,
    "band wth": 10,
    "band wht": 10,
    "bands across frames": 10,
    "first frame and band": 4,
    "radial": 1,
    "radial with sink": 1,
    "neighborhood": 9,
    "neighborhood in the frame": 6,
    "neighborhood along time": 10,
    "neighborhood of frames": 2,
    "sliding tile": 2,
    "windows in the frame": 5,
    "windows along time": 9,
    "windows of frames": 2,
    "windows": 9,
    "windows, shifted": 8,
    "grid blocks": 9,
    "halo": 8,
    "sharded": 8,
}
# the number of lines of ``written`` and their digest
DIGESTS = {
    ((1, 16, 16), 64): (139, "abbb572997151481"),
    ((3, 8, 8), 32): (183, "c13528595c975c50"),
    ((4, 9, 10), 64): (196, "d1c04eea7be62cca"),
    ((9, 12, 20), 128): (204, "df99008df483032f"),
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def written(grid: Grid, block: int) -> list[str]:
    """The labels with all members, and the members at the levels, in order."""
    lines = []
    for label, family in static_families(grid, block).items():
        if not callable(family):
            lines.append(f"{label}: {len(family)} {digest(repr(list(family)))[:12]}")
        chosen = members(family, TokenLayout(grid))
        lines += [f"{label}: {len(chosen)}", *(f"  {pattern!r}" for pattern in chosen)]
    return lines


def test_labels_and_numbers() -> None:
    layout = TokenLayout(Grid(4, 9, 10))
    families = static_families(Grid(4, 9, 10), 64)
    numbers = {label: len(members(family, layout)) for label, family in families.items()}
    assert list(numbers.items()) == list(COUNTS.items())


@pytest.mark.parametrize(("shape", "block"), DIGESTS)
def test_members_and_their_order(shape: tuple[int, int, int], block: int) -> None:
    lines = written(Grid(*shape), block)
    assert (len(lines), digest("\n".join(lines))[:16]) == DIGESTS[shape, block], "\n".join(lines)


def test_a_subclass_has_candidates_of_its_own_or_none() -> None:
    before = list(static_families(Grid(3, 8, 8), 32))

    @dataclass(frozen=True, eq=False)
    class Narrow(Diagonal):
        name: ClassVar[str] = "narrow"

    try:
        assert list(static_families(Grid(3, 8, 8), 32)) == before
    finally:
        unregister(Narrow)
    assert "narrow" not in PATTERNS


def test_a_label_is_used_once() -> None:
    @dataclass(frozen=True, eq=False)
    class OtherBand(Diagonal):
        name: ClassVar[str] = "other_band"

        @classmethod
        def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
            return {"band": cls}

    try:
        with pytest.raises(ValueError, match=r"'other_band' returns the label 'band'"):
            static_families(Grid(3, 8, 8), 32)
    finally:
        unregister(OtherBand)

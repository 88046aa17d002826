"""Which candidates a search tries: all families, some of them, or given patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import HeadPattern, Pattern, parse_pattern
from visattn.search.candidates.dynamic import dynamic_families
from visattn.search.candidates.learned_stencils import stencils_of
from visattn.search.candidates.static import LEVELS, members, static_families
from visattn.search.measure.output_losses import CandidatePool, Layer
from visattn.search.measure.tile_grid import TileGrid

__all__ = ["CandidateChoice"]

STENCIL = "stencil"  # the family of patterns that are learned for each head
GIVEN = "given"  # the family of patterns that the caller has written out
STENCIL_LEVELS = (0.06, 0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5)
ANY_GRID, ANY_BLOCK = Grid(4, 8, 8), 64  # where every family has members


@dataclass(frozen=True)
class CandidateChoice:
    """The candidates that a caller names.

    Args:
        names: names of families, and patterns or their texts; empty for all families.

    Raises:
        ValueError: a name is no family and no pattern.
    """

    names: tuple[str | HeadPattern, ...] = ()

    def __post_init__(self) -> None:
        self.check(ANY_GRID, ANY_BLOCK)

    def check(self, grid: Grid, block: int) -> None:
        """Raise ValueError for a name that is no family on this grid."""
        families = [*static_families(grid, block), STENCIL, *dynamic_families(block)]
        for name in self.names:
            if isinstance(name, str) and "(" not in name and name not in families:
                raise ValueError(
                    f"candidates holds {name!r}; families are {', '.join(map(repr, families))}, or "
                    "give a pattern as in 'radial(decay=0.2)'"
                )

    def includes(self, family: str) -> bool:
        """Whether a family is tried."""
        return not self.names or any(isinstance(x, str) and x == family for x in self.names)

    @property
    def patterns(self) -> list[HeadPattern]:
        """The candidates that are given as patterns."""
        return [
            name if isinstance(name, HeadPattern) else parse_pattern(name)
            for name in self.names
            if isinstance(name, HeadPattern) or "(" in name
        ]

    def dynamic_rules(self, block: int) -> list[tuple[str, HeadPattern]]:
        """Dynamic candidates with their families.

        Args:
            block: tokens of a block.
        """
        rules = [
            (family, pattern)
            for family, patterns in dynamic_families(block).items()
            if self.includes(family)
            for pattern in patterns
        ]
        return rules + [(GIVEN, x) for x in self.patterns if not isinstance(x, Pattern)]

    def pool(
        self,
        layout: TokenLayout,
        block: int,
        grids: Sequence[TileGrid],
        tables: Mapping[Layer, Sequence[torch.Tensor]],
        rules: Sequence[tuple[str, HeadPattern]],
    ) -> CandidatePool:
        """Return the pool of all candidates.

        Args:
            layout: of the tokens.
            block: tokens of a block.
            grids: the tilings of the stencils.
            tables: attention mass of each layer, from which its stencils are learned.
            rules: the dynamic candidates that are fast enough.
        """
        grid = layout.grids[0][1]
        static: list[tuple[str, Pattern]] = []
        for family, generator in static_families(grid, block).items():
            if self.includes(family):
                static += [(family, pattern) for pattern in members(generator, layout, LEVELS)]
        for pattern in self.patterns:
            if isinstance(pattern, Pattern):
                pattern.check(grid)
                static.append((GIVEN, pattern))
        stencils = {}
        if self.includes(STENCIL):
            stencils = {
                layer: stencils_of(layer_tables, grids, STENCIL_LEVELS)
                for layer, layer_tables in tables.items()
            }
        # a pattern of two families counts as one of the first
        family_of = {pattern: family for family, pattern in reversed(static)}
        distinct = dict.fromkeys(pattern for _, pattern in static)
        return CandidatePool(
            tuple((family_of[pattern], pattern) for pattern in distinct), tuple(rules), stencils
        )

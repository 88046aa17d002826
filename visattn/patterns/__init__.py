"""Static patterns: which (query, key) pairs a head computes, known before any tensor is.

Each is a frozen dataclass with ``allows(q, k, layout)``, ``density(layout)`` and
``lower(layout, block_q, block_k)``. ``PATTERNS`` names them all; ``parse_pattern`` reads their
written form.
"""

from visattn.patterns.base.head_pattern import HeadPattern, KindsOf
from visattn.patterns.base.pattern import Pattern
from visattn.patterns.grammar.parse import parse_pattern

# isort: off
# The order of these imports is the order of PATTERNS, in lists, in the gallery and in the search.
from visattn.patterns.dense import Dense
from visattn.patterns.skip import Skip
from visattn.patterns.diagonal import Diagonal, MultiDiagonal
from visattn.patterns.stripe import Stripe
from visattn.patterns.radial import Radial
from visattn.patterns.neighborhood import Neighborhood
from visattn.patterns.sliding_tile import SlidingTile
from visattn.patterns.block import Block, ShiftedBlock
from visattn.patterns.grid_blocks import GridBlocks
from visattn.patterns.halo import Halo
from visattn.patterns.sharded import Sharded
from visattn.patterns.stencil import Stencil
from visattn.patterns.axis_order import AxisOrder
from visattn.patterns.union import Union
# isort: on

__all__ = [
    "PATTERNS",
    "AxisOrder",
    "Block",
    "Dense",
    "Diagonal",
    "GridBlocks",
    "Halo",
    "HeadPattern",
    "MultiDiagonal",
    "Neighborhood",
    "Pattern",
    "Radial",
    "Sharded",
    "ShiftedBlock",
    "Skip",
    "SlidingTile",
    "Stencil",
    "Stripe",
    "Union",
    "parse_pattern",
]

PATTERNS = KindsOf(Pattern)  # type: ignore[type-abstract]

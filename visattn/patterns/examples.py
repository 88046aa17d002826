"""One telling instance of each pattern, for pictures and demonstrations.

Each is legal on a grid of 6 x 8 x 8 tokens and on every larger one.
"""

from __future__ import annotations

from visattn.patterns.axis_order import AxisOrder
from visattn.patterns.base.pattern import Pattern
from visattn.patterns.block import Block, ShiftedBlock
from visattn.patterns.dense import Dense
from visattn.patterns.diagonal import Diagonal, MultiDiagonal
from visattn.patterns.grid_blocks import GridBlocks
from visattn.patterns.halo import Halo
from visattn.patterns.neighborhood import Neighborhood
from visattn.patterns.radial import Radial
from visattn.patterns.sharded import Sharded
from visattn.patterns.skip import Skip
from visattn.patterns.sliding_tile import SlidingTile
from visattn.patterns.stencil import Stencil
from visattn.patterns.stripe import Stripe
from visattn.patterns.union import Union

EXAMPLES: dict[str, Pattern] = {
    "dense": Dense(),
    "skip": Skip(),
    "diagonal": Diagonal(48),
    "multi_diagonal": MultiDiagonal(21),
    "stripe": Stripe(columns=((0.5, 0.55), 0.75)),
    "radial": Radial(rule="paper"),
    "neighborhood": Neighborhood((3, 5, 5)),
    "sliding_tile": SlidingTile(tile=(2, 2, 2), window=(1, 3, 3)),
    "block": Block((3, 4, 4)),
    "shifted_block": ShiftedBlock((3, 4, 4)),
    "grid_blocks": GridBlocks((3, 4, 4)),
    "halo": Halo(block=(2, 4, 4), halo=(1, 2, 2)),
    "sharded": Sharded(local=2, stride=4, block=32),
    "stencil": Stencil(
        tile=(2, 2, 2),
        offsets=((0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, -1), (0, 1, 1)),
        columns=(0,),
    ),
    "axis_order": AxisOrder(Diagonal(40), "twh"),
    "union": Union(Diagonal(12), MultiDiagonal(5), Stripe()),
}

"""Families of patterns: each executes more blocks the larger its one parameter is.

A family is a function of a number from 0 to 1, or, where sizes come in steps, a list of members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from visattn.patterns import (
    AxisOrder,
    Block,
    Diagonal,
    GridBlocks,
    Halo,
    HeadPattern,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    ShiftedBlock,
    SlidingTile,
    Stripe,
    Union,
)
from visattn.selectors import (
    ASA,
    NABLA,
    PISA,
    VSA,
    Agent,
    BiLevel,
    ClusterBlocks,
    CoreContext,
    DFSAttn,
    Draft,
    Hashing,
    Hierarchical,
    Jenga,
    KeyOrder,
    MoBA,
    OnlineChoice,
    ProxyHeads,
    Pyramid,
    Rectified,
    Sparge,
    TopBlocks,
    VMoBA,
    XAttention,
)

Family = Callable[[float], HeadPattern] | Sequence[HeadPattern]
BLOCK = 16  # tokens of a block
ORACLE = "exact mass (oracle)"
LEAST = 0.01  # the least share that may be asked for
SIDES = (1, 2, 3, 4, 6, 12)
TIMES = (1, 2, 3, 4, 7)
SCORES = ("pooled", "sub_tiles", "representative", "sampled", "antidiagonal", "bounds")
RESTS = ("pooled", "variance", "first_order", "sample")


def static_families() -> dict[str, Family]:
    """Every static pattern by name."""
    b = BLOCK
    windows = [(t, side, side) for t in TIMES for side in SIDES]
    tiles = [(t, side, side) for t in (1, 3, 5, 7) for side in (1, 3)]
    return {
        "band": Diagonal,
        "temporal band": lambda x: AxisOrder(Diagonal(x), "hwt"),
        "bands across frames": MultiDiagonal,
        "radial": lambda x: Radial(decay=max(4 * x, LEAST), block=2 * b),
        "neighborhood": lambda x: Neighborhood((x, x, x)),
        "neighborhood, in the frame": lambda x: Neighborhood((1, max(x, 0.1), max(x, 0.1))),
        "neighborhood, along time": lambda x: Neighborhood((1.0, x, x)),
        "first frame and band": lambda x: Union(Diagonal(x), Stripe()),
        "sliding tile": [SlidingTile((1, 4, 4), window) for window in tiles],
        "windows": [Block(size) for size in windows],
        "windows, shifted": [ShiftedBlock(size) for size in windows],
        "grid blocks": [GridBlocks(size) for size in windows],
        "halo": [Halo((1, 4, 4), (t, side, side)) for t in range(4) for side in (0, 1, 2, 4)],
        "sharded": [Sharded(local, stride, block=32) for local in (1, 2, 4) for stride in SIDES],
    }


def dynamic_families(share: float) -> dict[str, Family]:
    """Every dynamic pattern by name; a mean of each other block counts as executed."""
    b = BLOCK
    rest = max(0.02, share - (1 - share) / b) / share
    out: dict[str, Family] = {
        "jenga": lambda x: Jenga(LEAST, x, b),
        "draft": lambda x: Draft(x, (4, 4)),
        "dfsattn": lambda x: DFSAttn(x, b, max(1, b // 4)),
        "nabla": lambda x: NABLA(x, None, (1, 4, 4)),
        "vsa": lambda x: VSA(x, (1, 4, 4)),
        "asa": lambda x: ASA(x, b, 4),
        "xattention": lambda x: XAttention(x, 4, b),
        "sparge": lambda x: Sparge(x, 0.0, b, b),
        "rectified": lambda x: Rectified(LEAST, x, b),
        "pisa": lambda x: PISA(x, b),
        "moba": lambda x: MoBA(x, b, 1),
        "pyramid": lambda x: Pyramid((0.6 * x, 0.75 * x, 0.9 * x, x), block=b),
        "bi-level": lambda x: BiLevel(x, (1, 4, 4)),
        "proxy heads": lambda x: ProxyHeads(x, 1, 4, b),
        "hierarchical": lambda x: Hierarchical(x, 0.5, 4, b),
        "core context": lambda x: CoreContext(x, b),
        "key order": lambda x: KeyOrder(x, 64, b),
        "clusters": lambda x: ClusterBlocks(x, LEAST, 30, 60, 8, b),
        "clusters, interaction": lambda x: ClusterBlocks(x, LEAST, 30, 60, 8, b, "interaction"),
        "online choice": lambda x: OnlineChoice(
            (Union(Diagonal(x / 2), Stripe()), Union(MultiDiagonal(x / 2), Stripe())), 64, b
        ),
        "hashing": lambda x: Hashing(max(1, int(x * 1000)), 32),
        "agent": [Agent((t, side, side)) for t in TIMES for side in SIDES],
    }
    for partition in ("1d", "2d", "3d"):
        out[f"vmoba {partition}"] = functools.partial(_vmoba, partition)
    for score in SCORES:
        out[f"top blocks, {score}"] = functools.partial(_top, score, "drop", 1.0)
    for kind in RESTS:
        out[f"top blocks + {kind}"] = functools.partial(_top, "representative", kind, rest)
    out[ORACLE] = functools.partial(_top, "exact", "drop", 1.0)
    return out


def _vmoba(partition: str, x: float) -> HeadPattern:
    return VMoBA(partition, 1, (4, 4), (1, 4, 4), x, LEAST, "head", BLOCK)


def _top(score: str, rest: str, factor: float, x: float) -> HeadPattern:
    return TopBlocks(max(x * factor, LEAST), score=score, rest=rest, block=BLOCK)


def is_static(pattern: HeadPattern) -> bool:
    return isinstance(pattern, Pattern)

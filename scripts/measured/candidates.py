"""The launch settings that are worth a measurement: pure functions of the target.

Settings that cannot fit are left out before they cost time: those whose tiles alone exceed the
shared memory of a block, and those whose sums alone exceed the registers of its threads.
"""

from __future__ import annotations

from itertools import product

from visattn.kernels.targets import (
    BACKWARD,
    LAUNCHES,
    TARGETS,
    BackwardLaunch,
    Launch,
)

__all__ = [
    "backward_bytes",
    "backward_candidates",
    "committed",
    "distance",
    "fields",
    "forward_bytes",
    "forward_candidates",
]

Settings = Launch | BackwardLaunch
SHARED_OPERANDS = ("sm_90", "sm_100")  # their products read both operands from shared memory
REGISTERS = {"cuda": 224, "hip": 448}  # of a thread, for sums; what is left holds addresses


def forward_candidates(target: str, size: int, itemsize: int) -> list[Launch]:
    """Settings of the forward kernels for a padded head size and bytes of an element, the committed
    ones first, then those that differ from them in one thing, in two, and so on."""
    narrow = itemsize == 4
    own = LAUNCHES[target][itemsize][size]
    described = (True, False) if any(x.descriptors for x in LAUNCHES[target][2].values()) else ()
    found = [
        Launch(*values)
        for values in product(
            (32, 64, 128) if narrow else (64, 128, 256),
            (16, 32, 64) if narrow else (32, 64, 128),
            (4, 8),
            (1, 2) if narrow else (2, 3),
            (False,) if narrow else described or (False,),
        )
    ]
    limit = TARGETS[target].shared_bytes
    fits = [
        x
        for x in found
        if forward_bytes(target, x, size, itemsize) <= limit
        and x.block_q * (size + x.block_k) <= _sums(target, x.warps)
    ]
    return _sorted(own, fits)


def backward_candidates(target: str, size: int, itemsize: int) -> list[BackwardLaunch]:
    """As ``forward_candidates``, for the gradients."""
    narrow = itemsize == 4
    own = BACKWARD[target][itemsize][size]
    sides = (32, 64) if narrow else (64, 128)
    found = [
        BackwardLaunch(*values)
        for values in product(
            sides,
            (16, 32, 64) if narrow else (32, 64, 128),
            (16, 32, 64) if narrow else (32, 64, 128),
            (16, 32) if narrow else (16, 32, 64),
            (4, 8),
            (1, 2),
        )
    ]
    limit = TARGETS[target].shared_bytes
    fits = [
        x
        for x in found
        if max(x.queries, x.masked) <= x.block_q
        and backward_bytes(target, x, size, itemsize) <= limit
        and 2 * x.block_k * (size + x.queries) <= _sums(target, x.warps)
        and x.queries * (size + 2 * x.block_k) <= _sums(target, x.warps)
    ]
    return _sorted(own, fits)


def forward_bytes(target: str, launch: Launch, size: int, itemsize: int) -> int:
    """About the shared memory that a block of threads takes at least: the buffered tiles of keys
    and values, and the queries where products read them from there."""
    loops = 2 * _buffers(target, itemsize, launch.stages) * launch.block_k
    return (loops + _operand(target, itemsize) * launch.block_q) * size * itemsize


def backward_bytes(target: str, launch: BackwardLaunch, size: int, itemsize: int) -> int:
    """As ``forward_bytes``, of the larger kernel: one keeps queries and their gradients and loops
    over keys and values, the other the other way round."""
    buffers, kept = _buffers(target, itemsize, launch.stages), _operand(target, itemsize)
    tiles = max(
        buffers * launch.block_k + kept * launch.queries,
        buffers * launch.queries + kept * launch.block_k,
    )
    return 2 * tiles * size * itemsize


def _buffers(target: str, itemsize: int, stages: int) -> int:
    """Copies of a tile in a pipelined loop, as the compile matrix shows them: products of 2-byte
    types on NVIDIA have two from two stages on, whatever the stages."""
    if itemsize == 2 and TARGETS[target].backend == "cuda":
        return min(2, stages)
    return max(1, stages - 1)


def _operand(target: str, itemsize: int) -> int:
    """1 where the tile that stays lies in shared memory, 0 where it lies in registers."""
    return int(target in SHARED_OPERANDS or (itemsize == 4 and TARGETS[target].backend == "cuda"))


def _sums(target: str, warps: int) -> int:
    """Float32 numbers that the threads of a block can hold."""
    own = TARGETS[target]
    return REGISTERS[own.backend] * warps * own.warp_size


def committed(kind: str, target: str, size: int, itemsize: int) -> Settings:
    """The entry of the launch tables; ``kind`` is ``forward`` or ``backward``."""
    if kind == "forward":
        return LAUNCHES[target][itemsize][size]
    return BACKWARD[target][itemsize][size]


def fields(settings: Settings) -> tuple[int, ...]:
    """The values in the order of the constructor; of gradients those that are timed, so without the
    spare ones."""
    if isinstance(settings, Launch):
        return tuple(settings)
    return tuple(value for name, value in vars(settings).items() if name != "spare")


def distance(a: Settings, b: Settings) -> int:
    """How many values differ."""
    return sum(x != y for x, y in zip(fields(a), fields(b), strict=True))


def _sorted(own: Settings, found: list[Settings]) -> list[Settings]:
    """Without doubles, the nearest to ``own`` first, and ``own`` before all."""
    return sorted(dict.fromkeys([own, *found]), key=lambda x: distance(x, own))

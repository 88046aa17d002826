"""The architectures that kernels are compiled for, and the launch settings on each.

Nothing is tuned at run time. ``scripts/compile_matrix.py`` compiles every row for its target and
writes the resources that it needs into ``assets/tables/compile_matrix.json``. The settings are
chosen from that table: no 16-bit row spills in the loop over full blocks on NVIDIA's targets. A
comment marks settings that were measured on their target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

__all__ = [
    "BACKWARD",
    "LAUNCHES",
    "TARGETS",
    "BackwardLaunch",
    "Launch",
    "Target",
    "backward_settings",
    "launch_settings",
    "target_of",
]


@dataclass(frozen=True)
class Target:
    """An architecture.

    Attributes:
        backend: Triton's backend.
        arch: Triton's name or number of the architecture.
        warp_size: threads of a warp.
        shared_bytes: shared memory that one program can use, in bytes.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_89": Target("cuda", 89, 32, 99 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "sm_120": Target("cuda", 120, 32, 99 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}


class Launch(NamedTuple):
    """Launch settings of the forward kernels.

    Attributes:
        block_q: queries of a block, also of the block map.
        block_k: keys of a block, also of the block map.
        warps: warps of a program.
        stages: stages of the loop pipeline.
        descriptors: read keys and values of full blocks by tensor descriptors (TMA).
        warp_groups: use the kernel of ``hopper.py`` for the calls that it supports; its blocks are
            128 x 64.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    warp_groups: bool = False


# For 2-byte types: the largest tiles for which the compile matrix shows no spills in any variant of
# the masks. 8 warps: with 4 warps of 32 threads, a 128 x 64 tile and the masks need too many
# registers per thread (the 4 warps of gfx942 have as many threads, with 512 registers each).
# 3 stages: one loads the block's number, so that two remain for keys and values. float32 products
# use no matrix units on NVIDIA; their registers grow with the tile size.
_COMMON = {
    16: Launch(128, 64, 8, 3),
    32: Launch(128, 64, 8, 3),
    64: Launch(128, 64, 8, 3),
    128: Launch(128, 64, 8, 3),
}
_SMALL = _COMMON | {128: Launch(128, 32, 8, 3), 256: Launch(64, 32, 8, 2)}  # 99 KiB shared
_FLOAT32 = {
    16: Launch(64, 32, 8, 2),
    32: Launch(64, 32, 8, 2),
    64: Launch(64, 32, 8, 2),
    128: Launch(32, 32, 8, 2),
    256: Launch(32, 16, 8, 2),
}


def _described(table: dict[int, Launch]) -> dict[int, Launch]:
    """Return the settings with tensor descriptors, for architectures that have them."""
    return {size: launch._replace(descriptors=True) for size, launch in table.items()}


# target -> bytes of an element -> padded head size -> settings
LAUNCHES: dict[str, dict[int, dict[int, Launch]]] = {
    "sm_80": {2: _COMMON | {256: Launch(64, 64, 8, 3)}, 4: _FLOAT32},
    "sm_89": {2: _SMALL, 4: _FLOAT32},
    "sm_90": {
        2: _described(_COMMON | {256: Launch(128, 32, 8, 3)})
        | {size: Launch(128, 64, 8, 3, True, True) for size in (64, 128)},
        4: _FLOAT32,
    },
    "sm_100": {2: _described(_COMMON | {256: Launch(64, 64, 8, 3)}), 4: _FLOAT32},
    "sm_120": {2: _described(_SMALL), 4: _FLOAT32},
    "gfx942": {
        2: {
            16: Launch(128, 64, 4, 2),
            32: Launch(128, 64, 4, 2),
            64: Launch(128, 64, 4, 2),
            128: Launch(128, 32, 4, 2),
            256: Launch(64, 32, 4, 2),
        },
        4: {
            16: Launch(64, 32, 4, 2),
            32: Launch(64, 32, 4, 2),
            64: Launch(64, 32, 4, 2),
            128: Launch(64, 32, 4, 2),
            256: Launch(32, 16, 4, 2),
        },
    },
}


@dataclass(frozen=True)
class BackwardLaunch:
    """Launch settings of the gradient kernels.

    Attributes:
        block_q: queries of a block, also of the block map.
        block_k: keys of a block, also of the block map.
        queries: queries that are processed at a time.
        masked: queries that are processed at a time in masked blocks, for dk and dv.
        warps: warps of a program.
        stages: stages of the loop pipeline.
        spare: (masked, warps, stages) for kernels that need more registers or shared memory: masks
            by coordinates, and levels. None: the same settings.
    """

    block_q: int
    block_k: int
    queries: int
    masked: int
    warps: int
    stages: int
    spare: tuple[int, int, int] | None = None

    def spared(self) -> BackwardLaunch:
        """Return the settings for kernels that need more registers or shared memory."""
        if self.spare is None:
            return self
        masked, warps, stages = self.spare
        return replace(self, masked=masked, warps=warps, stages=stages, spare=None)


# 64 queries at a time use Hopper's matrix products of 64 rows. 32 in the masked loop of dk and dv
# leave registers for the mask in addition to the two sums of keys.
_BACKWARD = {
    16: BackwardLaunch(128, 64, 64, 32, 8, 2),
    32: BackwardLaunch(128, 64, 64, 32, 8, 2),
    64: BackwardLaunch(128, 64, 64, 32, 8, 2),
    128: BackwardLaunch(128, 64, 64, 32, 8, 2),
    256: BackwardLaunch(64, 32, 32, 32, 8, 1),
}
_BACKWARD_FLOAT32 = {
    16: BackwardLaunch(64, 32, 32, 32, 8, 1),
    32: BackwardLaunch(64, 32, 32, 32, 8, 1),
    64: BackwardLaunch(64, 32, 32, 32, 8, 1),
    128: BackwardLaunch(32, 32, 32, 32, 8, 1),
    256: BackwardLaunch(32, 16, 16, 16, 8, 1),
}
# sm_90: measured; at head size 128, 2.1 times as fast as 8 warps with blocks of 128 queries.
# sm_120: the compile matrix shows that the common settings spill at head size 64, in dq of the
# radial rule and in levels.
_BACKWARD_OWN = {
    "sm_90": {
        64: BackwardLaunch(64, 64, 64, 32, 4, 3),
        128: BackwardLaunch(64, 64, 64, 32, 4, 3, spare=(16, 8, 2)),
    },
    "sm_120": {64: BackwardLaunch(128, 64, 32, 32, 8, 2)},
}
BACKWARD: dict[str, dict[int, dict[int, BackwardLaunch]]] = {
    target: {2: _BACKWARD | _BACKWARD_OWN.get(target, {}), 4: _BACKWARD_FLOAT32}
    for target in TARGETS
}


def target_of(device: torch.device) -> str:
    """Return the entry of TARGETS for a device: the same architecture, or the nearest older one of
    the vendor.

    Raises:
        ValueError: the device is no GPU, or older than every target.
    """
    if device.type != "cuda":
        raise ValueError(f"device={device} has no Triton target; the kernels run on CUDA and ROCm")
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability == 86:
        return "sm_89"  # it has the same amount of shared memory
    older = [
        (int(target.arch), name)
        for name, target in TARGETS.items()
        if target.backend == "cuda" and int(target.arch) <= capability
    ]
    if not older:
        raise ValueError(
            f"device={device} of capability {major}.{minor} is below the least target, 8.0"
        )
    return max(older)[1]


def _size(dim: int) -> int:
    """Return the padded head size, which is the key of the tables: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def launch_settings(target: str, dtype: torch.dtype, dim: int) -> Launch:
    """Return settings for a dtype (float16, bfloat16, float32) and head size (up to 256)."""
    return LAUNCHES[target][dtype.itemsize][_size(dim)]


def backward_settings(target: str, dtype: torch.dtype, dim: int) -> BackwardLaunch:
    """Return ``launch_settings`` of the gradient kernels."""
    return BACKWARD[target][dtype.itemsize][_size(dim)]

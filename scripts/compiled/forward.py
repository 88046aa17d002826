"""What ``compile_matrix.py`` compiles of the forward kernel: each row of the launch table in every
variant of the masks."""

from __future__ import annotations

from typing import Any

from compiled.masks import constants_of, dims_of, type_of, variants_of
from compiled.rows import TYPES, Row, bytes_of

__all__ = ["SOURCES", "kernel_of", "loops_of", "rows_of", "type_of"]

SOURCES = ("forward", "masks", "permute")


def rows_of(target: str) -> list[Row]:
    """All rows of a target."""
    from visattn.kernels.targets import LAUNCHES

    rows = []
    for dtype in TYPES:
        for size, launch in LAUNCHES[target][bytes_of(dtype)].items():
            block = {"BLOCK_M": launch.block_q, "BLOCK_N": launch.block_k, "SPLIT": True}
            for dim in dims_of(size, dtype, target):
                for variant in variants_of(dim, dtype):
                    constants = constants_of(variant, dim, dtype) | block
                    place = ("forward", target, dtype, dim, variant, "_forward_kernel")
                    rows.append(Row(*place, constants, launch.warps, launch.stages))
    return rows


def kernel_of(name: str) -> Any:
    """A kernel by its name."""
    from visattn.kernels import forward

    return getattr(forward, name)


def loops_of(variant: str) -> int:
    """Loops with matrix products of a variant; None: as many as it has."""
    return 2

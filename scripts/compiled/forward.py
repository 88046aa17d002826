"""What ``compile_matrix.py`` compiles of the forward kernel: each row of the launch table in every
variant of the masks."""

from __future__ import annotations

from typing import Any

from compiled import masks
from compiled.masks import constants_of, dims_of, variants_of
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
            block["BOXES"] = launch.descriptors
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


def type_of(name: str, row: Row) -> str:
    """The type of an argument."""
    if name not in ("k_box", "v_box"):
        return masks.type_of(name, row)
    own, sizes = TYPES[row.dtype], row.constants
    if not sizes["BOXES"]:
        return f"*{own}"
    return f"tensordesc<{own}[1,1,{sizes['BLOCK_N']},{sizes['BLOCK_D']}]>"


def loops_of(variant: str) -> int:
    """Loops with matrix products of a variant; None: as many as it has."""
    return 2

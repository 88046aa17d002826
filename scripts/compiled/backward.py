"""What ``compile_matrix.py`` compiles of the gradients: both kernels of each row of their launch
table in every variant of the masks, and those of levels at the core head sizes. Of the 16-bit types
one, since they take the same; of float32, which is held to no limit but that of shared memory, two
variants."""

from __future__ import annotations

from typing import Any

from compiled import masks
from compiled.masks import CORE, constants_of, dims_of, variants_of
from compiled.rows import TYPES, Row, bytes_of

__all__ = ["SOURCES", "kernel_of", "loops_of", "rows_of", "type_of"]

SOURCES = ("backward", "forward", "masks", "levels", "levels_backward")
DTYPES = ("bfloat16", "float32")
LEVEL = {"KIND": 0, "SPREAD": False, "FIRST": False}
LEVELS: dict[str, dict[str, Any]] = {
    "list": LEVEL,
    "variance": LEVEL | {"SPREAD": True},
    "means": LEVEL | {"KIND": 1, "SPREAD": True},
    "sample": LEVEL | {"KIND": 2},
    "pairs": LEVEL | {"PAIRS": True},
}
FLOAT32 = ("none", "radial")
INTEGERS = ("levels",)  # of 8 bits
LONG = ("bases", "slot_of", "row_base")  # of 64 bits
SIZES = ("slots", "size", "rows", "lanes", "level")
FLOATS = ("bias", "dq", "dk", "dv", "part_dq", "dspread")


def rows_of(target: str) -> list[Row]:
    """All rows of a target."""
    from visattn.kernels.targets import BACKWARD

    rows = []
    for dtype in DTYPES:
        for size, launch in BACKWARD[target][bytes_of(dtype)].items():
            for dim in dims_of(size, dtype, target):
                for variant in FLOAT32 if dtype == "float32" else variants_of(dim, dtype):
                    rows += _rows(target, dtype, dim, launch, variant)
            if size in CORE and dtype != "float32":
                spared = launch.spared()
                rows += [_level_row(target, dtype, size, spared, *pair) for pair in _level_pairs()]
    return rows


def _rows(target: str, dtype: str, dim: int, launch: Any, variant: str) -> list[Row]:
    """Both kernels of a variant."""
    own = launch if variant in ("none", "bits") else launch.spared()
    tile = {"BLOCK_M": own.queries, "BLOCK_N": own.block_k}
    blocks = {
        "dq": tile | {"SUBS": own.block_q // own.queries},
        "dkdv": tile | {"BLOCK_P": own.masked, "BLOCK_Q": own.block_q},
    }
    rows = []
    for kernel, block in blocks.items():
        constants = constants_of(variant, dim, dtype) | block
        place = ("backward", target, dtype, dim, f"{kernel} {variant}", f"_{kernel}_kernel")
        rows.append(Row(*place, constants, own.warps, own.stages))
    return rows


def _level_pairs() -> list[tuple[str, str]]:
    return [
        (kernel, name)
        for name in LEVELS
        for kernel in ("dq", "dkdv")
        if (kernel, name) != ("dq", "pairs")
    ]


def _level_row(target: str, dtype: str, size: int, launch: Any, kernel: str, name: str) -> Row:
    from visattn.kernels.levels_backward import fitted

    constants = LEVELS[name] | {"DIM": size, "BLOCK_D": size, "IEEE": dtype == "float32"}
    tile, stages = (launch.queries, launch.block_k), launch.stages
    tile, stages = fitted(tile, stages, constants["SPREAD"], constants.get("PAIRS", False))
    constants |= {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
    if kernel == "dkdv":
        constants = {"PAIRS": False} | constants
    place = ("backward", target, dtype, size, f"level {kernel} {name}", f"_level_{kernel}_kernel")
    return Row(*place, constants, launch.warps, stages)


def kernel_of(name: str) -> Any:
    """A kernel by its name."""
    from visattn.kernels import backward, levels_backward

    return getattr(levels_backward if name.startswith("_level") else backward, name)


def type_of(name: str, row: Row) -> str:
    """The type of an argument."""
    if not row.variant.startswith("level"):
        return masks.type_of(name, row)
    if name in SIZES:
        return "i32"
    if name in INTEGERS:
        return "*i8"
    if name == "spread":
        return f"*{TYPES[row.dtype]}"
    return "*i64" if name in LONG else "*fp32" if name in FLOATS else masks.type_of(name, row)


def loops_of(variant: str) -> int | None:
    """Loops with matrix products of a variant; None: as many as it has."""
    return None if variant.startswith("level") else 2

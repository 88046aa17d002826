"""What ``compile_matrix.py`` compiles of the kernels of dynamic patterns.

Of the attention kernels every row of the launch table, in the variants that take most, and at the
core head sizes with the 64 queries of a block that selectors have by default; of the others one row
for each target and variant, since they depend on no dtype.
"""

from __future__ import annotations

from typing import Any

from compiled.rows import TYPES, Row, bytes_of

SOURCES = ("levels", "pooled", "queries", "select", "summary")
INTEGERS = ("levels", "forced", "q_some", "k_some", "valid")  # of 8 bits
LONG = ("row_base", "column_base", "first_of", "slot_of", "cuts")  # of 64 bits
NUMBERS = ("scale", "factor")
SIZES = (
    "heads",
    "slots",
    "length_q",
    "num_q",
    "num_k",
    "num_rows",
    "size",
    "rows",
    "pooled_rows",
    "rest_rows",
    "units",
    "groups",
    "total",
    "blocks",
    "width",
    "begin",
    "share",
    "part",
    "end",
    "least",
    "most",
)
ELEMENTS = (
    "q",
    "k",
    "v",
    "pooled_k",
    "pooled_v",
    "spread",
    "rest_k",
    "rest_v",
    "rest_spread",
    "out",
    "x",
    "mean",
)
FLOATS = (
    "bias",
    "pooled_bias",
    "rest_bias",
    "lse",
    "rest_share",
    "reference",
    "highest",
    "scores",
    "k_mean",
    "part_out",
    "part_lse",
)

# queries and keys of a tile come from the launch table
LEVELS: dict[str, dict[str, int | bool]] = {
    "tiles": {"WIDTH": 128, "UNIT": 0, "REST": 0, "SPREAD": False, "SHARE": False, "RECORD": False},
    "pyramid": {
        "WIDTH": 128,
        "UNIT": 16,
        "REST": 1,
        "SPREAD": False,
        "SHARE": False,
        "RECORD": False,
    },
    "variance": {"WIDTH": 64, "UNIT": 8, "REST": 1, "SPREAD": True, "SHARE": True, "RECORD": False},
    "sample": {"WIDTH": 64, "UNIT": 0, "REST": 2, "SPREAD": False, "SHARE": False, "RECORD": False},
    "record": {"WIDTH": 64, "UNIT": 0, "REST": 0, "SPREAD": False, "SHARE": False, "RECORD": True},
}
SELECT = {
    "ROWS": 2,
    "BLOCK_K": 1024,
    "NUMBERS": False,
    "LEAST": True,
    "MOST": True,
    "LEAST_NUMBER": False,
    "MOST_NUMBER": False,
    "FIRST": True,
    "SOME": True,
    "ABOVE": False,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "select count": ("_select_kernel", SELECT | {"BY": 0, "ENDS": 1, "HEAD": False}),
    "select levels": ("_select_kernel", SELECT | {"BY": 1, "ENDS": 4, "HEAD": False}),
    "select head": ("_select_kernel", SELECT | {"BY": 1, "ENDS": 1, "HEAD": True}),
    "select head count": ("_select_kernel", SELECT | {"BY": 0, "ENDS": 1, "HEAD": True}),
    "select above": ("_select_kernel", SELECT | {"BY": 1, "ENDS": 1, "HEAD": False, "ABOVE": True}),
    "select tokens": ("_select_kernel", SELECT | {"BY": 2, "ENDS": 1, "HEAD": False}),
    "select number": (
        "_select_kernel",
        SELECT | {"BY": 0, "ENDS": 1, "HEAD": False, "NUMBERS": True},
    ),
    "masses": ("_masses_kernel", {"ROWS": 2, "BLOCK_K": 1024}),
    "cut": (
        "_cut_kernel",
        {"BLOCK": 4096, "BY": 1, "NUMBERS": False, "FIRST": True, "SOME": False},
    ),
    "cut count": (
        "_cut_kernel",
        {"BLOCK": 4096, "BY": 0, "NUMBERS": False, "FIRST": True, "SOME": True},
    ),
    "cut number": (
        "_cut_kernel",
        {"BLOCK": 4096, "BY": 0, "NUMBERS": True, "FIRST": True, "SOME": False},
    ),
    "lists of units": ("_lists_kernel", {"ROWS": 2, "BLOCK_K": 1024, "FULL": False, "POOLS": 4}),
    "lists": ("_lists_kernel", {"ROWS": 2, "BLOCK_K": 1024, "FULL": True, "POOLS": 3}),
    "columns": ("_columns_kernel", {"ROWS": 64}),
    "join": ("_join_kernel", {"DIM": 128, "BLOCK_D": 128, "ROWS": 16}),
    "pooled 64": ("_pooled_kernel", {"DIM": 64, "BLOCK_D": 64, "ROWS": 16, "BLOCK_N": 32}),
    "pooled 128": ("_pooled_kernel", {"DIM": 128, "BLOCK_D": 128, "ROWS": 16, "BLOCK_N": 32}),
    "pooled 256": ("_pooled_kernel", {"DIM": 256, "BLOCK_D": 256, "ROWS": 16, "BLOCK_N": 32}),
    "summary": (
        "_summary_kernel",
        {"DIM": 128, "BLOCK_D": 128, "BLOCK_R": 16, "VALID": True, "SPREAD": True, "BIAS": True},
    ),
}
FEW_WARPS = ("_join_kernel", "_pooled_kernel", "_summary_kernel")  # 4; the others: 8
CORE = (64, 128)  # head sizes of every variant of the levels


def rows_of(target: str) -> list[Row]:
    """All rows of a target."""
    from visattn.kernels.levels import fitted
    from visattn.kernels.targets import LAUNCHES

    rows = []
    for dtype in TYPES:
        for size, launch in LAUNCHES[target][bytes_of(dtype)].items():
            same = {"DIM": size, "BLOCK_D": size, "IEEE": dtype == "float32"}
            names = list(LEVELS) if size in CORE and dtype != "float32" else ["tiles", "variance"]
            if size in CORE and dtype != "float32":
                names.append("tiles of 64")
            for name in (*names, "queries"):
                constants = LEVELS.get(name.removesuffix(" of 64"), {"WIDTH": 64})
                queries = 64 if name.endswith("of 64") else launch.block_q
                tile, stages = fitted(
                    (queries, launch.block_k), launch.stages, size, bool(constants.get("SPREAD"))
                )
                constants = same | constants | {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
                kernel = "_queries_kernel" if name == "queries" else "_levels_kernel"
                place = ("selection", target, dtype, size, name, kernel)
                rows.append(Row(*place, constants, launch.warps, stages))
    for name, (kernel, constants) in OTHERS.items():
        warps, stages = 4 if kernel in FEW_WARPS else 8, 2 if kernel == "_pooled_kernel" else 3
        place = ("selection", target, "bfloat16", 128, name, kernel)
        rows.append(Row(*place, constants, warps, stages))
    return rows


def kernel_of(name: str) -> Any:
    """A kernel by its name."""
    from visattn.kernels import levels, pooled, queries, select, summary

    return next(
        getattr(module, name)
        for module in (levels, pooled, queries, select, summary)
        if hasattr(module, name)
    )


def type_of(name: str, row: Row) -> str:
    """The type of an argument."""
    if name.startswith("stride_"):
        return "i32"
    if name.rstrip("0123456789") in ("end", "value", "count", "base"):
        return "i32"
    if name in NUMBERS:
        return "fp32"
    if name in SIZES:
        return "i32"
    if name in ELEMENTS:
        return f"*{TYPES[row.dtype]}"
    if name in FLOATS:
        return "*fp32"
    return "*i8" if name in INTEGERS else "*i64" if name in LONG else "*i32"


def loops_of(variant: str) -> int | None:
    """Loops with matrix products of a variant; None: as many as it has."""
    return None

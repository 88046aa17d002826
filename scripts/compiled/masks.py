"""What the kernels over static block lists are compiled with: predicates of partial blocks, and
types of arguments."""

from __future__ import annotations

from typing import Any

from compiled.rows import TYPES, Row

KINDS = {"none": 0, "axis": 1, "strided": 2, "band": 3, "radial": 4, "label": 5, "bits": 6}
# The predicate kinds of the two slots. All flags are on, since a flag that is off only takes code
# away.
VARIANTS = [
    "none",
    "axis",
    "strided",
    "band",
    "radial",
    "label",
    "bits",
    "axis+radial",
    "band+label",
]
CORE = (64, 128)  # head sizes of every variant; the others have those that take most registers
FEWER = ["none", "strided", "radial", "bits"]
PADDED = {40: ("float16", "sm_80"), 80: ("float16", "gfx942"), 96: ("bfloat16", "sm_90")}
ELEMENTS = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")
FLOATS = ("lse", "part_out", "part_lse", "delta", "grad_lse")
SIZES = ("heads", "length_q", "length_k", "num_q", "num_k", "grids", "parts", "texts")


def constants_of(variant: str, dim: int, dtype: str) -> dict[str, Any]:
    """Constants that all of the kernels have."""
    import triton

    first, _, second = variant.partition("+")
    return {
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "KIND_A": KINDS[first],
        "KIND_B": KINDS[second or "none"],
        "Q_ORDERED": True,
        "K_ORDERED": True,
        "LENGTHS": True,
        "IEEE": dtype == "float32",
    }


def dims_of(size: int, dtype: str, target: str) -> list[int]:
    """Head sizes that are compiled of a row of the launch table: its own, and a padded one."""
    padded = [dim for dim, at in PADDED.items() if at == (dtype, target)]
    return [dim for dim in (size, *padded) if size // 2 < dim <= size]


def variants_of(dim: int, dtype: str) -> list[str]:
    return VARIANTS if dim in CORE and dtype != "float32" else FEWER


def type_of(name: str, row: Row) -> str:
    """The type of an argument."""
    if name.startswith("stride_") or name in SIZES:
        return "i32"
    if name == "scale":
        return "fp32"
    if name in ELEMENTS:
        return f"*{TYPES[row.dtype]}"
    return "*fp32" if name in FLOATS else "*i16" if name == "columns" else "*i32"

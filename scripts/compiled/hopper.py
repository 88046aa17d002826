"""What ``compile_matrix.py`` compiles of the forward kernel for Hopper: the head sizes that it
takes, with all flags on and with none."""

from __future__ import annotations

import re
from typing import Any

from compiled import masks
from compiled.resources import MATRIX, SPILL, code_of
from compiled.rows import TYPES, Row

__all__ = ["SOURCES", "Source", "kernel_of", "loops_in", "loops_of", "rows_of", "type_of"]

SOURCES = ("hopper", "forward")
DIMS = {64: (40, 64), 128: (96, 128)}
FLAGS = ("Q_ORDERED", "LENGTHS", "SPLIT")


def _tile() -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def rows_of(target: str) -> list[Row]:
    """All rows of a target."""
    from visattn.kernels.targets import LAUNCHES

    rows = []
    for size, launch in LAUNCHES[target][2].items():
        for dtype in ("float16", "bfloat16") if launch.warp_groups else ():
            for dim in DIMS[size]:
                for variant in ("none", "all"):
                    constants = dict.fromkeys(FLAGS, variant == "all")
                    constants |= {"DIM": dim, "HALVES": size // 64, "STAGES": 2, "TILE": _tile()}
                    place = ("hopper", target, dtype, dim, variant, "_hopper_kernel")
                    rows.append(Row(*place, constants, 4, 2))
    return rows


def Source(*arguments: Any) -> Any:
    """What Triton compiles a kernel in Gluon from."""
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource(*arguments)


def kernel_of(name: str) -> Any:
    """A kernel by its name."""
    from visattn.kernels import hopper

    return getattr(hopper, name)


def type_of(name: str, row: Row) -> str:
    """The type of an argument."""
    if name in ("k_box", "v_box"):
        return f"tensordesc<{TYPES[row.dtype]}[64, 64],{_tile()!r}>"
    if name.startswith(("k_row", "v_row", "k_column", "v_column")):
        return "i32"
    return "fp32" if name == "factor" else masks.type_of(name, row)


def loops_of(variant: str) -> int:
    """Loops with matrix products: of whole and of masked steps, in two groups."""
    return 4


def loops_in(sass: str) -> dict[str, Any]:
    """As for the others. Groups of warps are called by an indirect jump, behind which no flow can
    be followed, so a loop is what lies between a conditional jump back and its target (a wait that
    was moved out of line jumps back without a condition). Steps of whole blocks load no words."""
    code = code_of(sass)
    products = {address: m[1] for address, line in code if (m := MATRIX.search(line))}
    loads = [address for address, line in code if "LDG" in line]
    spills = [address for address, line in code if SPILL.search(line)]
    loops = []
    for address, line in code:
        jump = re.match(r"@!?U?P\d+ BRA\b[^`]*?(0x[0-9a-f]+)", line)
        body = range(int(jump[1], 16), address + 1) if jump else range(0)
        if any(x in body for x in products):
            loops.append(body)
    whole = [body for body in loops if not any(x in body for x in loads)]
    full = sum(any(x in body for body in whole) for x in spills)
    return {
        "loops": len(loops),
        "spills_full_loop": full if len(whole) == 2 else None,
        "spills_elsewhere": len(spills) - full,
        "matrix": sorted(set(products.values())),
    }

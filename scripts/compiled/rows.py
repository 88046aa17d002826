"""A row of the compile matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class Row(NamedTuple):
    """A kernel by name, what it is compiled with, and what it is called in the table."""

    family: str
    target: str
    dtype: str
    dim: int
    variant: str
    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int

    def place(self) -> dict[str, Any]:
        """How the table names it."""
        place: dict[str, Any] = {"family": self.family, "target": self.target}
        place |= {"dtype": self.dtype, "dim": self.dim, "variant": self.variant}
        if "BLOCK_M" in self.constants:
            place["block"] = [self.constants["BLOCK_M"], self.constants["BLOCK_N"]]
        return place | {"warps": self.warps, "stages": self.stages}


def bytes_of(dtype: str) -> int:
    """Bytes of an element, as the launch tables are keyed."""
    return 4 if dtype == "float32" else 2

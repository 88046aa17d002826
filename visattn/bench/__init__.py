"""Measurements: what parts of the work cost, beside dense attention."""

from visattn.bench.attention import AttentionTime, WrongResult, time_attention
from visattn.bench.scattered import Scattered
from visattn.bench.selection import SelectionTime, time_selection
from visattn.bench.shapes import SHAPES, Shape

__all__ = [
    "SHAPES",
    "AttentionTime",
    "Scattered",
    "SelectionTime",
    "Shape",
    "WrongResult",
    "time_attention",
    "time_selection",
]

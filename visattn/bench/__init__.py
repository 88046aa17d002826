"""Measurements: what parts of the work cost, beside dense attention."""

from visattn.bench.architectures import ARCHITECTURES, Architecture, build
from visattn.bench.attention import AttentionTime, WrongResult, time_attention
from visattn.bench.pipeline import GenerationTime, StepTime, time_generation, time_step
from visattn.bench.scattered import Scattered
from visattn.bench.selection import SelectionTime, time_selection
from visattn.bench.shapes import SHAPES, Shape

__all__ = [
    "ARCHITECTURES",
    "SHAPES",
    "Architecture",
    "AttentionTime",
    "GenerationTime",
    "Scattered",
    "SelectionTime",
    "Shape",
    "StepTime",
    "WrongResult",
    "build",
    "time_attention",
    "time_generation",
    "time_selection",
    "time_step",
]

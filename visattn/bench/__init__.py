"""Benchmarks: times of attention, of selection and of pipelines, compared with dense attention."""

from visattn.bench.architectures import ARCHITECTURES, Architecture, build
from visattn.bench.measure_attention import AttentionTime, WrongResult, time_attention
from visattn.bench.measure_pipeline import GenerationTime, StepTime, time_generation, time_step
from visattn.bench.measure_selection import SelectionTime, time_selection
from visattn.bench.scattered_pattern import Scattered
from visattn.bench.video_shapes import SHAPES, Shape

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

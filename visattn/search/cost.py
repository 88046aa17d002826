"""The predicted time of a plan: the public names of ``visattn.cost``."""

from visattn.cost import (
    Calibration,
    LayerCost,
    Work,
    calibrate,
    calibration_of,
    crossover,
    layer_cost,
    step_speedup,
    work_of,
)
from visattn.cost.bounds import Bounds, end_to_end, tile_bounds

__all__ = [
    "Bounds",
    "Calibration",
    "LayerCost",
    "Work",
    "calibrate",
    "calibration_of",
    "crossover",
    "end_to_end",
    "layer_cost",
    "step_speedup",
    "tile_bounds",
    "work_of",
]

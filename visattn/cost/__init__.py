"""What a plan costs: counts of its work, times the seconds that a device takes for each."""

from visattn.cost.calibration import Calibration, calibrate, calibration_of, device_name
from visattn.cost.model import LayerCost, crossover, layer_cost, step_speedup
from visattn.cost.work import Work, work_of

__all__ = [
    "Calibration",
    "LayerCost",
    "Work",
    "calibrate",
    "calibration_of",
    "crossover",
    "device_name",
    "layer_cost",
    "step_speedup",
    "work_of",
]

"""Predicted attention time of a plan: counts of work times measured rates of a device."""

from visattn.cost.calibration import TORCH, Calibration, DenseAttention, calibrate, device_name
from visattn.cost.calibration_cache import calibration_of, measured_again
from visattn.cost.clock import Timing, interleaved, now
from visattn.cost.model import LayerCost, crossover, layer_cost, step_speedup
from visattn.cost.work import Work, work_of

__all__ = [
    "TORCH",
    "Calibration",
    "DenseAttention",
    "LayerCost",
    "Timing",
    "Work",
    "calibrate",
    "calibration_of",
    "crossover",
    "device_name",
    "interleaved",
    "layer_cost",
    "measured_again",
    "now",
    "step_speedup",
    "work_of",
]

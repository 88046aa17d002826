"""Measurements: what parts of the work cost, beside dense attention."""

from visattn.bench.selection import SelectionTime, time_selection

__all__ = ["SelectionTime", "time_selection"]

"""Plans on diffusers pipelines: put on by one call, taken off without a trace."""

from visattn.inject.apply import apply_plan, denoisers, remove_plan, sparse
from visattn.inject.summary import Summary, summary

__all__ = ["Summary", "apply_plan", "denoisers", "remove_plan", "sparse", "summary"]

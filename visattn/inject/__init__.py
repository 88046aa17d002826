"""Plans on diffusers pipelines: one call applies a plan, another one removes it completely.

``layers`` computes the attention calls of a layer (``text_padding.py``, the guard, edited calls),
``hooks`` intercepts the calls of pipelines and models, ``models`` reads facts about a model.
"""

from visattn.inject.apply import apply_plan, observe, remove_plan, sparse
from visattn.inject.layer_summary import Summary, summary
from visattn.inject.models.denoisers import denoisers
from visattn.inject.observation import Observation, Observer

__all__ = [
    "Observation",
    "Observer",
    "Summary",
    "apply_plan",
    "denoisers",
    "observe",
    "remove_plan",
    "sparse",
    "summary",
]

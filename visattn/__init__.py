"""visattn: sparse attention and attention-steering guidance for image and video diffusion
models.

Names are imported at their first use (PEP 562), so that ``import visattn`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from visattn._compat import ensure_torchvision
from visattn._version import __version__ as __version__

ensure_torchvision()

# Registers the dynamic patterns, so that every pattern can be parsed after ``import visattn``.
from visattn import selectors  # noqa: E402

if TYPE_CHECKING:
    from visattn import guidance, metrics, patterns, search
    from visattn.attention import sparse_attention
    from visattn.geometry.layout import Grid, Segment, TokenLayout
    from visattn.guidance import HeadSet, SoftPAG, guide, search_heads, steer
    from visattn.inject import apply_plan, remove_plan, sparse, summary
    from visattn.plan import Plan

__all__ = [
    "Grid",
    "HeadSet",
    "Plan",
    "Segment",
    "SoftPAG",
    "TokenLayout",
    "apply_plan",
    "guidance",
    "guide",
    "metrics",
    "patterns",
    "remove_plan",
    "search",
    "search_heads",
    "selectors",
    "sparse",
    "sparse_attention",
    "steer",
    "summary",
]

# The module that each name is imported from.
_MODULES = {
    "Grid": "visattn.geometry.layout",
    "HeadSet": "visattn.guidance",
    "Plan": "visattn.plan",
    "Segment": "visattn.geometry.layout",
    "SoftPAG": "visattn.guidance",
    "TokenLayout": "visattn.geometry.layout",
    "apply_plan": "visattn.inject",
    "guide": "visattn.guidance",
    "remove_plan": "visattn.inject",
    "search_heads": "visattn.guidance",
    "sparse": "visattn.inject",
    "sparse_attention": "visattn.attention",
    "steer": "visattn.guidance",
    "summary": "visattn.inject",
}
# Public packages, which are attributes after `import visattn` alone.
_PACKAGES = {
    "attention",
    "bench",
    "cost",
    "flex",
    "generation",
    "geometry",
    "guidance",
    "inject",
    "metrics",
    "patterns",
    "plan",
    "readout",
    "report",
    "search",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"visattn.{name}")
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

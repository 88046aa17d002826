"""visattn: sparse attention and attention-steering guidance for image and video diffusion
models."""

from visattn._compat import ensure_torchvision
from visattn._version import __version__ as __version__

ensure_torchvision()

from visattn import guidance, metrics, patterns, search, selectors  # noqa: E402
from visattn.attention import sparse_attention  # noqa: E402
from visattn.geometry.layout import Grid, Segment, TokenLayout  # noqa: E402
from visattn.guidance import HeadSet, SoftPAG, guide, search_heads, steer  # noqa: E402
from visattn.inject import apply_plan, remove_plan, sparse, summary  # noqa: E402
from visattn.plan import Plan  # noqa: E402

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

"""visattn: sparse attention and attention-steering guidance for image and video diffusion
models."""

from visattn._compat import ensure_torchvision

ensure_torchvision()

from visattn import patterns  # noqa: E402
from visattn.attention import sparse_attention  # noqa: E402
from visattn.layout import Grid, Segment, TokenLayout  # noqa: E402

__all__ = ["Grid", "Segment", "TokenLayout", "patterns", "sparse_attention"]
__version__ = "0.1.0"

"""Makes a CPU build of torch work with the torchvision of PyPI.

That torchvision is built for CUDA. Its C++ library does not load without torch's CUDA libraries,
so the operators ``torchvision::nms`` and ``torchvision::qnms`` are never defined; torchvision
registers meta functions for both and fails with "operator torchvision::nms does not exist". timm
fails with it, and so does every pipeline whose text encoder transformers loads. Upstream:
pytorch/vision issues 9077 and 9085.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["ensure_torchvision"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# The operators exist as long as this object.
_library: torch.library.Library | None = None


def ensure_torchvision() -> None:
    """Define the two operators when torchvision is installed and cannot define them itself.

    Does not import torchvision, and does nothing if it is imported already. With the schemas,
    torchvision can be imported; only its C++ operators are unavailable. If its library does load,
    nothing is defined, because a second definition would abort the process.
    """
    global _library
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    if _loads_without_cuda(Path(spec.submodule_search_locations[0])):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        _library.define(name + _SCHEMA)


def _loads_without_cuda(package: Path) -> bool:
    """Whether torchvision's C++ library exists and does not need torch's CUDA library."""
    libraries = [p for p in package.glob("_C.*") if p.suffix in (".so", ".pyd")]
    return bool(libraries) and not any(b"torch_cuda" in p.read_bytes() for p in libraries)

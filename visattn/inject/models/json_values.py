"""Values of settings as JSON has them, the same in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """Numbers and texts as they are, containers and dataclasses by what they hold, and anything
    else by the name of its function or class alone."""
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(plain(own), sort_keys=True) for own in value)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return [type(value).__name__, plain(held)]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"

"""Modules that hold a denoiser, or a part of it, and run it: of torch.compile, of training over
several processes, and of PEFT."""

from __future__ import annotations

from typing import Any

import torch

from visattn.runtime.private_names import WRAPPER_STEPS, compiled_module

__all__ = ["bare", "unwrapped"]

TRAINING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})
PEFT = frozenset({"PeftModel", "PeftMixedModel"})


def unwrapped(model: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and what it wraps, the innermost last."""
    found = [model]
    while (inner := _inner(found[-1])) is not None:
        found.append(inner)
    return found


def bare(path: str) -> str:
    """The path of a module as it is where nothing is wrapped."""
    return ".".join(step for step in path.split(".") if step not in WRAPPER_STEPS)


def _inner(model: Any) -> torch.nn.Module | None:
    kinds = {kind.__name__ for kind in type(model).__mro__}
    inner = compiled_module(model)
    if kinds & TRAINING:
        inner = model.module
    elif kinds & PEFT:
        inner = getattr(model.base_model, "model", None)  # a prompt alone has none
    return inner if isinstance(inner, torch.nn.Module) else None

"""Modules that wrap a denoiser or a part of it: of torch.compile, of distributed training, and of
PEFT."""

from __future__ import annotations

from typing import Any

import torch

from visattn.runtime.private_names import WRAPPER_STEPS, compiled_module

__all__ = ["bare", "unwrapped"]

TRAINING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})
PEFT = frozenset({"PeftModel", "PeftMixedModel"})


def unwrapped(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a module and the modules that it wraps, the innermost last."""
    modules = [model]
    while (inner := _inner(modules[-1])) is not None:
        modules.append(inner)
    return modules


def bare(path: str) -> str:
    """Return the path of a module without the names of wrappers."""
    return ".".join(step for step in path.split(".") if step not in WRAPPER_STEPS)


def _inner(model: Any) -> torch.nn.Module | None:
    kinds = {kind.__name__ for kind in type(model).__mro__}
    inner = compiled_module(model)
    if kinds & TRAINING:
        inner = model.module
    elif kinds & PEFT:
        inner = getattr(model.base_model, "model", None)  # prompt tuning has none
    return inner if isinstance(inner, torch.nn.Module) else None

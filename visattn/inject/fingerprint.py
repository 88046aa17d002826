"""A hash of a pipeline's denoisers, by which results of other weights are told apart."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from visattn.inject.apply import models_of

__all__ = ["fingerprint"]

SAMPLED = 64  # elements of a parameter that are looked at


def fingerprint(pipe: Any) -> str:
    """A hash of the classes and of some elements of every parameter of the denoisers, 24
    hexadecimal digits."""
    found = hashlib.sha256()
    for role, model in sorted(models_of(pipe).items()):
        found.update(f"{role} {type(model).__name__}".encode())
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat))).long()
            some = flat[places.to(flat.device)].float().cpu()
            found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            found.update(some.numpy().tobytes())
    return found.hexdigest()[:24]

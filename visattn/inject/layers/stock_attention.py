"""The dense attention that an attention module of a pipeline runs without visattn."""

from __future__ import annotations

from typing import Any

import torch

from visattn.cost import TORCH, DenseAttention
from visattn.inject.layers.interception import original_backend
from visattn.runtime.private_names import active_attention_backend, has_attention_backend

__all__ = ["dense_attention"]


def dense_attention(module: Any) -> DenseAttention:
    """Return the attention backend of a module: its name, and a function that runs it unmasked.

    Args:
        module: an attention module of a denoiser, with or without a plan.
    """
    if not has_attention_backend(module.processor):  # it calls torch itself
        return TORCH
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend = original_backend(module.processor)
    if backend is None:  # then the process has an active one
        backend = active_attention_backend()
    if backend.value == TORCH.name:
        return TORCH

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        transposed = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        out = dispatch_attention_fn(*transposed, enable_gqa=grouped, backend=backend)
        return out.transpose(1, 2)

    return DenseAttention(backend.value, run)

"""The dense attention that an attention module of a pipeline runs without us."""

from __future__ import annotations

from typing import Any

import torch

from visattn.cost import TORCH, DenseAttention
from visattn.inject.layers.interception import own_backend
from visattn.runtime.private_names import active_attention_backend, has_attention_backend

__all__ = ["dense_attention"]


def dense_attention(module: Any) -> DenseAttention:
    """The attention backend of a module, by name, and a call of it without masks.

    Args:
        module: an attention module of a denoiser, with a plan or without.
    """
    if not has_attention_backend(module.processor):  # it calls torch itself
        return TORCH
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    own = own_backend(module.processor)
    if own is None:  # the one that is active in the process
        own = active_attention_backend()
    if own.value == TORCH.name:
        return TORCH

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        return dispatch_attention_fn(*turned, enable_gqa=grouped, backend=own).transpose(1, 2)

    return DenseAttention(own.value, run)

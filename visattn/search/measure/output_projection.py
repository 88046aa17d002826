"""What a head's output does to that of its layer: its columns of the output projection."""

from __future__ import annotations

from typing import Any

import torch

from visattn.runtime.torch_settings import plain_torch

__all__ = ["output_weights"]


def output_weights(module: Any, shared: Any = None) -> torch.Tensor:
    """The output projection of an attention module, float32 ``[out, H D]``: a linear layer, or one
    that adapters or quantisation stand in front of, which is asked for the images of the unit
    vectors.

    Args:
        shared: the linear layer that projects the outputs of a module without a projection of its
            own, and behind them those of others.

    Raises:
        ValueError: there is no output projection that is linear.
    """
    own = getattr(module, "to_out", None)
    if isinstance(own, torch.nn.Sequential | torch.nn.ModuleList):  # with dropout behind
        own = own[0]
    weights = _weights(module, shared if own is None else own)
    return weights[:, : getattr(module, "inner_dim", weights.shape[1])]  # others stand behind


@plain_torch()
def _weights(module: Any, layer: Any) -> torch.Tensor:
    if type(layer) is torch.nn.Linear:
        weight: torch.Tensor = layer.weight
        return weight.detach().float()
    if layer is None or not hasattr(layer, "in_features"):
        raise ValueError(f"{type(module).__name__} has no linear output projection to_out")
    own = next(layer.parameters())
    dtype = own.dtype if own.dtype.is_floating_point else torch.float32
    unit = torch.eye(layer.in_features, dtype=dtype, device=own.device)
    with torch.no_grad():
        found: torch.Tensor = layer(unit) - layer(torch.zeros_like(unit[:1]))
    return found.float().mT

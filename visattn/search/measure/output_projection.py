"""The output projection of an attention layer, by which a head's output reaches the layer's."""

from __future__ import annotations

from typing import Any

import torch

from visattn.runtime.torch_settings import plain_torch

__all__ = ["output_weights"]


def output_weights(module: Any, shared: Any = None) -> torch.Tensor:
    """Return the weights of the output projection of an attention module.

    A plain linear layer holds them. A layer with adapters or quantisation is run on the unit
    vectors.

    Args:
        module: the attention module.
        shared: the linear layer that projects the output of a module without its own projection.
            Its further inputs, after those of the module, come from other modules.

    Returns:
        The weights, float32 ``[out, H D]``.

    Raises:
        ValueError: there is no output projection that is linear.
    """
    projection = getattr(module, "to_out", None)
    if isinstance(projection, torch.nn.Sequential | torch.nn.ModuleList):  # dropout follows
        projection = projection[0]
    weights = _weights(module, shared if projection is None else projection)
    # the columns of other modules follow those of this one
    return weights[:, : getattr(module, "inner_dim", weights.shape[1])]


@plain_torch()
def _weights(module: Any, layer: Any) -> torch.Tensor:
    if type(layer) is torch.nn.Linear:
        weight: torch.Tensor = layer.weight
        return weight.detach().float()
    if layer is None or not hasattr(layer, "in_features"):
        raise ValueError(f"{type(module).__name__} has no linear output projection to_out")
    parameter = next(layer.parameters())
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    unit = torch.eye(layer.in_features, dtype=dtype, device=parameter.device)
    with torch.no_grad():
        images: torch.Tensor = layer(unit) - layer(torch.zeros_like(unit[:1]))
    return images.float().mT

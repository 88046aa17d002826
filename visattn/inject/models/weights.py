"""Values of the tensors of a model: on a device, quantized, sharded or offloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from visattn.inject.models.json_values import plain
from visattn.runtime.private_names import accelerate_hook, diffusers_hooks, is_offloaded_to_disk

__all__ = ["sample", "tensors_of"]

SAMPLED = 64  # number of elements of a tensor that are read
UNREADABLE = (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError)


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers by name. For an offloaded tensor, yield the stored value."""
    maps: dict[str, Mapping[str, torch.Tensor]] = {}
    files: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        hook: Any = accelerate_hook(module)
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "weights_map", None) is not None:
                maps[path] = part.weights_map
        offload = diffusers_hooks(module).get("group_offloading")
        files |= _files_of(getattr(offload, "group", None))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in files:
            yield name, _read(*files[id(tensor)])
        else:
            yield name, _stored_value(name, maps) if tensor.is_meta and maps else tensor


def _files_of(group: Any) -> dict[int, tuple[str, str]]:
    """Return file and key of the tensors of a group that diffusers keeps on disk. In memory they
    have no values."""
    if not is_offloaded_to_disk(group):
        return {}
    path = str(group.safetensors_file_path)
    return {id(tensor): (path, str(key)) for tensor, key in group.tensor_to_key.items()}


def _read(path: str, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


def _stored_value(name: str, maps: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Return the value of a tensor in the map of its module or of a parent module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        weights = maps.get(".".join(parts[:end]))
        try:
            if weights is not None:
                return weights[".".join(parts[end:])]
        except KeyError:
            continue
    return torch.empty(0, device="meta")


def sample(tensor: torch.Tensor) -> bytes | None:
    """Return kind, shape, dtype and some elements of a tensor; None if its values cannot be read.

    For a quantized or sharded tensor, its component tensors are read instead, because torch cannot
    always read elements of the whole.
    """
    kind = "Tensor" if type(tensor) is torch.nn.Parameter else type(tensor).__name__
    header = f"{kind} {tuple(tensor.shape)} {tensor.dtype}".encode()
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        inner = [sample(part) for part in parts if isinstance(part, torch.Tensor)]
        header += json.dumps(plain(settings), sort_keys=True).encode()
        return None if None in inner else b" ".join([header, *filter(None, inner)])
    if tensor.is_meta:
        return None
    untyped: Any = tensor
    with suppress(*UNREADABLE):
        return header + _elements(tensor)
    with suppress(*UNREADABLE):
        return header + _elements(untyped.dequantize())
    return None


@torch.no_grad()
def _elements(tensor: torch.Tensor) -> bytes:
    flat = tensor.flatten()
    count = min(SAMPLED, len(flat))
    indices = torch.arange(count, device="cpu") * (len(flat) - 1) // max(1, count - 1)
    sampled = flat[indices.to(flat.device)].cpu()
    values = torch.view_as_real(sampled) if sampled.is_complex() else sampled
    return values.double().numpy().tobytes()

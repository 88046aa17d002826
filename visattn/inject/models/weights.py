"""Values of a model's tensors, wherever they lie: on a device, quantized, sharded, or offloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from visattn.inject.models.json_values import plain
from visattn.runtime.private_names import accelerate_hook, diffusers_hooks, is_offloaded_to_disk

__all__ = ["sample", "tensors_of"]

SAMPLED = 64  # elements of a tensor that are looked at
UNREADABLE = (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError)


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name. Of one that offloading keeps elsewhere its kept value."""
    maps: dict[str, Mapping[str, torch.Tensor]] = {}
    files: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        hook: Any = accelerate_hook(module)  # of accelerate
        for own in getattr(hook, "hooks", (hook,)):
            if getattr(own, "weights_map", None) is not None:
                maps[path] = own.weights_map
        offload = diffusers_hooks(module).get("group_offloading")
        files |= _files_of(getattr(offload, "group", None))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in files:
            yield name, _read(*files[id(tensor)])
        else:
            yield name, _kept(name, maps) if tensor.is_meta and maps else tensor


def _files_of(group: Any) -> dict[int, tuple[str, str]]:
    """File and key of the tensors of a group that diffusers keeps on disk; in memory they then have
    no values."""
    if not is_offloaded_to_disk(group):
        return {}
    path = str(group.safetensors_file_path)
    return {id(tensor): (path, str(key)) for tensor, key in group.tensor_to_key.items()}


def _read(path: str, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: torch.Tensor = file.get_tensor(key)
    return found


def _kept(name: str, maps: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The value of a tensor in the map of the module that it belongs to, or of one around it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        own = maps.get(".".join(parts[:end]))
        try:
            if own is not None:
                return own[".".join(parts[end:])]
        except KeyError:
            continue
    return torch.empty(0, device="meta")


def sample(tensor: torch.Tensor) -> bytes | None:
    """Kind, shape, dtype and some elements of a tensor; None where its values cannot be read.

    Of a quantized or sharded tensor the tensors that it is made of are read: what they are is
    known to torch, and elements of the whole need not be.
    """
    kind = "Tensor" if type(tensor) is torch.nn.Parameter else type(tensor).__name__
    said = f"{kind} {tuple(tensor.shape)} {tensor.dtype}".encode()
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        inner = [sample(part) for part in parts if isinstance(part, torch.Tensor)]
        said += json.dumps(plain(settings), sort_keys=True).encode()
        return None if None in inner else b" ".join([said, *filter(None, inner)])
    if tensor.is_meta:
        return None
    own: Any = tensor
    with suppress(*UNREADABLE):
        return said + _elements(tensor)
    with suppress(*UNREADABLE):
        return said + _elements(own.dequantize())
    return None


@torch.no_grad()
def _elements(tensor: torch.Tensor) -> bytes:
    flat = tensor.flatten()
    count = min(SAMPLED, len(flat))
    places = torch.arange(count, device="cpu") * (len(flat) - 1) // max(1, count - 1)
    some = flat[places.to(flat.device)].cpu()
    values = torch.view_as_real(some) if some.is_complex() else some
    return values.double().numpy().tobytes()

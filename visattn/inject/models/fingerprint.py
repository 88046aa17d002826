"""A hash of everything in a pipeline that affects its results. It distinguishes the stored results
of different pipelines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.hooks.class_swap import kind_of
from visattn.inject.layers.interception import original_backend
from visattn.inject.models.denoisers import models_of
from visattn.inject.models.json_values import plain
from visattn.inject.models.weights import sample, tensors_of
from visattn.runtime.private_names import (
    accelerate_hook,
    active_attention_backend,
    cache_settings,
    compiled_call,
    compiled_module,
    diffusers_hooks,
    has_attention_backend,
)

__all__ = ["fingerprint"]

logger = logging.getLogger("visattn")

# Attributes of modules, other than tensors, that affect results: of adapters (PEFT), tiled
# decoding, image prompts and FreeU.
ADAPTERS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
PLAIN = ("scale", "b1", "b2", "s1", "s2")
PREFIXES = ("use_", "tile_")
# Hooks of diffusers that move weights; some come and go while a pipeline runs.
OFFLOADING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def fingerprint(pipe: Any) -> str:
    """Return a hash of a pipeline, 24 hexadecimal digits.

    It covers the class and settings of the pipeline; the class, settings and some elements of every
    tensor of each model; adapters with their scales, caches, attention backends, offloading and
    compilation; the scheduler and the tokenizers. It does not depend on the device, on earlier
    calls, or on a plan.
    """
    digest = hashlib.sha256()
    unread: list[str] = []

    def add(*values: object) -> None:
        digest.update(json.dumps([plain(value) for value in values], sort_keys=True).encode())

    add(kind_of(pipe).__name__, _settings(getattr(pipe, "config", None)), _attention())
    parts = models_of(pipe) if isinstance(pipe, torch.nn.Module) else _components(pipe)
    for name, part in sorted(parts.items()):
        add(name, kind_of(part).__name__, _settings(getattr(part, "config", None)))
        if isinstance(part, torch.nn.Module):
            model = compiled_module(part, part)
            add(type(model).__name__, model is part, model.training)
            for key, tensor in tensors_of(model):
                values = sample(tensor)
                if values is None:
                    unread.append(f"{name}.{key}")
                digest.update(key.encode() + (values or str(tuple(tensor.shape)).encode()))
            for path, module in model.named_modules():
                if state := _state(module):
                    add(path, state)
        else:
            add(getattr(part, "shift", None), _vocabulary(part))
    if unread:
        logger.warning(
            "visattn: %d tensors of the pipeline cannot be read, the first is %s: stored results "
            "cannot be distinguished from those of other weights in these tensors; use another "
            "folder for results when weights change",
            len(unread),
            unread[0],
        )
    return digest.hexdigest()[:24]


def _components(pipe: Any) -> dict[str, Any]:
    """Return the components of a pipeline by name."""
    names = [name for name in getattr(pipe, "config", ()) if not name.startswith("_")]
    parts = {name: vars(pipe).get(name) for name in names} | models_of(pipe)
    return {name: part for name, part in parts.items() if part is not None}


def _settings(config: Any) -> Any:
    """Return a configuration without paths, dtypes and versions."""
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(settings, Mapping):
        return None
    left_out = ("transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in settings.items() if not str(k).startswith("_") and k not in left_out}


def _state(module: torch.nn.Module) -> dict[str, Any]:
    """Return what affects results in a module, other than its tensors."""
    state: dict[str, Any] = {}
    if hasattr(module, "scaling") and hasattr(module, "active_adapters"):
        state |= {name: getattr(module, name, None) for name in ADAPTERS}
    state |= _numbers(module)
    processor = getattr(module, "processor", None)
    if processor is not None:
        state["processor"] = type(processor).__name__
        state |= {f"processor.{name}": value for name, value in _numbers(processor).items()}
        if has_attention_backend(processor):
            state["attention"] = original_backend(processor)
    if cache_settings(module) is not None:
        state["cache"] = cache_settings(module)
    hooks = diffusers_hooks(module)
    names = [name for name in hooks if name not in OFFLOADING]
    if names:
        state["hooks"] = names
    if "group_offloading" in hooks:
        state["offloaded"] = "by groups"
    offload = accelerate_hook(module, missing := object())
    if offload is not missing:
        state["offloaded"] = type(offload).__name__
    if compiled_call(module) is not None:
        state["compiled"] = True
    return state


def _numbers(instance: Any) -> dict[str, Any]:
    """Return the numbers of an object under the known names."""
    return {
        name: value
        for name, value in vars(instance).items()
        if (name in PLAIN or name.startswith(PREFIXES))
        and isinstance(value, (bool, int, float, list, tuple))
    }


def _attention() -> Any:
    """Return the attention backend of this process, for processors without one."""
    try:
        return active_attention_backend()
    except ImportError:
        return None


def _vocabulary(part: Any) -> Any:
    """Return the vocabulary and the settings of a tokenizer; None for another component."""
    if not hasattr(part, "get_vocab"):
        return None
    names = ("model_max_length", "padding_side", "truncation_side")
    return [sorted(part.get_vocab().items()), *(getattr(part, name, None) for name in names)]

"""Every private name of torch, diffusers, accelerate and cache-dit that the package uses.

Private names may change in any release. Each is used by one function of this module, and
``tests/runtime/test_private_names.py`` has a test for each. They were last checked with torch 2.13,
diffusers 0.42 and accelerate 1.15. After an update of a library, run those tests first.
diffusers is imported only inside the functions that need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch

__all__ = [
    "CHECKPOINTING",
    "WRAPPER_STEPS",
    "accelerate_hook",
    "active_attention_backend",
    "add_attention_backend",
    "attention_backend",
    "begin_index",
    "cache_dit_parallel",
    "cache_settings",
    "compiled_call",
    "compiled_module",
    "current_timestep",
    "diffusers_hooks",
    "execution_device",
    "flash_attention_cpu",
    "flash_attention_cuda",
    "float32_modules",
    "guidance_scale",
    "has_attention_backend",
    "has_cache_dit",
    "has_current_timestep",
    "is_batched",
    "is_offloaded_to_disk",
    "lora_roles",
    "mark_constant",
    "never_compile_alone",
    "parallel_attention_backends",
    "parallel_settings",
    "progress_bar_settings",
    "remove_attention_backend",
    "repeated_blocks",
    "second_guidance_scale",
    "set_attention_backend",
    "set_compiled_call",
    "set_progress_bar_settings",
    "sets_attention_backend",
    "step_index",
    "supports_parallel",
    "tensor_version",
    "uses_current_timestep",
]

# How module paths name the module inside a wrapper: torch.compile, FSDP and torch's
# checkpoint_wrapper. If a name changes, the attention layers of wrapped models are not recognized.
WRAPPER_STEPS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# The attribute of a diffusers model that holds its checkpointing function. If it is missing, a
# block that runs again in the backward pass raises RuntimeError.
CHECKPOINTING = "_gradient_checkpointing_func"


# ---- torch


def is_batched(x: torch.Tensor) -> bool:
    """Return whether ``torch.vmap`` batches a tensor (``torch._C._functorch.is_batchedtensor``).
    If the name is missing, every call of the operator raises AttributeError."""
    return bool(torch._C._functorch.is_batchedtensor(x))


def flash_attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of torch's CPU kernel and its LSE, natural logarithm, ``[B, H, Lq]``
    (``aten._scaled_dot_product_flash_attention_for_cpu``). If it is missing, dense attention
    with an LSE raises AttributeError on a CPU."""
    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, scale=factor
    )
    return results[0], results[1]


def flash_attention_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of torch's CUDA kernel and its LSE, natural logarithm, whose last axis
    may be longer than ``Lq`` (``aten._scaled_dot_product_flash_attention``). If it is missing,
    dense attention with an LSE raises AttributeError on a GPU."""
    results = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, False, False, scale=factor
    )
    return results[0], results[1]


def mark_constant(function: Callable[..., Any]) -> None:
    """Let ``torch.compile`` evaluate a function while tracing (``_dynamo_marked_constant``, set by
    ``torch.compiler.assume_constant_result``, which would import Dynamo and Triton). If torch
    ignores it, compiled calls of ``sparse_attention`` break the graph."""
    cast("Any", function)._dynamo_marked_constant = True


def never_compile_alone(function: Any) -> None:
    """Let ``torch.compile`` never start a graph in a function, as it does in the hooks of a
    compiled module (``torch._C._dynamo.eval_frame``). Inside a graph it is traced as usual. If
    the names are missing, there is one more graph."""
    from torch._C import _dynamo

    eval_frame = cast("Any", _dynamo.eval_frame)
    with contextlib.suppress(AttributeError):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)


def tensor_version(x: torch.Tensor) -> int:
    """Return a number that grows whenever the tensor is written to (``Tensor._version``). If it is
    missing, Flux raises AttributeError."""
    return x._version


def compiled_module(module: Any, default: Any = None) -> Any:
    """Return the module inside the result of ``torch.compile`` (``_orig_mod``), or ``default``. If
    the name changes, compiled denoisers are not recognized."""
    return getattr(module, "_orig_mod", default)


def compiled_call(module: torch.nn.Module) -> Any:
    """Return the compiled call of a module, set by ``Module.compile`` (``_compiled_call_impl``), or
    None. If the name changes, no module counts as compiled."""
    return vars(module).get("_compiled_call_impl")


def set_compiled_call(module: torch.nn.Module, call: Any) -> None:
    """Set the compiled call of a module; None runs it eagerly (``_compiled_call_impl``)."""
    cast("Any", module)._compiled_call_impl = call


# ---- pipelines, schedulers and models of diffusers


def execution_device(pipe: Any) -> Any:
    """Return the device that a pipeline runs on, also while its weights are offloaded
    (``_execution_device``), or None."""
    return getattr(pipe, "_execution_device", None)


def progress_bar_settings(pipe: Any) -> dict[str, Any] | None:
    """Return the settings of a pipeline's progress bar (``_progress_bar_config``), or None if none
    were set."""
    settings: dict[str, Any] | None = getattr(pipe, "_progress_bar_config", None)
    return settings


def set_progress_bar_settings(pipe: Any, settings: dict[str, Any] | None) -> None:
    """Replace all settings of a pipeline's progress bar (``_progress_bar_config``). The public
    ``set_progress_bar_config`` is given keyword arguments. If the name changes, the progress bar
    stays disabled."""
    pipe._progress_bar_config = {} if settings is None else settings


def lora_roles(pipe: Any, default: Collection[str]) -> Collection[str]:
    """Return the names of the components that take a LoRA (``_lora_loadable_modules``), or
    ``default``."""
    names: Collection[str] = getattr(pipe, "_lora_loadable_modules", default)
    return names


def repeated_blocks(model: Any) -> Any:
    """Return the class names of the blocks that ``compile_repeated_blocks`` compiles
    (``_repeated_blocks``), or None. Without them the whole model is compiled."""
    return getattr(model, "_repeated_blocks", None)


def float32_modules(model: Any) -> tuple[str, ...]:
    """Return the names of the modules whose weights stay float32 (``_keep_in_fp32_modules``). If it
    is missing, ``visattn bench`` raises AttributeError."""
    return tuple(model._keep_in_fp32_modules or ())


def current_timestep(pipe: Any) -> Any:
    """Return the timestep at which a pipeline is (``_current_timestep``), or None. If the name
    changes, the step is taken from the scheduler, where it is known."""
    return getattr(pipe, "_current_timestep", None)


def has_current_timestep(pipe: Any) -> bool:
    """Return whether a pipeline has ever said its timestep (``_current_timestep``)."""
    return hasattr(pipe, "_current_timestep")


def uses_current_timestep(names: Collection[str]) -> bool:
    """Return whether code with these names sets the timestep (``_current_timestep``)."""
    return "_current_timestep" in names


def guidance_scale(pipe: Any, default: Any = None) -> Any:
    """Return the guidance scale of the running call (``_guidance_scale``), or ``default``. If the
    name changes, the passes in a batch are not known."""
    return getattr(pipe, "_guidance_scale", default)


def second_guidance_scale(pipe: Any, default: Any = None) -> Any:
    """Return the guidance scale of ``transformer_2`` (``_guidance_scale_2``), or ``default``."""
    return getattr(pipe, "_guidance_scale_2", default)


def step_index(scheduler: Any, default: Any = None) -> Any:
    """Return the step at which a scheduler is, None before the first (``_step_index``);
    ``default`` if the scheduler does not count."""
    return getattr(scheduler, "_step_index", default)


def begin_index(scheduler: Any) -> Any:
    """Return the step at which a scheduler was told to begin (``_begin_index``), or None."""
    return getattr(scheduler, "_begin_index", None)


def cache_settings(model: Any) -> Any:
    """Return the settings of the cache that ``enable_cache`` put on a model (``_cache_config``), or
    None. If the name changes, a search judges cached outputs."""
    return getattr(model, "_cache_config", None)


def parallel_settings(part: Any) -> Any:
    """Return the settings of ``enable_parallelism`` on a model or an attention processor
    (``_parallel_config``), or None. If the name changes, split models are not refused."""
    return getattr(part, "_parallel_config", None)


def diffusers_hooks(module: Any) -> Mapping[str, Any]:
    """Return the hooks that diffusers put on a module, by name (``_diffusers_hook``). If the name
    changes, offloading by groups and caches are not recognized."""
    hooks: Mapping[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hooks


def is_offloaded_to_disk(group: Any) -> bool:
    """Return whether a group of offloaded modules is in a file (``_is_offloaded_to_disk``)."""
    return bool(getattr(group, "_is_offloaded_to_disk", False))


# ---- accelerate and cache-dit


def accelerate_hook(module: Any, default: Any = None) -> Any:
    """Return the hook that accelerate put on a module (``_hf_hook``), or ``default``. If the name
    changes, offloaded weights cannot be read."""
    return getattr(module, "_hf_hook", default)


def cache_dit_parallel(model: Any) -> Any:
    """Return the context parallelism of cache-dit on a model (``_cp_config``), or None."""
    return getattr(model, "_cp_config", None)


def has_cache_dit(part: Any) -> bool:
    """Return whether cache-dit caches a model or a class of pipelines (``_is_cached``)."""
    return bool(getattr(part, "_is_cached", False))


# ---- attention backends of diffusers


def has_attention_backend(processor: Any) -> bool:
    """Return whether an attention processor calls the attention of diffusers by a backend of its
    own (``_attention_backend``). If the name changes, the attention of torch is intercepted."""
    return hasattr(processor, "_attention_backend")


def sets_attention_backend(processor: Any) -> bool:
    """Return whether an attention processor itself, and not only its class, holds a backend
    (``_attention_backend``)."""
    return "_attention_backend" in vars(processor)


def attention_backend(processor: Any) -> Any:
    """Return the backend of an attention processor, None for the active one of the process
    (``_attention_backend``)."""
    return processor._attention_backend


def set_attention_backend(processor: Any, backend: Any) -> None:
    """Set the backend of an attention processor (``_attention_backend``)."""
    processor._attention_backend = backend


def remove_attention_backend(processor: Any) -> None:
    """Give an attention processor the backend of its class again (``_attention_backend``)."""
    del processor._attention_backend


def active_attention_backend() -> Any:
    """Return the backend of processors that have none of their own
    (``_AttentionBackendRegistry``)."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return cast("Any", _AttentionBackendRegistry).get_active_backend()[0]


def supports_parallel(backend: Any) -> bool:
    """Return whether a backend supports context parallelism; None is the active backend
    (``_AttentionBackendRegistry._is_context_parallel_available``)."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    registry: Any = _AttentionBackendRegistry
    return bool(registry._is_context_parallel_available(backend or active_attention_backend()))


def parallel_attention_backends() -> tuple[str, ...]:
    """Return the values of all backends that support context parallelism
    (``_AttentionBackendRegistry._supports_context_parallel``)."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    registry: Any = _AttentionBackendRegistry
    return tuple(sorted(registry._supports_context_parallel))


def add_attention_backend(value: str, call: Callable[..., torch.Tensor], parallel: bool) -> Any:
    """Add a member to diffusers' enumeration of attention backends and register its attention
    (``_AttentionBackendRegistry.register``, ``_value2member_map_``, ``_name_``, ``_value_``).

    Args:
        value: of the new member. It has no name in the class, and listing the class omits it.
        call: the attention; its parameters decide what diffusers passes on.
        parallel: whether it supports context parallelism.

    Returns:
        The member, which ``AttentionBackendName(value)`` finds.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member = str.__new__(AttentionBackendName, value)
    member._name_ = member._value_ = value
    AttentionBackendName._value2member_map_[value] = member
    registry: Any = _AttentionBackendRegistry
    registry.register(member, supports_context_parallel=parallel)(call)
    return member

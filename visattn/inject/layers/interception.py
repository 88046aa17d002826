"""Interception of the attention of a layer.

The attention module of the layer registers the layer as the running one. Processors that dispatch
have an attention backend of visattn. For processors that call torch's attention themselves, a mode
intercepts these calls while the module runs.

A front class of the module does this. ``torch.compile`` guards ``module.__class__``, so compiled
code notices when a plan is applied or removed; it would not notice hooks. What other libraries put
on the module (hooks, wrapped forwards, processors) is not changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn.inject.hooks.class_swap import FrontClass
from visattn.inject.layers.call import Call
from visattn.inject.layers.compiled_layer import AttentionLayer, layer_attention
from visattn.runtime.private_names import (
    active_attention_backend,
    add_attention_backend,
    attention_backend,
    parallel_attention_backends,
    remove_attention_backend,
    set_attention_backend,
    sets_attention_backend,
    supports_parallel,
)

__all__ = [
    "ATTRIBUTE",
    "Intercepted",
    "hook",
    "original_backend",
    "stock_attention",
    "unhook",
]

ATTRIBUTE = "_visattn_layer"


class _Running(threading.local):
    """The layer whose module runs in this thread, until its attention has been called."""

    layer: AttentionLayer | None = None


class _Traced:
    """The same for code that ``torch.compile`` traces, which cannot use thread locals. A graph that
    has both module and attention sets and reads this during tracing. If a graph break lies between
    them, one graph sets it and the next one reads it; two threads must not do this at once."""

    layer: AttentionLayer | None = None  # the layer whose module was traced
    shown: AttentionLayer | None = None  # the layer whose module runs, if its forward is compiled


_running, _traced = _Running(), _Traced()


class Intercepted(FrontClass):
    """Front class of an attention module that has a plan."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: AttentionLayer | None = self.__dict__.get(ATTRIBUTE)
        if layer is None:  # removed, but another library has added a class in front
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if layer.through_sdpa:
            with _TorchAttentionCalls(layer):
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        elif torch.compiler.is_compiling():
            _traced.layer = layer
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            _traced.layer = None
        else:
            _running.layer = _traced.shown = layer
            try:
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            finally:  # an error or a cache may end it before its attention is called
                _running.layer = _traced.shown = None
        if not torch.compiler.is_compiling():
            layer.look()
        return output


class _TorchAttentionCalls(TorchFunctionMode):
    """Intercepts the calls of ``scaled_dot_product_attention`` inside one call of a module. The
    first call belongs to the layer, and so do calls with the same numbers of queries and keys. A
    call of another length belongs to an adapter, such as one for image prompts."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer
        self.lengths: tuple[int, int] | None = None
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _sdpa(self, *args, **(kwargs or {}))


def _sdpa(
    calls: _TorchAttentionCalls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute a call of torch's attention, ``[B, H, L, D]``, inside the module of a layer."""
    layer, lengths = calls.layer, (query.shape[2], key.shape[2])
    if calls.lengths is None:
        calls.lengths = lengths
    elif lengths != calls.lengths:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    call = Call(attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_first=True)
    if torch.compiler.is_compiling():
        return layer_attention(layer, query, key, value, call)
    return layer.attend(query, key, value, call)


def _dispatched(
    original: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Attention backend, ``[B, L, H, D]``, for processors whose original backend is ``original``.
    The running module has registered its layer. A call without a layer comes from another module
    with the same processor; it runs the original backend."""
    call = Call(attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_first=False)
    if torch.compiler.is_compiling():
        layer = _traced.layer or _traced.shown
        if layer is not None:
            if not layer.cross:  # it may also attend to an image: the op distinguishes them
                _traced.layer = _traced.shown = None
            return layer_attention(layer, query, key, value, call, _parallel_config is not None)
    else:
        layer = _running.layer or _traced.layer
        if layer is not None and not layer.of_image(key, call):
            _running.layer = _traced.layer = _traced.shown = None
            return layer.attend(query, key, value, call, _parallel_config)
    stock = stock_attention(original, _parallel_config)
    return stock(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def stock_attention(backend: Any, parallel: Any) -> Callable[..., torch.Tensor]:
    """Return the attention of diffusers by a backend.

    Args:
        backend: the attention backend; None: the active one.
        parallel: the context parallelism of the processor; None: none.

    Raises:
        ValueError: the backend does not support context parallelism. diffusers checks this only
            when the backend or the parallelism is set. A call would attend to the tokens of this
            process alone.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if parallel is not None and not supports_parallel(backend):
        active = backend or active_attention_backend()
        members = map(type(active), parallel_attention_backends())
        known = sorted(one.value for one in members if not hasattr(one, "_visattn_own"))
        raise ValueError(
            f"Context parallelism is enabled but current attention backend '{active.value}' does "
            f"not support context parallelism. Please set a compatible attention backend: {known} "
            "using `model.set_attention_backend()`."
        )
    return functools.partial(dispatch_attention_fn, backend=backend, parallel_config=parallel)


@functools.cache
def _member(original: Any, on_instance: bool) -> Any:
    """Return the visattn backend in the enumeration of attention backends of diffusers, for
    processors with one original backend.

    It is registered once, with a value and no name, so users cannot choose it by name.

    Args:
        original: the backend of the processors without visattn.
        on_instance: whether it is set on the processor itself, not only on its class.
    """
    suffix = "" if on_instance else " of the class"
    value = f"visattn over {getattr(original, 'value', original)}{suffix}"
    call = functools.partial(_dispatched, original)
    member = add_attention_backend(value, call, supports_parallel(original))
    member._visattn_own = original, on_instance
    # a copy is the member itself; a pickle has the original backend
    vars(member)["__copy__"] = lambda: member
    vars(member)["__deepcopy__"] = lambda _: member
    plain = (type(None), ()) if original is None else (type(member), (original.value,))
    vars(member)["__reduce_ex__"] = lambda _: plain
    return member


def original_backend(processor: Any) -> Any:
    """Return the original attention backend of a processor."""
    backend = attention_backend(processor)
    return backend._visattn_own[0] if hasattr(backend, "_visattn_own") else backend


def hook(processor: Any) -> None:
    """Set the visattn backend on a processor that dispatches, instead of the original one."""
    backend = attention_backend(processor)
    if not hasattr(backend, "_visattn_own"):
        set_attention_backend(processor, _member(backend, sets_attention_backend(processor)))


def unhook(processor: Any) -> None:
    """Restore the original backend of a processor."""
    backend = attention_backend(processor) if sets_attention_backend(processor) else None
    if backend is None or not hasattr(backend, "_visattn_own"):
        return
    original, on_instance = backend._visattn_own
    if on_instance:
        set_attention_backend(processor, original)
    else:
        remove_attention_backend(processor)

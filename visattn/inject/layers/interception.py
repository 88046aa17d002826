"""How the attention of a layer is caught: its module announces itself, and then either the
attention backend of its processor is ours (processors that dispatch), or calls of torch's
attention are caught while the module runs (processors that call it themselves).

An attention module announces itself through a class of its own that goes in front of its class:
``module.__class__`` is what ``torch.compile`` guards, so that a plan that comes or goes is seen by
code that is compiled already, where hooks are not; and what others put on the module (hooks,
wrapped forwards, processors) stays as it is.
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
    "own_backend",
    "stock_attention",
    "unhook",
]

ATTRIBUTE = "_visattn_layer"


class _Running(threading.local):
    """The layer whose module runs in this thread, until its attention has been called."""

    layer: AttentionLayer | None = None


class _Traced:
    """The same for code that ``torch.compile`` traces, which knows no thread locals. One graph that
    holds module and attention sets and reads it while it is traced; where a graph ends between the
    two, it is set by one and read by the other, which two threads must not do at once."""

    layer: AttentionLayer | None = None  # whose module was traced
    shown: AttentionLayer | None = None  # whose module runs, with a forward that is compiled


_running, _traced = _Running(), _Traced()


class Intercepted(FrontClass):
    """Goes in front of the class of an attention module that has a plan."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: AttentionLayer | None = self.__dict__.get(ATTRIBUTE)
        if layer is None:  # taken off, under a class that somebody else put in front of ours
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
            finally:  # it may have ended, by an error or a cache, before its attention was called
                _running.layer = _traced.shown = None
        if not torch.compiler.is_compiling():
            layer.look()
        return output


class _TorchAttentionCalls(TorchFunctionMode):
    """Takes the calls of ``scaled_dot_product_attention`` inside one call of a module. The first is
    the layer's own, and so are others of as many queries and keys; a call of another length is what
    an adapter attends to beside, as an image."""

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
    """torch's attention, ``[B, H, L, D]``, of a layer."""
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
    own: Any,
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
    """The attention backend, ``[B, L, H, D]``, on a processor that has the backend ``own`` without
    us. Whose attention it is, the module has said; a call that nobody announced comes from a module
    that shares a processor with a layer."""
    call = Call(attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_first=False)
    if torch.compiler.is_compiling():
        layer = _traced.layer or _traced.shown
        if layer is not None:
            if not layer.cross:  # which may have an image's too: the op tells them apart
                _traced.layer = _traced.shown = None
            return layer_attention(layer, query, key, value, call, _parallel_config is not None)
    else:
        layer = _running.layer or _traced.layer
        if layer is not None and not layer.of_image(key, call):
            _running.layer = _traced.layer = _traced.shown = None
            return layer.attend(query, key, value, call, _parallel_config)
    stock = stock_attention(own, _parallel_config)
    return stock(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def stock_attention(own: Any, parallel: Any) -> Callable[..., torch.Tensor]:
    """The attention of diffusers by the backend ``own``, or by the active one where that is None.

    Raises:
        ValueError: it is under context parallelism, which the backend does not support. diffusers
            says so where either is set; at a call it would attend to the tokens of this process.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if parallel is not None and not supports_parallel(own):
        active = own or active_attention_backend()
        backends = map(type(active), parallel_attention_backends())
        known = sorted(one.value for one in backends if not hasattr(one, "_visattn_own"))
        raise ValueError(
            f"Context parallelism is enabled but current attention backend '{active.value}' does "
            f"not support context parallelism. Please set a compatible attention backend: {known} "
            "using `model.set_attention_backend()`."
        )
    return functools.partial(dispatch_attention_fn, backend=own, parallel_config=parallel)


@functools.cache
def _member(own: Any, stays: bool) -> Any:
    """Our member of diffusers' enumeration of attention backends for processors that have the
    backend ``own`` without us, made and registered once. It has a value and no name there: it is
    set on processors and is nothing to choose by name."""
    value = f"visattn over {getattr(own, 'value', own)}{'' if stays else ' of the class'}"
    call = functools.partial(_dispatched, own)
    member = add_attention_backend(value, call, supports_parallel(own))
    member._visattn_own = own, stays
    # a copy is the member itself; what is pickled is the backend without us
    vars(member)["__copy__"] = lambda: member
    vars(member)["__deepcopy__"] = lambda _: member
    plain = (type(None), ()) if own is None else (type(member), (own.value,))
    vars(member)["__reduce_ex__"] = lambda _: plain
    return member


def own_backend(processor: Any) -> Any:
    """The attention backend that a processor has without us."""
    backend = attention_backend(processor)
    return backend._visattn_own[0] if hasattr(backend, "_visattn_own") else backend


def hook(processor: Any) -> None:
    """Put our backend on a processor that dispatches, in place of its own."""
    backend = attention_backend(processor)
    if not hasattr(backend, "_visattn_own"):
        set_attention_backend(processor, _member(backend, sets_attention_backend(processor)))


def unhook(processor: Any) -> None:
    """Give a processor its own backend again."""
    backend = attention_backend(processor) if sets_attention_backend(processor) else None
    if backend is None or not hasattr(backend, "_visattn_own"):
        return
    own, stays = backend._visattn_own
    if stays:
        set_attention_backend(processor, own)
    else:
        remove_attention_backend(processor)

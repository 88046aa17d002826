"""The opaque op that ``torch.compile`` traces for a layer with a plan. The layer is passed as a
number in a 0-d CPU tensor, so all layers of a model share one graph. When the op runs, it looks up
what the layer computes at this step and for these tokens.

If the whole model is compiled, another op at its beginning records the call when the graph runs.
The sizes are passed as data too: a Python value that is read during tracing would become a guard,
and each resolution would need its own graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from visattn.geometry.layout import Tokens
from visattn.inject.hooks.call_state import CallInputs, CallState
from visattn.inject.layers.call import Call
from visattn.runtime.private_names import parallel_settings
from visattn.runtime.torch_settings import cast_for_attention

__all__ = [
    "AttentionLayer",
    "Begun",
    "PlannedDenoiser",
    "begin_call",
    "layer_attention",
    "register_attachment",
    "register_layer",
]

KINDS = ("grid", "text", "prefix")
# an op depends on the step and may read from the device, so no CUDA graph can replay it
UNSAFE = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count(1)
_LAYERS: weakref.WeakValueDictionary[int, AttentionLayer] = weakref.WeakValueDictionary()
_ATTACHMENTS: weakref.WeakValueDictionary[int, PlannedDenoiser] = weakref.WeakValueDictionary()
_NO_CALL = torch.empty(0, dtype=torch.int64, device="cpu")


class Begun:
    """The result of the op at the beginning of a call, for the layers in the same graph or in a
    later graph of the same call. It orders the ops and identifies the call: the slot of its thread,
    then the tokens as in ``packed``. It is empty if the beginning is not compiled."""

    def __init__(self) -> None:
        self.call = _NO_CALL

    def clear(self) -> None:
        """Record that the beginning of this call is not compiled."""
        self.call = _NO_CALL


class AttentionLayer(Protocol):
    """What the code that intercepts attention needs of a layer; ``Layer`` implements it.

    Attributes:
        number: number of the layer, int64, 0-d, on the CPU.
        begun: the beginning of the call of its denoiser.
        cross: whether it is cross-attention.
        through_sdpa: whether its processor calls torch's attention itself.
    """

    number: torch.Tensor
    begun: Begun
    cross: bool
    through_sdpa: bool

    @property
    def module(self) -> Any:
        """The attention module."""

    @property
    def slot(self) -> int:
        """The slot of the running thread or task."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        parallel: Any = None,
    ) -> torch.Tensor:
        """Compute a call of its attention."""

    def of_image(self, key: torch.Tensor, call: Call) -> bool:
        """Return whether a call is cross-attention to an image."""

    def look(self) -> None:
        """Log, after a call of the module, if its attention was not intercepted."""


class PlannedDenoiser(Protocol):
    """What a compiled graph needs of a denoiser with a plan; ``Attachment`` implements it.

    Attributes:
        number: number of the denoiser, int64, 0-d, on the CPU.
        begun: what the op at the beginning of a call returned.
    """

    number: torch.Tensor
    begun: Begun

    def begin(self, tokens: Tokens, inputs: CallInputs) -> CallState:
        """Begin a call of the denoiser in this thread or task."""


def register_layer(
    layer: AttentionLayer, number: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a new number for a layer, int64, 0-d, on the CPU.

    Args:
        layer: the layer.
        number: tensor that the number is written into; None: a new one.
    """
    return _register(_LAYERS, layer, number)


def register_attachment(
    denoiser: PlannedDenoiser, number: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a new number for a denoiser, as ``register_layer``."""
    return _register(_ATTACHMENTS, denoiser, number)


def _register(registry: Any, entry: object, number: torch.Tensor | None) -> torch.Tensor:
    new = next(_numbers)
    registry[new] = entry
    return torch.tensor(new, device="cpu") if number is None else number.fill_(new)


def packed(tokens: Tokens) -> list[int]:
    """Return tokens as numbers, four for each segment: the kind and up to three sizes."""
    out: list[int] = []
    for kind, *sizes in tokens:
        out += [KINDS.index(str(kind)), *(int_of(size) for size in sizes), *[0] * (3 - len(sizes))]
    return out


def int_of(size: int | str) -> int:
    """Return a size as an int; the declared type of a segment's items includes str."""
    assert not isinstance(size, str)
    return size


def unpacked(numbers: list[int]) -> Tokens:
    """Return the tokens of ``packed``."""
    out: list[tuple[str | int, ...]] = []
    for start in range(0, len(numbers), 4):
        kind = KINDS[numbers[start]]
        out.append((kind, *numbers[start + 1 : start + (4 if kind == "grid" else 2)]))
    return tuple(out)


@torch.library.custom_op("visattn::begin_call", mutates_args=(), tags=UNSAFE)
def begin_op(
    attachment: torch.Tensor,
    tokens: list[int],
    timestep: torch.Tensor | None,
    text: torch.Tensor | None,
    aside: bool,
) -> torch.Tensor:
    """``Attachment.begin`` by the number of the attachment; returns what ``Begun`` keeps."""
    denoiser = _ATTACHMENTS[int(attachment)]
    state = denoiser.begin(unpacked(tokens), (timestep, text, aside))
    return torch.tensor([state.slot, *tokens], device="cpu")


@begin_op.register_fake
def _(
    attachment: torch.Tensor,
    tokens: list[int],
    timestep: torch.Tensor | None,
    text: torch.Tensor | None,
    aside: bool,
) -> torch.Tensor:
    return torch.empty(1 + len(tokens), dtype=torch.int64, device="cpu")


def begin_call(denoiser: PlannedDenoiser, tokens: Tokens, inputs: CallInputs) -> None:
    """Begin a call inside a traced graph."""
    denoiser.begun.call = begin_op(denoiser.number, packed(tokens), *inputs)


@torch.library.custom_op("visattn::layer_attention", mutates_args=(), tags=UNSAFE)
def layer_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    layer: torch.Tensor,
    begun: torch.Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    heads_first: bool,
    parallel: bool,
) -> torch.Tensor:
    """``Layer.attend`` by the number of the layer; ``parallel``: whether its processor has context
    parallelism."""
    called = _LAYERS[int(layer)]
    call = Call(mask, dropout, causal, scale, grouped, heads_first)
    if begun.numel():
        slot, *numbers = begun.tolist()
        if slot == called.slot:  # otherwise another thread began that call of the model
            call = call._replace(tokens=unpacked(numbers))
    config = parallel_settings(called.module.processor) if parallel else None
    return called.attend(query, key, value, call, config).contiguous()


@layer_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    layer: torch.Tensor,
    begun: torch.Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    heads_first: bool,
    parallel: bool,
) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def layer_attention(
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    parallel: bool = False,
) -> torch.Tensor:
    """Compute attention inside a traced graph. The op has no gradient, so a call that needs one
    raises an error. This breaks the graph, or the tracing if ``fullgraph`` is set."""
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        raise NotImplementedError(
            "compiled attention with a plan has no gradient; train without torch.compile, or run "
            "under torch.no_grad()"
        )
    query, key, value = cast_for_attention(query, key, value)
    (mask,) = cast_for_attention(call.mask)
    out: torch.Tensor = layer_op(
        query,
        key,
        value,
        mask,
        layer.number,
        layer.begun.call,
        call.dropout,
        call.causal,
        call.scale,
        call.grouped,
        call.heads_first,
        parallel,
    )
    return out

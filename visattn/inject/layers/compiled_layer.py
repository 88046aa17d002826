"""What ``torch.compile`` sees of a layer with a plan: one opaque op. The layer travels as a number
in a 0-d CPU tensor, so that all layers of a model share one graph; what it runs at this step, and
at these tokens, is looked up when the op runs.

Where the whole model is compiled, another op at its beginning notes the call when the graph runs.
Its sizes are data there too: a Python value that is read while tracing would be a guard, and every
resolution another graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from visattn.geometry.layout import Tokens
from visattn.inject.hooks.call_state import CallState, Told
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
# what an op does depends on the step, and a choice may read back: no CUDA graph can replay it
UNSAFE = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count(1)
_LAYERS: weakref.WeakValueDictionary[int, AttentionLayer] = weakref.WeakValueDictionary()
_ATTACHMENTS: weakref.WeakValueDictionary[int, PlannedDenoiser] = weakref.WeakValueDictionary()
_NO_CALL = torch.empty(0, dtype=torch.int64, device="cpu")


class Begun:
    """What the op at the beginning of a call has given, for the layers that the same graph has, or
    a later one of the same call; empty where the beginning is not compiled. It orders the ops, and
    says which call it is of: the slot of its thread, and the tokens as ``packed`` has them."""

    def __init__(self) -> None:
        self.call = _NO_CALL

    def clear(self) -> None:
        """The beginning of this call is not compiled."""
        self.call = _NO_CALL


class AttentionLayer(Protocol):
    """A layer, as the code that intercepts its attention knows it; ``Layer`` is one.

    Attributes:
        number: of the layer, int64, 0-d, on the CPU.
        begun: of its denoiser.
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
        """Note, after a call of the module, whether its attention was intercepted."""


class PlannedDenoiser(Protocol):
    """A denoiser with a plan, as a compiled graph knows it; ``Attachment`` is one.

    Attributes:
        number: of the denoiser, int64, 0-d, on the CPU.
        begun: what the op at the beginning of a call returned.
    """

    number: torch.Tensor
    begun: Begun

    def begin(self, tokens: Tokens, told: Told) -> CallState:
        """Begin a call of the denoiser in this thread or task."""


def register_layer(
    layer: AttentionLayer, number: torch.Tensor | None = None
) -> torch.Tensor:
    """A number for a layer, int64, 0-d, on the CPU; written into ``number`` where one is given."""
    return _register(_LAYERS, layer, number)


def register_attachment(
    denoiser: PlannedDenoiser, number: torch.Tensor | None = None
) -> torch.Tensor:
    """The same for an attachment."""
    return _register(_ATTACHMENTS, denoiser, number)


def _register(known: Any, own: object, number: torch.Tensor | None) -> torch.Tensor:
    new = next(_numbers)
    known[new] = own
    return torch.tensor(new, device="cpu") if number is None else number.fill_(new)


def packed(tokens: Tokens) -> list[int]:
    """Tokens as numbers, four to a segment: the kind and up to three sizes."""
    out: list[int] = []
    for kind, *sizes in tokens:
        out += [KINDS.index(str(kind)), *(int_of(size) for size in sizes), *[0] * (3 - len(sizes))]
    return out


def int_of(size: int | str) -> int:
    """A size is a number; the type of a segment's items is wider than that."""
    assert not isinstance(size, str)
    return size


def unpacked(numbers: list[int]) -> Tokens:
    """The tokens of ``packed``."""
    out: list[tuple[str | int, ...]] = []
    for at in range(0, len(numbers), 4):
        kind = KINDS[numbers[at]]
        out.append((kind, *numbers[at + 1 : at + (4 if kind == "grid" else 2)]))
    return tuple(out)


@torch.library.custom_op("visattn::begin_call", mutates_args=(), tags=UNSAFE)
def begin_op(
    attachment: torch.Tensor,
    tokens: list[int],
    timestep: torch.Tensor | None,
    text: torch.Tensor | None,
    aside: bool,
) -> torch.Tensor:
    """``Attachment.begin`` by the number of the attachment; gives what ``Begun`` keeps."""
    own = _ATTACHMENTS[int(attachment)]
    state = own.begin(unpacked(tokens), (timestep, text, aside))
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


def begin_call(denoiser: PlannedDenoiser, tokens: Tokens, told: Told) -> None:
    """The beginning of a call as it is traced."""
    denoiser.begun.call = begin_op(denoiser.number, packed(tokens), *told)


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
    """``Layer.attend`` by the number of the layer; ``parallel``: under the context parallelism of
    its processor."""
    called = _LAYERS[int(layer)]
    call = Call(mask, dropout, causal, scale, grouped, heads_first)
    if begun.numel():
        slot, *numbers = begun.tolist()
        if slot == called.slot:  # otherwise another thread began it, with the same model
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
    """The call as it is traced. The op has no gradient: a call that wants one is refused, which
    ends the graph there, or the tracing where one graph is asked for."""
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

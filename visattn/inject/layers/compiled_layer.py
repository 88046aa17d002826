"""What ``torch.compile`` sees of a layer with a plan: one opaque op. The layer travels as a number
in a 0-d CPU tensor, so that all layers of a model share one graph; what it runs at this step, and
at these tokens, is looked up when the op runs.

Where the whole model is compiled, another op at its beginning notes the call when the graph runs.
Its sizes are data there too: a Python value that is read while tracing would be a guard, and every
resolution another graph.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from visattn.geometry.layout import Tokens
from visattn.runtime.torch_settings import cast_for_attention

if TYPE_CHECKING:
    from visattn.inject.attachment import Attachment
    from visattn.inject.hooks.call_state import Told
    from visattn.inject.layers.layer import Layer

__all__ = [
    "Begun",
    "Call",
    "begin_call",
    "layer_attention",
    "not_a_graph",
    "register_attachment",
    "register_layer",
]

KINDS = ("grid", "text", "prefix")
# what an op does depends on the step, and a choice may read back: no CUDA graph can replay it
UNSAFE = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count(1)
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_ATTACHMENTS: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
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


class Call(NamedTuple):
    """The arguments of an attention call besides its tensors; ``heads_first``: they are
    ``[B, H, L, D]``, and not ``[B, L, H, D]``."""

    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool
    heads_first: bool

    def parts(self, count: int) -> list[Call]:
        """Of equal parts of the batch."""
        if self.mask is None or self.mask.shape[0] == 1:
            return [self] * count
        return [self._replace(mask=mask) for mask in self.mask.chunk(count)]


def register_layer(layer: Layer, number: torch.Tensor | None = None) -> torch.Tensor:
    """A number for a layer, int64, 0-d, on the CPU; written into ``number`` where one is given."""
    return _register(_LAYERS, layer, number)


def register_attachment(
    attachment: Attachment, number: torch.Tensor | None = None
) -> torch.Tensor:
    """The same for an attachment."""
    return _register(_ATTACHMENTS, attachment, number)


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


def not_a_graph(function: Any) -> None:
    """Let ``torch.compile`` never make a graph of its own of a function and what it calls, which it
    does of the hooks of a compiled module. Inside a compiled function it is traced as any other.
    These names of torch are private: without them there is a graph more."""
    from torch._C import _dynamo

    code, known = function.__code__, cast("Any", _dynamo.eval_frame)
    with contextlib.suppress(AttributeError):
        skip = known._FrameAction.SKIP
        known.set_code_exec_strategy(code, known._FrameExecStrategy(skip, skip))


def begin_call(attachment: Attachment, tokens: Tokens, told: Told) -> None:
    """The beginning of a call as it is traced."""
    attachment.begun.call = begin_op(attachment.number, packed(tokens), *told)


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
    own = _LAYERS[int(layer)]
    if begun.numel():
        slot, *tokens = begun.tolist()
        state = own.attachment.call
        if slot == state.slot:  # else it is of another thread, which has the same model
            state.tokens = unpacked(tokens)
    call = Call(mask, dropout, causal, scale, grouped, heads_first)
    config = own.module.processor._parallel_config if parallel else None
    return own.attend(query, key, value, call, config).contiguous()


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
    layer: Layer,
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

"""What goes on a denoiser that has a plan, besides its hook. Its class stays what it is: diffusers
looks for it where another pipeline is made of its parts.

Everything here refers to the denoiser weakly, and to the copy of the denoiser in a copy.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from visattn.inject.hooks.call_state import CallState, States
from visattn.inject.hooks.class_swap import copied, pickled
from visattn.inject.hooks.run_state import Context
from visattn.runtime.private_names import CHECKPOINTING

__all__ = ["follow_checkpointing", "put_methods", "take_methods"]


class Attached(Protocol):
    """A plan on a denoiser, as the methods of the denoiser know it; ``Attachment`` is one.

    Attributes:
        context: what the pipeline says of the running call.
        states: the states of the running calls.
        handles: of the hooks of the denoiser.
    """

    context: Context | None
    states: States
    handles: list[torch.utils.hooks.RemovableHandle]

    @property
    def work(self) -> tuple[object, ...]:
        """What decides how a call is computed, besides the call itself."""

    def held(self, batch: int) -> CallState:
        """Return the state of the running call, for a part of the call that runs again later."""

    def tell(self, text: str) -> None:
        """Log a line once."""

    def watch(self) -> None:
        """Intercept processors and attention backends that were replaced."""


class _Method:
    """A function as a method of one denoiser."""

    def __init__(self, model: Any, function: Callable[..., Any]) -> None:
        self.model, self.function = weakref.ref(model), function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(memo.get(id(self.model()), self.model()), self.function)

    def __reduce__(self) -> Any:
        return functools.partial, (self.function,)


class _Checkpointing(_Method):
    """What a denoiser, or a module that wraps one of its blocks, calls blocks by, to run them again
    in the backward."""

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        own: Attached | None = model.__dict__.get("_visattn")
        if own is None or torch.compiler.is_compiling():
            return self.function(block, *args, **kwargs)
        given = (*args, *kwargs.values())
        return self.function(_Again(model, own, block, given), *args, **kwargs)


class _Again:
    """A block that runs in a call of its denoiser, and again in the backward of that call: as part
    of the same call, whatever calls the denoiser has had since."""

    def __init__(
        self, model: Any, own: Attached, block: Callable[..., Any], given: tuple[Any, ...]
    ) -> None:
        samples = next((len(x) for x in given if isinstance(x, torch.Tensor)), 1)
        self.model, self.block = model, block
        self.work, self.state = own.work, own.held(samples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own: Attached | None = self.model.__dict__.get("_visattn")
        if own is None or own.work != self.work:
            raise RuntimeError(
                "gradient checkpointing runs a block again with another plan, or other edits, than "
                "in its forward; call backward before the plan is taken off or changed"
            )
        with own.states.resumed(self.state):
            return self.block(*args, **kwargs)


def put_methods(model: Any) -> None:
    """Put the methods of a denoiser with a plan on it."""
    methods: dict[str, Callable[..., Any]] = {"__reduce_ex__": _reduce, "__deepcopy__": _deepcopy}
    if hasattr(type(model), "cache_context"):
        methods["cache_context"] = _cache_context
    model.__dict__.update({name: _Method(model, own) for name, own in methods.items()})


def take_methods(model: Any) -> None:
    """Take them off."""
    for module in model.modules():
        for name, own in [*module.__dict__.items()]:
            if isinstance(own, _Checkpointing):
                module.__dict__[name] = own.function
            elif isinstance(own, _Method):
                del module.__dict__[name]


def follow_checkpointing(model: Any) -> None:
    """Let blocks that gradient checkpointing runs again be part of their own call: that of
    diffusers, and that of modules that torch puts around blocks, as FSDP does."""
    _follow(model, model, CHECKPOINTING)
    for module in model.modules() if torch.is_grad_enabled() else ():
        if type(module).__name__ == "CheckpointWrapper":  # of torch.distributed
            _follow(model, module, "checkpoint_fn")


def _follow(model: Any, module: Any, name: str) -> None:
    own = module.__dict__.get(name)
    if own is not None and not isinstance(own, _Checkpointing):
        module.__dict__[name] = _Checkpointing(model, own)


@contextmanager
def _cache_context(model: Any, name: str, **details: Any) -> Iterator[None]:
    """``cache_context`` of a denoiser, by which a pipeline says where it is, listened to."""
    attachment: Attached = model._visattn
    before = attachment.context
    attachment.context = Context(
        name, details.get("step_index"), details.get("num_inference_steps")
    )
    attachment.watch()
    try:
        with type(model).cache_context(model, name, **details):
            yield
    finally:
        attachment.context = before


def _reduce(model: Any, protocol: Any) -> Any:
    """What is pickled of a denoiser: the same without a plan, and nothing of ours."""
    own: Attached = model._visattn
    own.tell("what is pickled is without the plan; apply it again to what is read")
    make, arguments, state, *rest = pickled(model, protocol)
    stock = dict(state)
    for name, value in model.__dict__.items():
        if isinstance(value, _Checkpointing):
            stock[name] = value.function
        elif isinstance(value, _Method):
            del stock[name]
    ours = {handle.id for handle in own.handles}
    for name, hooks in [*stock.items()]:
        if name.startswith("_forward_") and isinstance(hooks, dict):  # by number
            kept = {number: hook for number, hook in hooks.items() if number not in ours}
            stock[name] = type(hooks)(kept)
    return (make, arguments, stock, *rest)


def _deepcopy(model: Any, memo: dict[int, Any]) -> Any:
    """A copy, which has a plan of its own."""
    of_class = getattr(type(model), "__deepcopy__", None)
    if of_class is not None:
        return of_class(model, memo)
    return copied(model, object.__reduce_ex__(model, 4), memo)

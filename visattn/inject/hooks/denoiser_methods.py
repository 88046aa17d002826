"""Methods that are set on a denoiser with a plan. Its class does not change, because diffusers
compares it when another pipeline is built from the same components.

Everything here has weak references to the denoiser; those of a copy refer to the copied denoiser.
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
        context: what the pipeline passed to ``cache_context`` for the running call.
        states: the states of the running calls.
        handles: handles of the hooks of the denoiser.
    """

    context: Context | None
    states: States
    handles: list[torch.utils.hooks.RemovableHandle]

    @property
    def work(self) -> tuple[object, ...]:
        """The settings, other than the call itself, that decide how a call is computed."""

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
    """The function by which a denoiser, or a module that wraps one of its blocks, calls blocks that
    run again in the backward (gradient checkpointing)."""

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        attachment: Attached | None = model.__dict__.get("_visattn")
        if attachment is None or torch.compiler.is_compiling():
            return self.function(block, *args, **kwargs)
        inputs = (*args, *kwargs.values())
        return self.function(_RepeatedBlock(model, attachment, block, inputs), *args, **kwargs)


class _RepeatedBlock:
    """A block that runs in a call of its denoiser and again in the backward of that call. The
    second run belongs to the same call, even if the denoiser was called again in between."""

    def __init__(
        self,
        model: Any,
        attachment: Attached,
        block: Callable[..., Any],
        inputs: tuple[Any, ...],
    ) -> None:
        samples = next((len(x) for x in inputs if isinstance(x, torch.Tensor)), 1)
        self.model, self.block = model, block
        self.work, self.state = attachment.work, attachment.held(samples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment: Attached | None = self.model.__dict__.get("_visattn")
        if attachment is None or attachment.work != self.work:
            raise RuntimeError(
                "gradient checkpointing runs a block again with another plan, or other edits, than "
                "in its forward; call backward before the plan is removed or changed"
            )
        with attachment.states.resumed(self.state):
            return self.block(*args, **kwargs)


def put_methods(model: Any) -> None:
    """Set the methods of a denoiser with a plan."""
    methods: dict[str, Callable[..., Any]] = {"__reduce_ex__": _reduce, "__deepcopy__": _deepcopy}
    if hasattr(type(model), "cache_context"):
        methods["cache_context"] = _cache_context
    model.__dict__.update({name: _Method(model, method) for name, method in methods.items()})


def take_methods(model: Any) -> None:
    """Remove them."""
    for module in model.modules():
        for name, value in [*module.__dict__.items()]:
            if isinstance(value, _Checkpointing):
                module.__dict__[name] = value.function
            elif isinstance(value, _Method):
                del module.__dict__[name]


def follow_checkpointing(model: Any) -> None:
    """Make blocks that gradient checkpointing runs again belong to their original call. This covers
    the checkpointing of diffusers and the wrappers of torch around blocks, as FSDP has them."""
    _follow(model, model, CHECKPOINTING)
    for module in model.modules() if torch.is_grad_enabled() else ():
        if type(module).__name__ == "CheckpointWrapper":  # of torch.distributed
            _follow(model, module, "checkpoint_fn")


def _follow(model: Any, module: Any, name: str) -> None:
    function = module.__dict__.get(name)
    if function is not None and not isinstance(function, _Checkpointing):
        module.__dict__[name] = _Checkpointing(model, function)


@contextmanager
def _cache_context(model: Any, name: str, **details: Any) -> Iterator[None]:
    """``cache_context`` of a denoiser, which also records the pass and the step that the pipeline
    gives."""
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
    """Reduce a denoiser for a pickle, without its plan and without attributes of visattn."""
    attachment: Attached = model._visattn
    attachment.tell("the pickle has no plan; apply the plan again after loading")
    make, arguments, state, *rest = pickled(model, protocol)
    stock = dict(state)
    for name, value in model.__dict__.items():
        if isinstance(value, _Checkpointing):
            stock[name] = value.function
        elif isinstance(value, _Method):
            del stock[name]
    hook_ids = {handle.id for handle in attachment.handles}
    for name, hooks in [*stock.items()]:
        if name.startswith("_forward_") and isinstance(hooks, dict):  # by number
            kept = {number: hook for number, hook in hooks.items() if number not in hook_ids}
            stock[name] = type(hooks)(kept)
    return (make, arguments, stock, *rest)


def _deepcopy(model: Any, memo: dict[int, Any]) -> Any:
    """Return a copy, which has its own plan."""
    of_class = getattr(type(model), "__deepcopy__", None)
    if of_class is not None:
        return of_class(model, memo)
    return copied(model, object.__reduce_ex__(model, 4), memo)

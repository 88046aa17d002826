"""Front classes: subclasses that replace the class of a module or pipeline to intercept its calls.

``torch.compile`` guards ``object.__class__``, so compiled code notices the change. What hooks,
offloading and caches put on an object is not changed.
"""

from __future__ import annotations

import copy
import copyreg
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "FrontClass",
    "Handler",
    "Next",
    "add_class",
    "add_handler",
    "copied",
    "handlers_of",
    "kind_of",
    "pickled",
    "remove_class",
    "remove_handler",
]

PREFIX = "_visattn"  # prefix of all attributes that visattn sets
ATTRIBUTE = "_visattn_front"
Next = Callable[..., Any]  # the call without the handler
Handler = Callable[[Any, Next, tuple[Any, ...], dict[str, Any]], Any]
_classes: dict[tuple[type, type], type] = {}
_made: dict[type, tuple[type, type]] = {}  # generated class: (front class, original class)


class FrontClass:
    """Base of all front classes. A copy of an object keeps them. A pickle has the object without
    them, because a reader can import only the original class by its name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pickled(self, protocol)

    def __copy__(self) -> Any:
        return copied(self, super().__reduce_ex__(4), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        method = getattr(super(), "__deepcopy__", None)
        return copied(self, super().__reduce_ex__(4), memo) if method is None else method(memo)


def pickled(instance: Any, protocol: Any) -> tuple[Any, ...]:
    """Reduce an object for a pickle, without the classes and attributes of visattn."""
    reduced: Any = object.__reduce_ex__(instance, max(2, int(protocol)))
    make, arguments, state, *rest = reduced
    kind = kind_of(instance)
    present = type(instance)
    arguments = tuple(kind if argument is present else argument for argument in arguments)
    registry: Any = copyreg
    if make is registry.__newobj__:  # it accepts only the present class of the object
        make, arguments = registry._reconstructor, (kind, object, None)
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
    return (make, arguments, state, *rest)


def copied(instance: Any, reduced: Any, memo: dict[int, Any] | None) -> Any:
    """Return a copy of an object, as ``copy`` makes it.

    Args:
        instance: the object.
        reduced: the result of its ``__reduce_ex__``.
        memo: of ``copy.deepcopy``; None: a shallow copy.
    """
    make, arguments, state = reduced[:3]
    new = make(*arguments)
    if memo is not None:
        memo[id(instance)] = new
        state = copy.deepcopy(state, memo)
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
    else:
        new.__dict__.update(state)
    return new


def front_class(front: type, kind: type) -> type:
    """Return a class that derives from ``front`` and ``kind`` and has the name of ``kind``. It is
    generated once."""
    if (front, kind) not in _classes:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        new = _classes[front, kind] = type(kind.__name__, (front, kind), names)
        _made[new] = front, kind
    return _classes[front, kind]


def add_class(instance: Any, front: type) -> None:
    """Add a front class to an object, unless it has it."""
    if not isinstance(instance, front):
        object.__setattr__(instance, "__class__", front_class(front, type(instance)))


def remove_class(instance: Any, front: type) -> None:
    """Remove a front class from an object, also if it has other front classes of visattn. If
    another library has added a class in front of it, it stays and has no effect."""
    fronts, kind = [], type(instance)
    while kind in _made:
        added, kind = _made[kind]
        fronts.append(added)
    if front in fronts:
        fronts.remove(front)
        for kept in reversed(fronts):
            kind = front_class(kept, kind)
        object.__setattr__(instance, "__class__", kind)


class CallHandlers(FrontClass):
    """Passes calls to the handlers of the object, the newest first. Code that ``torch.compile``
    traces does not call them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Next = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        for handler in self.__dict__.get(ATTRIBUTE, ()):
            inner = _bound(handler, self, inner)
        return inner(*args, **kwargs)


    @property
    def components(self) -> Any:
        """The components of a pipeline. ``from_pipe`` would omit a denoiser with a front class, so
        it gets an error."""
        components: Any = super().components  # type: ignore[misc]
        reader = sys._getframe(1).f_code.co_name
        parts = components.values() if reader == "from_pipe" else ()
        if any(isinstance(part, CallHandlers) for part in parts):
            raise ValueError(
                "from_pipe cannot take over a denoiser that is inside guide, as diffusers compares "
                "its class; call from_pipe before guide, or after it"
            )
        return components


def _bound(handler: Handler, instance: Any, inner: Next) -> Next:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(instance, inner, args, kwargs)

    return call


def add_handler(instance: Any, handler: Handler) -> None:
    """Add a handler of the calls of an object. It runs before the present handlers, except those
    with the attribute ``outermost``."""
    add_class(instance, CallHandlers)
    handlers = (*instance.__dict__.get(ATTRIBUTE, ()), handler)
    instance.__dict__[ATTRIBUTE] = tuple(sorted(handlers, key=_is_outermost))


def _is_outermost(handler: Handler) -> bool:
    return getattr(handler, "outermost", False)


def kind_of(instance: Any) -> type:
    """Return the class of an object without front classes."""
    return next(kind for kind in type(instance).__mro__ if FrontClass not in kind.__mro__)


def handlers_of(instance: Any) -> tuple[Handler, ...]:
    """Return the handlers of an object, the oldest first."""
    handlers: tuple[Handler, ...] = instance.__dict__.get(ATTRIBUTE, ())
    return handlers


def remove_handler(instance: Any, handler: Handler) -> None:
    """Remove a handler. After the last one the object has its original class again."""
    others = tuple(one for one in instance.__dict__.get(ATTRIBUTE, ()) if one is not handler)
    if others:
        instance.__dict__[ATTRIBUTE] = others
        return
    instance.__dict__.pop(ATTRIBUTE, None)
    remove_class(instance, CallHandlers)

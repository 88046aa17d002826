"""Classes that go in front of the class of a module or pipeline, so that a call of it passes by us.

``object.__class__`` is what ``torch.compile`` guards, and what hooks, offloading and caches put on
an object stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Handler", "Next", "front_class", "handlers_of", "kind_of", "put_front", "take_front"]

ATTRIBUTE = "_visattn_front"
Next = Callable[..., Any]  # the call as it would be without the handler
Handler = Callable[[Any, Next, tuple[Any, ...], dict[str, Any]], Any]
_classes: dict[tuple[type, type], type] = {}


def front_class(front: type, kind: type) -> type:
    """``kind`` behind ``front``, under the same name; always the same class."""
    if (front, kind) not in _classes:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _classes[front, kind] = type(kind.__name__, (front, kind), names)
    return _classes[front, kind]


class Front:
    """Hands calls to the handlers of the object, the newest first. Code that ``torch.compile``
    traces goes by them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Next = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        for handler in self.__dict__.get(ATTRIBUTE, ()):
            inner = _bound(handler, self, inner)
        return inner(*args, **kwargs)


def _bound(handler: Handler, own: Any, inner: Next) -> Next:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(own, inner, args, kwargs)

    return call


def put_front(own: Any, handler: Handler) -> None:
    """Let calls of an object go through a handler, which goes before those that are there."""
    kind = type(own)
    if not issubclass(kind, Front):
        object.__setattr__(own, "__class__", front_class(Front, kind))
    own.__dict__[ATTRIBUTE] = (*own.__dict__.get(ATTRIBUTE, ()), handler)


def kind_of(own: Any) -> type:
    """The class of an object that may have handlers, without ours in front of it."""
    return next(kind for kind in type(own).__mro__ if Front not in kind.__mro__)


def handlers_of(own: Any) -> tuple[Handler, ...]:
    """The handlers of an object, the oldest first."""
    found: tuple[Handler, ...] = own.__dict__.get(ATTRIBUTE, ())
    return found


def take_front(own: Any, handler: Handler) -> None:
    """Take a handler off; with the last one the object has its own class again."""
    left = tuple(one for one in own.__dict__.get(ATTRIBUTE, ()) if one is not handler)
    if left:
        own.__dict__[ATTRIBUTE] = left
        return
    own.__dict__.pop(ATTRIBUTE, None)
    kind = type(own)
    if kind.__mro__[1] is Front:  # else somebody has put a class in front of ours, which then idles
        object.__setattr__(own, "__class__", kind.__mro__[2])

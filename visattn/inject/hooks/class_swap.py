"""Classes that go in front of the class of a module or pipeline, so that a call of it passes by us.

``object.__class__`` is what ``torch.compile`` guards, and what hooks, offloading and caches put on
an object stays as it is.
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

OWN = "_visattn"  # what the names of all our attributes begin with
ATTRIBUTE = "_visattn_front"
Next = Callable[..., Any]  # the call as it would be without the handler
Handler = Callable[[Any, Next, tuple[Any, ...], dict[str, Any]], Any]
_classes: dict[tuple[type, type], type] = {}
_made: dict[type, tuple[type, type]] = {}  # the classes that were made, and of what


class FrontClass:
    """What all classes share that go in front of others. A copy of an object has them too, with all
    that they do; what is pickled is the object without them, as its own class alone can be found
    by its name where it is read."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pickled(self, protocol)

    def __copy__(self) -> Any:
        return copied(self, super().__reduce_ex__(4), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = getattr(super(), "__deepcopy__", None)
        return copied(self, super().__reduce_ex__(4), memo) if own is None else own(memo)


def pickled(own: Any, protocol: Any) -> tuple[Any, ...]:
    """What an object is reduced to for a pickle, without what is ours."""
    reduced: Any = object.__reduce_ex__(own, max(2, int(protocol)))
    make, arguments, state, *rest = reduced
    kind = kind_of(own)
    arguments = tuple(kind if one is type(own) else one for one in arguments)
    registry: Any = copyreg
    if make is registry.__newobj__:  # which is for the object's present class alone
        make, arguments = registry._reconstructor, (kind, object, None)
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if not key.startswith(OWN)}
    return (make, arguments, state, *rest)


def copied(own: Any, reduced: Any, memo: dict[int, Any] | None) -> Any:
    """The copy of an object by what it is reduced to, which ``copy`` would ask the object for."""
    make, arguments, state = reduced[:3]
    new = make(*arguments)
    if memo is not None:
        memo[id(own)] = new
        state = copy.deepcopy(state, memo)
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
    else:
        new.__dict__.update(state)
    return new


def front_class(front: type, kind: type) -> type:
    """``kind`` behind ``front``, under the same name; always the same class."""
    if (front, kind) not in _classes:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        new = _classes[front, kind] = type(kind.__name__, (front, kind), names)
        _made[new] = front, kind
    return _classes[front, kind]


def add_class(own: Any, front: type) -> None:
    """Put a class in front of that of an object, if it is not there."""
    if not isinstance(own, front):
        object.__setattr__(own, "__class__", front_class(front, type(own)))


def remove_class(own: Any, front: type) -> None:
    """Take it away again, also from behind others of ours. Behind a class that somebody else has
    put in front it stays, and idles."""
    fronts, kind = [], type(own)
    while kind in _made:
        one, kind = _made[kind]
        fronts.append(one)
    if front in fronts:
        fronts.remove(front)
        for one in reversed(fronts):
            kind = front_class(one, kind)
        object.__setattr__(own, "__class__", kind)


class CallHandlers(FrontClass):
    """Hands calls to the handlers of the object, the newest first. Code that ``torch.compile``
    traces goes by them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Next = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        for handler in self.__dict__.get(ATTRIBUTE, ()):
            inner = _bound(handler, self, inner)
        return inner(*args, **kwargs)


    @property
    def components(self) -> Any:
        """Those of a pipeline. ``from_pipe`` leaves out a denoiser that has a class of ours."""
        found: Any = super().components  # type: ignore[misc]
        asked_by = sys._getframe(1).f_code.co_name
        if asked_by == "from_pipe" and any(isinstance(one, CallHandlers) for one in found.values()):
            raise ValueError(
                "from_pipe cannot take over a denoiser that is inside guide, as diffusers compares "
                "its class; call from_pipe before guide, or after it"
            )
        return found


def _bound(handler: Handler, own: Any, inner: Next) -> Next:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(own, inner, args, kwargs)

    return call


def add_handler(own: Any, handler: Handler) -> None:
    """Let calls of an object go through a handler, which goes before those that are there, but for
    those that say that they are ``outermost``."""
    add_class(own, CallHandlers)
    every = (*own.__dict__.get(ATTRIBUTE, ()), handler)
    own.__dict__[ATTRIBUTE] = tuple(sorted(every, key=_is_outermost))


def _is_outermost(handler: Handler) -> bool:
    return getattr(handler, "outermost", False)


def kind_of(own: Any) -> type:
    """The class of an object that may have handlers, without ours in front of it."""
    return next(kind for kind in type(own).__mro__ if FrontClass not in kind.__mro__)


def handlers_of(own: Any) -> tuple[Handler, ...]:
    """The handlers of an object, the oldest first."""
    found: tuple[Handler, ...] = own.__dict__.get(ATTRIBUTE, ())
    return found


def remove_handler(own: Any, handler: Handler) -> None:
    """Take a handler off; with the last one the object has its own class again."""
    left = tuple(one for one in own.__dict__.get(ATTRIBUTE, ()) if one is not handler)
    if left:
        own.__dict__[ATTRIBUTE] = left
        return
    own.__dict__.pop(ATTRIBUTE, None)
    remove_class(own, CallHandlers)
